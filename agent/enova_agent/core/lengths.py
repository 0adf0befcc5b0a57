"""Limits on answers where the client gives none: to which kind a prompt belongs, and which limit follows; pure."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

from enova_agent.core.model import LengthRules
from enova_common.prompt_vectors import Projection, entries_of

TEMPLATE_TOKENS = 512      # that a chat template may add around a prompt
NO_KIND = -1


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of prompt, as it is compared with."""

    direction: tuple[float, ...]   # of length one
    reach: float
    limit: int                     # tokens; 0: none


@dataclass(frozen=True, slots=True)
class Kinds:
    """The rules of one deployment, made ready for use."""

    rules: LengthRules
    projection: Projection
    kinds: tuple[Kind, ...]

    def of(self, vector: bytes) -> int:
        """The nearest kind within its reach; NO_KIND for none."""
        entries = entries_of(vector)
        norm = math.hypot(*entries)
        best, best_cosine = NO_KIND, -math.inf
        for place, kind in enumerate(self.kinds if norm else ()):
            cosine = sum(map(mul, entries, kind.direction)) / norm
            if cosine >= kind.reach and cosine > best_cosine:
                best, best_cosine = place, cosine
        return best

    def limit(self, kind: int, *, prompt_bytes: int) -> int:
        """The limit of a kind's answers in tokens; 0 for none.

        A limit that might not fit beside the prompt is none: engines refuse what does not fit into their context, and
        what a client did not ask for must not be why. A token stands for at least one byte.
        """
        limit = self.rules.limit_tokens if kind == NO_KIND else self.kinds[kind].limit
        room = self.rules.context_tokens - prompt_bytes - TEMPLATE_TOKENS
        return limit if 0 < limit <= room else 0


def kinds_of(rules: LengthRules, *, method: int) -> Kinds | None:
    """The rules made ready for vectors of this method; None for rules that no vector can be made by."""
    try:
        projection = Projection(seed=rules.seed, dimension=rules.dimension, method=method)
        kinds = tuple(
            Kind(_direction(base64.b64decode(kind.centroid), rules.dimension), kind.reach, kind.limit_tokens)
            for kind in rules.kinds
        )
    except (ValueError, binascii.Error):
        return None
    return Kinds(rules, projection, kinds)


def _direction(centroid: bytes, dimension: int) -> tuple[float, ...]:
    entries: Sequence[int] = entries_of(centroid)
    norm = math.hypot(*entries)
    if len(entries) != dimension or not norm:
        raise ValueError(f"a centroid of {len(entries)} entries, not {dimension}")
    return tuple(entry / norm for entry in entries)


@dataclass(slots=True)
class Bucket:
    """So many a second, and for a moment some more."""

    per_s: float
    burst: float
    level: float = math.nan        # full at first
    time_s: float = 0.0

    def take(self, *, now_s: float) -> bool:
        """Take one; False if there is none."""
        full = math.isnan(self.level)
        level = self.burst if full else min(self.burst, self.level + (now_s - self.time_s) * self.per_s)
        self.time_s = now_s
        self.level = level - 1.0 if level >= 1.0 else level
        return level >= 1.0
