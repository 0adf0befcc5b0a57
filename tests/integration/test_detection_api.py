"""Detection in a whole coordinator: what agents send becomes verdicts, episodes and labels that callers see."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from enova.v1 import (
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
from enova_testing.coordinator_process import Config, CoordinatorProcess, running_coordinator
from enova_testing.processes import is_alive
from enova_testing.scripted_agent import MODEL, ScriptedAgent
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network
SCALE = 120.0                          # two model minutes a second
DEPLOYMENT = "deployments/watched"
POLICY = "enova-0.0.7-mended"
KIND = verdict_service_pb2.Verdict
EPISODE = verdict_service_pb2.Episode
TIMEOUT_S = 40.0


@pytest.fixture
def clock() -> ModelClock:
    return ModelClock(SCALE, time.time())


@pytest.fixture
def coordinator(tmp_path_factory: pytest.TempPathFactory, clock: ModelClock) -> Iterator[CoordinatorProcess]:
    config = Config(
        scaling={"interval_s": 30.0, "cooldown_s": 60.0, "timeout_s": 1.0},
        environment={"ENOVA_TIME_SCALE": f"{clock.scale}", "ENOVA_CLOCK_EPOCH": f"{clock.epoch_unix_s:.6f}"},
    )
    with running_coordinator(tmp_path_factory.mktemp("watched"), config) as running:
        yield running


@pytest_asyncio.fixture
async def channel(coordinator: CoordinatorProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(coordinator.address) as opened:
        yield opened


@pytest_asyncio.fixture
async def agent(coordinator: CoordinatorProcess) -> AsyncIterator[ScriptedAgent]:
    async with ScriptedAgent(coordinator.address).connected() as connected:
        yield connected


class Traffic:
    """Frames of every replica of an agent, as often as the coordinator wants them: each engine makes tokens."""

    def __init__(self, agent: ScriptedAgent, clock: ModelClock) -> None:
        self.pending, self.running, self.arrived = 0.0, 2.0, 30
        self.standing: set[str] = set()    # replicas whose engines make none
        self.sent = 0
        self._agent = agent
        self._clock = clock
        self._tokens: dict[str, float] = {}

    async def run(self) -> None:
        agent = self._agent
        assert agent.welcome is not None
        while True:
            for replica in agent.running:
                self._tokens[replica] = self._tokens.get(replica, 0.0) + 3000.0 * (replica not in self.standing)
            agent.say(
                frame=agent.frame(
                    self._clock.now(),
                    length_s=30.0,
                    replicas=[self._sample(replica) for replica in agent.running],
                    requests=[self._summary(replica) for replica in agent.running if replica not in self.standing],
                )
            )
            self.sent += 1
            await asyncio.sleep(agent.welcome.frame_interval_s)

    def _sample(self, replica: str) -> telemetry_pb2.ReplicaSample:
        return telemetry_pb2.ReplicaSample(
            replica=replica, state="READY", instance="one", running=self.running, waiting=self.pending,
            kv_cache_usage=0.1, held=self.running + self.pending, generation_tokens_total=self._tokens[replica],
        )  # fmt: skip

    def _summary(self, replica: str) -> telemetry_pb2.RequestSummary:
        return telemetry_pb2.RequestSummary(
            deployment=DEPLOYMENT, replica=replica, arrived=2 * self.arrived, finished=self.arrived
        )


@pytest_asyncio.fixture
async def traffic(agent: ScriptedAgent, clock: ModelClock) -> AsyncIterator[Traffic]:
    made = Traffic(agent, clock)
    sending = asyncio.create_task(made.run())
    yield made
    sending.cancel()


async def deploy(channel: grpc.aio.Channel, agent: ScriptedAgent, **fields: Any) -> None:
    stub: Any = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
    configuration = cluster_pb2.Configuration(max_num_seqs=4)
    wanted = cluster_pb2.Deployment(configuration=configuration, model=MODEL, policy=POLICY, **fields)
    await stub.CreateDeployment(
        deployment_service_pb2.CreateDeploymentRequest(
            deployment_id=DEPLOYMENT.removeprefix("deployments/"), deployment=wanted
        )
    )
    least = wanted.replicas or wanted.min
    await until_async(lambda: len(agent.running) == least, what="the first replicas")


def verdicts(channel: grpc.aio.Channel) -> Any:
    return verdict_service_pb2_grpc.VerdictServiceStub(channel)


async def verdict_on(channel: grpc.aio.Channel, name: str) -> verdict_service_pb2.Verdict | None:
    answer = await verdicts(channel).ListVerdicts(verdict_service_pb2.ListVerdictsRequest(object=name))
    return next((each for each in answer.verdicts if each.object == name), None)


async def episodes(channel: grpc.aio.Channel, **wanted: Any) -> list[verdict_service_pb2.Episode]:
    answer = await verdicts(channel).ListEpisodes(verdict_service_pb2.ListEpisodesRequest(**wanted))
    return list(answer.episodes)


async def hung(channel: grpc.aio.Channel, agent: ScriptedAgent, traffic: Traffic) -> str:
    """Let an engine stand still; the replica, once it is judged so."""
    name = sorted(agent.running)[0]
    traffic.standing.add(name)

    async def judged() -> bool:
        verdict = await verdict_on(channel, name)
        return verdict is not None and verdict.cause == "HUNG"

    await until_async(judged, timeout_s=TIMEOUT_S, what=f"{name} is HUNG")
    return name


async def hung_episode(channel: grpc.aio.Channel, name: str) -> verdict_service_pb2.Episode:
    """The episode of a replica that stands still: written a moment after the verdict stands."""

    async def written() -> list[verdict_service_pb2.Episode]:
        return [each for each in await episodes(channel, object=name) if "HUNG" in each.causes]

    found: Any = await until_async(written, what=f"an episode of {name}")
    episode: verdict_service_pb2.Episode = found[0]
    return episode


async def test_an_engine_that_stands_still_is_a_verdict_an_episode_an_event_and_a_figure(
    coordinator: CoordinatorProcess, channel: grpc.aio.Channel, agent: ScriptedAgent, traffic: Traffic
) -> None:
    await deploy(channel, agent, replicas=2)
    name = await hung(channel, agent, traffic)
    verdict = await verdict_on(channel, name)
    assert verdict is not None
    assert (verdict.kind, verdict.detector) == (KIND.KIND_DEGRADED, "fleet")
    assert 0 < verdict.score <= 1
    assert verdict.evidence
    assert [each.contribution for each in verdict.evidence] == sorted(
        (each.contribution for each in verdict.evidence), reverse=True
    )
    episode = await hung_episode(channel, name)
    assert (episode.object, list(episode.causes)) == (name, ["HUNG"])
    got = await verdicts(channel).GetEpisode(verdict_service_pb2.GetEpisodeRequest(name=episode.name))
    assert got.open_time == episode.open_time
    assert {each.feature for each in episode.series} >= {"running"}
    stub: Any = decision_service_pb2_grpc.DecisionServiceStub(channel)
    events = await stub.ListEvents(decision_service_pb2.ListEventsRequest(object=name))
    assert "EpisodeOpened" in {each.reason for each in events.events}
    explained = await stub.Explain(decision_service_pb2.ExplainRequest(name=name))
    assert any("DEGRADED, cause HUNG" in sentence for sentence in explained.sentences)
    figures = await asyncio.to_thread(coordinator.figures)
    label = f'{{cause="HUNG",object="{name}",verdict="DEGRADED"}}'
    assert 0 < figures[f"enova_coordinator_verdict{label}"] <= 1
    assert figures['enova_coordinator_open_episodes{verdict="DEGRADED"}'] == 1
    assert figures["enova_coordinator_detection_steps_total"] > 0
    traffic.standing.clear()

    async def over() -> bool:
        return not await episodes(channel, object=name, state=EPISODE.STATE_OPEN)

    await until_async(over, timeout_s=TIMEOUT_S, what="it is over")
    closed = await verdicts(channel).GetEpisode(verdict_service_pb2.GetEpisodeRequest(name=episode.name))
    assert closed.HasField("close_time")


async def test_a_label_is_written_once_and_taken_back_and_the_most_doubtful_come_first(
    coordinator: CoordinatorProcess, channel: grpc.aio.Channel, agent: ScriptedAgent, traffic: Traffic
) -> None:
    await deploy(channel, agent, replicas=2)
    name = await hung(channel, agent, traffic)
    episode = await hung_episode(channel, name)
    request = verdict_service_pb2.LabelEpisodeRequest
    uncertain = verdict_service_pb2.ListEpisodesRequest.ORDER_UNCERTAIN
    assert episode.name in {each.name for each in await episodes(channel, order=uncertain)}
    stub = verdicts(channel)
    one = request(name=episode.name, label=EPISODE.LABEL_FALSE, request_id="label-1")
    said = await stub.LabelEpisode(one)
    assert (said.label, said.label_actor) == (EPISODE.LABEL_FALSE, "user/local")
    assert (await stub.LabelEpisode(one)).label_time == said.label_time  # a repetition is answered, not done again
    assert episode.name not in {each.name for each in await episodes(channel, order=uncertain)}
    figures = await asyncio.to_thread(coordinator.figures)
    assert figures["enova_coordinator_false_alarms_per_replica_day"] > 0
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.LabelEpisode(request(name=episode.name, label=EPISODE.LABEL_TRUE, etag=episode.etag))
    assert caught.value.code() in {grpc.StatusCode.ABORTED, grpc.StatusCode.FAILED_PRECONDITION}
    named = await stub.LabelEpisode(request(name=episode.name, label=EPISODE.LABEL_TRUE, cause="kv-thrash"))
    assert named.label_cause == "KV_THRASH"
    for bad in (
        request(name=episode.name, cause="sunspots"),
        request(name=episode.name, label=EPISODE.LABEL_FALSE, cause="slow"),
        request(name="nonsense"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.LabelEpisode(bad)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.LabelEpisode(request(name="episodes/none"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    back = await stub.LabelEpisode(request(name=episode.name))
    assert (back.label, back.label_cause) == (EPISODE.LABEL_UNSPECIFIED, "")


async def test_changes_of_episodes_are_watched(
    channel: grpc.aio.Channel, agent: ScriptedAgent, traffic: Traffic
) -> None:
    await deploy(channel, agent, replicas=2)
    seen: list[verdict_service_pb2.Episode] = []

    async def watch() -> None:
        async for answer in verdicts(channel).WatchEpisodes(verdict_service_pb2.WatchEpisodesRequest()):
            seen.extend(answer.changed)

    standing: dict[str, str] = {}

    async def watch_verdicts() -> None:
        async for answer in verdicts(channel).WatchVerdicts(verdict_service_pb2.WatchVerdictsRequest()):
            standing.update({each.object: each.cause for each in answer.changed})
            for name in answer.ended:
                del standing[name]

    watching = asyncio.gather(watch(), watch_verdicts())
    name = await hung(channel, agent, traffic)
    await until_async(lambda: any(each.object == name for each in seen), what="the watch says so")
    await until_async(lambda: standing.get(name) == "HUNG", what="the watch of verdicts says so")
    traffic.standing.clear()

    def ended() -> bool:
        over = any(each.object == name and each.state == EPISODE.STATE_CLOSED for each in seen)
        return over and standing.get(name) != "HUNG"

    await until_async(ended, timeout_s=TIMEOUT_S, what="its end")
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):  # of the watch that was given up
        await watching


async def test_a_replica_that_an_agent_holds_out_of_routing_is_left_out_of_the_arithmetic_of_scaling(
    channel: grpc.aio.Channel, agent: ScriptedAgent, traffic: Traffic
) -> None:
    await deploy(channel, agent, min=2, max=6)
    dead, living = sorted(agent.running)
    agent.hung.add(dead)
    agent.say_status()

    async def judged() -> bool:
        verdict = await verdict_on(channel, dead)
        return verdict is not None and verdict.cause == "HUNG"

    await until_async(judged, timeout_s=TIMEOUT_S, what=f"{dead} is HUNG")
    traffic.pending, traffic.running = 80.0, 4.0
    stub: Any = decision_service_pb2_grpc.DecisionServiceStub(channel)

    async def decided() -> list[decision_service_pb2.Decision]:
        answer = await stub.ListDecisions(decision_service_pb2.ListDecisionsRequest(deployment=DEPLOYMENT))
        return list(answer.decisions)

    found: Any = await until_async(decided, timeout_s=TIMEOUT_S, what="a decision")
    first = found[-1]
    assert {each.object for each in first.inputs} == {living}
    assert first.action == decision_service_pb2.Decision.ACTION_SCALE_UP  # the one that is dead holds nothing up
    assert first.from_replicas == 2


@pytest.mark.parametrize("stroke", [signal.SIGSTOP, signal.SIGKILL])
async def test_a_child_that_stops_or_dies_delays_nothing_and_detection_goes_on(
    coordinator: CoordinatorProcess,
    channel: grpc.aio.Channel,
    agent: ScriptedAgent,
    traffic: Traffic,
    stroke: signal.Signals,
) -> None:
    await deploy(channel, agent, replicas=2)
    await until_async(lambda: coordinator.child("detection"), timeout_s=20, what="the child")
    child = coordinator.child("detection")
    os.kill(child, stroke)
    acks, sent, began_s = agent.acks, traffic.sent, time.monotonic()
    await until_async(lambda: agent.acks >= acks + 5, timeout_s=4)
    assert time.monotonic() - began_s < 4

    async def taken() -> bool:
        return (await asyncio.to_thread(coordinator.figures))["enova_coordinator_frames_total"] >= sent

    await until_async(taken)
    stub: Any = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
    await stub.ScaleDeployment(deployment_service_pb2.ScaleDeploymentRequest(name=DEPLOYMENT, replicas=3))
    await until_async(lambda: len(agent.running) == 3, timeout_s=4, what="reconciling goes on")
    await hung(channel, agent, traffic)
    assert not is_alive(child)
