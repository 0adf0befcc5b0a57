"""Cost at an attainment, from runs of one policy at several values of its knob."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float]        # attainment, cost


def cost_at(points: Sequence[Point], attainment: float) -> float:
    """The least cost at this attainment, linear between neighbouring points; infinite where it is not reached.

    Points that cost more and attain less than another are left out: nobody would choose them.
    """
    best: list[Point] = []
    for reached, cost in sorted(points, key=lambda point: (point[1], -point[0])):
        if math.isnan(reached) or math.isnan(cost):
            continue
        if not best or reached > best[-1][0]:
            best.append((reached, cost))
    for place, (reached, cost) in enumerate(best):
        if reached < attainment:
            continue
        if place == 0:
            return cost
        before, cheaper = best[place - 1]
        return cheaper + (cost - cheaper) * (attainment - before) / (reached - before)
    return math.inf


def gap_closed(baseline: float, ours: float, bound: float) -> float | None:
    """How much of the way from the best baseline to the bound is gone; None where there is none to go."""
    if not math.isfinite(baseline) or baseline <= bound:
        return None
    return (baseline - ours) / (baseline - bound) if math.isfinite(ours) else -math.inf
