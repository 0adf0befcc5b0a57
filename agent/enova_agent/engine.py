"""Talks to a running engine: is it up, does it generate, what are its figures. Every call has a deadline."""

from __future__ import annotations

import errno
import itertools
import json
import os
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from enova_agent.loopback import LoopbackClient, NobodyListens
from enova_common.errors import EnovaError, TimedOut

CANARY_HEADER = "x-enova-canary"
CANARY_PREFIX = "enova-canary-"
_CLIENTS_MAX = 128
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
    """The probe over HTTP on the loopback; a connection to an engine is kept, as scrapes come every second."""

    def __init__(self) -> None:
        self._clients: dict[str, LoopbackClient] = {}
        self._numbers = itertools.count(1)

    async def close(self) -> None:
        """See EngineProbe."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    async def health(self, endpoint: str, *, timeout_s: float) -> None:
        """See EngineProbe."""
        await self._get(endpoint, "/health", timeout_s=timeout_s)

    async def metrics(self, endpoint: str, *, timeout_s: float) -> bytes:
        """See EngineProbe."""
        return await self._get(endpoint, "/metrics", timeout_s=timeout_s)

    async def version(self, endpoint: str, *, timeout_s: float) -> str:
        """See EngineProbe."""
        text = await self._get(endpoint, "/version", timeout_s=timeout_s)
        try:
            return str(json.loads(text)["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise ProbeFailed(f"/version: {type(error).__name__}: {error}") from error

    async def generate(self, endpoint: str, model: str, *, timeout_s: float) -> CanaryAnswer:
        """See EngineProbe."""
        name = f"{CANARY_PREFIX}{os.getpid()}-{next(self._numbers)}"
        body = {"model": model, "prompt": [1], "max_tokens": 1, "ignore_eos": True, "temperature": 0.0}
        headers = {CANARY_HEADER: "1", "x-request-id": name}
        try:
            answer = await self._client(endpoint).post("/v1/completions", body, timeout_s=timeout_s, headers=headers)
        except EnovaError as error:
            raise _failure("one token", error) from error
        if answer.status != 200:
            raise ProbeFailed(f"one token: HTTP {answer.status} {answer.body[:200].decode(errors='replace')}")
        try:
            usage = json.loads(answer.body)["usage"]
            return CanaryAnswer(
                prompt_tokens=int(usage["prompt_tokens"]), output_tokens=int(usage["completion_tokens"])
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ProbeFailed(f"one token: {type(error).__name__}: {error}") from error

    async def _get(self, endpoint: str, path: str, *, timeout_s: float) -> bytes:
        try:
            answer = await self._client(endpoint).get(path, timeout_s=timeout_s)
        except EnovaError as error:
            raise _failure(path, error) from error
        if answer.status != 200:
            raise ProbeFailed(f"{path}: HTTP {answer.status}")
        return answer.body

    def _client(self, endpoint: str) -> LoopbackClient:
        client = self._clients.get(endpoint)
        if client is None:
            if len(self._clients) >= _CLIENTS_MAX:  # ports of engines that are gone; living ones connect anew
                for idle in self._clients.values():
                    idle.close()
                self._clients.clear()
            address = urlsplit(endpoint)
            client = self._clients[endpoint] = LoopbackClient(address.hostname or "127.0.0.1", address.port or 80)
        return client


def _failure(what: str, error: EnovaError) -> ProbeFailed | ProbeImpossible:
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno in _OWN_FAULTS:
        return ProbeImpossible(f"{what}: {cause}")
    if isinstance(error, NobodyListens):
        return NotListening(f"{what}: nobody listens on its port")
    if isinstance(error, TimedOut):
        return ProbeFailed(f"{what}: no answer in time")
    return ProbeFailed(f"{what}: {error}")
