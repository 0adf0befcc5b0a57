"""An upstream that behaves as it is told: what real engines do when they are well, full, ending or dying.

It answers OpenAI requests with `tokens` pieces. `behaviour` may be changed while it runs. It counts what it
saw, so that tests can assert that a request arrived once, or that a cancellation did.
"""

from __future__ import annotations

import asyncio
import json
from enum import StrEnum
from typing import Any, Self

from aiohttp import web

BUSY = "The engine is currently busy and cannot accept new requests."


class Behaviour(StrEnum):
    """What the engine does with a request."""

    WELL = "WELL"
    BUSY_503 = "BUSY_503"              # vLLM over --max-num-queued-reqs
    BUSY_IN_STREAM = "BUSY_IN_STREAM"  # the same in a burst: 200, then an error event
    DRAINING_500 = "DRAINING_500"      # vLLM after SIGTERM with --shutdown-timeout
    BAD_REQUEST = "BAD_REQUEST"        # the application's fault
    RESET = "RESET"                    # the process dies before it answers
    CUT = "CUT"                        # it dies in the middle of a stream
    ENDS_EARLY = "ENDS_EARLY"          # the stream ends in good order, but before its end marker
    HANG = "HANG"                      # never a byte
    STALL = "STALL"                    # a token, then nothing
    LINGERS = "LINGERS"                # after the end marker the answer stays open for a while
    PREFILL = "PREFILL"                # the head of a stream at once, as vLLM does, its first token only when released


class ScriptedEngine:
    """One engine on a port of its own, as an async context manager."""

    def __init__(self, *, tokens: int = 5, gap_s: float = 0.0, behaviour: Behaviour = Behaviour.WELL) -> None:
        self.tokens = tokens
        self.gap_s = gap_s
        self.behaviour = behaviour
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.peers: set[tuple[str, int]] = set()  # one for each connection that carried a request
        self.open = 0
        self.cancelled = 0
        self.release = asyncio.Event()  # set: answers flow; clear: streams wait after their first token
        self.release.set()
        self._server = web.Server(self._handle, access_log=None, handler_cancellation=True)
        self._runner = web.ServerRunner(self._server, shutdown_timeout=0.1)
        self.url = ""

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def die(self) -> None:
        """End as SIGKILL ends a process: connections break, the port refuses."""
        for handler in self._server.connections:
            if handler.transport is not None:
                handler.transport.abort()
        await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = json.loads(await request.read())
        assert request.transport is not None
        self.peers.add(request.transport.get_extra_info("peername"))
        self.bodies.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.open += 1
        try:
            return await self._answer(request, body)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.open -= 1

    async def _answer(self, request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
        match self.behaviour:
            case Behaviour.BUSY_503:
                return web.json_response({"error": {"message": BUSY, "code": 503}}, status=503)
            case Behaviour.DRAINING_500:
                return web.json_response({"error": {"message": "Internal Server Error", "code": 500}}, status=500)
            case Behaviour.BAD_REQUEST:
                error = {"message": "max_tokens is too large", "type": "BadRequestError", "code": 400}
                return web.json_response({"error": error}, status=400)
            case Behaviour.RESET:
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            case Behaviour.HANG:
                await asyncio.Event().wait()
        if body.get("stream"):
            return await self._stream(request, body)
        await self.release.wait()
        await asyncio.sleep(self.gap_s * self.tokens)
        usage = {"prompt_tokens": 7, "completion_tokens": self.tokens, "total_tokens": 7 + self.tokens}
        text = "".join(f"t{i} " for i in range(self.tokens))
        choice = _choice(request.path, text, "length", whole=True)
        return web.json_response({
            "id": "cmpl-1", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [choice], "usage": usage,
        })

    async def _stream(self, request: web.BaseRequest, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        if self.behaviour is Behaviour.BUSY_IN_STREAM:
            error = {"error": {"message": BUSY, "type": "Service Unavailable", "code": 503}}
            await response.write(_event(error) + b"data: [DONE]\n\n")
            return response
        if self.behaviour is Behaviour.PREFILL:
            await self.release.wait()
        base = {"id": "cmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
        for number in range(self.tokens):
            finish = "length" if number == self.tokens - 1 else None
            await response.write(_event({**base, "choices": [_choice(request.path, f"t{number} ", finish)]}))
            if self.behaviour is Behaviour.STALL:
                await asyncio.Event().wait()
            if self.behaviour is Behaviour.CUT and number == 1:
                assert request.transport is not None
                request.transport.abort()
                return response
            if self.behaviour is Behaviour.ENDS_EARLY and number == 1:
                return response
            await self.release.wait()
            if self.gap_s:
                await asyncio.sleep(self.gap_s)
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 7, "completion_tokens": self.tokens, "total_tokens": 7 + self.tokens}
            await response.write(_event({**base, "choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")
        if self.behaviour is Behaviour.LINGERS:
            await asyncio.Event().wait()
        return response


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def _choice(path: str, text: str, finish: str | None, *, whole: bool = False) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
    if not path.endswith("chat/completions"):
        return {**choice, "text": text}
    return {**choice, ("message" if whole else "delta"): {"role": "assistant", "content": text}}
