"""A replica's steps beside those of its siblings of the same variant, each held against what its own load explains.

The distance of the log ratio from the siblings' median, in robust spreads of theirs: loads may differ, for what is
compared is what they leave unexplained. A group needs four members, so that three siblings speak: with fewer, nobody
knows who the odd one is. Three that happen to be alike in one step say little of how far siblings stray, so a spread is
never less than how far this replica, or its siblings at the middle, strayed in calm steps of the last hour.
"""

from __future__ import annotations

import math

import numpy as np

from enova_recommender.detection.features import Flags, Floats
from enova_recommender.detection.groups import Groups

SIBLINGS_MIN = 3
SPREAD_MIN = 0.05        # of log ratios: siblings are never more alike than this
SPREAD_MAX = math.log(2.5) / 6.0  # what is slower than its siblings by so many times is odd, however they stray
MAD_UNIT = 1.4826        # from the median absolute deviation to a normal law's standard deviation
MEAN_UNIT = 1.2533       # from the mean one
STRAYED_MIN, STRAYED_MAX = 24.0, 720.0  # calm steps before a replica's own history counts, and that it goes back
SMOOTHING = 0.3          # weight of the newest step
SPREADS = 6.0            # that make a replica odd
BOUND = 100.0            # spreads beyond which a figure says no more
COMMON_SHARE = 0.25      # of siblings elsewhere: what three in four of them show as well is no replica's own


class PeerWatch:
    """Smoothed distances of every replica to its siblings."""

    def __init__(self, *, series: int) -> None:
        self._mean = np.full(series, np.nan)
        self._apart = np.full(series, np.nan)      # of the last step
        self._strayed = np.zeros(series)           # its mean in calm steps, without the sign
        self._calm_steps = np.zeros(series)

    def update(self, logs: Floats, groups: Groups, *, doubt: Floats) -> Floats:
        """Distances in spreads, positive where slower; NaN without enough siblings. `doubt` is that of the logs."""
        more = len(logs) - len(self._mean)
        if more > 0:
            self._mean = np.pad(self._mean, (0, more), constant_values=np.nan)
            self._strayed, self._calm_steps = np.pad(self._strayed, (0, more)), np.pad(self._calm_steps, (0, more))
        median, count = groups.quantile(logs, 0.5)
        apart = logs - groups.by_row(np.where(count > SIBLINGS_MIN, median, np.nan))
        spread, _ = groups.quantile(np.abs(apart), 0.5)
        unit = np.maximum(MAD_UNIT * groups.by_row(spread), self._usual(groups)) + doubt / SPREADS
        signed = np.clip(apart / unit, -BOUND, BOUND)
        self._apart, known = apart, np.isfinite(signed)
        moved = self._mean + SMOOTHING * (signed - self._mean)
        self._mean = np.where(known, np.where(np.isnan(self._mean), signed, moved), np.nan)
        return self._mean.copy()

    def learn(self, calm: Flags) -> None:
        """Take the last step as usual for these replicas."""
        taken = calm & np.isfinite(self._apart)
        self._calm_steps[taken] = np.minimum(self._calm_steps[taken] + 1.0, STRAYED_MAX)
        moved = (np.abs(self._apart[taken]) - self._strayed[taken]) / self._calm_steps[taken]
        self._strayed[taken] += moved

    def _usual(self, groups: Groups) -> Floats:
        """The least spread of each replica: its own, or that of its siblings where they stray further."""
        own = np.where(self._calm_steps >= STRAYED_MIN, MEAN_UNIT * self._strayed, np.nan)
        usual = np.fmax(own, groups.by_row(groups.quantile(own, 0.5)[0]))
        return np.asarray(np.clip(np.nan_to_num(usual), SPREAD_MIN, SPREAD_MAX))

    def forget(self, row: int) -> None:
        """Another replica has this row."""
        if row < len(self._mean):
            self._mean[row] = self._apart[row] = np.nan
            self._strayed[row] = self._calm_steps[row] = 0.0


def common_part(residuals: Floats, groups: Groups, *, rows: Flags) -> Floats:
    """For these rows: what most of their siblings on other nodes show too, so that no replica of its own causes it."""
    found = np.zeros(len(residuals))
    for row in np.flatnonzero(rows & (groups.index >= 0)).tolist():
        others = (groups.index == groups.index[row]) & (groups.node != groups.node[row]) & np.isfinite(residuals)
        if others.sum() >= SIBLINGS_MIN:
            found[row] = max(0.0, float(np.quantile(residuals[others], COMMON_SHARE)))
    return found
