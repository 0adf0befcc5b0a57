"""The agent's side of the one stream to the leading coordinator: report, obey, reconnect.

Theory of operation. A session is a loop of connections, each to one endpoint. On a connection there are a reader
and a writer. The reader refuses whatever bears a term lower than the highest ever obeyed, which is on disk before
anything of a new term is done, and gives the connection up when nothing arrives for `heartbeat_timeout_s`: the
coordinator answers heartbeats, so silence is a dead peer, whatever TCP believes. The writer takes, in this order: a
due heartbeat, the node's status if it changed, answers, and then frames. Status is composed when it is sent, so a slow
link costs news, not memory. Frames are read off the buffer by number: catching up after a gap and sending what is
new are one walk. Nothing that happens here stops an engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, assert_never

import grpc

from enova.v1 import agent_service_pb2 as wire
from enova_agent import convert
from enova_agent.core.model import Assignment, Route
from enova_agent.core.node import ModelFacts, NodeFacts, NodeStatus, next_beat_s
from enova_agent.core.term import TermVerdict, judge_term
from enova_agent.frames import FrameBuffer
from enova_common.backoff import Backoff
from enova_common.errors import EnovaError, Exhausted, Unavailable

CONNECT = "/enova.v1.AgentService/Connect"
ANSWERS_MAX = 256            # answers that wait for a slow link; whoever makes more waits
RELAYS_MAX = 16              # log and inspect requests in work at once
LINES_PER_CHUNK = 200
CHUNK_CHARS_MAX = 256 << 10
FRAMES_BEHIND_MAX = 120      # live frames that may wait for a slow link before the oldest are passed over

if TYPE_CHECKING:
    _Call = grpc.aio.StreamStreamCall[wire.ConnectRequest | bytes, wire.ConnectResponse]

log = logging.getLogger(__name__)


class Node(Protocol):
    """The node that a session speaks for."""

    def facts(self) -> NodeFacts:
        """Who this node is."""
        ...

    def status(self) -> NodeStatus:
        """What is, on this node."""
        ...

    async def assign(self, assignment: Assignment) -> None:
        """Makes this the node's assignment."""
        ...

    def route(self, *, revision: int, base_revision: int, routes: tuple[Route, ...], removed: tuple[str, ...]) -> bool:
        """Applies a delta of the routes; False if it builds on another revision."""
        ...

    async def inspect(self, model: str) -> ModelFacts:
        """What this host knows of a model; raises EnovaError."""
        ...

    def logs(self, replica: str, *, tail_lines: int, follow: bool) -> AsyncIterator[Sequence[str]]:
        """Lines of a replica's log as they come; raises EnovaError."""
        ...


class Terms(Protocol):
    """Where the highest term is remembered."""

    @property
    def highest(self) -> int:
        """The highest term that was ever obeyed."""
        ...

    def remember(self, term: int) -> None:
        """Puts a higher term on disk before it returns; raises OSError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """What a session needs of the agent's settings; all times are real."""

    endpoints: tuple[str, ...]
    instance: str
    heartbeat_interval_s: float
    heartbeat_timeout_s: float
    backoff: Backoff


@dataclass(slots=True)
class SessionFigures:
    """What a session did, for the agent's own metrics."""

    connected_to: str = ""
    connections: int = 0
    refused_terms: int = 0
    frames_sent: int = 0
    frames_passed_over: int = 0
    last_error: str = ""


_TOO_MANY = Exhausted(f"this node works on {RELAYS_MAX} requests for logs and models already", remedy="ask again later")


class NotLeader(Unavailable):
    """The coordinator at the other end does not lead; `leader_address` may say who does."""

    reason = "NOT_LEADER"


class StaleTerm(Unavailable):
    """The coordinator at the other end led in the past."""

    reason = "STALE_TERM"


class Reopened(EnovaError):
    """Not a failure: the node's own facts changed, so the stream is opened anew to say them."""

    reason = "REOPENED"


class Session:
    """Keeps one connection to the leader, for as long as `run` runs."""

    def __init__(
        self,
        settings: SessionSettings,
        *,
        node: Node,
        terms: Terms,
        frames: FrameBuffer,
        open_channel: Callable[[str], grpc.aio.Channel],
        error_of: Callable[[grpc.aio.AioRpcError], EnovaError],
        loop_lag_s: Callable[[], float],
        draw: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._node = node
        self._terms = terms
        self._frames = frames
        self._open_channel = open_channel
        self._error_of = error_of
        self._loop_lag_s = loop_lag_s
        self._draw = draw
        self._current: _Connection | None = None
        self.frame_interval_s = 0.0              # as the coordinator wishes; 0: it did not say
        self.figures = SessionFigures()

    def notify(self) -> None:
        """Something may have changed, or a frame was made: the writer looks again."""
        if self._current is not None:
            self._current.status_due = True
            self._current.wake()

    def reopen(self) -> None:
        """The node's facts changed: say them on a new stream."""
        if self._current is not None:
            self._current.end(Reopened("the node's facts changed"))

    async def run(self) -> None:
        """Connects, and connects again, until it is cancelled."""
        endpoints = _Endpoints(self._settings.endpoints)
        attempt = 0
        told = ""
        while True:
            self.figures.connections += 1
            connection = _Connection(self, endpoints.current)
            self._current = connection
            error = await connection.run()
            self._current = None
            self.figures.connected_to = ""
            if connection.welcomed:
                attempt, told = 0, ""
            if isinstance(error, Reopened):
                continue
            self.figures.last_error = str(error)
            followed = isinstance(error, NotLeader) and endpoints.follow(error.metadata.get("leader_address", ""))
            if not followed:
                endpoints.advance()
            # One redirect is news, a second in a row is an election in progress: then wait as well.
            delay_s = 0.0 if followed and attempt == 0 else self._settings.backoff.delay_s(attempt, self._draw())
            attempt += 1
            # Each new reason is news; the same one again, while a coordinator is away for hours, is not.
            level = logging.DEBUG if str(error) == told else logging.WARNING
            told = str(error)
            log.log(level, "no session with %s: %s; next try in %.1f s", connection.endpoint, error, delay_s)
            await asyncio.sleep(delay_s)


class _Endpoints:
    """The coordinators' addresses, and which is next."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = tuple(addresses)
        self._at = 0

    @property
    def current(self) -> str:
        return self._addresses[self._at]

    def advance(self) -> None:
        self._at = (self._at + 1) % len(self._addresses)

    def follow(self, address: str) -> bool:
        """Goes to the leader, if it is one of ours: a stranger's address is not followed."""
        if address not in self._addresses or address == self.current:
            return False
        self._at = self._addresses.index(address)
        return True


class _Connection:
    """One connection to one endpoint, from Hello to its end."""

    def __init__(self, session: Session, endpoint: str) -> None:
        self.endpoint = endpoint
        self.welcomed = False
        self.status_due = True
        self._session = session
        self._settings = session._settings
        self._node = session._node
        self._wake = asyncio.Event()
        self._ended: asyncio.Future[EnovaError] = asyncio.get_running_loop().create_future()
        self._answers: deque[wire.ConnectRequest] = deque()
        self._room = asyncio.Event()
        self._status_sent: NodeStatus | None = None
        self._heartbeat_interval_s = session._settings.heartbeat_interval_s
        self._heartbeats = 0
        self._heartbeat_due = False
        self._next_frame: int | None = None      # None until the coordinator said where to begin
        self._catch_up_to = 0                    # frames before this number were made before this connection
        self._relays: dict[str, asyncio.Task[None]] = {}

    def wake(self) -> None:
        self._wake.set()

    def end(self, error: EnovaError) -> None:
        if not self._ended.done():
            self._ended.set_result(error)

    async def run(self) -> EnovaError:
        """Why the connection ended."""
        try:
            channel = self._session._open_channel(self.endpoint)
        except EnovaError as error:  # certificates that cannot be used: they may be renewed while we try again
            return error
        call = channel.stream_stream(
            CONNECT, request_serializer=_serialized, response_deserializer=wire.ConnectResponse.FromString
        )()
        steps = (self._read(call), self._write(call), self._beat(call))
        tasks = [asyncio.create_task(self._guarded(step, call)) for step in steps]
        try:
            return await self._ended
        finally:
            for task in (*tasks, *self._relays.values()):
                task.cancel()
            await asyncio.gather(*tasks, *self._relays.values(), return_exceptions=True)
            call.cancel()
            await channel.close()

    async def _guarded(self, step: Awaitable[None], call: _Call) -> None:
        """Runs one of the connection's loops; its failure ends the connection, never the agent."""
        try:
            await step
            self.end(Unavailable("the coordinator closed the stream"))
        except grpc.aio.AioRpcError as error:
            self.end(self._explained(error))
        except asyncio.InvalidStateError:  # written to a stream that had just ended: how it ended is what counts
            self.end(self._explained(await _status_error(call)))
        except EnovaError as error:
            self.end(error)
        except Exception as error:
            log.exception("the session failed")
            self.end(EnovaError(f"the session failed: {error!r}"))
            raise

    def _explained(self, error: grpc.aio.AioRpcError) -> EnovaError:
        known = self._session._error_of(error)
        if known.reason == NotLeader.reason:
            return NotLeader(known.message, metadata=known.metadata)
        return known

    async def _read(self, call: _Call) -> None:
        while True:
            try:
                async with asyncio.timeout(self._settings.heartbeat_timeout_s):
                    message = await call.read()
            except TimeoutError as error:
                silence = f"no word from {self.endpoint} for {self._settings.heartbeat_timeout_s:g} s"
                raise Unavailable(silence) from error
            if message is grpc.aio.EOF:
                status = await call.code()
                if status is not grpc.StatusCode.OK:
                    raise self._explained(await _status_error(call))
                return
            assert isinstance(message, wire.ConnectResponse)
            self._fence(message.term)
            await self._obey(message)

    def _fence(self, term: int) -> None:
        """Refuses a leader of the past; remembers a new one before anything that it says is done."""
        terms = self._session._terms
        match judge_term(term, highest=terms.highest):
            case TermVerdict.OBEY:
                return
            case TermVerdict.REFUSE:
                self._session.figures.refused_terms += 1
                raise StaleTerm(f"term {term} is lower than {terms.highest}, which was obeyed before")
            case TermVerdict.REMEMBER_THEN_OBEY:
                try:
                    terms.remember(term)
                except OSError as error:
                    raise Unavailable(f"term {term} cannot be remembered, so it is not obeyed: {error}") from error
                log.info("obeying term %d", term)
            case verdict:
                assert_never(verdict)

    async def _obey(self, message: wire.ConnectResponse) -> None:
        match message.WhichOneof("message"):
            case "welcome":
                self._welcome(message.welcome)
            case "assignment":
                await self._node.assign(convert.assignment(message.assignment, term=message.term))
            case "routes":
                self._route(message.routes)
            case "inspect_model":
                request = message.inspect_model
                refusal = convert.inspect_error(request.request, _TOO_MANY)
                self._relay(request.request, self._inspect(request.request, request.model), refusal)
            case "logs":
                refusal = convert.log_chunk(message.logs.request, (), end=True, error=_TOO_MANY)
                self._relay(message.logs.request, self._send_logs(message.logs), refusal)
            case "cancel":
                if (task := self._relays.get(message.cancel.request)) is not None:
                    task.cancel()
            case "heartbeat_ack" | None:  # to have arrived is all that an ack says; None: a newer protocol's message
                pass

    def _welcome(self, welcome: wire.Welcome) -> None:
        log.info("session with %s (%s) in term %d", self.endpoint, welcome.coordinator, self._session._terms.highest)
        self.welcomed = True
        self._session.figures.connected_to = self.endpoint
        self._session.figures.last_error = ""
        if welcome.heartbeat_interval_s > 0:
            # Never slower than half of the silence that this side bears.
            self._heartbeat_interval_s = min(welcome.heartbeat_interval_s, self._settings.heartbeat_timeout_s / 2)
        if welcome.frame_interval_s > 0:
            self._session.frame_interval_s = welcome.frame_interval_s
        self._next_frame = self._session._frames.after(welcome.backfill_after_s)
        self._catch_up_to = self._session._frames.next
        self.wake()

    def _route(self, message: wire.Routes) -> None:
        fits = self._node.route(
            revision=message.revision,
            base_revision=message.base_revision,
            routes=convert.routes(message),
            removed=tuple(message.removed),
        )
        if not fits:
            # A delta was lost: on a new stream the coordinator starts from base 0.
            raise Unavailable(
                f"routes {message.revision} build on {message.base_revision}, which this node does not have"
            )

    async def _beat(self, call: _Call) -> None:
        del call
        loop = asyncio.get_running_loop()
        while True:
            self._heartbeat_due = True
            self.wake()
            await asyncio.sleep(next_beat_s(loop.time(), self._heartbeat_interval_s) - loop.time())

    async def _write(self, call: _Call) -> None:
        frames = len(self._session._frames)
        hello = convert.hello(
            self._node.facts(),
            highest_term=self._session._terms.highest,
            instance=self._settings.instance,
            buffered_frames=frames,
        )
        await call.write(hello)
        while True:
            self._wake.clear()
            while (message := self._next_message()) is not None:
                await call.write(message)
            await self._wake.wait()

    def _next_message(self) -> wire.ConnectRequest | bytes | None:
        if self._heartbeat_due:
            self._heartbeat_due = False
            self._heartbeats += 1
            return convert.heartbeat(self._heartbeats, loop_lag_s=self._session._loop_lag_s())
        if not self.welcomed:
            return None
        if self.status_due:
            self.status_due = False
            status = self._node.status()
            if self._status_sent is None or status.differs(self._status_sent):
                self._status_sent = status
                return convert.node_status(status)
        if self._answers:
            self._room.set()
            return self._answers.popleft()
        return self._next_frame_data()

    def _next_frame_data(self) -> bytes | None:
        frames, figures = self._session._frames, self._session.figures
        if self._next_frame is None:
            return None
        number = self._next_frame
        if number >= self._catch_up_to and frames.next - number > FRAMES_BEHIND_MAX:
            # The link is too slow for what is new: fresh frames matter more, the old stay in the buffer.
            figures.frames_passed_over += frames.next - FRAMES_BEHIND_MAX - number
            number = frames.next - FRAMES_BEHIND_MAX
        frame = frames.get(number)
        if frame is None:
            return None
        self._next_frame = frame.number + 1
        figures.frames_sent += 1
        return frame.data

    async def _answer(self, message: wire.ConnectRequest) -> None:
        """Queues an answer; waits while the link is slow."""
        while len(self._answers) >= ANSWERS_MAX:
            self._room.clear()
            await self._room.wait()
        self._answers.append(message)
        self.wake()

    def _relay(self, request: str, work: Coroutine[None, None, None], refusal: wire.ConnectRequest) -> None:
        """Works on a request beside the stream, at most so many at once; a request that comes twice is one."""
        if request in self._relays:
            work.close()
            return
        if len(self._relays) >= RELAYS_MAX:
            work.close()
            log.warning("request %s is refused: %d are in work", request, len(self._relays))
            if len(self._answers) < ANSWERS_MAX:  # else the link is so slow that nobody waits for it any more
                self._answers.append(refusal)
                self.wake()
            return
        task = asyncio.create_task(work)
        self._relays[request] = task
        task.add_done_callback(lambda _: self._relays.pop(request, None))

    async def _inspect(self, request: str, model: str) -> None:
        try:
            result = convert.inspect_result(request, await self._node.inspect(model))
        except EnovaError as error:
            result = convert.inspect_error(request, error)
        await self._answer(result)

    async def _send_logs(self, request: wire.LogRequest) -> None:
        try:
            lines = self._node.logs(request.replica, tail_lines=request.tail_lines, follow=request.follow)
            async for batch in lines:
                for chunk in _chunks(batch):
                    await self._answer(convert.log_chunk(request.request, chunk))
            end = convert.log_chunk(request.request, (), end=True)
        except EnovaError as error:
            end = convert.log_chunk(request.request, (), end=True, error=error)
        await self._answer(end)


def _chunks(lines: Sequence[str]) -> Iterator[Sequence[str]]:
    """Lines in handfuls that fit a message."""
    start = size = 0
    for end, line in enumerate(lines):
        if end - start >= LINES_PER_CHUNK or size + len(line) > CHUNK_CHARS_MAX:
            yield lines[start:end]
            start, size = end, 0
        size += len(line)
    if start < len(lines):
        yield lines[start:]


async def _status_error(call: _Call) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
    )


def _serialized(message: wire.ConnectRequest | bytes) -> bytes:
    """Frames come as bytes: they were encoded once, for the buffer."""
    return message if isinstance(message, bytes) else message.SerializeToString()
