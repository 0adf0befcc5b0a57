"""The measure of detectors is itself measured: cases worked by hand, and what any such measure must hold to."""

from __future__ import annotations

import numpy as np
import pytest

from enova_testing.range_scores import at_threshold, auc_pr, ranges, vus_pr

LABELS = np.zeros(400, dtype=bool)
LABELS[100:120] = LABELS[300:340] = True


def test_ranges_are_first_and_last_steps() -> None:
    assert ranges([1, 1, 0, 0, 1]) == [(0, 1), (4, 4)]
    assert ranges([0, 0]) == []


def test_a_perfect_score_gets_all_without_a_ramp_and_nearly_all_with() -> None:
    scores = LABELS + np.linspace(0.0, 1e-3, 400)
    assert vus_pr(LABELS, scores, window=0) == pytest.approx(1.0)
    assert 0.8 < vus_pr(LABELS, scores) < 1.0
    assert auc_pr(LABELS, scores) == pytest.approx(1.0)


def test_a_random_score_gets_about_the_share_of_labels() -> None:
    scores = np.random.default_rng(0).random(400)
    assert vus_pr(LABELS, scores) < 0.35
    assert auc_pr(LABELS, scores) < 0.35


def test_a_late_alarm_beside_a_range_is_worth_more_than_one_far_away() -> None:
    near, far = np.zeros(400), np.zeros(400)
    near[122:130], far[200:208] = 1.0, 1.0
    noise = np.linspace(0.0, 1e-3, 400)
    assert vus_pr(LABELS, near + noise) > vus_pr(LABELS, far + noise)


def test_to_touch_every_range_is_worth_more_than_to_cover_one() -> None:
    one, both = np.zeros(400), np.zeros(400)
    one[300:320] = 1.0
    both[100:110] = both[300:310] = 1.0
    noise = np.where(LABELS, 0.0, 1e-3 * np.random.default_rng(1).random(400))  # what is not hit comes last
    assert vus_pr(LABELS, both + noise) > vus_pr(LABELS, one + noise)


def test_the_order_of_scores_alone_matters() -> None:
    scores = np.random.default_rng(2).random(400)
    assert vus_pr(LABELS, scores) == pytest.approx(vus_pr(LABELS, np.exp(5.0 * scores)))


def test_a_threshold_is_judged_by_steps_and_by_events() -> None:
    alarms = np.zeros(400, dtype=bool)
    alarms[110:130] = alarms[200:203] = alarms[210] = True
    # 10 steps are hit, 13 + 1 alarms are false, 50 steps missed: 2 x 10 / (2 x 10 + 10 + 4 + 50).
    judged = at_threshold(LABELS, alarms)
    assert judged.f1 == pytest.approx(20 / 84)
    assert (judged.event_recall, judged.false_episodes) == (0.5, 2)
    assert at_threshold(LABELS, np.zeros(400, dtype=bool)).f1 == 0.0
