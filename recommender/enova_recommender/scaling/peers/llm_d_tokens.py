"""llm-d's workload variant autoscaler, token analysis (V2), with the pod autoscaler above it (P7).

Each 60 s. Capacity of a replica in tokens = min(k1, k2): k1 = 0.80 x tokens that its KV cache holds; k2 = tokens in use
while its queue is >= 5, else the mean of the last 10 such figures for this length of output (under 100, under 500,
longer), else min(B x O / (I + O), S) x (I + O / 2), else k1, with I and O the mean prompt and output, B the
batch's token limit (8192) and S max_num_seqs.
    demand = tokens in use + waiting x I (the router's queue included)
    need = demand / 0.85 - capacity of ready and starting replicas;  spare = capacity of ready ones - demand / 0.70
need > 0: ceil(need / cap) more of the best cost per capacity while there are places, then of the next.
spare > 0: floor(spare / cap) fewer, from the dearest; one of the cheapest stays.
The wish becomes the target after it held for 240 s; to and from zero as in `llm_d_saturation`.
Missing: replicas that do not report add no demand; with none the target stays. Lengths: the last known.
Knob: 0.85 / knob and 0.70 / knob.
Source: workload-variant-autoscaler, saturation V2 (analyzer, capacity store, optimizer).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from enova_recommender.scaling.peers.answers import keep, number, numbers
from enova_recommender.scaling.peers.llm_d_saturation import INTERVAL_S, applied, asleep, from_or_to_zero
from enova_recommender.scaling.peers.sights import Lengths, lengths, means, ready, whole
from enova_recommender.scaling.situation import Decided, Memory, Signal, Situation, VariantSight

KV_SHARE = 0.80
QUEUE_FULL = 5.0
REMEMBERED = 10
BATCH_TOKENS = 8192.0
UP_UTILIZATION, DOWN_UTILIZATION = 0.85, 0.70
BUCKETS = (100.0, 500.0)


def bucket(output: float) -> int:
    """Which class of output length: 0 short, 1 middle, 2 long."""
    return sum(output >= edge for edge in BUCKETS)


def estimated_tokens(found: Lengths, *, max_num_seqs: int) -> float:
    """k2 while nothing has been observed: sequences that the batch can hold x what each holds on average."""
    sequences = min(BATCH_TOKENS * found.output / (found.prompt + found.output), float(max_num_seqs))
    return sequences * (found.prompt + found.output / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The reimplemented policy."""

    name: str = "llm-d-tokens"
    knob: float = 1.0
    interval_s: float = INTERVAL_S

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """One round of the controller."""
        zero = from_or_to_zero(situation, memory)
        if zero is not None:
            return zero
        usage = means(situation, Signal.KV_CACHE_USAGE, window_s=INTERVAL_S)
        queues = means(situation, Signal.WAITING, window_s=INTERVAL_S)
        known = [name for name in usage if not math.isnan(usage[name] + queues[name])]
        if not known:
            return keep(situation, reason="no replica reports", memory=memory, missing=True)
        found = _lengths(situation, memory)
        variant_of = {replica.name: replica.variant for replica in ready(situation)}
        caps, kept = {}, {"idle_at_s": asleep(situation, memory)[1], **_kept_lengths(found)}
        demand = situation.held * _prompt(found)
        for variant in situation.variants:
            own = [name for name in known if variant_of[name] == variant.name]
            full = [usage[name] * variant.capacity.kv_tokens for name in own if queues[name] >= QUEUE_FULL]
            remembered = _remembered(memory, variant.name, found, full)
            kept |= remembered
            caps[variant.name] = _capacity(variant, found, own=len(own), full=full, memory={**memory, **remembered})
            demand += sum(usage[name] * variant.capacity.kv_tokens + queues[name] * _prompt(found) for name in own)
        wishes = self._wishes(situation, caps, demand)
        reason = f"{demand:.4g} tokens are asked for, a replica carries {max(caps.values()):.4g}"
        return applied(situation, wishes, reason=reason, memory=memory, kept=kept)

    def _wishes(self, situation: Situation, caps: Mapping[str, float], demand: float) -> dict[str, int]:
        alive = [replica.variant for replica in situation.replicas]
        serving = [replica.variant for replica in ready(situation)]
        need = demand * self.knob / UP_UTILIZATION - sum(caps[name] for name in alive)
        spare = sum(caps[name] for name in serving) - demand * self.knob / DOWN_UTILIZATION
        wishes = {variant.name: variant.target for variant in situation.variants}
        for variant in sorted(situation.variants, key=lambda one: one.usd_per_hour / caps[one.name]):
            cap = caps[variant.name]
            more = min(whole(max(need, 0.0) / cap), max(variant.places - variant.target, 0))
            wishes[variant.name] += more
            need -= more * cap
        if wishes != {variant.name: variant.target for variant in situation.variants} or need > 0:
            return wishes
        by_cost = sorted(situation.variants, key=lambda one: one.usd_per_hour)
        for variant in reversed(by_cost):
            least = 1 if variant is by_cost[0] else 0
            fewer = min(int(max(spare, 0.0) / caps[variant.name] + 1e-9), max(variant.target - least, 0))
            wishes[variant.name] -= fewer
            spare -= fewer * caps[variant.name]
        return wishes


def tokens(knob: float) -> Tokens:
    """With both utilisations over the knob."""
    return Tokens(knob=knob)


def _lengths(situation: Situation, memory: Memory) -> Lengths:
    found = lengths(situation.demand, window_s=INTERVAL_S)
    if found.known:
        return found
    return Lengths(prompt=number(memory, "prompt", math.nan), output=number(memory, "output", math.nan))


def _kept_lengths(found: Lengths) -> dict[str, float | str | tuple[float, ...]]:
    return {"prompt": found.prompt, "output": found.output} if found.known else {}


def _prompt(found: Lengths) -> float:
    return found.prompt if found.known else 0.0


def _remembered(
    memory: Memory, variant: str, found: Lengths, full: list[float]
) -> dict[str, float | str | tuple[float, ...]]:
    """All that is kept of the variant's observed limits, the new ones with them."""
    keys = {index: f"full:{variant}:{index}" for index in range(len(BUCKETS) + 1)}
    kept = {key: numbers(memory, key) for key in keys.values()}
    if found.known and full:
        key = keys[bucket(found.output)]
        kept[key] = (*kept[key], *full)[-REMEMBERED:]
    return {key: values for key, values in kept.items() if values}


def _capacity(variant: VariantSight, found: Lengths, *, own: int, full: list[float], memory: Memory) -> float:
    """Tokens that one replica of the variant carries: the mean of its replicas', those that are full by their own."""
    by_memory = KV_SHARE * variant.capacity.kv_tokens
    limit = by_memory
    if found.known:
        seen = numbers(memory, f"full:{variant.name}:{bucket(found.output)}")
        limit = sum(seen) / len(seen) if seen else estimated_tokens(found, max_num_seqs=variant.capacity.max_num_seqs)
    rest = max(own - len(full), 0 if full else 1)
    total = sum(min(by_memory, one) for one in full) + rest * min(by_memory, limit)
    return max(total / (len(full) + rest), 1.0)
