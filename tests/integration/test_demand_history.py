"""What clients sent, by the minute: across terms, through gaps, and without phantoms."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from enova_coordinator.core.series import NodeFrame, RequestFigures
from enova_coordinator.demand_history import DEMAND_NODE, DemandHistory
from enova_coordinator.rollups import NodeMinute, Rollups
from enova_coordinator.telemetry import Telemetry, TelemetryLimits

DEPLOYMENT = "deployments/chat"


class World:
    """Telemetry whose clock is set by hand."""

    def __init__(self) -> None:
        self.now_s = 60_000.0
        self.sequence = 0
        self.telemetry = Telemetry(TelemetryLimits(), now_s=lambda: self.now_s, owns=lambda _node, _replica: True)

    def second(self, arrived: int = 0, *, held: int = 0, silent: bool = False) -> None:
        """One second passes; a frame tells of it, unless nothing is heard."""
        self.now_s += 1.0
        if silent:
            return
        self.sequence += 1
        requests = [
            RequestFigures(
                deployment=DEPLOYMENT, replica="", serving_class="default", counts=(arrived, 0, 0, 0, 0, 0),
                prompt_tokens=0, output_tokens=0, held=held, sketches=(None, None, None, None),
            )
        ]  # fmt: skip
        frame = NodeFrame(
            node="nodes/a", boot="b", sequence=self.sequence, start_s=self.now_s - 1.5, end_s=self.now_s - 0.5,
            gpus=(), replicas=(), requests=requests if arrived or held else (),
        )  # fmt: skip
        assert self.telemetry.add(frame, sender="nodes/a")


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def rollups(tmp_path: Path) -> Iterator[Rollups]:
    made = Rollups(tmp_path / "rollups.sqlite")
    yield made
    made.close()


def test_a_second_without_a_word_of_requests_had_none_and_one_without_a_frame_is_not_known(world: World) -> None:
    for arrived in (3, 0, 2):
        world.second(arrived)
    world.second(silent=True)
    world.second(1)
    world.second(0)
    _, rows = world.telemetry.demand_window(DEPLOYMENT, steps=6)
    assert rows[:3, 0].tolist() == [3, 0, 2]
    assert np.isnan(rows[3, 0])
    assert rows[4, 0] == 1


def test_a_minute_that_was_heard_in_part_is_no_fall_of_demand(world: World) -> None:
    for _ in range(120):
        world.second(2)
    for second in range(60):
        world.second(2, silent=second >= 40)
    for _ in range(60):
        world.second(silent=True)
    for _ in range(3):
        world.second(2)
    minutes = world.telemetry.demand_minutes(DEPLOYMENT, count=4).values[:, 0]
    assert minutes[0] == minutes[1] == pytest.approx(120, abs=2)
    assert minutes[2] == pytest.approx(120, abs=2)
    assert np.isnan(minutes[3])


def test_requests_that_nobody_speaks_of_any_more_are_not_held(world: World) -> None:
    world.second(1, held=3)
    assert world.telemetry.held_nowhere(DEPLOYMENT) == 3
    for _ in range(5):
        world.second(held=3)
    assert world.telemetry.held_nowhere(DEPLOYMENT) == 3
    for _ in range(30):                # the ingress that held them was killed
        world.second()
    assert world.telemetry.held_nowhere(DEPLOYMENT) == 0


async def test_the_next_leader_knows_the_minutes_of_the_last(world: World, rollups: Rollups) -> None:
    for minute in range(3):
        row = np.array([60.0 * (minute + 1), 50, 1000, 200], dtype=np.float32)
        end_s = world.now_s - 600 + 60 * minute
        rollups.write(NodeMinute(end_s=end_s, node=DEMAND_NODE, objects={DEPLOYMENT: row}))
    for _ in range(125):
        world.second(1)
    history = DemandHistory(world.telemetry, rollups)
    demand = await history.of(DEPLOYMENT)
    assert demand.arrived[:3].tolist() == [60, 120, 180]
    assert demand.arrived[-1] == pytest.approx(60, abs=2)
    assert demand.end_s == 60_120.0
    assert np.isnan(demand.arrived[4])


async def test_a_reader_that_gives_up_ends_no_writer(rollups: Rollups) -> None:
    for _ in range(20):
        asyncio.wrap_future(rollups.read(DEPLOYMENT, nodes=(DEMAND_NODE,), start_s=0.0)).cancel()
    rollups.write(NodeMinute(end_s=60.0, node=DEMAND_NODE, objects={DEPLOYMENT: np.ones(4, dtype=np.float32)}))
    answer = rollups.read(DEPLOYMENT, nodes=(DEMAND_NODE,), start_s=0.0)
    assert (await asyncio.wait_for(asyncio.wrap_future(answer), 10)).ends_s == (60.0,)
