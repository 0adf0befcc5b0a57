"""How improbable a value is in normal time, column by column: tail probabilities by kernel density, as surprises.

The density of each column is a sum of Gaussian kernels on normal values at evenly spaced ranks, which makes it the same
for the same values, whatever their order. A surprise is the tail's probability on a log scale between 0 (ordinary) and
1 (SIGNIFICANCE squared or rarer; one half at SIGNIFICANCE), on each side. Where a kernel density has no more to say,
`beyond` tells how far past the normal values a value lies.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

SIGNIFICANCE = 1e-3
RANKS = 128              # of normal values that carry a kernel
GRID = 128               # points on which the density's tails are tabled
REACH = 5.0              # bandwidths that the table reaches past the outermost kernel
BANDWIDTH_FACTOR = (4.0 / 3.0) ** 0.2
BANDWIDTH_MIN = 0.02     # in the values' unit, spreads of normal time: or a constant would make any change certain

_LOG_LEAST = 2.0 * np.log(SIGNIFICANCE)


class KernelTails:
    """The tails of normal values, one kernel density a column."""

    def __init__(self) -> None:
        self._low: Floats = np.empty(0)
        self._pitch: Floats = np.empty(0)
        self._span: Floats = np.empty(0)
        self._lower: Floats = np.empty((0, 0))   # grid by columns
        self._upper: Floats = np.empty((0, 0))

    def fit(self, normal: Floats) -> None:
        """Learn from rows of normal time; NaN is left out, and a column without a value is never surprising."""
        ranks = np.stack([_ranked(column[np.isfinite(column)]) for column in normal.T], axis=1)
        quarter, three = np.quantile(ranks, [0.25, 0.75], axis=0)
        spread = np.minimum(ranks.std(axis=0), np.where(three > quarter, (three - quarter) / 1.349, np.inf))
        bandwidth = np.maximum(BANDWIDTH_FACTOR * RANKS**-0.2 * spread, BANDWIDTH_MIN)
        self._low = ranks[0] - REACH * bandwidth
        self._span = ranks[-1] + REACH * bandwidth - self._low
        self._pitch = self._span / (GRID - 1)
        grid = self._low + np.arange(GRID)[:, None] * self._pitch
        below = np.zeros_like(grid)
        above = np.zeros_like(grid)
        for kernel in ranks:
            away = (grid - kernel) / bandwidth
            below += ndtr(away)
            above += ndtr(-away)
        self._lower, self._upper = _surprise(below / RANKS), _surprise(above / RANKS)

    def surprises(self, values: Floats) -> tuple[Floats, Floats]:
        """How surprisingly low and how surprisingly high each value is, from 0 to 1; 0 for what is missing."""
        place, known = self._places(values)
        return _tabled(self._lower, place) * known, _tabled(self._upper, place) * known

    def surprise(self, values: Floats) -> Floats:
        """How surprising each value is, to whichever side."""
        place, known = self._places(values)
        return np.asarray(_tabled(np.maximum(self._lower, self._upper), place) * known)

    def _places(self, values: Floats) -> tuple[Floats, Flags]:
        """Where in the table each value lies, and which are known."""
        known = ~np.isnan(values)
        place = np.where(known, values, self._low)
        place -= self._low
        place /= self._pitch
        return np.clip(place, 0.0, GRID - 1.000001, out=place), known

    def beyond(self, values: Floats) -> Floats:
        """How far each value lies past the table, in widths of the table, on a log scale."""
        middle, half = self._low + 0.5 * self._span, 0.5 * self._span
        away = (np.abs(values - middle) - half) / self._span
        away[~(away > 0.0)] = 0.0
        return np.asarray(np.log1p(away, out=away))

    def save(self) -> dict[str, Floats]:
        """Everything that it knows, as arrays."""
        return {
            "low": self._low.copy(), "span": self._span.copy(),
            "lower": self._lower.copy(), "upper": self._upper.copy(),
        }  # fmt: skip

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> KernelTails:
        """What `save` returned, as it was."""
        loaded = cls()
        loaded._low, loaded._span = saved["low"].copy(), saved["span"].copy()
        loaded._pitch = loaded._span / (GRID - 1)
        loaded._lower, loaded._upper = saved["lower"].copy(), saved["upper"].copy()
        return loaded


def _tabled(table: Floats, place: Floats) -> Floats:
    """Between the two nearest points of each column of a table."""
    index = place.astype(np.intp)
    part = place - index
    flat = index * table.shape[1] + np.arange(table.shape[1])
    left, right = np.take(table, flat), np.take(table, flat + table.shape[1])
    return np.asarray(left + part * (right - left))


def _ranked(values: Floats) -> Floats:
    """RANKS values at evenly spaced ranks, in order; zeros if there is none."""
    if values.size == 0:
        return np.zeros(RANKS)
    return np.asarray(np.sort(values)[np.linspace(0, values.size - 1, RANKS).round().astype(np.intp)])


def _surprise(probability: Floats) -> Floats:
    least = SIGNIFICANCE * SIGNIFICANCE
    return np.asarray(np.log(np.clip(probability, least, 1.0)) / _LOG_LEAST)
