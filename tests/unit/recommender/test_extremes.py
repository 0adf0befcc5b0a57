"""Thresholds by extreme-value theory: tails are found, alarms come at the stated rate, drift raises none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from enova_recommender.detection.extremes import PEAKS_MIN, DriftingThreshold, fit_tail

STEPS = 40_000


@pytest.mark.parametrize(("shape", "name"), [(0.0, "exponential"), (0.25, "heavy"), (-0.3, "bounded")])
def test_the_tail_of_a_known_law_is_found(shape: float, name: str) -> None:
    uniform = np.random.default_rng(7).random(STEPS)
    scores = -np.log(uniform) if shape == 0.0 else (uniform**-shape - 1.0) / shape
    tail = fit_tail(scores)
    assert tail.shape == pytest.approx(shape, abs=0.12), name
    true = -math.log(1e-4) if shape == 0.0 else (1e-4**-shape - 1.0) / shape
    assert tail.quantile(1e-4) == pytest.approx(true, rel=0.2)
    assert tail.probability(tail.quantile(1e-4)) == pytest.approx(1e-4, rel=1e-6)


def test_a_higher_score_is_never_more_probable() -> None:
    tail = fit_tail(np.random.default_rng(1).normal(size=5000))
    probabilities = tail.probability(np.linspace(-5.0, 50.0, 500))
    assert np.all(np.diff(probabilities) <= 0.0)
    assert np.all((probabilities >= 0.0) & (probabilities <= 1.0))


def test_few_peaks_are_taken_as_exponential() -> None:
    tail = fit_tail(np.arange(PEAKS_MIN * 40.0))
    assert tail.peaks < PEAKS_MIN
    assert tail.shape == 0.0


@pytest.mark.parametrize("scores", [[1.0] * 500, [0.0, 0.0, math.nan, 0.0]])
def test_equal_scores_raise_no_alarm_and_a_higher_one_does(scores: list[float]) -> None:
    threshold = DriftingThreshold(rate=1e-3)
    threshold.fit(scores)
    assert not threshold.update([scores[0]]).any()
    assert threshold.update([scores[0] + 1.0]).all()


def test_without_a_score_there_is_no_tail() -> None:
    with pytest.raises(ValueError, match="scores"):
        fit_tail([math.nan, math.inf])


@pytest.mark.parametrize("rate", [0.0, 0.5, -1.0])
def test_a_rate_that_cannot_be_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        DriftingThreshold(rate=rate)


@pytest.mark.parametrize("series", [1, 20])
def test_normal_time_raises_alarms_at_the_stated_rate(series: int) -> None:
    draw = np.random.default_rng(3)
    threshold = DriftingThreshold(rate=1e-3, series=series)
    threshold.fit(draw.exponential(size=(STEPS // series, series)))
    for scores in draw.exponential(size=(STEPS // series, series)):
        threshold.update(scores)
    assert threshold.achieved_rate == pytest.approx(1e-3, rel=0.5)


def test_a_slow_drift_is_followed_and_a_step_is_not() -> None:
    draw = np.random.default_rng(5)
    threshold = DriftingThreshold(rate=1e-3)
    threshold.fit(draw.normal(size=10_000))
    for step in range(20_000):
        threshold.update([draw.normal() + 4.0 * step / 20_000])
    assert threshold.achieved_rate is not None
    assert threshold.achieved_rate < 2.5e-3
    assert all(threshold.update([draw.normal() + 14.0]).all() for _ in range(500))


@pytest.mark.parametrize(("shift_steps", "alarms"), [(None, 300), (100, 100)])
def test_an_alarm_lasts_until_its_level_is_taken_for_the_new_normal(shift_steps: int | None, alarms: int) -> None:
    draw = np.random.default_rng(5)
    normal, shifted = draw.normal(size=5000), 20.0 + draw.normal(size=300)
    stepped, batch = (DriftingThreshold(rate=1e-3, shift_steps=shift_steps) for _ in range(2))
    stepped.fit(normal)
    batch.fit(normal)
    raised = [bool(stepped.update([score])[0]) for score in shifted]
    assert sum(raised) == pytest.approx(alarms, abs=2)
    assert batch.judge(shifted).tolist() == raised
    again = DriftingThreshold.load(stepped.save())
    for score in shifted:
        assert np.array_equal(again.update([score]), stepped.update([score]))


def test_what_is_missing_raises_no_alarm_and_is_not_counted() -> None:
    threshold = DriftingThreshold(rate=1e-3, series=3)
    threshold.fit(np.random.default_rng(2).normal(size=(2000, 3)))
    assert threshold.update([math.nan, math.inf, 1e9]).tolist() == [False, False, True]
    assert (threshold.steps, threshold.alarms) == (1, 1)


def test_what_was_saved_goes_on_as_it_was() -> None:
    draw = np.random.default_rng(11)
    first = DriftingThreshold(rate=2e-3, series=2, drift_steps=50)
    first.fit(draw.gamma(2.0, size=(3000, 2)))
    for scores in draw.gamma(2.0, size=(100, 2)):
        first.update(scores)
    second = DriftingThreshold.load(first.save())
    for scores in draw.gamma(2.5, size=(1000, 2)):
        assert np.array_equal(first.update(scores), second.update(scores))
    assert (first.level, first.achieved_rate) == (second.level, second.achieved_rate)
