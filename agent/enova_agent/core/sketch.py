"""A mergeable quantile sketch with bounded relative error (DDSketch, logarithmic mapping); pure.

Bucket b counts the values in (gamma^(b-1), gamma^b] with gamma = (1+a)/(1-a), so that gamma^b * 2/(1+gamma) is
within a relative error `a` of each of them. Two sketches with the same `a` merge by adding their counts. The
range is clamped, so that the number of buckets is bounded whatever is added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from enova_agent.core.local import SketchValue

RELATIVE_ACCURACY = 0.01
VALUE_MIN = 1e-6   # a microsecond; what is less counts as zero
VALUE_MAX = 1e6    # eleven days; what is more counts as this

_GAMMA = (1 + RELATIVE_ACCURACY) / (1 - RELATIVE_ACCURACY)
_LOG_GAMMA = math.log(_GAMMA)


@dataclass(slots=True)
class Sketch:
    """Values seen so far. `value()` is what travels."""

    counts: dict[int, int] = field(default_factory=dict)
    zero_count: int = 0
    sum: float = 0.0
    min: float = math.inf
    max: float = 0.0

    def add(self, value: float) -> None:
        """Count one value; NaN, infinite and negative ones are programmer errors."""
        assert 0 <= value < math.inf, value
        self.sum += value
        self.min = min(self.min, value)
        self.max = max(self.max, value)
        if value < VALUE_MIN:
            self.zero_count += 1
            return
        bucket = math.ceil(math.log(min(value, VALUE_MAX)) / _LOG_GAMMA)
        self.counts[bucket] = self.counts.get(bucket, 0) + 1

    def value(self) -> SketchValue | None:
        """The sketch as it is sent; None if nothing was added."""
        if not self.counts and not self.zero_count:
            return None
        low = min(self.counts, default=0)
        high = max(self.counts, default=-1)
        return SketchValue(
            relative_accuracy=RELATIVE_ACCURACY,
            offset=low,
            counts=tuple(self.counts.get(bucket, 0) for bucket in range(low, high + 1)),
            zero_count=self.zero_count,
            sum=self.sum,
            min=self.min,
            max=self.max,
        )
