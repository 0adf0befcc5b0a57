"""A seasonal detector: what a value should be at this time of day, and how improbable the difference is.

Theory of operation. The history is folded by medians to at most FOLDS_MAX values a period and taken apart into level,
season and rest by robust STL (statsmodels; loess at every few values, since the season is averaged over periods
anyway). What is kept is one profile a feature, by phase, and only if the profile of one half of the history forecasts
the other. A forecast is the profile at the step's phase on a level that follows the series slowly and within bounds;
the difference is judged by a kernel density of differences in normal time, which come from the profile of the other
half. With fewer than PERIODS_MIN periods of history a season cannot be told from a trend: `short_history` says so, and
the robust level alone forecasts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter

from enova_recommender.detection.detector import (
    LEARNT_MAX,
    Flags,
    NotFitted,
    check_features,
    check_history,
    measured,
    nested,
    part_of,
    shares_of,
    splits,
    thinned,
)
from enova_recommender.detection.scaling import RobustScale
from enova_recommender.detection.tails import KernelTails

Floats = npt.NDArray[np.float64]

STEPS_MIN = 32           # of history
PERIODS_MIN = 2.0        # of history, for a season
FOLDS_MAX = 24           # values a period in the decomposition: hours of a day
FOLDS_MIN = 4            # fewer are no season
PERIODS_MAX = 14         # newest ones that are taken apart
JUMPS = 8                # loess fits a period; between them is a straight line
ROBUST_ROUNDS = 4
SEASON_SHARE_MIN = 0.1   # of the spread that the other half's season must explain, or it is noise
KNOWN_SHARE_MIN = 0.5    # of folded values that must be known for a season
LEVEL_WEIGHT = 0.05      # of the newest step in the level that forecasts stand on
LEVEL_BOUND = 1.0        # spreads from the median within which the level follows


class SeasonalDetector:
    """Forecast residuals of each feature against its own season. `period_steps` is None where none is known."""

    name = "seasonal"

    def __init__(self, *, period_steps: int | None = None) -> None:
        self.short_history = True     # too short for a season: the robust level forecasts alone
        self._period = period_steps
        self._scale = RobustScale()
        self._tails = KernelTails()
        self._profile: Floats = np.zeros((1, 0))   # phases by features; one phase is no season
        self._start: Floats = np.empty(0)
        self._held: Floats = np.empty(0)
        self._levels: Floats = np.empty((0, 0))
        self._seen: Flags = np.empty(0, dtype=np.bool_)    # series of which anything was ever measured
        self._last: Floats = np.empty((0, 0))

    @property
    def held_out(self) -> Floats:
        """Scores of each half of the history by the season of the other."""
        return self._held

    def fit(self, history: Floats, mask: Flags | None = None, *, first: int = 0) -> None:
        """Learn from one series. Raises ValueError for fewer than STEPS_MIN steps of which something is known."""
        known = measured(history, mask)
        check_history(int((~np.isnan(known).all(axis=1)).sum()), STEPS_MIN)
        self._scale.fit(known)
        scaled = self._scale.scaled(known)
        self._levels = np.empty((0, 0))
        self._start = np.zeros(scaled.shape[1])
        detrended, start = self._decomposed(scaled, first)
        self.short_history = len(detrended) == 0
        # Each half is forecast by the season of the other: what it is judged by has not seen it.
        folds = self._folds
        cut = len(detrended) // (2 * folds) * folds
        before, after = _profile(detrended[:cut], folds), _profile(detrended[cut:], folds)
        whole = _profile(detrended, folds)
        if not self.short_history:
            forecast = np.concatenate((np.resize(after, (cut, len(self._start))),
                                       np.resize(before, (len(detrended) - cut, len(self._start)))))  # fmt: skip
            rest, all_of_it = np.nanstd(detrended - forecast, axis=0), np.nanstd(detrended, axis=0)
            for profile in (before, after, whole):
                profile[:, ~(rest <= (1.0 - SEASON_SHARE_MIN) * all_of_it)] = 0.0
        half = start + cut // folds * (self._period or 1)
        self._profile = after
        earlier = self._residuals(scaled[:half], first)
        self._profile = before
        residuals = np.concatenate((earlier, self._residuals(scaled[half:], first + half)))
        self._tails.fit(thinned(residuals, LEARNT_MAX))
        self._held = np.full(len(known), np.nan)
        for _, held in splits(len(known)):
            self._held[held] = self._scores(residuals[held])
        self._profile = whole
        tail = scaled[-max(1, round(1.0 / LEVEL_WEIGHT)) :]
        level = np.clip(tail - self._season(first + len(scaled) - len(tail), len(tail)), -LEVEL_BOUND, LEVEL_BOUND)
        self._start = np.nan_to_num(_folded(level, 1, len(level))[0])

    def score(self, values: Floats, *, first: int = 0) -> Floats:
        """One score a step of one series."""
        check_features(values, len(self._start))
        residuals = self._residuals(self._scale.scaled(values), first)
        seen = np.logical_or.accumulate(~np.isnan(residuals).all(axis=1))
        return np.where(seen, self._scores(residuals), np.nan)

    def update(self, values: Floats, *, step: int = 0) -> Floats:
        """One score for each series."""
        check_features(values, len(self._start))
        scaled = self._scale.scaled(values)
        if len(self._levels) != len(values):
            self._levels = np.tile(self._start, (len(values), 1))
            self._seen = np.zeros(len(values), dtype=np.bool_)
        away = scaled - self._season(step, 1)
        self._last = away - self._levels
        moved = self._levels + LEVEL_WEIGHT * (np.clip(away, -LEVEL_BOUND, LEVEL_BOUND) - self._levels)
        self._levels = np.where(np.isnan(away), self._levels, moved)
        self._seen = self._seen | ~np.isnan(away).all(axis=1)
        return np.where(self._seen, self._scores(self._last), np.nan)

    def contributions(self) -> Floats:
        """Shares of the features in the last scores."""
        return shares_of(self._surprises(self._last))

    def save(self) -> dict[str, Floats]:
        """Everything that it knows, as arrays."""
        if not len(self._start):
            raise NotFitted("fit the detector first")
        own = {
            "facts": np.array([self._period or 0, self.short_history], dtype=np.float64),
            "profile": self._profile.copy(), "start": self._start.copy(), "held": self._held.copy(),
            "levels": self._levels.copy(), "seen": self._seen.astype(np.float64),
        }  # fmt: skip
        return {**own, **nested({"scale": self._scale.save(), "tails": self._tails.save()})}

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> SeasonalDetector:
        """What `save` returned, as it was."""
        period, short = saved["facts"].tolist()
        loaded = cls(period_steps=int(period) or None)
        loaded.short_history = bool(short)
        loaded._profile, loaded._start = saved["profile"].copy(), saved["start"].copy()
        loaded._held, loaded._levels = saved["held"].copy(), saved["levels"].copy()
        loaded._seen = saved["seen"] > 0
        loaded._scale = RobustScale.load(part_of(saved, "scale"))
        loaded._tails = KernelTails.load(part_of(saved, "tails"))
        return loaded

    @property
    def _fold_steps(self) -> int:
        return -(-(self._period or 1) // FOLDS_MAX)

    @property
    def _folds(self) -> int:
        return -(-(self._period or 1) // self._fold_steps)

    def _decomposed(self, scaled: Floats, first: int) -> tuple[Floats, int]:
        """Folded values less their level, over whole periods, and the step where they start.

        Nothing if the history is too short.
        """
        period, folds = self._period or 1, self._folds
        start = -first % period
        periods = max(0, len(scaled) - start) // period
        start += max(0, periods - PERIODS_MAX) * period
        periods = min(periods, PERIODS_MAX)
        if folds < FOLDS_MIN or periods < PERIODS_MIN:
            return np.empty((0, scaled.shape[1])), 0
        folded = _folded(scaled[start : start + periods * period], periods, self._fold_steps)
        for column in folded.T:
            known = np.isfinite(column)
            if known.mean() < KNOWN_SHARE_MIN or np.ptp(column[known]) == 0:
                column[:] = 0.0
                continue
            filled = np.interp(np.arange(len(column)), np.flatnonzero(known), column[known])
            column[:] = filled - _level(filled, folds)
        return folded, start

    def _season(self, first: int, steps: int) -> Floats:
        """What the profile says of these steps, straight lines between the middles of its folds."""
        folds, period = len(self._profile), self._period
        if folds < FOLDS_MIN or period is None:
            return np.zeros((1, self._profile.shape[1]))
        place = (np.arange(period) + 0.5) / self._fold_steps - 0.5
        index = np.floor(place).astype(np.intp)
        part = (place - index)[:, None]
        day = (1.0 - part) * self._profile[index % folds] + part * self._profile[(index + 1) % folds]
        return np.asarray(day[(first + np.arange(steps)) % period])

    def _residuals(self, scaled: Floats, first: int) -> Floats:
        """Each value less its forecast, NaN where it is missing."""
        away = scaled - self._season(first, len(scaled))
        bounded = np.clip(away, -LEVEL_BOUND, LEVEL_BOUND)
        columns = np.isnan(bounded).any(axis=0)
        whole = slice(None) if not columns.any() else np.flatnonzero(~columns)
        start = (1.0 - LEVEL_WEIGHT) * self._start[whole]
        levels, _ = lfilter([LEVEL_WEIGHT], [1.0, LEVEL_WEIGHT - 1.0], bounded[:, whole], axis=0, zi=start[None, :])
        for column in np.flatnonzero(columns).tolist():
            level = float(self._start[column])
            for step, value in enumerate(bounded[:, column].tolist()):
                away[step, column] -= level
                level = level if math.isnan(value) else level + LEVEL_WEIGHT * (value - level)
        away[1:, whole] -= levels[:-1]
        away[:1, whole] -= self._start[whole]
        return away

    def _surprises(self, residuals: Floats) -> Floats:
        return self._tails.surprise(residuals) + self._tails.beyond(residuals)

    def _scores(self, residuals: Floats) -> Floats:
        """Mean surprise of the features of each row; what is missing is as forecast."""
        return np.asarray(self._surprises(residuals).mean(axis=1))


def _folded(values: Floats, periods: int, fold_steps: int) -> Floats:
    """Medians of each so many steps of each period; the last of a period may have fewer."""
    table = values.reshape(periods, -1, values.shape[1])
    missing = -table.shape[1] % fold_steps
    table = np.pad(table, ((0, 0), (0, missing), (0, 0)), constant_values=np.nan)
    ordered = np.sort(table.reshape(-1, fold_steps, values.shape[1]), axis=1)  # NaN comes last
    known = (~np.isnan(ordered)).sum(axis=1)
    low, high = np.maximum(known - 1, 0) // 2, known // 2
    middle = [np.take_along_axis(ordered, np.minimum(index, fold_steps - 1)[:, None], axis=1)[:, 0]
              for index in (low, high)]  # fmt: skip
    return np.asarray(np.where(known > 0, 0.5 * (middle[0] + middle[1]), np.nan))


def _level(values: Floats, folds: int) -> Floats:
    """The slow part of values that have a season of so many: robust STL's trend."""
    from statsmodels.tsa.seasonal import STL

    jump = max(1, folds // JUMPS)
    parts = STL(values, period=folds, robust=True, seasonal_jump=jump, trend_jump=jump, low_pass_jump=jump)
    return np.asarray(parts.fit(inner_iter=1, outer_iter=ROBUST_ROUNDS).trend)


def _profile(detrended: Floats, folds: int) -> Floats:
    """One period: the median of each phase, about 0; nothing of nothing."""
    if len(detrended) < folds:
        return np.zeros((1, detrended.shape[1]))
    medians = np.stack([np.median(detrended[phase::folds], axis=0) for phase in range(folds)])
    return np.asarray(medians - medians.mean(axis=0))
