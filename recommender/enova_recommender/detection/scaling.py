"""Features on one scale: centred on the median and divided by the spread of normal time; missing stays missing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

INNER_QUANTILE = 0.02    # the spread is measured between this quantile and its mirror
SPREAD_SHARE_MIN = 0.1   # of the largest value: or a feature that hardly moved would make any change strange
SPREAD_OF_ZERO = 0.1     # for features that were always zero
HUGE, TINY = 1e100, 1e-100  # bounds of values and of spreads: their squares and ratios stay finite
ROWS_MAX = 6000          # evenly spaced, whose quantiles are taken
BOUND = 10.0             # spreads from the median; beyond it a feature has said what it can say


class RobustScale:
    """Medians and spreads of features, learnt once."""

    def __init__(self) -> None:
        self._centre: Floats = np.empty(0)
        self._spread: Floats = np.empty(0)

    def fit(self, history: Floats) -> None:
        """Learn from an array of steps by features; a feature without any value gets centre 0 and spread 1."""
        known, bounded = np.isfinite(history), np.clip(history, -HUGE, HUGE)
        self._centre = np.zeros(history.shape[1])
        self._spread = np.ones(history.shape[1])
        for column in range(history.shape[1]):
            values = bounded[known[:, column], column]
            if values.size == 0:
                continue
            some = values[:: -(-values.size // ROWS_MAX)]
            low, middle, high = np.quantile(some, [INNER_QUANTILE, 0.5, 1.0 - INNER_QUANTILE])
            floor = SPREAD_SHARE_MIN * float(np.abs(values).max()) or SPREAD_OF_ZERO
            self._centre[column] = middle
            self._spread[column] = max(high - low, float(values.std()), floor, TINY)

    def scaled(self, values: Floats) -> Floats:
        """Values in spreads from the median, within BOUND; NaN where nothing was measured."""
        scaled = np.where(np.isfinite(values), values, np.nan)
        np.clip(scaled, -HUGE, HUGE, out=scaled)
        scaled -= self._centre
        scaled /= self._spread
        return np.clip(scaled, -BOUND, BOUND, out=scaled)

    def save(self) -> dict[str, Floats]:
        """What it learnt, as arrays."""
        return {"centre": self._centre.copy(), "spread": self._spread.copy()}

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> RobustScale:
        """What `save` returned, as it was."""
        loaded = cls()
        loaded._centre, loaded._spread = saved["centre"].copy(), saved["spread"].copy()
        return loaded
