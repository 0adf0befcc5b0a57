"""Events are bounded, told once, and found by the object that they are about."""

from __future__ import annotations

import asyncio
import time

import pytest

from enova_common.errors import TooLarge
from enova_coordinator.controller import LoopLag
from enova_coordinator.core.model import Severity
from enova_coordinator.events import QUEUE_MAX, EventLog


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def messages(log: EventLog, obj: str = "") -> list[str]:
    return [event.message for event in log.list(obj)]


def test_an_object_s_events_include_those_of_what_it_owns() -> None:
    log = EventLog(now_s=Clock())
    log.record("deployments/d", "A", "1")
    log.record("deployments/d/replicas/r", "B", "2")
    log.record("deployments/dd", "C", "3", Severity.WARNING)
    assert messages(log) == ["3", "2", "1"]
    assert messages(log, "deployments/d") == ["2", "1"]


def test_the_same_words_within_a_minute_are_one_event() -> None:
    clock = Clock()
    log = EventLog(now_s=clock)
    for _ in range(4):
        log.record("coordinator", "RoundFailed", "away")
        clock.now_s += 25.0
    assert len(log.list()) == 2
    log.record("coordinator", "RoundFailed", "another")
    assert len(log.list()) == 3


def test_the_oldest_events_are_forgotten() -> None:
    log = EventLog(now_s=Clock(), capacity=3)
    for number in range(9):
        log.record(f"nodes/{number % 2}", "A", str(number))
    assert messages(log) == ["8", "7", "6"]


async def test_who_watches_on_from_a_list_misses_nothing_and_sees_nothing_twice() -> None:
    clock = Clock()
    log = EventLog(now_s=clock, capacity=4)
    log.record("nodes/a", "A", "1")
    seen = log.revision
    clock.now_s -= 5.0  # a clock that is set back does not turn the order around
    log.record("nodes/a", "A", "2")
    log.record("nodes/b", "A", "not for it")
    reader = log.watch("nodes/a", after=seen)
    assert [event.message for event in await anext(reader)] == ["2"]
    following = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    log.record("nodes/a", "A", "3")
    assert [event.message for event in await following] == ["3"]


@pytest.mark.parametrize(("step", "reason"), [(-1, "RESUME_REVISION_COMPACTED"), (9, "RESUME_REVISION_FUTURE")])
async def test_a_revision_that_is_forgotten_or_still_to_come_is_refused(step: int, reason: str) -> None:
    log = EventLog(now_s=Clock(), capacity=3)
    for number in range(5):
        log.record("nodes/a", "A", str(number))
    forgotten = log.revision - 3
    assert len(await anext(log.watch(after=forgotten))) == 3
    with pytest.raises(TooLarge) as refusal:
        await anext(log.watch(after=forgotten + step))
    assert refusal.value.reason == reason


async def test_a_reader_gets_what_happens_and_one_that_is_slow_misses_the_oldest() -> None:
    log = EventLog(now_s=Clock())
    reader = log.watch("nodes/a")
    first = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    log.record("nodes/b", "A", "not for it")
    log.record("nodes/a", "A", "for it")
    assert [event.message for event in await first] == ["for it"]
    for number in range(QUEUE_MAX + 5):
        log.record("nodes/a", "A", str(number))
    late = await anext(reader)
    assert (len(late), late[0].message) == (QUEUE_MAX, "5")
    await reader.aclose()  # type: ignore[attr-defined]


async def test_a_blocked_loop_is_seen_as_lag_even_before_it_is_over() -> None:
    lag = LoopLag(time.monotonic)
    task = asyncio.create_task(lag.run())
    await asyncio.sleep(0)
    assert lag.take() < 0.1
    time.sleep(0.4)  # what blocks the loop
    assert lag.take() > 0.2
    task.cancel()
