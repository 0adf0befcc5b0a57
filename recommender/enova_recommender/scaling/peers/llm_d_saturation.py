"""llm-d's workload variant autoscaler, saturation analysis (V1, its default), with the pod autoscaler above it (P6).

Each 60 s, with u and q the largest KV usage and queue of each replica in the last minute: replicas with u < 0.80 and
q < 5 are not saturated; their mean spare is avg(0.80 - u) and avg(5 - q), 0 without any.
    up: spare KV < 0.10 or spare queue < 3: the cheapest variant gets one more
    down: two or more not saturated, and with the load x N / (N - 1) the spare is still >= 0.10 and >= 3: the dearest
          variant that has more than one gives one
    frozen: any variant whose wish is not what exists, or whose replicas do not all report: no wish changes
The wish becomes the target after it held for 240 s, either way (the HPA above). To zero, where min is 0, after 600 s
without a request; from zero, the cheapest variant gets one at once. The limiter is off, as published.
Missing: a replica that does not report freezes the whole. Knob: 0.80 / knob.
Source: workload-variant-autoscaler, docs/saturation-scaling-config.md, internal/saturation/analyzer.go.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from enova_recommender.scaling.peers.answers import answer_by_variant, clipped, keep, number
from enova_recommender.scaling.peers.kubernetes import Behaviour, settled
from enova_recommender.scaling.peers.sights import arrival_rate, maxima, ready
from enova_recommender.scaling.situation import Decided, Memory, Signal, Situation

INTERVAL_S = 60.0
KV_SATURATED, QUEUE_SATURATED = 0.80, 5.0
KV_SPARE_MIN, QUEUE_SPARE_MIN = 0.10, 3.0
IDLE_S = 600.0
ABOVE = Behaviour(up_window_s=240.0, down_window_s=240.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spare:
    """What the replicas that are not saturated have left on average, now and with one fewer."""

    replicas: int
    kv: float
    queue: float
    kv_with_one_fewer: float
    queue_with_one_fewer: float

    @property
    def short(self) -> bool:
        """Whether one more is wanted."""
        return self.kv < KV_SPARE_MIN - 1e-12 or self.queue < QUEUE_SPARE_MIN - 1e-12

    @property
    def ample(self) -> bool:
        """Whether one fewer is safe."""
        enough_kv = self.kv_with_one_fewer >= KV_SPARE_MIN - 1e-12
        return self.replicas >= 2 and enough_kv and self.queue_with_one_fewer >= QUEUE_SPARE_MIN - 1e-12


def spare_of(usage: Mapping[str, float], queues: Mapping[str, float], *, kv_saturated: float) -> Spare:
    """The spare of a model's replicas."""
    free = [name for name in usage if usage[name] < kv_saturated and queues[name] < QUEUE_SATURATED]
    if not free:
        return Spare(replicas=0, kv=0.0, queue=0.0, kv_with_one_fewer=0.0, queue_with_one_fewer=0.0)
    count = len(free)
    kv, queue = sum(usage[name] for name in free) / count, sum(queues[name] for name in free) / count
    factor = count / (count - 1) if count > 1 else math.inf
    return Spare(
        replicas=count,
        kv=kv_saturated - kv,
        queue=QUEUE_SATURATED - queue,
        kv_with_one_fewer=kv_saturated - kv * factor if count > 1 else 0.0,
        queue_with_one_fewer=QUEUE_SATURATED - queue * factor if count > 1 else 0.0,
    )


def asleep(situation: Situation, memory: Memory) -> tuple[bool, float]:
    """Whether no request came for ten minutes, and when that will be so."""
    busy = arrival_rate(situation.demand, window_s=INTERVAL_S) > 0 or situation.held > 0
    idle_at_s = situation.now_s + IDLE_S if busy else number(memory, "idle_at_s", situation.now_s + IDLE_S)
    return situation.bounds.min_replicas == 0 and situation.now_s >= idle_at_s, idle_at_s


def applied(
    situation: Situation, wishes: Mapping[str, int], *, reason: str, memory: Memory, kept: Memory
) -> Decided:
    """Wishes of each variant through the pod autoscaler above."""
    remembered: dict[str, float | str | tuple[float, ...]] = dict(kept)
    targets = {}
    for variant in situation.variants:
        after = settled(
            wishes[variant.name], current=variant.target, now_s=situation.now_s, memory=memory, behaviour=ABOVE,
            key=f":{variant.name}",
        )
        targets[variant.name] = after.replicas
        remembered |= after.memory
    return answer_by_variant(situation, targets, reason=reason, memory=remembered)


def from_or_to_zero(situation: Situation, memory: Memory) -> Decided | None:
    """The act to or from zero replicas; None where neither is due."""
    sleeps, idle_at_s = asleep(situation, memory)
    kept: Memory = {"idle_at_s": idle_at_s}
    none = {variant.name: 0 for variant in situation.variants}
    if situation.target == 0:
        cheapest = min(situation.variants, key=lambda variant: variant.usd_per_hour)
        wake = {**none, cheapest.name: int(situation.held > 0)}
        return answer_by_variant(situation, wake, reason=f"{situation.held} requests are held", memory=kept, zero=True)
    if sleeps:
        return answer_by_variant(situation, none, reason="no request for ten minutes", memory=kept, zero=True)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """The reimplemented policy."""

    name: str = "llm-d-saturation"
    kv_saturated: float = KV_SATURATED
    interval_s: float = INTERVAL_S

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """One round of the controller."""
        zero = from_or_to_zero(situation, memory)
        if zero is not None:
            return zero
        usage = maxima(situation, Signal.KV_CACHE_USAGE, window_s=INTERVAL_S)
        queues = maxima(situation, Signal.WAITING, window_s=INTERVAL_S)
        wishes = {
            variant.name: int(number(memory, f"desired:{variant.name}", variant.target))
            for variant in situation.variants
        }
        reporting = [name for name in usage if not math.isnan(usage[name] + queues[name])]
        if not reporting:
            return keep(situation, reason="no replica reports", memory=memory, missing=True)
        if _frozen(situation, wishes, reporting):
            reason = "frozen: a variant does not have what it wishes, or a replica does not report"
        else:
            wishes, reason = self._analysed(situation, wishes, usage, queues)
        kept = {f"desired:{name}": float(count) for name, count in wishes.items()}
        kept["idle_at_s"] = asleep(situation, memory)[1]
        return applied(situation, wishes, reason=reason, memory=memory, kept=kept)

    def _analysed(
        self, situation: Situation, wishes: dict[str, int], usage: Mapping[str, float], queues: Mapping[str, float]
    ) -> tuple[dict[str, int], str]:
        spare = spare_of(usage, queues, kv_saturated=self.kv_saturated)
        said = f"{spare.replicas} replicas are not saturated; {spare.kv:.2f} KV and {spare.queue:.2f} queue to spare"
        by_cost = sorted(situation.variants, key=lambda variant: variant.usd_per_hour)
        total = sum(wishes.values())
        if spare.short and clipped(situation, total + 1) > total:
            return {**wishes, by_cost[0].name: wishes[by_cost[0].name] + 1}, said
        several = [variant.name for variant in by_cost if wishes[variant.name] > 1]
        if spare.ample and not spare.short and several and clipped(situation, total - 1) < total:
            return {**wishes, several[-1]: wishes[several[-1]] - 1}, said
        return wishes, said


def saturation(knob: float) -> Saturation:
    """With the KV usage that counts as saturated over the knob."""
    return Saturation(kv_saturated=KV_SATURATED / knob)


def _frozen(situation: Situation, wishes: Mapping[str, int], reporting: list[str]) -> bool:
    exist = Counter(replica.variant for replica in situation.replicas)
    variant_of = {replica.name: replica.variant for replica in ready(situation)}
    report = Counter(variant_of[name] for name in reporting)
    return any(wish != exist[name] or report[name] != exist[name] for name, wish in wishes.items())
