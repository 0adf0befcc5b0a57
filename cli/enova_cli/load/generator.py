"""Open-loop traffic: each request leaves at its time whether or not the ones before have been answered.

Times are model time: with a scale of K, arrivals come K times as fast and measured times count K times as long.
Prompts are token ids and lengths are forced (`ignore_eos`), so that what is sent is exactly what the trace says.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import aiohttp

from enova_common.traces import PREFIX_TOKENS, TraceRequest

CONNECT_TIMEOUT_S = 5.0
TOKEN_ID_MIN = 10  # below are special tokens in common vocabularies
TOKEN_ID_COUNT = 400  # small enough for any vocabulary
ERROR_TEXT_CHARACTERS = 200


class Outcome(StrEnum):
    """How a request ended for the client."""

    SERVED = "served"
    FAILED = "failed"  # an error in place of an answer
    CUT = "cut"  # broken off after the first byte


@dataclass(slots=True)
class Result:
    """What one request met with. Times in model seconds; `arrival_s` counts from the start of the load."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int = 0
    outcome: Outcome = Outcome.FAILED
    status: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    duration_s: float = 0.0
    error: str = ""
    serving_class: str = ""


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
    results: list[Result] = field(default_factory=list)


async def run_load(
    requests: Iterable[TraceRequest],
    target: Target,
    *,
    progress: Progress | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[Result]:
    """Send every request at its time, wait for all answers, and return one result a request in order of arrival."""
    progress = progress if progress is not None else Progress()
    start = time.monotonic()
    tasks: list[asyncio.Task[Result]] = []
    async with _session(target) as session:
        for request in requests:
            delay = start + request.arrival_s / target.time_scale - time.monotonic()
            if delay > 0:
                await asyncio.sleep(delay)
            if stopped():
                break
            progress.sent += 1
            progress.open += 1
            task = asyncio.create_task(_send(session, target, request, len(tasks)))
            task.add_done_callback(lambda done: _count(progress, done))
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
    trust = ssl.create_default_context(cafile=target.tls_ca) if target.tls_ca else True
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=trust),
        timeout=aiohttp.ClientTimeout(total=target.timeout_s, sock_connect=CONNECT_TIMEOUT_S),
        read_bufsize=1 << 20,
    )


def _count(progress: Progress, done: asyncio.Task[Result]) -> None:
    progress.open -= 1
    if not done.cancelled() and done.exception() is None:
        progress.results.append(done.result())


async def _send(session: aiohttp.ClientSession, target: Target, request: TraceRequest, index: int) -> Result:
    result = Result(
        arrival_s=request.arrival_s, prompt_tokens=request.prompt_tokens, serving_class=request.serving_class
    )
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
            result.status = response.status
            if response.status != 200:
                result.error = (await response.text())[:ERROR_TEXT_CHARACTERS]
            elif target.stream:
                await _read_stream(response, result, start, target.time_scale)
            else:
                usage = (await response.json())["usage"]
                result.output_tokens, result.outcome = usage["completion_tokens"], Outcome.SERVED
    except (aiohttp.ClientError, TimeoutError, json.JSONDecodeError, KeyError) as error:
        result.error = f"{type(error).__name__}: {error}"[:ERROR_TEXT_CHARACTERS]
        result.outcome = Outcome.CUT if result.ttft_s is not None else Outcome.FAILED
    result.duration_s = (time.monotonic() - start) * target.time_scale
    return result


async def _read_stream(response: aiohttp.ClientResponse, result: Result, start: float, scale: float) -> None:
    """Follow the event stream to its end; an error event after the first token means cut."""
    first = last = 0.0
    async for raw in response.content:
        line = raw.strip()
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            result.outcome = Outcome.SERVED if not result.error else result.outcome
            break
        event = json.loads(data)
        if "error" in event:
            result.error = str(event["error"].get("message", ""))[:ERROR_TEXT_CHARACTERS]
            result.outcome = Outcome.CUT if first else Outcome.FAILED
            break
        if event.get("choices"):
            last = time.monotonic()
            first = first or last
        if event.get("usage"):
            result.output_tokens = event["usage"]["completion_tokens"]
    else:
        result.error, result.outcome = "the stream ended without [DONE]", Outcome.CUT
    if first:
        result.ttft_s = (first - start) * scale
        if result.output_tokens > 1:
            result.tpot_s = (last - first) * scale / (result.output_tokens - 1)
