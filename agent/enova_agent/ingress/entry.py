"""The entry: takes an application's request, finds a replica for it, and passes the answer on as it comes.

Theory of operation. Until the first byte goes to the application, a request may be tried elsewhere: without
bound on kind where no engine was reached (refused, not there), and on at most `reached_max` engines where one
broke or answered that it is broken, so that a request that kills engines does not kill them all. A stream's
first event is awaited before anything is sent, because engines hide refusals in a stream that began well. After
the first byte a failure becomes a last event that clients raise on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, assert_never

from aiohttp import ClientConnectionResetError, web

from enova_agent.core.model import Route, RouteTarget
from enova_agent.core.openai_errors import (
    OpenAIError,
    bad_answer,
    engine_failed,
    engine_silent,
    invalid_request,
    no_replica,
    stream_cut,
    unknown_model,
)
from enova_agent.core.routing import Router
from enova_agent.ingress.calls import Rejected, call_of_body, with_limit, with_priority
from enova_agent.ingress.exchange import Exchange, Hashes, Ledger, class_of
from enova_agent.ingress.hop import HopClient, error_response, forwarded, returned
from enova_agent.ingress.lengths import Lengths
from enova_agent.ingress.owner import Answer, Errand, NotTaken, Owner
from enova_agent.ingress.reading import read_body
from enova_agent.ingress.sse import EventFilter, EventTooLarge, Usage, usage_of_value
from enova_agent.ingress.summaries import Summaries
from enova_agent.ingress.upstream import Broken, Silent, UpstreamError
from enova_agent.ingress.waiting_room import WaitingRoom
from enova_common.records import Outcome

CLASS = "x-enova-class"
CANARY = "x-enova-canary"
TIMEOUT = "x-enova-timeout-s"
MAX_TOKENS = "x-enova-max-tokens"
STREAMING_PATHS = frozenset({"/v1/chat/completions", "/v1/completions"})
MODEL_PATHS = STREAMING_PATHS | {"/v1/embeddings"}
REQUEST_ID_CHARACTERS_MAX = 128

_DECODER = json.JSONDecoder()
_FINISH_REASON = re.compile(rb'"finish_reason":\s*"([a-z_]{1,32})"')


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryLimits:
    """The bounds of the entry. Real time."""

    body_bytes_max: int = 32 << 20
    body_timeout_s: float = 30.0
    answer_bytes_max: int = 64 << 20   # of an answer that is not a stream
    queue_timeout_s: float = 60.0
    send_timeout_s: float = 60.0       # for a client that does not read
    targets_max: int = 8               # tried for one request
    reached_max: int = 3               # engines that one request may break


class _Routes(Protocol):
    @property
    def routes(self) -> Mapping[str, Route]: ...


@dataclass(frozen=True, slots=True)
class _Stream:
    """A stream whose first event was seen and is no error."""

    answer: Answer
    events: EventFilter
    first: bytes


@dataclass(frozen=True, slots=True)
class _Whole:
    """An answer that has been read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes


_Outcome = _Stream | _Whole


class Entry:
    """Serves requests for models."""

    def __init__(
        self,
        *,
        limits: EntryLimits,
        table: Callable[[], _Routes],
        router: Router,
        owner: Owner,
        hop: HopClient,
        hashes: Hashes,
        lengths: Lengths,
        summaries: Summaries,
        ledgers: tuple[Ledger, ...],
        now: Callable[[], float],
        time_scale: float,
        node: Callable[[], str],
        always_hop: bool,
        waiting: WaitingRoom,
    ) -> None:
        self._limits = limits
        self._table = table
        self._router = router
        self._owner = owner
        self._hop = hop
        self._hashes = hashes
        self._lengths = lengths
        self._summaries = summaries
        self._ledgers = ledgers
        self._now = now
        self._time_scale = time_scale
        self._node = node
        self._always_hop = always_hop
        self._waiting = waiting
        self._loop = asyncio.get_running_loop()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request for a model. Raises Rejected for what cannot be one."""
        arrival_s = self._now()
        body = await read_body(
            request, limit_bytes=self._limits.body_bytes_max, limit_s=self._limits.body_timeout_s
        )
        call = call_of_body(body, streams=request.path in STREAMING_PATHS)
        route = self._table().routes.get(call.model)
        if route is None:
            raise Rejected(unknown_model(call.model))
        canary = CANARY in request.headers
        look = None if canary else await self._lengths.look(route, call, request.path)
        exchange = Exchange(
            now=self._now,
            route=route,
            serving_class=class_of(route, request.headers.get(CLASS, "")),
            call=with_limit(call, look.limit) if look is not None and look.limit else call,
            request_id=_request_id(request.headers.get("x-request-id", "")),
            tenant_hash=self._hashes.tenant(request.headers.get("authorization", "")),
            prefix_hashes=self._hashes.prefixes(call.value),
            node=self._node(),
            canary=canary,
            arrival_s=arrival_s,
            look=look,
        )
        outcome, reason = Outcome.CANCELLED, "the client went away"
        try:
            response, outcome, reason = await self._serve(request, exchange)
            return response
        finally:
            if exchange.told_end and outcome is Outcome.CANCELLED:
                outcome, reason = Outcome.FINISHED, ""
            record = exchange.ended(outcome, reason=reason)
            exchange.settle(self._summaries, record)
            if not exchange.canary:
                for ledger in self._ledgers:
                    ledger.add(record)
            if look is not None:
                self._lengths.ended(
                    look, outcome, finish_reason=record.finish_reason, tokens=record.output_tokens
                )

    async def _serve(
        self, request: web.BaseRequest, exchange: Exchange
    ) -> tuple[web.StreamResponse, Outcome, str]:
        try:
            own_timeout_s = _own_timeout_s(request.headers.get(TIMEOUT, ""))
            await self._awaken(exchange, own_timeout_s)
            got = await self._answer(self._errand(request, exchange, own_timeout_s), exchange)
        except Rejected as refusal:
            exchange.status = refusal.error.status
            return error_response(refusal.error), Outcome.REFUSED, refusal.error.code
        except NotTaken as refusal:
            exchange.status = refusal.error.status
            return error_response(refusal.error), Outcome.REFUSED, refusal.error.code
        except Silent as error:
            return self._failed(exchange, engine_silent(error.limit_s))
        except Broken:
            return self._failed(exchange, engine_failed(exchange.attempts))
        except EventTooLarge:
            return self._failed(exchange, bad_answer())
        match got:
            case _Whole():
                exchange.status = got.status
                headers = {**got.headers, "x-request-id": exchange.request_id, **_told_limit(exchange)}
                if got.status in {429, 503}:
                    headers.setdefault("retry-after", "1")
                whole = web.Response(status=got.status, body=got.body, headers=headers)
                failed = got.status >= 500
                return whole, Outcome.FAILED if failed else Outcome.FINISHED, "engine_error" if failed else ""
            case _Stream():
                try:
                    return await self._relay(request, exchange, got)
                finally:
                    got.answer.close()
                    self._router.ended(exchange.replica)
            case _:
                assert_never(got)

    async def _awaken(self, exchange: Exchange, own_timeout_s: float | None) -> None:
        """Wait for the first replica of a deployment that was scaled to zero."""
        route = exchange.route
        if route.wakes and not route.targets and not exchange.canary:
            exchange.waits(self._summaries)
            since_s = exchange.now()
            exchange.route = await self._waiting.target(
                route.served_name, body_bytes=len(exchange.call.body), own_timeout_s=own_timeout_s
            )
            exchange.awaited_s = max(0.0, exchange.now() - since_s)

    @staticmethod
    def _failed(exchange: Exchange, error: OpenAIError) -> tuple[web.StreamResponse, Outcome, str]:
        exchange.status = error.status
        return error_response(error), Outcome.FAILED, error.code

    async def _answer(self, errand: Errand, exchange: Exchange) -> _Outcome:
        """Try replicas until one answers. Raises what the last one did."""
        tried: set[str] = set()
        reached = 0
        attempts = 0
        last: NotTaken | UpstreamError | _Whole = NotTaken(no_replica(exchange.call.model), full=False)
        while attempts < self._limits.targets_max and reached < self._limits.reached_max:
            target = self._choose(exchange.route, tried)
            if target is None:
                break
            attempts += 1
            tried.add(target.replica)
            try:
                got = await self._attempt(target, errand, exchange)
            except NotTaken as refusal:
                tried.update(self._note_refusal(exchange.route, target, refusal))
                # "Overloaded" is the truer word if some were full and others were gone.
                last = refusal if refusal.full or not (isinstance(last, NotTaken) and last.full) else last
                if refusal.final:
                    break
            except UpstreamError as error:
                reached += 1
                self._router.failed(target.replica, now_s=self._loop.time(), draw=_draw())
                last = error
                if isinstance(error, Silent):
                    break
            else:
                if not isinstance(got, _Whole) or got.status < 500:
                    return got
                reached += 1
                self._router.full(target.replica, now_s=self._loop.time())
                last = got
        if isinstance(last, _Whole):
            return last
        raise last

    def _choose(self, route: Route, tried: set[str]) -> RouteTarget | None:
        now_s = self._loop.time()
        for target in route.targets:
            load = self._owner.load(target.replica)
            if load is not None:
                self._router.heard(target.replica, load, now_s=now_s)
        return self._router.choose(route.targets, now_s=now_s, draws=(_draw(), _draw()), tried=tried)

    def _note_refusal(self, route: Route, target: RouteTarget, refusal: NotTaken) -> set[str]:
        """Tell the router; the replicas that need not be tried now."""
        now_s = self._loop.time()
        if refusal.load is not None:
            self._router.heard(target.replica, refusal.load, now_s=now_s)
        if refusal.full:
            self._router.full(target.replica, now_s=now_s)
            return set()
        lost = {target.replica}
        if refusal.node_away:
            lost.update(other.replica for other in route.targets if other.hop_address == target.hop_address)
        for replica in lost:
            self._router.failed(replica, now_s=now_s, draw=_draw())
        return lost

    def _errand(self, request: web.BaseRequest, exchange: Exchange, own_timeout_s: float | None) -> Errand:
        limit_s = self._limits.queue_timeout_s
        if own_timeout_s is not None:  # what was spent on waiting for a replica is not to be had again
            limit_s = min(limit_s, max(0.0, own_timeout_s - exchange.awaited_s / self._time_scale))
        headers = [(name, value) for name, value in forwarded(request.headers) if name != "x-request-id"]
        headers.append(("x-request-id", exchange.request_id))
        return Errand(
            path=request.path,
            body=with_priority(exchange.call, exchange.serving_class.priority),
            headers=tuple(headers),
            served_name=exchange.call.model,
            priority=exchange.serving_class.priority,
            queue_timeout_s=limit_s,
        )

    async def _attempt(self, target: RouteTarget, errand: Errand, exchange: Exchange) -> _Outcome:
        """One replica's answer: read whole, or a stream that begins well."""
        exchange.aimed(self._summaries, target.replica)
        self._router.sent(target.replica)
        answer: Answer | None = None
        kept = False
        try:
            if self._owner.owns(target.replica) and not self._always_hop:
                answer = await self._owner.open(target.replica, errand)
            else:
                answer = await self._hop.open(target, errand)
            exchange.queue_s = exchange.awaited_s + answer.queue_s * self._time_scale
            got = await self._begin(answer, exchange)
            kept = isinstance(got, _Stream)
            self._router.answered(target.replica)
            return got
        finally:
            if answer is not None and not kept:
                answer.close()
            if not kept:
                self._router.ended(target.replica)

    async def _begin(self, answer: Answer, exchange: Exchange) -> _Outcome:
        headers = returned(answer.headers)
        streams = exchange.call.stream and answer.status == 200
        if not streams or not headers.get("content-type", "").startswith("text/event-stream"):
            body = await answer.read(self._limits.answer_bytes_max)
            if answer.status == 200:
                exchange.usage, exchange.finish_reason = _count_of_body(body)
            return _Whole(answer.status, headers, body)
        events = EventFilter(hide_usage=exchange.call.hide_usage)
        first = b""
        while not events.events:
            piece = await answer.chunk()
            if not piece:
                raise Broken("the stream ended before its first event")
            first += events.feed(piece)
        if events.error is not None and events.error_at == 1:
            return _Whole(events.error.status, {"content-type": "application/json"}, events.error.body)
        exchange.token_seen()
        return _Stream(answer, events, first)

    async def _relay(
        self, request: web.BaseRequest, exchange: Exchange, stream: _Stream
    ) -> tuple[web.StreamResponse, Outcome, str]:
        """Pass a stream on to its end."""
        exchange.status = 200
        response = web.StreamResponse(headers={
            **returned(stream.answer.headers), "x-request-id": exchange.request_id, **_told_limit(exchange),
            "cache-control": "no-cache", "x-accel-buffering": "no",
        })
        outcome, reason = Outcome.FINISHED, ""
        try:
            await response.prepare(request)
            await self._send(response, stream.first)
            exchange.told_end = stream.events.done and stream.events.error is None
            try:
                await self._pump(response, exchange, stream)
            except (UpstreamError, EventTooLarge) as error:
                cut = engine_silent(error.limit_s) if isinstance(error, Silent) else stream_cut()
                outcome, reason = Outcome.CUT, cut.code
                await self._send(response, cut.event())
            if stream.events.error is not None:
                outcome, reason = Outcome.CUT, "engine_error"
            # Every event has been handed over: who hangs up on the end marker was served all the same.
            with contextlib.suppress(ConnectionResetError):
                await response.write_eof()
        finally:
            exchange.usage, exchange.finish_reason = stream.events.usage, stream.events.finish_reason
            if outcome is Outcome.CUT and reason != "engine_error":
                self._router.failed(exchange.replica, now_s=self._loop.time(), draw=_draw())
        return response, outcome, reason

    async def _pump(self, response: web.StreamResponse, exchange: Exchange, stream: _Stream) -> None:
        events, answer = stream.events, stream.answer
        while piece := await answer.chunk():
            if not events.usage:
                exchange.token_seen()
            passed = events.feed(piece)
            if passed:
                await self._send(response, passed)
                exchange.told_end = events.done and events.error is None
        if not events.done and events.error is None:
            raise Broken("the stream ended without its end marker")

    async def _send(self, response: web.StreamResponse, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._limits.send_timeout_s):
                await response.write(data)
        except TimeoutError as error:
            raise ClientConnectionResetError("the client does not read") from error


def _count_of_body(body: bytes) -> tuple[Usage | None, str]:
    """The engine's count in a whole answer, found without parsing all of it where that can be avoided."""
    at = body.rfind(b'"usage":')
    if at < 0:
        return None, ""
    try:
        value, _ = _DECODER.raw_decode(body[at + len(b'"usage":'):].decode().lstrip())
    except (ValueError, RecursionError):
        return None, ""
    finish = _FINISH_REASON.search(body)
    return usage_of_value(value), finish[1].decode() if finish else ""


def _told_limit(exchange: Exchange) -> dict[str, str]:
    """The header that tells of a limit which the client did not give."""
    look = exchange.look
    return {MAX_TOKENS: str(look.limit)} if look is not None and look.limit else {}


def _request_id(given: str) -> str:
    sane = 0 < len(given) <= REQUEST_ID_CHARACTERS_MAX and given.isascii() and given.isprintable()
    return given if sane else f"{random.getrandbits(128):032x}"


def _own_timeout_s(given: str) -> float | None:
    """How long a request is willing to wait, real time; None where it does not say."""
    try:
        asked_s = float(given) if given else 0.0
    except ValueError as error:
        raise Rejected(invalid_request(f"{TIMEOUT} is not a number of seconds.")) from error
    return asked_s if asked_s > 0 else None


def _draw() -> float:
    return random.random()  # noqa: S311  spreads load, keeps no secret
