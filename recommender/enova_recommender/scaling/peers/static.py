"""Static fleets: one number of replicas for the whole run, from the highest or the mean minute of the demand (P15).

Formula: R = ceil(knob x rate / requests_per_s of one replica). `rate` is given (hindsight: the demand of the very run,
the bound that a planner with a perfect crystal ball reaches), or taken at the first call that knows an hour of history.
Knob: the factor on the rate. Missing minutes are left out; while no hour is known, the target stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from enova_recommender.scaling.peers.answers import answer, keep, number
from enova_recommender.scaling.peers.sights import whole
from enova_recommender.scaling.situation import Decided, Demand, Floats, Memory, Situation

HISTORY_MIN_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticFleet:
    """The reimplemented policy; `fold` makes one rate of the rates of all known minutes."""

    name: str
    fold: Callable[[Floats], np.float64]
    knob: float = 1.0
    rate: float | None = None          # requests/s, where it is known beforehand
    interval_s: float = 60.0

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """The same number at each call."""
        kept = number(memory, "replicas", -1.0)
        if kept >= 0:
            return answer(situation, int(kept), reason=f"{int(kept)} replicas, always", memory=memory)
        rate = self.rate if self.rate is not None else _rate(situation.history, self.fold)
        if rate is None:
            return keep(situation, reason="less than an hour of history", memory=memory, missing=True)
        one = situation.variants[0].capacity.requests_per_s.value
        total = whole(self.knob * rate / one)
        reason = f"{rate:.3g} requests/s x {self.knob:g} at {one:.3g} a replica"
        return answer(situation, total, reason=reason, memory={"replicas": float(total)})


def static_peak(knob: float, *, rate: float | None = None) -> StaticFleet:
    """As many as the highest minute needs."""
    return StaticFleet(name="static-peak", fold=np.max, knob=knob, rate=rate)


def static_mean(knob: float, *, rate: float | None = None) -> StaticFleet:
    """As many as the mean minute needs."""
    return StaticFleet(name="static-mean", fold=np.mean, knob=knob, rate=rate)


def _rate(history: Demand, fold: Callable[[Floats], np.float64]) -> float | None:
    known = history.arrived[~np.isnan(history.arrived)]
    if known.size * history.step_s < HISTORY_MIN_S:
        return None
    return float(fold(known)) / history.step_s
