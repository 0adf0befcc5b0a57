"""AgentService: the one stream with each agent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any, assert_never

from enova.v1 import agent_service_pb2, agent_service_pb2_grpc
from enova_common.errors import AlreadyExists, CallerError, EnovaError, InvalidField, TimedOut, Unavailable
from enova_common.identity import Role
from enova_common.rpc import peer_identity
from enova_coordinator.agents import (
    AgentSession,
    Cancelled,
    HeartbeatAck,
    InspectQuestion,
    LogLines,
    LogQuestion,
    ModelFacts,
    Outgoing,
)
from enova_coordinator.core.model import Assignment, Node, NodeState
from enova_coordinator.core.routes import RoutesDelta
from enova_coordinator.service import convert, detection_frames, frames, names
from enova_coordinator.service.leading import Chair, Leading
from enova_coordinator.service.writes import Call, Writes

Context = Any  # grpc.aio.ServicerContext of this method's messages
HELLO_TIMEOUT_S = 10.0
MODEL_TEXT_MAX = 1 << 20           # of a config.json
GPUS_MAX = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentPace:
    """What agents are asked to keep to; real time."""

    heartbeat_interval_s: float
    frame_interval_s: float


class AgentService(agent_service_pb2_grpc.AgentServiceServicer):
    """See agent_service.proto. `now_s` is the wall clock."""

    def __init__(
        self, chair: Chair, writes: Writes, *, coordinator: str, pace: AgentPace, now_s: Callable[[], float]
    ) -> None:
        self._chair = chair
        self._writes = writes
        self._coordinator = coordinator
        self._pace = pace
        self._now_s = now_s

    async def Connect(  # noqa: N802
        self, request_iterator: AsyncIterator[agent_service_pb2.ConnectRequest], context: Context
    ) -> AsyncIterator[agent_service_pb2.ConnectResponse]:
        """Hello first; then both sides say whatever they have, until one of them ends it."""
        leading = self._chair.leading()
        requests = aiter(request_iterator)
        node, instance = await self._hello(requests, context)
        session = leading.agents.open(node=node.name, uid=node.uid, instance=instance)
        listening: asyncio.Task[None] | None = None
        try:
            await self._register(leading, node)
            log.info("%s is connected (%s)", node.name, instance)
            yield self._welcome(leading, node.name)
            listening = asyncio.create_task(self._listen(leading, session, requests))
            listening.add_done_callback(lambda _: session.end(Unavailable("the agent ended the stream")))
            while outgoing := await session.next():
                for each in outgoing:
                    if not leading.fence.is_leading():
                        raise self._chair.refusal()
                    yield _response(leading.fence.term, each)
            if not listening.done():
                raise session.ended.result()
            listening.result()
        finally:
            leading.agents.closed(session)
            if listening is not None:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
            log.info("%s is disconnected", node.name)

    async def _hello(
        self, requests: AsyncIterator[agent_service_pb2.ConnectRequest], context: Context
    ) -> tuple[Node, str]:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await anext(requests)
        except TimeoutError as error:
            raise TimedOut(f"no Hello within {HELLO_TIMEOUT_S:g} s", reason="NO_HELLO") from error
        except StopAsyncIteration:
            raise InvalidField("the stream ended before a Hello", field="hello") from None
        if first.WhichOneof("message") != "hello":
            raise InvalidField("the first message must be a Hello", field="hello")
        node = convert.node(first.hello.node)
        names.node_name(node.name, "hello.node.name")
        peer_identity(context).require_name(Role.AGENT, node.name.removeprefix("nodes/"))
        if not node.uid:
            raise InvalidField("must not be empty", field="hello.node.uid")
        if len(node.gpus) > GPUS_MAX:
            raise InvalidField(f"{len(node.gpus)} GPUs, at most {GPUS_MAX}", field="hello.node.gpus")
        return node, first.hello.instance

    async def _register(self, leading: Leading, node: Node) -> None:
        """Write the node as it introduces itself; what users wrote of it stays."""

        def edit(before: Node | None) -> Node:
            if before is None:
                return replace(node, create_time_s=self._now_s())
            if before.uid != node.uid:
                _check_replaceable(leading, before, node)
            kept = replace(
                node,
                schedulable=before.schedulable,
                draining=before.draining,
                labels=node.labels or before.labels,
                create_time_s=before.create_time_s,
            )
            return before if kept == before else kept

        await self._writes.change(Node, node.name, edit, by=Call(id="", method="Connect", fingerprint=""))

    def _welcome(self, leading: Leading, node: str) -> agent_service_pb2.ConnectResponse:
        telemetry = leading.telemetry
        oldest_s = telemetry.now_s - telemetry.limits.window_s
        welcome = agent_service_pb2.Welcome(
            coordinator=self._coordinator,
            heartbeat_interval_s=self._pace.heartbeat_interval_s,
            frame_interval_s=self._pace.frame_interval_s,
            backfill_after_s=max(oldest_s, telemetry.newest_end_s(node)),
        )
        return agent_service_pb2.ConnectResponse(term=leading.fence.term, welcome=welcome)

    async def _listen(
        self,
        leading: Leading,
        session: AgentSession,
        requests: AsyncIterator[agent_service_pb2.ConnectRequest],
    ) -> None:
        add, inbox, sender = leading.telemetry.add, leading.inbox, session.node
        async for message in requests:
            session.heard(self._now_s())
            kind = message.WhichOneof("message")
            if kind == "frame":
                if add(frames.frame(message.frame), sender=sender) and inbox is not None:
                    inbox.put(sender, message.frame.end_s, detection_frames.packed(message.frame))
            elif kind == "heartbeat":
                session.heartbeat(message.heartbeat.sequence)
            elif kind == "status":
                leading.agents.reported(session, convert.node_report(message.status))
            elif kind == "inspect_model_result":
                session.inspected(message.inspect_model_result.request, _facts(session.node, message))
            elif kind == "log_chunk":
                chunk = message.log_chunk
                error = _log_error(chunk) if chunk.error_reason else None
                session.log_lines(chunk.request, LogLines(tuple(chunk.lines), chunk.end, error))
            elif kind == "hello":
                raise InvalidField("a second Hello on one stream", field="hello")


def _check_replaceable(leading: Leading, before: Node, node: Node) -> None:
    """A name belongs to the host that had it until that host is LOST, so that two hosts never take turns."""
    view = leading.control.snapshot.nodes.get(before.name)
    if view is not None and view.state is not NodeState.LOST:
        raise AlreadyExists(
            f"{before.name} is the name of another host (uid {before.uid}, not {node.uid}), which is {view.state}",
            reason="NODE_NAME_TAKEN",
            field="node",
            remedy="give this host another name in agent.toml; if it replaces the other, wait until that is LOST",
            metadata={"node": before.name},
        )


def _facts(node: str, message: agent_service_pb2.ConnectRequest) -> ModelFacts | EnovaError:
    result = message.inspect_model_result
    if result.error_reason:
        return _agent_error(result, field="model")
    if len(result.config_json) > MODEL_TEXT_MAX:
        return InvalidField(f"its config.json is over {MODEL_TEXT_MAX} characters", field="model")
    return ModelFacts(
        node=node,
        config_json=result.config_json,
        weight_bytes=result.weight_bytes,
        digest=result.digest,
        vocabulary_size=result.vocabulary_size,
    )


def _log_error(chunk: agent_service_pb2.LogChunk) -> EnovaError:
    return _agent_error(chunk, field="name")


def _agent_error(
    refusal: agent_service_pb2.InspectModelResult | agent_service_pb2.LogChunk, *, field: str
) -> EnovaError:
    """The agent's refusal as one of the caller's; what may pass by itself can be tried again."""
    reason, message, remedy = refusal.error_reason, refusal.error_message, refusal.error_remedy
    if reason in {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "INTERNAL"}:
        return Unavailable(message, reason=reason, remedy=remedy)
    if field == "model":
        return InvalidField(message, reason=reason, field=field, remedy=remedy)
    return CallerError(message, reason=reason, remedy=remedy)


def _response(term: int, outgoing: Outgoing) -> agent_service_pb2.ConnectResponse:
    response = agent_service_pb2.ConnectResponse(term=term)
    match outgoing:
        case HeartbeatAck(sequence):
            response.heartbeat_ack.sequence = sequence
        case Assignment():
            response.assignment.CopyFrom(convert.assignment_message(outgoing))
        case RoutesDelta():
            response.routes.CopyFrom(convert.routes_message(outgoing))
        case InspectQuestion(request, model):
            response.inspect_model.CopyFrom(agent_service_pb2.InspectModelRequest(request=request, model=model))
        case LogQuestion(request, replica, tail_lines, follow):
            response.logs.CopyFrom(
                agent_service_pb2.LogRequest(request=request, replica=replica, tail_lines=tail_lines, follow=follow)
            )
        case Cancelled(request):
            response.cancel.request = request
        case _:
            assert_never(outgoing)
    return response


