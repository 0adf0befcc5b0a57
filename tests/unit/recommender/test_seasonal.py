"""The seasonal detector: seasons are found, short history is said, gaps do not shift the day; tails of densities."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from enova_recommender.detection.seasonal import SeasonalDetector
from enova_recommender.detection.tails import KernelTails

Floats = npt.NDArray[np.float64]
PERIOD = 288


def days(count: float, *, seed: int = 0, first: int = 0) -> Floats:
    """A day with a peak, a week's worth of noise, an outlier now and then."""
    draw = np.random.default_rng(seed)
    phase = (first + np.arange(int(count * PERIOD))) % PERIOD / PERIOD
    values = 10.0 + 5.0 * np.exp(-((phase - 0.6) ** 2) / 0.01) + 0.2 * draw.normal(size=len(phase))
    values[draw.integers(0, len(phase), len(phase) // 200)] += 8.0
    return np.asarray(values[:, None])


def fitted(history: Floats, *, period_steps: int | None = PERIOD, first: int = 0) -> SeasonalDetector:
    detector = SeasonalDetector(period_steps=period_steps)
    detector.fit(history, first=first)
    return detector


def test_a_value_that_is_usual_at_noon_is_strange_at_night_with_a_season_and_not_without() -> None:
    history = days(7)
    night, noon = int(0.1 * PERIOD), int(0.6 * PERIOD)
    seasonal, level = fitted(history), fitted(history, period_steps=None)
    values = days(1, seed=1)
    values[night : night + 5] = values[noon]
    for detector, strange in ((seasonal, True), (level, False)):
        scores = detector.score(values, first=7 * PERIOD)
        assert bool(scores[night + 1] > 2.0 * scores[noon]) is strange
    assert not seasonal.short_history
    assert level.short_history


def test_less_than_two_periods_are_said_to_be_short() -> None:
    assert fitted(days(1.8)).short_history
    assert not fitted(days(2.2)).short_history


def test_the_time_of_day_is_read_from_the_number_of_the_step() -> None:
    detector = fitted(days(5, first=100), first=100)
    later = days(1, seed=2, first=1000 * PERIOD + 77)
    right = detector.score(later, first=1000 * PERIOD + 77)
    assert np.median(right) < 0.5 * np.median(detector.score(later, first=1000 * PERIOD + 77 + PERIOD // 2)[:100])


def test_a_season_that_does_not_forecast_the_other_half_is_left_out() -> None:
    noise = np.random.default_rng(4).normal(size=(6 * PERIOD, 1))
    detector = fitted(noise)
    assert np.array_equal(detector._profile, np.zeros_like(detector._profile))


def test_a_slow_drift_of_the_level_is_followed() -> None:
    detector = fitted(days(7))
    later = days(10, seed=5) + np.linspace(0.0, 3.0, 10 * PERIOD)[:, None]
    assert np.median(detector.score(later, first=7 * PERIOD)) < 0.35


def test_tails_are_those_of_the_density_and_rare_is_one() -> None:
    normal = np.random.default_rng(6).normal(size=(20_000, 1))
    tails = KernelTails()
    tails.fit(normal)
    low, high = tails.surprises(np.array([[-2.0], [0.0], [2.0], [50.0], [np.nan]]))
    # log10 of the standard normal's tail beyond 2 is -1.64; of 6 powers of ten that is 0.27.
    assert low[:, 0] == pytest.approx([0.27, 0.05, 0.0, 0.0, 0.0], abs=0.05)
    assert high[:, 0] == pytest.approx([0.0, 0.05, 0.27, 1.0, 0.0], abs=0.05)
    assert tails.beyond(np.array([[0.0], [20.0], [40.0], [np.nan]]))[:, 0].tolist()[0] == 0.0
    assert np.all(np.diff(tails.beyond(np.array([[0.0], [20.0], [40.0]]))[:, 0]) > 0)


def test_the_density_does_not_depend_on_the_order_of_values() -> None:
    normal = np.random.default_rng(7).gamma(2.0, size=(500, 2))
    forwards, backwards = KernelTails(), KernelTails()
    forwards.fit(normal)
    backwards.fit(normal[::-1])
    assert np.array_equal(forwards.surprises(normal)[1], backwards.surprises(normal)[1])
