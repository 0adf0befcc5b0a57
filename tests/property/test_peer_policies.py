"""What holds for every reimplemented policy whatever it is shown: deterministic, bounded, and no gap makes it fail."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enova_recommender.scaling.bounds import REPLICAS_MIN
from enova_recommender.scaling.policies import KNOBS, PEERS
from enova_recommender.scaling.situation import Demand, Memory, Phase, Recent, Signal, Situation
from enova_testing.examples import examples
from enova_testing.policy_runs import decisions
from enova_testing.situations import asked, capacity, replicas, situation, variant

CALLS = 4
NAMES = sorted(PEERS)
EACH = pytest.mark.parametrize("name", NAMES)


def drawn(seed: int) -> list[Situation]:
    """A row of situations: replicas come, go and start; signals and counts have gaps, some are never measured."""
    rng = np.random.default_rng(seed)
    low = int(rng.integers(0, 3))
    high = low + int(rng.integers(0, 12))
    now_s = float(rng.integers(0, 10) * 3600)
    row = []
    for _ in range(CALLS):
        now_s += float(rng.choice([1.0, 5.0, 15.0, 60.0, 300.0]))
        row.append(_drawn(rng, now_s=now_s, bounds=(low, high)))
    return row


def _drawn(rng: np.random.Generator, *, now_s: float, bounds: tuple[int, int]) -> Situation:
    counts = rng.integers(0, 4, size=(2, 3))
    sights = tuple(
        sight
        for index, name in enumerate(("a", "b"))
        for sight in replicas(
            int(counts[index, 0]), starting=int(counts[index, 1]), pending=int(counts[index, 2]), variant_name=name,
            first=20 * index,
        )
    )
    targets = [max(int(sum(counts[index]) + rng.integers(-1, 2)), 0) for index in range(2)]
    delay_s = float(rng.choice([0.0, 10.0, 120.0, 600.0]))
    seen = situation(
        now_s=now_s,
        sights=sights,
        bounds=bounds,
        variants=(
            variant("a", target=targets[0], carries=capacity(float(rng.uniform(0.5, 30))), usd=2.0, places=4),
            variant("b", target=targets[1], carries=capacity(float(rng.uniform(0.5, 30))), usd=5.0, places=4),
        ),
        held=int(rng.integers(0, 3)),
        demand=_gappy(rng, asked(float(rng.choice([0.0, 3.0, 80.0])), end_s=now_s - delay_s, steps=120)),
        history=_gappy(
            rng, asked(float(rng.uniform(0, 50)), end_s=now_s, steps=int(rng.choice([0, 70, 3000])), step_s=60.0)
        ),
        delay_s=delay_s,
    )
    return replace(seen, recent=_recent(rng, seen))


def _recent(rng: np.random.Generator, seen: Situation) -> Recent:
    rows = tuple(one.name for one in seen.replicas if one.phase is Phase.READY)[: int(rng.integers(0, 9))]
    values = {}
    for signal in Signal:
        if rng.random() < 0.2:
            continue
        scale = 1.0 if signal in {Signal.KV_CACHE_USAGE, Signal.GPU_UTILIZATION} else 200.0
        array = rng.uniform(0, scale, size=(len(rows), 120))
        array[rng.random(array.shape) < rng.choice([0.0, 0.3, 1.0])] = math.nan
        array.setflags(write=False)
        values[signal] = array
    return replace(seen.recent, replicas=rows, values=values)


def _gappy(rng: np.random.Generator, demand: Demand) -> Demand:
    arrived = demand.arrived.copy()
    arrived[rng.random(arrived.shape) < rng.choice([0.0, 0.3, 1.0])] = math.nan
    arrived.setflags(write=False)
    return replace(demand, arrived=arrived)


@EACH
@given(seed=st.integers(0, 2**32 - 1), knob=st.integers(0, 4))
@examples(40)
def test_wish_is_bounded_deterministic_and_remembered_through_json(name: str, seed: int, knob: int) -> None:
    policy = PEERS[name](KNOBS[name][knob])
    memory: Memory = {}
    for seen in drawn(seed):
        decided = policy.decide(seen, memory)
        again = PEERS[name](KNOBS[name][knob]).decide(seen, json.loads(json.dumps(dict(memory), allow_nan=False)))
        assert again.wish == decided.wish
        targets = decided.wish.targets
        assert set(targets) == {"a", "b"}
        assert all(isinstance(count, int) and count >= 0 for count in targets.values())
        acts = any(targets[one.name] != one.target for one in seen.variants)
        bounds = seen.bounds
        if acts:
            assert bounds.min_replicas <= sum(targets.values()) <= max(bounds.max_replicas, REPLICAS_MIN)
        memory = decided.memory


@EACH
def test_nothing_measured_at_all_is_survived(name: str) -> None:
    blind = [situation(now_s=60.0 * index, ready=3) for index in range(CALLS)]
    said = decisions(PEERS[name](1.0), blind)
    assert all(sum(decided.wish.targets.values()) >= 1 for decided in said)
    assert all(decided.wish.reason for decided in said)


@EACH
def test_no_replica_and_no_room_is_survived(name: str) -> None:
    empty = situation(ready=0, target=0, bounds=(0, 0), held=2)
    for decided in decisions(PEERS[name](1.0), [empty] * CALLS):
        assert sum(decided.wish.targets.values()) <= REPLICAS_MIN


@EACH
def test_bounds_that_contradict_hold_the_minimum(name: str) -> None:
    seen = situation(ready=2, bounds=(5, 3), measures=dict.fromkeys(Signal, 0.5), demand=asked(90.0, end_s=10_000.0))
    for decided in decisions(PEERS[name](1.0), [seen] * CALLS):
        assert sum(decided.wish.targets.values()) in {2, 5}   # it stays, or holds the minimum


@EACH
def test_five_knob_values_rise_and_one_of_them_is_as_published(name: str) -> None:
    knobs = KNOBS[name]
    assert list(knobs) == sorted(set(knobs))
    assert 1.0 in knobs
