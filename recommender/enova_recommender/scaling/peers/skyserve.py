"""SkyServe's request-rate autoscaler (P11).

Formula: desired = ceil(requests of the last 60 s / 60 / target_qps). Each 20 s (5 s with no replica) a tick counts: 15
ticks in a row that wish more apply the last wish (300 s), 60 that wish less do (1200 s); a tick of the other direction,
or of none, starts both counts anew. From zero at once. To zero where min is 0.
target_qps_per_replica is the user's; here it is what the capacity prior says at the first call, and stays that.
Missing: requests are counted by its own load balancer, none is missing. Knob: target_qps / knob.
Source: skypilot, sky/serve/autoscalers.py, RequestRateAutoscaler and its constants.
"""

from __future__ import annotations

from dataclasses import dataclass

from enova_recommender.scaling.peers.answers import answer, clipped, keep, number
from enova_recommender.scaling.peers.sights import arrival_rate, whole
from enova_recommender.scaling.situation import Decided, Memory, Situation

QPS_WINDOW_S = 60.0
TICK_S = 20.0
UP_TICKS, DOWN_TICKS = 15, 60


@dataclass(frozen=True, slots=True, kw_only=True)
class SkyServe:
    """The reimplemented policy."""

    name: str = "skyserve"
    knob: float = 1.0
    interval_s: float = 5.0

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """One tick, or nothing between two."""
        now_s, current = situation.now_s, situation.target
        qps = number(memory, "target_qps", situation.variants[0].capacity.requests_per_s.value)
        rate = arrival_rate(situation.demand, window_s=QPS_WINDOW_S)
        desired = clipped(situation, whole(rate * self.knob / qps), zero=True)
        said = f"{rate:.3g} requests/s at {qps / self.knob:.3g} a replica ask for {desired}"
        base: Memory = {"target_qps": qps, "tick_s": now_s}
        if current == 0:
            return answer(situation, max(desired, int(situation.held > 0)), reason=said, memory=base, zero=True)
        if now_s - number(memory, "tick_s", float("-inf")) < TICK_S:
            return keep(situation, reason="between two ticks", memory=memory)
        up = number(memory, "up", 0.0) + 1 if desired > current else 0.0
        down = number(memory, "down", 0.0) + 1 if desired < current else 0.0
        if up >= UP_TICKS or down >= DOWN_TICKS:
            return answer(situation, desired, reason=said, memory=base, zero=True)
        counted = f"{said}; {max(up, down):.0f} ticks agree"
        return keep(situation, reason=counted, memory={**base, "up": up, "down": down})


def skyserve(knob: float) -> SkyServe:
    """With the capacity prior over the knob."""
    return SkyServe(knob=knob)
