"""What steps are judged by follows calibration, but neither fast nor far nor while anything is wrong."""

from __future__ import annotations

import math

import pytest

from enova_coordinator.core.followed_corrections import (
    FOLLOW_EVERY_S,
    FOLLOW_MAX,
    FOLLOW_PER_HOUR,
    IDLE_MAX_S,
    FollowedCorrection,
)
from enova_recommender.performance.correction import UNCORRECTED, Correction

LEARNT = Correction(memory=1.4, attention=0.8, host=9.0, spread=0.02)


def followed(hours: float, *, is_well: bool = True) -> FollowedCorrection:
    found = FollowedCorrection.begin(UNCORRECTED, now_s=1000.0)
    for number in range(1, round(hours * 3600 / FOLLOW_EVERY_S) + 1):
        found = found.towards(LEARNT, now_s=1000.0 + number * FOLLOW_EVERY_S, is_well=is_well)
    return found


def test_a_factor_moves_by_a_few_percent_an_hour() -> None:
    found = followed(2.0).correction
    assert math.log(found.memory) == pytest.approx(2 * FOLLOW_PER_HOUR)
    assert math.log(found.attention) == pytest.approx(-2 * FOLLOW_PER_HOUR)
    assert found.compute == 1.0


def test_in_the_end_it_is_what_was_learnt_but_never_far_from_where_it_began() -> None:
    found = followed(60.0).correction
    assert found.memory == pytest.approx(1.4)
    assert found.attention == pytest.approx(0.8)
    assert math.log(found.host) == pytest.approx(FOLLOW_MAX)
    assert found.spread is None     # how far the model may be off stays as it was


def test_it_stands_still_while_a_replica_is_ill_and_makes_nothing_good_afterwards() -> None:
    ill = followed(5.0, is_well=False)
    assert ill.correction == UNCORRECTED
    again = ill.towards(LEARNT, now_s=ill.moved_s + FOLLOW_EVERY_S, is_well=True)
    assert math.log(again.correction.memory) == pytest.approx(FOLLOW_PER_HOUR * FOLLOW_EVERY_S / 3600)


def test_a_long_absence_and_a_clock_that_was_set_back_move_it_little() -> None:
    began = FollowedCorrection.begin(UNCORRECTED, now_s=1000.0)
    assert math.log(began.towards(LEARNT, now_s=1e9, is_well=True).correction.memory) == pytest.approx(
        FOLLOW_PER_HOUR * IDLE_MAX_S / 3600
    )
    assert began.towards(LEARNT, now_s=0.0, is_well=True).correction == UNCORRECTED


def test_it_outlives_a_restart_with_where_it_began_and_how_exact_it_is() -> None:
    found = FollowedCorrection.begin(Correction(memory=1.2, spread=0.03), now_s=0.0).towards(
        LEARNT, now_s=3600.0, is_well=True
    )
    assert FollowedCorrection.load(found.save(), now_s=3600.0) == found


def test_what_an_earlier_release_saved_is_where_it_begins() -> None:
    found = FollowedCorrection.load(list(LEARNT.factors), now_s=5.0)
    assert found.began == found.correction.factors == LEARNT.factors
    with pytest.raises(ValueError, match="3 figures"):
        FollowedCorrection.load([1.0, 1.0, 1.0], now_s=0.0)
    with pytest.raises(ValueError, match="above 0"):
        FollowedCorrection.load([0.0] * 13, now_s=0.0)
