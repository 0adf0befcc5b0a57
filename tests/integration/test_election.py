"""Election on both stores: one leads, the others know whom to ask, and whoever cannot renew ends itself."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from enova_common.errors import InvalidField
from enova_coordinator.election import LEADER_KEY, MARGIN_S, Election, Leadership
from enova_coordinator.store import Entry, ModRevisionIs, Put, Revision, Store
from enova_coordinator.store.etcd import EtcdSettings, EtcdStore
from enova_coordinator.store.sqlite import MEMORY, SqliteStore
from enova_testing.candidate_process import CandidateProcess
from enova_testing.etcd_server import EtcdServer
from enova_testing.waiting import until_async

pytestmark = [pytest.mark.network]
TTL_S = 2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    made = EtcdServer(tmp_path)
    yield made
    made.kill()


@pytest.fixture(params=["sqlite", pytest.param("etcd", marks=pytest.mark.etcd)])
async def store(request: pytest.FixtureRequest, server: EtcdServer) -> AsyncIterator[Store]:
    made: Store
    if request.param == "sqlite":
        made = await SqliteStore.open(MEMORY)
    else:
        server.start()
        made = await EtcdStore.open(EtcdSettings(endpoints=(server.endpoint,)))
    yield made
    await made.close()


async def lead_until_cancelled(leadership: Leadership) -> None:
    await asyncio.Event().wait()


@asynccontextmanager
async def standing(store: Store, name: str, ttl_s: int = TTL_S) -> AsyncIterator[Election]:
    """A candidate for the length of the block; at its end it resigns."""
    election = Election(store, coordinator_id=name, api_address=f"{name}:7000", ttl_s=ttl_s)
    task = asyncio.create_task(election.run(lead_until_cancelled))
    try:
        yield election
    finally:
        task.cancel()
        await asyncio.wait([task])


async def led(election: Election) -> Leadership:
    await until_async(lambda: election.leadership, what="it leads")
    assert election.leadership is not None
    return election.leadership


async def test_one_leads_and_the_other_knows_whom_to_ask(store: Store) -> None:
    async with standing(store, "a") as a:
        leadership = await led(a)
        async with standing(store, "b") as b:
            await until_async(lambda: b.leader)
            assert b.leader is not None
            assert (b.leader.coordinator_id, b.leader.api_address) == ("a", "a:7000")
            assert b.leader.term == leadership.term
            assert b.leadership is None
            # Both terms of a lease later nothing has changed: keepalives keep it.
            await asyncio.sleep(TTL_S * 1.2)
            assert leadership.is_leading()
            assert b.leadership is None


async def test_resigning_hands_over_at_once_with_a_greater_term(store: Store) -> None:
    async with AsyncExitStack() as first:
        a = await first.enter_async_context(standing(store, "a"))
        old = await led(a)
        async with standing(store, "b") as b:
            await until_async(lambda: b.leader)
            began = time.monotonic()
            await first.aclose()
            new = await led(b)
            assert time.monotonic() - began < 1.0
            assert new.term > old.term
            assert not old.is_leading()
            assert old.reason == "resigned"


async def test_guard_holds_for_the_term_and_not_beyond(store: Store) -> None:
    key = "/enova/test/object"
    async with standing(store, "a") as a:
        old = await led(a)
        assert (await store.transact([old.guard(), ModRevisionIs(key, 0)], [Put(key, b"1")])).succeeded
    assert not (await store.transact([old.guard()], [Put(key, b"2")])).succeeded
    async with standing(store, "a") as again:
        new = await led(again)
        assert not (await store.transact([old.guard()], [Put(key, b"3")])).succeeded
        assert (await store.transact([new.guard()], [Put(key, b"4")])).succeeded


async def test_leader_whose_key_is_taken_ends_at_once_and_stands_again(store: Store) -> None:
    async with standing(store, "a") as a:
        old = await led(a)
        await old.lease.revoke()
        assert await asyncio.wait_for(old.ended(), 1.0) == "the leader key is no longer ours"
        new = await led(a)
        assert new.term > old.term


async def test_serve_that_fails_resigns_and_is_heard(store: Store) -> None:
    async def fail(leadership: Leadership) -> None:
        raise ZeroDivisionError

    election = Election(store, coordinator_id="a", api_address="", ttl_s=TTL_S)
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(election.run(fail), 5.0)
    assert await store.get(LEADER_KEY) is None


async def test_defect_in_watching_the_leader_is_heard() -> None:
    class Defective(SqliteStore):
        async def range(self, prefix: str, *, start_after: str = "", limit: int = 0) -> tuple[list[Entry], Revision]:
            raise ZeroDivisionError

    store = await Defective.open(MEMORY)
    election = Election(store, coordinator_id="a", api_address="", ttl_s=TTL_S)
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(election.run(lead_until_cancelled), 5.0)
    await store.close()


async def test_serve_is_cancelled_before_the_key_is_given_up(store: Store) -> None:
    seen: list[bool] = []

    async def serve(leadership: Leadership) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            assert not leadership.is_leading()
            seen.append(await store.get(LEADER_KEY) is not None)

    election = Election(store, coordinator_id="a", api_address="", ttl_s=TTL_S)
    task = asyncio.create_task(election.run(serve))
    await led(election)
    task.cancel()
    await asyncio.wait([task])
    assert seen == [True]
    assert await store.get(LEADER_KEY) is None


async def test_unreadable_leader_record_is_respected_as_a_leader_nobody_can_reach(store: Store) -> None:
    await store.transact([ModRevisionIs(LEADER_KEY, 0)], [Put(LEADER_KEY, b"\xff")])
    async with standing(store, "a") as a:
        await asyncio.sleep(0.3)  # several rounds in which it could have taken over
        assert a.leadership is None
        assert a.leader is None


async def test_deadline_counts_from_the_start_of_the_last_keepalive() -> None:
    now = [100.0]
    store = await SqliteStore.open(MEMORY, now=lambda: now[0])
    election = Election(store, coordinator_id="a", api_address="", ttl_s=TTL_S, now=lambda: now[0])
    task = asyncio.create_task(election.run(lead_until_cancelled))
    leadership = await led(election)
    assert leadership.deadline == 100.0 + TTL_S - MARGIN_S
    assert leadership.is_leading(leadership.deadline - 0.001)
    assert not leadership.is_leading(leadership.deadline)
    # As if the machine slept: the clock has passed the deadline when the process goes on.
    now[0] += TTL_S
    assert not leadership.is_leading()
    assert election.leadership is None
    assert election.leader is None
    assert await asyncio.wait_for(leadership.ended(), 5.0)
    task.cancel()
    await asyncio.wait([task])
    await store.close()


async def test_time_to_live_that_cannot_be_kept_is_refused() -> None:
    store = await SqliteStore.open(MEMORY)
    with pytest.raises(InvalidField, match="ttl_s"):
        Election(store, coordinator_id="a", api_address="", ttl_s=1)
    await store.close()


@pytest.mark.etcd
async def test_leader_that_loses_etcd_ends_before_its_lease_can_and_leads_again_later(server: EtcdServer) -> None:
    server.start()
    store = await EtcdStore.open(EtcdSettings(endpoints=(server.endpoint,)))
    async with standing(store, "a") as a:
        old = await led(a)
        server.pause()
        paused = time.monotonic()
        await asyncio.wait_for(old.ended(), 2 * TTL_S)
        # The last keepalive that was answered began before the pause.
        assert time.monotonic() - paused <= TTL_S - MARGIN_S + 0.3
        assert a.leader is None
        server.resume()
        await until_async(lambda: a.leadership, timeout_s=15.0, what="it leads again")
        assert a.leadership is not None
        assert a.leadership.term > old.term
    await store.close()


@pytest.mark.etcd
async def test_killed_leader_is_replaced_in_less_than_five_seconds(server: EtcdServer) -> None:
    server.start()
    pair = [
        await CandidateProcess.start(name, prefix="/enova/test/", endpoint=server.endpoint, ttl_s=3) for name in "ab"
    ]
    try:
        for candidate in pair:
            await candidate.report(30.0, event="standing")
        await until_async(lambda: any(candidate.term for candidate in pair))
        leader, other = pair if pair[0].term else pair[::-1]
        leader.send(signal.SIGKILL)
        killed = time.monotonic()
        await until_async(lambda: other.term)
        assert time.monotonic() - killed < 5.0
    finally:
        for candidate in pair:
            await candidate.end()
