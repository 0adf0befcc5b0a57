"""Which variants carry a demand: least cost for the capacity, with what runs now left alone where that costs little.

A small integer programme over the variants of one deployment (HiGHS through `scipy.optimize.milp`): replicas of each
within the places that the fleet has, together at least the capacity wanted, within the deployment's bounds; cost is
dollars an hour, and a replica that would have to be started costs its start-up on top, spread over `AMORTIZED_S`.
With one variant it is a division.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds as Box
from scipy.optimize import LinearConstraint, milp

from enova_recommender.scaling.situation import VariantSight

AMORTIZED_S = 3600.0
UNPRICED_USD = 1.0            # a GPU hour, where no price is known: counts GPUs


def replicas_for(load: float, capacity: float) -> int:
    """Whole replicas of `capacity` that carry `load`; what is a rounding error beyond a whole one is not one more."""
    return max(0, math.ceil(load / capacity - 1e-6))


def mixture(
    load: float, variants: Sequence[VariantSight], carried: Mapping[str, float], *, least: int, most: int
) -> dict[str, int]:
    """Targets by variant that carry `load` requests a second; `carried` is what one replica of each carries.

    All places are used where they do not carry it.
    """
    if len(variants) == 1:
        (only,) = variants
        wanted = min(max(replicas_for(load, carried[only.name]), least), most)
        return {only.name: wanted}
    places = np.array([max(variant.places, 0) for variant in variants])
    rates = np.array([carried[variant.name] for variant in variants])
    found = _solve(min(load, float(places @ rates)), variants, rates, places, least=least, most=most)
    return found if found is not None else _cheapest_first(load, variants, carried, least=least, most=most)


def _solve(
    load: float,
    variants: Sequence[VariantSight],
    rates: np.ndarray[tuple[int], np.dtype[np.float64]],
    places: np.ndarray[tuple[int], np.dtype[np.int_]],
    *,
    least: int,
    most: int,
) -> dict[str, int] | None:
    """Variables: replicas of each variant, then how many of them are to be started."""
    count = len(variants)
    usd = np.array([_usd(variant) for variant in variants])
    starts = usd * np.array([variant.start_up.p50_s for variant in variants]) / AMORTIZED_S
    targets = np.array([variant.target for variant in variants], dtype=float)
    one = np.eye(count)
    answer = milp(
        c=np.concatenate([usd, starts]),
        constraints=[
            LinearConstraint(np.concatenate([rates, np.zeros(count)])[None, :], lb=load * (1 - 1e-9)),
            LinearConstraint(np.concatenate([np.ones(count), np.zeros(count)])[None, :], lb=least, ub=most),
            LinearConstraint(np.hstack([one, -one]), ub=targets),
        ],
        integrality=np.ones(2 * count),
        bounds=Box(np.zeros(2 * count), np.concatenate([places, places]).astype(float)),
        options={"mip_rel_gap": 0.0},
    )
    if answer.x is None:
        return None
    return {variant.name: round(float(value)) for variant, value in zip(variants, answer.x[:count], strict=True)}


def _cheapest_first(
    load: float, variants: Sequence[VariantSight], carried: Mapping[str, float], *, least: int, most: int
) -> dict[str, int]:
    """Where bounds and load contradict: as much as the bounds allow, the cheapest for its capacity first."""
    targets = dict.fromkeys((variant.name for variant in variants), 0)
    order = sorted(variants, key=lambda each: _usd(each) / carried[each.name])
    for variant in order:
        used = sum(targets.values())
        fit = min(variant.places, most - used)
        wanted = max(replicas_for(load, carried[variant.name]), least - used)
        targets[variant.name] = max(0, min(fit, wanted))
        load -= targets[variant.name] * carried[variant.name]
    return targets


def _usd(variant: VariantSight) -> float:
    return variant.usd_per_hour or UNPRICED_USD * variant.gpus
