"""The twelve cases themselves: what they ask for, what they do to a policy's sight, and when one is passed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from enova_recommender.scaling.situation import Decided, Memory, Signal, Situation, Wish
from enova_recommender.scaling.types import Action
from enova_recommender.types import VerdictKind
from enova_testing.scaling_cases import (
    CASES,
    CHANGE_S,
    END_S,
    TAIL_S,
    USUAL,
    Case,
    Mix,
    Seen,
    frozen,
    judged,
)
from enova_testing.situations import situation


class Replacing:
    """A policy that replaces r0 and remembers its calls."""

    name, interval_s = "replacing", 15.0

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        calls = memory.get("calls", 0.0)
        assert isinstance(calls, float)
        wish = Wish(
            action=Action.KEEP, targets={"v": situation.target}, verdict=VerdictKind.NORMAL, reason="as told",
            replace=("r0",),
        )
        return Decided(wish=wish, memory={"calls": calls + 1})


def case(name: str) -> Case:
    return next(one for one in CASES if one.name.startswith(name))


def verdict(**changes: float) -> tuple[str, ...]:
    figures = {"attainment": 0.995, "cost_ratio": 1.2, "direction_changes": 1, "wrong_acts": 0, **changes}
    return judged(
        "p", "c", attainment=figures["attainment"], cost_ratio=figures["cost_ratio"],
        direction_changes=int(figures["direction_changes"]), wrong_acts=int(figures["wrong_acts"]),
    ).problems


def test_there_are_twelve_cases_with_names_of_their_own() -> None:
    assert len({one.name for one in CASES}) == len(CASES) == 12


def test_case_passes_at_its_limits_and_fails_beyond_each() -> None:
    assert verdict(attainment=0.99, cost_ratio=1.5, direction_changes=2) == ()
    assert verdict(attainment=0.9899) == ("attainment 98.99%",)
    assert verdict(cost_ratio=1.51) == ("1.51 x LB",)
    assert verdict(direction_changes=3) == ("3 changes of direction",)
    assert verdict(wrong_acts=1) == ("1 healthy replicas replaced",)
    assert len(verdict(attainment=math.nan, cost_ratio=math.nan)) == 2      # what is not known does not pass


def test_start_up_after_the_change_the_warm_up_and_the_tail_do_not_count() -> None:
    arrivals = np.array([599.0, 600.0, 899.0, 900.0, 1087.0, 1088.0, END_S - TAIL_S - 1, END_S - TAIL_S])
    assert case("1 ").judged(arrivals).tolist() == [False, True, True, False, False, True, True, False]


def test_counts_follow_the_load_in_the_mix_of_the_time() -> None:
    before, after = case("1 ").counts(2.0, 2.0)
    assert before[0] == pytest.approx(1.0 * 2.0 * 10)
    assert before[90] == pytest.approx(5.0 * 2.0 * 10)
    assert after.sum() == 0
    usual, long = case("7 ").counts(2.0, 0.5)      # the same load of longer prompts is fewer requests
    assert usual[89] == pytest.approx(60.0)
    assert usual[90] == 0
    assert long[90] == pytest.approx(15.0)
    usual, longer = case("9 ").counts(2.0, 0.5)    # the same rate of longer answers is more load
    assert longer[90] == usual[89] == pytest.approx(40.0)


def test_mix_has_its_means_and_is_the_same_for_a_seed() -> None:
    pairs = Mix(prompt=1000, output=300).pairs(seed=3)
    prompts, outputs = np.array(pairs).mean(axis=0)
    assert prompts == pytest.approx(1000, rel=0.1)
    assert outputs == pytest.approx(300, rel=0.1)
    assert pairs == Mix(prompt=1000, output=300).pairs(seed=3)
    assert pairs != USUAL.pairs(seed=3)


def test_frozen_gauges_read_zero_from_then_on_and_gaps_stay_gaps() -> None:
    seen = situation(now_s=100.0, ready=1, measures={Signal.RUNNING: ((30.0, 5.0), (5.0, None), (5.0, 7.0))})
    row = frozen(seen, since_s=92.0).recent.values[Signal.RUNNING][0]
    assert row[-30:-10].tolist() == [5.0] * 20
    assert np.isnan(row[-10:-5]).all()
    assert row[-5:].tolist() == [0.0] * 5


def test_leader_that_is_lost_decides_nothing_and_takes_its_memory_with_it() -> None:
    seen = Seen(Replacing(), case("11"))
    before = seen.decide(situation(now_s=CHANGE_S), {})
    assert before.memory == {"calls": 1.0}
    lost = seen.decide(situation(now_s=CHANGE_S + 40), before.memory)
    assert lost.wish.action is Action.KEEP
    assert lost.memory == {}
    assert seen.decide(situation(now_s=CHANGE_S + 60), lost.memory).memory == {"calls": 1.0}


def test_replacing_a_healthy_replica_is_a_wrong_act() -> None:
    seen = Seen(Replacing(), case("1 "))
    seen.decide(situation(now_s=700.0, ready=2), {})
    assert seen.wrong_acts == ["r0"]
