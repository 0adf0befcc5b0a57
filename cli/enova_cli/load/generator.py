"""Open-loop traffic: each request leaves at its time whether or not the ones before have been answered.

Times are model time: with a scale of K, arrivals come K times as fast and measured times count K times as long.
Prompts are token ids and lengths are forced (`ignore_eos`), so that what is sent is exactly what the trace says.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus

import aiohttp

from enova_cli.endpoint import trust
from enova_common.records import Outcome, RequestRecord
from enova_common.traces import PREFIX_TOKENS, TraceRequest

CONNECT_TIMEOUT_S = 5.0
TOKEN_ID_MIN = 10  # below are special tokens in common vocabularies
TOKEN_ID_COUNT = 400  # small enough for any vocabulary
ERROR_TEXT_CHARACTERS = 200
REFUSALS = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})


@dataclass(slots=True)
class _Answer:
    """What an answer turned out to be, while it is read. Times on the monotonic clock; 0 = not yet."""

    outcome: Outcome = Outcome.FAILED
    status: int = 0
    output_tokens: int | None = None
    first: float = 0.0
    last: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where the load goes. `url` is the OpenAI base URL, .../v1; `time_scale` is the model clock's."""

    url: str
    model: str
    time_scale: float = 1.0
    stream: bool = True
    timeout_s: float = 600.0  # real time, a request
    tls_ca: str = ""


@dataclass(slots=True)
class Progress:
    """Counts of a running load, for a live view."""

    sent: int = 0
    open: int = 0
    results: list[RequestRecord] = field(default_factory=list)


async def run_load(
    requests: Iterable[TraceRequest],
    target: Target,
    *,
    progress: Progress | None = None,
    stopped: Callable[[], bool] = lambda: False,
    open_max: int | None = None,
) -> list[RequestRecord]:
    """Send every request at its time, wait for all answers, and return one record a request in order of arrival.

    With `open_max` a request whose time has come waits until fewer than so many are open; it arrives when it leaves.
    """
    progress = progress if progress is not None else Progress()
    room = asyncio.Semaphore(open_max if open_max is not None else sys.maxsize)
    start = time.monotonic()
    tasks: list[asyncio.Task[RequestRecord]] = []
    async with _session(target) as session:
        for request in requests:
            delay = start + request.arrival_s / target.time_scale - time.monotonic()
            if delay > 0:
                await asyncio.sleep(delay)
            await room.acquire()
            if stopped():
                break
            now_s = (time.monotonic() - start) * target.time_scale
            sent = replace(request, arrival_s=now_s) if open_max is not None else request
            progress.sent += 1
            progress.open += 1
            task = asyncio.create_task(_send(session, target, sent, len(tasks)))
            task.add_done_callback(lambda done: _count(progress, done))
            task.add_done_callback(lambda _: room.release())
            tasks.append(task)
        return list(await asyncio.gather(*tasks))


def prompt_ids(request: TraceRequest, index: int) -> Sequence[int]:
    """Token ids of the request's length; equal prefix ids give equal blocks, the rest differs by `index`."""
    ids: list[int] = []
    for prefix in request.prefix_ids:
        seed = sum(prefix.encode())
        ids.extend(TOKEN_ID_MIN + (seed + 7 * i) % TOKEN_ID_COUNT for i in range(PREFIX_TOKENS))
    ids.extend(TOKEN_ID_MIN + (index * 31 + 11 * i) % TOKEN_ID_COUNT for i in range(request.prompt_tokens - len(ids)))
    return ids[: request.prompt_tokens]


def _session(target: Target) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=trust(target.tls_ca)),
        timeout=aiohttp.ClientTimeout(total=target.timeout_s, sock_connect=CONNECT_TIMEOUT_S),
        read_bufsize=1 << 20,
    )


def _count(progress: Progress, done: asyncio.Task[RequestRecord]) -> None:
    progress.open -= 1
    if not done.cancelled() and done.exception() is None:
        progress.results.append(done.result())


async def _send(session: aiohttp.ClientSession, target: Target, request: TraceRequest, index: int) -> RequestRecord:
    answer = _Answer()
    body = {
        "model": target.model,
        "prompt": prompt_ids(request, index),
        "max_tokens": request.output_tokens,
        "ignore_eos": True,
        "stream": target.stream,
    }
    if target.stream:
        body["stream_options"] = {"include_usage": True}
    headers = {"x-enova-class": request.serving_class} if request.serving_class else {}
    start = time.monotonic()
    try:
        async with session.post(f"{target.url}/completions", json=body, headers=headers) as response:
            answer.status = response.status
            if response.status != HTTPStatus.OK:
                answer.reason = (await response.text())[:ERROR_TEXT_CHARACTERS]
                answer.outcome = Outcome.REFUSED if response.status in REFUSALS else Outcome.FAILED
            elif target.stream:
                await _read_stream(response, answer)
            else:
                answer.output_tokens = (await response.json())["usage"]["completion_tokens"]
                answer.outcome = Outcome.FINISHED
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
        answer.reason = f"{type(error).__name__}: {error}"[:ERROR_TEXT_CHARACTERS]
        answer.outcome = Outcome.CUT if answer.first else Outcome.FAILED
    return _record(request, target, answer, start=start, end=time.monotonic())


def _record(request: TraceRequest, target: Target, answer: _Answer, *, start: float, end: float) -> RequestRecord:
    ttft = (answer.first - start) * target.time_scale if answer.first else None
    tpot = None
    if answer.first and (answer.output_tokens or 0) > 1:
        assert answer.output_tokens is not None
        tpot = (answer.last - answer.first) * target.time_scale / (answer.output_tokens - 1)
    return RequestRecord(
        arrival_s=request.arrival_s,
        outcome=answer.outcome,
        served_name=target.model,
        serving_class=request.serving_class,
        stream=target.stream,
        status=answer.status,
        reason=answer.reason,
        prompt_tokens=request.prompt_tokens,
        output_tokens=answer.output_tokens,
        max_tokens=request.output_tokens,
        ttft_s=ttft,
        tpot_s=tpot,
        duration_s=(end - start) * target.time_scale,
    )


async def _read_stream(response: aiohttp.ClientResponse, answer: _Answer) -> None:
    """Follow the event stream to its end; an error event after the first token means cut."""
    async for raw in response.content:
        line = raw.strip()
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            answer.outcome = Outcome.FINISHED
            return
        event = json.loads(data)
        if "error" in event:
            answer.reason = str(event["error"].get("message", ""))[:ERROR_TEXT_CHARACTERS]
            answer.outcome = Outcome.CUT if answer.first else Outcome.FAILED
            return
        if event.get("choices"):
            answer.last = time.monotonic()
            answer.first = answer.first or answer.last
        if event.get("usage"):
            answer.output_tokens = event["usage"]["completion_tokens"]
    answer.reason, answer.outcome = "the stream ended without [DONE]", Outcome.CUT
