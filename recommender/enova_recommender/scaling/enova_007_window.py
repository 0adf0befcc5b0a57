"""ENOVA 0.0.7's series pre-processing: thirty minutes ending at a series' own last sample.

Two defects of the release live here and are mended beside it: holes became 0, which reads as idle, and a series that
had stopped was aligned to its own last sample, so that old data passed for present.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from enova_recommender.scaling.types import Feature, ReplicaSeries, Series

MINUTE_S = 60.0
GRID_MINUTES = 30
WINDOW_MINUTES = 3
POINTS_MIN = 5
EQUAL_SPACING_SHARE = 0.8
DATA_AGE_MAX_S = 180.0

Array = NDArray[np.float64]


def usable(points: tuple[tuple[float, float], ...]) -> bool:
    """Whether a series has points enough, more than 80 % of them equally spaced."""
    if len(points) < POINTS_MIN:
        return False
    gaps = Counter(round(after[0] - before[0], 3) for before, after in pairwise(points))
    return gaps.most_common(1)[0][1] > EQUAL_SPACING_SHARE * gaps.total()


def aligned(points: tuple[tuple[float, float], ...], *, hole: float) -> Array:
    """The last thirty minutes up to the series' own last point, minute by minute; `hole` where there is none."""
    grid = np.full(GRID_MINUTES, hole)
    end_s = points[-1][0]
    for time_s, value in points:
        minutes_back = round((end_s - time_s) / MINUTE_S)
        if minutes_back < GRID_MINUTES and math.isclose(time_s + minutes_back * MINUTE_S, end_s, abs_tol=1e-3):
            grid[GRID_MINUTES - 1 - minutes_back] = value
    return grid


def summed(series: tuple[ReplicaSeries, ...], feature: Feature, *, hole: float) -> tuple[Array, int]:
    """All replicas' usable series of one feature added together, and how many there were."""
    total = np.zeros(GRID_MINUTES)
    count = 0
    for replica in series:
        points = _points(replica.series.get(feature))
        if usable(points):
            total = total + aligned(points, hole=hole)
            count += 1
    return total, count


def data_age_s(series: tuple[ReplicaSeries, ...], feature: Feature, *, now_s: float) -> float:
    """How old the stalest replica's newest point is; infinite where a replica has none."""
    ages = (_age_s(_points(replica.series.get(feature)), now_s) for replica in series)
    return max(ages, default=math.inf)


def _points(series: Series | None) -> tuple[tuple[float, float], ...]:
    return series.points() if series is not None else ()


def _age_s(points: tuple[tuple[float, float], ...], now_s: float) -> float:
    return now_s - points[-1][0] if points else math.inf
