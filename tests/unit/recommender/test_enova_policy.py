"""enova's own policy: what it wishes in situations that say plainly what is right."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from enova_recommender.scaling.enova import EnovaPolicy
from enova_recommender.scaling.situation import Memory, Phase, ReplicaSight, Signal, Situation, Wish
from enova_recommender.scaling.types import Action
from enova_recommender.types import VerdictKind
from enova_testing.situations import Measure, asked, capacity, replicas, situation, variant

POLICY = EnovaPolicy()
QUIET = {Signal.RUNNING: 5.0, Signal.WAITING: 0.0, Signal.FINISHED: 5.0, Signal.TPOT_S: 0.02, Signal.TTFT_S: 0.1}


def busy(now_s: float, *, rate: float, ready: int, target: int | None = None, **others: object) -> Situation:
    """A deployment that gets `rate` requests a second; a replica carries 10."""
    quiet = {**QUIET, Signal.FINISHED: rate / max(ready, 1)}
    found = situation(
        now_s=now_s, ready=ready, target=target, measures=quiet, demand=asked(rate, end_s=now_s), **others  # type: ignore[arg-type]
    )
    # Those that are ready have been for long.
    return replace(found, replicas=tuple(replace(each, since_s=now_s - 3600) for each in found.replicas))


def over_time(rate: float, *, ready: int, minutes: int) -> list[Wish]:
    """The wishes of a policy that is asked each interval and whose wishes nobody carries out."""
    memory: Memory = {}
    wishes: list[Wish] = []
    for step in range(round(minutes * 60 / POLICY.interval_s)):
        now_s = 10_000.0 + step * POLICY.interval_s
        decided = POLICY.decide(busy(now_s, rate=rate, ready=ready), memory)
        memory = decided.memory
        wishes.append(decided.wish)
    return wishes


def wanted(wish: Wish) -> int:
    return sum(wish.targets.values())


def test_demand_beyond_what_runs_is_given_replicas_at_once() -> None:
    wish = POLICY.decide(busy(10_000, rate=45, ready=2), {}).wish
    assert wish.action is Action.SCALE_UP
    assert 5 <= wanted(wish) <= 8
    assert wish.verdict is VerdictKind.OVERLOADED
    assert wish.forecast is not None
    assert wish.forecast.low <= wish.forecast.p50 <= wish.forecast.high


def test_what_carries_the_demand_is_kept() -> None:
    assert {wish.action for wish in over_time(48, ready=6, minutes=10)} == {Action.KEEP}


def test_less_demand_lets_replicas_go_only_after_patience() -> None:
    wishes = over_time(12, ready=6, minutes=6)
    first = next(place for place, wish in enumerate(wishes) if wish.action is Action.SCALE_DOWN)
    start_s = 120.0
    assert first * POLICY.interval_s >= start_s
    assert 2 <= wanted(wishes[first]) <= 3
    assert all(wish.verdict is VerdictKind.UNDERUSED for wish in wishes[:first])
    assert wishes[1].cooldown_s > wishes[first - 1].cooldown_s


def test_replicas_that_start_are_counted_so_that_nothing_is_asked_for_twice() -> None:
    memory: Memory = {}
    for step in range(8):
        now_s = 10_000.0 + step * POLICY.interval_s
        sights = (*replicas(2, since_s=now_s - 3600), *replicas(0, starting=4, since_s=10_000.0, first=2))
        found = replace(busy(now_s, rate=45, ready=2), replicas=sights, variants=(variant(target=6),))
        decided = POLICY.decide(found, memory)
        memory = decided.memory
        assert decided.wish.action is Action.KEEP, decided.wish.reason


def test_a_replica_that_never_starts_stops_blocking_after_a_bound_from_learnt_starts() -> None:
    def at(age_s: float) -> Wish:
        sights = (*replicas(4, since_s=0.0), *replicas(0, starting=1, since_s=10_000 - age_s, first=4))
        found = replace(busy(10_000, rate=38, ready=4), replicas=sights, variants=(variant(target=5),))
        return POLICY.decide(found, {}).wish

    assert at(60).action is Action.KEEP
    later = at(1000)
    assert (later.action, wanted(later)) == (Action.SCALE_UP, 6)
    assert "never became READY" in later.reason


def test_a_stuck_queue_on_a_hung_replica_is_not_answered_with_replicas() -> None:
    found = busy(10_000, rate=18, ready=3)
    hung = replace(found.replicas[0], cause="HUNG", verdict=VerdictKind.DEGRADED)
    measures: dict[Signal, Measure | list[Measure]] = {**QUIET, Signal.WAITING: [500.0, 0.0, 0.0]}
    shown = situation(
        now_s=10_000, sights=(hung, *found.replicas[1:]), measures=measures, demand=asked(18.0, end_s=10_000)
    )
    assert POLICY.decide(shown, {}).wish.action is Action.KEEP
    overloaded = replace(shown, demand=asked(60.0, end_s=10_000))
    assert POLICY.decide(overloaded, {}).wish.action is Action.SCALE_UP


def test_what_is_not_known_is_never_taken_for_idleness() -> None:
    blind = busy(10_000, rate=12, ready=6)
    blind = replace(blind, recent=replace(blind.recent, values={}))
    memory: Memory = {}
    for step in range(40):
        now_s = 10_000.0 + step * POLICY.interval_s
        demand = asked(12.0, end_s=now_s)
        decided = POLICY.decide(replace(blind, now_s=now_s, demand=demand), memory)
        memory = decided.memory
        assert decided.wish.action is Action.KEEP
    assert "measured" in decided.wish.reason
    deaf = replace(blind, demand=asked(None, end_s=10_000.0))
    wish = POLICY.decide(deaf, {}).wish
    assert (wish.action, wish.verdict) == (Action.KEEP, VerdictKind.UNKNOWN)


def test_most_nodes_gone_at_once_is_no_reason_to_scale() -> None:
    wish = POLICY.decide(busy(10_000, rate=90, ready=2, fleet_lost_share=0.6), {}).wish
    assert wish.action is Action.KEEP
    assert "60%" in wish.reason


def test_one_jittery_sample_asks_for_nothing() -> None:
    memory: Memory = {}
    actions = []
    for step in range(20):
        now_s = 10_000.0 + step * POLICY.interval_s
        rate = 53.0 if step == 10 else 47.0
        decided = POLICY.decide(busy(now_s, rate=rate, ready=6), memory)
        memory = decided.memory
        actions.append(decided.wish.action)
    assert set(actions[:12]) == {Action.KEEP}


def test_a_number_set_by_hand_is_left_alone_for_a_while() -> None:
    memory: Memory = {}
    for step in range(40):
        now_s = 10_000.0 + step * POLICY.interval_s
        ready = 3 if step < 20 else 8
        decided = POLICY.decide(busy(now_s, rate=20, ready=ready), memory)
        memory = decided.memory
        if step == 20 + 4:
            assert "by hand" in decided.wish.reason
            assert decided.wish.action is Action.KEEP


def test_starting_replicas_leave_before_ready_ones() -> None:
    memory: Memory = {}
    wish = None
    for step in range(20):
        now_s = 10_000.0 + step * POLICY.interval_s
        sights = (*replicas(4, since_s=0.0), *replicas(0, starting=2, since_s=now_s - 10, first=4))
        found = replace(busy(now_s, rate=12, ready=4), replicas=sights, variants=(variant(target=6),))
        decided = POLICY.decide(found, memory)
        memory, wish = decided.memory, decided.wish
    assert wish is not None
    assert wish.action is Action.SCALE_DOWN
    assert set(wish.remove_first[:2]) == {"r4", "r5"}


def test_a_slow_replica_is_replaced_first_and_no_two_at_once() -> None:
    found = busy(10_000, rate=30, ready=6)
    ill = [replace(each, verdict=VerdictKind.DEGRADED, cause="SLOW") for each in found.replicas[:2]]
    shown = replace(found, replicas=(*ill, *found.replicas[2:]))
    assert POLICY.decide(shown, {}).wish.replace == ("r0",)
    unsure = replace(shown, replicas=tuple(replace(each, certain=False) for each in shown.replicas))
    assert POLICY.decide(unsure, {}).wish.replace == ()
    starting = replace(shown, replicas=(*shown.replicas[:-1], _starting(shown.replicas[-1])))
    assert POLICY.decide(starting, {}).wish.replace == ()


def _starting(sight: ReplicaSight) -> ReplicaSight:
    return replace(sight, phase=Phase.STARTING, since_s=9_990.0)


def test_nothing_runs_where_nobody_asks_and_the_first_request_wakes_it() -> None:
    idle = situation(now_s=10_000, ready=1, bounds=(0, 5), measures={Signal.RUNNING: 0.0, Signal.WAITING: 0.0},
                     demand=asked(0.0, end_s=10_000), history=asked(0.0, end_s=10_000, steps=60, step_s=60.0))
    fresh = POLICY.decide(idle, {})
    assert fresh.wish.action is Action.KEEP     # it may have been made a moment ago
    wish = POLICY.decide(replace(idle, now_s=11_000, demand=asked(0.0, end_s=11_000)), fresh.memory).wish
    assert (wish.action, wanted(wish)) == (Action.SCALE_DOWN, 0)
    asleep = replace(idle, replicas=(), variants=(variant(target=0),))
    assert POLICY.decide(asleep, {}).wish.action is Action.KEEP
    woken = POLICY.decide(replace(asleep, held=1), {}).wish
    assert (woken.action, wanted(woken)) == (Action.SCALE_UP, 1)


def test_one_replica_stays_where_the_bounds_say_so() -> None:
    idle = situation(now_s=10_000, ready=1, bounds=(1, 5), measures={Signal.RUNNING: 0.0, Signal.WAITING: 0.0},
                     demand=asked(0.0, end_s=10_000))
    assert POLICY.decide(idle, {}).wish.action is Action.KEEP


def test_a_slack_resource_with_a_queue_asks_for_other_settings() -> None:
    found = situation(
        now_s=10_000, ready=4, measures={**QUIET, Signal.WAITING: 2.0}, demand=asked(20.0, end_s=10_000),
        verdict=VerdictKind.MISCONFIGURED,
    )
    assert POLICY.decide(found, {}).wish.action is Action.RECONFIGURE


def test_a_wrong_prior_is_mended_by_what_replicas_do() -> None:
    memory: Memory = {}
    for step in range(40):
        now_s = 10_000.0 + step * POLICY.interval_s
        queue = {**QUIET, Signal.FINISHED: 4.0, Signal.WAITING: 30.0}
        found = situation(now_s=now_s, ready=5, measures=queue, demand=asked(20.0, end_s=now_s))
        found = replace(found, replicas=tuple(replace(each, since_s=0.0) for each in found.replicas))
        memory = POLICY.decide(found, memory).memory
    factor = memory["factor:v"]
    assert isinstance(factor, float)
    assert factor == pytest.approx(0.4 * 0.92, rel=0.05)     # it was told 10 a second, and sees 4 with a queue


def test_the_cheapest_variants_that_carry_the_load_are_chosen() -> None:
    cheap = variant("cheap", target=1, usd=1.0, places=3)
    dear = variant("dear", target=0, usd=5.0, places=10)
    sights = replicas(1, variant_name="cheap", since_s=0.0)
    found = situation(now_s=10_000, sights=sights, variants=(cheap, dear), measures=QUIET,
                      demand=asked(45.0, end_s=10_000))
    wish = POLICY.decide(found, {}).wish
    assert wish.targets["cheap"] == 3
    assert wish.targets["dear"] >= 2


def test_its_memory_survives_json_and_says_the_same_again() -> None:
    memory: Memory = {}
    plain: Memory = {}
    for step in range(30):
        found = busy(10_000.0 + step * POLICY.interval_s, rate=20.0 + step, ready=4)
        one, other = POLICY.decide(found, memory), POLICY.decide(found, plain)
        assert one == other
        memory = one.memory
        loaded = json.loads(json.dumps(dict(other.memory), allow_nan=False))
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in loaded.items()}


def test_a_memory_of_another_version_is_forgotten_not_obeyed() -> None:
    found = busy(10_000, rate=45, ready=2)
    assert POLICY.decide(found, {"loads": "what?"}).wish == POLICY.decide(found, {}).wish


@pytest.mark.parametrize("knob", [0.5, 1.0, 2.0])
def test_more_conservatism_never_asks_for_less(knob: float) -> None:
    found = busy(10_000, rate=45, ready=2)
    less = wanted(EnovaPolicy(scale=knob).decide(found, {}).wish)
    assert wanted(EnovaPolicy(scale=2 * knob).decide(found, {}).wish) >= less
    assert math.isfinite(less)


def test_the_case_by_hand_of_the_documentation_is_what_it_says() -> None:
    """docs/scaling.md, "A case by hand"."""
    wish = POLICY.decide(situation(ready=2, measures=QUIET, demand=asked(45.0, end_s=10_000)), {}).wish
    sigma = math.sqrt(2 / (60 * 45) + 0.04**2 * 3)
    record = sum(0.5 ** (age / 120) for age in range(7))
    high = 45 * math.exp(1.2815515655446004 * sigma * 120 / (120 + record))
    assert wish.forecast is not None
    assert wish.forecast.at_s - 10_000 == (120 + 180) / 2 + 15
    assert wish.forecast.high == pytest.approx(high, rel=1e-9)
    assert high == pytest.approx(49.2, abs=0.1)
    assert wanted(wish) == math.ceil(high / (10 / 1.05)) == 6


def test_a_capacity_of_nothing_is_survived() -> None:
    found = situation(ready=2, measures=QUIET, demand=asked(5.0, end_s=10_000), carries=capacity(0.0))
    assert wanted(POLICY.decide(found, {}).wish) <= 100
