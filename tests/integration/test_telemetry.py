"""Telemetry over the real stream: what is measured can be asked for, what cannot be is counted and stays missing."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from enova.v1 import (
    cluster_pb2,
    deployment_service_pb2,
    deployment_service_pb2_grpc,
    replica_service_pb2,
    replica_service_pb2_grpc,
    telemetry_pb2,
)
from enova_testing.coordinator_process import CoordinatorProcess, running_coordinator
from enova_testing.scripted_agent import MODEL, ScriptedAgent
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network
DEPLOYMENT = "deployments/measured"


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorProcess]:
    with running_coordinator(tmp_path_factory.mktemp("telemetry")) as process:
        yield process


@pytest_asyncio.fixture
async def channel(coordinator: CoordinatorProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(coordinator.address) as opened:
        yield opened


@pytest_asyncio.fixture
async def agent(coordinator: CoordinatorProcess, channel: grpc.aio.Channel) -> AsyncIterator[ScriptedAgent]:
    """An agent whose node runs one replica."""
    async with ScriptedAgent(coordinator.address).connected() as connected:
        stub: Any = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
        request = deployment_service_pb2.UpdateDeploymentRequest(
            deployment=cluster_pb2.Deployment(name=DEPLOYMENT, model=MODEL, replicas=1), allow_missing=True
        )
        await stub.UpdateDeployment(request)
        await until_async(lambda: connected.running, what="the replica is assigned")
        yield connected


async def asked(
    channel: grpc.aio.Channel, parent: str = DEPLOYMENT, window_s: float = 30.0
) -> replica_service_pb2.GetTelemetryResponse:
    stub: Any = replica_service_pb2_grpc.ReplicaServiceStub(channel)
    request = replica_service_pb2.GetTelemetryRequest(parent=parent, window_s=window_s)
    answer: replica_service_pb2.GetTelemetryResponse = await stub.GetTelemetry(request)
    return answer


def sample(agent: ScriptedAgent, **figures: Any) -> telemetry_pb2.ReplicaSample:
    return telemetry_pb2.ReplicaSample(replica=agent.running[0], state="READY", instance="one", **figures)


async def rejected(coordinator: CoordinatorProcess, reason: str) -> float:
    figures = await asyncio.to_thread(coordinator.figures)
    return figures.get(f'enova_coordinator_rejected_total{{reason="{reason}"}}', 0.0)


async def expect_rejected(coordinator: CoordinatorProcess, reason: str, before: float, count: int = 1) -> None:
    async def counted() -> bool:
        return await rejected(coordinator, reason) == before + count

    await until_async(counted, what=f"{count} x {reason}")


async def series(channel: grpc.aio.Channel, feature: str, parent: str = DEPLOYMENT) -> list[float]:
    answer = await asked(channel, parent)
    found = (value for each in answer.series if each.feature == feature for value in each.values)
    return [value for value in found if not math.isnan(value)]


async def test_gauges_counters_and_requests_arrive_on_the_grid(
    agent: ScriptedAgent, channel: grpc.aio.Channel
) -> None:
    now_s = time.time()
    requests = [
        telemetry_pb2.RequestSummary(
            deployment=DEPLOYMENT, replica=agent.running[0], serving_class="default", arrived=5, finished=4,
            prompt_tokens=100, output_tokens=40,
            ttft_s=telemetry_pb2.Sketch(relative_accuracy=0.01, offset=-10, counts=[4], sum=3.3, min=0.8, max=0.85),
        )
    ]  # fmt: skip
    for back, tokens in ((3, 1000.0), (2, 1500.0), (1, 1700.0)):
        agent.say(
            frame=agent.frame(
                now_s - back,
                replicas=[sample(agent, running=float(back), generation_tokens_total=tokens, held=2.0)],
                gpus=[telemetry_pb2.GpuSample(uuid="GPU-node-0-0", utilization=0.5)],
                requests=requests if back == 1 else [],
            )
        )

    async def arrived() -> bool:
        return sum(await series(channel, "arrived")) == 5

    await until_async(arrived)
    assert (await series(channel, "running"))[-3:] == [3, 2, 1]
    assert (await series(channel, "generation_tokens"))[-2:] == [500, 200]
    assert 0.5 in await series(channel, "utilization")
    answer = await asked(channel)
    assert [(t.serving_class, t.finished, t.output_tokens, sum(t.ttft_s.counts)) for t in answer.totals] == [
        ("default", 4, 40, 4)
    ]
    assert [each.running for each in answer.latest] == [1.0]


async def test_a_new_engine_instance_counts_from_zero(agent: ScriptedAgent, channel: grpc.aio.Channel) -> None:
    now_s = time.time()
    agent.say(frame=agent.frame(now_s - 1, replicas=[sample(agent, prompt_tokens_total=900.0)]))
    restarted = sample(agent, prompt_tokens_total=30.0)
    restarted.instance = "two"
    agent.say(frame=agent.frame(now_s, replicas=[restarted]))

    async def counted() -> bool:
        return 30.0 in await series(channel, "prompt_tokens")

    await until_async(counted)
    assert min(await series(channel, "prompt_tokens")) >= 0


@pytest.mark.parametrize(
    ("value", "reason"), [(math.nan, "not_finite"), (math.inf, "not_finite"), (-1.0, "negative")]
)
async def test_figures_that_cannot_be_are_missing_and_counted(
    agent: ScriptedAgent, channel: grpc.aio.Channel, coordinator: CoordinatorProcess, value: float, reason: str
) -> None:
    before = await rejected(coordinator, reason)
    agent.say(frame=agent.frame(time.time(), replicas=[sample(agent, kv_cache_usage=value, waiting=7.0)]))
    await expect_rejected(coordinator, reason, before)
    kept = await series(channel, "kv_cache_usage")
    assert all(0 <= each < math.inf for each in kept)
    assert 7.0 in await series(channel, "waiting")


@pytest.mark.parametrize(("shift_s", "reason"), [(3600.0, "future"), (-86_400.0, "too_old"), (math.nan, "bad_time")])
async def test_frames_from_another_time_are_refused(
    agent: ScriptedAgent, coordinator: CoordinatorProcess, shift_s: float, reason: str
) -> None:
    before = await rejected(coordinator, reason)
    agent.say(frame=agent.frame(time.time() + shift_s, replicas=[sample(agent, running=99.0)]))
    await expect_rejected(coordinator, reason, before)


async def test_a_frame_that_comes_twice_counts_once(
    agent: ScriptedAgent, channel: grpc.aio.Channel, coordinator: CoordinatorProcess
) -> None:
    before = await rejected(coordinator, "duplicate")
    frame = agent.frame(
        time.time(),
        requests=[telemetry_pb2.RequestSummary(deployment=DEPLOYMENT, serving_class="twice", arrived=1)],
    )
    agent.say(frame=frame)
    agent.say(frame=frame)
    await expect_rejected(coordinator, "duplicate", before)
    assert [t.arrived for t in (await asked(channel)).totals if t.serving_class == "twice"] == [1]


async def test_a_stream_may_report_its_own_node_and_replicas_alone(
    agent: ScriptedAgent, coordinator: CoordinatorProcess
) -> None:
    foreign, other = (
        await rejected(coordinator, "other_node"),
        await rejected(coordinator, "other_nodes_replica"),
    )
    frame = agent.frame(time.time())
    frame.node = "nodes/somebody-else"
    agent.say(frame=frame)
    await expect_rejected(coordinator, "other_node", foreign)
    strange = telemetry_pb2.ReplicaSample(replica="deployments/other/replicas/r", running=1.0)
    agent.say(frame=agent.frame(time.time(), replicas=[strange]))
    await expect_rejected(coordinator, "other_nodes_replica", other)


async def test_a_stale_reading_is_no_measurement(agent: ScriptedAgent, coordinator: CoordinatorProcess) -> None:
    before = await rejected(coordinator, "stale")
    agent.say(frame=agent.frame(time.time(), replicas=[sample(agent, running=55.0, age_s=60.0)]))
    await expect_rejected(coordinator, "stale", before)


async def test_a_sketch_that_cannot_be_merged_is_counted(
    agent: ScriptedAgent, coordinator: CoordinatorProcess
) -> None:
    before = await rejected(coordinator, "bad_sketch")
    sketch = telemetry_pb2.Sketch(relative_accuracy=0.5, counts=[1])
    summary = telemetry_pb2.RequestSummary(deployment=DEPLOYMENT, arrived=1, ttft_s=sketch)
    agent.say(frame=agent.frame(time.time(), requests=[summary]))
    await expect_rejected(coordinator, "bad_sketch", before)


async def test_absent_figures_stay_missing(agent: ScriptedAgent, channel: grpc.aio.Channel) -> None:
    agent.say(frame=agent.frame(time.time(), replicas=[sample(agent, running=0.0)]))

    async def measured() -> bool:
        return 0.0 in await series(channel, "running")

    await until_async(measured)
    answer = await asked(channel)
    newest = {each.feature: each.values[-1] for each in answer.series}
    assert "resident_memory_bytes" not in newest


@pytest.mark.parametrize("window_s", [math.nan, -1.0, math.inf])
async def test_a_window_that_is_no_span_of_time_is_refused(
    agent: ScriptedAgent, channel: grpc.aio.Channel, window_s: float
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asked(channel, window_s=window_s)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
