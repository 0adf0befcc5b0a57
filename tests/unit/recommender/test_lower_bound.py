"""The lower bound of a fleet's cost: small cases worked by hand, and every fleet tried one by one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from enova_recommender.scaling.lower_bound import Infeasible, LowerBound, Programme, lower_bound, work_by_step

STEP_S = 10.0


def bound(
    *work: float, capacity: float = 0.1, start_s: float = 20.0, within_s: float = 1.0, attainment: float = 1.0,
    initial: int | None = None, warmup_s: float = 0.0, min_replicas: int = 0, max_replicas: int | None = None,
) -> LowerBound:
    """A replica does 1 unit a step, starts in two steps, and work may wait into the next one."""
    return lower_bound(Programme(
        work=np.array(work), step_s=STEP_S, capacity=capacity, start_s=start_s, within_s=within_s,
        attainment=attainment, initial=initial, warmup_s=warmup_s, min_replicas=min_replicas,
        max_replicas=max_replicas, gap=1e-6,
    ))


def seconds(hours: float) -> float:
    return hours * 3600


def test_steady_work_takes_its_replicas_for_the_whole_time() -> None:
    # 2 a step for 5 steps; the last step's work may still wait: 8 units by the end, 2 replicas x 4 steps
    found = bound(2, 2, 2, 2, 2)
    assert seconds(found.hours) == pytest.approx(2 * 4 * STEP_S)
    assert found.proven


def test_start_up_is_paid_and_begins_in_time() -> None:
    # 1 unit a step, and from step 3 on 3. Due are 6 units by the end of step 4, and 9 by the end of step 5: one more
    # replica from step 3 on does it, started in step 1. (1 1 1 1 2 3 has as many replica-steps, but two starts.)
    found = bound(1, 1, 1, 3, 3, 3, initial=1)
    assert found.running.tolist() == [1, 1, 1, 2, 2, 2]
    assert seconds(found.hours) == pytest.approx((9 + 2) * STEP_S)


def test_nothing_can_be_ready_before_its_start_up_is_over() -> None:
    with pytest.raises(Infeasible):
        bound(3, 3, 3, initial=1)


def test_a_share_of_work_may_be_late_but_not_lost() -> None:
    # a spike of 4 over a base of 1, 20 units in all; one replica is left if 4 of 20 may be late and are served in the
    # empty steps after
    spike = (1, 1, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0)
    assert seconds(bound(*spike, attainment=0.8, initial=1).hours) == pytest.approx(16 * STEP_S)
    assert seconds(bound(*spike, attainment=1.0, initial=1).hours) > 16 * STEP_S


def test_work_of_the_warm_up_is_not_judged_but_served() -> None:
    found = bound(5, 0, 0, 0, 0, 0, 0, 0, initial=1, warmup_s=10.0)
    assert seconds(found.hours) == pytest.approx(5 * STEP_S)
    with pytest.raises(Infeasible):
        bound(5, 0, 0, 0, 0, 0, 0, 0, initial=1)


def test_relaxation_is_below_the_whole_fleet() -> None:
    found = bound(1.5, 1.5, 1.5, 1.5, 1.5)
    assert seconds(found.relaxed_hours) == pytest.approx(6 * STEP_S)    # 4 x 1.5 units, to the unit
    assert found.relaxed_hours <= found.hours <= found.found_hours


def test_bounds_on_replicas_hold() -> None:
    assert seconds(bound(0, 0, 0, 0, min_replicas=1).hours) == pytest.approx(4 * STEP_S)
    with pytest.raises(Infeasible):
        bound(3, 3, 3, 3, max_replicas=2)


@pytest.mark.parametrize("attainment", [1.0, 0.75])
@pytest.mark.parametrize("seed", range(6))
def test_no_fleet_of_all_is_cheaper(seed: int, attainment: float) -> None:
    rng = np.random.default_rng(seed)
    work = rng.integers(0, 4, size=6)
    work[-1] += -int(work.sum()) % 4           # so that the share which may be late is a whole number of units
    within = int(rng.integers(0, 3))
    found = bound(*work.astype(float), attainment=attainment, within_s=within * STEP_S)
    best = min(_cost(fleet, start=2) for fleet in itertools.product(range(5), repeat=6)
               if _holds(work.tolist(), fleet, within=within, attainment=attainment))
    assert seconds(found.hours) == pytest.approx(best * STEP_S)


def test_work_by_step_adds_what_arrives_inside_the_horizon() -> None:
    assert work_by_step([0.0, 9.9, 10.0, 35.0, 40.0, -1.0], horizon_s=40.0, step_s=10.0).tolist() == [2, 1, 0, 1]
    amounts = work_by_step([0.0, 9.9, 35.0], horizon_s=35.5, step_s=10.0, amounts=[2.0, 3.0, 4.0])
    assert amounts.tolist() == [5, 0, 0, 4]


@pytest.mark.parametrize("work", [[], [-1.0], [math.nan], [math.inf]])
def test_work_that_is_none_is_refused(work: list[float]) -> None:
    with pytest.raises(ValueError, match="work must be"):
        bound(*work)


@pytest.mark.parametrize(("attainment", "capacity"), [(0.0, 1.0), (1.1, 1.0), (0.9, 0.0)])
def test_settings_that_make_no_sense_are_refused(attainment: float, capacity: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        bound(1.0, attainment=attainment, capacity=capacity)


def _cost(fleet: tuple[int, ...], *, start: int) -> int:
    """Replica-steps with start-ups; the first step's replicas are there for nothing."""
    rises = ((step, now - before) for step, (before, now) in enumerate(itertools.pairwise(fleet), 1))
    if any(rise > 0 and step < start for step, rise in rises):
        return 10**9                           # it would have had to be started before the beginning
    return sum(fleet) + start * sum(max(now - before, 0) for before, now in itertools.pairwise(fleet))


def _holds(work: list[int], fleet: tuple[int, ...], *, within: int, attainment: float) -> bool:
    """Units one by one, the most urgent first; those that are past their time go when nothing urgent waits."""
    last = len(work) - 1
    waiting: list[tuple[int, int]] = []        # (due, units), of those that are due before the end
    late = late_ever = 0
    for step, (arrived, room) in enumerate(zip(work, fleet, strict=True)):
        if step + within <= last:
            waiting.append((step + within, arrived))
        left = room
        for index, (due, units) in enumerate(waiting):
            waiting[index] = (due, units - min(left, units))
            left -= min(left, units)
        missed = sum(units for due, units in waiting if due <= step)
        late, late_ever = max(late - left, 0) + missed, late_ever + missed
        waiting = [(due, units) for due, units in waiting if due > step]
    return late == 0 and late_ever <= (1 - attainment) * sum(work)
