"""Policies in their child process: they act on stored frames, and neither a crash nor a hang delays anything else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import pytest_asyncio

from enova.v1 import (
    agent_service_pb2,
    cluster_pb2,
    decision_service_pb2,
    decision_service_pb2_grpc,
    deployment_service_pb2,
    deployment_service_pb2_grpc,
    telemetry_pb2,
    verdict_service_pb2,
    verdict_service_pb2_grpc,
)
from enova_common.clock import ModelClock
from enova_common.errors import TimedOut, Unavailable
from enova_coordinator.agents import INSPECT_TIMEOUT_S
from enova_coordinator.policy_process import PolicyProcess, PolicyRaised
from enova_recommender.scaling.enova_007 import MENDED
from enova_recommender.scaling.types import (
    EngineSizes,
    Feature,
    GpuFacts,
    ModelFacts,
    Observation,
    ReplicaSeries,
    Series,
    VerdictKind,
)
from enova_testing.coordinator_process import Config, CoordinatorProcess, running_coordinator
from enova_testing.processes import is_alive
from enova_testing.scripted_agent import MODEL, ScriptedAgent
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network
SCALE = 120.0                          # two model minutes a second
POLICY = MENDED.name
DEPLOYMENT = "deployments/scaled"
ACTION = decision_service_pb2.Decision


def observation(*, success: float = 60) -> Observation:
    figures = {
        Feature.PENDING: 80.0,
        Feature.RUNNING: 256.0,
        Feature.KV_USAGE: 100.0,
        Feature.NEW: 120.0,
        Feature.SUCCESS: success,
    }
    series = {
        feature: Series(start_s=1e6 - 540, step_s=60.0, values=(value,) * 10) for feature, value in figures.items()
    }
    return Observation(
        now_s=1e6,
        replicas=1,
        series=(ReplicaSeries(replica="r", series=series),),
        configuration=EngineSizes(tensor_parallel_size=1, gpu_memory_utilization=0.9, max_num_seqs=256),
        model=ModelFacts(
            framework="llama", size_billion=7, parameters=6_607_000_000, kv_elements_per_token=262144,
            attention_heads=32, context_tokens=4096,
        ),
        gpu=GpuFacts(count=8, memory_bytes=24 << 30),
    )  # fmt: skip


@pytest_asyncio.fixture
async def process() -> AsyncIterator[PolicyProcess]:
    child = PolicyProcess(timeout_s=1.0)
    yield child
    await child.close()


async def test_a_policy_answers_from_another_process(process: PolicyProcess) -> None:
    proposal = await process.decide(POLICY, observation())
    assert (proposal.verdict, proposal.replicas) == (VerdictKind.OVERLOADED, 2)
    assert process.pid not in {None, os.getpid()}


async def test_what_a_policy_raises_costs_its_answer_alone(process: PolicyProcess) -> None:
    with pytest.raises(PolicyRaised, match="OverflowError"):
        await process.decide("enova-0.0.7-faithful", observation(success=0))
    child = process.pid
    assert (await process.decide(POLICY, observation())).replicas == 2
    assert process.pid == child


async def test_a_child_that_is_killed_is_replaced(process: PolicyProcess) -> None:
    await process.decide(POLICY, observation())
    child = process.pid
    assert child is not None
    os.kill(child, signal.SIGKILL)
    with contextlib.suppress(Unavailable):  # whether this call meets the dying child or already a new one
        await process.decide(POLICY, observation())
    assert (await process.decide(POLICY, observation())).replicas == 2
    assert process.pid != child
    assert process.figures.starts == 2


async def test_a_child_that_stands_still_is_killed_at_the_deadline_and_replaced(process: PolicyProcess) -> None:
    await process.decide(POLICY, observation())
    child = process.pid
    assert child is not None
    os.kill(child, signal.SIGSTOP)
    started_s = time.monotonic()
    with pytest.raises(TimedOut) as caught:
        await process.decide(POLICY, observation())
    assert caught.value.reason == "POLICY_HUNG"
    assert 0.9 < time.monotonic() - started_s < 5
    assert not psutil.pid_exists(child)
    assert (await process.decide(POLICY, observation())).replicas == 2


@pytest.fixture
def clock() -> ModelClock:
    return ModelClock(SCALE, time.time())


@pytest.fixture
def coordinator(tmp_path_factory: pytest.TempPathFactory, clock: ModelClock) -> Iterator[CoordinatorProcess]:
    config = Config(
        scaling={"interval_s": 30.0, "cooldown_s": 60.0, "timeout_s": 1.0},
        environment={"ENOVA_TIME_SCALE": f"{clock.scale}", "ENOVA_CLOCK_EPOCH": f"{clock.epoch_unix_s:.6f}"},
    )
    with running_coordinator(tmp_path_factory.mktemp("policy"), config) as running:
        yield running


@pytest_asyncio.fixture
async def channel(coordinator: CoordinatorProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(coordinator.address) as opened:
        yield opened


class Load:
    """Frames of every replica of an agent, as often as the coordinator wants them."""

    def __init__(self, agent: ScriptedAgent, clock: ModelClock) -> None:
        self.pending, self.running, self.arrived, self.cache = 0.0, 0.0, 0, 0.01
        self.sent = 0
        self._agent = agent
        self._clock = clock

    async def run(self) -> None:
        agent = self._agent
        assert agent.welcome is not None
        while True:
            samples = [
                telemetry_pb2.ReplicaSample(
                    replica=replica, state="READY", instance="one", running=self.running, waiting=self.pending,
                    kv_cache_usage=self.cache, held=self.running + self.pending,
                )
                for replica in agent.running
            ]  # fmt: skip
            requests = [
                telemetry_pb2.RequestSummary(
                    deployment=DEPLOYMENT, replica=replica, arrived=2 * self.arrived, finished=self.arrived
                )
                for replica in agent.running
            ]
            agent.say(frame=agent.frame(self._clock.now(), length_s=30.0, replicas=samples, requests=requests))
            self.sent += 1
            await asyncio.sleep(agent.welcome.frame_interval_s)


@pytest_asyncio.fixture
async def agent(coordinator: CoordinatorProcess) -> AsyncIterator[ScriptedAgent]:
    async with ScriptedAgent(coordinator.address).connected() as connected:
        yield connected


@pytest_asyncio.fixture
async def load(agent: ScriptedAgent, clock: ModelClock) -> AsyncIterator[Load]:
    made = Load(agent, clock)
    sending = asyncio.create_task(made.run())
    yield made
    sending.cancel()


async def deploy(channel: grpc.aio.Channel, agent: ScriptedAgent, **fields: Any) -> None:
    stub: Any = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
    merged: dict[str, Any] = {"model": MODEL, "min": 1, "max": 3, "policy": POLICY} | fields
    configuration = cluster_pb2.Configuration(max_num_seqs=4)
    await stub.CreateDeployment(
        deployment_service_pb2.CreateDeploymentRequest(
            deployment_id=DEPLOYMENT.removeprefix("deployments/"),
            deployment=cluster_pb2.Deployment(configuration=configuration, **merged),
        )
    )
    await until_async(lambda: len(agent.running) == 1, what="the first replica")


async def decisions(channel: grpc.aio.Channel) -> list[decision_service_pb2.Decision]:
    """Oldest first."""
    stub: Any = decision_service_pb2_grpc.DecisionServiceStub(channel)
    answer = await stub.ListDecisions(decision_service_pb2.ListDecisionsRequest(deployment=DEPLOYMENT))
    return list(reversed(answer.decisions))


def decided(channel: grpc.aio.Channel, *actions: Any) -> Callable[[], Any]:
    async def look() -> list[decision_service_pb2.Decision]:
        found = await decisions(channel)
        return found if [each.action for each in found][: len(actions)] == list(actions) else []

    return look


def overload(load: Load) -> None:
    load.pending, load.running, load.arrived = 80.0, 4.0, 30


async def test_overload_scales_out_and_idleness_back_in_by_stored_frames(
    coordinator: CoordinatorProcess, channel: grpc.aio.Channel, agent: ScriptedAgent, load: Load
) -> None:
    await deploy(channel, agent)
    overload(load)
    (up,) = (await until_async(decided(channel, ACTION.ACTION_SCALE_UP), timeout_s=30))[:1]  # type: ignore[index]
    assert (up.from_replicas, up.to_replicas, up.actor) == (1, 3, f"policy/{POLICY}")
    assert up.term == agent.terms[-1]
    assert {each.feature for each in up.inputs} >= {"pending_requests", "running_requests", "gpu_kv_cache_usage"}
    assert all(frame.startswith(f"{agent.node}/{agent.instance}/") for frame in up.frames)
    assert up.frames
    pending = next(each for each in up.inputs if each.feature == "pending_requests")
    assert list(pending.values)[-3:] == [80, 80, 80]
    await until_async(lambda: len(agent.running) == 3)
    load.pending, load.running, load.arrived = 0.0, 0.0, 0
    await until_async(
        decided(channel, ACTION.ACTION_SCALE_UP, ACTION.ACTION_SCALE_DOWN, ACTION.ACTION_SCALE_DOWN), timeout_s=40
    )
    await until_async(lambda: len(agent.running) == 1)


async def test_a_full_cache_under_a_small_batch_rolls_out_the_recommended_tensor_parallel_size(
    coordinator: CoordinatorProcess, channel: grpc.aio.Channel, agent: ScriptedAgent, load: Load
) -> None:
    await deploy(channel, agent)
    load.pending, load.running, load.arrived, load.cache = 80.0, 1.5, 30, 0.95

    def parallel() -> set[int]:
        return {member.configuration.tensor_parallel_size for member in agent.assignment.members}

    # KV need (0.92 x 79.6 - 16) GiB / 0.375 and the weights: two GPUs hold 129 GiB, four are needed.
    await until_async(lambda: parallel() == {4}, timeout_s=40)
    found = [each for each in await decisions(channel) if each.action != ACTION.ACTION_HOLD]
    assert found[0].from_configuration.tensor_parallel_size == 1
    assert found[0].to_configuration.tensor_parallel_size == 4


async def test_a_paused_deployment_is_not_scaled_and_the_wish_is_recorded_once(
    coordinator: CoordinatorProcess, channel: grpc.aio.Channel, agent: ScriptedAgent, load: Load
) -> None:
    await deploy(channel, agent, autoscaling_paused=True)
    overload(load)
    await until_async(decided(channel, ACTION.ACTION_HOLD), timeout_s=30)
    calls = (await asyncio.to_thread(coordinator.figures))["enova_coordinator_policy_calls_total"]

    async def asked_again() -> bool:
        figures = await asyncio.to_thread(coordinator.figures)
        return figures["enova_coordinator_policy_calls_total"] > calls + 3

    await until_async(asked_again)
    (hold,) = await decisions(channel)
    assert "paused" in hold.reason
    assert hold.from_replicas == hold.to_replicas == len(agent.running) == 1


async def test_a_hung_child_delays_no_heartbeat_and_no_frame_and_decisions_come_all_the_same(
    coordinator: CoordinatorProcess, channel: grpc.aio.Channel, agent: ScriptedAgent, load: Load
) -> None:
    await deploy(channel, agent)
    await until_async(coordinator.policy_child, timeout_s=20)
    child = coordinator.policy_child()
    os.kill(child, signal.SIGSTOP)
    overload(load)
    acks, sent, began_s = agent.acks, load.sent, time.monotonic()
    await until_async(lambda: agent.acks >= acks + 5, timeout_s=4)
    assert time.monotonic() - began_s < 4

    async def taken() -> bool:
        return (await asyncio.to_thread(coordinator.figures))["enova_coordinator_frames_total"] >= sent

    await until_async(taken)
    await until_async(decided(channel, ACTION.ACTION_SCALE_UP), timeout_s=30)
    assert not is_alive(child)
    figures = await asyncio.to_thread(coordinator.figures)
    assert figures["enova_coordinator_policy_timeouts_total"] >= 1


async def test_verdicts_say_what_the_policy_saw(
    coordinator: CoordinatorProcess, channel: grpc.aio.Channel, agent: ScriptedAgent, load: Load
) -> None:
    await deploy(channel, agent, min=None, max=None, replicas=1)
    overload(load)
    stub: Any = verdict_service_pb2_grpc.VerdictServiceStub(channel)

    async def overloaded() -> bool:
        answer = await stub.ListVerdicts(verdict_service_pb2.ListVerdictsRequest(object=DEPLOYMENT))
        return any(each.kind == verdict_service_pb2.Verdict.KIND_OVERLOADED for each in answer.verdicts)

    await until_async(overloaded, timeout_s=30)
    assert not await decisions(channel)  # the number of replicas is fixed


async def test_the_cool_down_goes_on_after_a_restart(tmp_path: Path, clock: ModelClock) -> None:
    config = Config(
        scaling={"interval_s": 30.0, "cooldown_s": 86_400.0, "timeout_s": 1.0},
        environment={"ENOVA_TIME_SCALE": f"{clock.scale}", "ENOVA_CLOCK_EPOCH": f"{clock.epoch_unix_s:.6f}"},
    )
    with running_coordinator(tmp_path, config) as first:
        async with connected(first, clock) as (channel, agent, load):
            await deploy(channel, agent)
            overload(load)
            await until_async(decided(channel, ACTION.ACTION_SCALE_UP), timeout_s=30)
            await until_async(lambda: len(agent.running) == 3)
    with running_coordinator(tmp_path, config) as second:
        async with connected(second, clock) as (channel, agent, load):
            stub: Any = verdict_service_pb2_grpc.VerdictServiceStub(channel)

            async def underused() -> bool:
                answer = await stub.ListVerdicts(verdict_service_pb2.ListVerdictsRequest(object=DEPLOYMENT))
                return any(each.kind == verdict_service_pb2.Verdict.KIND_UNDERUSED for each in answer.verdicts)

            await until_async(underused, timeout_s=30)
            proposals = await proposed(second)
            await until_async(lambda: more_proposed(second, proposals + 3), timeout_s=30)
            assert [each.action for each in await decisions(channel)] == [ACTION.ACTION_SCALE_UP]


class SilentHost(ScriptedAgent):
    """A host that says nothing of models: a network file system hangs."""

    def _obey(self, message: agent_service_pb2.ConnectResponse) -> None:
        if message.WhichOneof("message") != "inspect_model" or message.inspect_model.model == MODEL:
            super()._obey(message)


async def test_a_host_that_is_silent_about_one_model_delays_no_other_deployment(
    tmp_path: Path, clock: ModelClock
) -> None:
    config = Config(
        scaling={"interval_s": 30.0, "cooldown_s": 60.0, "timeout_s": 1.0},
        environment={"ENOVA_TIME_SCALE": f"{clock.scale}", "ENOVA_CLOCK_EPOCH": f"{clock.epoch_unix_s:.6f}"},
    )
    with running_coordinator(tmp_path, config) as first:
        async with connected(first, clock) as (channel, agent, load):
            agent.models["/models/hangs"] = "{}"
            await deploy(channel, agent)
            deployments: Any = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
            wanted = cluster_pb2.Deployment(model="/models/hangs", replicas=1)
            await deployments.CreateDeployment(
                deployment_service_pb2.CreateDeploymentRequest(deployment_id="hangs", deployment=wanted)
            )
    with running_coordinator(tmp_path, config) as second:  # which has yet to ask
        async with connected(second, clock, SilentHost) as (channel, _, load):
            overload(load)
            await until_async(decided(channel, ACTION.ACTION_SCALE_UP), timeout_s=INSPECT_TIMEOUT_S / 2)


async def proposed(coordinator: CoordinatorProcess) -> float:
    return (await asyncio.to_thread(coordinator.figures))["enova_coordinator_policy_calls_total"]


async def more_proposed(coordinator: CoordinatorProcess, count: float) -> bool:
    return await proposed(coordinator) >= count


@contextlib.asynccontextmanager
async def connected(
    coordinator: CoordinatorProcess, clock: ModelClock, kind: type[ScriptedAgent] = ScriptedAgent
) -> AsyncIterator[tuple[grpc.aio.Channel, ScriptedAgent, Load]]:
    async with (
        grpc.aio.insecure_channel(coordinator.address) as channel,
        kind(coordinator.address).connected() as agent,
    ):
        load = Load(agent, clock)
        sending = asyncio.create_task(load.run())
        try:
            yield channel, agent, load
        finally:
            sending.cancel()
