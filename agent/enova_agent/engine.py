"""Talks to a running engine: is it up, does it generate, what are its figures. Every call has a deadline."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
from dataclasses import dataclass
from typing import Protocol

import aiohttp

CANARY_HEADER = "x-enova-canary"
CANARY_PREFIX = "enova-canary-"
PAGE_BYTES_MAX = 4 << 20
_ANSWER_BYTES_MAX = 1 << 20
_OWN_FAULTS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EADDRNOTAVAIL})


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryAnswer:
    """What the engine counted for a canary: telemetry takes it off again."""

    prompt_tokens: int
    output_tokens: int


class ProbeFailed(Exception):
    """The engine did not answer as a healthy one does; the text says how."""


class NotListening(ProbeFailed):
    """Nobody listens on its port: normal while it starts."""


class ProbeImpossible(Exception):
    """This host cannot ask now (no descriptors, no memory): it says nothing about the engine."""


class EngineProbe(Protocol):
    """A running engine as seen over its HTTP port. Methods raise ProbeFailed and ProbeImpossible."""

    async def health(self, endpoint: str, *, timeout_s: float) -> None:
        """Returns if /health says 200."""
        ...

    async def generate(self, endpoint: str, model: str, *, timeout_s: float) -> CanaryAnswer:
        """Have one token generated."""
        ...

    async def metrics(self, endpoint: str, *, timeout_s: float) -> bytes:
        """The page of /metrics as it is."""
        ...

    async def version(self, endpoint: str, *, timeout_s: float) -> str:
        """The engine's own version."""
        ...

    async def close(self) -> None:
        """Close what is open."""
        ...


class HttpProbe:
    """The probe over aiohttp; connections to an engine are kept, as scrapes come every second."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._numbers = itertools.count(1)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, limit_per_host=8, keepalive_timeout=30.0)
            self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        return self._session

    async def close(self) -> None:
        """See EngineProbe."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def health(self, endpoint: str, *, timeout_s: float) -> None:
        """See EngineProbe."""
        await self._get(f"{endpoint}/health", timeout_s=timeout_s, bytes_max=_ANSWER_BYTES_MAX)

    async def metrics(self, endpoint: str, *, timeout_s: float) -> bytes:
        """See EngineProbe."""
        return await self._get(f"{endpoint}/metrics", timeout_s=timeout_s, bytes_max=PAGE_BYTES_MAX)

    async def version(self, endpoint: str, *, timeout_s: float) -> str:
        """See EngineProbe."""
        url = f"{endpoint}/version"
        try:
            async with asyncio.timeout(timeout_s), self._client().get(url) as response:
                return str(json.loads(await _read(response, _ANSWER_BYTES_MAX))["version"])
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError) as error:
            raise _failure("/version", error) from error

    async def generate(self, endpoint: str, model: str, *, timeout_s: float) -> CanaryAnswer:
        """See EngineProbe."""
        name = f"{CANARY_PREFIX}{os.getpid()}-{next(self._numbers)}"
        body = {"model": model, "prompt": [1], "max_tokens": 1, "ignore_eos": True, "temperature": 0.0}
        headers = {CANARY_HEADER: "1", "x-request-id": name}
        url = f"{endpoint}/v1/completions"
        try:
            async with asyncio.timeout(timeout_s), self._client().post(url, json=body, headers=headers) as response:
                text = await _read(response, _ANSWER_BYTES_MAX)
                if response.status != 200:
                    raise ProbeFailed(f"one token: HTTP {response.status} {text[:200].decode(errors='replace')}")
                usage = json.loads(text)["usage"]
                return CanaryAnswer(
                    prompt_tokens=int(usage["prompt_tokens"]), output_tokens=int(usage["completion_tokens"])
                )
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError) as error:
            raise _failure("one token", error) from error

    async def _get(self, url: str, *, timeout_s: float, bytes_max: int) -> bytes:
        try:
            async with asyncio.timeout(timeout_s), self._client().get(url) as response:
                text = await _read(response, bytes_max)
                if response.status != 200:
                    raise ProbeFailed(f"{url}: HTTP {response.status}")
                return text
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _failure(url, error) from error


async def _read(response: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    """The body, or ProbeFailed once it is over the bound: a length that was announced is not believed."""
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > bytes_max:
            raise ProbeFailed(f"{response.url}: the answer is over {bytes_max} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _failure(what: str, error: BaseException) -> ProbeFailed | ProbeImpossible:
    if isinstance(error, OSError) and error.errno in _OWN_FAULTS:
        return ProbeImpossible(f"{what}: {error}")
    if isinstance(error, aiohttp.ClientConnectorError):
        return NotListening(f"{what}: nobody listens on its port")
    if isinstance(error, TimeoutError):
        return ProbeFailed(f"{what}: no answer in time")
    return ProbeFailed(f"{what}: {type(error).__name__}: {error}")
