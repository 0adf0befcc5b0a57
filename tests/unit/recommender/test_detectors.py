"""What every scorer and every detector holds to, whichever it is, and what tells them apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from enova_recommender.detection.context import Context
from enova_recommender.detection.detector import SCORERS, STEPS_MIN, ContextDetector, NotFitted
from enova_recommender.detection.scaling import BOUND, RobustScale
from enova_recommender.detection.scorer import ROWS_MIN, Scorer

Floats = npt.NDArray[np.float64]
FEATURES = 4


def waves(steps: int, seed: int = 0) -> Floats:
    """Features that follow one hidden load, each in its own unit, with a little noise."""
    draw = np.random.default_rng(seed)
    load = 2.0 + np.sin(np.arange(steps) / 30.0)
    clean = load[:, None] * np.array([1.0, 50.0, 0.01, 3.0])
    return np.asarray(clean * (1.0 + 0.02 * draw.normal(size=(steps, FEATURES))))


def fitted(make: Callable[[], ContextDetector] = ContextDetector) -> ContextDetector:
    detector = make()
    detector.fit(waves(2000))
    return detector


@pytest.mark.parametrize("kind", SCORERS)
class TestEveryScorer:
    """Contract of Scorer."""

    def made(self, kind: type[Scorer]) -> Scorer:
        scorer = kind()
        scorer.fit(waves(500))
        return scorer

    def test_a_strange_row_is_farther_than_every_normal_one(self, kind: type[Scorer]) -> None:
        scorer = self.made(kind)
        strange = waves(1) * np.array([[1.0, 3.0, 1.0, 0.2]])
        assert scorer.distances(strange)[0] > scorer.distances(waves(300, seed=1)).max()

    def test_distances_and_contributions_are_finite_and_never_negative(self, kind: type[Scorer]) -> None:
        scorer = self.made(kind)
        rows = 100.0 * waves(50)
        assert scorer.distances(rows).shape == (50,)
        assert scorer.contributions(rows).shape == rows.shape
        for values in (scorer.distances(rows), scorer.contributions(rows)):
            assert np.all(np.isfinite(values) & (values >= 0.0))

    def test_a_row_has_the_same_distance_alone_and_among_others(self, kind: type[Scorer]) -> None:
        scorer, rows = self.made(kind), waves(20, seed=3)
        alone = np.concatenate([scorer.distances(row[None, :]) for row in rows])
        assert np.allclose(scorer.distances(rows), alone, rtol=1e-6, atol=1e-6)

    def test_what_was_saved_measures_as_it_did(self, kind: type[Scorer]) -> None:
        scorer, rows = self.made(kind), waves(30, seed=4)
        assert np.array_equal(kind.load(scorer.save()).distances(rows), scorer.distances(rows))

    def test_too_little_or_incomplete_normal_time_is_refused(self, kind: type[Scorer]) -> None:
        with pytest.raises(ValueError, match="normal: at least"):
            kind().fit(waves(ROWS_MIN - 1))
        holed = waves(100)
        holed[5, 1] = np.nan
        with pytest.raises(ValueError, match="normal: every value"):
            kind().fit(holed)


def test_a_batch_is_scored_as_its_steps_one_by_one() -> None:
    values = waves(60, seed=5)
    values[10:13, 2] = np.nan
    values[20] = np.nan
    batch, stepped = fitted(), fitted()
    scores = batch.score(values)
    assert np.allclose(scores, [stepped.update(step[None, :])[0] for step in values], rtol=1e-6, atol=1e-6)


def test_many_series_are_scored_as_each_alone() -> None:
    together, alone = fitted(), fitted()
    table = np.stack([waves(40, seed=seed) for seed in (6, 7, 8)], axis=1)
    scores = np.stack([together.update(step) for step in table])
    for series in range(table.shape[1]):
        assert np.allclose(scores[:, series], alone.score(table[:, series]), rtol=1e-6, atol=1e-6)


def test_scoring_changes_nothing_and_the_same_input_gives_the_same_scores() -> None:
    first, second = fitted(), fitted()
    values = waves(50, seed=9)
    first.score(values * 3.0)
    assert np.array_equal(first.score(values), second.score(values))


def test_a_broken_relation_is_found_though_each_feature_is_in_its_range() -> None:
    detector = fitted()
    values = waves(400, seed=10)
    normal = detector.score(values).max()
    values[200:, 1] = 50.0 * (4.0 - values[200:, 1] / 50.0)  # mirrored within its own range
    assert np.median(detector.score(values)[230:]) > normal


def test_the_feature_that_is_to_blame_comes_first() -> None:
    detector = fitted()
    for step in waves(20, seed=11):
        step[2] *= 2.5
        detector.update(step[None, :])
    contributions = detector.contributions()
    assert contributions.shape == (1, FEATURES)
    assert contributions[0].argmax() == 2
    assert contributions.sum() == pytest.approx(1.0)
    assert {share.name for share in detector.shares(0)} == {"nearest", "subspace"}


def test_normal_time_exceeds_a_level_about_as_often_as_its_tail_says() -> None:
    detector = fitted()
    chances = detector.tail.probability(detector.score(waves(5000, seed=12)))
    assert 0.0005 < (chances < 0.005).mean() < 0.02


def test_constant_missing_and_broken_values_give_no_exception_and_no_false_score() -> None:
    history = waves(500)
    history[:, 1] = 7.0
    history[:, 2] = np.nan
    detector = ContextDetector()
    detector.fit(history)
    later = waves(200, seed=13)
    later[:, 1] = 7.0
    later[:, 2] = np.inf
    assert np.quantile(detector.score(later), 0.9) < 1.5
    nothing = np.full((3, FEATURES), np.nan)
    assert np.isnan(detector.score(nothing)).all()


def test_what_was_saved_goes_on_as_it_was() -> None:
    first = fitted()
    for step in waves(30, seed=14):
        first.update(np.stack((step, 2.0 * step)))
    second = ContextDetector.load(first.save())
    for step in waves(30, seed=15):
        assert np.array_equal(first.update(np.stack((step, step))), second.update(np.stack((step, step))))
    assert second.tail == first.tail


def test_a_detector_that_has_not_learnt_or_sees_other_features_says_so() -> None:
    with pytest.raises(NotFitted):
        ContextDetector().score(waves(3))
    with pytest.raises(ValueError, match="values: 4 features"):
        fitted().score(waves(3)[:, :2])
    with pytest.raises(ValueError, match=f"history: at least {STEPS_MIN}"):
        ContextDetector().fit(waves(STEPS_MIN - 1))


def test_features_are_bounded_and_their_units_do_not_matter() -> None:
    history = waves(300)
    scale, other = RobustScale(), RobustScale()
    scale.fit(history)
    other.fit(history * 1000.0)
    later = waves(50, seed=16) * 30.0
    assert np.allclose(scale.scaled(later), other.scaled(later * 1000.0))
    assert scale.scaled(later).max() <= BOUND


def test_a_gap_is_filled_from_the_recent_past() -> None:
    context = Context(series=1, features=1)
    for value in (1.0, 1.0, 2.0):
        last = context.update(np.array([[value]]))
    filled = context.update(np.array([[np.nan]]))
    assert filled[0, 0] == last[0, 1]
    assert np.array_equal(filled[0, 1:], last[0, 1:])
