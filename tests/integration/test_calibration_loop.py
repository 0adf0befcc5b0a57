"""What live engines teach is kept in the store under the leader's guard, and read back by the next leader."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from enova_common.errors import EnovaError
from enova_coordinator.calibration_loop import CalibrationLoop
from enova_coordinator.core.calibration import StoredCalibration
from enova_coordinator.core.gpu_types import GpuTypes, described_types
from enova_coordinator.core.model import (
    Claim,
    Deployment,
    DeploymentSpec,
    Member,
    Replica,
    ReplicaState,
    ReplicaStatus,
    Snapshot,
    Variant,
)
from enova_coordinator.core.series import COLUMN, FIRST_REQUEST_COUNT, NodeFrame, ObjectFigures
from enova_coordinator.core.service_times import FIRST_TOKEN, INTER_TOKEN, EngineCounters, HistogramCounts
from enova_coordinator.known_models import KnownModels
from enova_coordinator.policy_process import PolicyProcess
from enova_coordinator.service_log import ServiceLog
from enova_coordinator.store import CreateRevisionIs, ModRevisionIs, Put, codec
from enova_coordinator.store.sqlite import MEMORY, SqliteStore
from enova_coordinator.telemetry import Telemetry, TelemetryLimits
from enova_recommender import catalog
from enova_recommender.performance import Correction, KernelTimes
from enova_recommender.performance.calibration import RUN
from enova_recommender.performance.engine_model import EngineModel
from enova_recommender.types import Batch

pytestmark = pytest.mark.network  # a child process

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
D, V, R = "deployments/d", "deployments/d/variants/v1", "deployments/d/replicas/v1-0"
WORLD = KernelTimes(
    catalog.models()[MODEL], catalog.gpus()["H100"], correction=Correction.of((1.4,) * 6)
)
ROOM = 400_000.0
SEQUENCES, CONTEXT = 20, 500
OTHER_V, OTHER_R = "deployments/d/variants/v2", "deployments/d/replicas/v2-0"


def batch(sequences: int) -> Batch:
    """A step that decodes so many."""
    return Batch(decode_sequences=sequences, context_tokens=sequences * CONTEXT)


def snapshot(*, shared: bool = False) -> Snapshot:
    claims = (Claim(gpu_uuid="g", shared=shared),)
    return Snapshot(
        revision=1,
        deployments={D: Deployment(name=D, uid="u", spec=DeploymentSpec(model=MODEL))},
        variants={V: Variant(name=V, deployment=D, model=MODEL, served_names=("d",), gpu_type="H100")},
        replicas={
            R: Replica(
                name=R, uid="u.0", deployment=D, variant=V, members=(Member(node="nodes/n", claims=claims),),
                status=ReplicaStatus(state=ReplicaState.READY),
            )
        },
    )  # fmt: skip


@dataclass
class Fleet:
    """Engines that decode, their telemetry, a store and a child process; the clock stands until it is moved."""

    store: SqliteStore
    process: PolicyProcess
    now_s: float = 1000.0
    types: GpuTypes = field(default_factory=GpuTypes)
    snapshot: Snapshot = field(default_factory=snapshot)
    guard: CreateRevisionIs = field(default_factory=lambda: CreateRevisionIs(codec.LEADER_KEY, 0))
    steps: int = 0
    slower: float = 1.0        # than WORLD, since the fleet was changed
    sequences: dict[str, int] = field(default_factory=lambda: {R: SEQUENCES})  # by replica
    decode_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    telemetry: Telemetry = field(init=False)

    def __post_init__(self) -> None:
        self.telemetry = Telemetry(TelemetryLimits(), now_s=lambda: self.now_s, owns=lambda _node, _replica: True)

    def loop(self) -> CalibrationLoop:
        """A leader's loop, as a term begins."""
        return CalibrationLoop(
            self.store,
            ServiceLog(self.telemetry, read=lambda source: source if isinstance(source, EngineCounters) else None),
            self.process,
            KnownModels(now_s=lambda: self.now_s),
            types=self.types,
            snapshot=lambda: self.snapshot,
            guard=lambda: self.guard,
            real_s=lambda seconds: seconds,
            wall_s=lambda: self.now_s,
            monotonic_s=lambda: self.now_s,
        )

    def add_variant(self, *, sequences: int) -> None:
        """Another variant of the same configuration, with an engine of its own."""
        known = self.snapshot
        variant = replace(known.variants[V], name=OTHER_V)
        replica = replace(known.replicas[R], name=OTHER_R, uid="u.1", variant=OTHER_V)
        self.snapshot = replace(
            known, variants={**known.variants, OTHER_V: variant}, replicas={**known.replicas, OTHER_R: replica}
        )
        self.sequences[OTHER_R] = sequences

    def frame(self, *, steps: int = 400) -> None:
        """Ten seconds later, each engine has made so many more steps; none: it was idle."""
        self.now_s += 10
        self.steps += steps
        replicas = []
        for replica, sequences in self.sequences.items():
            self.decode_s[replica] += steps * sequences * WORLD.step_s(batch(sequences)) * self.slower
            gaps = float(self.steps * sequences)
            counters = EngineCounters(
                instance="i", steps=float(self.steps), prompt_tokens=0.0, cached_tokens=0.0, preemptions=0.0,
                kv_cache_tokens=ROOM,
                histograms={
                    FIRST_TOKEN: HistogramCounts(np.zeros(23, dtype=np.int64), 0.0),
                    INTER_TOKEN: HistogramCounts(np.full(20, gaps, dtype=np.int64), self.decode_s[replica]),
                },
            )  # fmt: skip
            row = [float("nan")] * FIRST_REQUEST_COUNT
            row[COLUMN["running"]] = float(sequences if steps else 0)
            row[COLUMN["kv_cache_usage"]] = sequences * CONTEXT / ROOM
            replicas.append(ObjectFigures(replica, row, "i", counters))
        frame = NodeFrame(
            node="nodes/n", boot="b", sequence=int(self.now_s), start_s=self.now_s - 10, end_s=self.now_s, gpus=[],
            replicas=replicas, requests=[],
        )  # fmt: skip
        assert self.telemetry.add(frame, sender="nodes/n")

    async def learn(self, loop: CalibrationLoop, rounds: int) -> None:
        for _ in range(rounds):
            self.frame()
            await loop.round()

    async def stored(self) -> list[StoredCalibration]:
        entries, _ = await self.store.range(codec.prefix("calibrations"))
        return [codec.decode_as(StoredCalibration, entry.value) for entry in entries]


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    store = await SqliteStore.open(MEMORY)
    process = PolicyProcess(timeout_s=20.0)
    yield Fleet(store, process)
    await process.close()
    await store.close()


async def load(loop: CalibrationLoop) -> None:
    """What `run` does first."""
    await loop._load()


async def test_a_wrong_prior_is_corrected_stored_and_read_back_by_the_next_leader(fleet: Fleet) -> None:
    first = fleet.loop()
    await load(first)
    await fleet.learn(first, 17)
    (known,) = first.calibrations.values()
    assert known.updates == 16  # the first look tells nothing
    assert (known.gpu_type, known.model, known.name.partition(".")[0]) == ("H100", MODEL, "calibrations/H100")
    assert first.steps[V].predicted.step_s == pytest.approx(first.steps[V].step.step_s, rel=0.03)
    (kept,) = await fleet.stored()
    assert known.updates / 2 <= kept.updates <= known.updates
    # The leader is gone; the next one knows what it knew, and goes on from there.
    second = fleet.loop()
    await load(second)
    assert second.calibrations == {kept.name: kept}
    await fleet.learn(second, 17)
    (now,) = second.calibrations.values()
    assert now.updates == kept.updates + 16
    assert (await fleet.stored())[0].updates > kept.updates


async def test_it_is_written_soon_and_then_seldom(fleet: Fleet) -> None:
    loop = fleet.loop()
    await load(loop)
    await fleet.learn(loop, 200)
    assert loop.figures.steps == 199
    # 1, 2, 4, 8, 16, ... and once a minute of six rounds.
    assert 20 <= loop.figures.writes <= 45


async def test_a_change_of_the_world_is_noticed_over_rounds_of_one_step_each(fleet: Fleet) -> None:
    loop = fleet.loop()
    await load(loop)
    await fleet.learn(loop, 200)
    fleet.slower = 2.0
    await fleet.learn(loop, RUN + 4)
    assert loop.steps[V].predicted.step_s == pytest.approx(loop.steps[V].step.step_s, rel=0.15)


async def test_a_run_outlives_the_leader(fleet: Fleet) -> None:
    loop = fleet.loop()
    await load(loop)
    await fleet.learn(loop, 200)
    fleet.slower = 2.0
    await fleet.learn(loop, 5)
    (known,) = loop.calibrations.values()
    await loop.keep(known)
    after = fleet.loop()
    await load(after)
    assert [each.run for each in after.calibrations.values()] == [5]


async def test_each_variant_is_shown_its_own_step_beside_what_is_made_of_that_step(fleet: Fleet) -> None:
    fleet.add_variant(sequences=10 * SEQUENCES)
    loop = fleet.loop()
    await load(loop)
    await fleet.learn(loop, 30)
    assert len(loop.calibrations) == 1
    took = {variant: steps.step.step_s for variant, steps in loop.steps.items()}
    assert took == pytest.approx({V: WORLD.step_s(batch(SEQUENCES)), OTHER_V: WORLD.step_s(batch(10 * SEQUENCES))})
    assert took[OTHER_V] > 1.2 * took[V]
    assert {variant: steps.predicted.step_s for variant, steps in loop.steps.items()} == pytest.approx(took, rel=0.05)


async def test_more_variants_than_are_shown_in_one_round_take_turns(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enova_coordinator.calibration_loop.SHOWN_MAX", 1)
    fleet.add_variant(sequences=SEQUENCES)
    loop = fleet.loop()
    await load(loop)
    await fleet.learn(loop, 4)
    assert sorted(steps.time_s for steps in loop.steps.values()) == [fleet.now_s - 10, fleet.now_s]


async def test_a_leader_of_the_past_writes_nothing(fleet: Fleet) -> None:
    loop = fleet.loop()
    await load(loop)
    fleet.guard = CreateRevisionIs(codec.LEADER_KEY, 77)
    await fleet.learn(loop, 5)
    assert loop.figures.writes == 0
    assert await fleet.stored() == []


async def test_an_idle_engine_and_one_on_a_shared_gpu_teach_nothing(fleet: Fleet) -> None:
    loop = fleet.loop()
    await load(loop)
    for _ in range(4):
        fleet.frame(steps=0)
        await loop.round()
    fleet.snapshot = snapshot(shared=True)
    await fleet.learn(loop, 4)
    assert (loop.figures.steps, loop.calibrations, loop.figures.rounds) == (0, {}, 8)


async def test_engines_on_a_type_that_the_operator_described_teach_under_the_name_that_requests_use(
    fleet: Fleet,
) -> None:
    own = replace(catalog.gpus()["H100"], name="Own-1")
    fleet.types = described_types([own])
    variant = replace(fleet.snapshot.variants[V], gpu_type="own-1")
    fleet.snapshot = replace(fleet.snapshot, variants={V: variant})
    loop = fleet.loop()
    await load(loop)
    await fleet.learn(loop, 8)
    (known,) = loop.calibrations.values()
    assert (known.updates, known.gpu_type) == (7, "own-1")
    assert list(loop.corrections()) == [EngineModel(shape=catalog.models()[MODEL], gpu=replace(own, name="own-1")).key]


async def test_one_that_cannot_be_read_is_begun_anew(fleet: Fleet) -> None:
    loop = fleet.loop()
    await load(loop)
    await fleet.learn(loop, 3)
    (name,) = loop.calibrations
    key = codec.key(name)
    entry = await fleet.store.get(key)
    assert entry is not None
    assert (await fleet.store.transact([ModRevisionIs(key, entry.mod_revision)], [Put(key, b"{")])).succeeded
    after = fleet.loop()
    await load(after)
    assert after.calibrations == {}
    await fleet.learn(after, 3)
    assert [each.updates for each in await fleet.stored()] == [2]


async def test_one_of_other_kernel_groups_is_begun_anew(fleet: Fleet) -> None:
    loop = fleet.loop()
    await load(loop)
    await fleet.learn(loop, 3)
    ((name, value),) = loop.calibrations.items()
    loop.calibrations[name] = replace(value, groups=("ELSE", *value.groups[1:]))
    await fleet.learn(loop, 1)
    assert loop.calibrations[name].updates == 1


async def test_a_child_that_dies_costs_a_round(fleet: Fleet) -> None:
    loop = fleet.loop()
    await load(loop)
    await fleet.learn(loop, 3)
    assert fleet.process.pid is not None
    os.kill(fleet.process.pid, signal.SIGKILL)
    with contextlib.suppress(EnovaError):
        await fleet.learn(loop, 1)
    await fleet.learn(loop, 2)
    (known,) = loop.calibrations.values()
    assert known.updates >= 4
