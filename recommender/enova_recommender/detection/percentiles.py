"""Percentiles of what arrives as counts: vLLM's histogram buckets, and quantile sketches of ingresses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.observation import SketchCounts

Floats = npt.NDArray[np.float64]

BUCKETS_MAX = 4096       # of a sketch: from a nanosecond to years
COUNT_MAX = 1e12         # in one interval: more is a defect


def bucket_quantile(cumulative: Floats, bounds: Sequence[float], share: float) -> Floats:
    """The `share` quantile of each row of cumulative counts by upper bound, the last being of all.

    Linear within a bucket; beyond the last bound, that bound; NaN of nothing.
    """
    edges = np.concatenate(([0.0], bounds))
    total = cumulative[:, -1]
    rank = share * total
    index = np.minimum((cumulative < rank[:, None]).sum(axis=1), len(edges) - 1)
    padded = np.concatenate((np.zeros((len(cumulative), 1)), cumulative), axis=1)
    rows = np.arange(len(cumulative))
    below = padded[rows, index]
    inside = np.maximum(padded[rows, index + 1] - below, 1e-12)
    low, high = edges[index], edges[np.minimum(index + 1, len(edges) - 1)]
    found = low + (high - low) * np.clip((rank - below) / inside, 0.0, 1.0)
    return np.where(total > 0, found, np.nan)


def bucket_share_above(cumulative: Floats, bounds: Sequence[float], limits: Floats) -> Floats:
    """Which share of each row of cumulative counts lies above its limit; linear within a bucket, NaN of nothing."""
    edges = np.concatenate(([0.0], bounds))
    padded = np.concatenate((np.zeros((len(cumulative), 1)), cumulative[:, : len(bounds)]), axis=1)
    upper = np.clip(np.searchsorted(edges, limits), 1, len(edges) - 1)
    rows = np.arange(len(cumulative))
    inside = np.clip((limits - edges[upper - 1]) / (edges[upper] - edges[upper - 1]), 0.0, 1.0)
    below = padded[rows, upper - 1] + inside * (padded[rows, upper] - padded[rows, upper - 1])
    total = cumulative[:, -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((total > 0) & np.isfinite(limits), 1.0 - below / total, np.nan)


def sketch_share_above(sketches: Sequence[SketchCounts], limit: float) -> float:
    """Which share of all these sketches hold lies above a limit; NaN of nothing."""
    if not 0 < limit < math.inf:
        return math.nan
    above = total = 0.0
    for each in filter(_is_sound, sketches):
        gamma = (1 + each.relative_accuracy) / (1 - each.relative_accuracy)
        first = math.ceil(math.log(limit) / math.log(gamma)) + 1 - each.offset
        above += sum(each.counts[max(0, first) :])
        total += sum(each.counts) + each.zero_count
    return above / total if total > 0 else math.nan


def sketch_quantile(sketches: Sequence[SketchCounts], share: float) -> float:
    """The `share` quantile of sketches together; those that cannot be merged with the first are left out."""
    sound = [each for each in sketches if _is_sound(each)]
    if not sound:
        return math.nan
    accuracy = sound[0].relative_accuracy
    sound = [each for each in sound if each.relative_accuracy == accuracy]
    first = min(each.offset for each in sound)
    merged = np.zeros(max(each.offset + len(each.counts) for each in sound) - first)
    for each in sound:
        merged[each.offset - first : each.offset - first + len(each.counts)] += np.asarray(each.counts, dtype=float)
    zeros = sum(each.zero_count for each in sound)
    total = zeros + float(merged.sum())
    if total <= 0:
        return math.nan
    rank = share * (total - 1) - zeros
    if rank < 0:
        return 0.0
    gamma = (1 + accuracy) / (1 - accuracy)
    index = min(int(np.searchsorted(np.cumsum(merged), rank, side="right")), len(merged) - 1)
    return float(2 * gamma ** (first + index) / (1 + gamma))


def _is_sound(sketch: SketchCounts) -> bool:
    accuracy, offset, counts, zeros = sketch
    return (
        1e-4 < accuracy < 0.5
        and -BUCKETS_MAX <= offset <= BUCKETS_MAX
        and len(counts) <= BUCKETS_MAX
        and 0 <= zeros < COUNT_MAX
        and all(0 <= count < COUNT_MAX for count in counts)
    )
