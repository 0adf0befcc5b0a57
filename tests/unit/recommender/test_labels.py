"""Labels: as marks, as questions worth asking, as evidence that moves a score, as causes."""

from __future__ import annotations

import numpy as np
import pytest

from enova_recommender.detection.detector import FALSE_ALARM, TRUE_ALARM, UNKNOWN
from enova_recommender.detection.labels import (
    CauseBook,
    EpisodeLabel,
    LabelHead,
    chance_of_true,
    marks_of,
    most_uncertain_first,
    uncertainty,
)


def test_labels_become_one_mark_a_step_and_the_later_one_counts() -> None:
    labels = [EpisodeLabel(first=8, last=11, true=True), EpisodeLabel(first=11, last=13, true=False)]
    marks = marks_of(labels, first=10, steps=5).tolist()
    assert marks == [TRUE_ALARM, FALSE_ALARM, FALSE_ALARM, FALSE_ALARM, UNKNOWN]
    assert marks_of(labels, first=20, steps=2).tolist() == [UNKNOWN, UNKNOWN]


def test_an_alarm_at_the_alarm_rate_is_as_likely_true_as_false() -> None:
    assert chance_of_true([2.0, 3.0, 4.0], rate=1e-3) == pytest.approx([1 / 11, 0.5, 10 / 11])


def test_what_is_least_sure_is_asked_first_and_equals_by_name() -> None:
    assert uncertainty([0.5, 1.0, 0.0]) == pytest.approx([1.0, 0.0, 0.0], abs=1e-9)
    assert uncertainty([0.25]) == pytest.approx([0.8113], abs=1e-4)
    assert most_uncertain_first(["a", "b", "c", "d"], [0.9, 0.6, 0.1, float("nan")]) == ["d", "b", "a", "c"]


def test_without_labels_a_head_is_the_detectors_score() -> None:
    evidence = np.random.default_rng(0).normal(size=(20, 4))
    assert np.array_equal(LabelHead(spread=1.0).score(evidence), evidence[:, 0])


def test_labels_raise_what_is_like_true_alarms_and_lower_what_is_like_false_ones() -> None:
    draw = np.random.default_rng(2)
    normal = np.column_stack((draw.exponential(size=500), 0.1 * draw.random((500, 2))))
    true, false = np.tile([5.0, 1.0, 0.0], (10, 1)), np.tile([5.0, 0.0, 1.0], (10, 1))
    head = LabelHead(spread=3.0)
    rows = np.concatenate((normal, true, false))
    head.fit(rows, np.arange(len(rows)) // 10 == 50, np.ones(len(rows)))
    like_true, like_false = head.score(np.array([[4.0, 0.9, 0.0], [4.0, 0.0, 0.9]]))
    assert like_true > like_false + 1.0
    assert like_true > head.score(normal).max()
    assert np.array_equal(LabelHead.load(head.save()).score(rows), head.score(rows))


def test_a_cause_is_told_of_episodes_that_are_like_one_it_was_said_of() -> None:
    book = CauseBook()
    assert book.likely(np.array([1.0, 0.0])) is None
    book.remember(np.array([0.9, 0.1, 0.0]), "leak")
    book.remember(np.array([0.0, 0.1, 0.9]), "throttling")
    assert book.likely(np.array([0.8, 0.2, 0.0])) == "leak"
    assert book.likely(np.array([0.0, 0.0, 2.0])) == "throttling"
    assert book.likely(np.array([0.0, 1.0, 0.0])) is None
    assert book.likely(np.zeros(3)) is None
