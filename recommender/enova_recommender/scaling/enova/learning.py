"""What a replica really carries: the told capacity times a factor that is learnt from what replicas do. Pure.

Theory of operation. How steps slow down with what is in them (`steps`) tells within minutes, and at half of the load,
what a replica carries: the factor is pulled there. Lateness corrects it: a replica whose queue does not empty finishes
as much as it can, and a share of that (`SLO_SHARE`) is what it carries in time; so it is where first tokens are late.
Where steps tell nothing, too long a gap between tokens pulls it down as well, and what is carried in time pulls it up;
below 1 it then drifts back slowly, so that one bad minute does not cost for ever. Until anything has taught a factor,
the told value is good enough to grow by, and its lower end (`careful_factor`) to shrink by. First tokens count where
they are measured by the step (the simulator does, the coordinator does not yet).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from enova_recommender.scaling.enova.demand import last
from enova_recommender.scaling.enova.steps import rate_by_steps
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


def learnt_factor(situation: Situation, variant: VariantSight, factor: float | None, *, weight: float) -> float | None:
    """The factor after this situation; None as long as nothing has taught one.

    `weight` is a request's work against the mix of the told capacity.
    """
    told = max(variant.capacity.requests_per_s.value, 1e-9) / weight
    rows = _settled(situation, variant)
    by_steps = rate_by_steps(situation, variant, rows)
    measured = by_steps / told if by_steps is not None else None
    seen = _seen(situation, rows)
    if seen is None:
        return factor
    if factor is None and measured is not None:
        factor = min(measured, 1.0)        # what is better than told is believed slowly
    pull = _pull(situation, seen, measured, 1.0 if factor is None else factor, told=told)
    if factor is None and pull == 0:
        return None
    low, high = FACTOR_BOUNDS
    return min(max((1.0 if factor is None else factor) + pull, low), high)


def careful_factor(variant: VariantSight) -> float:
    """What is taken for sure where nothing has taught a factor: the lower end of what is told."""
    told = variant.capacity.requests_per_s
    return min(1.0, max(told.low / told.value, FACTOR_BOUNDS[0])) if told.value > 0 else 1.0


def _pull(situation: Situation, seen: _Seen, measured: float | None, factor: float, *, told: float) -> float:
    """What is added to the factor at this look."""
    ratio = seen.finished_per_s / told
    saturated = SLO_SHARE * ratio
    tpot_s = situation.objective.tpot_s
    if min(seen.queues) >= QUEUE_SATURATED:
        return RATE_DOWN * ((saturated if measured is None else min(saturated, measured)) - factor)
    if seen.ttft_s > TTFT_SHARE * situation.objective.ttft_s and ratio > LOADED_SHARE * factor:
        # First tokens are late on average, so far too many are: it is past what it carries, queue or none.
        return RATE_DOWN * min(saturated - factor, 0.0)
    if measured is not None:
        return (RATE_DOWN if measured < factor else RATE_UP) * (measured - factor)
    if seen.tpot_s > tpot_s and ratio > LOADED_SHARE * factor:
        # The batch is too large for the gap between tokens: fewer requests a second would have met it.
        return RATE_DOWN * min(ratio * tpot_s / seen.tpot_s - factor, 0.0)
    if max(seen.queues) <= QUEUE_NONE and not seen.is_late(situation):
        return RATE_UP * (ratio - factor) if ratio > factor else RATE_DRIFT * max(1.0 - factor, 0.0)
    return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """Of settled replicas over the window: finished a second, queues in both halves of it, means of TTFT and TPOT."""

    finished_per_s: float
    queues: tuple[float, float]
    ttft_s: float
    tpot_s: float

    def is_late(self, situation: Situation) -> bool:
        """Whether too many first tokens or gaps miss the objective."""
        objective = situation.objective
        return self.ttft_s > TTFT_SHARE * objective.ttft_s or self.tpot_s > objective.tpot_s


def _settled(situation: Situation, variant: VariantSight) -> list[int]:
    """Rows of the variant's replicas that have been READY for the window."""
    rows = {name: row for row, name in enumerate(situation.recent.replicas)}
    return [
        rows[replica.name]
        for replica in situation.replicas
        if replica.variant == variant.name
        and replica.carries
        and replica.name in rows
        and situation.now_s - replica.since_s >= SETTLED_S + WINDOW_S
    ]


def _seen(situation: Situation, settled: list[int]) -> _Seen | None:
    finished = _window(situation, Signal.FINISHED, settled)
    waiting = _window(situation, Signal.WAITING, settled)
    if finished is None or waiting is None:
        return None
    half = waiting.shape[1] // 2
    # The usual replica, not the mean: one that is ill says nothing of what the others carry.
    queues = (_usual(waiting[:, : max(half, 1)]), _usual(waiting[:, half:]))
    return _Seen(
        finished_per_s=_mean(finished) / situation.recent.step_s, queues=queues,
        ttft_s=_mean(_window(situation, Signal.TTFT_S, settled)), tpot_s=_tpot_s(situation, settled),
    )


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
