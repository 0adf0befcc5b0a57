"""Piecewise linear functions of one and two variables: what step times are made of, and how runs of steps add up."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def located(knots: Floats, points: Floats) -> tuple[npt.NDArray[np.intp], Floats]:
    """Index of the segment of each point, and how far along it the point is; beyond the ends the outer ones go on."""
    low = np.clip(np.searchsorted(knots, points, side="right") - 1, 0, len(knots) - 2)
    return low, (points - knots[low]) / (knots[low + 1] - knots[low])


def along(values: Floats, low: npt.NDArray[np.intp], share: Floats) -> Floats:
    """Values at located points; the knots run along the last axis of `values`."""
    lower = values[..., low]
    return np.asarray(lower + share * (values[..., low + 1] - lower))


def across(
    values: Floats, rows: tuple[npt.NDArray[np.intp], Floats], columns: tuple[npt.NDArray[np.intp], Floats]
) -> Floats:
    """Values of a grid (its last two axes) at points located on both axes."""
    (row, down), (column, right) = rows, columns
    upper = values[..., row, column] * (1 - right) + values[..., row, column + 1] * right
    lower = values[..., row + 1, column] * (1 - right) + values[..., row + 1, column + 1] * right
    return np.asarray(upper * (1 - down) + lower * down)


def value_at(knots: Sequence[float], values: Sequence[float], point: float) -> float:
    """One value, without the cost of arrays."""
    low = min(max(bisect_right(knots, point) - 1, 0), len(knots) - 2)
    share = (point - knots[low]) / (knots[low + 1] - knots[low])
    return values[low] + share * (values[low + 1] - values[low])


def run_total(knots: Sequence[float], values: Sequence[float], *, first: int, stride: int, count: int) -> float:
    """The sum of the values at `first`, `first + stride`, ... (`count` points)."""
    if stride == 0:
        return count * value_at(knots, values, first)
    total, done = 0.0, 0
    while done < count:
        point = first + stride * done
        low = min(max(bisect_right(knots, point) - 1, 0), len(knots) - 2)
        left = count - done
        if low < len(knots) - 2:
            left = min(left, max(1, -int((point - knots[low + 1]) // stride)))
        slope = (values[low + 1] - values[low]) / (knots[low + 1] - knots[low])
        mean = point + stride * (left - 1) / 2
        total += left * (values[low] + slope * (mean - knots[low]))
        done += left
    return total
