"""AIBrix's GPU optimizer: how many replicas of each GPU type, by an integer programme over a profile, through KPA (P5).

Each 10 s: rate = max(requests of the last 240 s / 240, requests of the last 10 s / 10). The rate of a bucket of lengths
is cut into 8 slices, each served by one GPU type; y_g = ceil(load of g), load = slices x rate / 8 / profile_g; the
cheapest sum of y_g x cost_g is taken (Melange's programme; all divisions are tried). Each y_g is published as a metric
with T = 1 and read by KPA of `aibrix`: means of 180 s and 60 s, its rate limits, its cooldown.
Of the lengths only sums are known here, so there is one bucket; the profile is requests_per_s of each variant.
Missing: steps without a count are left out of the sums. Never to zero. Knob: the factor on the rate.
Source: vllm-project/aibrix, python/aibrix/aibrix/gpu_optimizer; Griggs et al., "Melange" (2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from enova_recommender.scaling.peers.aibrix import INTERVAL_S, PANIC_S, STABLE_S, cooled, kpa_wish
from enova_recommender.scaling.peers.answers import answer_by_variant, numbers
from enova_recommender.scaling.peers.sights import arrival_rate, whole
from enova_recommender.scaling.situation import Decided, Memory, Situation, VariantSight

WINDOW_S, CURRENT_S = 240.0, 10.0
SLICES = 8
PUBLISHED_TARGET = 1.0


def cheapest_counts(rate: float, variants: tuple[VariantSight, ...]) -> tuple[int, ...]:
    """Replicas of each variant that carry the rate at the least cost; of equal ones the first found."""
    best: tuple[float, tuple[int, ...]] | None = None
    for division in _divisions(SLICES, len(variants)):
        counts = tuple(
            whole(slices * rate / SLICES / variant.capacity.requests_per_s.value)
            for slices, variant in zip(division, variants, strict=True)
        )
        cost = sum(count * variant.usd_per_hour for count, variant in zip(counts, variants, strict=True))
        if best is None or cost < best[0]:
            best = cost, counts
    return best[1] if best is not None else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AibrixOptimizer:
    """The reimplemented policy."""

    name: str = "aibrix-optimizer"
    knob: float = 1.0
    interval_s: float = INTERVAL_S

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """One look."""
        demand, now_s = situation.demand, situation.now_s
        windows = (arrival_rate(demand, window_s=window_s) for window_s in (WINDOW_S, CURRENT_S))
        rate = self.knob * max(windows)
        counts = cheapest_counts(rate, situation.variants)
        targets: dict[str, int] = {}
        kept: dict[str, tuple[float, ...]] = {}
        for variant, count in zip(situation.variants, counts, strict=True):
            key = f":{variant.name}"
            times, values = _published(memory, key, now_s=now_s, count=count)
            stable, panic = _mean_since(times, values, now_s - STABLE_S), _mean_since(times, values, now_s - PANIC_S)
            wish = kpa_wish(stable, panic, target=PUBLISHED_TARGET, current=variant.target)
            targets[variant.name], wishes = cooled(wish, current=variant.target, now_s=now_s, memory=memory, key=key)
            kept |= {**wishes, f"published_at{key}": times, f"published{key}": values}
        reason = f"{rate:.3g} requests/s are carried cheapest by {dict(zip(targets, counts, strict=True))}"
        return answer_by_variant(situation, targets, reason=reason, memory=kept)


def optimizer(knob: float) -> AibrixOptimizer:
    """With the knob on the rate."""
    return AibrixOptimizer(knob=knob)


def _divisions(slices: int, types: int) -> Iterator[tuple[int, ...]]:
    """All ways to give the slices to the types."""
    if types == 1:
        yield (slices,)
        return
    for first in range(slices, -1, -1):
        for rest in _divisions(slices - first, types - 1):
            yield (first, *rest)


def _published(
    memory: Memory, key: str, *, now_s: float, count: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    times, values = numbers(memory, f"published_at{key}"), numbers(memory, f"published{key}")
    recent = [(at, value) for at, value in zip(times, values, strict=True) if at > now_s - STABLE_S]
    recent.append((now_s, float(count)))
    return tuple(at for at, _ in recent), tuple(value for _, value in recent)


def _mean_since(times: tuple[float, ...], values: tuple[float, ...], since_s: float) -> float:
    recent = [value for at, value in zip(times, values, strict=True) if at > since_s]
    return sum(recent) / len(recent)
