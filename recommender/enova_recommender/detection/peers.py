"""A replica's steps beside those of its siblings of the same variant, each held against what its own load explains.

The distance of the log ratio from the siblings' median, in robust spreads of theirs: loads may differ, for what is
compared is what they leave unexplained. A group needs four members, so that three siblings speak: with fewer, nobody
knows who the odd one is.
"""

from __future__ import annotations

import numpy as np

from enova_recommender.detection.features import Flags, Floats
from enova_recommender.detection.groups import Groups

SIBLINGS_MIN = 3
SPREAD_MIN = 0.05        # of log ratios: siblings are never more alike than this
MAD_UNIT = 1.4826        # from the median absolute deviation to a normal law's standard deviation
SMOOTHING = 0.3          # weight of the newest step
SPREADS = 6.0            # that make a replica odd
BOUND = 100.0            # spreads beyond which a figure says no more
COMMON_SHARE = 0.25      # of siblings elsewhere: what three in four of them show as well is no replica's own


class PeerWatch:
    """Smoothed distances of every replica to its siblings."""

    def __init__(self, *, series: int) -> None:
        self._mean = np.full(series, np.nan)

    def update(self, logs: Floats, groups: Groups, *, doubt: Floats) -> Floats:
        """Distances in spreads, positive where slower; NaN without enough siblings. `doubt` is that of the logs."""
        more = len(logs) - len(self._mean)
        if more > 0:
            self._mean = np.pad(self._mean, (0, more), constant_values=np.nan)
        median, count = groups.quantile(logs, 0.5)
        apart = logs - groups.by_row(np.where(count > SIBLINGS_MIN, median, np.nan))
        spread, _ = groups.quantile(np.abs(apart), 0.5)
        unit = np.maximum(MAD_UNIT * groups.by_row(spread), SPREAD_MIN) + doubt / SPREADS
        signed = np.clip(apart / unit, -BOUND, BOUND)
        known = np.isfinite(signed)
        moved = self._mean + SMOOTHING * (signed - self._mean)
        self._mean = np.where(known, np.where(np.isnan(self._mean), signed, moved), np.nan)
        return self._mean.copy()

    def forget(self, row: int) -> None:
        """Another replica has this row."""
        if row < len(self._mean):
            self._mean[row] = np.nan


def common_part(residuals: Floats, groups: Groups, *, rows: Flags) -> Floats:
    """For these rows: what most of their siblings on other nodes show too, so that no replica of its own causes it."""
    found = np.zeros(len(residuals))
    for row in np.flatnonzero(rows & (groups.index >= 0)).tolist():
        others = (groups.index == groups.index[row]) & (groups.node != groups.node[row]) & np.isfinite(residuals)
        if others.sum() >= SIBLINGS_MIN:
            found[row] = max(0.0, float(np.quantile(residuals[others], COMMON_SHARE)))
    return found
