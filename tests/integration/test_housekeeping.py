"""Old records leave the store, and one that cannot be read keeps no other there."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from enova_common.errors import Unavailable
from enova_coordinator.core.episode import Episode, EpisodeState
from enova_coordinator.core.model import (
    Decision,
    DecisionAction,
    Deployment,
    DeploymentSpec,
    RequestRecord,
    Snapshot,
    Stored,
)
from enova_coordinator.housekeeping import (
    DECISIONS_KEPT,
    EPISODE_KEEP_S,
    EPISODES_KEPT,
    ORPHAN_KEEP_S,
    REQUEST_KEEP_S,
    Housekeeping,
)
from enova_coordinator.rollups import Rollups
from enova_coordinator.store import CreateRevisionIs, Entry, ModRevisionIs, Put, codec
from enova_coordinator.store.sqlite import MEMORY, SqliteStore
from enova_coordinator.telemetry import Telemetry, TelemetryLimits
from enova_recommender.types import VerdictKind
from enova_testing.waiting import until_async

LIVING = "deployments/living"


def decision(deployment: str, age_s: float) -> Decision:
    time_s = time.time() - age_s
    return Decision(
        name=codec.decision_name(deployment, time_s), deployment=deployment, action=DecisionAction.SCALE_UP,
        actor="policy/p", reason="load", create_time_s=time_s,
    )  # fmt: skip


def record(name: str, age_s: float) -> RequestRecord:
    return RequestRecord(
        name=f"requests/{name}", method="m", object=LIVING, fingerprint="f", create_time_s=time.time() - age_s
    )


def episode(number: int, age_s: float, *, state: EpisodeState = EpisodeState.CLOSED) -> Episode:
    return Episode(
        name=f"episodes/{number:016d}-00000000", object="o", verdict=VerdictKind.DEGRADED, state=state,
        close_time_s=time.time() - age_s if state is EpisodeState.CLOSED else 0.0,
    )  # fmt: skip


@dataclass
class House:
    """A store, and who keeps it."""

    store: SqliteStore
    rollups: Rollups
    snapshot: Snapshot
    telemetry: Telemetry
    keeping: Housekeeping = field(init=False)

    def __post_init__(self) -> None:
        self.keeping = self.made()

    def made(self) -> Housekeeping:
        """Who keeps it."""
        return Housekeeping(
            self.store, self.telemetry, self.rollups, snapshot=lambda: self.snapshot,
            guard=lambda: CreateRevisionIs(codec.LEADER_KEY, 0), history_keep_s=60.0,
        )  # fmt: skip

    async def names(self) -> list[str]:
        """The names of all that is stored, unreadable or not."""
        return [entry.key.removeprefix(codec.PREFIX) for entry in (await self.store.range(codec.PREFIX))[0]]

    async def put(self, *values: Stored) -> None:
        for value in values:
            await self.put_raw(codec.key(value.name), codec.encode(value))

    async def put_raw(self, key: str, value: bytes) -> None:
        assert (await self.store.transact([ModRevisionIs(key, 0)], [Put(key, value)])).succeeded

    async def tidied(self, count: int) -> list[str]:
        """What is left once the house was kept and only so much is there."""

        async def tidy() -> bool:
            return len(await self.names()) == count

        task = asyncio.create_task(self.keeping.run())
        try:
            await until_async(tidy, timeout_s=5)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        return await self.names()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    store = await SqliteStore.open(MEMORY)
    rollups = Rollups(tmp_path / "rollups")
    snapshot = Snapshot(deployments={LIVING: Deployment(name=LIVING, uid="u", spec=DeploymentSpec(model="m"))})
    telemetry = Telemetry(TelemetryLimits(), now_s=time.time, owns=lambda _node, _replica: True)
    yield House(store, rollups, snapshot, telemetry)
    rollups.close()
    await store.close()


class BrokenTelemetry(Telemetry):
    """Cannot say what was demanded; a minute of its clock passes with every question for the time."""

    def __init__(self) -> None:
        self.passed = 0
        self.forgot = 0
        super().__init__(TelemetryLimits(), now_s=self._tick, owns=lambda _node, _replica: True)

    def _tick(self) -> float:
        self.passed += 1
        return 60.0 * self.passed

    def demanded(self) -> tuple[str, ...]:
        raise RuntimeError("planted")

    def forget(self, *, replicas: Callable[[str], bool], deployments: Callable[[str], bool]) -> None:
        self.forgot += 1


async def test_a_chore_that_fails_says_why_and_costs_no_other_one(house: House) -> None:
    house.telemetry = telemetry = BrokenTelemetry()
    house.keeping = house.made()
    figures = house.keeping.figures
    task = asyncio.create_task(house.keeping.run())
    await until_async(lambda: figures.failures.get("roll", 0) >= 2 and telemetry.forgot >= 2, timeout_s=10)
    assert not task.done()
    task.cancel()
    await asyncio.wait([task])
    assert figures.reasons == {"roll": "internal error: RuntimeError: planted"}


async def test_a_store_that_refuses_is_asked_for_each_chore(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(_prefix: str) -> tuple[list[Entry], int]:
        raise Unavailable("the store is away")

    monkeypatch.setattr(house.store, "range", away)
    task = asyncio.create_task(house.keeping.run())
    figures, wanted = house.keeping.figures, {"prune_requests", "prune_decisions", "prune_episodes"}
    await until_async(lambda: figures.reasons.keys() == wanted, timeout_s=5)
    task.cancel()
    await asyncio.wait([task])
    assert set(figures.reasons.values()) == {"the store is away"}


async def test_what_cannot_be_read_stays_and_keeps_no_other_from_going(house: House) -> None:
    await house.put_raw(codec.PREFIX + "requests/broken", b"{")
    await house.put_raw(codec.PREFIX + "decisions/living/0", b"{")
    assert REQUEST_KEEP_S == 24 * 3600.0      # what the API promises of request ids
    await house.put(record("old", REQUEST_KEEP_S + 1), record("young", 1))
    await house.put(*(decision(LIVING, age_s) for age_s in range(DECISIONS_KEPT + 1)))
    left = await house.tidied(DECISIONS_KEPT + 3)
    assert {"requests/broken", "requests/young", "decisions/living/0"} <= set(left)


async def test_decisions_of_what_is_no_more_go_in_time(house: House) -> None:
    young = decision("deployments/gone", 1)
    await house.put(young, decision("deployments/gone", ORPHAN_KEEP_S + 1), decision("deployments/lost", 1e7))
    await house.put(living := decision(LIVING, ORPHAN_KEEP_S + 1))
    left = await house.tidied(2)
    assert left == sorted(codec.key(each.name).removeprefix(codec.PREFIX) for each in (young, living))


async def test_episodes_that_are_over_go_in_time_and_by_number_and_open_ones_stay(house: House) -> None:
    still_open, old = episode(1, 0.0, state=EpisodeState.OPEN), episode(2, EPISODE_KEEP_S + 1)
    await house.put(still_open, old, *(episode(number, 1.0) for number in range(10, EPISODES_KEPT + 12)))
    left = await house.tidied(EPISODES_KEPT + 1)
    assert still_open.name in left
    assert old.name not in left
    assert episode(11, 1.0).name not in left  # two more than are kept: the oldest went
    assert episode(12, 1.0).name in left
