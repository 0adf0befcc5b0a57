"""What a detector is taught: true alarms are not learnt as normal, false ones are, and both move what is like them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from enova_recommender.detection.detector import FALSE_ALARM, TRUE_ALARM, UNKNOWN
from enova_recommender.detection.labels import weights_by_labels
from enova_recommender.detection.taught import TaughtDetector

Floats = npt.NDArray[np.float64]
STEPS = 600


def load_of(steps: int, seed: int = 0) -> Floats:
    draw = np.random.default_rng(seed)
    load = 2.0 + np.sin(np.arange(steps) / 20.0)
    return np.asarray(load[:, None] * np.array([1.0, 5.0, 0.1]) * (1.0 + 0.05 * draw.normal(size=(steps, 3))))


def later(seed: int) -> Floats:
    """Two kinds of oddness: the second feature high from 50, the third low from 130."""
    values = load_of(200, seed=seed)
    values[50:60, 1] *= 2.0
    values[130:140, 2] *= 0.3
    return values


def fitted() -> TaughtDetector:
    detector = TaughtDetector()
    detector.fit(load_of(STEPS))
    return detector


def marks(true: slice | None, false: slice | None) -> npt.NDArray[np.int8]:
    made = np.full(200, UNKNOWN, dtype=np.int8)
    if true is not None:
        made[true] = TRUE_ALARM
    if false is not None:
        made[false] = FALSE_ALARM
    return made


def test_labels_of_both_kinds_raise_what_is_like_the_true_and_lower_what_is_like_the_false() -> None:
    detector = fitted()
    before = detector.score(later(5), first=STEPS + 200)
    detector.learn(later(4), marks(slice(50, 60), slice(130, 140)), first=STEPS)
    after = detector.score(later(5), first=STEPS + 200)
    ratio = [after[part].mean() - before[part].mean() for part in (slice(50, 60), slice(130, 140))]
    assert ratio[0] > ratio[1] + 0.5


def test_a_new_normal_is_learnt_if_people_say_that_its_alarm_was_false_and_not_if_it_was_true() -> None:
    drifted = load_of(200, seed=6)
    drifted[:, 0] *= 2.5
    judged = {}
    for name, mark in (("false", FALSE_ALARM), ("true", TRUE_ALARM)):
        detector = fitted()
        detector.learn(drifted, np.full(200, mark, dtype=np.int8), first=STEPS)
        judged[name] = float(np.median(detector.score(drifted, first=STEPS + 200)))
    assert judged["false"] < 0.5 * judged["true"]


def test_a_member_that_finds_what_is_labelled_comes_to_weigh_more() -> None:
    draw = np.random.default_rng(8)
    scores = np.stack((draw.random(200), draw.random(200)))
    true = np.arange(200) >= 160
    scores[1, true] += 2.0
    weights = weights_by_labels(lambda each: each @ scores, true, np.array([0.5, 0.5]))
    assert weights.sum() == pytest.approx(1.0)
    assert weights[1] > 0.6
    few = weights_by_labels(lambda each: each @ scores, np.arange(200) >= 198, np.array([0.5, 0.5]))
    assert 0.5 < few[1] < weights[1]
    same = np.stack((scores[1], scores[1]))
    assert weights_by_labels(lambda each: each @ same, true, np.array([0.5, 0.5])) == pytest.approx([0.5, 0.5])


def test_without_a_label_nothing_is_learnt() -> None:
    detector = fitted()
    before = detector.score(later(5), first=STEPS + 200)
    detector.learn(later(4), marks(None, None), first=STEPS)
    assert np.array_equal(detector.score(later(5), first=STEPS + 200), before)


def test_a_gap_before_new_steps_is_missing_and_old_steps_are_not_learnt_twice() -> None:
    detector = fitted()
    for _ in range(2):
        detector.learn(later(4), marks(slice(50, 60), slice(130, 140)), first=STEPS + 100)
        assert len(detector.held_out) == STEPS + 300


def test_what_was_taught_outlives_saving() -> None:
    detector = fitted()
    detector.learn(later(4), marks(slice(50, 60), slice(130, 140)), first=STEPS)
    values = later(7)
    assert np.array_equal(TaughtDetector.load(detector.save()).score(values), detector.score(values))
