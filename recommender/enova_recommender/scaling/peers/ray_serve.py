"""Ray Serve's autoscaling on ongoing requests (P10).

Formula: desired = ceil(R + f x (total / target - R)), total = ongoing requests over a look-back of 30 s, f = 1, target
2 a replica. More is done once it was wished for 30 s in a row, less for 600 s; a sample that wishes the opposite, or
what there is, starts the count anew, and the size that is applied is the last wish. With no replica, any request makes
ceil(1 x f) at once. The controller looks each 0.1 s, but its metric comes each 10 s, so here it looks each 10 s.
Missing: a replica that does not report adds nothing to the total (as a metric that was never pushed), so lost telemetry
looks like idleness. To zero where min is 0, by the same 600 s. Knob: target / knob.
Source: ray, python/ray/serve/autoscaling_policy.py and its configuration's defaults. (Serve LLM's own default target of
1e9 requests never scales, and is not the one used.)
"""

from __future__ import annotations

from dataclasses import dataclass

from enova_recommender.scaling.peers.answers import answer, keep, number
from enova_recommender.scaling.peers.sights import concurrency, measured, whole
from enova_recommender.scaling.situation import Decided, Memory, Situation

TARGET_ONGOING = 2.0
LOOK_BACK_S = 30.0
UP_DELAY_S, DOWN_DELAY_S = 30.0, 600.0
SMOOTHING = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RayServe:
    """The reimplemented policy."""

    name: str = "ray-serve"
    target: float = TARGET_ONGOING
    interval_s: float = 10.0

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """One look of the controller."""
        current, now_s = situation.target, situation.now_s
        total = sum(measured(concurrency(situation, window_s=LOOK_BACK_S))) + situation.held
        if current == 0:
            wake = whole(SMOOTHING) if total > 0 else 0
            return answer(situation, wake, reason=f"{total:.3g} ongoing requests, no replica", memory={}, zero=True)
        desired = whole(current + SMOOTHING * (total / self.target - current))
        desired = max(desired, situation.bounds.min_replicas)
        desired = min(desired, max(situation.bounds.max_replicas, situation.bounds.min_replicas))
        said = f"{total:.3g} ongoing requests at {self.target:.3g} a replica ask for {desired}"
        if desired == current:
            return keep(situation, reason=said, memory={})
        direction = 1.0 if desired > current else -1.0
        since_s = now_s if number(memory, "direction", 0.0) != direction else number(memory, "since_s", now_s)
        delay_s = UP_DELAY_S if direction > 0 else DOWN_DELAY_S
        if now_s - since_s < delay_s:
            waiting = f"{said}, for {now_s - since_s:.0f} of {delay_s:.0f} s"
            return keep(situation, reason=waiting, memory={"direction": direction, "since_s": since_s})
        return answer(situation, desired, reason=said, memory={}, zero=True)


def ray_serve(knob: float) -> RayServe:
    """With the published target over the knob."""
    return RayServe(target=TARGET_ONGOING / knob)
