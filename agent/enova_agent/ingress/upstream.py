"""A lean HTTP/1.1 client for engines and hops: pooled connections, bodies as they arrive, blame in the error.

Theory of operation. One `_Connection` (an asyncio protocol around httptools' parser) carries one exchange at a
time. What arrives is handed out by `Response.chunk()` in whatever pieces the network made, joined only if they
piled up; over `BUFFERED_BYTES_MAX` the socket is not read, so a slow client slows the engine's stream and
nothing grows. One lazy timer per exchange enforces the limits on silence. The errors say what may have happened
at the other end, since that decides whether the request may be tried elsewhere. (Why not aiohttp's client: a bare
proxy costs a quarter less CPU a request with this one, and it can say whether anything was sent: docs/ingress.md.)
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, cast
from urllib.parse import urlsplit

import httptools

BUFFERED_BYTES_MAX = 256 * 1024
HEAD_BYTES_MAX = 64 * 1024       # of an answer's status line and headers
IDLE_CONNECTION_S = 2.5          # uvicorn, vLLM's server, closes idle connections after 5 s
IDLE_CONNECTIONS_MAX = 512       # per endpoint
CONNECT_SLICES = 5
SMALL_BODY_BYTES = 48 * 1024     # fits every receive buffer: a host that lives acknowledges it though no program reads

_THIS_HOST = frozenset({"127.0.0.1", "::1", "localhost"})


class UpstreamError(Exception):
    """The exchange failed."""


class Unreachable(UpstreamError):
    """No connection: nothing was sent."""


class Broken(UpstreamError):
    """The connection ended before the answer did; the other end may have worked on the request."""


class Silent(UpstreamError):
    """Nothing came for as long as was allowed."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"no byte for {limit_s:g} s")
        self.limit_s = limit_s


class WrongPeer(Unreachable):
    """Whoever answered there is not who should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long an exchange may take where nothing happens. Real time."""

    connect_s: float = 0.5
    first_byte_s: float = 1800.0    # a prompt may wait and be read for minutes
    idle_s: float = 120.0           # between two pieces of an answer
    unacknowledged_s: float = 1.0   # a request to another host, unless it is large: then ten times as long


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to connect. `peer` is the URI that the certificate of the other end must bear, if TLS is used."""

    host: str
    port: int
    tls: ssl.SSLContext | None = field(default=None, compare=True)
    peer: str = ""


def endpoint_of_url(url: str, *, tls: ssl.SSLContext | None = None, peer: str = "") -> Endpoint:
    """The endpoint of an http or https URL, or of host:port. Raises ValueError."""
    parts = urlsplit(url if "://" in url else f"//{url}")
    if not parts.hostname or not parts.port:
        raise ValueError(f"{url!r} is not host:port")
    if parts.scheme == "https" and tls is None:
        raise ValueError(f"{url!r} needs TLS and none is set up")
    return Endpoint(parts.hostname, parts.port, None if parts.scheme == "http" else tls, peer)


def request_head(method: str, path: str, headers: Iterable[tuple[str, str]], *, host: str, body_bytes: int) -> bytes:
    """The bytes of a request up to its body. Header values were parsed from a request: they hold no line breaks."""
    lines = [f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {body_bytes}\r\n"]
    lines.extend(f"{name}: {value}\r\n" for name, value in headers)
    lines.append("\r\n")
    return "".join(lines).encode("latin-1", "replace")


class Response:
    """An answer whose head has arrived. Read it to the end or `close()` it; a context manager does the latter."""

    def __init__(self, connection: _Connection, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.headers = headers  # names in lower case
        self._connection = connection

    async def chunk(self) -> bytes:
        """What has arrived since the last call, waiting for at least one byte; b"" at the end of the body."""
        return await self._connection.chunk()

    async def read(self, limit_bytes: int) -> bytes:
        """The whole body. Raises Broken if it is over the limit."""
        parts: list[bytes] = []
        size = 0
        while piece := await self.chunk():
            size += len(piece)
            if size > limit_bytes:
                self.close()
                raise Broken(f"an answer of more than {limit_bytes} bytes")
            parts.append(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Give up what is left of the answer: the other end sees the connection close."""
        self._connection.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Upstream:
    """A pool of connections. One per program; used from one event loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._idle: dict[Endpoint, list[_Connection]] = {}
        self._open: set[_Connection] = set()

    async def request(
        self,
        endpoint: Endpoint,
        method: str,
        path: str,
        *,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        on_bytes: Callable[[], None] | None = None,
    ) -> Response:
        """Send a request and return its answer once the head is there. Raises an UpstreamError."""
        head = request_head(method, path, headers, host=f"{endpoint.host}:{endpoint.port}", body_bytes=len(body))
        while True:
            connection = self._take_idle(endpoint)
            reused = connection is not None
            if connection is None:
                connection = await self._connect(endpoint)
            try:
                return await connection.exchange(head, body, self.limits, on_bytes)
            except Broken:
                # A server may close an idle connection in the instant in which it is used again.
                if not reused or connection.heard:
                    raise
            except BaseException:
                connection.abort()
                raise

    def close(self) -> None:
        """Close every connection, those in use included."""
        for connection in tuple(self._open):
            connection.abort()
        self._idle.clear()

    def sweep(self) -> None:
        """Close connections that were idle for too long; called now and then."""
        now = asyncio.get_running_loop().time()
        for endpoint, idle in tuple(self._idle.items()):
            fresh = []
            for connection in idle:
                if connection.usable and now - connection.idle_since_s < IDLE_CONNECTION_S:
                    fresh.append(connection)
                else:
                    connection.abort()
            if fresh:
                self._idle[endpoint] = fresh
            else:
                del self._idle[endpoint]

    def _take_idle(self, endpoint: Endpoint) -> _Connection | None:
        idle = self._idle.get(endpoint)
        now = asyncio.get_running_loop().time()
        while idle:
            connection = idle.pop()
            if connection.usable and now - connection.idle_since_s < IDLE_CONNECTION_S:
                return connection
            connection.abort()
        return None

    async def _connect(self, endpoint: Endpoint) -> _Connection:
        loop = asyncio.get_running_loop()
        connecting = loop.create_task(loop.create_connection(
            lambda: _Connection(self, endpoint), endpoint.host, endpoint.port,
            ssl=endpoint.tls, server_hostname=endpoint.host if endpoint.tls else None,
        ))
        taken = False
        try:
            await self._in_time(connecting)
            _, connection = await connecting
            taken = True
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            raise Unreachable(f"{endpoint.host}:{endpoint.port}: {error}") from error
        finally:
            if not taken:
                connecting.add_done_callback(_abandoned)
                connecting.cancel()
        connection.check_peer()
        return connection

    async def _in_time(self, connecting: asyncio.Task[tuple[asyncio.Transport, _Connection]]) -> None:
        """Wait for a connection. The time counts in slices: a loop that was late has not given the peer its time."""
        for _ in range(CONNECT_SLICES):
            done, _ = await asyncio.wait((connecting,), timeout=self.limits.connect_s / CONNECT_SLICES)
            if done:
                return
        raise TimeoutError(f"no connection within {self.limits.connect_s:g} s")

    def opened(self, connection: _Connection) -> None:
        """A connection is open (called by it)."""
        self._open.add(connection)

    def lost(self, connection: _Connection) -> None:
        """A connection is closed (called by it)."""
        self._open.discard(connection)

    def released(self, connection: _Connection) -> None:
        """An exchange ended and its connection may carry another (called by it)."""
        idle = self._idle.setdefault(connection.endpoint, [])
        if len(idle) < IDLE_CONNECTIONS_MAX:
            idle.append(connection)
        else:
            connection.abort()


class _Connection(asyncio.Protocol):
    """One connection: at most one exchange at a time. The names on_* are those that httptools calls."""

    def __init__(self, pool: Upstream, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.idle_since_s = 0.0
        self.heard = False                # a byte of the current answer has come
        self._begun = False               # so has one of its body; vLLM sends a stream's head before the prompt is read
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._busy = False
        self._limits = pool.limits
        self._on_bytes: Callable[[], None] | None = None
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._head_done = False
        self._body_done = False
        self._reusable = False
        self._unacknowledged_s = 0.0
        self._parts: list[bytes] = []
        self._parts_bytes = 0
        self._paused = False
        self._error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._last_byte_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    # The exchange

    @property
    def usable(self) -> bool:
        """It may carry another exchange."""
        return self._transport is not None and not self._busy and not self._transport.is_closing()

    async def exchange(
        self, head: bytes, body: bytes, limits: Limits, on_bytes: Callable[[], None] | None
    ) -> Response:
        """Send one request, wait for the head of its answer."""
        assert self._transport is not None
        assert not self._busy
        self._busy, self.heard, self._begun = True, False, False
        self._parser = httptools.HttpResponseParser(self)
        self._limits, self._on_bytes = limits, on_bytes
        self._headers, self._head_bytes = {}, 0
        self._head_done = self._body_done = self._reusable = False
        self._error = None
        self._bound_unacknowledged(limits.unacknowledged_s * (1 if len(body) <= SMALL_BODY_BYTES else 10))
        self._last_byte_s = self._loop.time()
        self._timer = self._loop.call_later(limits.first_byte_s, self._check_silence)
        if len(body) < 16384:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))
        while not self._head_done:
            if self._error is not None:
                raise self._error
            await self._wait()
        return Response(self, self._parser.get_status_code(), self._headers)

    async def chunk(self) -> bytes:
        """See Response.chunk."""
        while not self._parts:
            if self._error is not None:
                raise self._error
            if self._body_done:
                self._release()
                return b""
            await self._wait()
        parts = self._parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self._parts_bytes = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    def abandon(self) -> None:
        """The exchange is of no more interest: reuse the connection if the answer is complete, close it if not."""
        if not self._busy:
            return
        if self._body_done and self._error is None:
            self._parts.clear()
            self._parts_bytes = 0
            self._release()
        else:
            self.abort()

    def abort(self) -> None:
        """Close now; whoever waits is told."""
        self._stop_timer()
        if self._transport is not None:
            self._transport.abort()

    def check_peer(self) -> None:
        """Raise WrongPeer unless the certificate of the other end bears the URI that the endpoint names."""
        if not self.endpoint.peer:
            return
        assert self._transport is not None
        if self.endpoint.peer not in certificate_uris(self._transport):
            self.abort()
            raise WrongPeer(f"the peer at {self.endpoint.host}:{self.endpoint.port} is not {self.endpoint.peer}")

    def _bound_unacknowledged(self, limit_s: float) -> None:
        """Let the kernel end the connection when a host that is gone acknowledges nothing; this host is not gone."""
        if self._unacknowledged_s == limit_s or self.endpoint.host in _THIS_HOST:
            return
        assert self._transport is not None
        self._unacknowledged_s = limit_s
        sock = self._transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limit_s * 1000))

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _release(self) -> None:
        if not self._busy:
            return
        self._stop_timer()
        self._busy = False
        self._on_bytes = None
        if self._transport is None or self._transport.is_closing():
            return
        if self._reusable:
            self.idle_since_s = self._loop.time()
            self._pool.released(self)
        else:
            self._transport.close()

    def _fail(self, error: UpstreamError) -> None:
        if self._error is None:
            self._error = error
        self._wake()

    def _check_silence(self) -> None:
        limit_s = self._limits.idle_s if self._begun else self._limits.first_byte_s
        if self._parts or self._paused:  # it is the client that is slow
            self._last_byte_s = self._loop.time()
        left_s = self._last_byte_s + limit_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(max(left_s, 0.01), self._check_silence)
            return
        self._timer = None
        self._fail(Silent(limit_s))
        self.abort()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its bases
        self._pool.opened(self)

    def data_received(self, data: bytes) -> None:
        if not self._busy:  # an answer without a question, or a notice before closing: not to be trusted further
            self.abort()
            return
        self.heard = True
        self._last_byte_s = self._loop.time()
        if self._on_bytes is not None:
            self._on_bytes()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(Broken(f"not an HTTP/1.1 answer: {error}"))
            self.abort()
            return
        if self._parts_bytes > BUFFERED_BYTES_MAX and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _reschedule_for_idle(self) -> None:
        self._stop_timer()
        self._timer = self._loop.call_later(self._limits.idle_s, self._check_silence)

    def eof_received(self) -> None:
        if self._busy and self._head_done and not self._body_done and self._ends_with_connection():
            self._body_done = True
            self._wake()

    def _ends_with_connection(self) -> bool:
        return "content-length" not in self._headers and "chunked" not in self._headers.get("transfer-encoding", "")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._transport = None
        self._pool.lost(self)
        if self._busy and not self._body_done:
            self._fail(Broken(f"the connection ended before the answer did{f': {exc}' if exc else ''}"))

    # httptools

    def on_message_begin(self) -> None:
        """A message begins: after a complete one, that is an answer too many."""
        if self._body_done:
            self._fail(Broken("a second answer to one request"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header of the answer, or of its trailer."""
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > HEAD_BYTES_MAX:
            raise _HeadTooLarge
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The head is complete; an interim answer (1xx) is followed by the real one."""
        if self._parser.get_status_code() >= 200:
            self._head_done = True
            self._wake()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if not self._begun:
            self._begun = True
            self._reschedule_for_idle()
        self._parts.append(body)
        self._parts_bytes += len(body)
        self._wake()

    def on_message_complete(self) -> None:
        """The answer is complete."""
        if self._head_done:
            self._body_done = True
            self._reusable = self._parser.should_keep_alive()  # the parser forgets it with the next byte
            self._wake()
        else:
            self._headers = {}


def _abandoned(connecting: asyncio.Task[tuple[asyncio.Transport, _Connection]]) -> None:
    """Nobody waits for this connection any more: close it if it was made all the same."""
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result()[1].abort()


class _HeadTooLarge(Exception):
    """An answer's headers are over the bound."""

    def __str__(self) -> str:
        return f"headers of more than {HEAD_BYTES_MAX} bytes"


def certificate_uris(transport: asyncio.BaseTransport) -> tuple[str, ...]:
    """The URIs that the verified certificate of a connection's other end bears; empty without one."""
    certificate: Mapping[str, Any] = {}
    with contextlib.suppress(ValueError):  # the handshake is not done: then there is no certificate to trust
        tls = transport.get_extra_info("ssl_object")
        certificate = (tls.getpeercert() if tls is not None else None) or {}
    return tuple(value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI")
