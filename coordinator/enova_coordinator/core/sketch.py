"""Merging quantile sketches of bounded relative error, and reading percentiles off them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from enova_coordinator.core.series import SketchCounts

RELATIVE_ACCURACY = 0.01       # what every ingress uses; another one cannot be merged
BUCKETS_MAX = 2048             # from a microsecond to eleven days there are 1,382
COUNT_MAX = 1_000_000_000      # requests in one interval of one ingress: more is no measurement
GAMMA = (1 + RELATIVE_ACCURACY) / (1 - RELATIVE_ACCURACY)


def flaw(sketch: SketchCounts) -> str:
    """Why this sketch cannot be merged; empty if it can."""
    accuracy, offset, counts, zero_count, total, least, most = sketch
    if not abs(accuracy - RELATIVE_ACCURACY) < 1e-9:
        return "relative accuracy"
    if not -BUCKETS_MAX <= offset <= BUCKETS_MAX or len(counts) > BUCKETS_MAX:
        return "bucket range"
    if sum(counts) + zero_count > COUNT_MAX:
        return "count"
    if not (0 <= total < math.inf and 0 <= least < math.inf and 0 <= most < math.inf):
        return "sum, min or max"
    return ""


@dataclass(slots=True)
class MergedSketch:
    """The sum of sketches."""

    offset: int = 0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    zero_count: int = 0
    sum: float = 0.0
    min: float = math.inf
    max: float = 0.0

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum()) + self.zero_count

    def merge(self, sketch: SketchCounts) -> None:
        """Add a sketch without `flaw`."""
        _, offset, counts, zero_count, total, least, most = sketch
        self._add(offset, np.array(counts, dtype=np.int64))
        self.zero_count += zero_count
        self.sum += total
        self.min = min(self.min, least)
        self.max = max(self.max, most)

    def merge_merged(self, other: MergedSketch) -> None:
        """Add another sum."""
        self._add(other.offset, other.counts)
        self.zero_count += other.zero_count
        self.sum += other.sum
        self.min = min(self.min, other.min)
        self.max = max(self.max, other.max)

    def minus(self, older: MergedSketch) -> MergedSketch:
        """What was added since `older`, an earlier state of the same sum; its least and largest value are not known."""
        newer = MergedSketch(self.offset, self.counts.copy(), self.zero_count - older.zero_count, self.sum - older.sum)
        start = older.offset - self.offset
        newer.counts[start : start + len(older.counts)] -= older.counts
        return newer

    def quantile(self, share: float) -> float:
        """The value below which `share` of the values lie, within the relative accuracy; NaN of nothing."""
        total = self.total
        if total == 0:
            return math.nan
        rank = share * (total - 1) - self.zero_count
        if rank < 0:
            return 0.0
        index = int(np.searchsorted(np.cumsum(self.counts), rank, side="right"))
        index = min(index, len(self.counts) - 1)
        return float(2 * GAMMA ** (self.offset + index) / (1 + GAMMA))

    def _add(self, offset: int, counts: NDArray[np.int64]) -> None:
        size, start = len(counts), offset - self.offset
        if not 0 <= start <= len(self.counts) - size:
            if not size:
                return
            self._grow(offset, offset + size)
            start = offset - self.offset
        self.counts[start : start + size] += counts

    def _grow(self, low: int, high: int) -> None:
        """Make room for the buckets from `low` to before `high`."""
        if len(self.counts):
            low, high = min(low, self.offset), max(high, self.offset + len(self.counts))
        grown = np.zeros(high - low, dtype=np.int64)
        grown[self.offset - low : self.offset - low + len(self.counts)] = self.counts
        self.offset, self.counts = low, grown
