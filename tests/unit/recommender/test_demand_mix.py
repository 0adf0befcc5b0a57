"""A change in the mix of requests counts once: in the capacity where that was told since, else in the weight."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from enova_recommender.recommend.carried import carried
from enova_recommender.recommend.types import Capacity, MeanLengths
from enova_recommender.scaling.enova.demand import demand_now
from enova_recommender.scaling.situation import Demand
from enova_recommender.types import Interval
from enova_testing.situations import asked, capacity, situation, variant

NOW_S = 10_000.0
OLD, NEW = MeanLengths(500.0, 100.0), MeanLengths(1000.0, 200.0)   # twice the work
WORLD = {
    "model": "meta-llama/Llama-3.1-8B-Instruct",
    "gpus": [{"type": "H100", "count": 4}],
    "objectives": {"ttft_s": 1.0, "tpot_s": 0.05},
    "current": {"gpu_type": "H100", "configuration": {"max_num_seqs": 64}},
}


def mixed(changed_s_ago: float) -> Demand:
    """Ten requests a second: those of the last seconds are the new ones."""
    old, new = (
        asked(10.0, end_s=NOW_S, prompt=each.prompt_tokens, output=each.output_tokens) for each in (OLD, NEW)
    )
    steps = len(old.finished)
    fresh = np.arange(steps) >= steps - changed_s_ago / old.step_s
    return replace(
        old,
        prompt_tokens=np.where(fresh, new.prompt_tokens, old.prompt_tokens),
        output_tokens=np.where(fresh, new.output_tokens, old.output_tokens),
    )


def weight(demand: Demand, told: Capacity) -> float:
    return demand_now(situation(now_s=NOW_S, variants=[variant(carries=told)], demand=demand)).weight


@pytest.mark.parametrize("changed_s_ago", [150.0, 300.0, 450.0])
def test_a_capacity_that_was_told_for_the_new_mix_has_the_change_in_it(changed_s_ago: float) -> None:
    share = min(1.0, changed_s_ago / 300.0)      # of the new in the mix of now
    before = replace(capacity(10.0), told_for=OLD)
    after = replace(capacity(5.0), told_for=NEW)
    load = [weight(mixed(changed_s_ago), told) / told.requests_per_s.value for told in (before, after)]
    assert load[0] == pytest.approx((1 + share) / 10.0, rel=0.02)
    assert load[1] == pytest.approx(load[0], rel=1e-6), "whichever capacity is told, as many replicas carry it"


def test_a_capacity_of_before_stays_mended_however_long_ago_the_change_was() -> None:
    assert weight(mixed(10_000.0), replace(capacity(), told_for=OLD)) == pytest.approx(2.0)
    assert weight(mixed(10_000.0), replace(capacity(), told_for=NEW)) == pytest.approx(1.0)


def test_what_a_replica_carries_says_for_which_requests() -> None:
    lengths = [{"prompt_tokens": 100 * number, "output_tokens": 10 * number} for number in range(1, 60)]
    found = carried({**WORLD, "workload": {"requests_per_s": 2.0, "lengths": lengths}})
    assert isinstance(found, Capacity), found
    assert found.told_for == MeanLengths(3000.0, 300.0)
    assert isinstance(found.requests_per_s, Interval)
