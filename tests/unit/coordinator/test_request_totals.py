"""What is summed of requests is bounded by what runs, not by all that ever ran, and nothing counted is lost."""

from __future__ import annotations

from collections import Counter

import pytest

from enova_coordinator import request_totals
from enova_coordinator.core.series import NodeFrame, RequestFigures
from enova_coordinator.request_totals import GONE, GONE_CLASSES_MAX, RequestLedger
from enova_coordinator.telemetry import HELD_STEPS, Telemetry, TelemetryLimits

DEPLOYMENT = "deployments/chat"
GONE_NAME = f"{DEPLOYMENT}/replicas/{GONE}"
BOUND = 50


def name(number: int) -> str:
    return f"{DEPLOYMENT}/replicas/r{number}"


def told(replica: str, *, serving_class: str = "default", arrived: int = 1, held: int = 0) -> RequestFigures:
    return RequestFigures(
        deployment=DEPLOYMENT, replica=replica, serving_class=serving_class, counts=(arrived, arrived, 0, 0, 0, 0),
        prompt_tokens=10 * arrived, output_tokens=2 * arrived, held=held, sketches=(None, None, None, None),
    )  # fmt: skip


class World:
    """Telemetry of one node whose clock is set by hand."""

    def __init__(self) -> None:
        self.now_s = 60_000.0
        self.sequence = 0
        self.telemetry = Telemetry(TelemetryLimits(), now_s=lambda: self.now_s, owns=lambda _node, _replica: True)

    def second(self, *requests: RequestFigures) -> None:
        self.now_s += 1.0
        self.sequence += 1
        frame = NodeFrame(
            node="nodes/a", boot="b", sequence=self.sequence, start_s=self.now_s - 1.5, end_s=self.now_s - 0.5,
            gpus=(), replicas=(), requests=requests,
        )  # fmt: skip
        assert self.telemetry.add(frame, sender="nodes/a")

    def forget_but(self, *living: str) -> None:
        self.telemetry.forget(replicas=lambda each: each in living, deployments=lambda each: each == DEPLOYMENT)

    def arrived(self) -> int:
        return sum(each.counts[0] for each in self.telemetry.totals(DEPLOYMENT).values())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_totals, "REQUEST_KEYS_MAX", BOUND)
    monkeypatch.setattr(request_totals, "NOWHERE_KEYS_MAX", 2)


@pytest.mark.usefixtures("small")
def test_replicas_that_are_gone_give_their_keys_back_and_keep_their_counts() -> None:
    world = World()
    for generation in range(5):        # five times as many replicas as there are keys
        names = [name(generation * BOUND + number) for number in range(BOUND - 1)]
        for each in names:
            world.second(told(each, arrived=2))
        world.forget_but()
    assert world.telemetry.rejected == Counter({"dropped_by_agent": 0})
    assert world.telemetry.totals(DEPLOYMENT).keys() == {(GONE_NAME, "default")}
    assert world.arrived() == 5 * 2 * (BOUND - 1)
    world.forget_but()
    assert world.arrived() == 5 * 2 * (BOUND - 1), "forgetting again changes nothing"


@pytest.mark.usefixtures("small")
def test_at_the_bound_totals_are_refused_and_counted_but_demand_is_seen_on() -> None:
    world = World()
    for number in range(BOUND):
        world.second(told(name(number)))
    world.second(told(name(BOUND), arrived=7), told("", arrived=0, held=3))
    assert len(world.telemetry.totals(DEPLOYMENT)) == BOUND + 1
    assert world.telemetry.rejected["too_many_request_keys"] == 1
    world.second()
    _, rows = world.telemetry.demand_window(DEPLOYMENT, steps=2)
    assert 7 in rows[:, 0]
    assert world.telemetry.held_nowhere(DEPLOYMENT) == 3, "what sleeps is woken all the same"


def test_classes_of_replicas_that_are_gone_are_bounded_too() -> None:
    ledger = RequestLedger(Counter())
    for number in range(3 * GONE_CLASSES_MAX):
        ledger.add("nodes/a", told(name(0), serving_class=f"c{number}"), end_s=0.0)
        ledger.forget(replicas=lambda _: False, deployments=lambda _: True, oldest_s=0.0)
    found = ledger.of(DEPLOYMENT)
    assert len(found) == GONE_CLASSES_MAX + 1
    assert found[GONE_NAME, ""].counts[0] == 2 * GONE_CLASSES_MAX


def test_a_replicas_holds_that_nobody_speaks_of_any_more_are_void() -> None:
    world = World()
    world.second(told(name(0), held=4))
    (totals,) = world.telemetry.totals(DEPLOYMENT).values()
    assert world.telemetry.held_by(totals) == 4
    for _ in range(HELD_STEPS + 1):    # the ingress that held them was killed
        world.second()
    assert world.telemetry.held_by(totals) == 0
    world.forget_but(name(0))
    assert not totals.held
