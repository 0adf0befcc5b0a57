"""Demand some minutes ahead, with its quantiles, by the forecaster that was best of late.

Theory of operation. Each forecaster says what the rate will be `lead` minutes after each past minute, from what was
known then. Its ratios of actual to forecast are its record: the quantile of the recent ones, times its forecast for
now, is its answer, so that noise, drift and growth of this very deployment make the margin and no assumed
distribution does. The forecaster with the least pinball loss (Koenker and Bassett 1978) at the wanted quantile over
its record is asked. Where the record is short, the quantile is that of a Poisson count with a log-normal drift
(`PRIOR_DRIFT`), and gives way as evidence comes in. A level that what comes now has overtaken is not asked, nor is
anybody but the ramp where the median of the last minutes' increments is above chance: what rises steadily goes on for
a while, whatever the record of calmer hours says. The daily profile is the seasonal part of an STL decomposition
(Cleveland et al. 1990, statsmodels) of the logarithm of the rate; it needs two days.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from enova_recommender.scaling.situation import Floats

RECORD_MINUTES = 360          # of each forecaster's record that are looked at
HALF_LIFE_MINUTES = 120.0     # of a record's weight
PRIOR_MINUTES = 120.0         # of evidence that the prior spread weighs as much as: one jump is no habit
TREND_RECORD_MINUTES = 60     # of history before a trend is looked at: until then a jump would pass for one
PRIOR_DRIFT = 0.04            # sigma of the log of the rate's change in one minute; grows with the root of time
LEVEL_MINUTES = (1, 3, 10)
OVERTAKEN_SIGMAS = 2.0        # of a Poisson count in each of two minutes
TREND_MINUTES = 10            # over which a trend is drawn
TREND_DAMPING = 0.7           # share of a trend that goes on
TREND_RATIO_MAX = 2.0         # by which a trend may change the level
RAMP_MINUTES = 5              # a rise that most of these minutes share is a steady one
RAMP_DAMPING = 0.7            # share of a steady rise that goes on
RATE_MIN = 1e-3               # requests a second below which a rate is noise; keeps ratios finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """Rates (requests a second) `lead_minutes` ahead. `method` and `record_minutes` say where they come from."""

    p50: float
    low: float
    high: float
    method: str
    record_minutes: int


def outlook(
    rates: Floats, *, now_rate: float, lead_minutes: int, quantile: float, profile: Floats | None = None
) -> Outlook:
    """The rate `lead_minutes` after the last of `rates`, and its 1 - `quantile` and `quantile` quantiles.

    `rates` are requests a second by the minute, oldest first, NaN where unknown; `now_rate` is the freshest estimate;
    `profile` is the log of the daily factor of each minute of `rates` and of the `lead_minutes` (at least 1) after.
    """
    filled = _filled(rates)
    found = [
        _answer(name, past, now, filled, now_rate=now_rate, lead=lead_minutes, quantile=quantile)
        for name, past, now in _forecasters(filled, now_rate, lead_minutes, profile)
    ]
    _, best = min(found, key=lambda each: each[0])
    return best


def _forecasters(
    rates: Floats, now_rate: float, lead: int, profile: Floats | None
) -> list[tuple[str, Floats, float]]:
    """Name, forecasts made at each past minute, and the forecast made now."""
    made: list[tuple[str, Floats, float]] = []
    for minutes in LEVEL_MINUTES:
        level = _trailing_mean(rates, minutes)
        last = float(level[-1]) if len(level) else now_rate
        now = now_rate if minutes == 1 else (now_rate + (minutes - 1) * last) / minutes
        if now_rate > now * (1 + OVERTAKEN_SIGMAS * math.sqrt(2 / max(60 * now_rate, 1.0))):
            continue           # what comes now is more than chance: an older level has been overtaken
        made.append((f"level of {minutes} min", level, now))
    if len(rates) > RAMP_MINUTES:
        ramp = _ramp(rates)
        if ramp[-1] > 0:       # a steady rise: who knows nothing of it is not asked
            return [("ramp", made[0][1] + lead * RAMP_DAMPING * ramp, now_rate + lead * RAMP_DAMPING * float(ramp[-1]))]
    if len(rates) >= TREND_RECORD_MINUTES:
        ratio = _trend_ratio(rates, lead)
        made.append(("trend", made[0][1] * ratio, made[0][2] * float(ratio[-1])))
    if profile is not None and len(rates):
        factors = np.exp(profile[len(profile) - len(rates) - lead :])
        ahead = factors[lead:] / factors[:-lead]
        made.append(("daily profile", made[0][1] * ahead, made[0][2] * float(ahead[-1])))
    return made


def _answer(
    name: str, past: Floats, now: float, rates: Floats, *, now_rate: float, lead: int, quantile: float
) -> tuple[float, Outlook]:
    """The loss over the record, and the answer."""
    forecasts, actual = past[:-lead][-RECORD_MINUTES:], rates[lead:][-RECORD_MINUTES:]
    known = ~np.isnan(forecasts) & ~np.isnan(actual)
    logs = np.log(np.maximum(actual[known], RATE_MIN) / np.maximum(forecasts[known], RATE_MIN))
    weights = 0.5 ** (np.arange(len(logs))[::-1] / HALF_LIFE_MINUTES)
    spread = _prior_spread(max(now_rate, now), lead)
    evidence = float(weights.sum())
    trust = evidence / (evidence + PRIOR_MINUTES)
    z = float(norm.ppf(quantile))
    quantiles = [
        trust * _weighted_quantile(logs, weights, q) + (1 - trust) * prior
        for q, prior in ((1 - quantile, -z * spread), (0.5, 0.0), (quantile, z * spread))
    ]
    misses = logs - quantiles[2]
    losses = np.where(misses > 0, quantile * misses, (quantile - 1) * misses)
    # A record of few minutes may be good by luck: the first forecaster (the plain level) wins ties.
    loss = float((weights * losses).sum() + spread * PRIOR_MINUTES) / (evidence + PRIOR_MINUTES)
    low, p50, high = (now * math.exp(each) for each in quantiles)
    return loss, Outlook(p50=p50, low=low, high=max(high, p50), method=name, record_minutes=int(known.sum()))


def _prior_spread(rate: float, lead: int) -> float:
    """Sigma of log(actual / forecast): a Poisson count in each of two minutes, and a drift."""
    return math.sqrt(2 / max(60 * rate, 1.0) + PRIOR_DRIFT**2 * lead)


def _weighted_quantile(values: Floats, weights: Floats, quantile: float) -> float:
    if len(values) == 0:
        return 0.0
    order = np.argsort(values)
    below = np.cumsum(weights[order]) - weights[order] / 2
    return float(np.interp(quantile * weights.sum(), below, values[order]))


def _trailing_mean(rates: Floats, minutes: int) -> Floats:
    """The mean of the last `minutes` at each minute; of fewer at the start."""
    sums = np.cumsum(np.concatenate([[0.0], rates]))
    last = np.arange(1, len(rates) + 1)
    first = np.maximum(last - minutes, 0)
    return np.asarray((sums[last] - sums[first]) / (last - first))


def _trend_ratio(rates: Floats, lead: int) -> Floats:
    """By what the level changes in `lead` minutes if a damped share of its latest change goes on."""
    half = TREND_MINUTES // 2
    new = np.maximum(_trailing_mean(rates, half), RATE_MIN)
    old = np.concatenate([new[:1].repeat(min(half, len(new))), new[:-half]])[: len(new)]
    # From the middle of the newer half to `lead` minutes on, half the span of the two halves' middles apart.
    growth = np.log(new / old) * TREND_DAMPING * (lead + half / 2) / half
    limit = math.log(TREND_RATIO_MAX)
    return np.asarray(np.exp(np.clip(growth, -limit, limit)))


def _ramp(rates: Floats) -> Floats:
    """By how much the rate steadily rises in a minute, 0 where it does not: a step moves no median of increments."""
    increments = np.diff(rates, prepend=rates[:1].repeat(RAMP_MINUTES))
    median = np.median(np.lib.stride_tricks.sliding_window_view(increments, RAMP_MINUTES), axis=1)[-len(rates) :]
    noise = np.sqrt(2 * np.maximum(rates, RATE_MIN) / 60)
    return np.where(median > noise, median, 0.0)


def _filled(rates: Floats) -> Floats:
    """Gaps take the last known value: a gap is no change. Empty where nothing is known."""
    known = ~np.isnan(rates)
    if not known.any():
        return np.empty(0)
    start = int(np.argmax(known))
    index = np.maximum.accumulate(np.where(known, np.arange(len(rates)), start))
    return np.asarray(rates[index][start:], dtype=float)

