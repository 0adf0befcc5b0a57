"""One HTTP listener with bounds: connections, headers, slow senders, and an end that lets requests finish."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.http import RawRequestMessage
from aiohttp.streams import StreamReader

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
BACKLOG = 1024


class Listener:
    """A bound listener; `start` it, then `address` is where it listens."""

    def __init__(
        self, handler: Handler, *, connections_max: int, body_bytes_max: int, keepalive_s: float
    ) -> None:
        self._body_bytes_max = body_bytes_max
        self._server = _BoundedServer(
            handler,
            connections_max=connections_max,
            request_factory=self._request,
            handler_cancellation=True,   # a client that goes away ends its request, and so the engine's work
            access_log=None,
            auto_decompress=False,       # a compressed body could be of any size
            keepalive_timeout=keepalive_s,
            lingering_time=2.0,
        )
        self._runner = web.ServerRunner(self._server, handle_signals=False, shutdown_timeout=0.5)
        self._site: web.TCPSite | None = None
        self.address = ""

    async def start(self, host: str, port: int, *, tls: ssl.SSLContext | None = None) -> None:
        """Listen. Raises OSError if the port is taken."""
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, host or None, port, ssl_context=tls, backlog=BACKLOG)
        await self._site.start()
        bound = self._runner.addresses[0]
        self.address = f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._server.connections)

    async def refuse(self) -> None:
        """Accept nothing more; connections end with the request that they carry."""
        if self._site is not None:
            await self._site.stop()
            self._site = None
        self._server.pre_shutdown()

    async def close(self) -> None:
        """End everything."""
        await self._runner.cleanup()

    def _request(
        self, message: RawRequestMessage, payload: StreamReader, protocol: Any, writer: Any, task: asyncio.Task[None]
    ) -> web.BaseRequest:
        return web.BaseRequest(
            message, payload, protocol, writer, task, asyncio.get_running_loop(), client_max_size=self._body_bytes_max
        )


class _BoundedServer(web.Server):
    """A server that closes connections over its bound as soon as they are made."""

    def __init__(self, handler: Handler, *, connections_max: int, **options: Any) -> None:
        super().__init__(handler, **options)
        self._connections_max = connections_max

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        """Called for each connection that was accepted."""
        super().connection_made(handler, transport)
        if len(self._connections) > self._connections_max:
            transport.abort()
