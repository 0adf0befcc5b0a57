"""Looking at all engines of a large fleet gives way to whatever else waits for the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import numpy as np
import pytest

from enova_coordinator.core.model import (
    Deployment,
    DeploymentSpec,
    Replica,
    ReplicaState,
    ReplicaStatus,
    Snapshot,
    Variant,
)
from enova_coordinator.core.series import FIRST_REQUEST_COUNT, NodeFrame, ObjectFigures
from enova_coordinator.core.service_times import INTER_TOKEN, EngineCounters, EngineLook, HistogramCounts
from enova_coordinator.service_log import AT_ONCE, ServiceLog, in_turns
from enova_coordinator.telemetry import Telemetry, TelemetryLimits

REPLICAS, OF_ONE_NODE = 1000, 50


def _snapshot(*, deployments: int = 1) -> Snapshot:
    names = [f"deployments/d{place}" for place in range(deployments)]
    replicas = [
        Replica(
            name=f"{names[0]}/replicas/v1-{place}", uid=f"u.{place}", deployment=names[0],
            variant=f"{names[0]}/variants/v1", members=(), status=ReplicaStatus(state=ReplicaState.READY),
        )
        for place in range(REPLICAS)
    ]  # fmt: skip
    variant = Variant(name=f"{names[0]}/variants/v1", deployment=names[0], model="m", served_names=("d",))
    return Snapshot(
        revision=1,
        deployments={name: Deployment(name=name, uid=name, spec=DeploymentSpec(model="m")) for name in names},
        variants={variant.name: variant},
        replicas={each.name: each for each in replicas},
    )


class _Fleet:
    """Engines that count, and how often others had their turn while they were looked at."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.now_s = 0.0
        self.telemetry = Telemetry(TelemetryLimits(), now_s=lambda: self.now_s, owns=lambda _node, _replica: True)
        self.log = ServiceLog(
            self.telemetry, read=lambda source: source if isinstance(source, EngineCounters) else None
        )

    def frame(self) -> None:
        self.now_s += 10
        counters = EngineCounters(
            instance="i", steps=self.now_s, prompt_tokens=0.0, cached_tokens=0.0, preemptions=0.0, kv_cache_tokens=1e5,
            histograms={INTER_TOKEN: HistogramCounts(np.full(20, int(self.now_s), dtype=np.int64), self.now_s)},
        )  # fmt: skip
        names = list(self.snapshot.replicas)
        for first in range(0, len(names), OF_ONE_NODE):
            node = f"nodes/n{first}"
            figures = [
                ObjectFigures(name, [1.0] * FIRST_REQUEST_COUNT, "i", counters)
                for name in names[first : first + OF_ONE_NODE]
            ]
            frame = NodeFrame(
                node=node, boot="b", sequence=int(self.now_s), start_s=self.now_s - 10, end_s=self.now_s, gpus=[],
                replicas=figures, requests=[],
            )  # fmt: skip
            assert self.telemetry.add(frame, sender=node)

    async def look(self) -> tuple[list[EngineLook], int]:
        looking = asyncio.ensure_future(self.log.look(self.snapshot))
        turns = 0
        while not looking.done():
            await asyncio.sleep(0)
            turns += 1
        return looking.result(), turns


async def test_others_have_their_turn_while_a_thousand_engines_are_looked_at() -> None:
    fleet = _Fleet(_snapshot())
    fleet.frame()
    await fleet.look()
    fleet.frame()
    looks, turns = await fleet.look()
    assert [look.replica.name for look in looks] == list(fleet.snapshot.replicas)
    assert turns >= REPLICAS / AT_ONCE
    start_s, sums = fleet.log.since("deployments/d0", window_s=0.0) or (0.0, None)
    assert start_s == 10.0
    assert sums is not None
    assert sums.histograms[INTER_TOKEN].sum == REPLICAS * 10.0  # all of what one look found at once


async def test_others_have_their_turn_between_deployments() -> None:
    fleet = _Fleet(_snapshot(deployments=50))
    _, turns = await fleet.look()
    assert turns >= 100  # once for the sums that a window begins with, once for the latest


@pytest.mark.parametrize(("count", "turns"), [(0, 0), (1, 0), (100, 0), (101, 1), (1000, 9)])
async def test_values_come_in_their_order_with_a_turn_after_each_hundred(count: int, turns: int) -> None:
    seen = 0

    async def others() -> None:
        nonlocal seen
        while True:
            await asyncio.sleep(0)
            seen += 1

    other = asyncio.create_task(others())
    await asyncio.sleep(0)
    values: Iterable[int] = range(count)
    assert [value async for value in in_turns(values, at_once=100)] == list(range(count))
    assert seen == turns
    other.cancel()
