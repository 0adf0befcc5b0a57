"""How a reimplemented policy answers: a total within the bounds, spread over variants; and what it keeps in memory."""

from __future__ import annotations

from collections.abc import Mapping

from enova_recommender.scaling.bounds import REPLICAS_MIN
from enova_recommender.scaling.situation import Decided, Memory, Situation, Wish
from enova_recommender.scaling.types import Action
from enova_recommender.types import VerdictKind


def number(memory: Memory, key: str, default: float) -> float:
    """A number that was kept; `default` where there is none."""
    value = memory.get(key, default)
    return float(value) if isinstance(value, int | float) else default


def numbers(memory: Memory, key: str) -> tuple[float, ...]:
    """A row of numbers that was kept; empty where there is none. JSON gives a list back."""
    value = memory.get(key, ())
    return tuple(float(one) for one in value) if isinstance(value, tuple | list) else ()


def clipped(situation: Situation, total: int, *, zero: bool = False) -> int:
    """`total` within the deployment's bounds; `zero`: whether the policy can do without any replica."""
    bounds = situation.bounds
    low = max(bounds.min_replicas, 0 if zero else REPLICAS_MIN)
    return min(max(total, low), max(bounds.max_replicas, low))


def spread(situation: Situation, total: int) -> dict[str, int]:
    """Targets that add up to `total`: growth where there are places, first listed first; less from the last listed.

    What has no place goes on the first all the same, to wait there, as a pod would.
    """
    targets = {variant.name: variant.target for variant in situation.variants}
    missing = total - situation.target
    for variant in situation.variants:
        grown = min(max(variant.places - variant.target, 0), max(missing, 0))
        targets[variant.name] += grown
        missing -= grown
    if missing > 0:
        targets[situation.variants[0].name] += missing
    for variant in reversed(situation.variants):
        shed = min(targets[variant.name], max(-missing, 0))
        targets[variant.name] -= shed
        missing += shed
    return targets


def answer(
    situation: Situation, total: int, *, reason: str, memory: Memory, zero: bool = False
) -> Decided:
    """A wish for so many replicas, kept within the bounds."""
    kept = clipped(situation, total, zero=zero)
    bounded = f"; bounds make {kept} of {total}" if kept != total else ""
    return _decided(situation, spread(situation, kept), reason + bounded, memory)


def answer_by_variant(
    situation: Situation, targets: Mapping[str, int], *, reason: str, memory: Memory, zero: bool = False
) -> Decided:
    """A wish for each variant; where the sum is out of bounds, the dearest give or the cheapest take."""
    kept = dict(targets)
    over = sum(kept.values()) - clipped(situation, sum(kept.values()), zero=zero)
    by_cost = sorted(situation.variants, key=lambda variant: variant.usd_per_hour)
    for variant in reversed(by_cost):
        shed = min(kept[variant.name], max(over, 0))
        kept[variant.name] -= shed
        over -= shed
    kept[by_cost[0].name] -= min(over, 0)
    return _decided(situation, kept, reason, memory)


def keep(situation: Situation, *, reason: str, memory: Memory, missing: bool = False) -> Decided:
    """No act; `missing`: for want of figures."""
    targets = {variant.name: variant.target for variant in situation.variants}
    verdict = VerdictKind.UNKNOWN if missing else VerdictKind.NORMAL
    wish = Wish(action=Action.KEEP, targets=targets, verdict=verdict, reason=reason)
    return Decided(wish=wish, memory=memory)


def _decided(situation: Situation, targets: Mapping[str, int], reason: str, memory: Memory) -> Decided:
    change = sum(targets.values()) - situation.target
    moved = any(targets[variant.name] != variant.target for variant in situation.variants)
    if change > 0 or (moved and change == 0):
        wish = Wish(action=Action.SCALE_UP, targets=targets, verdict=VerdictKind.OVERLOADED, reason=reason)
    elif change < 0:
        wish = Wish(action=Action.SCALE_DOWN, targets=targets, verdict=VerdictKind.UNDERUSED, reason=reason)
    else:
        wish = Wish(action=Action.KEEP, targets=targets, verdict=VerdictKind.NORMAL, reason=reason)
    return Decided(wish=wish, memory=memory)
