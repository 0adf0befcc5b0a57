"""A program that answers as an engine which serves the captured exposition, its counters moving; nothing is behind it.

It takes vLLM's command line, of which it reads --host and --port, and serves /health, /metrics, /version and
POST /v1/completions, as cheaply as Python can: what is measured beside it is the agent.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "fixtures" / "vllm_metrics.txt"
# Tokens and iterations move with each scrape, so that the engine looks busy and well.
MOVING = (
    b"vllm:generation_tokens_total{",
    b"vllm:iteration_tokens_total_bucket{",
    b"vllm:iteration_tokens_total_count{",
)


class Page:
    """The captured page with counters that move."""

    def __init__(self, page: bytes) -> None:
        self._lines = page.split(b"\n")
        self._moving = [index for index, line in enumerate(self._lines) if line.startswith(MOVING)]
        self._first = [self._lines[index].rpartition(b" ") for index in self._moving]
        self._scrapes = 0

    def next(self) -> bytes:
        """The page of the next scrape."""
        self._scrapes += 1
        for index, (series, _, value) in zip(self._moving, self._first, strict=True):
            self._lines[index] = b"%s %.1f" % (series, float(value) + 100 * self._scrapes)
        return b"\n".join(self._lines)


class Connection(asyncio.Protocol):
    """One keep-alive connection."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = self._received[: end + 4]
            length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            size = end + 4 + (int(length[1]) if length else 0)
            if len(self._received) < size:
                return
            self._received = self._received[size:]
            self._answer(head.split(b" ", 2)[1])

    def _answer(self, path: bytes) -> None:
        assert self._transport is not None
        kind = b"application/json"
        if path == b"/metrics":
            kind, body = b"text/plain; version=1.0.0; charset=utf-8", self._page.next()
        elif path == b"/v1/completions":
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            body = json.dumps({"choices": [{"text": "x", "finish_reason": "length"}], "usage": usage}).encode()
        else:
            body = b'{"version":"0.32.0"}' if path == b"/version" else b""
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n" % (kind, len(body)) + body
        )


async def _serve(host: str, port: int) -> None:
    page = Page(PAGE.read_bytes())
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    server = await loop.create_server(lambda: Connection(page), host, port)
    await stop.wait()
    server.close()


if __name__ == "__main__":
    words = dict(zip(sys.argv, sys.argv[1:], strict=False))
    asyncio.run(_serve(words["--host"], int(words["--port"])))
