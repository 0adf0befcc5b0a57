"""Burn rates of error budgets, in several windows at once, as site reliability engineers alert on them.

A burn rate of 1 uses up the budget (1 - objective) just in time. A rule fires while the rate exceeds its factor both
in a long window, so that what happened matters, and in a short one, so that it is still happening (Beyer et al., The
Site Reliability Workbook, chapter 5: "Multiwindow, Multi-Burn-Rate Alerts").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from enova_recommender.detection.features import Flags, Floats

BUCKETS_PER_SHORTEST = 5.0   # how finely the shortest window is cut
EVENTS_MIN = 10.0            # in a short window: of fewer no share can be told


@dataclass(frozen=True, slots=True, kw_only=True)
class BurnRule:
    """Alert while the budget burns `factor` times too fast in both windows."""

    long_s: float
    short_s: float
    factor: float


RULES = (
    BurnRule(long_s=3600.0, short_s=300.0, factor=14.4),
    BurnRule(long_s=6 * 3600.0, short_s=1800.0, factor=6.0),
    BurnRule(long_s=3 * 86_400.0, short_s=6 * 3600.0, factor=1.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Burn:
    """What the rules say of every series now; rules by series."""

    rates: Floats            # the smaller of the long and the short window's, NaN of too few events
    firing: Flags
    complete: Flags          # by rule: whether its long window has passed since the start

    @property
    def alarm(self) -> Flags:
        """Series for which any rule fires."""
        return np.asarray(self.firing.any(axis=0))


class BurnRate:
    """Counts good and bad events of many series, each in a ring of buckets as long as the longest window."""

    def __init__(
        self, *, series: int, objective: float, rules: tuple[BurnRule, ...] = RULES, events_min: float = EVENTS_MIN
    ) -> None:
        if not 0.0 < objective < 1.0:
            raise ValueError(f"objective: must lie between 0 and 1, not {objective:g}")
        self.rules = rules
        self._budget = 1.0 - objective
        self._events_min = events_min
        self._bucket_s = min(rule.short_s for rule in rules) / BUCKETS_PER_SHORTEST
        buckets = math.ceil(max(rule.long_s for rule in rules) / self._bucket_s) + 1
        self._counts = np.zeros((buckets, 2, series), dtype=np.float32)  # bad, all
        self._now: int | None = None
        self._first = 0

    def update(self, *, now_s: float, good: Floats, bad: Floats) -> Burn:
        """Add one step's events, which end at `now_s`; what is not finite or negative counts as none."""
        if math.isfinite(now_s):
            self._advance(math.floor(now_s / self._bucket_s))
            wrong, right = _counted(bad), _counted(good)
            self._counts[(self._now or 0) % len(self._counts)] += np.array([wrong, wrong + right])
        return self._judge()

    def grow(self, series: int) -> None:
        """Make room for so many series."""
        more = series - self._counts.shape[2]
        if more > 0:
            self._counts = np.pad(self._counts, ((0, 0), (0, 0), (0, more)))

    def forget(self, row: int) -> None:
        """Another replica has this row."""
        if row < self._counts.shape[2]:
            self._counts[:, :, row] = 0.0

    def _advance(self, bucket: int) -> None:
        if self._now is None:
            self._now = self._first = bucket
            return
        if not 0 <= bucket - self._now < len(self._counts):  # set back, or nothing left of the past
            self._counts[:] = 0.0
            self._now = self._first = bucket
            return
        for empty in range(self._now + 1, bucket + 1):
            self._counts[empty % len(self._counts)] = 0.0
        self._now = bucket

    def _judge(self) -> Burn:
        rates = np.full((len(self.rules), self._counts.shape[2]), np.nan)
        complete = np.zeros(len(self.rules), dtype=bool)
        for index, rule in enumerate(self.rules):
            long, short = self._burn(rule.long_s), self._burn(rule.short_s)
            rates[index] = np.where(np.isnan(long) | np.isnan(short), np.nan, np.minimum(long, short))
            complete[index] = ((self._now or 0) - self._first) * self._bucket_s >= rule.long_s
        factors = np.array([rule.factor for rule in self.rules])[:, None]
        with np.errstate(invalid="ignore"):
            return Burn(rates=rates, firing=rates > factors, complete=complete)

    def _burn(self, window_s: float) -> Floats:
        now = self._now or 0
        wanted = (now - np.arange(max(1, round(window_s / self._bucket_s)))) % len(self._counts)
        bad, total = self._counts[wanted].sum(axis=0, dtype=np.float64)
        share = np.divide(bad, total, out=np.full(len(bad), np.nan), where=total >= self._events_min)
        return np.asarray(share / self._budget)


def _counted(events: Floats) -> Floats:
    return np.where(np.isfinite(events) & (events > 0), np.minimum(events, 1e9), 0.0)
