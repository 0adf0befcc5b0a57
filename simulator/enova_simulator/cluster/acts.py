"""What policies wished for, checked and kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from enova_recommender.scaling.bounds import Bounds
from enova_recommender.scaling.situation import Wish


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """A change of a deployment's target, over all variants."""

    at_s: float
    before: int
    after: int
    reason: str


@dataclass(slots=True)
class Acts:
    """The changes of one deployment's target, and the wishes that made no sense."""

    done: list[Act] = field(default_factory=list)
    refused: list[tuple[float, str]] = field(default_factory=list)

    def add(self, at_s: float, before: int, after: int, reason: str) -> None:
        """A target changed."""
        self.done.append(Act(at_s=at_s, before=before, after=after, reason=reason))

    def refuse(self, at_s: float, problem: str) -> None:
        """A wish was not followed: what runs stays."""
        self.refused.append((at_s, problem))


def wished(wish: Wish, targets: Mapping[str, int], bounds: Bounds) -> tuple[dict[str, int], str]:
    """The targets that a wish comes to within the bounds; or why it makes no sense, and nothing is done."""
    wanted = dict(targets)
    for name, value in wish.targets.items():
        if name not in wanted:
            return wanted, f"no variant is called {name}"
        if not math.isfinite(value) or value < 0 or value != int(value):
            return dict(targets), f"{value} replicas of {name} were wished for"
        wanted[name] = int(value)
    names = list(wanted)
    over = sum(wanted.values()) - bounds.max_replicas
    for name in reversed(names):                   # the last variant is the least liked
        cut = min(wanted[name], max(0, over))
        wanted[name] -= cut
        over -= cut
    wanted[names[0]] += max(0, bounds.min_replicas - sum(wanted.values()))
    return wanted, ""
