"""The sketch that travels in summaries."""

from __future__ import annotations

import math

import pytest
from ddsketch import DDSketch
from hypothesis import given
from hypothesis import strategies as st

from enova_agent.core.local import SketchValue
from enova_agent.core.sketch import RELATIVE_ACCURACY, VALUE_MAX, VALUE_MIN, Sketch

values = st.lists(st.floats(VALUE_MIN, VALUE_MAX), min_size=1, max_size=200)


def filled(numbers: list[float]) -> SketchValue:
    sketch = Sketch()
    for number in numbers:
        sketch.add(number)
    value = sketch.value()
    assert value is not None
    return value


def quantile(value: SketchValue, q: float) -> float:
    gamma = (1 + value.relative_accuracy) / (1 - value.relative_accuracy)
    rank = q * (sum(value.counts) + value.zero_count - 1)
    seen = value.zero_count
    if rank < seen:
        return 0.0
    for index, count in enumerate(value.counts):
        seen += count
        if rank < seen:
            return 2 * gamma ** (value.offset + index) / (1 + gamma)
    raise AssertionError("rank beyond the counts")


@given(values, st.floats(0, 1))
def test_each_quantile_is_within_the_relative_accuracy(numbers: list[float], q: float) -> None:
    exact = sorted(numbers)[math.floor(q * (len(numbers) - 1))]
    assert quantile(filled(numbers), q) == pytest.approx(exact, rel=RELATIVE_ACCURACY * 1.001)


@given(values)
def test_it_is_the_sketch_that_the_known_library_makes(numbers: list[float]) -> None:
    library = DDSketch(RELATIVE_ACCURACY)
    for number in numbers:
        library.add(number)
    value = filled(numbers)
    for q in (0.0, 0.5, 0.95, 1.0):
        assert quantile(value, q) == pytest.approx(library.get_quantile_value(q), rel=2.1 * RELATIVE_ACCURACY)
    assert value.sum == pytest.approx(library.sum)


def test_nothing_added_is_no_sketch_rather_than_zeros() -> None:
    assert Sketch().value() is None


def test_the_number_of_buckets_is_bounded_by_the_range() -> None:
    value = filled([0.0, 1e-300, VALUE_MIN, 1e300])
    assert value.zero_count == 2
    assert len(value.counts) < 1500
    assert (value.min, value.max) == (0.0, 1e300)


@pytest.mark.parametrize("number", [-1.0, math.nan, math.inf])
def test_what_is_no_duration_is_a_defect(number: float) -> None:
    with pytest.raises(AssertionError):
        Sketch().add(number)
