"""The daily profile of demand: by what factor each part of the day differs from its day's level.

It is made once an hour from the history by the minute, and kept in the policy's memory as one number a bin. The
factors come from a seasonal-trend decomposition by loess (STL: Cleveland et al. 1990; statsmodels) of the log of the
rate, robust against outliers, and are shrunk towards none by the share of the variance that they explain: a
deployment without a daily pattern has a flat profile.
"""

from __future__ import annotations

import numpy as np

from enova_recommender.scaling.situation import Demand, Floats

DAY_S = 86_400.0
BIN_S = 600.0
BINS = int(DAY_S / BIN_S)
DAYS_MIN = 2                  # of history; fewer hold no repetition
RATE_MIN = 1e-3               # requests a second; below it the log says nothing


def daily_profile(history: Demand) -> tuple[float, ...]:
    """The log of the factor of each ten minutes of the day, from midnight of model time; empty for short history."""
    bins, first = _binned(history)
    if len(bins) < DAYS_MIN * BINS or np.isnan(bins).mean() > 1 - 1 / DAYS_MIN:
        return ()
    from statsmodels.tsa.seasonal import STL  # two seconds to import; most deployments are young

    logs = np.log(np.maximum(_interpolated(bins), RATE_MIN))
    found = STL(logs, period=BINS, robust=True).fit()
    seasonal, rest = np.asarray(found.seasonal), np.asarray(found.resid)
    explained = max(0.0, 1 - float(np.var(rest)) / max(float(np.var(seasonal + rest)), 1e-12))
    last_day = explained * seasonal[-BINS:]
    start = (first + len(bins) - BINS) % BINS
    return tuple(float(each) for each in np.roll(last_day - last_day.mean(), start))


def factors_at(profile: tuple[float, ...], stamps_s: Floats) -> Floats:
    """The log of the factor at each of `stamps_s`, between the middles of bins in a straight line."""
    middles = (np.arange(-1, BINS + 1) + 0.5) * BIN_S
    wrapped = np.array([profile[-1], *profile, profile[0]])
    return np.asarray(np.interp(stamps_s % DAY_S, middles, wrapped))


def _binned(history: Demand) -> tuple[Floats, int]:
    """Mean rate of each bin (NaN where less than half is known), oldest first, and the first bin's place in its day."""
    count = len(history.arrived)
    ends_s = history.end_s - history.step_s * np.arange(count)[::-1]
    place = np.floor((ends_s - history.step_s / 2) / BIN_S).astype(int)
    if count == 0:
        return np.empty(0), 0
    index = place - place[0]
    known = ~np.isnan(history.arrived)
    sums = np.bincount(index[known], weights=history.arrived[known], minlength=index[-1] + 1)
    seconds = np.bincount(index[known], minlength=index[-1] + 1) * history.step_s
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = np.where(seconds >= BIN_S / 2, sums / seconds, np.nan)
    return rates, int(place[0] % BINS)


def _interpolated(values: Floats) -> Floats:
    known = ~np.isnan(values)
    index = np.arange(len(values))
    return np.asarray(np.interp(index, index[known], values[known]))
