"""Looks at prompts where a deployment asks for it: their vectors, limits on their answers, and how long those became.

Text goes no further than this module: what is kept of a prompt, until its answer ended, is its vector. How many prompts
are looked at and how many answers are reported each second is bounded; over a bound a prompt has no limit and an answer
is not reported, and both are counted. Of the answers that could be limited, a share is left open, so that the tail of
their lengths stays in sight.
"""

from __future__ import annotations

import base64
import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from enova_agent.core.lengths import Bucket, Kinds, kinds_of
from enova_agent.core.local import LengthSample, LengthsUpdate
from enova_agent.core.model import LengthRules, Route
from enova_agent.ingress.calls import Call, prompt_ends
from enova_agent.ingress.embedding import Embedder
from enova_agent.ingress.upstream import UpstreamError
from enova_common.prompt_vectors import (
    HEAD_CHARACTERS,
    METHOD,
    TAIL_CHARACTERS,
    vectorise,
    vectorise_embedding,
)
from enova_common.records import Outcome

PROMPTS_PER_S = 500.0          # looked at: 0.1 to 0.9 ms each by length, so half a core at the most
BURST_S = 4.0                  # seconds' worth that may come at once
UNSENT_MAX = 256               # answers that wait for the next report
OPEN_SHARE = 0.05              # of the answers that could be limited
CHAT_PATH = "/v1/chat/completions"  # completions without a limit have one of their own in every engine: 16 tokens

_ENDED = frozenset({"stop", "tool_calls", "function_call"})
_STOPPED = "length"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Look:
    """What is kept of one prompt."""

    deployment: str
    method: int
    vector: bytes
    limit: int                 # tokens that its answer is given; 0: none
    samples_per_s: float = 1.0


class Lengths:
    """All deployments' prompts and answers. `draw` gives numbers from 0 up to 1."""

    def __init__(
        self, *, monotonic_s: Callable[[], float], draw: Callable[[], float], embedder: Embedder | None = None
    ) -> None:
        self.skipped: Counter[str] = Counter()
        """What was over a bound or failed, by reason."""
        self._monotonic_s = monotonic_s
        self._draw = draw
        self._embedder = embedder
        self._method = METHOD if embedder is None else embedder.method
        self._prompts = Bucket(PROMPTS_PER_S, PROMPTS_PER_S * BURST_S)
        self._buckets: dict[str, Bucket] = {}
        self._kinds: dict[str, tuple[LengthRules, Kinds | None]] = {}
        self._unsent: deque[LengthSample] = deque(maxlen=UNSENT_MAX)

    async def look(self, route: Route, call: Call, path: str) -> Look | None:
        """What this prompt is like, and the limit that its answer shall have; None if it is not looked at."""
        rules = route.lengths
        if rules is None or call.choices != 1:
            return None
        kinds = self._ready(route.deployment, rules)
        text = prompt_ends(call.value, head=HEAD_CHARACTERS, tail=TAIL_CHARACTERS)
        if kinds is None or not text:
            return None
        if not self._prompts.take(now_s=self._monotonic_s()):
            self.skipped["prompts"] += 1
            return None
        vector = await self._vector(text, kinds)
        if vector is None:
            return None
        limit = self._limit(kinds, vector, call, path)
        return Look(route.deployment, self._method, vector, limit, rules.samples_per_s)

    def ended(self, look: Look, outcome: Outcome, *, finish_reason: str, tokens: int | None) -> None:
        """An answer ended; it is reported if it says something about its length."""
        stopped = finish_reason == _STOPPED
        if outcome is not Outcome.FINISHED or tokens is None or not (stopped or finish_reason in _ENDED):
            return
        bucket = self._buckets.setdefault(look.deployment, Bucket(0.0, 1.0))
        bucket.per_s, bucket.burst = look.samples_per_s, max(1.0, look.samples_per_s * BURST_S)
        if not bucket.take(now_s=self._monotonic_s()):
            self.skipped["samples"] += 1
            return
        self._unsent.append(LengthSample(
            deployment=look.deployment, method=look.method, tokens=tokens, stopped=stopped,
            vector=base64.b64encode(look.vector).decode("ascii"),
        ))

    def take(self) -> LengthsUpdate | None:
        """What is to be reported; None for nothing."""
        if not self._unsent:
            return None
        update = LengthsUpdate(samples=tuple(self._unsent))
        self._unsent.clear()
        return update

    def retain(self, deployments: set[str]) -> None:
        """Forget all others."""
        for kept in (self._buckets, self._kinds):
            for name in kept.keys() - deployments:
                del kept[name]

    def _ready(self, deployment: str, rules: LengthRules) -> Kinds | None:
        known = self._kinds.get(deployment)
        if known is None or known[0] is not rules:
            known = self._kinds[deployment] = (rules, kinds_of(rules, method=self._method))
            if known[1] is None:
                _log.warning("prompts of %s are not looked at: its rules are not understood", deployment)
        return known[1]

    async def _vector(self, text: str, kinds: Kinds) -> bytes | None:
        if self._embedder is None:
            return vectorise(text, kinds.projection)
        try:
            return vectorise_embedding(await self._embedder.embed(text), kinds.projection)
        except UpstreamError as error:
            self.skipped["embedding"] += 1
            _log.debug("a prompt was not embedded: %s", error)
            return None

    def _limit(self, kinds: Kinds, vector: bytes, call: Call, path: str) -> int:
        rules = kinds.rules
        free = rules.apply and path == CHAT_PATH and call.max_tokens is None and rules.method == self._method
        if not free or self._draw() < OPEN_SHARE:
            return 0
        return kinds.limit(kinds.of(vector), prompt_bytes=len(call.body))
