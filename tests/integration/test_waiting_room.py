"""Requests for a deployment that was scaled to zero wait for its first replica, within bounds."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from enova_agent.core.model import Route, RouteTarget
from enova_agent.ingress.calls import Rejected
from enova_agent.ingress.summaries import Summaries
from enova_agent.ingress.waiting_room import WaitingLimits, WaitingRoom
from enova_testing.waiting import until_async

ASLEEP = Route(served_name="chat", deployment="deployments/chat", wakes=True)
TARGET = RouteTarget(replica="deployments/chat/replicas/r1", node="nodes/a", hop_address="127.0.0.1:1")
AWAKE = Route(served_name="chat", deployment="deployments/chat", wakes=True, targets=(TARGET,))


class House:
    """A room, and the table that it looks at."""

    def __init__(self, **limits: float) -> None:
        self.table = SimpleNamespace(routes={"chat": ASLEEP})
        self.room = WaitingRoom(WaitingLimits(**limits), table=lambda: self.table)  # type: ignore[arg-type]

    def set(self, **routes: Route) -> None:
        self.table = SimpleNamespace(routes=routes)
        self.room.changed()

    def guest(self, body_bytes: int = 10, own_timeout_s: float | None = None) -> asyncio.Task[Route]:
        return asyncio.create_task(self.room.target("chat", body_bytes=body_bytes, own_timeout_s=own_timeout_s))


async def waiting(house: House, count: int) -> None:
    await until_async(lambda: house.room.requests == count, timeout_s=5)


async def test_who_waits_goes_on_as_soon_as_a_replica_is_there() -> None:
    house = House()
    guests = [house.guest() for _ in range(5)]
    await waiting(house, 5)
    house.set(chat=ASLEEP)             # a change that brings nothing
    await asyncio.sleep(0)
    assert not any(guest.done() for guest in guests)
    house.set(chat=AWAKE)
    assert {route.targets for route in await asyncio.gather(*guests)} == {(TARGET,)}
    assert house.room.requests == 0


async def test_over_the_number_or_the_bytes_a_request_is_told_to_come_back() -> None:
    house = House(requests_max=2, bytes_max=100)
    first = house.guest(90)
    await waiting(house, 1)
    with pytest.raises(Rejected) as refused:
        await house.guest(11)
    assert (refused.value.error.status, refused.value.error.code) == (503, "no_replica")
    assert refused.value.error.retry_after_s
    second = house.guest(10)
    await waiting(house, 2)
    with pytest.raises(Rejected):
        await house.guest(0)
    house.set(chat=AWAKE)
    await asyncio.gather(first, second)


async def test_nobody_waits_for_ever_and_who_leaves_makes_room() -> None:
    house = House(wait_s=0.05, requests_max=1)
    with pytest.raises(Rejected):
        await house.guest()
    patient = House(requests_max=1)
    leaving = patient.guest()
    await waiting(patient, 1)
    leaving.cancel()
    await asyncio.wait([leaving])
    assert patient.room.requests == 0
    staying = patient.guest()
    await waiting(patient, 1)
    patient.set(chat=AWAKE)
    assert (await staying).targets


async def test_who_says_how_long_to_wait_waits_no_longer_and_nobody_longer_than_the_room_lets_him() -> None:
    with pytest.raises(Rejected) as own:
        await House(wait_s=300.0).guest(own_timeout_s=0.05)
    assert (own.value.error.status, own.value.error.code) == (429, "queue_timeout")
    with pytest.raises(Rejected) as rooms:
        await House(wait_s=0.05).guest(own_timeout_s=300.0)
    assert (rooms.value.error.status, rooms.value.error.code) == (503, "no_replica")


@pytest.mark.parametrize("gone", [{}, {"chat": Route(served_name="chat", deployment="deployments/chat")}])
async def test_a_name_that_is_gone_or_wakes_no_more_is_refused_at_once(gone: dict[str, Route]) -> None:
    house = House()
    guest = house.guest()
    await waiting(house, 1)
    house.set(**gone)
    with pytest.raises(Rejected):
        await guest


def test_a_key_whose_last_request_moved_on_is_told_as_empty() -> None:
    summaries = Summaries(start_s=0.0)
    nowhere, there = ("d", "", "c"), ("d", "r", "c")
    summaries.arrived(nowhere)
    summaries.held(nowhere, +1)
    assert [each.held for each in summaries.take(end_s=1.0).summaries] == [1]
    summaries.held(nowhere, -1)
    summaries.held(there, +1)
    told = {each.replica: each.held for each in summaries.take(end_s=2.0).summaries}
    assert told == {"": 0, "r": 1}
    assert {each.replica for each in summaries.take(end_s=3.0).summaries} == {"r"}


