"""What a replica really carries: the told capacity times a factor that is learnt from what replicas do. Pure.

Theory of operation. A replica whose queue does not empty finishes as much as it can: a share of that (`SLO_SHARE`) is
what it carries in time, and the factor is pulled there. One whose tokens or first tokens come late is past what it
carries. One without a queue that meets the objectives carries at least what it finishes. So a prior that is too high is
mended within minutes of load. One that is too low is not contradicted by a fleet that is large enough for it: a factor
below 1 drifts back, slowly, while all is well, so that one bad minute does not cost for ever. First tokens count where
they are measured by the step (the simulator does, the coordinator does not yet).
"""

from __future__ import annotations

import math

import numpy as np

from enova_recommender.scaling.enova.demand import last
from enova_recommender.scaling.situation import Floats, Signal, Situation, VariantSight

WINDOW_S = 60.0
SETTLED_S = 15.0              # a replica that has been READY for less still fills its batch
QUEUE_SATURATED = 1.0         # mean requests waiting, per replica, in each half of the window
QUEUE_NONE = 0.2
SLO_SHARE = 0.92              # of saturated throughput at which objectives are still met
TTFT_SHARE = 0.5              # of its objective that the mean may take while the tail meets it
RATE_DOWN, RATE_UP = 0.25, 0.08
RATE_DRIFT = 0.003            # a look: half of a doubt is gone after an hour of well-being
LOADED_SHARE = 0.5            # of what it is counted on for: with less, a long gap between tokens is no sign of load
FACTOR_BOUNDS = (0.25, 4.0)


def learnt_factor(situation: Situation, variant: VariantSight, factor: float, *, weight: float) -> float:
    """The factor after this situation; `weight` is a request's work against the mix of the told capacity."""
    seen = _seen(situation, variant)
    if seen is None:
        return factor
    finished_per_s, queues, ttft_s, tpot_s = seen
    told = max(variant.capacity.requests_per_s.value, 1e-9) / weight
    objective = situation.objective
    ratio = finished_per_s / told
    late = ttft_s > TTFT_SHARE * objective.ttft_s
    if min(queues) >= QUEUE_SATURATED:
        factor += RATE_DOWN * (SLO_SHARE * ratio - factor)
    elif tpot_s > objective.tpot_s and ratio > LOADED_SHARE * factor:
        # The batch is too large for the gap between tokens: fewer requests a second would have met it.
        carried = ratio * objective.tpot_s / tpot_s
        factor += RATE_DOWN * min(carried - factor, 0.0)
    elif late:
        # First tokens are late on average, so far too many are: it is past what it carries, queue or none.
        factor += RATE_DOWN * min(SLO_SHARE * ratio - factor, 0.0)
    elif max(queues) <= QUEUE_NONE and ratio > factor:
        factor += RATE_UP * (ratio - factor)
    elif max(queues) <= QUEUE_NONE and factor < 1.0:
        factor += RATE_DRIFT * (1.0 - factor)
    low, high = FACTOR_BOUNDS
    return min(max(factor, low), high)


def _seen(
    situation: Situation, variant: VariantSight
) -> tuple[float, tuple[float, float], float, float] | None:
    """Mean finished a second, queue in both halves of the window, TTFT and TPOT of a settled replica of the variant."""
    recent = situation.recent
    rows = {name: row for row, name in enumerate(recent.replicas)}
    settled = [
        rows[replica.name]
        for replica in situation.replicas
        if replica.variant == variant.name
        and replica.carries
        and replica.name in rows
        and situation.now_s - replica.since_s >= SETTLED_S + WINDOW_S
    ]
    finished = _window(situation, Signal.FINISHED, settled)
    waiting = _window(situation, Signal.WAITING, settled)
    if finished is None or waiting is None:
        return None
    half = waiting.shape[1] // 2
    # The usual replica, not the mean: one that is ill says nothing of what the others carry.
    queues = (_usual(waiting[:, : max(half, 1)]), _usual(waiting[:, half:]))
    per_s = _mean(finished) / recent.step_s
    return per_s, queues, _mean(_window(situation, Signal.TTFT_S, settled)), _tpot_s(situation, settled)


def _tpot_s(situation: Situation, rows: list[int]) -> float:
    """The gap between tokens over the window: as it was measured, else by all tokens and the sequences that ran."""
    if Signal.TPOT_S in situation.recent.values:
        return _mean(_window(situation, Signal.TPOT_S, rows))
    running = _window(situation, Signal.RUNNING, rows)
    generated = _window(situation, Signal.GENERATION_TOKENS, rows)
    if running is None or generated is None:
        return 0.0
    known = ~np.isnan(running) & ~np.isnan(generated)
    tokens = float(generated[known].sum())
    return float(running[known].sum()) * situation.recent.step_s / tokens if tokens > 0 else 0.0


def _usual(values: Floats) -> float:
    """The median over replicas of each one's mean."""
    with np.errstate(invalid="ignore"):
        means = [float(np.nanmean(row)) for row in values if not np.isnan(row).all()]
    return float(np.median(means)) if means else 0.0


def _window(situation: Situation, signal: Signal, rows: list[int]) -> Floats | None:
    values = situation.recent.values.get(signal)
    if values is None or not rows or not values.size:
        return None
    window = last(values[rows], situation.recent.step_s, WINDOW_S)
    return None if np.isnan(window).mean() > 0.5 and signal in {Signal.FINISHED, Signal.WAITING} else window


def _mean(values: Floats | None) -> float:
    """The mean of what was measured; 0 where nothing was, which teaches nothing."""
    if values is None or np.isnan(values).all():
        return 0.0
    mean = float(np.nanmean(values))
    return mean if math.isfinite(mean) else 0.0
