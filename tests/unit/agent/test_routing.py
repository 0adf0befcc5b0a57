"""The rules of choosing a replica."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enova_agent.core.model import RouteTarget
from enova_agent.core.routing import Load, Policy, Router, load_of_header
from enova_common.backoff import Backoff


def target(name: str, *, weight: float = 1.0) -> RouteTarget:
    return RouteTarget(replica=name, node="n", hop_address="127.0.0.1:1", weight=weight)


A, B, C = target("a"), target("b"), target("c")
ALL = (A, B, C)


def router() -> Router:
    return Router(Policy(ejection=Backoff(initial_s=1.0, maximum_s=8.0, jitter=0.0)))


def test_without_targets_there_is_no_choice() -> None:
    assert router().choose((), now_s=0.0, draws=(0.0, 0.0)) is None
    assert router().choose((target("a", weight=0.0),), now_s=0.0, draws=(0.0, 0.0)) is None


def test_what_was_tried_is_not_chosen_again() -> None:
    assert router().choose(ALL, now_s=0.0, draws=(0.0, 0.0), tried={"a", "b"}) is C
    assert router().choose(ALL, now_s=0.0, draws=(0.0, 0.0), tried={"a", "b", "c"}) is None


def test_of_two_drawn_the_less_loaded_gets_the_request() -> None:
    r = router()
    r.sent("a")
    assert r.choose((A, B), now_s=0.0, draws=(0.0, 0.0)) is B
    r.sent("b")
    assert r.choose((A, B), now_s=0.0, draws=(0.0, 0.0)) is A  # a tie: the first drawn


def test_load_counts_by_weight() -> None:
    heavy, light = target("heavy", weight=4.0), target("light", weight=1.0)
    r = router()
    for _ in range(3):
        r.sent("heavy")
    r.sent("light")
    assert r.choose((light, heavy), now_s=0.0, draws=(0.0, 0.0)) is heavy


def test_what_the_owner_said_counts_until_it_is_old() -> None:
    r = router()
    r.heard("a", Load(in_flight=5, queued=2, capacity=8), now_s=0.0)
    r.sent("b")
    assert r.choose((A, B), now_s=1.9, draws=(0.0, 0.0)) is B
    assert r.choose((A, B), now_s=2.1, draws=(0.0, 0.0)) is A


def test_what_the_owner_said_of_our_own_requests_is_not_counted_twice() -> None:
    r = router()
    for _ in range(3):
        r.sent("a")
    r.heard("a", Load(in_flight=4, queued=0, capacity=8), now_s=0.0)
    for _ in range(3):
        r.ended("a")
    r.sent("b")
    r.sent("b")
    assert r.choose((B, A), now_s=0.1, draws=(0.0, 0.0)) is A  # one of others' against two of ours


def test_a_replica_that_failed_is_left_for_a_time_that_doubles() -> None:
    r = router()
    left_s = []
    now_s = 0.0
    for _ in range(5):
        r.failed("a", now_s=now_s, draw=0.5)
        step_s = 0.0
        while r.choose((A, B), now_s=now_s + step_s, draws=(0.0, 0.0)) is B:
            step_s += 0.5
        left_s.append(step_s)
        now_s += step_s
    assert left_s == [1.0, 2.0, 4.0, 8.0, 8.0]


def test_an_answer_forgives_all_failures() -> None:
    r = router()
    r.failed("a", now_s=0.0, draw=0.5)
    r.failed("a", now_s=0.0, draw=0.5)
    assert r.ejected(now_s=0.0) == ("a",)
    r.answered("a")
    assert r.ejected(now_s=0.0) == ()
    r.failed("a", now_s=0.0, draw=0.5)
    assert r.ejected(now_s=1.0) == ()


def test_if_all_are_left_the_one_that_comes_back_first_is_tried() -> None:
    r = router()
    r.failed("a", now_s=0.0, draw=0.5)
    r.failed("a", now_s=0.0, draw=0.5)
    r.failed("b", now_s=0.0, draw=0.5)
    assert r.choose((A, B), now_s=0.0, draws=(0.0, 0.0)) is B


def test_a_full_queue_is_left_for_a_moment_and_is_no_failure() -> None:
    r = router()
    r.full("a", now_s=0.0)
    assert r.choose((A, B), now_s=0.05, draws=(0.0, 0.0)) is B
    assert r.choose((A, B), now_s=0.11, draws=(0.0, 0.0)) is A
    r.failed("a", now_s=1.0, draw=0.5)
    assert r.ejected(now_s=2.0) == ()  # the first failure, not the second


def test_forgetting_keeps_those_that_hold_a_request() -> None:
    r = router()
    r.sent("gone")
    r.failed("idle", now_s=0.0, draw=0.5)
    r.retain(["a"])
    assert r.ejected(now_s=0.0) == ()
    r.ended("gone")


def test_ending_more_than_was_sent_is_a_defect() -> None:
    with pytest.raises(AssertionError):
        router().ended("a")


@given(st.integers(0, 2**32), st.lists(st.floats(0.1, 10.0), min_size=2, max_size=5))
def test_traffic_follows_the_weights_when_requests_end_at_once(seed: int, weights: list[float]) -> None:
    draws = random.Random(seed)
    targets = [target(str(i), weight=weight) for i, weight in enumerate(weights)]
    r = router()
    chosen: Counter[str] = Counter()
    for _ in range(2000):
        choice = r.choose(targets, now_s=0.0, draws=(draws.random(), draws.random()))
        assert choice is not None
        chosen[choice.replica] += 1
    for item in targets:
        share = item.weight / sum(weights)
        assert abs(chosen[item.replica] / 2000 - share) < 0.06


@given(st.integers(0, 2**32), st.integers(2, 20))
def test_held_requests_spread_evenly(seed: int, replicas: int) -> None:
    draws = random.Random(seed)
    targets = [target(str(i)) for i in range(replicas)]
    r = router()
    chosen: Counter[str] = Counter({item.replica: 0 for item in targets})
    for _ in range(replicas * 20):
        choice = r.choose(targets, now_s=0.0, draws=(draws.random(), draws.random()))
        assert choice is not None
        r.sent(choice.replica)
        chosen[choice.replica] += 1
    assert max(chosen.values()) - min(chosen.values()) <= 10  # of 20; one random choice has a gap of about 20


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_the_load_header_is_read_as_it_was_written(in_flight: int, queued: int, capacity: int) -> None:
    load = Load(in_flight=in_flight, queued=queued, capacity=capacity)
    assert load_of_header(load.header()) == load


@pytest.mark.parametrize("text", ["", "x", "in_flight=1", "in_flight=1;queued=a;capacity=2",
                                  "in_flight=-1;queued=0;capacity=2"])
def test_a_header_that_states_no_load_is_none(text: str) -> None:
    assert load_of_header(text) is None
