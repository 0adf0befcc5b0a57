"""Between ingresses: the words of the hop, its server at the owner, its client at the entry.

`POST /enova/hop/v1/...` carries an application's request to the ingress that owns the replica named in
x-enova-replica. The owner's answer is the engine's, byte for byte, with what only the owner knows in headers. If
the engine was not reached the answer bears x-enova-not-taken; if it broke before it answered, x-enova-failure. If
it breaks later, the connection ends in the middle, which is how HTTP says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Mapping

from aiohttp import web

from enova_agent.core.model import RouteTarget
from enova_agent.core.openai_errors import (
    OpenAIError,
    engine_failed,
    engine_silent,
    forbidden_peer,
    invalid_request,
    no_replica,
    overloaded,
    queue_timeout,
)
from enova_agent.core.routing import Load, Router, load_of_header
from enova_agent.ingress.calls import Rejected
from enova_agent.ingress.owner import Answer, End, Errand, NotTaken, Owner
from enova_agent.ingress.reading import read_body
from enova_agent.ingress.upstream import (
    Broken,
    Endpoint,
    Response,
    Silent,
    Unreachable,
    Upstream,
    UpstreamError,
    certificate_uris,
)

PREFIX = "/enova/hop"
REPLICA = "x-enova-replica"
PRIORITY = "x-enova-priority"
MODEL = "x-enova-model"
QUEUE_TIMEOUT = "x-enova-queue-timeout-s"
LOAD = "x-enova-load"
QUEUE = "x-enova-queue-s"
NOT_TAKEN = "x-enova-not-taken"
FAILURE = "x-enova-failure"
PEER_PREFIX = "spiffe://enova/ingress/"
FORWARDED = ("content-type", "accept", "x-request-id", "traceparent", "tracestate")  # of a request, to the engine
RETURNED = ("content-type", "x-request-id", "retry-after", "cache-control")          # of an engine's answer
SERVER = {"server": "enova"}  # in place of the names and versions of the libraries
AWAY_MAX = 1024  # addresses whose absence is remembered as logged
WHOLE_BYTES_MAX = 1 << 20  # an answer of a known length up to this is passed on in one piece

_log = logging.getLogger(__name__)


def forwarded(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """The headers of a request that an engine gets to see."""
    return [(name, headers[name]) for name in FORWARDED if name in headers]


def returned(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of an answer that travel back."""
    return SERVER | {name: headers[name] for name in RETURNED if name in headers}


def error_response(error: OpenAIError, headers: Mapping[str, str] | None = None) -> web.Response:
    """An error as an answer of ours."""
    extra = {**SERVER, **(headers or {})}
    if error.retry_after_s is not None:
        extra["Retry-After"] = str(error.retry_after_s)
    return web.Response(status=error.status, body=error.body(), content_type="application/json", headers=extra)


class HopServer:
    """Answers other ingresses for the replicas of this node."""

    def __init__(self, owner: Owner, *, body_bytes_max: int, body_timeout_s: float, check_peer: bool) -> None:
        self._owner = owner
        self._body_bytes_max = body_bytes_max
        self._body_timeout_s = body_timeout_s
        self._check_peer = check_peer

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request from another ingress."""
        if self._check_peer and not _is_ingress(request):
            _log.warning("a peer without the role of an ingress was refused: %s", request.remote)
            return error_response(forbidden_peer())
        if request.method != "POST" or not request.path.startswith(f"{PREFIX}/v1/"):
            return web.Response(status=404)
        replica = request.headers.get(REPLICA, "")
        body = await read_body(request, limit_bytes=self._body_bytes_max, limit_s=self._body_timeout_s)
        try:
            answer = await self._owner.open(replica, _errand(request, body))
        except NotTaken as refusal:
            return error_response(refusal.error, self._refused(refusal))
        except Silent as error:
            return error_response(engine_silent(error.limit_s), {FAILURE: "silent"})
        except UpstreamError:
            return error_response(engine_failed(1), {FAILURE: "broken"})
        try:
            return await self._relay(request, replica, answer)
        finally:
            answer.close()

    @staticmethod
    def _refused(refusal: NotTaken) -> dict[str, str]:
        headers = {NOT_TAKEN: "final" if refusal.final else "1"}
        if refusal.load is not None:
            headers[LOAD] = refusal.load.header()
        return headers

    async def _relay(self, request: web.BaseRequest, replica: str, answer: Answer) -> web.StreamResponse:
        headers = returned(answer.headers)
        headers[QUEUE] = f"{answer.queue_s:.6f}"
        load = self._owner.load(replica)
        if load is not None:
            headers[LOAD] = load.header()
        length = answer.headers.get("content-length", "")
        if length.isdecimal() and int(length) <= WHOLE_BYTES_MAX:
            try:
                body = await answer.read(WHOLE_BYTES_MAX)
            except UpstreamError:
                return error_response(engine_failed(1), {FAILURE: "broken"})
            return web.Response(status=answer.status, body=body, headers=headers)
        response = web.StreamResponse(status=answer.status, headers=headers)
        await response.prepare(request)
        try:
            while piece := await answer.chunk():
                await response.write(piece)
        except UpstreamError as error:
            _log.info("an answer of %s broke off: %s", replica, error)
            if request.transport is not None:
                request.transport.abort()
            return response
        await response.write_eof()
        return response


class HopClient:
    """Sends to replicas of other nodes through their ingress."""

    def __init__(self, upstream: Upstream, router: Router, *, endpoint: Callable[[RouteTarget], Endpoint]) -> None:
        self._upstream = upstream
        self._router = router
        self._endpoint = endpoint
        self._away: set[str] = set()  # addresses whose absence was logged
        self._loop = asyncio.get_running_loop()

    async def open(self, target: RouteTarget, errand: Errand) -> Answer:
        """As Owner.open, for a replica elsewhere."""
        headers = [
            *errand.headers, (REPLICA, target.replica), (PRIORITY, str(errand.priority)),
            (MODEL, errand.served_name), (QUEUE_TIMEOUT, f"{errand.queue_timeout_s:g}"),
        ]
        try:
            response = await self._upstream.request(
                self._endpoint(target), "POST", PREFIX + errand.path, headers=headers, body=errand.body
            )
        except Unreachable as error:
            if target.hop_address not in self._away:
                _log.warning("node %s is not reached at %s: %s", target.node, target.hop_address, error)
                if len(self._away) >= AWAY_MAX:
                    self._away.clear()
                self._away.add(target.hop_address)
            raise NotTaken(no_replica(errand.served_name), full=False, node_away=True) from error
        self._away.discard(target.hop_address)
        load = load_of_header(response.headers.get(LOAD, ""))
        if load is not None:
            self._router.heard(target.replica, load, now_s=self._loop.time())
        with contextlib.ExitStack() as given_up:
            given_up.callback(response.close)
            if NOT_TAKEN in response.headers:
                await response.read(WHOLE_BYTES_MAX)  # so that the connection can be used again
                raise _not_taken(response, errand.served_name, load)
            if FAILURE in response.headers:
                if response.headers[FAILURE] == "silent":
                    raise Silent(self._upstream.limits.first_byte_s)
                raise Broken("the engine broke before it answered")
            given_up.pop_all()
        return Answer(response, queue_s=_seconds(response.headers.get(QUEUE, "")), ended=_ignored)


def _not_taken(response: Response, served_name: str, load: Load | None) -> NotTaken:
    final = response.headers[NOT_TAKEN] == "final"
    if response.status == 429:
        error = queue_timeout(0.0) if final else overloaded()
        return NotTaken(error, full=True, load=load, final=final)
    return NotTaken(no_replica(served_name), full=False, load=load)


def _errand(request: web.BaseRequest, body: bytes) -> Errand:
    try:
        return Errand(
            path=request.path.removeprefix(PREFIX),
            body=body,
            headers=tuple(forwarded(request.headers)),
            served_name=request.headers.get(MODEL, ""),
            priority=int(request.headers.get(PRIORITY, "0")),
            queue_timeout_s=float(request.headers.get(QUEUE_TIMEOUT, "60")),
        )
    except ValueError as error:
        raise Rejected(invalid_request(f"{PRIORITY} or {QUEUE_TIMEOUT} is not a number")) from error


def _is_ingress(request: web.BaseRequest) -> bool:
    transport = request.transport
    return transport is not None and any(uri.startswith(PEER_PREFIX) for uri in certificate_uris(transport))


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        return 0.0
    return seconds if 0 <= seconds < math.inf else 0.0


def _ignored(_: End) -> None:
    """The counts of a replica elsewhere are kept by its owner."""
