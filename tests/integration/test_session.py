"""The agent's session over real gRPC: fencing, reconnecting, redirects, silence, catching up, backpressure."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from enova.v1 import agent_service_pb2 as wire
from enova_agent import convert
from enova_agent.core.model import Assignment, ReplicaState, ReplicaView, Route
from enova_agent.core.node import ModelFacts, NodeFacts, NodeStatus
from enova_agent.core.telemetry import Frame, GpuSample
from enova_agent.disk import TermFile
from enova_agent.frames import FrameBuffer
from enova_agent.session import FRAMES_BEHIND_MAX, RELAYS_MAX, Session, SessionSettings
from enova_common.backoff import Backoff
from enova_common.errors import NotFound
from enova_common.rpc import error_from_rpc, open_channel
from enova_testing.scripted_coordinator import ScriptedCoordinator
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network


class RecordingNode:
    """A node that keeps what it is told."""

    def __init__(self) -> None:
        self.assignments: list[Assignment] = []
        self.routed: list[int] = []
        self.views: tuple[ReplicaView, ...] = ()
        self.follows = asyncio.Event()

    def facts(self) -> NodeFacts:
        return NodeFacts(name="nodes/node-0", uid="u1", cluster="default", openai_address="127.0.0.1:8000")

    def status(self) -> NodeStatus:
        revision = self.assignments[-1].revision if self.assignments else 0
        return NodeStatus(assignment_revision=revision, views=self.views)

    async def assign(self, assignment: Assignment) -> None:
        self.assignments.append(assignment)

    def route(self, *, revision: int, base_revision: int, routes: tuple[Route, ...], removed: tuple[str, ...]) -> bool:
        if base_revision not in (0, self.routed[-1] if self.routed else 0):
            return False
        self.routed.append(revision)
        return True

    async def inspect(self, model: str) -> ModelFacts:
        if model != "/models/tiny":
            raise NotFound(f"{model} does not exist on this host", reason="MODEL_NOT_FOUND")
        return ModelFacts(config_json="{}", weight_bytes=7, digest="d", vocabulary_size=3)

    async def logs(self, replica: str, *, tail_lines: int, follow: bool) -> AsyncIterator[Sequence[str]]:
        if replica != "deployments/d/replicas/r":
            raise NotFound(f"{replica} is not on this node")
        yield [f"line {number}" for number in range(tail_lines)]
        if follow:
            await self.follows.wait()
            yield ["one more"]


class Rig:
    """A session under test with what it talks to."""

    def __init__(self, folder: Path, endpoints: Sequence[str], *, silence_s: float = 1.0) -> None:
        self.node = RecordingNode()
        self.buffer = FrameBuffer()
        self.terms = TermFile(folder / "term.json")
        self.made = 0
        self.session = Session(
            SessionSettings(
                endpoints=tuple(endpoints),
                instance="i1",
                heartbeat_interval_s=0.1,
                heartbeat_timeout_s=silence_s,
                backoff=Backoff(initial_s=0.05, maximum_s=0.2),
            ),
            node=self.node,
            terms=self.terms,
            frames=self.buffer,
            open_channel=open_channel,
            error_of=error_from_rpc,
            loop_lag_s=lambda: 0.25,
            draw=random.Random(1).random,
        )
        self._task: asyncio.Task[None] | None = None

    def frame(self, *, padding: int = 0) -> None:
        """Makes the next frame; frame n ends at model second n."""
        self.made += 1
        gpus = tuple(GpuSample(uuid=f"GPU-{index}-{'x' * 100}") for index in range(padding))
        frame = Frame(
            node="nodes/node-0", sequence=self.made, boot="b", start_s=self.made - 1, end_s=self.made, gpus=gpus
        )
        self.buffer.append(convert.frame_request(frame), end_s=frame.end_s)
        self.session.notify()

    async def __aenter__(self) -> Rig:
        self._task = asyncio.create_task(self.session.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


@pytest.fixture
async def coordinator() -> AsyncIterator[ScriptedCoordinator]:
    server = ScriptedCoordinator(term=5)
    await server.start()
    yield server
    await server.stop()


def _sequences(server: ScriptedCoordinator) -> list[int]:
    return [frame.sequence for stream in server.streams for frame in stream.frames]


async def test_hello_comes_first_then_status_and_heartbeats_with_lag(
    coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    async with Rig(tmp_path, [coordinator.address]):
        await until_async(lambda: coordinator.streams and len(coordinator.stream.heartbeats) >= 3)
        stream = coordinator.stream
        assert stream.received[0].HasField("hello")
        assert stream.hello is not None
        assert (stream.hello.node.name, stream.hello.node.openai_address) == ("nodes/node-0", "127.0.0.1:8000")
        assert stream.status is not None
        assert stream.heartbeats[0].loop_lag_s == 0.25
        assert [beat.sequence for beat in stream.heartbeats][:3] == [1, 2, 3]


async def test_an_assignment_is_obeyed_and_reported(coordinator: ScriptedCoordinator, tmp_path: Path) -> None:
    async with Rig(tmp_path, [coordinator.address]) as rig:
        await until_async(lambda: coordinator.streams and coordinator.stream.status)
        member = wire.AssignedMember(replica="deployments/d/replicas/r", uid="x", model="m")
        coordinator.send(wire.ConnectResponse(assignment=wire.Assignment(revision=9, members=[member])))
        await until_async(lambda: rig.node.assignments)
        assert rig.node.assignments[0].term == 5
        assert rig.node.assignments[0].members[0].replica == "deployments/d/replicas/r"
        rig.session.notify()
        await until_async(lambda: coordinator.stream.status and coordinator.stream.status.assignment_revision == 9)


async def test_a_lower_term_is_refused_also_after_a_restart(coordinator: ScriptedCoordinator, tmp_path: Path) -> None:
    async with Rig(tmp_path, [coordinator.address]) as rig:
        await until_async(lambda: rig.session.figures.connected_to)
    assert TermFile(tmp_path / "term.json").highest == 5
    coordinator.term = 4
    async with Rig(tmp_path, [coordinator.address]) as rig:
        await until_async(lambda: rig.session.figures.refused_terms >= 2)
        assert "term 4 is lower than 5" in rig.session.figures.last_error
        assert rig.node.assignments == []
        coordinator.term = 6
        await until_async(lambda: rig.session.figures.connected_to)
    assert TermFile(tmp_path / "term.json").highest == 6


async def test_a_late_message_of_an_old_leader_ends_the_stream_and_does_nothing(
    coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    async with Rig(tmp_path, [coordinator.address]) as rig:
        await until_async(lambda: rig.session.figures.connected_to)
        coordinator.send(wire.ConnectResponse(term=4, assignment=wire.Assignment(revision=99)))
        await until_async(lambda: len(coordinator.streams) == 2 and rig.session.figures.connected_to)
        assert rig.node.assignments == []
        assert coordinator.streams[0].ended


async def test_a_term_that_cannot_be_kept_is_not_obeyed(coordinator: ScriptedCoordinator, tmp_path: Path) -> None:
    rig = Rig(tmp_path, [coordinator.address])
    (tmp_path / ".term.json.new").mkdir()  # stands in the way, for root as well
    async with rig:
        await until_async(lambda: "cannot be remembered" in rig.session.figures.last_error)
        assert not rig.session.figures.connected_to
        (tmp_path / ".term.json.new").rmdir()
        await until_async(lambda: rig.session.figures.connected_to)


async def test_a_server_that_restarts_is_found_again(coordinator: ScriptedCoordinator, tmp_path: Path) -> None:
    async with Rig(tmp_path, [coordinator.address]) as rig:
        await until_async(lambda: rig.session.figures.connected_to)
        await coordinator.stop()
        await until_async(lambda: not rig.session.figures.connected_to)
        await coordinator.start(coordinator.address)
        await until_async(lambda: rig.session.figures.connected_to)
        assert coordinator.stream.hello is not None
        assert coordinator.stream.hello.highest_term == 5


async def test_not_leader_leads_to_the_leader_if_it_is_one_of_ours(
    coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    follower = ScriptedCoordinator(name="follower")
    await follower.start()
    try:
        follower.leader_address = coordinator.address
        async with Rig(tmp_path, [follower.address, coordinator.address]) as rig:
            await until_async(lambda: rig.session.figures.connected_to == coordinator.address)
            assert rig.session.figures.connections == 2
        follower.leader_address = "127.0.0.1:1"
        async with Rig(tmp_path, [follower.address]) as rig:
            await until_async(lambda: rig.session.figures.connections >= 3)
            await until_async(lambda: rig.session.figures.last_error.startswith("follower does not lead"))
    finally:
        await follower.stop()


async def test_silence_is_a_dead_peer_whatever_tcp_believes(coordinator: ScriptedCoordinator, tmp_path: Path) -> None:
    async with Rig(tmp_path, [coordinator.address]) as rig:
        await until_async(lambda: rig.session.figures.connected_to)
        coordinator.acknowledges = False  # the connection stays up; only nobody answers
        await until_async(lambda: "no word from" in rig.session.figures.last_error, timeout_s=5.0)
        coordinator.acknowledges = True
        await until_async(lambda: rig.session.figures.connected_to)


async def test_frames_made_during_a_gap_are_sent_in_order_without_doubles(
    coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    coordinator.backfill_after_s = lambda: max((f.end_s for s in coordinator.streams for f in s.frames), default=0.0)
    async with Rig(tmp_path, [coordinator.address]) as rig:
        for _ in range(5):
            rig.frame()
        await until_async(lambda: len(_sequences(coordinator)) == 5)
        await coordinator.stop()
        for _ in range(250):  # more than a compressed block
            rig.frame()
        await until_async(lambda: not rig.session.figures.connected_to)
        await coordinator.start(coordinator.address)
        rig.frame()
        await until_async(lambda: len(_sequences(coordinator)) >= 256)
        assert _sequences(coordinator) == list(range(1, 257))


async def test_a_leader_that_knows_much_gets_only_what_it_misses(
    coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    coordinator.backfill_after_s = lambda: 7.0
    rig = Rig(tmp_path, [coordinator.address])
    for _ in range(10):
        rig.frame()
    async with rig:
        await until_async(lambda: len(_sequences(coordinator)) == 3)
        assert _sequences(coordinator) == [8, 9, 10]


async def test_a_message_over_the_bound_is_a_clear_error_and_the_session_goes_on(
    coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    async with Rig(tmp_path, [coordinator.address]) as rig:
        await until_async(lambda: rig.session.figures.connected_to)
        huge = wire.Routes(revision=1, removed=["x" * (10 << 20)])
        coordinator.send(wire.ConnectResponse(routes=huge))
        await until_async(lambda: coordinator.streams[0].ended)
        await until_async(lambda: len(coordinator.streams) >= 2 and rig.session.figures.connected_to)
        assert rig.node.routed == []


async def test_a_reader_that_stands_still_costs_frames_not_memory_and_news_come_first(
    coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    # Patient: a reader that stands still answers no heartbeat either.
    async with Rig(tmp_path, [coordinator.address], silence_s=60.0) as rig:
        await until_async(lambda: rig.session.figures.connected_to)
        coordinator.reads = False
        for _ in range(FRAMES_BEHIND_MAX + 200):
            rig.frame(padding=200)
            await asyncio.sleep(0)
        await until_async(lambda: len(coordinator.stream.received) > 0)
        for _ in range(300):
            rig.frame(padding=200)
        rig.node.views = (ReplicaView(replica="deployments/d/replicas/r", uid="x", state=ReplicaState.READY),)
        rig.session.notify()
        coordinator.reads = True
        await until_async(lambda: _sequences(coordinator) and _sequences(coordinator)[-1] == rig.made)
        sequences = _sequences(coordinator)
        assert rig.session.figures.frames_passed_over > 0
        assert sequences == sorted(set(sequences))
        assert len(sequences) + rig.session.figures.frames_passed_over == rig.made
        kinds = [message.WhichOneof("message") for message in coordinator.stream.received]
        newest = max(index for index, kind in enumerate(kinds) if kind == "status")
        assert "frame" in kinds[newest:], "the status overtook frames that had waited longer"


async def test_a_delta_of_routes_that_was_missed_reopens_the_stream(
    coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    async with Rig(tmp_path, [coordinator.address]) as rig:
        await until_async(lambda: rig.session.figures.connected_to)
        coordinator.send(wire.ConnectResponse(routes=wire.Routes(revision=3)))
        await until_async(lambda: rig.node.routed == [3])
        coordinator.send(wire.ConnectResponse(routes=wire.Routes(revision=6, base_revision=5)))
        await until_async(lambda: len(coordinator.streams) == 2 and rig.session.figures.connected_to)
        assert rig.node.routed == [3]


async def test_models_are_inspected_and_errors_bear_their_reason(
    coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    async with Rig(tmp_path, [coordinator.address]):
        await until_async(lambda: coordinator.streams and coordinator.stream.status)
        for request, model in (("a", "/models/tiny"), ("b", "/nowhere")):
            inspect = wire.InspectModelRequest(request=request, model=model)
            coordinator.send(wire.ConnectResponse(inspect_model=inspect))
        await until_async(lambda: len(coordinator.stream.answers("inspect_model_result")) == 2)
        results = {result.request: result for result in coordinator.stream.answers("inspect_model_result")}
        assert results["a"].weight_bytes == 7
        assert results["b"].error_reason == "MODEL_NOT_FOUND"


async def test_logs_come_in_chunks_follow_until_cancelled_and_fail_by_name(
    coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    def chunks(request: str) -> list[wire.LogChunk]:
        return [chunk for chunk in coordinator.stream.answers("log_chunk") if chunk.request == request]

    def logs(request: str, replica: str, **options: object) -> wire.ConnectResponse:
        return wire.ConnectResponse(logs=wire.LogRequest(request=request, replica=replica, **options))  # type: ignore[arg-type]

    async with Rig(tmp_path, [coordinator.address]) as rig:
        await until_async(lambda: coordinator.streams and coordinator.stream.status)
        coordinator.send(logs("a", "deployments/d/replicas/r", tail_lines=1_000))
        await until_async(lambda: chunks("a") and chunks("a")[-1].end)
        assert [line for chunk in chunks("a") for line in chunk.lines] == [f"line {n}" for n in range(1_000)]
        assert len(chunks("a")) > 2
        coordinator.send(logs("b", "deployments/d/replicas/none"))
        await until_async(lambda: chunks("b") and chunks("b")[-1].error_reason == "NOT_FOUND")
        coordinator.send(logs("c", "deployments/d/replicas/r", tail_lines=1, follow=True))
        await until_async(lambda: chunks("c"))
        coordinator.send(wire.ConnectResponse(cancel=wire.CancelRequest(request="c")))
        coordinator.send(logs("d", "deployments/d/replicas/r", tail_lines=1))
        await until_async(lambda: chunks("d") and chunks("d")[-1].end)
        rig.node.follows.set()
        coordinator.send(logs("e", "deployments/d/replicas/r", tail_lines=1))
        await until_async(lambda: chunks("e") and chunks("e")[-1].end)
        assert [line for chunk in chunks("c") for line in chunk.lines] == ["line 0"]


async def test_too_many_requests_for_logs_are_refused_by_name(
    coordinator: ScriptedCoordinator, tmp_path: Path
) -> None:
    async with Rig(tmp_path, [coordinator.address]):
        await until_async(lambda: coordinator.streams and coordinator.stream.status)
        for number in range(RELAYS_MAX + 1):
            request = wire.LogRequest(request=str(number), replica="deployments/d/replicas/r", follow=True)
            coordinator.send(wire.ConnectResponse(logs=request))
        await until_async(lambda: any(chunk.end for chunk in coordinator.stream.answers("log_chunk")))
        (ended,) = [chunk for chunk in coordinator.stream.answers("log_chunk") if chunk.end]
        assert (ended.request, ended.error_reason) == (str(RELAYS_MAX), "RESOURCE_EXHAUSTED")
