"""Thresholds by extreme-value theory: how high a score must be to occur by chance at a stated rate.

Excesses over a high level follow a generalised Pareto law (Pickands 1975), whatever the scores are made of. Its two
parameters are found by probability-weighted moments (Hosking and Wallis 1987): closed, and good with few peaks. The
streaming form follows SPOT and DSPOT (Siffer et al., KDD 2017): alarms are not learnt from, peaks below them are, and
a slow drift of the scores is taken off first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

LEVEL_QUANTILE = 0.98   # of the scores that are fitted: peaks lie above it
PEAKS_MIN = 20          # fewer say nothing of the tail's shape: it is then taken as exponential
PEAKS_MAX = 2000        # newest ones that are kept
SHAPE_MIN, SHAPE_MAX = -0.5, 0.45  # moments exist below a half; below minus a half the end point is a guess
EXCESS_MIN = 1e-12      # a tail of equal scores has this scale: any higher score is then rare
DRIFT_STEPS = 600       # memory of the drift, in steps of normal scores
REFIT_PEAKS = 20        # new peaks after which the tail is fitted anew
COUNT_STEPS = 100       # normal scores of each series after which they are counted, if no peak came before


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """The upper tail of scores: above `level`, which `peaks` of `observations` exceeded, a generalised Pareto law."""

    level: float
    shape: float
    scale: float
    peaks: int
    observations: int

    def probability(self, scores: npt.ArrayLike) -> Floats:
        """The chance that a normal score is at least so high; above one half of the level's own rate it is a bound."""
        above = np.maximum(np.asarray(scores, dtype=np.float64) - self.level, 0.0) / self.scale
        if abs(self.shape) < 1e-6:
            beyond = np.exp(-above)
        else:
            beyond = np.maximum(1.0 + self.shape * above, 0.0) ** (-1.0 / self.shape)
        return np.asarray((self.peaks / self.observations) * beyond)

    def quantile(self, rate: float) -> float:
        """The score that normal ones reach at this rate; at rates above that of the peaks, the level itself."""
        ratio = rate * self.observations / self.peaks
        if ratio >= 1.0:
            return self.level
        if abs(self.shape) < 1e-6:
            return self.level - self.scale * math.log(ratio)
        return self.level + self.scale / self.shape * (math.pow(ratio, -self.shape) - 1.0)

    def save(self) -> Floats:
        """Its five figures."""
        return np.array([self.level, self.shape, self.scale, self.peaks, self.observations], dtype=np.float64)

    @classmethod
    def load(cls, saved: Floats) -> Tail:
        """What `save` returned, as it was."""
        level, shape, scale, peaks, observations = saved.tolist()
        return cls(level=level, shape=shape, scale=scale, peaks=int(peaks), observations=int(observations))


def fit_tail(scores: npt.ArrayLike, *, level_quantile: float = LEVEL_QUANTILE) -> Tail:
    """The tail of these scores; what is not finite is left out. Raises ValueError if nothing is left."""
    known = np.asarray(scores, dtype=np.float64)
    known = known[np.isfinite(known)]
    if known.size == 0:
        raise ValueError("scores: there is not one to fit a tail to")
    level = float(np.quantile(known, level_quantile))
    return _tail(level, known[known > level] - level, known.size)


def _tail(level: float, excesses: Floats, observations: int) -> Tail:
    """The law of these excesses: of its moments, or exponential where they are few."""
    peaks = max(1, excesses.size)
    mean = float(excesses.mean()) if excesses.size else 0.0
    if mean <= EXCESS_MIN:
        return Tail(level=level, shape=0.0, scale=EXCESS_MIN, peaks=peaks, observations=observations)
    if excesses.size < PEAKS_MIN:
        return Tail(level=level, shape=0.0, scale=mean, peaks=peaks, observations=observations)
    ordered = np.sort(excesses)
    ranks = (np.arange(1, ordered.size + 1) - 0.35) / ordered.size
    weighted = float(((1.0 - ranks) * ordered).mean())
    shape = float(np.clip(2.0 - mean / (mean - 2.0 * weighted), SHAPE_MIN, SHAPE_MAX))
    # With the shape bounded, the scale that keeps the mean excess.
    return Tail(level=level, shape=shape, scale=mean * (1.0 - shape), peaks=peaks, observations=observations)


class DriftingThreshold:
    """Alarms at a stated rate, for many series that share one tail and have each its own drift.

    `rate` is the wished share of normal steps that raise an alarm. Fit it on scores of normal time that the detector
    had not learnt when it gave them (those that it had are lower), then give it each step's scores in order.

    With `shift_steps`, an alarm that lasts so many steps in a row has been seen by then: its level is taken for the new
    normal. Without, an alarm lasts as long as the scores do.
    """

    def __init__(
        self, *, rate: float, series: int = 1, drift_steps: int = DRIFT_STEPS, shift_steps: int | None = None
    ) -> None:
        if not 0.0 < rate < 1.0 - LEVEL_QUANTILE:
            raise ValueError(f"rate: must lie between 0 and {1 - LEVEL_QUANTILE:g}, not {rate:g}")
        self.rate = rate
        self.alarms = 0
        self.steps = 0                # scores that were judged, of all series
        self._keep = 1.0 - 1.0 / drift_steps
        self._shift_steps = shift_steps or 0
        self._run = np.zeros(series)          # alarms in a row
        self._run_sum = np.zeros(series)      # of their scores
        self._drift = np.full(series, np.nan)
        self._base = 0.0
        self._tail = Tail(level=math.inf, shape=0.0, scale=1.0, peaks=1, observations=1)
        self._peaks: Floats = np.empty(0)
        self._fresh = 0               # peaks since the tail was fitted
        self._normal = 0              # scores since they were counted
        self._level = math.inf

    @property
    def tail(self) -> Tail:
        """The law that is in force, of scores less their drift."""
        return self._tail

    @property
    def achieved_rate(self) -> float | None:
        """Share of judged scores that raised an alarm: on normal time it should be `rate`. None before any."""
        return self.alarms / self.steps if self.steps else None

    def fit(self, scores: npt.ArrayLike) -> None:
        """Learn the tail from scores of normal time: an array of steps, or of steps by series."""
        table = np.asarray(scores, dtype=np.float64)
        table = table.reshape(len(table), -1)
        self._base = float(np.nanmedian(table))
        self._drift[:] = self._base
        residuals = np.concatenate([self._without_drift(column) for column in table.T])
        self._tail = fit_tail(residuals)
        above = residuals[residuals > self._tail.level] - self._tail.level
        self._peaks = above[-PEAKS_MAX:]
        self._level = self._tail.quantile(self.rate)

    def update(self, scores: npt.ArrayLike) -> Flags:
        """Which series raise an alarm at this step. A score that is not finite raises none and is not learnt."""
        now = np.atleast_1d(np.asarray(scores, dtype=np.float64))
        known = np.isfinite(now)
        residual = np.where(known, now, -np.inf) - self._drift
        alarms: Flags = known & (residual > self._level)
        normal = known & ~alarms
        peaks = normal & (residual > self._tail.level)
        self.steps += int(known.sum())
        self.alarms += int(alarms.sum())
        self._drift[normal] = self._keep * self._drift[normal] + (1.0 - self._keep) * now[normal]
        self._normal += int(normal.sum())
        self._shift(now, alarms, known)
        if peaks.any() or self._normal >= COUNT_STEPS * len(self._drift):
            self._learn(residual[peaks] - self._tail.level)
        return alarms

    def judge(self, scores: Floats) -> Flags:
        """Which steps of the only series raise an alarm: what `update` would say of each in turn, in less time."""
        alarms = np.zeros(len(scores), dtype=np.bool_)
        keep, fresh = self._keep, 1.0 - self._keep
        (drift,), (run,), (run_sum,) = self._drift.tolist(), self._run.tolist(), self._run_sum.tolist()
        for step, score in enumerate(np.asarray(scores, dtype=np.float64).tolist()):
            if not math.isfinite(score):
                continue
            self.steps += 1
            residual = score - drift
            if residual > self._level:
                self.alarms += 1
                alarms[step] = True
                run, run_sum = run + 1, run_sum + score
                if run == self._shift_steps:
                    drift, run, run_sum = run_sum / run, 0, 0.0
                continue
            run, run_sum = 0, 0.0
            drift = keep * drift + fresh * score
            self._normal += 1
            if residual > self._tail.level:
                self._learn(np.array([residual - self._tail.level]))
            elif self._normal >= COUNT_STEPS:
                self._learn(np.empty(0))
        self._drift[0], self._run[0], self._run_sum[0] = drift, run, run_sum
        return alarms

    @property
    def level(self) -> float:
        """How far above its drift a score raises an alarm."""
        return self._level

    def save(self) -> dict[str, Floats]:
        """Everything that it knows, as arrays."""
        counts = [self.alarms, self.steps, self._fresh, self._normal, self._shift_steps]
        return {
            "rate": np.array([self.rate, self._keep, self._base, self._level]),
            "counts": np.array(counts, dtype=np.float64),
            "tail": self._tail.save(),
            "drift": self._drift.copy(),
            "run": np.stack((self._run, self._run_sum)),
            "peaks": self._peaks.copy(),
        }

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> DriftingThreshold:
        """What `save` returned, as it was."""
        rate, keep, base, level = saved["rate"].tolist()
        loaded = cls(rate=rate, series=len(saved["drift"]))
        loaded._keep, loaded._base, loaded._level = keep, base, level
        loaded.alarms, loaded.steps, loaded._fresh, loaded._normal, loaded._shift_steps = (
            int(value) for value in saved["counts"]
        )
        loaded._run, loaded._run_sum = saved["run"].copy()
        loaded._tail = Tail.load(saved["tail"])
        loaded._drift, loaded._peaks = saved["drift"].copy(), saved["peaks"].copy()
        return loaded

    def _shift(self, scores: Floats, alarms: Flags, known: Flags) -> None:
        """Take the level of alarms that have lasted for the new normal."""
        ended = known & ~alarms
        self._run = np.where(ended, 0.0, self._run + alarms)
        self._run_sum = np.where(ended, 0.0, self._run_sum + np.where(alarms, scores, 0.0))
        lasted = (self._run == self._shift_steps) & alarms
        if lasted.any():
            self._drift[lasted] = self._run_sum[lasted] / self._run[lasted]
            self._run[lasted], self._run_sum[lasted] = 0.0, 0.0

    def _without_drift(self, column: Floats) -> Floats:
        """Residuals of one series, as `update` would see them if none raised an alarm."""
        drift, residuals = self._base, np.full(len(column), np.nan)
        for step, score in enumerate(column.tolist()):
            if math.isfinite(score):
                residuals[step] = score - drift
                drift = self._keep * drift + (1.0 - self._keep) * score
        return residuals

    def _learn(self, excesses: Floats) -> None:
        tail = self._tail
        self._peaks = np.concatenate((self._peaks, excesses))[-PEAKS_MAX:]
        self._fresh += excesses.size
        observations, peaks = tail.observations + self._normal, tail.peaks + excesses.size
        self._normal = 0
        shape, scale = tail.shape, tail.scale
        if self._fresh >= REFIT_PEAKS:
            self._fresh = 0
            fitted = _tail(tail.level, self._peaks, observations)
            shape, scale = fitted.shape, fitted.scale
        self._tail = Tail(level=tail.level, shape=shape, scale=scale, peaks=peaks, observations=observations)
        self._level = self._tail.quantile(self.rate)
