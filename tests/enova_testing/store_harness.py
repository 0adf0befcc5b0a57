"""The stores that the suite is run on: SQLite in memory and on disk, and etcd of each version that is installed."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import TypeAlias

from enova_common.errors import Exhausted
from enova_coordinator.store import ModRevisionIs, Put, Store
from enova_coordinator.store.etcd import EtcdSettings, EtcdStore
from enova_coordinator.store.sqlite import MEMORY, SqliteStore
from enova_testing.etcd_server import EtcdServer

SMALL_BYTES = 8 << 20  # a bound that is soon reached, and above what any other check writes at a time
_FILLER_BYTES = 200_000
_numbers = itertools.count(1)


class SqliteHarness:
    """The embedded store under a clock that only the check moves."""

    def __init__(self, path: str | Path, *, max_bytes: int = SMALL_BYTES) -> None:
        self.prefix = f"/enova/test/{next(_numbers)}/"
        self.patience_s = 2.0
        self._path = path
        self._max_bytes = max_bytes
        self._time_s = 0.0
        self.store: Store
        self._store: SqliteStore

    async def open(self) -> None:
        """Open the store."""
        self.store = self._store = await SqliteStore.open(
            self._path, now=lambda: self._time_s, max_bytes=self._max_bytes
        )

    async def close(self) -> None:
        """Close the store."""
        await self._store.close()

    async def pass_time(self, seconds: float) -> None:
        """See StoreHarness."""
        self._time_s += seconds
        await self._store.expire_leases()

    async def restart(self) -> None:
        """See StoreHarness; memory does not survive, so there it is nothing."""
        if self._path != MEMORY:
            await self.close()
            await self.open()

    async def exhaust(self) -> None:
        """See StoreHarness."""
        await fill(self._store, self.prefix)


class EtcdHarness:
    """A store in a real etcd, in real time."""

    def __init__(self, server: EtcdServer) -> None:
        self.prefix = f"/enova/test/{next(_numbers)}/"
        self.patience_s = 10.0
        self.server = server
        self.store: Store
        self._store: EtcdStore

    async def open(self) -> None:
        """Connect."""
        self.store = self._store = await EtcdStore.open(EtcdSettings(endpoints=(self.server.endpoint,)))

    async def close(self) -> None:
        """Disconnect."""
        await self._store.close()

    async def pass_time(self, seconds: float) -> None:
        """See StoreHarness."""
        await asyncio.sleep(seconds)

    async def restart(self) -> None:
        """See StoreHarness: SIGKILL, so that only what is on the disk comes back."""
        await asyncio.to_thread(self.server.kill)
        await asyncio.to_thread(self.server.start)

    async def exhaust(self) -> None:
        """See StoreHarness."""
        await fill(self._store, self.prefix)


async def fill(store: Store, prefix: str) -> None:
    """Put until the store refuses, beside the check's keys."""
    beside = prefix.rstrip("/") + "-filler/"
    for number in range(1000):
        key = f"{beside}{number}"
        try:
            await store.transact([ModRevisionIs(key, 0)], [Put(key, b"x" * _FILLER_BYTES)])
        except Exhausted:
            return
    raise AssertionError("the store takes puts without end")


Harness: TypeAlias = SqliteHarness | EtcdHarness
