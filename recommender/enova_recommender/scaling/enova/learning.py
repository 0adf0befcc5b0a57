"""What a replica really carries: the told capacity times a factor that is learnt from what replicas do. Pure.

Theory of operation. Two things are evidence. A replica whose queue does not empty finishes as much as it can: a share
of that (`SLO_SHARE`) is what it carries in time. A replica without a queue that meets the objectives carries at least
what it finishes. The first pulls the factor to what was seen, the second only up. So a wrong prior is mended within
minutes of load in either direction, and light load teaches nothing.
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
    elif tpot_s > objective.tpot_s:
        # The batch is too large for the gap between tokens: fewer requests a second would have met it.
        carried = ratio * objective.tpot_s / tpot_s
        factor += RATE_DOWN * min(carried - factor, 0.0)
    elif late:
        # First tokens are late on average, so far too many are: it is past what it carries, queue or none.
        factor += RATE_DOWN * min(SLO_SHARE * ratio - factor, 0.0)
    elif max(queues) <= QUEUE_NONE and ratio > factor:
        factor += RATE_UP * (ratio - factor)
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
    queues = (_mean(waiting[:, : max(half, 1)]), _mean(waiting[:, half:]))
    per_s = _mean(finished) / recent.step_s
    ttft, tpot = (_window(situation, signal, settled) for signal in (Signal.TTFT_S, Signal.TPOT_S))
    return per_s, queues, _mean(ttft), _mean(tpot)


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
