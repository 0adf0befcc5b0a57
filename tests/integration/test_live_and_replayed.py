"""What a live coordinator decided comes out again, to the bit, where the simulator decides the recorded situations."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from enova.v1 import (
    cluster_pb2,
    decision_service_pb2,
    decision_service_pb2_grpc,
    deployment_service_pb2,
    deployment_service_pb2_grpc,
    telemetry_pb2,
)
from enova_cli.context import EXIT_NOT_FOUND, EXIT_UNREACHABLE
from enova_common.clock import ModelClock
from enova_coordinator.core.recording import Recorded, read_lines
from enova_simulator.replay import Asked, replayed
from enova_testing.coordinator_process import Config, CoordinatorProcess, running_coordinator
from enova_testing.fleet import run_enova
from enova_testing.scripted_agent import MODEL, ScriptedAgent
from enova_testing.waiting import until_async

pytestmark = [pytest.mark.network, pytest.mark.slow]
SCALE = 120.0                          # two model minutes a second
DEPLOYMENT = "deployments/scaled"
ACTION = decision_service_pb2.Decision


class Load:
    """Frames of every replica of an agent: `arrived` requests in each, of which every replica finishes a quarter."""

    def __init__(self, agent: ScriptedAgent, clock: ModelClock) -> None:
        self.arrived = 0
        self._agent = agent
        self._clock = clock

    async def run(self) -> None:
        agent = self._agent
        assert agent.welcome is not None
        while True:
            running, waiting = (4.0, 20.0) if self.arrived else (0.0, 0.0)
            samples = [
                telemetry_pb2.ReplicaSample(
                    replica=replica, state="READY", instance="one", running=running, waiting=waiting,
                    kv_cache_usage=0.1, held=running + waiting,
                )
                for replica in agent.running
            ]  # fmt: skip
            requests = [
                telemetry_pb2.RequestSummary(
                    deployment=DEPLOYMENT, replica=replica, arrived=self.arrived // len(agent.running),
                    finished=self.arrived // 4,
                )
                for replica in agent.running
            ]  # fmt: skip
            agent.say(frame=agent.frame(self._clock.now(), length_s=30.0, replicas=samples, requests=requests))
            await asyncio.sleep(agent.welcome.frame_interval_s)


@contextlib.asynccontextmanager
async def scaled(
    coordinator: CoordinatorProcess, clock: ModelClock, **fields: Any
) -> AsyncIterator[tuple[grpc.aio.Channel, ScriptedAgent, Load]]:
    """A deployment that enova's policy scales, with an agent that reports its load."""
    async with (
        grpc.aio.insecure_channel(coordinator.address) as channel,
        ScriptedAgent(coordinator.address).connected() as agent,
    ):
        stub: Any = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
        wanted = cluster_pb2.Deployment(
            model=MODEL, min=1, max=4, policy="enova", configuration=cluster_pb2.Configuration(max_num_seqs=4), **fields
        )
        request = deployment_service_pb2.CreateDeploymentRequest(deployment_id="scaled", deployment=wanted)
        await stub.CreateDeployment(request)
        await until_async(lambda: len(agent.running) == 1, what="the first replica")
        load = Load(agent, clock)
        sending = asyncio.create_task(load.run())
        try:
            yield channel, agent, load
        finally:
            sending.cancel()


async def exported(channel: grpc.aio.Channel) -> list[Recorded]:
    stub: Any = decision_service_pb2_grpc.DecisionServiceStub(channel)
    request = decision_service_pb2.ExportSituationsRequest(deployment=DEPLOYMENT)
    return list(read_lines([message.line async for message in stub.ExportSituations(request)]))


async def decisions(channel: grpc.aio.Channel) -> list[decision_service_pb2.Decision]:
    """What the policy did, oldest first."""
    stub: Any = decision_service_pb2_grpc.DecisionServiceStub(channel)
    answer = await stub.ListDecisions(decision_service_pb2.ListDecisionsRequest(deployment=DEPLOYMENT))
    acts = (ACTION.ACTION_SCALE_UP, ACTION.ACTION_SCALE_DOWN)
    return [each for each in reversed(answer.decisions) if each.action in acts and each.actor == "policy/enova"]


def config(clock: ModelClock) -> Config:
    return Config(
        scaling={"timeout_s": 10.0},
        environment={"ENOVA_TIME_SCALE": f"{clock.scale}", "ENOVA_CLOCK_EPOCH": f"{clock.epoch_unix_s:.6f}"},
    )


async def test_the_simulator_decides_the_recorded_situations_as_the_live_coordinator_did(tmp_path: Path) -> None:
    clock = ModelClock(SCALE, time.time())
    with running_coordinator(tmp_path, config(clock)) as coordinator:
        async with scaled(coordinator, clock, conservatism=1.5) as (channel, agent, load):
            load.arrived = 240         # 8 a second: more than two replicas carry, by whatever is known of them
            await until_async(lambda: len(agent.running) >= 3, timeout_s=40, what="it grows")
            load.arrived = 0
            await until_async(lambda: len(agent.running) == 1, timeout_s=60, what="it shrinks again")
            acts = await decisions(channel)
            await until_async(lambda: looked_after(channel, acts[-1]), timeout_s=30, what="a look at what was done")
            questions = await exported(channel)
    looks = list(replayed(questions, Asked()))
    assert [look.replayed for look in looks] == [question.wish for question in questions]
    assert {look.conservatism for look in looks} == {1.5}
    wished = {look.now_s: (look.target, sum(look.replayed.targets.values())) for look in looks}
    assert {each.action for each in acts} == {ACTION.ACTION_SCALE_UP, ACTION.ACTION_SCALE_DOWN}
    assert [wished[each.model_time_s] for each in acts] == [(each.from_replicas, each.to_replicas) for each in acts]
    # And nothing else was done between: the targets that the situations show are those.
    shown = [target for target, _ in itertools.groupby(look.target for look in looks)]
    assert shown[: len(acts) + 1] == [1, *(each.to_replicas for each in acts)]


async def looked_after(channel: grpc.aio.Channel, act: decision_service_pb2.Decision) -> bool:
    """Whether a situation of after an act has been recorded."""
    return (await exported(channel))[-1].situation.now_s > act.model_time_s


def fetched_and_kept(api: str, path: Path, least: int) -> None:
    """The command asks the coordinator, keeps what it got, and reads it again without one."""
    live = run_enova("replay", "scaled", "--save", str(path), "-o", "json", api=api)
    assert live.code == 0, live.err
    found = json.loads(live.out)
    assert (found["deployment"], found["differences"]) == (DEPLOYMENT, 0)
    assert found["situations"] >= least
    assert run_enova("replay", "--file", str(path), "-o", "json").out == live.out
    newest = run_enova("replay", "deployment/scaled", "--last", "1ms", "-o", "json", api=api)
    assert json.loads(newest.out)["situations"] == 1
    assert run_enova("replay", "deployment/none", api=api).code == EXIT_NOT_FOUND
    assert run_enova("replay", "scaled", "--save", "/nowhere/kept.gz", "-o", "json", api=api).error["field"] == "--save"
    assert run_enova("replay", "scaled").code == EXIT_UNREACHABLE


async def test_situations_outlive_the_leader_that_recorded_them(tmp_path: Path) -> None:
    clock = ModelClock(SCALE, time.time())
    with running_coordinator(tmp_path, config(clock)) as first:
        async with scaled(first, clock) as (channel, _, _):
            await until_async(lambda: exported(channel), timeout_s=30, what="a situation")
            before = await exported(channel)
    with running_coordinator(tmp_path, config(clock)) as second:
        async with grpc.aio.insecure_channel(second.address) as channel:
            await until_async(lambda: exported(channel), timeout_s=30, what="the second leads")
            after = await exported(channel)
            await asyncio.to_thread(fetched_and_kept, second.address, tmp_path / "kept.jsonl.gz", len(before))
    assert [each.situation.now_s for each in after[: len(before)]] == [each.situation.now_s for each in before]
