"""The leader watches through a child process: findings to store, events and metrics; a child that dies costs little."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from enova_common.errors import TimedOut, Unavailable
from enova_coordinator.core.episode import Episode, EpisodeLabel, EpisodeState
from enova_coordinator.core.followed_corrections import FOLLOW_EVERY_S, FollowedCorrection
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
from enova_coordinator.detection_loop import SAVE_EVERY_S, STALE_AFTER_S, DetectionLoop, Engines
from enova_coordinator.detection_state import read_state
from enova_coordinator.events import EventLog
from enova_coordinator.frame_inbox import FrameInbox
from enova_coordinator.policy_process import PolicyProcess
from enova_coordinator.store import CreateRevisionIs, Entry, ModRevisionIs, Put, codec
from enova_coordinator.store.sqlite import MEMORY, SqliteStore
from enova_recommender import catalog
from enova_recommender.performance.correction import Correction
from enova_recommender.performance.engine_model import EngineModel
from enova_testing.serving_world import BOUNDS, World, cluster
from enova_testing.waiting import until_async
from enova_testing.wire_frames import frame_bytes

pytestmark = pytest.mark.network  # a child process

SETTLED_S = 250.0


class AwayStore(SqliteStore):
    """The embedded store, which is away while a test says so."""

    away = False

    async def range(self, prefix: str, *, start_after: str = "", limit: int = 0) -> tuple[list[Entry], int]:
        if self.away:
            raise Unavailable("the store is away")
        return await super().range(prefix, start_after=start_after, limit=limit)


class Nothing:
    """Nobody knows how long steps should take: the detector learns it."""

    def facts(self, variant: Variant) -> EngineModel | str:
        return f"no data sheet of {variant.name}"

    def corrections(self) -> Mapping[str, Correction]:
        return {}


@dataclass
class Clock:
    """A model clock at natural speed that a test moves."""

    now_s: float = 0.0
    scale: float = 1.0

    def now(self) -> float:
        return self.now_s

    def real_s(self, model_s: float) -> float:
        return model_s / self.scale


def snapshot(world: World) -> Snapshot:
    names = {each.name for each in world.engines}
    return Snapshot(
        revision=1,
        deployments={"chat": Deployment(name="chat", uid="u", spec=DeploymentSpec(model="m"))},
        variants={
            "chat-1": Variant(
                name="chat-1", deployment="chat", model="m", served_names=("chat",),
                configuration={"max_num_seqs": 32, "max_num_batched_tokens": 2048, "max_model_len": 2048},
            )
        },
        replicas={
            each.name: Replica(
                name=each.name, uid=each.name, deployment="chat", variant="chat-1",
                members=(Member(node=each.node, claims=(Claim(gpu_uuid=f"gpu-{each.name}"),)),),
                status=ReplicaStatus(state=ReplicaState.READY),
            )
            for each in world.engines if each.name in names
        },
    )  # fmt: skip


@dataclass
class Fleet:
    """A world, a store, a child process; nothing moves but by `until`."""

    store: AwayStore
    process: PolicyProcess
    folder: Path
    world: World = field(default_factory=lambda: cluster(replicas=3))
    clock: Clock = field(default_factory=Clock)
    events: EventLog = field(default_factory=EventLog)
    engines: Engines = field(default_factory=Nothing)
    terms: int = 0
    monotonic_s: float = 1000.0
    snapshot: Snapshot = field(init=False)
    inbox: FrameInbox = field(init=False)
    loop: DetectionLoop = field(init=False)

    def __post_init__(self) -> None:
        self.snapshot = snapshot(self.world)
        self.inbox = FrameInbox(now_s=self.clock.now, old_s=30.0)
        self.new_leader()

    def new_leader(self) -> None:
        self.terms += 1
        self.loop = DetectionLoop(
            self.store, self.inbox, self.process, self.engines, self.events, snapshot=lambda: self.snapshot,
            guard=lambda: CreateRevisionIs(codec.LEADER_KEY, 0), session=f"test.{self.terms}", clock=self.clock,
            telemetry_step_s=1.0, bounds=BOUNDS, state_file=self.folder / "detection.npz",
            monotonic_s=lambda: self.monotonic_s, wall_s=lambda: 1e6 + self.clock.now_s,
        )  # fmt: skip

    async def until(self, until_s: float) -> None:
        while self.world.now_s < until_s:
            self.pass_time(5.0)
            await self.loop.round()

    def pass_time(self, seconds: float) -> None:
        for frame in self.world.frames(self.world.now_s + seconds):
            self.clock.now_s = frame.end_s
            self.inbox.put(frame.node, frame.end_s, frame_bytes(frame))
        self.clock.now_s = self.world.now_s
        self.monotonic_s += seconds

    async def stored(self) -> list[Episode]:
        entries, _ = await self.store.range(codec.prefix("episodes"))
        return [codec.decode_as(Episode, entry.value) for entry in entries]

    @property
    def told(self) -> list[str]:
        return [f"{each.reason} {each.object}" for each in reversed(self.events.list())]


@contextlib.asynccontextmanager
async def _fleet(folder: Path, *, timeout_s: float = 30.0) -> AsyncIterator[Fleet]:
    process = PolicyProcess(timeout_s=timeout_s, work="detection")
    store = await AwayStore.open(MEMORY)
    try:
        yield Fleet(store, process, folder)
    finally:
        await process.close()
        await store.close()


async def test_a_slow_engine_becomes_a_verdict_an_episode_and_events(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.until(SETTLED_S)
        assert (fleet.loop.verdicts, fleet.loop.trouble, await fleet.stored()) == ({}, "", [])
        fleet.world.engines[0].slow(2.5)
        await fleet.until(SETTLED_S + 60.0)
        verdict = fleet.loop.verdicts["replica-0"]
        (episode,) = await fleet.stored()
        fleet.world.engines[0].slow(1.0)
        await fleet.until(SETTLED_S + 200.0)
        assert (verdict.kind.value, verdict.cause) == ("DEGRADED", "SLOW")
        assert verdict.suggested_action in {"INSPECT", "REPLACE"}  # the second only once it has lasted
        assert 1e6 + SETTLED_S <= verdict.since_s <= 1e6 + SETTLED_S + 60.0
        assert 0.0 < verdict.score <= 1.0
        assert (episode.object, episode.state, episode.causes) == ("replica-0", EpisodeState.OPEN, ("SLOW",))
        assert {each.feature for each in episode.series} >= {"step_s", "running"}
        (episode,) = await fleet.stored()
        assert episode.state is EpisodeState.CLOSED
        assert episode.close_time_s > episode.open_time_s
        assert fleet.told == ["EpisodeOpened replica-0", "EpisodeClosed replica-0"]
        assert fleet.loop.figures.episodes == {"DEGRADED": 1}
        assert fleet.loop.figures.steps > 80


async def test_a_hung_engine_is_left_out_of_scaling_while_it_hangs(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.until(60.0)
        fleet.world.engines[1].hung = True
        await fleet.until(120.0)
        assert fleet.loop.dead() == {"replica-1"}
        fleet.monotonic_s += STALE_AFTER_S + 1.0
        assert fleet.loop.dead() == frozenset()  # nobody says so any more


async def test_what_an_agent_ejected_is_dead_at_once(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.until(60.0)
        hung = fleet.snapshot.replicas["replica-2"]
        out = replace(hung, status=replace(hung.status, in_routing=False))
        fleet.snapshot = replace(fleet.snapshot, revision=2, replicas={**fleet.snapshot.replicas, out.name: out})
        await fleet.until(70.0)
        assert fleet.loop.dead() == {"replica-2"}


async def test_step_times_follow_what_calibration_learns_later(tmp_path: Path) -> None:
    class Learning(Nothing):
        memory = 1.0

        def facts(self, variant: Variant) -> EngineModel | str:
            return EngineModel(shape=catalog.models()["meta-llama/Llama-3.1-8B-Instruct"], gpu=catalog.gpus()["H100"])

        def corrections(self) -> Mapping[str, Correction]:
            model = self.facts(next(iter(snapshot(cluster()).variants.values())))
            assert isinstance(model, EngineModel)
            return {model.key: Correction(memory=self.memory)}

    async with _fleet(tmp_path) as fleet:
        engines = fleet.engines = Learning()
        fleet.new_leader()
        await fleet.loop.round()
        engines.memory = 1.5
        for _ in range(3):
            fleet.clock.now_s += FOLLOW_EVERY_S
            fleet.monotonic_s += SAVE_EVERY_S
            await fleet.loop.round()
        arrays, _ = read_state(tmp_path / "detection.npz")
        found = FollowedCorrection.load(arrays["factors/chat-1"].tolist(), now_s=0.0)
        assert found.began[1] == 1.0
        assert 1.0 < found.correction.memory < 1.05


async def test_a_slow_engine_that_hangs_before_figures_are_due_is_stored_as_hung(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.until(SETTLED_S)
        fleet.world.engines[0].slow(2.5)
        while not await fleet.stored():
            await fleet.until(fleet.world.now_s + 5.0)
        slow = fleet.snapshot.replicas["replica-0"]
        out = replace(slow, status=replace(slow.status, in_routing=False))
        fleet.snapshot = replace(fleet.snapshot, revision=2, replicas={**fleet.snapshot.replicas, out.name: out})
        await fleet.until(fleet.world.now_s + 5.0)      # sooner than figures are written again
        (episode,) = await fleet.stored()
        # Its agent restarts it at once: it is out of routing no more.
        fleet.snapshot = replace(fleet.snapshot, revision=3, replicas={**fleet.snapshot.replicas, slow.name: slow})
        await fleet.until(fleet.world.now_s + 15.0)
        (later,) = await fleet.stored()
        assert (episode.causes, episode.suggested_action) == (("HUNG", "SLOW"), "RESTART")
        assert later.causes == ("SLOW", "HUNG")
        assert later.update_time_s > episode.update_time_s


async def test_a_label_changes_later_verdicts_also_those_of_another_leader(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.until(SETTLED_S)
        fleet.world.engines[0].slow(1.5)
        await fleet.until(SETTLED_S + 120.0)
        assert fleet.loop.verdicts["replica-0"].cause == "SLOW"
        (episode,) = await fleet.stored()
        # As the API writes it; the deployment is what stands before the replica's own name.
        false = replace(episode, label=EpisodeLabel.FALSE, label_time_s=1.0, members=("chat/replicas/replica-0",))
        fleet.loop.labelled(false)
        await fleet.until(SETTLED_S + 130.0)
        assert fleet.loop.verdicts == {}
        key = codec.key(false.name)
        entry = await fleet.store.get(key)
        assert entry is not None
        await fleet.store.transact([ModRevisionIs(key, entry.mod_revision)], [Put(key, codec.encode(false))])
        fleet.new_leader()
        await fleet.until(SETTLED_S + 180.0)
        assert (fleet.loop.verdicts, fleet.loop.judges) == ({}, True)
        fleet.loop.labelled(replace(false, label=EpisodeLabel.NONE))
        await fleet.until(SETTLED_S + 220.0)
        assert fleet.loop.verdicts["replica-0"].cause == "SLOW"


async def test_restarts_that_only_an_agent_knows_of_are_a_crash_loop(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.until(60.0)
        fleet.world.engines[2].state = "STARTING"
        fleet.world.engines[2].restart(after_s=1e9)     # no frame will tell of any of its processes
        for count in (1, 2, 3):
            await fleet.until(60.0 + 30.0 * count)
            one = fleet.snapshot.replicas["replica-2"]
            died = replace(one, status=replace(one.status, state=ReplicaState.STARTING, restarts=count))
            fleet.snapshot = replace(
                fleet.snapshot, revision=1 + count, replicas={**fleet.snapshot.replicas, one.name: died}
            )
        await fleet.until(165.0)
        assert {name: each.cause for name, each in fleet.loop.verdicts.items()} == {"replica-2": "CRASH_LOOP"}
        assert fleet.loop.dead() == {"replica-2"}


async def test_a_killed_child_is_replaced_and_the_episode_goes_on(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.until(60.0)
        fleet.world.engines[0].hung = True
        await fleet.until(120.0)
        child = fleet.process.pid
        assert child is not None
        os.kill(child, signal.SIGKILL)
        with contextlib.suppress(Unavailable):  # whether this round meets the dying child or already a new one
            await fleet.until(125.0)
        await fleet.until(200.0)
        assert fleet.process.pid != child
        assert fleet.loop.dead() == {"replica-0"}
        (episode,) = await fleet.stored()
        assert (episode.state, episode.causes) == (EpisodeState.OPEN, ("HUNG",))
        assert fleet.told == ["EpisodeOpened replica-0"]


async def test_a_stopped_child_costs_a_round_and_the_loop_goes_on(tmp_path: Path) -> None:
    async with _fleet(tmp_path, timeout_s=1.0) as fleet:
        await fleet.until(60.0)
        child = fleet.process.pid
        assert child is not None
        os.kill(child, signal.SIGSTOP)
        fleet.pass_time(5.0)
        started_s = time.monotonic()
        with pytest.raises(TimedOut):
            await fleet.loop.round()
        assert time.monotonic() - started_s < 10.0
        fleet.world.engines[0].hung = True
        await fleet.until(150.0)
        assert fleet.loop.dead() == {"replica-0"}


async def test_the_running_loop_outlives_a_store_that_is_away_and_keeps_the_reason(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        fleet.clock.scale = 1000.0
        fleet.new_leader()
        fleet.store.away = True
        task = asyncio.create_task(fleet.loop.run())
        try:
            await until_async(lambda: fleet.loop.figures.failures >= 2, what="rounds that fail")
            assert "the store is away" in fleet.loop.trouble
            fleet.store.away = False
            await until_async(lambda: not fleet.loop.trouble, timeout_s=30, what="a round that brings something")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_new_leader_goes_on_with_what_is_open_and_what_was_learnt(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.until(SETTLED_S)
        fleet.world.engines[0].slow(2.5)
        await fleet.until(SETTLED_S + 120.0)
        (before,) = await fleet.stored()
        fleet.new_leader()
        await fleet.until(SETTLED_S + 220.0)
        (after,) = await fleet.stored()
        assert (after.name, after.state) == (before.name, EpisodeState.OPEN)
        assert after.update_time_s > before.update_time_s


async def test_a_label_that_a_user_wrote_meanwhile_stays(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.until(60.0)
        fleet.world.engines[0].hung = True
        await fleet.until(120.0)
        (episode,) = await fleet.stored()
        labelled = replace(episode, label=EpisodeLabel.TRUE, label_actor="user/x", label_time_s=5.0)
        key = codec.key(episode.name)
        entry = await fleet.store.get(key)
        assert entry is not None
        await fleet.store.transact([ModRevisionIs(key, entry.mod_revision)], [Put(key, codec.encode(labelled))])
        fleet.world.engines[0].hung = False
        fleet.world.engines[0].restart()
        await fleet.until(250.0)
        (episode,) = await fleet.stored()
        assert (episode.state, episode.label, episode.label_actor) == (
            EpisodeState.CLOSED, EpisodeLabel.TRUE, "user/x"
        )


async def test_without_the_leader_s_key_nothing_is_written(tmp_path: Path) -> None:
    async with _fleet(tmp_path) as fleet:
        await fleet.until(60.0)
        await fleet.store.transact([ModRevisionIs(codec.LEADER_KEY, 0)], [Put(codec.LEADER_KEY, b"another leader")])
        fleet.world.engines[0].hung = True
        await fleet.until(120.0)
        assert fleet.loop.dead() == {"replica-0"}
        assert await fleet.stored() == []
