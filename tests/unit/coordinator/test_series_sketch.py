"""Merged sketches tell percentiles within their relative error, and refuse what cannot be merged."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from enova_coordinator.core.series import SketchCounts
from enova_coordinator.core.sketch import BUCKETS_MAX, COUNT_MAX, RELATIVE_ACCURACY, MergedSketch, flaw

GAMMA = (1 + RELATIVE_ACCURACY) / (1 - RELATIVE_ACCURACY)


def sketch(values: list[float]) -> SketchCounts:
    """As an ingress makes it: bucket b counts (gamma^(b-1), gamma^b]."""
    buckets = [math.ceil(math.log(value) / math.log(GAMMA)) for value in values if value > 0]
    low, high = min(buckets, default=0), max(buckets, default=-1)
    return SketchCounts(
        relative_accuracy=RELATIVE_ACCURACY,
        offset=low,
        counts=[buckets.count(bucket) for bucket in range(low, high + 1)],
        zero_count=values.count(0.0),
        sum=sum(values),
        min=min(values),
        max=max(values),
    )


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 0.99, 1.0])
def test_the_merge_of_parts_tells_the_percentiles_of_the_whole(share: float) -> None:
    draw = random.Random(7)
    values = [draw.lognormvariate(-1, 1.5) for _ in range(3000)]
    merged = MergedSketch()
    for start in range(0, 3000, 500):
        merged.merge(sketch(values[start : start + 500]))
    exact = sorted(values)[math.floor(share * 2999)]
    assert merged.quantile(share) == pytest.approx(exact, rel=2.1 * RELATIVE_ACCURACY)
    assert merged.total == 3000
    assert merged.sum == pytest.approx(sum(values))


def test_merging_sums_is_merging_parts() -> None:
    left, right, whole = MergedSketch(), MergedSketch(), MergedSketch()
    left.merge(sketch([0.1, 0.2]))
    right.merge(sketch([5.0, 0.0]))
    whole.merge(sketch([0.1, 0.2, 5.0, 0.0]))
    left.merge_merged(right)
    assert [left.quantile(q) for q in (0, 0.4, 0.7, 1)] == [whole.quantile(q) for q in (0, 0.4, 0.7, 1)]


def test_zeros_count_and_nothing_has_no_percentile() -> None:
    merged = MergedSketch()
    assert math.isnan(merged.quantile(0.5))
    merged.merge(sketch([0.0, 0.0, 0.0, 1.0]))
    assert merged.quantile(0.5) == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"relative_accuracy": 0.05}, "relative accuracy"),
        ({"offset": BUCKETS_MAX + 1}, "bucket range"),
        ({"counts": [0] * (BUCKETS_MAX + 1)}, "bucket range"),
        ({"counts": [COUNT_MAX + 1]}, "count"),
        ({"sum": math.nan}, "sum, min or max"),
        ({"min": -1.0}, "sum, min or max"),
    ],
)
def test_what_cannot_be_merged_says_why(change: dict[str, Any], text: str) -> None:
    assert flaw(sketch([1.0])._replace(**change)) == text
