"""Windows aligned to a step: what is measured is kept, what is not stays missing, and memory is bounded."""

from __future__ import annotations

import math

import numpy as np
import pytest

from enova_coordinator.core.series import COLUMN, Counters, Ring, minutes, pace

NAN = math.nan


def ring(slots: int = 10) -> Ring:
    """Two gauges and one counter."""
    return Ring(slots=slots, features=3, first_counter=2)


def test_a_gap_stays_a_gap() -> None:
    window = ring()
    window.put(100, [1, 2, 3])
    window.put(103, [4, 5, 6])
    assert np.isnan(window.window(101, 102)).all()
    assert window.window(100, 103)[[0, 3]].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_slot_that_was_taken_over_tells_nothing_of_its_old_step() -> None:
    window = ring(slots=4)
    for step in range(100, 104):
        window.put(step, [step, step, step])
    window.put(106, [6, 6, 6])
    seen = window.window(102, 106)[:, 0].tolist()
    assert seen == pytest.approx([NAN, 103, NAN, NAN, 6], nan_ok=True)


def test_a_row_from_before_the_window_is_left_out() -> None:
    window = ring(slots=4)
    window.put(100, [1, 1, 1])
    window.put(96, [9, 9, 9])
    assert window.window(100, 100).tolist() == [[1, 1, 1]]
    assert np.isnan(window.window(96, 99)).all()


def test_two_rows_in_one_step_replace_gauges_and_add_increments() -> None:
    window = ring()
    window.put(5, [1, NAN, 10])
    window.put(5, [NAN, 7, 5])
    assert window.window(5, 5).tolist() == [[1, 7, 15]]


def test_increments_may_come_before_and_after_the_row_of_their_step() -> None:
    window = ring()
    window.add(5, 2, [3])
    window.put(5, [1, 2, NAN])
    window.add(5, 2, [4])
    assert window.window(5, 5).tolist() == [[1, 2, 7]]


def test_counters_become_increments() -> None:
    counters = Counters()
    assert counters.increments("a", [100.0]) == pytest.approx([NAN], nan_ok=True)
    assert counters.increments("a", [130.0]) == [30]


def test_a_new_instance_counts_from_zero() -> None:
    counters = Counters()
    counters.increments("a", [100.0])
    assert counters.increments("b", [130.0]) == [130]


def test_a_counter_that_fell_was_reset() -> None:
    counters = Counters()
    counters.increments("a", [100.0])
    assert counters.increments("a", [4.0]) == [4]


def test_a_missing_counter_is_caught_up_with_when_it_returns() -> None:
    counters = Counters()
    counters.increments("a", [100.0])
    assert math.isnan(counters.increments("a", [NAN])[0])
    assert counters.increments("a", [160.0]) == [60]


def test_minutes_are_means_of_gauges_and_sums_of_increments() -> None:
    rows = np.array([[1, 10], [3, NAN], [NAN, NAN], [NAN, NAN], [5, NAN], [NAN, 2]], dtype=np.float32)
    folded = minutes(rows, per_minute=2, first_counter=1)
    assert np.array_equal(folded, np.array([[2, 10], [NAN, NAN], [5, 2]]), equal_nan=True)


@pytest.mark.parametrize(
    ("scale", "step_s", "interval_s"),
    [(1, 1, 1), (10, 10, 1), (20, 15, 0.75), (60, 15, 0.25), (300, 60, 0.2)],
)
def test_a_fast_clock_gets_denser_frames_so_that_minutes_are_filled(
    scale: float, step_s: float, interval_s: float
) -> None:
    chosen = pace(time_scale=scale, frame_interval_s=1.0)
    assert chosen.step_s == step_s
    assert chosen.frame_interval_s == pytest.approx(interval_s)


def test_columns_have_one_place_each() -> None:
    assert sorted(COLUMN.values()) == list(range(len(COLUMN)))


def test_what_is_spread_over_steps_is_what_adding_to_each_of_them_makes() -> None:
    one, other = (Ring(slots=8, features=3, first_counter=0) for _ in range(2))
    for ring in (one, other):
        ring.put(3, [1.0, math.nan, 2.0])
        ring.put(9, [1.0, 1.0, 1.0])
    one.spread(0, 12, 1, [2.0, 4.0])       # back past the window and forth past the newest step
    for step in range(13):
        other.add(step, 1, [2.0, 4.0])
    assert np.array_equal(one.window(0, 14), other.window(0, 14), equal_nan=True)
    assert one.newest == other.newest == 12
