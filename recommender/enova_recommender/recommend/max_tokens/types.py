"""The values of limits on answers' lengths: what is observed of requests, and which limits follow for which kinds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from enova_recommender.recommend.max_tokens.survival import Flags, Floats, Ints

Vectors = npt.NDArray[np.int8]


class NoLimit(StrEnum):
    """Why a kind of request has no limit of its own."""

    FEW_ANSWERS = "FEW_ANSWERS"      # the limit of all requests together is taken
    TAIL_UNSEEN = "TAIL_UNSEEN"      # too many were stopped: how long the longest are, nobody knows; none is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSamples:
    """Requests that ended: the prompt's vector, the answer's tokens, and whether a limit stopped it. Oldest first."""

    vectors: Vectors           # a row each
    tokens: Ints
    stopped: Flags

    def __len__(self) -> int:
        return len(self.tokens)

    def at(self, rows: Ints | Flags) -> LengthSamples:
        """Some of them."""
        return LengthSamples(vectors=self.vectors[rows], tokens=self.tokens[rows], stopped=self.stopped[rows])

    def with_more(self, others: LengthSamples) -> LengthSamples:
        """These, then others."""
        return LengthSamples(
            vectors=np.concatenate([self.vectors, others.vectors]),
            tokens=np.concatenate([self.tokens, others.tokens]),
            stopped=np.concatenate([self.stopped, others.stopped]),
        )


def no_samples(dimension: int) -> LengthSamples:
    """None of them."""
    return LengthSamples(
        vectors=np.zeros((0, dimension), np.int8), tokens=np.zeros(0, np.int64), stopped=np.zeros(0, np.bool_)
    )


@dataclass(frozen=True, slots=True)
class Centres:
    """Where the communities lie: their centroids as vectors of length one, and how far a member may be from each."""

    centroids: Floats          # a row each
    reaches: Floats            # the smallest cosine that still belongs


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One community of prompts and the limit for its answers."""

    centroid: tuple[float, ...]
    reach: float
    answers: int               # that the limit rests on
    stopped: int               # of them, by a limit
    median: int | None         # tokens; None if more than half were stopped
    limit: int | None
    no_limit: NoLimit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an ingress is told: kinds with their limits, and the limit of whatever belongs to none."""

    cut_share: float
    kinds: tuple[Kind, ...]
    overall: int | None        # None: no limit
    answers: int
    drifts: int                # how often a kind's answers changed so that what was known of it was dropped

    def of(self, kind: int) -> int | None:
        """The limit of a kind by its place; of -1, no kind, that of all requests."""
        if kind < 0 or self.kinds[kind].no_limit is NoLimit.FEW_ANSWERS:
            return self.overall
        return self.kinds[kind].limit
