"""What every Store promises, as checks that name no implementation: each raises AssertionError where it is broken."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from enova_common.errors import CallerError, Exhausted, Unavailable
from enova_coordinator.store import (
    MAX_OPERATIONS,
    MAX_TRANSACTION_BYTES,
    NO_SPACE,
    Changed,
    Compacted,
    Compare,
    CreateRevisionIs,
    Delete,
    Deleted,
    LeaseLost,
    ModRevisionIs,
    Operation,
    Put,
    Revision,
    Store,
    WatchBatch,
)
from enova_testing.store_tools import Watched, delete, gone, put, refused, watched


class StoreHarness(Protocol):
    """A store to check, and what a check can do to its world."""

    store: Store
    prefix: str
    """Keys of this check only; ends in a slash."""
    patience_s: float
    """How long a promise without a stated time may take."""

    async def pass_time(self, seconds: float) -> None:
        """Let this much of the leases' time pass."""
        ...

    async def restart(self) -> None:
        """Stop what keeps the data, and start it again; `store` is to be used from then on."""
        ...

    async def exhaust(self) -> None:
        """Leave no space for puts."""
        ...


Check = Callable[[StoreHarness], Awaitable[None]]


# -- reads and transactions ---------------------------------------------------------------------------------------


async def check_get_answers_what_was_put(harness: StoreHarness) -> None:
    """Any bytes come back as they were, with the revision that the transaction returned."""
    store, key = harness.store, harness.prefix + "a"
    assert await store.get(key) is None
    for value in (b"", b"\x00\xff text \n", bytes(range(256)) * 100):
        revision = await put(store, key, value)
        entry = await store.get(key)
        assert entry is not None
        assert (entry.key, entry.value, entry.mod_revision, entry.lease) == (key, value, revision, 0)
    await delete(store, key)
    assert await store.get(key) is None


async def check_create_if_absent_happens_once(harness: StoreHarness) -> None:
    """Of many that create one key at once exactly one succeeds, and its value is there."""
    store, key = harness.store, harness.prefix + "a"
    absent: list[Compare] = [ModRevisionIs(key, 0)]
    results = await asyncio.gather(*(store.transact(absent, [Put(key, b"%d" % i)]) for i in range(10)))
    winners = [i for i, result in enumerate(results) if result.succeeded]
    assert len(winners) == 1, results
    entry = await store.get(key)
    assert entry is not None
    assert entry.value == b"%d" % winners[0]


async def check_one_compare_that_fails_stops_everything(harness: StoreHarness) -> None:
    """Whichever of the compares does not hold, nothing happens and the revision stays."""
    store, a, b = harness.store, harness.prefix + "a", harness.prefix + "b"
    at_a, at_b = await put(store, a, b"old"), await put(store, b, b"old")
    operations: list[Operation] = [Put(a, b"new"), Delete(b), Put(harness.prefix + "c", b"new")]
    held: list[Compare] = [ModRevisionIs(a, at_a), CreateRevisionIs(b, at_b), ModRevisionIs(harness.prefix + "c", 0)]
    broken: list[Compare] = [ModRevisionIs(a, at_a - 1), CreateRevisionIs(b, 0), ModRevisionIs(a, 0)]
    for position in range(3):
        for wrong in broken:
            compares = [*held[:position], wrong, *held[position + 1 :]]
            result = await store.transact(compares, operations)
            assert not result.succeeded, compares
    entries, _ = await store.range(harness.prefix)
    assert [(entry.key, entry.value) for entry in entries] == [(a, b"old"), (b, b"old")]
    assert (await store.transact(held, operations)).succeeded


async def check_transaction_has_one_revision(harness: StoreHarness) -> None:
    """All entries of one transaction bear its revision, and the next transaction's is greater."""
    store = harness.store
    keys = [f"{harness.prefix}{i:03}" for i in range(MAX_OPERATIONS)]
    first = await store.transact([ModRevisionIs(keys[0], 0)], [Put(key, b"1") for key in keys])
    entries, _ = await store.range(harness.prefix)
    assert {entry.mod_revision for entry in entries} == {first.revision}
    second = await store.transact([ModRevisionIs(keys[0], first.revision)], [Put(key, b"2") for key in keys])
    entries, at = await store.range(harness.prefix)
    assert {entry.mod_revision for entry in entries} == {second.revision}
    assert at >= second.revision > first.revision


async def check_unguarded_and_oversized_writes_are_refused(harness: StoreHarness) -> None:
    """No compare, no operation, a key twice, too many, too large, a bad key: refused before anything happens."""
    store, key = harness.store, harness.prefix + "a"
    guard: list[Compare] = [ModRevisionIs(key, 0)]
    many: list[Operation] = [Put(f"{key}{i}", b"") for i in range(MAX_OPERATIONS + 1)]
    bad: list[tuple[Sequence[Compare], Sequence[Operation]]] = [
        ([], [Put(key, b"")]),
        ([], [Delete(key)]),
        (guard, []),
        (guard, [Put(key, b"1"), Put(key, b"2")]),
        (guard, [Put(key, b"1"), Delete(key)]),
        (guard, many),
        (guard * (MAX_OPERATIONS + 1), [Put(key, b"")]),
        (guard, [Put(key, b"x" * (MAX_TRANSACTION_BYTES + 1))]),
        (guard, [Put("", b"")]),
        (guard, [Put(key + " with space", b"")]),
        (guard, [Put(key + "\u00e4", b"")]),
    ]
    for compares, operations in bad:
        await refused(store.transact(compares, operations), CallerError)
    assert (await store.range(harness.prefix))[0] == []
    assert (await store.transact(guard, [Put(key, b"x" * (MAX_TRANSACTION_BYTES - len(key)))])).succeeded


async def check_create_revision_marks_one_life_of_a_key(harness: StoreHarness) -> None:
    """It stays while the key is put again, and is another after the key was deleted and created anew."""
    store, key = harness.store, harness.prefix + "a"
    created = await put(store, key, b"1")
    changed = await put(store, key, b"2")
    entry = await store.get(key)
    assert entry is not None
    assert (entry.create_revision, entry.mod_revision) == (created, changed)
    assert (await store.transact([CreateRevisionIs(key, created)], [Put(key, b"3")])).succeeded
    await delete(store, key)
    assert not (await store.transact([CreateRevisionIs(key, created)], [Put(key, b"4")])).succeeded
    again = await put(store, key, b"5")
    assert not (await store.transact([CreateRevisionIs(key, created)], [Put(key, b"6")])).succeeded
    entry = await store.get(key)
    assert entry is not None
    assert (entry.value, entry.create_revision) == (b"5", again)
    assert again > created


async def check_concurrent_increments_all_count(harness: StoreHarness) -> None:
    """n writers that read, add one and compare: exactly n increments, none lost."""
    store, key = harness.store, harness.prefix + "counter"
    await put(store, key, b"0")

    async def increment() -> None:
        while True:
            entry = await store.get(key)
            assert entry is not None
            value = b"%d" % (int(entry.value) + 1)
            if (await store.transact([ModRevisionIs(key, entry.mod_revision)], [Put(key, value)])).succeeded:
                return

    async with asyncio.timeout(3 * harness.patience_s):
        await asyncio.gather(*(increment() for _ in range(12)))
    entry = await store.get(key)
    assert entry is not None
    assert entry.value == b"12"


async def check_range_is_the_prefix_in_order(harness: StoreHarness) -> None:
    """Exactly the keys under the prefix, ordered, and pages of them by limit and start_after."""
    store = harness.store
    names = ["a", "a/1", "a/10", "a/2", "a/~", "a0", "b"]
    for name in reversed(names):
        await put(store, harness.prefix + name, name.encode())
    entries, _ = await store.range(harness.prefix)
    assert [entry.value.decode() for entry in entries] == names
    entries, _ = await store.range(harness.prefix + "a/")
    assert [entry.value.decode() for entry in entries] == ["a/1", "a/10", "a/2", "a/~"]
    pages: list[list[str]] = []
    last = ""
    while page := (await store.range(harness.prefix, start_after=last, limit=3))[0]:
        pages.append([entry.value.decode() for entry in page])
        last = page[-1].key
    assert pages == [names[:3], names[3:6], names[6:]]
    assert (await store.range(harness.prefix + "none/"))[0] == []


async def check_range_is_of_one_revision(harness: StoreHarness) -> None:
    """A long range beside a writer that changes its first and last key together: never one without the other."""
    store = harness.store
    keys = [f"{harness.prefix}{i:04}" for i in range(1100)]
    for start in range(0, len(keys), 100):
        part = keys[start : start + 100]
        assert (await store.transact([ModRevisionIs(part[0], 0)], [Put(key, b"0" * 500) for key in part])).succeeded
    ends = (keys[0], keys[-1])
    done = asyncio.Event()

    async def write(number: int) -> None:
        entry = await store.get(ends[0])
        assert entry is not None
        guard = ModRevisionIs(ends[0], entry.mod_revision)
        assert (await store.transact([guard], [Put(key, b"%d" % number) for key in ends])).succeeded

    async def keep_writing() -> None:
        for number in itertools.count(1):
            await write(number)
            await asyncio.sleep(0)
            if done.is_set():
                return

    await write(0)
    writer = asyncio.create_task(keep_writing())
    try:
        for _ in range(15):
            entries, revision = await store.range(harness.prefix)
            assert len(entries) == len(keys)
            assert (entries[0].value, entries[0].mod_revision) == (entries[-1].value, entries[-1].mod_revision)
            assert entries[0].mod_revision <= revision
            await asyncio.sleep(0)
    finally:
        done.set()
        await writer


async def check_reads_see_what_was_acknowledged(harness: StoreHarness) -> None:
    """After a transaction is answered, get and range show it and the range's revision includes it."""
    store, key = harness.store, harness.prefix + "a"
    for number in range(20):
        revision = await put(store, key, b"%d" % number)
        entries, at = await store.range(harness.prefix)
        assert [entry.value for entry in entries] == [b"%d" % number]
        assert at >= revision
        entry = await store.get(key)
        assert entry is not None
        assert entry.value == b"%d" % number


# -- watches ------------------------------------------------------------------------------------------------------


async def check_watch_tells_everything_once_in_order(harness: StoreHarness) -> None:
    """From a revision in the past on, through the present: every change, no other, none twice, in order."""
    store, prefix = harness.store, harness.prefix
    before = await put(store, prefix + "before", b"")
    expected: list[tuple[Revision, str, bytes | None]] = []

    async def write(number: int) -> None:
        key = f"{prefix}{number % 4}"
        if number % 5 == 4 and await store.get(key) is not None:
            expected.append((await delete(store, key), key, None))
        else:
            value = b"%d" % number
            expected.append((await put(store, key, value), key, value))

    for number in range(20):
        await write(number)
    async with watched(store, prefix, before) as watch:
        for number in range(20, 60):
            await write(number)
        expected.append((await put(store, prefix + "end", b""), prefix + "end", b""))
        await watch.until_key(prefix + "end", harness.patience_s)
    assert watch.told() == expected
    middle = expected[30][0]
    async with watched(store, prefix, middle) as watch:
        await watch.until_key(prefix + "end", harness.patience_s)
    assert watch.told() == expected[31:]


async def check_watch_tells_deletes(harness: StoreHarness) -> None:
    """A delete is an event with its own revision; deleting nothing is none."""
    store, key, end = harness.store, harness.prefix + "a", harness.prefix + "end"
    created = await put(store, key, b"1")
    assert (await store.transact([ModRevisionIs(end, 0)], [Delete(harness.prefix + "nothing")])).succeeded
    deleted = await delete(store, key)
    await put(store, end)
    async with watched(store, harness.prefix, created) as watch:
        await watch.until_key(end, harness.patience_s)
    assert watch.batches[0] == WatchBatch(deleted, (Deleted(key, deleted),))
    assert len(watch.batches) == 2


async def check_watch_keeps_transactions_whole(harness: StoreHarness) -> None:
    """All events of a transaction come in one batch, with entries as a get would show them."""
    store = harness.store
    keys = [f"{harness.prefix}{i:03}" for i in range(MAX_OPERATIONS)]
    before = await put(store, harness.prefix + "before")
    async with watched(store, harness.prefix, before) as watch:
        results = [
            await store.transact([ModRevisionIs(keys[0], 0)], [Put(key, b"x" * 7000) for key in keys]),
            await store.transact([CreateRevisionIs(keys[0], before + 1)], [Delete(key) for key in keys]),
            await store.transact([ModRevisionIs(keys[0], 0)], [Put(key, b"z" * 7000) for key in keys]),
        ]
        await put(store, harness.prefix + "end")
        await watch.until_key(harness.prefix + "end", harness.patience_s)
    assert [batch.revision for batch in watch.batches[:3]] == [result.revision for result in results]
    assert [sorted(event.key for event in batch.events) for batch in watch.batches[:3]] == [keys] * 3
    entry = await store.get(keys[0])
    assert entry in [event.entry for event in watch.batches[2].events if isinstance(event, Changed)]
    # Told from the past it is too much for one message of etcd, which sends it in parts.
    async with watched(store, harness.prefix, before) as late:
        await late.until_key(harness.prefix + "end", harness.patience_s)
    assert late.told() == watch.told()
    assert [batch.revision for batch in late.batches] == [batch.revision for batch in watch.batches]


async def check_watch_tells_only_its_prefix(harness: StoreHarness) -> None:
    """Neighbours of the prefix are not told, nor the other keys of a transaction that touched both."""
    store, prefix = harness.store, harness.prefix + "in/"
    before = await put(store, harness.prefix + "before")
    outside = [harness.prefix + name for name in ("in", "in0", "im/~", "out/a")]
    async with watched(store, prefix, before) as watch:
        for key in outside:
            await put(store, key)
        both: list[Operation] = [Put(prefix + "a", b""), Put(harness.prefix + "z", b"")]
        assert (await store.transact([ModRevisionIs(prefix + "a", 0)], both)).succeeded
        await put(store, prefix + "end")
        await watch.until_key(prefix + "end", harness.patience_s)
    assert [told[1] for told in watch.told()] == [prefix + "a", prefix + "end"]


async def check_watch_of_a_compacted_revision_says_so(harness: StoreHarness) -> None:
    """It raises Compacted, never skips; a list and a watch from its revision see all from then on."""
    store, key = harness.store, harness.prefix + "a"
    first = await put(store, key, b"0")
    for number in range(1, 10):
        newest = await put(store, key, b"%d" % number)
    await store.compact(newest)
    async with watched(store, harness.prefix, first) as watch:
        await watch.until_error(harness.patience_s)
    assert isinstance(watch.error, Compacted), watch.error
    assert watch.told() == []
    assert watch.error.revision > first
    entries, listed = await store.range(harness.prefix)
    assert [entry.value for entry in entries] == [b"9"]
    async with watched(store, harness.prefix, listed) as watch:
        changed = await put(store, key, b"10")
        await watch.until_key(key, harness.patience_s)
    assert watch.told() == [(changed, key, b"10")]


# -- leases -------------------------------------------------------------------------------------------------------


async def check_lease_takes_its_entries_along(harness: StoreHarness) -> None:
    """Not renewed, it ends after its time, its entries are deleted at one revision, and watchers are told."""
    store, keys = harness.store, [harness.prefix + "a", harness.prefix + "b"]
    lease = await store.lease(2)
    assert lease.id != 0
    put_at = await store.transact([ModRevisionIs(keys[0], 0)], [Put(key, b"", lease.id) for key in keys])
    await put(store, harness.prefix + "stays")
    entry = await store.get(keys[0])
    assert entry is not None
    assert entry.lease == lease.id
    async with watched(store, harness.prefix, put_at.revision) as watch:
        await harness.pass_time(0.5)
        assert len((await store.range(harness.prefix))[0]) == 3, "before its time"
        await harness.pass_time(lease.ttl_s)
        await watch.until_key(keys[1], harness.patience_s)
    assert sorted(event.key for event in watch.batches[-1].events) == keys
    assert all(isinstance(event, Deleted) for event in watch.batches[-1].events)
    assert [entry.key for entry in (await store.range(harness.prefix))[0]] == [harness.prefix + "stays"]


async def check_keepalive_keeps(harness: StoreHarness) -> None:
    """Renewed in time, it and its entries last beyond its first time to live."""
    store, key = harness.store, harness.prefix + "a"
    lease = await store.lease(2)
    await put(store, key, b"", lease.id)
    for _ in range(3):
        await harness.pass_time(lease.ttl_s / 2)
        await lease.keepalive()
    await harness.pass_time(lease.ttl_s / 4)
    assert await store.get(key) is not None
    await lease.revoke()


async def check_entry_without_lease_outlives_it(harness: StoreHarness) -> None:
    """An entry that was put again without the lease, or under another, does not end with the first."""
    store, keys = harness.store, [harness.prefix + "a", harness.prefix + "b"]
    first, second = await store.lease(2), await store.lease(60)
    for key, lease in zip(keys, (0, second.id), strict=True):
        await put(store, key, b"", first.id)
        await put(store, key, b"", lease)
    await first.revoke()
    assert [entry.lease for entry in (await store.range(harness.prefix))[0]] == [0, second.id]
    await second.revoke()
    assert [entry.key for entry in (await store.range(harness.prefix))[0]] == keys[:1]


async def check_lost_lease_says_so(harness: StoreHarness) -> None:
    """After its end a keepalive and a put under it raise LeaseLost, and the put did nothing."""
    store, key = harness.store, harness.prefix + "a"
    lease = await store.lease(1)
    await put(store, key, b"", lease.id)
    await harness.pass_time(lease.ttl_s)
    await gone(store, key, harness.patience_s)
    await refused(lease.keepalive(), LeaseLost)
    await refused(put(store, key, b"", lease.id), LeaseLost)
    assert await store.get(key) is None
    await lease.revoke()


async def check_revoke_ends_at_once(harness: StoreHarness) -> None:
    """A revoked lease's entries are gone when the call returns; revoking again is no error."""
    store, key = harness.store, harness.prefix + "a"
    lease = await store.lease(60)
    await put(store, key, b"", lease.id)
    await lease.revoke()
    assert await store.get(key) is None
    await lease.revoke()


# -- a store that restarts, a store that is full ------------------------------------------------------------------


async def check_restart_loses_nothing(harness: StoreHarness) -> None:
    """Entries, revisions and leases are there after a restart, and history up to it can still be watched."""
    key, leased, end = (harness.prefix + name for name in ("a", "leased", "end"))
    store = harness.store
    before = await put(store, key, b"0")
    lease = await store.lease(2)
    expected: list[tuple[Revision, str, bytes | None]] = [(await put(store, leased, b"", lease.id), leased, b"")]
    expected += [(await put(store, key, b"%d" % number), key, b"%d" % number) for number in range(10)]
    entries, revision = await store.range(harness.prefix)
    await harness.restart()
    store = harness.store
    after = await store.range(harness.prefix)
    assert after[0] == entries
    assert after[1] >= revision
    await harness.pass_time(lease.ttl_s)
    await gone(store, leased, harness.patience_s + lease.ttl_s)
    await put(store, end)
    async with watched(store, harness.prefix, before) as watch:
        await watch.until_key(end, harness.patience_s)
    assert watch.told()[: len(expected)] == expected
    assert [told[1] for told in watch.told()[len(expected) :]] == [leased, end]


async def check_watch_goes_on_over_restarts(harness: StoreHarness) -> None:
    """A watch, resumed where it ended if it ended, tells each change before, between and after restarts once."""
    key, end = harness.prefix + "a", harness.prefix + "end"
    expected: list[tuple[Revision, str, bytes | None]] = []
    result = Watched()

    async def follow(after: Revision) -> None:
        while True:
            with contextlib.suppress(Unavailable):  # an embedded store that is closed ends its watches
                async with contextlib.aclosing(harness.store.watch(harness.prefix, after=after)) as batches:
                    async for batch in batches:
                        result.batches.append(batch)
                        after = batch.revision
            await asyncio.sleep(0.01)

    follower = asyncio.create_task(follow(await put(harness.store, key, b"before")))
    try:
        for restarts in range(3):
            if restarts:
                await harness.restart()
            for number in range(5):
                value = b"%d %d" % (restarts, number)
                expected.append((await put(harness.store, key, value), key, value))
        expected.append((await put(harness.store, end), end, b""))
        await result.until_key(end, 2 * harness.patience_s)
    finally:
        follower.cancel()
        await asyncio.wait([follower])
    assert result.told() == expected


async def check_full_store_refuses_puts_and_still_reads(harness: StoreHarness) -> None:
    """With no space a put raises Exhausted with the reason and changes nothing; reads and leases go on."""
    store, key = harness.store, harness.prefix + "a"
    await put(store, key, b"before")
    lease = await store.lease(60)
    await put(store, harness.prefix + "leased", b"", lease.id)
    await harness.exhaust()
    refusal = await refused(put(store, key, b"after"), Exhausted)
    assert refusal.reason == NO_SPACE
    assert refusal.remedy
    entry = await store.get(key)
    assert entry is not None
    assert entry.value == b"before"
    assert [entry.key for entry in (await store.range(key))[0]] == [key]
    await lease.keepalive()
    await lease.revoke()
    assert await store.get(harness.prefix + "leased") is None


CHECKS: tuple[Check, ...] = (
    check_get_answers_what_was_put,
    check_create_if_absent_happens_once,
    check_one_compare_that_fails_stops_everything,
    check_transaction_has_one_revision,
    check_unguarded_and_oversized_writes_are_refused,
    check_create_revision_marks_one_life_of_a_key,
    check_concurrent_increments_all_count,
    check_range_is_the_prefix_in_order,
    check_range_is_of_one_revision,
    check_reads_see_what_was_acknowledged,
    check_watch_tells_everything_once_in_order,
    check_watch_tells_deletes,
    check_watch_keeps_transactions_whole,
    check_watch_tells_only_its_prefix,
    check_watch_of_a_compacted_revision_says_so,
    check_lease_takes_its_entries_along,
    check_keepalive_keeps,
    check_entry_without_lease_outlives_it,
    check_lost_lease_says_so,
    check_revoke_ends_at_once,
    check_restart_loses_nothing,
    check_watch_goes_on_over_restarts,
    check_full_store_refuses_puts_and_still_reads,
)
