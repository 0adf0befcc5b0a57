"""What every scorer holds to, whichever it is; ensembles and what they are made of."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from enova_recommender.detection.context import Context
from enova_recommender.detection.contextual import SCORERS, ContextDetector
from enova_recommender.detection.ensemble import EnsembleDetector
from enova_recommender.detection.nearest import Nearest
from enova_recommender.detection.scaling import BOUND, RobustScale
from enova_recommender.detection.scorer import ROWS_MIN, Scorer
from enova_recommender.detection.subspace import Subspace
from enova_recommender.detection.surprise import Surprise

Floats = npt.NDArray[np.float64]
FEATURES = 4


def waves(steps: int, seed: int = 0) -> Floats:
    """Features that follow one hidden load, each in its own unit, with a little noise."""
    draw = np.random.default_rng(seed)
    load = 2.0 + np.sin(np.arange(steps) / 30.0)
    clean = load[:, None] * np.array([1.0, 50.0, 0.01, 3.0])
    return np.asarray(clean * (1.0 + 0.02 * draw.normal(size=(steps, FEATURES))))


@pytest.mark.parametrize("kind", list(SCORERS.values()))
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


def test_a_broken_relation_is_found_though_each_feature_is_in_its_range() -> None:
    detector = EnsembleDetector()
    detector.fit(waves(2000))
    values = waves(400, seed=10)
    normal = detector.score(values).max()
    values[200:, 1] = 50.0 * (4.0 - values[200:, 1] / 50.0)  # mirrored within its own range
    assert np.median(detector.score(values)[230:]) > normal


def test_an_ensemble_shows_what_it_weighs_and_stands_without_a_member() -> None:
    detector = EnsembleDetector([ContextDetector(Nearest()), ContextDetector(Subspace())], weights=[3.0, 1.0])
    detector.fit(waves(500))
    assert detector.weights == {"nearest": 0.75, "subspace": 0.25}
    values = waves(20, seed=3) * np.array([1.0, 1.0, 2.0, 1.0])
    for step in values:
        detector.update(step[None, :])
    shares = detector.shares(0)
    assert sum(share.share for share in shares) == pytest.approx(1.0)
    assert all(share.surprise > 1.0 for share in shares)
    alone = detector.without("nearest")
    assert alone.weights == {"subspace": 1.0}
    single = EnsembleDetector([ContextDetector(Subspace())])
    single.fit(waves(500))
    assert np.allclose(alone.score(values), single.score(values))
    assert np.allclose(alone.held_out, single.held_out, equal_nan=True)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0]])
def test_weights_that_weigh_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        EnsembleDetector([ContextDetector(Nearest()), ContextDetector(Subspace())], weights=weights)


def test_strangeness_lingers_and_fades() -> None:
    detector = EnsembleDetector()
    detector.fit(waves(1000))
    values = waves(120, seed=4)
    quiet = detector.score(values)
    values[20:30] *= np.array([1.0, 3.0, 1.0, 0.3])
    after = detector.score(values)
    assert after[35] > quiet[35] + 1.0
    assert after[110] == pytest.approx(quiet[110], rel=0.2)


def test_surprises_are_powers_of_ten_of_normal_time() -> None:
    surprise = Surprise()
    surprise.fit(np.random.default_rng(1).exponential(size=20_000))
    later = surprise.of(np.random.default_rng(2).exponential(size=100_000))
    for power in (1.0, 2.0, 3.0):
        assert (later > power).mean() == pytest.approx(10.0**-power, rel=0.7)
    assert np.isnan(surprise.of(np.array([np.nan]))[0])
    far = surprise.of(np.array([50.0, 500.0, 5000.0]))
    assert np.all(np.diff(far) > 0)
    assert np.array_equal(Surprise.load(surprise.save()).of(later), surprise.of(later))


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
