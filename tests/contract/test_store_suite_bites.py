"""The suite of stores bites: for each promise there is a store that breaks it, and the promise's check fails on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace

import pytest

from enova_common.errors import CallerError, Exhausted
from enova_coordinator.store import (
    Changed,
    Compacted,
    Compare,
    CreateRevisionIs,
    Deleted,
    Entry,
    Lease,
    LeaseLost,
    ModRevisionIs,
    Operation,
    Put,
    Revision,
    Store,
    TransactionResult,
    WatchBatch,
)
from enova_coordinator.store.sqlite import MEMORY, SqliteStore
from enova_testing import store_suite as suite
from enova_testing.store_harness import SqliteHarness

PATIENCE_S = 0.3  # the twin is in memory: what has not come by then does not come


@dataclass
class RightLease:
    """A lease passed on as it is."""

    lease: Lease

    @property
    def id(self) -> int:
        return self.lease.id

    @property
    def ttl_s(self) -> float:
        return self.lease.ttl_s

    async def keepalive(self) -> None:
        await self.lease.keepalive()

    async def revoke(self) -> None:
        await self.lease.revoke()


@dataclass
class RightStore:
    """A store passed on as it is; the wrong ones below change one thing each."""

    store: Store

    async def get(self, key: str) -> Entry | None:
        return await self.store.get(key)

    async def range(self, prefix: str, *, start_after: str = "", limit: int = 0) -> tuple[list[Entry], Revision]:
        return await self.store.range(prefix, start_after=start_after, limit=limit)

    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        return await self.store.transact(compares, operations)

    async def watch(self, prefix: str, *, after: Revision) -> AsyncGenerator[WatchBatch, None]:
        async for batch in self.store.watch(prefix, after=after):
            if (told := self.tell(batch)) is not None:
                yield told

    def tell(self, batch: WatchBatch) -> WatchBatch | None:
        return batch

    async def lease(self, ttl_s: int) -> Lease:
        return RightLease(await self.store.lease(ttl_s))

    async def compact(self, revision: Revision) -> None:
        await self.store.compact(revision)

    async def close(self) -> None:
        await self.store.close()


class CutsValuesAtNul(RightStore):
    async def get(self, key: str) -> Entry | None:
        entry = await self.store.get(key)
        return entry and replace(entry, value=entry.value.split(b"\0")[0])


class ForgetsLastCompare(RightStore):
    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        return await self.store.transact(list(compares)[:-1] or compares, operations)


class IgnoresCreateCompares(RightStore):
    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        kept = [compare for compare in compares if not isinstance(compare, CreateRevisionIs)]
        return await self.store.transact(kept or [ModRevisionIs("/enova/absent", 0)], operations)


class ChecksThenWrites(RightStore):
    """Compares first and writes later: what came between is overwritten."""

    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        absent: list[Compare] = [ModRevisionIs("/enova/absent", 0)]
        for compare in compares:
            entry = await self.store.get(compare.key)
            found = 0 if entry is None else entry.mod_revision
            if isinstance(compare, CreateRevisionIs):
                found = 0 if entry is None else entry.create_revision
            if found != compare.revision:
                return TransactionResult(succeeded=False, revision=found)
        await asyncio.sleep(0)
        return await self.store.transact(absent, operations)


class WritesOneByOne(RightStore):
    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        result = await self.store.transact(compares, operations[:1])
        for operation in operations[1:] if result.succeeded else ():
            result = await self.store.transact([ModRevisionIs("/enova/absent", 0)], [operation])
        return result


class TakesUnguardedWrites(RightStore):
    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        return await self.store.transact(compares or [ModRevisionIs("/enova/absent", 0)], operations)


class TakesDoubledKeys(RightStore):
    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        last = {operation.key: operation for operation in operations}
        return await self.store.transact(compares, list(last.values()))


class CutsLargeTransactions(RightStore):
    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        return await self.store.transact(compares, operations[:128])


class ForgetsCreation(RightStore):
    async def get(self, key: str) -> Entry | None:
        entry = await self.store.get(key)
        return entry and replace(entry, create_revision=entry.mod_revision)


@dataclass
class GetsLate(RightStore):
    seen: dict[str, Entry] = field(default_factory=dict)

    async def get(self, key: str) -> Entry | None:
        entry = await self.store.get(key)
        late = self.seen.get(key, entry)
        if entry is not None:
            self.seen[key] = entry
        return late


@dataclass
class RangesLate(RightStore):
    seen: dict[str, tuple[list[Entry], Revision]] = field(default_factory=dict)

    async def range(self, prefix: str, *, start_after: str = "", limit: int = 0) -> tuple[list[Entry], Revision]:
        answer = await self.store.range(prefix, start_after=start_after, limit=limit)
        late = self.seen.get(prefix, answer)
        self.seen[prefix] = answer
        return late


class RangesBackwards(RightStore):
    async def range(self, prefix: str, *, start_after: str = "", limit: int = 0) -> tuple[list[Entry], Revision]:
        entries, revision = await self.store.range(prefix, start_after=start_after, limit=limit)
        return entries[::-1], revision


class RangesTooWide(RightStore):
    async def range(self, prefix: str, *, start_after: str = "", limit: int = 0) -> tuple[list[Entry], Revision]:
        return await self.store.range(prefix.rstrip("/"), start_after=start_after, limit=limit)


class IgnoresLimit(RightStore):
    async def range(self, prefix: str, *, start_after: str = "", limit: int = 0) -> tuple[list[Entry], Revision]:
        return await self.store.range(prefix, start_after=start_after)


class RangesInTornPages(RightStore):
    """Each page of its own moment."""

    async def range(self, prefix: str, *, start_after: str = "", limit: int = 0) -> tuple[list[Entry], Revision]:
        entries: list[Entry] = []
        while True:
            left = limit - len(entries) if limit else 500
            page, revision = await self.store.range(prefix, start_after=start_after, limit=min(500, left))
            entries += page
            if len(page) < 500:
                return entries, revision
            start_after = page[-1].key
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)


@dataclass
class LosesEvents(RightStore):
    told: int = 0

    def tell(self, batch: WatchBatch) -> WatchBatch | None:
        self.told += 1
        return None if self.told % 7 == 0 else batch


class TellsTwice(RightStore):
    async def watch(self, prefix: str, *, after: Revision) -> AsyncGenerator[WatchBatch, None]:
        async for batch in self.store.watch(prefix, after=after):
            yield batch
            if batch.revision % 5 == 0:
                yield batch


class TellsOutOfOrder(RightStore):
    async def watch(self, prefix: str, *, after: Revision) -> AsyncGenerator[WatchBatch, None]:
        held: WatchBatch | None = None
        async for batch in self.store.watch(prefix, after=after):
            if held is None and batch.revision % 5 == 0:
                held = batch
                continue
            yield batch
            if held is not None:
                yield held
                held = None


class WatchesFromNow(RightStore):
    async def watch(self, prefix: str, *, after: Revision) -> AsyncGenerator[WatchBatch, None]:
        now = (await self.store.range(prefix, limit=1))[1]
        async for batch in self.store.watch(prefix, after=max(now, after)):
            yield batch


class WatchesOneTooFar(RightStore):
    async def watch(self, prefix: str, *, after: Revision) -> AsyncGenerator[WatchBatch, None]:
        async for batch in self.store.watch(prefix, after=after + 1):
            yield batch


class HidesDeletes(RightStore):
    def tell(self, batch: WatchBatch) -> WatchBatch | None:
        kept = tuple(event for event in batch.events if isinstance(event, Changed))
        return replace(batch, events=kept) if kept else None


class TellsDeletesAsEmptyPuts(RightStore):
    def tell(self, batch: WatchBatch) -> WatchBatch | None:
        events = (_as_put(event) if isinstance(event, Deleted) else event for event in batch.events)
        return replace(batch, events=tuple(events))


def _as_put(event: Deleted) -> Changed:
    return Changed(Entry(key=event.key, value=b"", create_revision=1, mod_revision=event.mod_revision))


class SplitsBatches(RightStore):
    async def watch(self, prefix: str, *, after: Revision) -> AsyncGenerator[WatchBatch, None]:
        async for batch in self.store.watch(prefix, after=after):
            for event in batch.events:
                yield WatchBatch(batch.revision, (event,))


class WatchesTooWide(RightStore):
    async def watch(self, prefix: str, *, after: Revision) -> AsyncGenerator[WatchBatch, None]:
        async for batch in self.store.watch(prefix.rstrip("/"), after=after):
            yield batch


class HidesCompaction(RightStore):
    async def watch(self, prefix: str, *, after: Revision) -> AsyncGenerator[WatchBatch, None]:
        try:
            async for batch in self.store.watch(prefix, after=after):
                yield batch
        except Compacted as error:
            async for batch in self.store.watch(prefix, after=error.revision):
                yield batch


class ForgetsLeaseOfEntries(RightStore):
    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        free = [replace(op, lease=0) if isinstance(op, Put) else op for op in operations]
        return await self.store.transact(compares, free)


class HidesExpiry(RightStore):
    """Tells deletes of transactions only: those of more than one key are the lease's in that check."""

    def tell(self, batch: WatchBatch) -> WatchBatch | None:
        return None if all(isinstance(event, Deleted) for event in batch.events) else batch


@dataclass
class KeepsFirstLeaseForEver(RightStore):
    leases: dict[str, int] = field(default_factory=dict)

    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        kept = [
            replace(op, lease=self.leases.setdefault(op.key, op.lease)) if isinstance(op, Put) else op
            for op in operations
        ]
        return await self.store.transact(compares, kept)


@dataclass
class WrongLease(RightLease):
    renews: bool = True
    tells_loss: bool = True
    revokes: bool = True

    async def keepalive(self) -> None:
        try:
            if self.renews:
                await self.lease.keepalive()
        except LeaseLost:
            if self.tells_loss:
                raise

    async def revoke(self) -> None:
        if self.revokes:
            await self.lease.revoke()


class KeepaliveDoesNothing(RightStore):
    async def lease(self, ttl_s: int) -> Lease:
        return WrongLease(await self.store.lease(ttl_s), renews=False)


class KeepaliveNeverFails(RightStore):
    async def lease(self, ttl_s: int) -> Lease:
        return WrongLease(await self.store.lease(ttl_s), tells_loss=False)


class RevokeDoesNothing(RightStore):
    async def lease(self, ttl_s: int) -> Lease:
        return WrongLease(await self.store.lease(ttl_s), revokes=False)


@dataclass
class ShortLease(RightLease):
    claimed_s: float

    @property
    def ttl_s(self) -> float:
        return self.claimed_s


class GrantsLessThanItSays(RightStore):
    async def lease(self, ttl_s: int) -> Lease:
        return ShortLease(await self.store.lease(1), claimed_s=ttl_s)


class PutsUnderLostLease(RightStore):
    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        try:
            return await self.store.transact(compares, operations)
        except LeaseLost:
            return await ForgetsLeaseOfEntries(self.store).transact(compares, operations)


class HidesFullness(RightStore):
    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        try:
            return await self.store.transact(compares, operations)
        except Exhausted:
            return TransactionResult(succeeded=True, revision=0)


class CallsFullnessSomethingElse(RightStore):
    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        try:
            return await self.store.transact(compares, operations)
        except Exhausted as error:
            raise CallerError("no") from error


WRONG: list[tuple[type[RightStore], suite.Check]] = [
    (CutsValuesAtNul, suite.check_get_answers_what_was_put),
    (ChecksThenWrites, suite.check_create_if_absent_happens_once),
    (ForgetsLastCompare, suite.check_one_compare_that_fails_stops_everything),
    (IgnoresCreateCompares, suite.check_one_compare_that_fails_stops_everything),
    (WritesOneByOne, suite.check_transaction_has_one_revision),
    (TakesUnguardedWrites, suite.check_unguarded_and_oversized_writes_are_refused),
    (TakesDoubledKeys, suite.check_unguarded_and_oversized_writes_are_refused),
    (CutsLargeTransactions, suite.check_unguarded_and_oversized_writes_are_refused),
    (ForgetsCreation, suite.check_create_revision_marks_one_life_of_a_key),
    (ChecksThenWrites, suite.check_concurrent_increments_all_count),
    (RangesBackwards, suite.check_range_is_the_prefix_in_order),
    (RangesTooWide, suite.check_range_is_the_prefix_in_order),
    (IgnoresLimit, suite.check_range_is_the_prefix_in_order),
    (RangesInTornPages, suite.check_range_is_of_one_revision),
    (RangesLate, suite.check_reads_see_what_was_acknowledged),
    (GetsLate, suite.check_reads_see_what_was_acknowledged),
    (LosesEvents, suite.check_watch_tells_everything_once_in_order),
    (TellsTwice, suite.check_watch_tells_everything_once_in_order),
    (TellsOutOfOrder, suite.check_watch_tells_everything_once_in_order),
    (WatchesFromNow, suite.check_watch_tells_everything_once_in_order),
    (WatchesOneTooFar, suite.check_watch_tells_everything_once_in_order),
    (HidesDeletes, suite.check_watch_tells_deletes),
    (TellsDeletesAsEmptyPuts, suite.check_watch_tells_deletes),
    (SplitsBatches, suite.check_watch_keeps_transactions_whole),
    (WatchesTooWide, suite.check_watch_tells_only_its_prefix),
    (HidesCompaction, suite.check_watch_of_a_compacted_revision_says_so),
    (ForgetsLeaseOfEntries, suite.check_lease_takes_its_entries_along),
    (HidesExpiry, suite.check_lease_takes_its_entries_along),
    (KeepaliveDoesNothing, suite.check_keepalive_keeps),
    (GrantsLessThanItSays, suite.check_keepalive_keeps),
    (KeepsFirstLeaseForEver, suite.check_entry_without_lease_outlives_it),
    (KeepaliveNeverFails, suite.check_lost_lease_says_so),
    (PutsUnderLostLease, suite.check_lost_lease_says_so),
    (RevokeDoesNothing, suite.check_revoke_ends_at_once),
    (HidesFullness, suite.check_full_store_refuses_puts_and_still_reads),
    (CallsFullnessSomethingElse, suite.check_full_store_refuses_puts_and_still_reads),
]


class WrappedHarness(SqliteHarness):
    """The store in memory, behind a wrapper."""

    def __init__(self, wrapper: type[RightStore]) -> None:
        super().__init__(MEMORY)
        self.patience_s = PATIENCE_S
        self._wrapper = wrapper

    async def open(self) -> None:
        await super().open()
        self.store = self._wrapper(self._store)


class ForgetsOnRestart(WrappedHarness):
    """What was in the store is gone after a restart."""

    async def restart(self) -> None:
        old = self._store
        self._store = await SqliteStore.open(MEMORY, now=lambda: self._time_s)
        self.store = self._wrapper(self._store)
        await old.close()


async def broken(check: suite.Check, harness: SqliteHarness) -> bool:
    """Whether the check fails on the store."""
    await harness.open()
    try:
        await check(harness)
    except (AssertionError, LookupError, CallerError, Exhausted):
        return True
    finally:
        await harness.close()
    return False


@pytest.mark.parametrize(("wrong", "check"), WRONG, ids=lambda value: value.__name__.removeprefix("check_"))
async def test_check_fails_on_the_store_that_breaks_its_rule(wrong: type[RightStore], check: suite.Check) -> None:
    assert await broken(check, WrappedHarness(wrong))


@pytest.mark.parametrize("check", [suite.check_restart_loses_nothing, suite.check_watch_goes_on_over_restarts])
async def test_check_fails_on_a_store_that_forgets(check: suite.Check) -> None:
    assert await broken(check, ForgetsOnRestart(RightStore))


@pytest.mark.parametrize("check", suite.CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
async def test_wrapper_alone_breaks_nothing(check: suite.Check) -> None:
    assert not await broken(check, WrappedHarness(RightStore))


def test_every_check_has_a_store_that_breaks_it() -> None:
    of_restarts = {suite.check_restart_loses_nothing, suite.check_watch_goes_on_over_restarts}
    assert {check for _, check in WRONG} | of_restarts == set(suite.CHECKS)
