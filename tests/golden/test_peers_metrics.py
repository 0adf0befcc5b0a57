"""Vectors worked by hand for the reimplemented policies that scale on a metric against a target: HPA, KEDA, AIBrix.

max_num_seqs is 100 in all, so that the concurrency target of a pod is 70.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from enova_recommender.scaling.situation import Signal, Situation
from enova_testing.policy_runs import Vector, answered, vector
from enova_testing.situations import Measure, asked, capacity, replicas, situation, variant

Given = Measure | list[Measure]


def shown(
    given: Mapping[Signal, Given], *, ready: int, starting: int = 0, bounds: tuple[int, int] = (1, 100)
) -> Situation:
    return situation(ready=ready, starting=starting, measures=given, bounds=bounds)


def held(running: Given, *, ready: int, starting: int = 0) -> Situation:
    return shown({Signal.RUNNING: running, Signal.WAITING: 0.0}, ready=ready, starting=starting)


def gpu(share: Given, *, ready: int, starting: int = 0) -> Situation:
    return shown({Signal.GPU_UTILIZATION: share}, ready=ready, starting=starting)


def queued(
    waiting: Given, *, ready: int, kv: Given = None, running: Given = 0.0, bounds: tuple[int, int] = (1, 100)
) -> Situation:
    given = {Signal.WAITING: waiting, Signal.RUNNING: running, Signal.KV_CACHE_USAGE: kv}
    return shown(given, ready=ready, bounds=bounds)


def kv(share: Given, *, ready: int) -> Situation:
    return shown({Signal.KV_CACHE_USAGE: share}, ready=ready)


def at(seen: Situation, *times_s: float) -> tuple[Situation, ...]:
    """The same picture at several instants."""
    return tuple(
        replace(
            seen, now_s=time_s, recent=replace(seen.recent, end_s=time_s), demand=replace(seen.demand, end_s=time_s)
        )
        for time_s in times_s
    )


CONCURRENCY = [
    # 140 / 70 = 2 x 2 pods
    vector("hpa-concurrency", "twice the target", held(140.0, ready=2), totals=(4,)),
    # 75 / 70 = 1.07
    vector("hpa-concurrency", "within the tolerance", held(75.0, ready=2), totals=(2,)),
    # 35 / 70 x 4 = 2; the first sight counts as a wish for 4 until 300 s are over
    vector("hpa-concurrency", "down to the largest of 300 s", *at(held(35.0, ready=4), 0, 299, 300), totals=(4, 4, 2)),
    # 700 / 70 = 10, at most max(2 x 1, 1 + 4)
    vector("hpa-concurrency", "the limit of one sync", held(700.0, ready=1), totals=(5,)),
    # ratio 2; the starting pod counts 0: 280 / 3 / 70 = 1.33 x 3 pods
    vector("hpa-concurrency", "a starting pod counts 0", held(140.0, ready=2, starting=1), totals=(4,)),
    # ratio 2; the silent pod counts 0: 140 / 2 / 70 = 1
    vector("hpa-concurrency", "a silent pod counts 0 upwards", held([140.0, None], ready=2), totals=(2,)),
    # ratio 0.2; the silent pod counts T: (14 + 70) / 2 / 70 = 0.6 x 2 = 1.2 -> 2; without it 0.2 x 1 -> 1
    vector(
        "hpa-concurrency", "a silent pod counts T downwards", *at(held([14.0, None], ready=2), 0, 300), totals=(2, 2)
    ),
    vector("hpa-concurrency", "no figure keeps", held(None, ready=3), totals=(3,)),
    # T = 35: 70 / 35 = 2 x 2
    vector("hpa-concurrency", "the knob", held(70.0, ready=2), totals=(4,), knob=2.0),
]
UTILIZATION = [
    # 0.9 / 0.6 = 1.5 x 3 = 4.5
    vector("hpa-gpu", "over the target", gpu(0.9, ready=3), totals=(5,)),
    # 0.62 / 0.6 = 1.03
    vector("hpa-gpu", "within the tolerance", gpu(0.62, ready=3), totals=(3,)),
    # (0.9 + 0.3) / 2 = 0.6
    vector("hpa-gpu", "the mean counts", gpu([0.9, 0.3], ready=2), totals=(2,)),
    # 1 / 0.6 = 1.67
    vector("hpa-gpu", "one full pod", gpu(1.0, ready=1), totals=(2,)),
    # ratio 1.5; starting pods count 0: 1.8 / 4 / 0.6 = 0.75 turns the direction round
    vector("hpa-gpu", "no more while pods start", gpu(0.9, ready=2, starting=2), totals=(4,)),
    vector("hpa-gpu", "no figure keeps", gpu(None, ready=2), totals=(2,)),
    # 0.15 / 0.6 = 0.25 x 4 = 1
    vector("hpa-gpu", "down after 300 s", *at(gpu(0.15, ready=4), 0, 150, 300), totals=(4, 4, 1)),
]
QUEUE = [
    # 20 / 5
    vector("keda-queue", "five a replica", queued(10.0, ready=2), totals=(4,)),
    # 10.5 / (5 x 2) = 1.05
    vector("keda-queue", "within the tolerance", queued([5.0, 5.5], ready=2), totals=(2,)),
    # an empty queue asks for 0, the minimum is 1: the saw-tooth of a healthy full fleet
    vector("keda-queue", "no queue, no fleet", *at(queued(0.0, ready=3, running=60.0), 0, 150, 300), totals=(3, 3, 1)),
    # 100 / 5 = 20, at most max(2, 5)
    vector("keda-queue", "the limit of one poll", queued(100.0, ready=1), totals=(5,)),
    # the third failure asks for 2, which the first sight (4, at 30 s) holds up until 330 s
    vector("keda-queue", "fallback", *at(queued(None, ready=4), 0, 15, 30, 330), totals=(4, 4, 4, 2)),
    vector("keda-queue", "to zero when idle", *at(queued(0.0, ready=1, bounds=(0, 9)), 0, 59, 60), totals=(1, 1, 0)),
    vector("keda-queue", "from zero", situation(ready=0, target=0, bounds=(0, 9), held=3), totals=(1,)),
    # T = 2: 20 / 2 = 10, at most max(4, 6)
    vector("keda-queue", "the knob", queued(10.0, ready=2), totals=(6,), knob=2.5),
]
TWO = [
    # 1.8 / 0.6 = 3; 1.8 / 1.2 = 1.5
    vector("keda-two-signal", "KV usage", queued(0.0, ready=2, kv=0.9), totals=(3,)),
    # KV 0.6 / 0.6 = 1; queue 100 / 30 = 3.33 -> 4: the larger
    vector("keda-two-signal", "the larger wish", queued(50.0, ready=2, kv=0.3), totals=(4,)),
    # KV 1.26 / 1.2 = 1.05 keeps 2; no queue asks for 0
    vector("keda-two-signal", "one within the tolerance", queued(0.0, ready=2, kv=0.63), totals=(2,)),
    # 120 / 30 = 4
    vector("keda-two-signal", "one missing", queued(60.0, ready=2), totals=(4,)),
    vector("keda-two-signal", "both missing", queued(None, ready=2), totals=(2,)),
    # 1 / 0.6 = 1.67 -> 2, after 300 s
    vector("keda-two-signal", "down", *at(queued(0.0, ready=10, kv=0.1), 0, 300), totals=(10, 2)),
]
ROUTER = [
    # (10 / 5 + 0.4 / 0.8) / 2 = 1.25; / 0.8 x 2 = 3.125
    vector("llm-d-epp-keda", "queue of one", queued([10.0, 0.0], ready=2, kv=0.4), totals=(4,)),
    # 0.64 / 0.8 = 0.8 = T
    vector("llm-d-epp-keda", "at the target", queued(0.0, ready=3, kv=0.64), totals=(3,)),
    # (0.5 + 1) / 2 = 0.75; / 0.8 = 0.94
    vector("llm-d-epp-keda", "a stale one is full", queued([0.0, None], ready=2, kv=[0.4, None]), totals=(2,)),
    # all stale: 1 / 0.8 x 3 = 3.75
    vector("llm-d-epp-keda", "all stale", queued(None, ready=3), totals=(4,)),
    # 0.2 / 0.8 x 4 = 1
    vector("llm-d-epp-keda", "down", *at(queued(0.0, ready=4, kv=0.16), 0, 300), totals=(4, 1)),
    # T = 0.4: 0.8 / 0.4 x 2
    vector("llm-d-epp-keda", "the knob", queued(0.0, ready=2, kv=0.64), totals=(4,), knob=2.0),
]
APA = [
    # 0.75 / 0.5 = 1.5 x 2
    vector("aibrix-apa", "over the band", kv(0.75, ready=2), totals=(3,)),
    # ratio 2: min(6, 6)
    vector("aibrix-apa", "doubled at most", kv(1.0, ready=3), totals=(6,)),
    # 0.54 / 0.5 = 1.08
    vector("aibrix-apa", "within the band", kv(0.54, ready=2), totals=(2,)),
    # ratio 0.2: max(ceil(1.2), floor(6 / 2)), at once
    vector("aibrix-apa", "halved at most", kv(0.1, ready=6), totals=(3,)),
    # 0.4 / 0.5 x 6 = 4.8 -> 5, but the smallest wish of 300 s is the 3 of the first call
    vector(
        "aibrix-apa", "one old low sample drags down", *at(kv(0.1, ready=6), 0), *at(kv(0.48, ready=6), 100),
        *at(kv(0.4, ready=6), 200), *at(kv(0.4, ready=6), 300), totals=(3, 6, 3, 5),
    ),
    # (120 x 0.4 + 60 x 1.0) / 180 = 0.6: ratio 1.2
    vector("aibrix-apa", "mean of 180 s", kv(((120.0, 0.4), (60.0, 1.0)), ready=1), totals=(2,)),
    vector("aibrix-apa", "no figure keeps", kv(None, ready=2), totals=(2,)),
    # 2 ready of 4: 0.75 / 0.5 = 1.5 x 4: no guard while pods start
    vector(
        "aibrix-apa", "starting pods multiply", situation(ready=2, starting=2, measures={Signal.KV_CACHE_USAGE: 0.75}),
        totals=(6,),
    ),
]
KPA = [
    # ceil(0.9 / 0.5) = 2, not below floor(6 / 2)
    vector("aibrix-kpa", "a mean taken for a total", kv(0.9, ready=6), totals=(3,)),
    vector("aibrix-kpa", "one pod", kv(0.9, ready=1), totals=(2,)),
    # slow 0.3 -> 1, fast 0.7 -> 2; 0.7 / 0.3 > 2: the larger
    vector("aibrix-kpa", "panic", kv(((120.0, 0.1), (60.0, 0.7)), ready=1), totals=(2,)),
    # slow 0.4 -> 1, fast 0.7 -> 2; 0.7 / 0.4 < 2: the slow one
    vector("aibrix-kpa", "no panic", kv(((120.0, 0.25), (60.0, 0.7)), ready=1), totals=(1,)),
    # 0 -> 0, not below floor(4 / 2)
    vector("aibrix-kpa", "idle", kv(0.0, ready=4), totals=(2,)),
    # 0.52 / 0.5 = 1.04
    vector("aibrix-kpa", "within the band", kv(0.52, ready=3), totals=(3,)),
    vector("aibrix-kpa", "no figure keeps", kv(None, ready=2), totals=(2,)),
]


def mixed(rate: float, *, small: int, large: int) -> Situation:
    """Two variants: 10 requests/s for 2 USD, 25 for 3.90."""
    return situation(
        sights=(*replicas(small, variant_name="small"), *replicas(large, variant_name="large", first=small)),
        variants=(
            variant("small", target=small, usd=2.0),
            variant("large", target=large, usd=3.9, carries=capacity(25.0)),
        ),
        demand=asked(rate, end_s=10_000.0),
    )


def flow(rate: Measure, *, ready: int) -> Situation:
    return situation(ready=ready, demand=asked(rate, end_s=10_000.0))


OPTIMIZER = [
    # 35 / 10 -> 4, at most 2 x 1
    vector("aibrix-optimizer", "doubled at most", flow(35.0, ready=1), totals=(2,)),
    vector("aibrix-optimizer", "as planned", flow(35.0, ready=3), totals=(4,)),
    # 240 s: (230 x 5 + 10 x 35) / 240 = 6.25; last 10 s: 35
    vector("aibrix-optimizer", "the current rate", flow(((230.0, 5.0), (10.0, 35.0)), ready=4), totals=(4,)),
    # published 4 then 2: mean 3; the smallest wish of 300 s is 3
    vector(
        "aibrix-optimizer", "means of what was published", *at(flow(35.0, ready=4), 0), *at(flow(15.0, ready=4), 10),
        totals=(4, 3),
    ),
    # nothing published: 0, not below floor(4 / 2)
    vector("aibrix-optimizer", "halved at most", flow(0.0, ready=4), totals=(2,)),
    # 40: small 4 = 8.00, large 2 = 7.80, 2 + 1 = 7.90: two large; small goes from 1 to 0
    vector("aibrix-optimizer", "the cheapest mix", mixed(40.0, small=1, large=1), totals=(2,)),
    # 35 x 1.25 / 10 = 4.4 -> 5
    vector("aibrix-optimizer", "the knob", flow(35.0, ready=4), totals=(5,), knob=1.25),
]


@pytest.mark.parametrize(
    "one", [*CONCURRENCY, *UTILIZATION, *QUEUE, *TWO, *ROUTER, *APA, *KPA, *OPTIMIZER], ids=str
)
def test_policy_answers_as_worked_by_hand(one: Vector) -> None:
    assert answered(one) == one.totals
