"""How well scores find labelled ranges, without a threshold and with one.

`vus_pr` is the volume under the precision-recall surface (Paparrizos et al., PVLDB 15(11), 2022): labels are widened by
a falling ramp of every width up to a window, since their edges are never exact, and recall counts only as far as whole
ranges are touched. It is computed as the authors' package `vus` 0.0.6 does (250 thresholds at ranks of the score), so
that figures can be compared; here by sorting once, there by scanning for each threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

WINDOW = 50        # steps; the widest ramp is half of it at each side
THRESHOLDS = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class AtThreshold:
    """What alarms at one threshold are worth."""

    f1: float               # of steps, without point adjustment
    event_recall: float     # share of labelled ranges with an alarm in them
    false_episodes: int     # runs of alarms that touch no labelled range


def ranges(flags: npt.ArrayLike) -> list[tuple[int, int]]:
    """First and last step of each run of true flags."""
    on = np.concatenate(([0], np.asarray(flags, dtype=np.int8), [0]))
    edges = np.diff(on)
    return list(zip(np.flatnonzero(edges == 1).tolist(), (np.flatnonzero(edges == -1) - 1).tolist(), strict=True))


def auc_pr(labels: Flags, scores: Floats) -> float:
    """Average precision; ties are broken by order, which for scores of real numbers hardly matters."""
    hits = labels[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / hits.sum())


def vus_pr(labels: Flags, scores: Floats, *, window: int = WINDOW) -> float:
    """The volume under the precision-recall surface over all ramps from 0 to `window`. Needs a labelled step."""
    order = np.argsort(-scores, kind="stable")
    areas = [_area(labels, _widened(labels, width), scores, order) for width in range(window + 1)]
    return float(np.mean(areas))


def at_threshold(labels: Flags, alarms: Flags) -> AtThreshold:
    """What these alarms are worth."""
    true = int((labels & alarms).sum())
    wrong = int((labels != alarms).sum())
    events = ranges(labels)
    found = sum(bool(alarms[first : last + 1].any()) for first, last in events)
    return AtThreshold(
        f1=2 * true / (2 * true + wrong) if true else 0.0,
        event_recall=found / len(events) if events else 0.0,
        false_episodes=sum(not labels[first : last + 1].any() for first, last in ranges(alarms)),
    )


def _widened(labels: Flags, width: int) -> Floats:
    """Labels with a ramp, falling as a square root, over half of the width at each side."""
    weights = labels.astype(np.float64)
    for first, last in ranges(labels) if width else ():
        after = np.arange(last + 1, min(last + width // 2 + 1, len(labels)))
        weights[after] += np.sqrt(1.0 - (after - last) / width)
        before = np.arange(max(first - width // 2, 0), first)
        weights[before] += np.sqrt(1.0 - (first - before) / width)
    return np.minimum(weights, 1.0)


def _area(labels: Flags, weights: Floats, scores: Floats, order: npt.NDArray[np.intp]) -> float:
    levels = scores[order][np.linspace(0, len(scores) - 1, THRESHOLDS).astype(int)]
    above = np.searchsorted(-scores[order], -levels, side="right")  # steps at or above each level
    caught = np.concatenate(([0.0], np.cumsum(weights[order])))[above]
    ramps = np.concatenate(([0.0], np.cumsum(np.where(labels, 0.0, weights)[order])))[above]
    highest = np.array([scores[first : last + 1].max() for first, last in ranges(weights > 0)])
    touched = (highest[None, :] >= levels[:, None]).mean(axis=1)
    recall = np.minimum(caught / (labels.sum() + ramps / 2.0), 1.0) * touched
    steps = np.diff(np.concatenate(([0.0], recall)))
    return float((steps * caught / above).sum())
