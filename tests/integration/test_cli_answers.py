"""What the command says where answers end badly or options cannot be used: one line with what to do, no stack."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from aiohttp import web

from enova_testing.fleet import run_enova

pytestmark = [pytest.mark.network]

FIRST = b'data: {"choices": [{"delta": {"content": "well"}}]}\n\n'
CUT = b'data: {"error": {"message": "the engine ended", "type": "server_error", "code": "stream_cut"}}\n\n'


@contextmanager
def ingress(answer: bytes) -> Iterator[str]:
    """An OpenAI address whose chat streams `answer` and closes; its base URL."""
    started, loop, address = threading.Event(), asyncio.new_event_loop(), []

    async def chat(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(answer)
        return response

    async def serve() -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", chat)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        address.append(f"http://{host}:{port}/v1")
        started.set()
        return runner

    def run() -> None:
        runner = loop.run_until_complete(serve())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(10)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@pytest.mark.parametrize(
    ("answer", "said"),
    [(FIRST + CUT, "the engine ended"), (FIRST, "broke off"), (b"data: {oops\n\n", "no answer")],
)
def test_an_answer_that_ends_badly_is_an_error_and_not_the_whole_answer(answer: bytes, said: str) -> None:
    with ingress(answer) as url:
        result = run_enova("chat", "m", "hello", "--url", url)
    assert result.code == 3
    assert said in result.err
    assert len(result.err.strip().splitlines()) == 1


@pytest.mark.parametrize("option", ["--engine-command", "--engine-args"])
def test_an_open_quote_in_the_engines_words_names_the_option(option: str, tmp_path: Path) -> None:
    result = run_enova("up", "--data-dir", str(tmp_path / "data"), option, "python 'oops", "-o", "json")
    assert result.code == 1
    assert result.error["field"] == option
    assert not (tmp_path / "data").exists()


def test_a_missing_ca_file_is_named(tmp_path: Path) -> None:
    result = run_enova("chat", "m", "hello", "--url", "https://127.0.0.1:1/v1", "--ca", str(tmp_path / "none.crt"))
    assert result.code == 1
    assert "none.crt" in result.err
    assert "Traceback" not in result.err
