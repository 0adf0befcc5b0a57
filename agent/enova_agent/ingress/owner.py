"""The owner's side: before each engine of this node a gate, and the exact count of what is held for it.

Both listeners come through here: the hop of other nodes, and requests that entered here for a replica of this
node. What was not sent to the engine raises `NotTaken`: another replica may have it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from enova_agent.core.admission import Admitted, Gate, Outcome, Refusal
from enova_agent.core.local import HeldReplica
from enova_agent.core.model import LocalEngine
from enova_agent.core.openai_errors import OpenAIError, no_replica, overloaded, queue_timeout
from enova_agent.core.routing import Load
from enova_agent.ingress.upstream import Endpoint, Response, Unreachable, Upstream, UpstreamError, endpoint_of_url

_log = logging.getLogger(__name__)


class NotTaken(Exception):
    """The request never reached an engine.

    `full`: its queue was; else nothing serves there. `final`: its time is over, trying elsewhere is of no use.
    `node_away`: not even the ingress of its node was reached.
    """

    def __init__(
        self, error: OpenAIError, *, full: bool, load: Load | None = None, final: bool = False, node_away: bool = False
    ) -> None:
        super().__init__(error.message)
        self.error = error
        self.full = full
        self.load = load
        self.final = final
        self.node_away = node_away


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """What is to be sent to an engine."""

    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    served_name: str = ""
    priority: int = 0
    queue_timeout_s: float = 60.0


class End(StrEnum):
    """How an answer ended."""

    COMPLETE = "COMPLETE"
    BROKEN = "BROKEN"      # by the other end
    GIVEN_UP = "GIVEN_UP"  # by us


class Answer:
    """An answer from an engine, here or behind a hop. `close()` it, read to its end or not; more than once is fine."""

    def __init__(self, response: Response, *, queue_s: float, ended: Callable[[End], None]) -> None:
        self.status = response.status
        self.headers = response.headers
        self.queue_s = queue_s
        self._response = response
        self._ended: Callable[[End], None] | None = ended
        self._end = End.GIVEN_UP

    async def chunk(self) -> bytes:
        """What has arrived; b"" at the end."""
        try:
            piece = await self._response.chunk()
        except UpstreamError:
            self._end = End.BROKEN
            raise
        if not piece:
            self._end = End.COMPLETE
        return piece

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body."""
        try:
            body = await self._response.read(limit_bytes)
        except UpstreamError:
            self._end = End.BROKEN
            raise
        self._end = End.COMPLETE
        return body

    def close(self) -> None:
        """Free what the answer holds; the engine sees the connection close if the answer was not complete."""
        if self._ended is not None:
            ended, self._ended = self._ended, None
            self._response.close()
            ended(self._end)


class _Ticket:
    """One request at a gate."""

    __slots__ = ("outcome", "waiter")

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self.waiter: asyncio.Future[None] | None = None


class _Station:
    """One engine with its gate and counts."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine = engine
        self.endpoint: Endpoint = endpoint_of_url(engine.endpoint)
        self.gate = Gate(
            max_concurrency=engine.max_concurrency, queue_limit=engine.queue_limit, admitting=engine.admitting
        )
        self.last_byte_s = 0.0
        self.finished = 0
        self.errors = 0
        self.gone = False

    def load(self) -> Load:
        return Load(
            in_flight=self.gate.in_flight, queued=self.gate.queued, capacity=self.gate.max_concurrency
        )

    def held(self, now_s: float) -> HeldReplica:
        silent_s = max(0.0, now_s - self.last_byte_s) if self.gate.in_flight else 0.0
        return HeldReplica(
            in_flight=self.gate.in_flight, queued=self.gate.queued, silent_s=round(silent_s, 3),
            finished=self.finished, errors=self.errors,
        )


class Owner:
    """All engines of this node, and what is held for them. `edge` is called when a count leaves or reaches 0."""

    def __init__(self, upstream: Upstream, *, edge: Callable[[], None]) -> None:
        self._upstream = upstream
        self._edge = edge
        self._stations: dict[str, _Station] = {}
        self._loop = asyncio.get_running_loop()

    def apply(self, engines: Iterable[LocalEngine]) -> None:
        """These are the engines of the node now; one whose endpoint is none cannot be served and is left out."""
        wanted: dict[str, tuple[LocalEngine, Endpoint]] = {}
        for engine in engines:
            try:
                wanted[engine.replica] = (engine, endpoint_of_url(engine.endpoint))
            except ValueError as error:
                _log.warning("%s is not served: %s", engine.replica, error)
        for replica, (engine, endpoint) in wanted.items():
            station = self._stations.get(replica)
            if station is None:
                self._stations[replica] = _Station(engine)
                continue
            station.engine, station.endpoint, station.gone = engine, endpoint, False
            self._tell(station.gate.change(
                max_concurrency=engine.max_concurrency, queue_limit=engine.queue_limit, admitting=engine.admitting
            ))
        for replica, station in tuple(self._stations.items()):
            if replica not in wanted:
                station.gone = True
                gate = station.gate
                self._tell(gate.change(
                    max_concurrency=gate.max_concurrency, queue_limit=gate.queue_limit, admitting=False
                ))
                self._forget_if_empty(replica, station)

    def engines(self) -> tuple[LocalEngine, ...]:
        """The engines as last applied."""
        return tuple(station.engine for station in self._stations.values() if not station.gone)

    def owns(self, replica: str) -> bool:
        """The replica is one of this node's."""
        station = self._stations.get(replica)
        return station is not None and not station.gone

    def load(self, replica: str) -> Load | None:
        """What is held for a replica of this node."""
        station = self._stations.get(replica)
        return station.load() if station else None

    def held(self) -> Mapping[str, HeldReplica]:
        """What is held for every replica of this node."""
        now_s = self._loop.time()
        return {replica: station.held(now_s) for replica, station in self._stations.items()}

    def expire(self) -> None:
        """Turn away those that waited too long; called on a beat."""
        now_s = self._loop.time()
        for station in self._stations.values():
            if station.gate.queued:
                self._tell(station.gate.expire(now_s=now_s))

    async def open(self, replica: str, errand: Errand) -> Answer:
        """Wait for a place, send, and return the answer once its head is there. Raises NotTaken or an UpstreamError."""
        station = self._stations.get(replica)
        if station is None or station.gone:
            raise NotTaken(no_replica(errand.served_name), full=False)
        ticket = _Ticket()
        asked_s = self._loop.time()
        try:
            await self._admitted(station, ticket, errand, asked_s)
        except BaseException:
            self._leave(replica, station, ticket)
            raise
        queue_s = self._loop.time() - asked_s
        if station.gate.in_flight == 1:
            station.last_byte_s = self._loop.time()
        try:
            response = await self._upstream.request(
                station.endpoint, "POST", errand.path, headers=errand.headers, body=errand.body,
                on_bytes=lambda: self._heard(station),
            )
        except Unreachable as error:
            station.errors += 1
            self._leave(replica, station, ticket)
            raise NotTaken(no_replica(errand.served_name), full=False, load=station.load()) from error
        except BaseException as error:
            station.errors += isinstance(error, UpstreamError)
            self._leave(replica, station, ticket)
            raise
        failed = response.status >= 500

        def ended(end: End) -> None:
            station.finished += end is End.COMPLETE and not failed
            station.errors += end is End.BROKEN or failed
            self._leave(replica, station, ticket)

        return Answer(response, queue_s=queue_s, ended=ended)

    def _heard(self, station: _Station) -> None:
        station.last_byte_s = self._loop.time()

    async def _admitted(self, station: _Station, ticket: _Ticket, errand: Errand, asked_s: float) -> None:
        empty = station.gate.in_flight + station.gate.queued == 0
        self._tell(station.gate.offer(
            ticket, priority=errand.priority, deadline_s=asked_s + errand.queue_timeout_s
        ))
        if empty:
            self._edge()
        if ticket.outcome is None:
            ticket.waiter = self._loop.create_future()
            await ticket.waiter
        if isinstance(ticket.outcome, Admitted):
            return
        assert ticket.outcome is not None
        match ticket.outcome.refusal:
            case Refusal.FULL | Refusal.DISPLACED:
                raise NotTaken(overloaded(), full=True, load=station.load())
            case Refusal.CLOSED:
                raise NotTaken(no_replica(errand.served_name), full=False, load=station.load())
            case Refusal.EXPIRED:
                error = queue_timeout(self._loop.time() - asked_s)
                raise NotTaken(error, full=True, load=station.load(), final=True)

    def _leave(self, replica: str, station: _Station, ticket: _Ticket) -> None:
        self._tell(station.gate.leave(ticket))
        if station.gate.in_flight + station.gate.queued == 0:
            self._edge()
            self._forget_if_empty(replica, station)

    def _forget_if_empty(self, replica: str, station: _Station) -> None:
        if station.gone and station.gate.in_flight == 0 and self._stations.get(replica) is station:
            del self._stations[replica]

    @staticmethod
    def _tell(outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            ticket = outcome.ticket
            assert isinstance(ticket, _Ticket)
            ticket.outcome = outcome
            if ticket.waiter is not None and not ticket.waiter.done():
                ticket.waiter.set_result(None)
