"""The agents that are connected to this leader: who they are, what they last said, what they are to be told.

Theory of operation. Everything that is told is level-triggered: a session holds the newest assignment and the newest
route table that its agent should have, and what it was sent last; a writer takes the difference whenever it can send.
A slow link therefore costs news, never memory. Questions (models, logs) are relayed with a number, a bound on how many
may be open, and a time-out. All times are of the monotonic clock.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from enova_common.errors import AlreadyExists, EnovaError, Exhausted, NotFound, TimedOut, Unavailable
from enova_coordinator.core.model import Assignment, NodeObservation, NodeReport
from enova_coordinator.core.routes import RoutesDelta, RouteTable

INSPECT_TIMEOUT_S = 20.0       # reading a config.json and hashing names; a cold network file system takes seconds
RELAYS_MAX = 64                # questions open at one agent
QUESTIONS_MAX = 2 * RELAYS_MAX # that wait to be sent: every open one, and as many withdrawn
LOG_CHUNKS_MAX = 64            # chunks that wait for a slow reader; over it the oldest go, and their lines are counted
LIVE_S = 3.0                   # a stream that was heard of within this is somebody's


@dataclass(frozen=True, slots=True)
class HeartbeatAck:
    """The answer to a heartbeat."""

    sequence: int


@dataclass(frozen=True, slots=True)
class InspectQuestion:
    """What does this host know of a model?"""

    request: str
    model: str


@dataclass(frozen=True, slots=True)
class LogQuestion:
    """Lines of a replica's log."""

    request: str
    replica: str
    tail_lines: int
    follow: bool


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Nobody waits for the answer any more."""

    request: str


Outgoing = HeartbeatAck | Assignment | RoutesDelta | InspectQuestion | LogQuestion | Cancelled


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a host knows of a model."""

    node: str
    config_json: str
    weight_bytes: int
    digest: str
    vocabulary_size: int


@dataclass(frozen=True, slots=True)
class LogLines:
    """Some lines of a log; `end` after the last of them; `error` where there can be no more."""

    lines: tuple[str, ...] = ()
    end: bool = False
    error: EnovaError | None = None


class _LogRelay:
    """One reader's lines, bounded: a reader that is too slow misses the oldest."""

    def __init__(self) -> None:
        self._chunks: deque[LogLines] = deque()
        self._missed = 0
        self._news = asyncio.Event()

    def put(self, chunk: LogLines) -> None:
        self._chunks.append(chunk)
        while len(self._chunks) > LOG_CHUNKS_MAX:
            self._missed += len(self._chunks.popleft().lines)
        self._news.set()

    async def get(self) -> LogLines:
        while not self._chunks:
            self._news.clear()
            await self._news.wait()
        chunk = self._chunks.popleft()
        if self._missed:
            note = f"... {self._missed} lines were left out: the reader was too slow ..."
            chunk, self._missed = LogLines((note, *chunk.lines), chunk.end, chunk.error), 0
        return chunk


class AgentSession:
    """One open stream of one agent."""

    def __init__(self, *, node: str, uid: str, instance: str, now_s: Callable[[], float]) -> None:
        self.node = node
        self.uid = uid
        self.instance = instance
        self.last_heard_s = now_s()
        self.last_heard_unix_s = 0.0
        self.report: NodeReport | None = None
        self.ended: asyncio.Future[EnovaError] = asyncio.get_running_loop().create_future()
        self._now_s = now_s
        self._news = asyncio.Event()
        self._ack: int | None = None
        self._assignment: Assignment | None = None
        self._assignment_sent = 0
        self._table: RouteTable | None = None
        self._table_sent: RouteTable | None = None
        self._questions: deque[Outgoing] = deque()
        self._inspections: dict[str, asyncio.Future[ModelFacts]] = {}
        self._logs: dict[str, _LogRelay] = {}

    # What the agent says.

    def heard(self, unix_s: float) -> None:
        """Something arrived; `unix_s` is the wall clock, for people."""
        self.last_heard_s = self._now_s()
        self.last_heard_unix_s = unix_s

    def heartbeat(self, sequence: int) -> None:
        """A heartbeat arrived: it is answered, the newest alone if several wait."""
        self._ack = sequence
        self._news.set()

    def inspected(self, request: str, facts: ModelFacts | EnovaError) -> None:
        """An answer about a model arrived; one that nobody waits for is dropped."""
        waiting = self._inspections.pop(request, None)
        if waiting is None or waiting.done():
            return
        if isinstance(facts, EnovaError):
            waiting.set_exception(facts)
        else:
            waiting.set_result(facts)

    def log_lines(self, request: str, lines: LogLines) -> None:
        """Lines arrived; those that nobody waits for are dropped, and the agent is told."""
        relay = self._logs.get(request)
        if relay is not None:
            relay.put(lines)
        elif not lines.end:
            self._ask(Cancelled(request))

    # What the agent is told.

    def assign(self, assignment: Assignment) -> None:
        """This is the node's assignment from now on."""
        self._assignment = assignment
        self._news.set()

    def route(self, table: RouteTable) -> None:
        """These are the routes from now on."""
        self._table = table
        self._news.set()

    async def inspect(self, model: str, *, request: str) -> ModelFacts:
        """What the host knows of a model; raises what the agent answers, or TimedOut."""
        self._check_room()
        waiting: asyncio.Future[ModelFacts] = asyncio.get_running_loop().create_future()
        self._inspections[request] = waiting
        self._ask(InspectQuestion(request, model))
        try:
            async with asyncio.timeout(INSPECT_TIMEOUT_S):
                return await waiting
        except TimeoutError as error:
            self._ask(Cancelled(request))
            text = f"{self.node} did not answer within {INSPECT_TIMEOUT_S:g} s what it knows of {model}"
            raise TimedOut(text, reason="INSPECT_TIMED_OUT", remedy="look at the agent's log") from error
        finally:
            self._inspections.pop(request, None)

    async def logs(self, question: LogQuestion) -> AsyncIterator[tuple[str, ...]]:
        """Lines of a replica's log until its end, the reader's, or the stream's."""
        self._check_room()
        relay = self._logs[question.request] = _LogRelay()
        self._ask(question)
        try:
            while True:
                chunk = await relay.get()
                if chunk.lines:
                    yield chunk.lines
                if chunk.error is not None:
                    raise chunk.error
                if chunk.end:
                    return
        finally:
            del self._logs[question.request]
            self._ask(Cancelled(question.request))

    async def next(self) -> list[Outgoing]:
        """What is to be sent now; waits until there is something. Empty once the stream shall end."""
        while not self.ended.done():
            if outgoing := self._take():
                return outgoing
            self._news.clear()
            await self._news.wait()
        return []

    def end(self, error: EnovaError) -> None:
        """Close the stream; whoever waits for an answer learns why."""
        if not self.ended.done():
            self.ended.set_result(error)
            self._news.set()
        for waiting in self._inspections.values():
            if not waiting.done():
                waiting.set_exception(Unavailable(f"the stream of {self.node} ended: {error.message}"))
        for relay in self._logs.values():
            relay.put(LogLines(end=True, error=Unavailable(f"the stream of {self.node} ended: {error.message}")))

    def observation(self) -> NodeObservation:
        """The node's stream as the leader sees it."""
        return NodeObservation(node=self.node, connected=True, last_heard_s=self.last_heard_s, report=self.report)

    def _take(self) -> list[Outgoing]:
        outgoing: list[Outgoing] = []
        if self._ack is not None:
            outgoing.append(HeartbeatAck(self._ack))
            self._ack = None
        if self._assignment is not None and self._assignment.revision != self._assignment_sent:
            outgoing.append(self._assignment)
            self._assignment_sent = self._assignment.revision
        if self._table is not None and self._table is not self._table_sent:
            sent = self._table_sent
            outgoing.append(self._table.whole() if sent is None else self._table.delta(sent))
            self._table_sent = self._table
        outgoing += self._questions
        self._questions.clear()
        return outgoing

    def _ask(self, question: Outgoing) -> None:
        if isinstance(question, Cancelled) and len(self._questions) >= QUESTIONS_MAX:
            return  # the agent reads nothing; the next chunk that nobody waits for says it again
        if question not in self._questions:
            self._questions.append(question)
        self._news.set()

    def _check_room(self) -> None:
        if len(self._inspections) + len(self._logs) >= RELAYS_MAX:
            text = f"{RELAYS_MAX} questions to {self.node} are open"
            raise Exhausted(text, reason="TOO_MANY_QUESTIONS", remedy="wait until some are answered")


class Agents:
    """All sessions by node, and the last that was heard of nodes whose stream has ended."""

    def __init__(self, *, now_s: Callable[[], float], changed: Callable[[], None]) -> None:
        self._now_s = now_s
        self._changed = changed
        self._sessions: dict[str, AgentSession] = {}
        self._gone: dict[str, NodeObservation] = {}
        self._assignments: dict[str, Assignment] = {}
        self._table: RouteTable | None = None
        self._numbers = itertools.count(1)

    def open(self, *, node: str, uid: str, instance: str) -> AgentSession:
        """Begin a session. Raises AlreadyExists where another agent of this name is alive."""
        before = self._sessions.get(node)
        if before is not None and before.instance != instance and self._now_s() - before.last_heard_s < LIVE_S:
            raise AlreadyExists(
                f"{node} is connected already, by another agent process ({before.instance})",
                reason="NODE_NAME_TAKEN",
                field="node",
                remedy="give each host a name of its own in agent.toml; after a restart wait for 3 s",
                metadata={"node": node},
            )
        if before is not None:
            before.end(Unavailable("the agent opened another stream", reason="REPLACED"))
        session = AgentSession(node=node, uid=uid, instance=instance, now_s=self._now_s)
        self._sessions[node] = session
        if (assignment := self._assignments.get(node)) is not None:
            session.assign(assignment)
        if self._table is not None:
            session.route(self._table)
        self._changed()
        return session

    def closed(self, session: AgentSession) -> None:
        """The stream of a session has ended."""
        session.end(Unavailable("the stream has ended"))
        if self._sessions.get(session.node) is session:
            del self._sessions[session.node]
            self._gone[session.node] = NodeObservation(
                node=session.node, connected=False, last_heard_s=session.last_heard_s
            )
        self._changed()

    def reported(self, session: AgentSession, report: NodeReport) -> None:
        """A status arrived."""
        session.report = report
        self._changed()

    def session(self, node: str) -> AgentSession | None:
        """The open session of a node."""
        return self._sessions.get(node)

    def sessions(self) -> Mapping[str, AgentSession]:
        """All open sessions by node."""
        return self._sessions

    def observations(self) -> Mapping[str, NodeObservation]:
        """All nodes as their streams are now, or were when they ended."""
        return self._gone | {name: session.observation() for name, session in self._sessions.items()}

    def assign(self, node: str, assignment: Assignment) -> None:
        """Give a node its assignment, now or when it connects."""
        self._assignments[node] = assignment
        if (session := self._sessions.get(node)) is not None:
            session.assign(assignment)

    def route(self, table: RouteTable) -> None:
        """Give all nodes these routes."""
        self._table = table
        for session in self._sessions.values():
            session.route(table)

    def forget(self, node: str) -> None:
        """A node was deleted."""
        self._gone.pop(node, None)
        self._assignments.pop(node, None)
        if (session := self._sessions.get(node)) is not None:
            session.end(Unavailable("the node was deleted", reason="NODE_DELETED"))

    def resign(self, error: EnovaError) -> None:
        """This coordinator leads no longer: all streams end, nothing is remembered."""
        for session in tuple(self._sessions.values()):
            session.end(error)
        self._gone.clear()
        self._assignments.clear()
        self._table = None

    async def inspect(self, model: str, *, nodes: tuple[str, ...]) -> ModelFacts:
        """What the first of `nodes` that is connected knows of a model."""
        for node in nodes:
            if (session := self._sessions.get(node)) is not None:
                return await session.inspect(model, request=f"inspect-{next(self._numbers)}")
        raise Unavailable(
            "no agent is connected that could look at the model",
            reason="NO_READY_NODE",
            remedy="start enova-agent on a host; enova get nodes shows them",
        )

    def logs(
        self, replica: str, *, node: str, tail_lines: int, follow: bool
    ) -> AsyncIterator[tuple[str, ...]]:
        """Lines of a replica's log from its node."""
        session = self._sessions.get(node)
        if session is None:
            raise NotFound(
                f"{node or 'no node'} is not connected, and only it has the log of {replica}",
                reason="LOG_UNREACHABLE",
                remedy="look at the node: enova describe node/NAME",
            )
        return session.logs(LogQuestion(f"logs-{next(self._numbers)}", replica, tail_lines, follow))
