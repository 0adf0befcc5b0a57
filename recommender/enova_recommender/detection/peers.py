"""A replica beside its siblings of the same configuration, which share its load and its time of day.

Each figure's distance from the siblings' median, in robust spreads of theirs. A group needs four members, so that
three siblings speak: with fewer, nobody knows who the odd one is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from enova_recommender.detection.features import COLUMN, Feature, FeatureStep, Floats

SIBLINGS_MIN = 3
SPREAD_SHARE = 0.05      # of the median: siblings are never more alike than this
MAD_UNIT = 1.4826        # from the median absolute deviation to a normal law's standard deviation
SMOOTHING = 0.3          # weight of the newest step
BOUND = 100.0            # spreads beyond which a figure says no more
# What tells of a defect, not of load; and in which direction it is bad.
PEER_FEATURES: dict[Feature, int] = {
    Feature.STEP_S: 1,
    Feature.TTFT_S: 1,
    Feature.GPU_CLOCK_MHZ: -1,
    Feature.FAILED: 1,
}


class PeerWatch:
    """Smoothed distances of every replica to its siblings."""

    def __init__(self, *, series: int, features: Sequence[Feature] = tuple(PEER_FEATURES)) -> None:
        self.features = tuple(features)
        self._columns = [COLUMN[each] for each in self.features]
        self._signs = np.array([PEER_FEATURES.get(each, 1) for each in self.features], dtype=np.float64)
        self._mean = np.full((series, len(self.features)), np.nan)

    def update(self, step: FeatureStep, groups: Sequence[str]) -> Floats:
        """Distances by replica and feature, in spreads, positive where worse; NaN without enough siblings.

        `groups` names each row's configuration; rows of "" belong to none.
        """
        more = len(step.values) - len(self._mean)
        if more > 0:
            self._mean = np.pad(self._mean, ((0, more), (0, 0)), constant_values=np.nan)
        values = step.values[:, self._columns].astype(np.float64)
        found = np.full(values.shape, np.nan)
        names, index = np.unique(np.array(groups, dtype=str), return_inverse=True)
        order = np.argsort(index, kind="stable")
        for name, rows in zip(names.tolist(), np.split(order, np.cumsum(np.bincount(index))[:-1]), strict=True):
            if name and len(rows) > SIBLINGS_MIN:
                found[rows] = _distances(values[rows])
        signed = found * self._signs
        known = np.isfinite(signed)
        moved = self._mean + SMOOTHING * (signed - self._mean)
        self._mean = np.where(known, np.where(np.isnan(self._mean), signed, moved), np.nan)
        return self._mean.copy()

    def forget(self, row: int) -> None:
        """Another replica has this row."""
        if row < len(self._mean):
            self._mean[row] = np.nan


def _distances(values: Floats) -> Floats:
    """Robust distances within one group, column by column."""
    found = np.full(values.shape, np.nan)
    for column in range(values.shape[1]):
        known = np.isfinite(values[:, column])
        if known.sum() <= SIBLINGS_MIN:
            continue
        figures = values[known, column]
        middle = float(np.median(figures))
        spread = MAD_UNIT * float(np.median(np.abs(figures - middle)))
        unit = max(spread, SPREAD_SHARE * abs(middle), 1e-9)
        found[known, column] = np.clip((figures - middle) / unit, -BOUND, BOUND)
    return found
