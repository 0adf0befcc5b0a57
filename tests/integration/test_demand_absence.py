"""While an agent is away its ingress's requests are unknown; once it is back they are of the time that they came in."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from enova_coordinator.core.demand_log import ABSENT_STEPS, DEPLOYMENTS_MAX, DemandLog, Span, span_of
from enova_coordinator.core.series import COLUMN, REPLICA_FEATURES, NodeFrame, ObjectFigures, RequestFigures
from enova_coordinator.demand_history import DemandHistory
from enova_coordinator.rollups import Rollups
from enova_coordinator.telemetry import Telemetry, TelemetryLimits

DEPLOYMENT = "deployments/chat"
REPLICA = f"{DEPLOYMENT}/replicas/r"
STEPS = 590


class Fleet:
    """Nodes whose ingresses see so many requests a second; an agent that is away has them told when it is back."""

    def __init__(self, **rates: int) -> None:
        self.now_s = 60_000.0
        self.rates = rates
        self.away: dict[str, float] = {}         # since when
        self.unheard: dict[str, int] = {}
        self.sequence = 0
        self.telemetry = Telemetry(TelemetryLimits(), now_s=lambda: self.now_s, owns=lambda _node, _replica: True)

    def pass_s(self, seconds: int, *away: str, lost: bool = False) -> None:
        """Time passes while these nodes' agents are away; with `lost`, nobody counts for them meanwhile either."""
        for _ in range(seconds):
            self.now_s += 1.0
            for node, rate in self.rates.items():
                if node in away:
                    self.away.setdefault(node, self.now_s - 1.5)
                    self.unheard[node] = self.unheard.get(node, 0) + (0 if lost else rate)
                else:
                    self._tell(node, rate)

    def _tell(self, node: str, rate: int) -> None:
        self.sequence += 1
        start_s = self.away.pop(node, self.now_s - 1.5)
        arrived = rate + self.unheard.pop(node, 0)
        requests = RequestFigures(
            deployment=DEPLOYMENT, replica=REPLICA, serving_class="default", counts=(arrived, arrived, 0, 0, 0, 0),
            prompt_tokens=arrived, output_tokens=arrived, held=0, sketches=(None, None, None, None),
        )  # fmt: skip
        frame = NodeFrame(
            node=node, boot="b", sequence=self.sequence, start_s=start_s, end_s=self.now_s - 0.5,
            gpus=(), replicas=(), requests=(requests,) if arrived else (),
        )  # fmt: skip
        assert self.telemetry.add(frame, sender=node)

    def arrived(self, steps: int = STEPS) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """Arrivals of the newest steps."""
        return self.telemetry.demand_window(DEPLOYMENT, steps=steps)[1][:, 0]


def test_an_absence_is_unknown_and_afterwards_told_where_it_belongs() -> None:
    fleet = Fleet(a=4, b=6)
    fleet.pass_s(100)
    fleet.pass_s(25, "a")
    assert np.isnan(fleet.arrived(24)).all(), "what b saw alone is no fall of demand"
    assert fleet.arrived(60)[:34].tolist() == [10] * 34
    fleet.pass_s(5)
    assert fleet.arrived(120) == pytest.approx([10] * 120, rel=1e-5), "neither a fall nor a burst is left of it"


def test_a_replicas_own_requests_are_spread_as_well() -> None:
    fleet = Fleet(a=4)
    row = [0.0] * (COLUMN["engine_finished"] + 1)
    for second in range(60):
        away = 20 <= second < 50
        fleet.pass_s(1, *(("a",) if away else ()))
        if not away:
            frame = NodeFrame(
                node="b", boot="b", sequence=second + 1, start_s=fleet.now_s - 1.5, end_s=fleet.now_s - 0.5,
                gpus=(), replicas=(ObjectFigures(REPLICA, row.copy(), "i"),), requests=(),
            )  # fmt: skip
            assert fleet.telemetry.add(frame, sender="b")
    found = fleet.telemetry.replica_window(REPLICA, steps=50)
    assert found is not None
    finished = found[1][:, REPLICA_FEATURES.index("finished")]
    assert np.nanmax(finished) == pytest.approx(4, rel=1e-5)


def test_who_brings_next_to_nothing_is_not_waited_for_and_who_stays_away_no_longer_either() -> None:
    fleet = Fleet(big=95, small=5)
    fleet.pass_s(100)
    fleet.pass_s(20, "small")
    assert fleet.arrived(10).tolist() == [95] * 10
    fleet.pass_s(10)
    fleet.pass_s(ABSENT_STEPS - 2, "big", lost=True)
    assert np.isnan(fleet.arrived(10)).all()
    fleet.pass_s(4, "big", lost=True)
    assert fleet.arrived(10).tolist() == [5] * 10, "a host that is lost leaves the demand to the others"


def test_a_node_without_an_ingress_tells_nothing_of_requests() -> None:
    fleet = Fleet(a=5)
    fleet.pass_s(60)
    row = [0.0] * (COLUMN["engine_finished"] + 1)
    row[COLUMN["held"]] = math.nan
    for second in range(20):
        fleet.now_s += 1.0
        frame = NodeFrame(
            node="a", boot="b", sequence=1000 + second, start_s=fleet.now_s - 1.5, end_s=fleet.now_s - 0.5,
            gpus=(), replicas=(ObjectFigures(REPLICA, row.copy(), "i"),), requests=(),
        )  # fmt: skip
        assert fleet.telemetry.add(frame, sender="a")
    assert np.isnan(fleet.arrived(15)).all()


async def test_a_minute_that_was_told_late_is_mended_in_the_history(tmp_path: Path) -> None:
    rollups = Rollups(tmp_path / "rollups.sqlite")
    fleet = Fleet(a=4, b=6)
    history = DemandHistory(fleet.telemetry, rollups)
    fleet.pass_s(180)
    fleet.pass_s(20)
    fleet.pass_s(180, "a")
    before = await history.of(DEPLOYMENT)
    fleet.pass_s(10)
    after = await history.of(DEPLOYMENT)
    rollups.close()
    assert np.nanmin(before.arrived[1:]) < 500, "a was taken to be gone"
    assert after.arrived[1:] == pytest.approx([600] * (len(after.arrived) - 1), abs=15)


def test_a_span_shares_out_all_that_it_counts_and_a_usual_frame_is_of_the_step_that_it_ends_in() -> None:
    assert span_of(99.4, 100.6, step_s=1.0, steps_max=600) == Span(100, 100)
    long = span_of(90.5, 100.5, step_s=1.0, steps_max=600)
    assert long == Span(91, 100, 0.1)
    longest = span_of(0.0, 10_000.0, step_s=1.0, steps_max=600)
    assert longest == Span(9_401, 10_000, 0.0001), "what is older than the window counts in no step of it"


def test_the_demand_of_so_many_deployments_is_kept_and_no_more() -> None:
    log = DemandLog(slots=2)
    span = Span(5, 5)
    assert all(log.add(f"d{number}", "a", span, (1, 0, 0, 0)) for number in range(DEPLOYMENTS_MAX))
    assert not log.add("one more", "a", span, (1, 0, 0, 0))
    log.forget(deployments=lambda name: name != "d0", now=5)
    assert log.add("one more", "a", span, (1, 0, 0, 0))
