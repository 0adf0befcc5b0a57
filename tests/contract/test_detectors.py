"""Every detector holds to the same promises, and the suite does not know which one it holds."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from enova_recommender.detection.contextual import ContextDetector
from enova_recommender.detection.detector import Detector, NotFitted
from enova_recommender.detection.ensemble import EnsembleDetector
from enova_recommender.detection.extremes import DriftingThreshold
from enova_recommender.detection.learned import VaeDetector
from enova_recommender.detection.nearest import Nearest
from enova_recommender.detection.seasonal import SeasonalDetector
from enova_recommender.detection.subspace import Subspace
from enova_recommender.detection.taught import TaughtDetector

Floats = npt.NDArray[np.float64]

FEATURES = 4
PERIOD = 60
STEPS = 1200


def everything() -> EnsembleDetector:
    return EnsembleDetector([
        ContextDetector(Nearest()), ContextDetector(Subspace()), SeasonalDetector(period_steps=PERIOD), VaeDetector(),
    ])  # fmt: skip


MADE: dict[str, Callable[[], Detector]] = {
    "nearest": lambda: ContextDetector(Nearest()),
    "subspace": lambda: ContextDetector(Subspace()),
    "seasonal": lambda: SeasonalDetector(period_steps=PERIOD),
    "seasonal_without_period": SeasonalDetector,
    "vae": VaeDetector,
    "ensemble": EnsembleDetector,
    "ensemble_of_all": everything,
    "taught": TaughtDetector,
}


def waves(steps: int, *, seed: int = 0, first: int = 0) -> Floats:
    """Features that follow one hidden load with a period, each in its own unit, with a little noise."""
    draw = np.random.default_rng(seed)
    load = 2.0 + np.sin((first + np.arange(steps)) * 2.0 * np.pi / PERIOD)
    clean = load[:, None] * np.array([1.0, 50.0, 0.01, 3.0])
    return np.asarray(clean * (1.0 + 0.03 * draw.normal(size=(steps, FEATURES))))


FITTED: dict[str, dict[str, Floats]] = {}


@pytest.fixture(params=list(MADE))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def detector(kind: str) -> Detector:
    """One that has learnt; fitted once a kind, then loaded, so that no test sees what another did."""
    if kind not in FITTED:
        first = MADE[kind]()
        first.fit(waves(STEPS))
        FITTED[kind] = first.save()
    return type(MADE[kind]()).load(FITTED[kind])


def test_what_is_far_from_normal_scores_higher_than_all_normal_time(detector: Detector) -> None:
    normal = detector.score(waves(300, seed=1, first=STEPS), first=STEPS)
    broken = waves(300, seed=1, first=STEPS)
    broken[200:, 1] *= 4.0
    broken[200:, 3] = 0.0
    scores = detector.score(broken, first=STEPS)
    assert np.median(scores[210:]) > normal.max()


def test_a_batch_is_scored_as_its_steps_one_by_one(detector: Detector) -> None:
    values = waves(60, seed=5, first=STEPS)
    values[10:13, 2] = np.nan
    values[20] = np.nan
    values[30, 1] *= 3.0
    batch = detector.score(values, first=STEPS)
    stepped = [detector.update(row[None, :], step=STEPS + step)[0] for step, row in enumerate(values)]
    assert np.allclose(batch, stepped, rtol=1e-6, atol=1e-6)


def test_many_series_are_scored_as_each_alone(detector: Detector) -> None:
    table = np.stack([waves(40, seed=seed, first=STEPS) for seed in (6, 7, 8)], axis=1)
    alone = [detector.score(table[:, series], first=STEPS) for series in range(3)]
    together = np.stack([detector.update(rows, step=STEPS + step) for step, rows in enumerate(table)])
    assert np.allclose(together, np.stack(alone, axis=1), rtol=1e-6, atol=1e-6)


def test_scoring_changes_nothing(detector: Detector) -> None:
    values = waves(50, seed=9)
    before = detector.score(values)
    detector.score(values * 3.0)
    assert np.array_equal(before, detector.score(values))


def test_the_same_history_gives_the_same_detector(kind: str) -> None:
    first, second = MADE[kind](), MADE[kind]()
    first.fit(waves(STEPS))
    second.fit(waves(STEPS))
    saved = first.save()
    assert saved.keys() == second.save().keys()
    assert all(np.array_equal(array, second.save()[key], equal_nan=True) for key, array in saved.items())


def test_scores_are_finite_where_anything_was_measured_and_nothing_else_is_nan(detector: Detector) -> None:
    values = waves(30, seed=3)
    values[:, 2] = np.nan
    values[5, 0], values[6, 0] = np.inf, -np.inf
    values[7] = 1e300
    assert np.isfinite(detector.score(values)).all()
    assert np.isnan(detector.score(np.full((3, FEATURES), np.nan))).all()
    assert np.isnan(detector.update(np.full((2, FEATURES), np.nan))).all()


def test_a_history_with_gaps_constants_and_nothing_is_learnt_and_raises_no_alarm(kind: str) -> None:
    history = waves(STEPS)
    history[:, 1], history[:, 2], history[100:140] = 7.0, np.nan, np.nan
    history[50, 0] = np.inf
    made = MADE[kind]()
    made.fit(history)
    later = waves(200, seed=13, first=STEPS)
    later[:, 1], later[:, 2] = 7.0, np.inf
    known = made.held_out[np.isfinite(made.held_out)]
    assert np.median(made.score(later, first=STEPS)) <= np.quantile(known, 0.99)


def test_what_a_mask_hides_is_missing(kind: str) -> None:
    history, mask = waves(STEPS), np.ones((STEPS, FEATURES), dtype=bool)
    mask[300:340, 1] = False
    wrong, missing = history.copy(), history.copy()
    wrong[300:340, 1], missing[300:340, 1] = 1e9, np.nan
    masked, gaps = MADE[kind](), MADE[kind]()
    masked.fit(wrong, mask)
    gaps.fit(missing)
    values = waves(40, seed=4)
    assert np.array_equal(masked.score(values), gaps.score(values))


def test_the_feature_that_is_to_blame_comes_first(detector: Detector) -> None:
    for step, row in enumerate(waves(20, seed=11, first=STEPS)):
        row[2] *= 4.0
        detector.update(np.stack((row, row)), step=STEPS + step)
    contributions = detector.contributions()
    assert contributions.shape == (2, FEATURES)
    assert contributions.argmax(axis=1).tolist() == [2, 2]
    assert contributions.sum(axis=1) == pytest.approx([1.0, 1.0])
    assert (contributions >= 0.0).all()


def test_what_was_saved_goes_on_as_it_was_and_needs_no_pickle(detector: Detector) -> None:
    for step, row in enumerate(waves(30, seed=14, first=STEPS)):
        detector.update(np.stack((row, 2.0 * row)), step=STEPS + step)
    file = io.BytesIO()
    arrays: dict[str, Any] = {**detector.save()}
    np.savez(file, **arrays)
    file.seek(0)
    with np.load(file, allow_pickle=False) as loaded:
        second = type(detector).load(dict(loaded))
    for step, row in enumerate(waves(30, seed=15, first=STEPS + 30)):
        values = np.stack((row, row))
        at = STEPS + 30 + step
        assert np.array_equal(detector.update(values, step=at), second.update(values, step=at))
    assert np.array_equal(detector.held_out, second.held_out, equal_nan=True)


def test_held_out_scores_are_one_a_step_and_look_like_those_of_later_normal_time(detector: Detector) -> None:
    held = detector.held_out
    assert held.shape == (STEPS,)
    known = held[np.isfinite(held)]
    assert known.size >= STEPS // 3
    later = detector.score(waves(2000, seed=21, first=STEPS), first=STEPS)
    assert 0.01 < (later > np.quantile(known, 0.95)).mean() < 0.15


def test_a_threshold_on_held_out_scores_alarms_about_as_often_as_stated(detector: Detector) -> None:
    threshold = DriftingThreshold(rate=5e-3)
    threshold.fit(detector.held_out)
    threshold.judge(detector.score(waves(6000, seed=22, first=STEPS), first=STEPS))
    assert threshold.achieved_rate is not None
    assert threshold.achieved_rate < 3e-2


def test_one_that_has_not_learnt_or_sees_other_features_says_so(kind: str, detector: Detector) -> None:
    with pytest.raises(NotFitted):
        MADE[kind]().score(waves(3))
    with pytest.raises(NotFitted):
        MADE[kind]().save()
    with pytest.raises(ValueError, match="values: 4 features"):
        detector.update(waves(3)[:, :2])
    with pytest.raises(ValueError, match="history: at least"):
        MADE[kind]().fit(waves(10))
