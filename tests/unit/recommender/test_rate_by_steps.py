"""What a replica carries by its steps, and how a steady rise is told from a step of demand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from enova_recommender.scaling.enova import EnovaPolicy
from enova_recommender.scaling.enova.forecast import outlook
from enova_recommender.scaling.enova.learning import careful_factor
from enova_recommender.scaling.enova.steps import BEYOND, FULL_SHARE, TPOT_SHARE, rate_by_steps
from enova_recommender.scaling.situation import Floats, Memory, Recent, Signal, Situation, VariantSight
from enova_recommender.scaling.types import Action
from enova_recommender.types import Interval
from enova_testing.situations import asked, capacity, situation, variant

BASE_S, EACH_S, PROMPT_S = 0.008, 0.0003, 0.00002
PROMPT, ANSWER = 1000.0, 200.0
SLOPE = EACH_S * ANSWER + PROMPT_S * PROMPT
STEPS, STEP_S = 120, 5.0


def step_s(rate: Floats | float) -> Floats:
    """Seconds of a step at this rate."""
    return np.asarray(BASE_S / (1 - np.asarray(rate) * SLOPE))


def stepping(
    rates: Floats, *, told: float = 20.0, kv_share: float = 0.0, seats: int = 10_000, now_s: float = 10_000.0
) -> Situation:
    """Replicas (rows) at these requests a second by the step, in a world whose steps are known."""
    taken = step_s(rates)
    running = rates * ANSWER * taken
    values = {
        Signal.RUNNING: running, Signal.GENERATION_TOKENS: rates * ANSWER * STEP_S,
        Signal.PROMPT_TOKENS: rates * PROMPT * STEP_S, Signal.FINISHED: rates * STEP_S,
        Signal.KV_CACHE_USAGE: kv_share * running, Signal.WAITING: np.zeros_like(rates),
        Signal.TPOT_S: taken, Signal.TTFT_S: np.full_like(rates, 0.1),
    }
    carries = capacity(told, max_num_seqs=seats)
    one = situation(
        now_s=now_s, ready=len(rates), carries=carries, demand=asked(float(rates[:, -12:].mean() * len(rates)),
        end_s=now_s),
    )
    recent = Recent(
        end_s=now_s, step_s=STEP_S, replicas=tuple(each.name for each in one.replicas), values=values
    )
    return replace(one, recent=recent)


def loads(mean: float, *, replicas: int = 3) -> Floats:
    """Rates that go up and down around a mean."""
    wave = 0.25 * np.sin(np.arange(STEPS) / 7.0)
    return np.asarray(mean * (1 + np.stack([np.roll(wave, 11 * row) for row in range(replicas)])))


def found(one: Situation) -> float | None:
    sight: VariantSight = one.variants[0]
    return rate_by_steps(one, sight, list(range(len(one.replicas))))


def test_the_rate_at_which_the_gap_between_tokens_is_used_up_is_found_at_half_of_it() -> None:
    right = (1 - BASE_S / (TPOT_SHARE * 0.05)) / SLOPE
    told = found(stepping(loads(0.6 * right)))
    assert told is not None
    assert told == pytest.approx(right, rel=0.03)


def test_seats_and_cache_bound_the_rate_where_they_are_taken_first() -> None:
    for one in (stepping(loads(5.0), seats=20), stepping(loads(5.0), kv_share=0.05)):
        told = found(one)
        assert told is not None
        assert told * ANSWER * float(step_s(told)) == pytest.approx(FULL_SHARE * 20, rel=0.05)


def test_it_is_not_trusted_far_beyond_what_was_carried() -> None:
    slow = loads(1.0)
    told = found(stepping(slow))
    assert told is not None
    assert told <= BEYOND * slow.max()


@pytest.mark.parametrize("lost", [Signal.PROMPT_TOKENS, Signal.GENERATION_TOKENS, Signal.RUNNING])
def test_where_a_signal_is_not_measured_nothing_is_told(lost: Signal) -> None:
    one = stepping(loads(5.0))
    values = {signal: rows for signal, rows in one.recent.values.items() if signal is not lost}
    assert found(replace(one, recent=replace(one.recent, values=values))) is None
    unknown = {**one.recent.values, lost: np.full_like(one.recent.values[lost], math.nan)}
    assert found(replace(one, recent=replace(one.recent, values=unknown))) is None


def test_a_few_blocks_tell_nothing() -> None:
    assert found(stepping(loads(5.0, replicas=1)[:, :16])) is None


def test_a_told_capacity_that_is_too_high_is_mended_before_anything_is_late() -> None:
    memory: Memory = {}
    for look in range(8):
        one = stepping(loads(5.0), told=40.0, now_s=10_000.0 + 15 * look)
        decided = EnovaPolicy().decide(one, memory)
        memory = decided.memory
    right = (1 - BASE_S / (TPOT_SHARE * 0.05)) / SLOPE
    factor = memory["factor:v"]
    assert isinstance(factor, float)
    assert 40.0 * factor == pytest.approx(right, rel=0.1)


def test_an_unproven_capacity_lets_nothing_go_that_its_lower_end_needs() -> None:
    told = Interval(value=20.0, low=8.0, high=50.0)
    carries = replace(capacity(20.0), requests_per_s=told)
    assert careful_factor(variant(carries=carries)) == pytest.approx(0.4)
    memory: Memory = {}
    for look in range(40):
        now_s = 10_000.0 + 15 * look
        one = situation(
            now_s=now_s, ready=5, carries=carries, demand=asked(30.0, end_s=now_s),
            measures={Signal.RUNNING: 5.0, Signal.WAITING: 0.0},
        )
        decided = EnovaPolicy().decide(one, memory)
        memory = decided.memory
        assert decided.wish.action is Action.KEEP      # 2 would do by the told value, 5 by its lower end
    assert "factor:v" not in memory


def test_a_lower_end_of_nothing_is_survived() -> None:
    carries = replace(capacity(20.0), requests_per_s=Interval(value=20.0, low=0.0, high=50.0))
    one = situation(ready=9, carries=carries, demand=asked(30.0, end_s=10_000.0))
    assert 0 < careful_factor(one.variants[0]) < 1
    assert EnovaPolicy().decide(one, {}).wish.action is Action.KEEP


def test_a_steady_rise_goes_on_and_a_step_does_not() -> None:
    calm = np.full(60, 20.0)
    rise = np.concatenate([calm, 20.0 + 4.0 * np.arange(1, 9)])
    risen = outlook(rise, now_rate=54.0, lead_minutes=5, quantile=0.9)
    assert risen.method == "ramp"
    assert risen.p50 == pytest.approx(54.0 + 5 * 0.7 * 4.0, rel=0.15)
    step = np.concatenate([calm, [60.0, 100.0, 100.0]])
    stepped = outlook(step, now_rate=100.0, lead_minutes=5, quantile=0.9)
    assert stepped.method != "ramp"


def test_a_level_that_was_overtaken_is_not_asked() -> None:
    rates = np.concatenate([np.tile([19.0, 21.0], 60), [26.0]])
    told = outlook(rates, now_rate=27.0, lead_minutes=2, quantile=0.9)
    assert told.method not in {"level of 3 min", "level of 10 min"}
    assert told.high >= 27.0
