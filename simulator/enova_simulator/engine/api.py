"""The HTTP routes: vLLM's, and those of the simulation under `/simulated`."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict

from aiohttp import web

from enova_recommender.engine import Request
from enova_simulator.engine.faults import parse_fault
from enova_simulator.engine.generation import Generation, Generator
from enova_simulator.engine.gpu import GpuReader
from enova_simulator.engine.ills import Ills
from enova_simulator.engine.metrics import CONTENT_TYPE, HttpMetrics, ProcessMetrics
from enova_simulator.engine.openai import (
    ApiError,
    Asked,
    Route,
    Rules,
    StreamWriter,
    Voice,
    answer,
    bad_request,
    count_tokens,
    error_events,
    parse_request,
)

VERSION = "0.32.0+simulated"
REQUEST_BYTES_MAX = 64 << 20
GUARDED_PREFIXES = ("/v1", "/v2", "/inference")  # by --api-key; the rest is open, as with the real server
# A refusal within this many real seconds of an accepted request is part of a burst: a stream's headers are out by
# the time the bound is found reached, so the refusal comes inside a 200.
BURST_S = 0.05
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ServerState:
    """What the life of the server means to its routes."""

    def __init__(self) -> None:
        self.is_dead = False  # the core died
        self.is_draining = False
        self.open_requests = 0  # for tokens, until their client has all of it or went away
        self.quiet = asyncio.Event()  # none is open
        self.quiet.set()

    def opened(self) -> None:
        """A client asks for tokens."""
        self.open_requests += 1
        self.quiet.clear()

    def closed(self) -> None:
        """It has its answer, or went away."""
        self.open_requests -= 1
        if not self.open_requests:
            self.quiet.set()


class Api:
    """The routes of one engine."""

    def __init__(
        self,
        *,
        generator: Generator,
        gpu: GpuReader,
        ills: Ills,
        state: ServerState,
        rules: Rules,
        root: str,
        api_keys: tuple[str, ...],
        load_tracking: bool,
        request_id_headers: bool,
        stream_interval: int,
        time_scale: float,
    ) -> None:
        self._generator, self._gpu, self._ills, self._state = generator, gpu, ills, state
        self._rules, self._root, self._api_keys = rules, root, tuple(key.encode() for key in api_keys)
        self._load_tracking, self._request_id_headers = load_tracking, request_id_headers
        self._stream_interval, self._time_scale = stream_interval, time_scale
        self._created = int(time.time())
        self._http = HttpMetrics(time.time())
        self._process = ProcessMetrics()

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(middlewares=[self._measure], client_max_size=REQUEST_BYTES_MAX)
        routes: tuple[tuple[str, str, Handler], ...] = (
            ("GET", "/health", self._health),
            ("GET", "/ping", self._health),
            ("POST", "/ping", self._health),
            ("GET", "/version", self._version),
            ("GET", "/load", self._load),
            ("GET", "/metrics", self._metrics),
            ("GET", "/v1/models", self._models),
            ("POST", "/tokenize", self._tokenize),
            ("POST", Route.COMPLETION, self._completion),
            ("POST", Route.CHAT, self._chat),
            ("GET", "/simulated/gpu", self._read_gpu),
            ("GET", "/simulated/fault", self._list_faults),
            ("POST", "/simulated/fault", self._add_fault),
            ("DELETE", "/simulated/fault", self._lift_faults),
        )
        for method, path, handler in routes:
            app.router.add_route(method, path, handler)
        return app

    # -- around each request

    @web.middleware
    async def _measure(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        started_s = time.perf_counter()
        response = await self._guarded(request, handler)
        if self._request_id_headers and not response.prepared:
            response.headers["X-Request-Id"] = request.headers.get("X-Request-Id") or uuid.uuid4().hex
        resource = request.match_info.route.resource
        body = response.body if isinstance(response, web.Response) else None
        self._http.count(
            handler=resource.canonical if resource is not None else "none",
            method=request.method,
            status=response.status,
            request_bytes=request.content_length or 0,
            response_bytes=len(body) if isinstance(body, bytes) else 0,
            duration_s=time.perf_counter() - started_s,
        )
        return response

    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._api_keys and request.path.startswith(GUARDED_PREFIXES) and not self._knows(request):
            return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            return await handler(request)
        except ApiError as error:
            return web.json_response(error.body, status=error.status)
        except web.HTTPException as error:
            return web.json_response({"detail": error.reason}, status=error.status)

    def _knows(self, request: web.Request) -> bool:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and any(hmac.compare_digest(key.encode(), known) for known in self._api_keys)

    # -- small routes

    async def _health(self, _: web.Request) -> web.Response:
        self._ills.look_after_core()
        return web.Response(status=503 if self._state.is_dead else 200)

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": VERSION, "simulated": True})

    async def _load(self, _: web.Request) -> web.Response:
        return web.json_response({"server_load": self._state.open_requests if self._load_tracking else 0})

    async def _metrics(self, _: web.Request) -> web.Response:
        self._generator.settle()
        lines = [*self._process.lines(), *self._generator.metrics.lines(), *self._http.lines(), ""]
        return web.Response(body="\n".join(lines).encode(), headers={"Content-Type": CONTENT_TYPE})

    async def _models(self, _: web.Request) -> web.Response:
        cards = [
            {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "enova-simulated-engine",
                "root": self._root,
                "parent": None,
                "max_model_len": self._rules.max_model_len,
                "simulated": True,
            }
            for name in self._rules.served_names
        ]
        return web.json_response({"object": "list", "data": cards})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await _json(request)
        prompt = body.get("prompt") if isinstance(body, dict) else None
        if not isinstance(prompt, str):
            raise bad_request("prompt must be a text", "prompt")
        count = count_tokens(prompt)
        tokens = {"count": count, "max_model_len": self._rules.max_model_len, "tokens": list(range(count))}
        return web.json_response({**tokens, "token_strs": None})

    async def _read_gpu(self, _: web.Request) -> web.Response:
        return web.json_response(self._gpu.read())

    async def _list_faults(self, _: web.Request) -> web.Response:
        return web.json_response({"faults": [asdict(fault) for fault in self._ills.faults]})

    async def _add_fault(self, request: web.Request) -> web.Response:
        try:
            fault = parse_fault(await _json(request))
            self._ills.add(fault)
        except ValueError as error:
            raise bad_request(str(error), "fault") from error
        return web.json_response({"fault": asdict(fault)})

    async def _lift_faults(self, _: web.Request) -> web.Response:
        self._ills.lift()
        return web.json_response({"faults": []})

    # -- tokens

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, Route.COMPLETION)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, Route.CHAT)

    async def _generate(self, request: web.Request, route: Route) -> web.StreamResponse:
        if self._state.is_draining:
            raise ApiError(500, "InternalServerError", "cannot schedule new futures after shutdown")
        if self._state.is_dead:
            raise _core_died()
        asked_id = request.headers.get("X-Request-Id") or uuid.uuid4().hex
        answer_id = f"{'chatcmpl' if route is Route.CHAT else 'cmpl'}-{asked_id}"
        asked = parse_request(await _json(request), route, self._rules, asked_id)
        if self._generator.scheduler.is_full:
            return await self._refuse(request, asked)
        # Clients may repeat an id; the scheduler may not.
        own_id = f"{answer_id}-{uuid.uuid4().hex[:8]}"
        generation = Generation(
            Request(
                id=own_id,
                prompt_tokens=asked.prompt_tokens,
                output_tokens=asked.output_tokens,
                priority=asked.priority,
                block_hashes=asked.block_hashes,
            ),
            reason=asked.reason,
            max_tokens=asked.max_tokens,
            interval=self._stream_interval,
        )
        voice = Voice(f"{self._rules.seed}:{asked_id}")
        self._state.opened()
        self._generator.submit(generation, streams=asked.streams)
        try:
            if asked.streams:
                return await self._stream(request, asked, generation, voice, answer_id)
            await generation.end()
        finally:
            self._generator.leave(generation, streams=asked.streams)
            self._state.closed()
        if generation.failure:
            raise _core_died()
        text = voice.say(0, asked.output_tokens)
        return web.json_response(answer(asked, answer_id, self._unix_s(), text))

    async def _stream(
        self, request: web.Request, asked: Asked, generation: Generation, voice: Voice, answer_id: str
    ) -> web.StreamResponse:
        response = await self._open_stream(request)
        writer = StreamWriter(asked, answer_id, self._unix_s())
        sent = 0
        while sent < asked.output_tokens:
            made = await generation.more()
            if generation.failure:
                await response.write(error_events(_core_died()))
                return response
            last = made == asked.output_tokens
            event = writer.tokens(voice.say(sent, made), first=sent == 0, made=made, last=last)
            sent = made
            await response.write(event + writer.end() if last else event)
        await response.write_eof()
        return response

    async def _open_stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        if self._request_id_headers:
            response.headers["X-Request-Id"] = request.headers.get("X-Request-Id") or uuid.uuid4().hex
        await response.prepare(request)
        return response

    async def _refuse(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        self._generator.metrics.add("admission_rejections", 1, "max_num_queued_reqs")
        error = ApiError(
            503,
            "Service Unavailable",
            "The engine is currently busy and cannot accept new requests. Please try again later or on a different "
            "instance.",
        )
        if not asked.streams or self._generator.accepted_ago_s > BURST_S * self._time_scale:
            raise error
        response = await self._open_stream(request)
        await response.write(error_events(error))
        await response.write_eof()
        return response

    def _unix_s(self) -> int:
        return int(self._generator.now_s())


def _core_died() -> ApiError:
    return ApiError(
        500,
        "InternalServerError",
        "EngineCore encountered an issue. See stack trace (above) for the root cause.",
    )


async def _json(request: web.Request) -> object:
    try:
        return json.loads(await request.read())
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {error}") from error
