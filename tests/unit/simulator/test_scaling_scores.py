"""Costs at an attainment, worked by hand."""

from __future__ import annotations

import math

import pytest

from enova_testing.scaling_scores import cost_at, gap_closed


def test_cost_is_linear_between_the_points_around_the_attainment() -> None:
    assert cost_at([(0.97, 10.0), (0.995, 20.0)], 0.99) == pytest.approx(18.0)


def test_cost_of_a_point_is_its_own() -> None:
    assert cost_at([(0.9, 5.0), (0.99, 12.0)], 0.99) == 12.0


def test_the_cheapest_of_all_counts_when_it_attains() -> None:
    assert cost_at([(0.999, 8.0), (0.9, 9.0), (0.995, 11.0)], 0.99) == 8.0


def test_dominated_points_do_not_bend_the_line() -> None:
    assert cost_at([(0.97, 10.0), (0.96, 15.0), (0.995, 20.0)], 0.99) == pytest.approx(18.0)


def test_what_never_attains_costs_infinitely_much() -> None:
    assert cost_at([(0.5, 1.0), (0.98, 100.0)], 0.99) == math.inf
    assert cost_at([], 0.99) == math.inf


def test_gap_closed_is_the_share_of_the_way_to_the_bound() -> None:
    assert gap_closed(20.0, 14.0, 10.0) == pytest.approx(0.6)
    assert gap_closed(20.0, 22.0, 10.0) == pytest.approx(-0.2)
    assert gap_closed(20.0, math.inf, 10.0) == -math.inf
    assert gap_closed(math.inf, 14.0, 10.0) is None
    assert gap_closed(10.0, 10.0, 10.0) is None
