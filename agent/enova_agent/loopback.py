"""A small HTTP client for the engines of this host: keep-alive, one deadline a call, a bounded body.

The agent asks every engine for /health and /metrics each second. A general client spends more on a request than
the parser does on its page; on the loopback, towards a server that we started, HTTP/1.1 with a known length or
chunks is all that is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from enova_common.errors import TimedOut, TooLarge, Unavailable

BODY_BYTES_MAX = 4 << 20          # a page of metrics has 57 kB; over this something else answers
HEAD_BYTES_MAX = 64 << 10


class NobodyListens(Unavailable):
    """No connection could be made."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Status and body of one answer."""

    status: int
    body: bytes


class LoopbackClient:
    """Calls one server on this host; a connection that the server keeps open is used again by the next GET.

    Raises Unavailable (nobody listens, or the server broke off), TimedOut, or TooLarge.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._idle: _Connection | None = None

    async def get(self, path: str, *, timeout_s: float) -> Answer:
        """GET `path`."""
        request = self._request("GET", path, b"", {})
        connection, self._idle = self._idle, None
        async with _deadline(timeout_s, path):
            if connection is not None and connection.usable:
                try:
                    return await self._exchange(connection, request)
                except Unavailable:
                    # The server may close an idle connection at the instant we use it: that says nothing of it.
                    connection.close()
            return await self._exchange(await self._connect(), request)

    async def post(
        self, path: str, value: object, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """POST `value` as JSON, on a connection of its own, since it must not be sent twice."""
        request = self._request("POST", path, json.dumps(value).encode(), headers or {})
        async with _deadline(timeout_s, path):
            return await self._exchange(await self._connect(), request)

    def close(self) -> None:
        """Closes the idle connection; the client may be used again."""
        if self._idle is not None:
            self._idle.close()
            self._idle = None

    def _request(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}:{self._port}", "Accept: */*"]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {text}" for name, text in headers.items()]
        return "\r\n".join([*lines, "\r\n"]).encode() + body

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            return (await loop.create_connection(_Connection, self._host, self._port))[1]
        except OSError as error:
            raise NobodyListens(f"nobody answers on {self._host}:{self._port}: {error}") from error

    async def _exchange(self, connection: _Connection, request: bytes) -> Answer:
        try:
            answer = await connection.exchange(request)
        except BaseException:
            connection.close()  # half an answer may still come: of no use to the next call
            raise
        if connection.usable and self._idle is None:
            self._idle = connection
        else:
            connection.close()
        return answer


@contextlib.asynccontextmanager
async def _deadline(timeout_s: float, path: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise TimedOut(f"no answer to {path} within {timeout_s:g} s") from error


class _Connection(asyncio.Protocol):
    """One connection: bytes in, at most one answer awaited."""

    def __init__(self) -> None:
        self.usable = False
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._head: _Head | None = None
        self._waiter: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.usable = True

    def exchange(self, request: bytes) -> asyncio.Future[Answer]:
        """Sends a request; the future bears its answer."""
        assert self._transport is not None
        assert self._waiter is None, "one call at a time"
        self._received.clear()
        self._head = None
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._waiter

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._waiter is None or self._waiter.done():
            self.close()  # bytes that nobody asked for
            return
        try:
            self._head = self._head or _head(self._received)
            if self._head is not None:
                self._body_received(self._head, ended=False)
        except (ValueError, IndexError) as error:
            self._fail(Unavailable(f"not an HTTP answer: {error}"))
        except TooLarge as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        if self._waiter is None or self._waiter.done():
            return
        if self._head is not None:
            self._body_received(self._head, ended=True)
        if not self._waiter.done():
            self._fail(Unavailable(f"the server broke off: {exc or 'end of stream'}"))

    def close(self) -> None:
        """Gives the connection up."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    def _body_received(self, head: _Head, *, ended: bool) -> None:
        body: bytes | None
        if head.chunked:
            body = _unchunked(self._received, head.size)
        elif head.length is None:
            body = bytes(self._received[head.size :]) if ended else None
        elif len(self._received) >= head.size + head.length:
            body = bytes(self._received[head.size : head.size + head.length])
        else:
            body = None
        if len(self._received) > BODY_BYTES_MAX + head.size:
            raise TooLarge(f"an answer of more than {BODY_BYTES_MAX} bytes")
        if body is None:
            return
        waiter, self._waiter = self._waiter, None
        self.usable = self.usable and head.keep_alive and not ended
        assert waiter is not None
        waiter.set_result(Answer(head.status, body))

    def _fail(self, error: Exception) -> None:
        self.usable = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)
        if self._transport is not None:
            self._transport.abort()


@dataclass(frozen=True, slots=True)
class _Head:
    status: int
    size: int
    length: int | None
    chunked: bool
    keep_alive: bool


def _head(received: bytearray) -> _Head | None:
    end = received.find(b"\r\n\r\n")
    if end < 0:
        if len(received) > HEAD_BYTES_MAX:
            raise TooLarge(f"headers of more than {HEAD_BYTES_MAX} bytes")
        return None
    first, *rest = bytes(received[:end]).decode("latin-1").split("\r\n")
    version, status = first.split(" ", 2)[:2]
    headers = {name.strip().lower(): value.strip().lower() for name, _, value in (line.partition(":") for line in rest)}
    chunked = "chunked" in headers.get("transfer-encoding", "")
    length = int(headers["content-length"]) if "content-length" in headers and not chunked else None
    if length is not None and not 0 <= length <= BODY_BYTES_MAX:
        raise TooLarge(f"an answer of {length} bytes, over the bound of {BODY_BYTES_MAX}")
    keep_alive = version == "HTTP/1.1" and headers.get("connection") != "close" and (chunked or length is not None)
    return _Head(int(status), end + 4, length, chunked, keep_alive)


def _unchunked(received: bytearray, at: int) -> bytes | None:
    """The body of complete chunks from `at` on, or None while the last is missing."""
    parts: list[bytes] = []
    while True:
        line_end = received.find(b"\r\n", at)
        if line_end < 0:
            return None
        size = int(received[at:line_end].split(b";", 1)[0], 16)
        start = line_end + 2
        if len(received) < start + size + 2:
            return None
        if size == 0:
            return b"".join(parts)
        parts.append(bytes(received[start : start + size]))
        at = start + size + 2
