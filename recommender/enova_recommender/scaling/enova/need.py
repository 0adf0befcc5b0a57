"""What an interval comes to before anything is decided: demand, outlook, what a replica carries. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import norm

from enova_recommender.scaling.enova.demand import DemandNow, minute_rates
from enova_recommender.scaling.enova.forecast import Outlook, outlook
from enova_recommender.scaling.enova.learning import careful_factor, learnt_factor
from enova_recommender.scaling.enova.profile import daily_profile, factors_at
from enova_recommender.scaling.enova.state import PolicyState
from enova_recommender.scaling.situation import Floats, Situation, VariantSight

INTERVAL_S = 15.0
BUDGET_SHARE = 10.0           # a forecast may be exceeded for this many times the error budget: a minute, not a request
BUDGET_MAX = 0.4
QUANTILE_MAX = 0.999
HEADROOM = 0.05               # of capacity, at conservatism 1
PATIENCE_S_MIN, PATIENCE_S_MAX = 60.0, 900.0
DRAIN_S_MIN = 60.0            # in which a queue is to be gone once the replicas are there
CAPACITY_MIN = 0.01           # requests a second: a replica of which nothing is expected is counted on for that
TOLD_ANEW = 2.0               # by which a told capacity changes when it is another one, not another mix
PROFILE_EVERY_S = 3600.0
QUEUE_PER_REPLICA = 1.0       # waiting requests that are no backlog


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Loads are requests a second of the mix that capacity was told for."""

    demand: DemandNow
    ahead: Outlook
    lead_s: float
    load: float                # that must be carried when a start of now is READY
    carried: dict[str, float]  # by one replica of each variant
    sure: dict[str, float]     # the same, as long as nothing taught it: what fewer replicas may be counted on for
    knob: float
    state: PolicyState


def need_of(situation: Situation, demand: DemandNow, state: PolicyState, *, knob: float) -> Need:
    """The need of now; its state has learnt from the situation."""
    variants = situation.variants
    state = _learnt(situation, demand, _profiled(situation, state))
    slowest = max(situation.variants, key=lambda variant: variant.start_up.p90_s).start_up
    lead_s = (slowest.p50_s + slowest.p90_s) / 2 + INTERVAL_S
    ahead = _outlook(situation, demand, state, lead_s=lead_s, quantile=quantile(situation, knob))
    carried = {variant.name: _carried(variant, state.factors.get(variant.name, 1.0), knob) for variant in variants}
    sure = {
        variant.name: _carried(variant, state.factors.get(variant.name, careful_factor(variant)), knob)
        for variant in variants
    }
    backlog = max(0.0, demand.waiting - QUEUE_PER_REPLICA * situation.ready)
    load = ahead.high * demand.weight + backlog / max(lead_s, DRAIN_S_MIN)
    state = state.with_load(load, now_s=situation.now_s, patience_s=patience(situation, knob))
    return Need(
        demand=demand, ahead=ahead, lead_s=lead_s, load=load, carried=carried, sure=sure, knob=knob, state=state
    )


def quantile(situation: Situation, knob: float) -> float:
    """Of the forecast: from the objective's error budget at knob 1, as many sigmas more as the knob says."""
    budget = min(BUDGET_MAX, BUDGET_SHARE * (1 - situation.objective.attainment))
    return float(min(QUANTILE_MAX, norm.cdf(norm.ppf(1 - budget) * knob)))


def patience(situation: Situation, knob: float) -> float:
    """How long a lower need must last: as long as it takes to start again what is let go."""
    start_s = max(variant.start_up.p50_s for variant in situation.variants)
    return min(max(knob * start_s, PATIENCE_S_MIN), PATIENCE_S_MAX)


def _carried(variant: VariantSight, factor: float, knob: float) -> float:
    return max(variant.capacity.requests_per_s.value, CAPACITY_MIN) * factor / (1 + HEADROOM * knob)


def _profiled(situation: Situation, state: PolicyState) -> PolicyState:
    if situation.now_s - state.profile_s < PROFILE_EVERY_S:
        return state
    return replace(state, profile=daily_profile(situation.history), profile_s=situation.now_s)


def _learnt(situation: Situation, demand: DemandNow, state: PolicyState) -> PolicyState:
    told = {
        variant.name: max(variant.capacity.requests_per_s.value, CAPACITY_MIN) for variant in situation.variants
    }
    found = {
        variant.name: learnt_factor(
            situation, variant, _factor(state, variant.name, told[variant.name]), weight=demand.weight
        )
        for variant in situation.variants
    }
    factors = {name: factor for name, factor in found.items() if factor is not None}
    return replace(state, factors=factors, told=told)


def _factor(state: PolicyState, variant: str, told: float) -> float | None:
    """The factor of before; none where another capacity is told altogether: what mended a guess spoils knowledge."""
    before = state.told.get(variant, told)
    return state.factors.get(variant) if 1 / TOLD_ANEW <= told / before <= TOLD_ANEW else None


def _outlook(
    situation: Situation, demand: DemandNow, state: PolicyState, *, lead_s: float, quantile: float
) -> Outlook:
    lead = max(1, math.ceil(lead_s / 60))
    rates = minute_rates(situation.history, situation.demand)
    profile: Floats | None = None
    if state.profile:
        stamps_s = situation.now_s + 60.0 * np.arange(1 - len(rates), lead + 1, dtype=np.float64)
        profile = factors_at(state.profile, stamps_s)
    return outlook(rates, now_rate=demand.rate, lead_minutes=lead, quantile=quantile, profile=profile)
