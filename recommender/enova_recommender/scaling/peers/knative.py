"""Knative's pod autoscaler on concurrency, as KServe uses it (P12).

Each 2 s, with ready = max(1, ready pods) and T = 100 x 0.7 requests a pod:
    d(window) = min(max(ceil(concurrency(window) / T), floor(ready / 2)), 1000 x ready) for 60 s and for 6 s
Panic begins when ceil(concurrency(6 s) / T) / ready >= 2, and ends 60 s after that last held; in it the answer is the
largest panic wish so far, never less. Otherwise d(60 s). To zero, where min is 0, after 60 s without a request and 30 s
of grace; from zero, one pod at once for a held request.
Missing: pods that do not report add nothing; with no figure at all R stays. Knob: T / knob.
Source: knative/serving, pkg/autoscaler/scaling/autoscaler.go; knative.dev/docs, configuration of the autoscaler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from enova_recommender.scaling.peers.answers import answer, keep, number
from enova_recommender.scaling.peers.sights import concurrency, measured, ready, whole
from enova_recommender.scaling.situation import Decided, Memory, Situation

TARGET = 100.0 * 0.7
STABLE_S, PANIC_S, GRACE_S = 60.0, 6.0, 30.0
PANIC_RATIO = 2.0
UP_RATE, DOWN_RATE = 1000.0, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Knative:
    """The reimplemented policy."""

    name: str = "knative"
    target: float = TARGET
    interval_s: float = 2.0

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """One look."""
        stable = measured(concurrency(situation, window_s=STABLE_S))
        burst = measured(concurrency(situation, window_s=PANIC_S))
        if situation.target == 0:
            reason = f"{situation.held} requests are held"
            return answer(situation, int(situation.held > 0), reason=reason, memory={}, zero=True)
        if not stable or not burst:
            return keep(situation, reason="no pod reports its concurrency", memory=memory, missing=True)
        wish, kept = self._wish(situation, sum(stable) + situation.held, sum(burst) + situation.held, memory)
        reason = f"{sum(stable):.3g} requests in 60 s, {sum(burst):.3g} in 6 s, at {self.target:.3g} a pod"
        return answer(situation, wish, reason=reason, memory=kept, zero=True)

    def _wish(self, situation: Situation, stable: float, burst: float, memory: Memory) -> tuple[int, Memory]:
        now_s, pods = situation.now_s, max(1, len(ready(situation)))
        calm, panicked = self._within_rates(stable, pods), self._within_rates(burst, pods)
        over = whole(burst / self.target) / pods >= PANIC_RATIO
        panic_s = now_s if over else number(memory, "panic_s", -math.inf)
        if now_s - panic_s <= STABLE_S:
            most = max(panicked, int(number(memory, "panic_pods", 0.0)))
            return most, {"panic_s": panic_s, "panic_pods": float(most)}
        if calm > 0:
            return calm, {}
        idle_s = number(memory, "idle_s", now_s)
        return (0 if now_s - idle_s >= GRACE_S else 1), {"idle_s": idle_s}

    def _within_rates(self, requests: float, pods: int) -> int:
        least = int(pods // DOWN_RATE)
        return int(min(max(whole(requests / self.target), least), UP_RATE * pods))


def knative(knob: float) -> Knative:
    """With the published target over the knob."""
    return Knative(target=TARGET / knob)
