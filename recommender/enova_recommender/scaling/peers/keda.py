"""KEDA over the pod autoscaler: on queue length (production-stack), on two signals, on a router's saturation (P2, P7b).

Each 15 s (the poll of the published ScaledObject), through an HPA with Kubernetes' default behaviour:
- queue: q = sum of waiting requests; within 10 % of T x R it keeps R, else ceil(q / T), T = 5.
- two signals: the larger of ceil(sum of KV usage / 0.60) and ceil(q / 30), each with the tolerance.
- saturation: s = mean over replicas of max(waiting / 5, KV usage / 0.8), a replica that does not report counts 1;
  within 10 % of T it keeps R, else ceil(R x s / T). No target is published; T = 0.8 is our choice.
Missing: the sums leave silent replicas out; with no figure at all R stays, and after three polls in a row it falls back
to 2 replicas, as the published object says. To zero, where min is 0: when nothing waited or ran for 360 s (60 s after
the start); from zero: one replica at the next poll that finds a request held. Knob: every T / knob.
Source: vllm-project/production-stack helm/values.yaml and tutorials; keda.sh/docs, scaling deployments;
llm-d-autoscaling pull request 1517 (two signals), issue 1219 (saturation).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from enova_recommender.scaling.peers.answers import answer, keep, number
from enova_recommender.scaling.peers.kubernetes import settled, wished_by_total, wished_by_value
from enova_recommender.scaling.peers.sights import concurrency, means, measured
from enova_recommender.scaling.situation import Decided, Memory, Signal, Situation

POLL_S = 15.0
QUEUE = 5.0
TWO_SIGNAL_KV, TWO_SIGNAL_QUEUE = 0.6, 30.0
SATURATED_QUEUE, SATURATED_KV, SATURATION = 5.0, 0.8, 0.8
IDLE_S, INITIAL_IDLE_S = 360.0, 60.0
FAILURES_MAX, FALLBACK_REPLICAS = 3, 2

Wished = Callable[[Situation, float], "int | None"]  # from the situation and the knob; None: no figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Keda:
    """The reimplemented policy; `wished` is its metric against its target."""

    name: str
    wished: Wished
    knob: float = 1.0
    interval_s: float = POLL_S

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """One poll."""
        now_s, current = situation.now_s, situation.target
        idle_at_s = number(memory, "idle_at_s", now_s + INITIAL_IDLE_S)
        if _active(situation):
            idle_at_s = now_s + IDLE_S
        if current == 0:
            wake = situation.held > 0
            reason = f"{situation.held} requests are held" if wake else "nothing is asked for"
            return answer(situation, int(wake), reason=reason, memory={"idle_at_s": idle_at_s}, zero=True)
        if situation.bounds.min_replicas == 0 and now_s >= idle_at_s:
            return answer(situation, 0, reason="idle", memory={"idle_at_s": idle_at_s}, zero=True)
        wished = self.wished(situation, self.knob)
        failures = number(memory, "failures", 0.0) + 1 if wished is None else 0.0
        if wished is None and failures < FAILURES_MAX:
            kept = {**memory, "failures": failures, "idle_at_s": idle_at_s}
            return keep(situation, reason="the metric is missing", memory=kept, missing=True)
        asked = FALLBACK_REPLICAS if wished is None else wished
        after = settled(asked, current=current, now_s=now_s, memory=memory)
        kept = {**after.memory, "failures": failures, "idle_at_s": idle_at_s}
        reason = f"the metric asks for {asked}" if wished is not None else f"{failures:.0f} polls failed: fallback"
        return answer(situation, after.replicas, reason=reason, memory=kept)


def keda_queue(knob: float) -> Keda:
    """On waiting requests."""
    return Keda(name="keda-queue", wished=_by_queue, knob=knob)


def keda_two_signal(knob: float) -> Keda:
    """On KV usage and waiting requests."""
    return Keda(name="keda-two-signal", wished=_by_two, knob=knob)


def epp_keda(knob: float) -> Keda:
    """On the saturation that llm-d's router computes."""
    return Keda(name="llm-d-epp-keda", wished=_by_saturation, knob=knob)


def _active(situation: Situation) -> bool:
    """Whether anything runs, waits or is held; what is missing does not say."""
    return situation.held > 0 or sum(measured(concurrency(situation, window_s=POLL_S))) > 0


def _queue(situation: Situation) -> float:
    """Waiting requests in all; NaN where no replica reports."""
    known = measured(means(situation, Signal.WAITING, window_s=POLL_S))
    return sum(known) + situation.held if known else math.nan


def _by_queue(situation: Situation, knob: float) -> int | None:
    queue = _queue(situation)
    if math.isnan(queue):
        return None
    return wished_by_total(queue, current=situation.target, target=QUEUE / knob)


def _by_two(situation: Situation, knob: float) -> int | None:
    usage = measured(means(situation, Signal.KV_CACHE_USAGE, window_s=POLL_S))
    current, wishes = situation.target, []
    if usage:
        wishes.append(wished_by_total(sum(usage), current=current, target=TWO_SIGNAL_KV / knob))
    queue = _queue(situation)
    if not math.isnan(queue):
        wishes.append(wished_by_total(queue, current=current, target=TWO_SIGNAL_QUEUE / knob))
    return max(wishes, default=None)


def _by_saturation(situation: Situation, knob: float) -> int | None:
    waiting = means(situation, Signal.WAITING, window_s=POLL_S)
    usage = means(situation, Signal.KV_CACHE_USAGE, window_s=POLL_S)
    if not waiting:
        return None
    shares = (max(waiting[name] / SATURATED_QUEUE, usage[name] / SATURATED_KV) for name in waiting)
    silent = {name for name in waiting if math.isnan(waiting[name] + usage[name])}
    total = sum(1.0 if name in silent else share for name, share in zip(waiting, shares, strict=True))
    return wished_by_value(total / len(waiting), current=situation.target, target=SATURATION / knob)
