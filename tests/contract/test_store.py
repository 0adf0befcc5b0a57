"""Every store keeps every promise of the suite; neither the suite nor its checks know which store it is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from enova_coordinator.store.sqlite import MEMORY
from enova_testing.etcd_server import EtcdServer, installed_versions
from enova_testing.store_harness import EtcdHarness, Harness, SqliteHarness
from enova_testing.store_suite import (
    CHECKS,
    Check,
    check_full_store_refuses_puts_and_still_reads,
    check_restart_loses_nothing,
    check_watch_goes_on_over_restarts,
)

# etcd needs some room to start at all; the filler then reaches the quota in a second.
QUOTA_BYTES = 16 << 20
# Memory ends with its process; that the suite would notice is shown in test_store_suite_bites.py.
OF_LASTING_STORES = (check_restart_loses_nothing, check_watch_goes_on_over_restarts)
ETCD = {binaries.version: binaries for binaries in installed_versions()}


KINDS = ["sqlite-memory", "sqlite-file", *(f"etcd-{version}" for version in ETCD)]


def _pairs() -> Iterator[object]:
    for kind in KINDS:
        marks = (pytest.mark.etcd, pytest.mark.network) if kind.startswith("etcd") else ()
        for check in CHECKS:
            if kind != "sqlite-memory" or check not in OF_LASTING_STORES:
                yield pytest.param(kind, check, marks=marks, id=f"{kind}-{check.__name__.removeprefix('check_')}")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, EtcdServer]]:
    """One server a version for the whole module; started when first asked for."""
    started: dict[str, EtcdServer] = {}
    yield started
    for server in started.values():
        server.kill()


@pytest.fixture
async def harness(
    kind: str, check: Check, tmp_path: Path, servers: dict[str, EtcdServer]
) -> AsyncIterator[Harness]:
    """A store with nothing under its prefix."""
    made: Harness
    own: EtcdServer | None = None
    match kind.split("-", 1):
        case ["sqlite", "memory"]:
            made = SqliteHarness(MEMORY)
        case ["sqlite", _]:
            made = SqliteHarness(tmp_path / "store.db")
        case [_, version] if check is check_full_store_refuses_puts_and_still_reads:
            own = EtcdServer(tmp_path, ETCD[version], quota_bytes=QUOTA_BYTES)
            own.start()
            made = EtcdHarness(own)
        case [_, version]:
            if version not in servers:
                servers[version] = EtcdServer(tmp_path, ETCD[version])
                servers[version].start()
            made = EtcdHarness(servers[version])
        case _:
            raise AssertionError(kind)
    await made.open()
    yield made
    await made.close()
    if own is not None:
        own.kill()


@pytest.mark.parametrize(("kind", "check"), list(_pairs()))
async def test_store_keeps_its_promise(harness: Harness, check: Check) -> None:
    await check(harness)
