"""An operator's own sentence-embedding model in place of hashed n-grams: one call to /v1/embeddings on this host."""

from __future__ import annotations

import asyncio
import json
import math
import zlib
from typing import Any

from enova_agent.ingress.upstream import Broken, Endpoint, Silent, Upstream
from enova_common.prompt_vectors import HEAD_CHARACTERS, TAIL_CHARACTERS

TIMEOUT_S = 0.25                   # real time that a request waits for its prompt's vector; then it goes on without
ANSWER_BYTES_MAX = 1 << 20
ENTRIES_MAX = 8192
_METHOD_FIRST = 1_000_000          # methods below are enova's own ways of making vectors


class Embedder:
    """Asks one model for embeddings."""

    def __init__(self, upstream: Upstream, *, endpoint: Endpoint, model: str) -> None:
        self.method = _METHOD_FIRST + zlib.crc32(model.encode()) % _METHOD_FIRST
        """Tells its vectors from all others': nodes with the same model make comparable ones."""
        self._upstream = upstream
        self._endpoint = endpoint
        self._model = model

    async def embed(self, text: str) -> list[float]:
        """The embedding of a text. Raises UpstreamError."""
        body = {"model": self._model, "input": text[: HEAD_CHARACTERS + TAIL_CHARACTERS + 1]}
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._ask(json.dumps(body).encode())
        except TimeoutError as error:
            raise Silent(TIMEOUT_S) from error

    async def _ask(self, body: bytes) -> list[float]:
        response = await self._upstream.request(
            self._endpoint, "POST", "/v1/embeddings", headers=(("content-type", "application/json"),), body=body
        )
        with response:
            data = await response.read(ANSWER_BYTES_MAX)
        if response.status != 200:
            raise Broken(f"the embedding model answers {response.status}")
        return _embedding(data)


def _embedding(data: bytes) -> list[float]:
    try:
        value: Any = json.loads(data)["data"][0]["embedding"]
        entries = [float(entry) for entry in value]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise Broken("the embedding model's answer is not one of /v1/embeddings") from error
    if not 0 < len(entries) <= ENTRIES_MAX or not all(map(math.isfinite, entries)):
        raise Broken(f"an embedding of {len(entries)} entries, or of some that are no number")
    return entries
