"""The embedded store: one SQLite file (or `:memory:`) for one coordinator.

A file's work is done in one thread, so that a slow disk never holds up the event loop; `:memory:` is done in
place, which keeps simulations deterministic. Watchers are woken by the writes of this process: a lock file
sees to it that there is no other. Leases run on the monotonic clock that is given; their deadlines are not on
the disk, so after a restart each lease has its whole time to live anew, as in etcd after a change of leader.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from enova_common.errors import Conflict, EnovaError, InvalidField, Unavailable
from enova_coordinator.store import (
    Compare,
    Entry,
    LeaseLost,
    Operation,
    Revision,
    TransactionResult,
    WatchBatch,
    check_key,
    check_transaction,
)
from enova_coordinator.store.database import Database

MEMORY = ":memory:"
HISTORY_REVISIONS = 10_000  # at a handful of writes a second, the better part of an hour for a slow watcher
HISTORY_BYTES = 64 << 20
MAX_BYTES = 2 << 30  # etcd's default quota, for a like refusal at a like size
EXPIRY_RETRY_S = 1.0  # a lease that could not be ended (no space, disk error) is tried again

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class SqliteStore:
    """A Store in one file."""

    def __init__(
        self, database: Database, lock: _FileLock | None, *, threaded: bool, now: Callable[[], float]
    ) -> None:
        self._database = database
        self._lock = lock
        self._executor = ThreadPoolExecutor(1, "enova-store") if threaded else None
        self._now = now
        self._ttls_s = database.leases()
        self._deadlines = {lease: now() + ttl_s for lease, ttl_s in self._ttls_s.items()}
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._expiry: asyncio.Task[None] | None = None
        self._expire_not_before = now()
        self._closed = False
        self._set_timer()

    @classmethod
    async def open(
        cls,
        path: str | Path,
        *,
        now: Callable[[], float] = time.monotonic,
        max_bytes: int = MAX_BYTES,
        history_revisions: int = HISTORY_REVISIONS,
        history_bytes: int = HISTORY_BYTES,
    ) -> Self:
        """Open the file, making it where there is none; `:memory:` lives as long as the store.

        Raises Conflict (STORE_IN_USE) if another process has it open, Corrupt if it is damaged.
        """
        in_memory = str(path) == MEMORY
        lock = None if in_memory else _FileLock(Path(f"{path}.lock"))
        try:
            database = Database(
                str(path), history_revisions=history_revisions, history_bytes=history_bytes, max_bytes=max_bytes
            )
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return cls(database, lock, threaded=not in_memory, now=now)

    async def get(self, key: str) -> Entry | None:
        """See Store."""
        check_key(key)
        return await self._run(lambda: self._database.get(key))

    async def range(self, prefix: str, *, start_after: str = "", limit: int = 0) -> tuple[list[Entry], Revision]:
        """See Store."""
        check_key(prefix, "prefix")
        return await self._run(lambda: self._database.range(prefix, start_after, limit))

    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        """See Store."""
        check_transaction(compares, operations)
        return await self._run(lambda: self._database.transact(compares, operations), writes=True)

    async def watch(self, prefix: str, *, after: Revision) -> AsyncGenerator[WatchBatch, None]:
        """See Store."""
        check_key(prefix, "prefix")
        while not self._closed:
            changed = self._changed  # taken before the read, so that no change falls between read and wait
            batches, upto = await self._run(partial(self._database.changes, prefix, after))
            for batch in batches:
                yield batch
            after = upto
            if not batches:
                await changed.wait()

    async def lease(self, ttl_s: int) -> SqliteLease:
        """See Store."""
        if ttl_s < 1:
            raise InvalidField(f"{ttl_s} is less than a second", field="ttl_s")
        lease = await self._run(lambda: self._database.grant(ttl_s), writes=True)
        self._ttls_s[lease] = ttl_s
        self._deadlines[lease] = self._now() + ttl_s
        self._set_timer()
        return SqliteLease(self, lease, ttl_s)

    async def compact(self, revision: Revision) -> None:
        """See Store."""
        await self._run(lambda: self._database.compact(revision), writes=True)

    async def close(self) -> None:
        """See Store."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._expiry is not None:
            await asyncio.wait([self._expiry])
        if self._executor is not None:
            # What is under way ends first; the wait is in a thread, since it may be a slow disk.
            await asyncio.to_thread(self._executor.shutdown)
        self._database.close()
        if self._lock is not None:
            self._lock.release()
        self._wake_watchers()

    async def expire_leases(self) -> None:
        """End what is due by the clock; the store's own timer calls it, and whoever moves a given clock."""
        for lease, deadline in list(self._deadlines.items()):
            if deadline <= self._now():
                await self._end_lease(lease)

    async def renew(self, lease: int) -> None:
        """Start the lease's time anew."""
        self._check_open()
        if self._deadlines.get(lease, 0.0) <= self._now():
            raise LeaseLost(lease)
        self._deadlines[lease] = self._now() + self._ttls_s[lease]

    async def revoke(self, lease: int) -> None:
        """End the lease and delete its entries."""
        self._check_open()
        await self._end_lease(lease)

    async def _end_lease(self, lease: int) -> None:
        await self._submit(lambda: self._database.end_lease(lease), writes=True)
        self._deadlines.pop(lease, None)
        self._ttls_s.pop(lease, None)

    def _set_timer(self, floor_s: float = 0.0) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._deadlines and not self._closed:
            delay_s = max(floor_s, min(self._deadlines.values()) - self._now())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._start_expiry)

    def _start_expiry(self) -> None:
        self._expiry = asyncio.get_running_loop().create_task(self._expire_on_time())

    async def _expire_on_time(self) -> None:
        await self._expire_or_log()
        self._set_timer(self._expire_not_before - self._now())

    async def _expire_or_log(self) -> None:
        # An entry that outlives its lease for a while harms nobody: nothing else could be put in its place.
        if self._now() < self._expire_not_before:
            return
        try:
            await self.expire_leases()
        except EnovaError as error:
            self._expire_not_before = self._now() + EXPIRY_RETRY_S
            _log.warning("leases that ran out are still there: %s", error)

    async def _run(self, work: Callable[[], _T], *, writes: bool = False) -> _T:
        # Whatever ran out has ended before anything else is seen or done, however late the timer is.
        self._check_open()
        if self._deadlines and min(self._deadlines.values()) <= self._now():
            await self._expire_or_log()
        return await self._submit(work, writes=writes)

    async def _submit(self, work: Callable[[], _T], *, writes: bool) -> _T:
        self._check_open()
        if self._executor is None:
            try:
                return work()
            finally:
                if writes:
                    self._wake_watchers()
        loop = asyncio.get_running_loop()
        future: Future[_T] = self._executor.submit(work)
        if writes:
            # On the thread's own future: it is done when the write is, even if the caller was cancelled meanwhile.
            future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._wake_watchers))
        return await asyncio.wrap_future(future)

    def _wake_watchers(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the store is closed", reason="STORE_CLOSED")


class SqliteLease:
    """A lease in the embedded store."""

    def __init__(self, store: SqliteStore, lease: int, ttl_s: float) -> None:
        self._store = store
        self._id = lease
        self._ttl_s = ttl_s

    @property
    def id(self) -> int:
        """See Lease."""
        return self._id

    @property
    def ttl_s(self) -> float:
        """See Lease."""
        return self._ttl_s

    async def keepalive(self) -> None:
        """See Lease."""
        await self._store.renew(self._id)

    async def revoke(self) -> None:
        """See Lease."""
        await self._store.revoke(self._id)


class _FileLock:
    """An advisory lock that the kernel lets go of with the process, with the holder's pid in the file."""

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            remedy = "make the folder, and let the coordinator's user write there"
            raise InvalidField(f"cannot open {path}: {error.strerror}", field="path", remedy=remedy) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(self._descriptor)
            text = f"{path.with_suffix('')} is open in process {holder}"
            remedy = "stop that process, or give this one another file"
            raise Conflict(text, reason="STORE_IN_USE", remedy=remedy, metadata={"pid": holder}) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let go; the file stays, since removing it would let two lock two files of one name."""
        os.close(self._descriptor)
