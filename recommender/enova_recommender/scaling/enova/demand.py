"""What is asked for now: rate, burst, backlog and the weight of a request, from the situation. Pure.

A request's weight is its work (seconds of prefill and of decode on one replica) against that of the mix that the
capacity was told for: when prompts or answers grow, the same rate asks for more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from enova_recommender.recommend.types import MeanLengths
from enova_recommender.scaling.situation import Capacity, Demand, Floats, Recent, Signal, Situation

LEVEL_S = 60.0                # over which the rate of now is taken
BURST_S = 20.0                # over which a burst is looked for
BURST_SIGMAS = 4.0            # of a Poisson count: 1 false burst in 30,000 looks
MIX_NEW_S = 300.0             # over which the mix of now is taken
MIX_FINISHED_MIN = 50         # requests that a mix must rest on
WEIGHT_BOUNDS = (0.25, 4.0)
STALE_S = 60.0                # after which the newest step says nothing of now
MEASURED_MIN = 0.5            # share of the ready replicas that must have been measured


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandNow:
    """Requests a second now, how many wait, and what one weighs; `trouble` says why nothing can be told."""

    rate: float
    is_burst: bool
    waiting: float
    weight: float
    idle_s: float              # since the last arrival or running request that is known of
    trouble: str = ""
    partial: str = ""          # why the replicas' figures are incomplete: enough to grow by, never to shrink by


def demand_now(situation: Situation) -> DemandNow:
    """What the situation's recent steps say of demand."""
    demand, recent = situation.demand, situation.recent
    arrived = demand.arrived
    known = ~np.isnan(arrived)
    age_s = situation.now_s - (demand.end_s - demand.step_s * (len(arrived) - 1 - np.flatnonzero(known)[-1])) \
        if known.any() else math.inf
    if age_s > STALE_S:
        told = f"the newest count of arrivals is {age_s:.0f} s old" if math.isfinite(age_s) else "no arrival is counted"
        return DemandNow(rate=math.nan, is_burst=False, waiting=0, weight=1, idle_s=0, trouble=told)
    level = _rate(demand, LEVEL_S)
    burst = _rate(demand, BURST_S)
    expected = level * BURST_S
    is_burst = (burst - level) * BURST_S > BURST_SIGMAS * math.sqrt(max(expected, 1.0))
    # A burst's own count is noisy: its lower bound is believed.
    rate = max(level, burst - math.sqrt(max(burst, 0.0) / BURST_S)) if is_burst else level
    capacity = situation.variants[0].capacity if situation.variants else None
    return DemandNow(
        rate=rate,
        is_burst=is_burst,
        waiting=_waiting(situation) + situation.held,
        weight=_weight(demand, capacity) if capacity is not None else 1.0,
        idle_s=_idle_s(situation),
        partial=_partial(situation, recent),
    )


def minute_rates(history: Demand, demand: Demand) -> Floats:
    """Requests a second by the minute: the history, and after its end the recent steps folded to whole minutes."""
    old = history.arrived / history.step_s if len(history.arrived) else np.empty(0)
    per = max(1, round(60.0 / demand.step_s))
    steps = demand.arrived
    if len(old):
        fresh = max(0, round((demand.end_s - history.end_s) / demand.step_s))
        steps = steps[len(steps) - min(fresh, len(steps)) :]
    whole = len(steps) // per * per
    folded = steps[len(steps) - whole :].reshape(-1, per)
    return np.concatenate([old, np.mean(folded, axis=1) / demand.step_s if whole else np.empty(0)])


def last(values: Floats, step_s: float, span_s: float) -> Floats:
    """The columns of the last `span_s`."""
    return values[..., -max(1, round(span_s / step_s)) :]


def _rate(demand: Demand, span_s: float) -> float:
    steps = last(demand.arrived, demand.step_s, span_s)
    return float(np.nanmean(steps)) / demand.step_s if not np.isnan(steps).all() else 0.0


def _waiting(situation: Situation) -> float:
    """Requests that wait at replicas that carry load: what stands behind a hung one cannot be helped by more."""
    recent = situation.recent
    waiting = recent.values.get(Signal.WAITING)
    if waiting is None or not waiting.size:
        return 0.0
    carrying = {replica.name for replica in situation.replicas if replica.carries}
    rows = [row for row, name in enumerate(recent.replicas) if name in carrying]
    if not rows:
        return 0.0
    steps = last(waiting[rows], recent.step_s, 2 * recent.step_s)
    with np.errstate(invalid="ignore"):
        counts = np.where(np.isnan(steps), 0.0, steps).sum(axis=1) / np.maximum((~np.isnan(steps)).sum(axis=1), 1)
    return float(counts.sum())


def _weight(demand: Demand, capacity: Capacity) -> float:
    """Work of a request of now against one of those that the capacity was told for: all recent ones, if not said.

    A capacity that was told anew since the mix changed has the change in it: it must not count here as well.
    """
    new, told_for = _work_s(demand, capacity, MIX_NEW_S), capacity.told_for
    old = _work_s(demand, capacity, math.inf) if told_for is None else _request_s(capacity, told_for)
    if new is None or old is None or old <= 0:
        return 1.0
    low, high = WEIGHT_BOUNDS
    return min(max(new / old, low), high)


def _work_s(demand: Demand, capacity: Capacity, span_s: float) -> float | None:
    count = len(demand.finished) if math.isinf(span_s) else max(1, round(span_s / demand.step_s))
    finished = float(np.nansum(demand.finished[-count:]))
    if finished < MIX_FINISHED_MIN:
        return None
    prompt = float(np.nansum(demand.prompt_tokens[-count:])) / finished
    output = float(np.nansum(demand.output_tokens[-count:])) / finished
    return _request_s(capacity, MeanLengths(prompt, output))


def _request_s(capacity: Capacity, mean: MeanLengths) -> float:
    return mean.prompt_tokens / capacity.prefill_tokens_per_s + mean.output_tokens / capacity.decode_tokens_per_s


def _idle_s(situation: Situation) -> float:
    """Seconds without arrivals and without a running request; as long as is known, at most."""
    demand, recent = situation.demand, situation.recent
    if situation.held:
        return 0.0
    busy = np.nan_to_num(demand.arrived, nan=1.0) > 0        # what is unknown may have been a request
    running = recent.values.get(Signal.RUNNING)
    if running is not None and running.size:
        total = np.nan_to_num(running, nan=0.0).sum(axis=0)
        count = min(len(busy), len(total))
        busy[len(busy) - count :] |= total[len(total) - count :] > 0
    if not busy.any():
        older = situation.history.arrived
        minutes = np.flatnonzero(np.nan_to_num(older, nan=1.0) > 0)
        quiet = len(older) if not len(minutes) else len(older) - 1 - int(minutes[-1])
        return max(len(busy) * demand.step_s, quiet * situation.history.step_s)
    return float((len(busy) - 1 - int(np.flatnonzero(busy)[-1])) * demand.step_s)


def _partial(situation: Situation, recent: Recent) -> str:
    carrying = [replica.name for replica in situation.replicas if replica.carries]
    running = recent.values.get(Signal.RUNNING)
    if not carrying:
        return ""
    if running is None or not running.size or situation.now_s - recent.end_s > STALE_S:
        return "no replica was measured of late"
    rows = {name: row for row, name in enumerate(recent.replicas)}
    steps = last(running, recent.step_s, STALE_S)
    measured = sum(name in rows and not np.isnan(steps[rows[name]]).all() for name in carrying)
    if measured < max(1.0, MEASURED_MIN * len(carrying)):
        return f"{measured} of {len(carrying)} ready replicas were measured in the last {STALE_S:.0f} s"
    return ""
