"""The small HTTP client towards engines: keep-alive, deadlines, bounds, servers that break off or talk nonsense."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from enova_agent.loopback import BODY_BYTES_MAX, LoopbackClient, NobodyListens
from enova_common.errors import TimedOut, TooLarge, Unavailable

pytestmark = pytest.mark.network

Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Answers each request by `handler`, which gets the request's head and body."""

    def __init__(self) -> None:
        self.handler: Handler = plain(b"ok")
        self.requests: list[bytes] = []
        self.connections = 0
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> asyncio.Server:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        return server

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._tasks.add(asyncio.get_running_loop().create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while not writer.is_closing():  # until the client goes away, as it may
                head = await reader.readuntil(b"\r\n\r\n")
                length = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
                body = await reader.readexactly(int(length[0].split(b":")[1])) if length else b""
                self.requests.append(head + body)
                await self.handler(head + body, writer)

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def plain(body: bytes, *, headers: bytes = b"", status: bytes = b"200 OK") -> Handler:
    async def answer(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 %s\r\ncontent-length: %d\r\n%s\r\n%s" % (status, len(body), headers, body))

    return answer


def raw(*parts: bytes, close: bool = False) -> Handler:
    async def answer(_: bytes, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.005)  # parts arrive apart, in reads of their own
        if close:
            writer.close()

    return answer


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    listening = await server.start()
    yield server
    listening.close()
    await server.end()
    await listening.wait_closed()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[LoopbackClient]:
    client = LoopbackClient("127.0.0.1", server.port)
    yield client
    client.close()


async def test_gets_share_one_connection(server: Server, client: LoopbackClient) -> None:
    server.handler = plain(b"x" * 300_000)
    for _ in range(5):
        answer = await client.get("/metrics", timeout_s=2.0)
        assert (answer.status, len(answer.body)) == (200, 300_000)
    assert server.connections == 1


async def test_a_post_is_sent_once_with_its_headers(server: Server, client: LoopbackClient) -> None:
    server.handler = plain(b"no", status=b"503 Busy")
    answer = await client.post("/v1/completions", {"a": 1}, timeout_s=2.0, headers={"x-enova-canary": "1"})
    assert (answer.status, answer.body) == (503, b"no")
    assert server.requests[0].endswith(b'\r\n\r\n{"a": 1}')
    assert b"x-enova-canary: 1\r\n" in server.requests[0]
    server.handler = raw(close=True)
    with pytest.raises(Unavailable, match="broke off"):
        await client.post("/v1/completions", {}, timeout_s=2.0)
    assert len(server.requests) == 2


async def test_an_idle_connection_that_was_closed_is_replaced_unseen(server: Server, client: LoopbackClient) -> None:
    async def answer_and_close(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    server.handler = answer_and_close
    for _ in range(4):
        assert (await client.get("/health", timeout_s=2.0)).status == 200


@pytest.mark.parametrize("headers", [b"connection: close\r\n", b"Connection: Close\r\n"])
async def test_a_server_that_closes_is_not_asked_on_the_same_connection(
    server: Server, client: LoopbackClient, headers: bytes
) -> None:
    server.handler = plain(b"a", headers=headers)
    await client.get("/a", timeout_s=2.0)
    await client.get("/b", timeout_s=2.0)
    assert server.connections == 2


async def test_chunks_and_bodies_until_the_end_are_understood(server: Server, client: LoopbackClient) -> None:
    chunks = (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel", b"lo\r\n", b"3;x=y\r\n, w\r\n0\r\n\r\n")
    server.handler = raw(*chunks)
    assert (await client.get("/a", timeout_s=2.0)).body == b"hello, w"
    server.handler = raw(b"HTTP/1.1 200 OK\r\n\r\nto the ", b"end", close=True)
    assert (await client.get("/a", timeout_s=2.0)).body == b"to the end"


async def test_nobody_listens_is_told_apart(server: Server) -> None:
    listening = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    listening.close()
    await listening.wait_closed()
    with pytest.raises(NobodyListens):
        await LoopbackClient("127.0.0.1", port).get("/", timeout_s=1.0)


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (b"HTTP/1.1 200 OK\r\n",),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf",),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhe",),
    ],
)
async def test_an_answer_that_hangs_ends_at_the_deadline_and_the_next_call_is_fresh(
    server: Server, client: LoopbackClient, parts: tuple[bytes, ...]
) -> None:
    server.handler = raw(*parts)
    with pytest.raises(TimedOut):
        await client.get("/metrics", timeout_s=0.1)
    server.handler = plain(b"fresh")
    assert (await client.get("/metrics", timeout_s=2.0)).body == b"fresh"


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", Unavailable),
        (b"\r\n\r\n", Unavailable),
        (b"HTTP/1.1 two\r\n\r\n", Unavailable),
        (b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n", Unavailable),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", Unavailable),
        (b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (BODY_BYTES_MAX + 1), TooLarge),
        (b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n", TooLarge),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000, TooLarge),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"y" * (BODY_BYTES_MAX + 100_000), TooLarge),
    ],
)
async def test_what_is_no_answer_or_too_much_is_refused(
    server: Server, client: LoopbackClient, part: bytes, kind: type[Exception]
) -> None:
    server.handler = raw(part)
    with pytest.raises(kind):
        await client.get("/metrics", timeout_s=5.0)
    server.handler = plain(b"fresh")
    assert (await client.get("/metrics", timeout_s=2.0)).body == b"fresh"
