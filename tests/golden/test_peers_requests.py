"""Vectors worked by hand for the reimplemented policies that count requests or look at a schedule.

Capacity in all: 10 requests/s and 100 sequences a replica. The comment above a vector is its working.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from enova_recommender.scaling.peers.static import static_peak
from enova_recommender.scaling.situation import Demand, Signal, Situation
from enova_recommender.scaling.types import (
    EngineSizes,
    Feature,
    GpuFacts,
    ModelFacts,
    Observation,
    ReplicaSeries,
    Series,
)
from enova_testing.policy_runs import Vector, answered, totals, vector
from enova_testing.situations import Measure, asked, situation

GIB = 1024**3
HOUR = 60
DAY = 24 * HOUR


Given = Measure | list[Measure]


def busy(*, running: Given = 0.0, waiting: Given = 0.0) -> dict[Signal, Given]:
    return {Signal.RUNNING: running, Signal.WAITING: waiting}


def at(seen: Situation, *times_s: float) -> tuple[Situation, ...]:
    """The same picture at several instants."""
    return tuple(
        replace(
            seen, now_s=time_s, recent=replace(seen.recent, end_s=time_s), demand=replace(seen.demand, end_s=time_s)
        )
        for time_s in times_s
    )


def past(*pieces: tuple[int, float], end_s: float = 10_000.0) -> Demand:
    """History by the minute: (minutes, requests a second), oldest first."""
    row = tuple((60.0 * minutes, rate) for minutes, rate in pieces)
    return asked(row, end_s=end_s, steps=sum(minutes for minutes, _ in pieces), step_s=60.0)


def minutes(
    replicas: int, *, pending: float, running: float, kv: float, new: float = 60.0, success: float = 60.0,
    now_s: float = 10_000.0, end_s: float = 10_000.0,
) -> Observation:
    """Ten equal minutes of each replica, Llama 7B on up to eight GPUs of 24 GiB, 256 sequences."""
    figures = {
        Feature.PENDING: pending, Feature.RUNNING: running, Feature.KV_USAGE: kv, Feature.NEW: new,
        Feature.SUCCESS: success, Feature.ACTIVE: pending + running,
    }
    rows = {
        feature: Series(start_s=end_s - 540.0, step_s=60.0, values=(value,) * 10) for feature, value in figures.items()
    }
    return Observation(
        now_s=now_s,
        replicas=replicas,
        series=tuple(ReplicaSeries(replica=f"r{index}", series=rows) for index in range(replicas)),
        configuration=EngineSizes(tensor_parallel_size=1, gpu_memory_utilization=0.9, max_num_seqs=256),
        model=ModelFacts(
            framework="llama", size_billion=7, parameters=6_607_000_000, kv_elements_per_token=262144,
            attention_heads=32, context_tokens=4096,
        ),
        gpu=GpuFacts(count=8, memory_bytes=24 * GIB),
    )


PEAK = past((119, 10.0), (1, 42.0))
STATIC = [
    # highest minute 42/s; 42 / 10 = 4.2
    vector("static-peak", "the highest minute", situation(history=PEAK), totals=(5,)),
    # 42 x 1.6 / 10 = 6.72
    vector("static-peak", "the knob is a factor", situation(history=PEAK), totals=(7,), knob=1.6),
    vector("static-peak", "less than an hour keeps", situation(ready=3, history=past((59, 42.0))), totals=(3,)),
    # decided at the first call; the second's 90/s would be 9
    vector("static-peak", "decided once", situation(history=PEAK), situation(history=past((60, 90.0))), totals=(5, 5)),
    vector("static-peak", "bounds hold", situation(history=PEAK, bounds=(1, 3)), totals=(3,)),
    # mean of an hour at 10 and an hour at 25: 17.5 / 10 = 1.75
    vector("static-mean", "the mean minute", situation(history=past((60, 10.0), (60, 25.0))), totals=(2,)),
    # 17.5 x 2 / 10 = 3.5
    vector("static-mean", "the knob", situation(history=past((60, 10.0), (60, 25.0))), totals=(4,), knob=2.0),
    # (119 x 10 + 42) / 120 = 10.27; / 10 = 1.03
    vector("static-mean", "one high minute hardly counts", situation(history=PEAK), totals=(2,)),
    vector("static-mean", "no history keeps", situation(ready=4), totals=(4,)),
    vector("static-mean", "the minimum holds", situation(history=past((60, 1.0)), bounds=(3, 9)), totals=(3,)),
]

# Two days to midnight: 42/s from 3:00 to 4:00, 5/s otherwise. Rules: 42 / 10 -> 5 at 3:00, 5 / 10 -> 1 else.
WEEK = past(*((3 * HOUR, 5.0), (HOUR, 42.0), (20 * HOUR, 5.0)) * 2, end_s=10 * 86400.0)
DAY_S = 10 * 86400.0
CRON = [
    vector("cron", "inside the window", situation(now_s=DAY_S + 3.5 * 3600, history=WEEK), totals=(5,)),
    vector("cron", "after the window", situation(now_s=DAY_S + 4 * 3600, history=WEEK), totals=(1,)),
    # 42 x 2 / 10 = 8.4
    vector("cron", "the knob", situation(now_s=DAY_S + 3 * 3600, history=WEEK), totals=(9,), knob=2.0),
    vector("cron", "no whole day keeps", situation(ready=3, history=past((DAY - 1, 42.0))), totals=(3,)),
    # the schedule of the morning stays until midnight, whatever history says at noon
    vector(
        "cron", "written at midnight only",
        situation(now_s=DAY_S + 60, history=WEEK),
        situation(now_s=DAY_S + 12 * 3600, history=past((DAY, 95.0), end_s=DAY_S + 12 * 3600)),
        situation(now_s=DAY_S + 86400, history=past((DAY, 95.0), end_s=DAY_S + 86400)),
        totals=(1, 1, 10),
    ),
]

# KV full and batch full: the cache stays as large as it is, TP 2 at 0.6 is the least that holds it:
# old (0.9 x 24 GiB - 13.21 GB = 9.98 GB) / new (1.2 x 24 GiB - 13.21 GB = 17.71 GB) = 0.563;
# x new/success 2 x R 2 = 2.25
FULL = minutes(2, pending=30, running=250, kv=95, new=120, success=60)
FULL_SMALL_QUEUE = minutes(2, pending=1, running=250, kv=95, new=120, success=60)
RELEASED = [
    one
    for name in ("enova-0.0.7-faithful", "enova-0.0.7-mended")
    for one in (
        # 2 x 30 >= 50 in three minutes: ceil(2.25) = 3, at most 8 GPUs // 2 = 4
        vector(name, "a queue of 50", situation(ready=2, minutes=FULL), totals=(3,)),
        # 2 x 1 < 50, but 2 x 1 >= 50 / 25
        vector(name, "a small queue", situation(ready=2, minutes=FULL_SMALL_QUEUE), totals=(2,)),
        vector(name, "the knob", situation(ready=2, minutes=FULL_SMALL_QUEUE), totals=(3,), knob=25.0),
        # KV 5 % <= 10, 10 <= 0.1 x 256: ceil(5 / 2)
        vector(
            name, "idleness halves", situation(ready=5, minutes=minutes(5, pending=0, running=10, kv=5)), totals=(3,)
        ),
        # a queue, but KV 50 < 90 and batch 100 / 256 < 0.9: it doubts the figures
        vector(
            name, "a queue without use", situation(ready=2, minutes=minutes(2, pending=30, running=100, kv=50)),
            totals=(2,),
        ),
        vector(
            name, "no success", situation(ready=2, minutes=minutes(2, pending=30, running=250, kv=95, success=0)),
            totals=(2,),
        ),
        vector(name, "nothing measured", situation(ready=2), totals=(2,)),
    )
]
# idle series that stopped ten minutes ago: the release takes them for now, the mended rule does not
STALE = minutes(4, pending=0, running=1, kv=1, end_s=9_400.0)
RELEASED += [
    vector("enova-0.0.7-faithful", "old data pass for present", situation(ready=4, minutes=STALE), totals=(2,)),
    vector("enova-0.0.7-mended", "old data are no data", situation(ready=4, minutes=STALE), totals=(4,)),
]

TWENTY = situation(ready=2, measures=busy(running=8.0, waiting=2.0))       # 20 ongoing: 20 / 2 = 10
FOUR = situation(ready=2, measures=busy(running=2.0))                      # 4 ongoing: 4 / 2 = 2, what there is
RAY = [
    vector("ray-serve", "wished for 30 s", *at(TWENTY, 0, 10, 20, 30), totals=(2, 2, 2, 10)),
    # the equal sample at 10 s starts the count anew at 20 s
    vector(
        "ray-serve", "one other sample resets", *at(TWENTY, 0), *at(FOUR, 10), *at(TWENTY, 20, 30, 40, 50),
        totals=(2, 2, 2, 2, 2, 10),
    ),
    # 8 ongoing at 30 s: 8 / 2 = 4, the last wish counts
    vector(
        "ray-serve", "the last wish is applied", *at(TWENTY, 0),
        *at(situation(ready=2, measures=busy(running=4.0)), 30), totals=(2, 4),
    ),
    # 5 replicas, 4 ongoing: 2, after 600 s
    vector(
        "ray-serve", "less after 600 s", *at(situation(ready=5, measures=busy(running=0.8)), 0, 590, 600),
        totals=(5, 5, 2),
    ),
    vector("ray-serve", "from zero at once", situation(ready=0, target=0, bounds=(0, 9), held=1), totals=(1,)),
    # nobody reports: a total of 0 asks for the minimum
    vector("ray-serve", "lost telemetry looks idle", *at(situation(ready=3), 0, 600), totals=(3, 1)),
    # 20 x 0.02 / 2 = 0.2
    vector("ray-serve", "the knob", *at(TWENTY, 0, 600), totals=(2, 1), knob=0.02),
]

RISEN = situation(ready=2, demand=asked(35.0, end_s=0.0))                  # 35 / 10 = 3.5 -> 4
LEVEL = situation(ready=2, demand=asked(20.0, end_s=0.0))                  # 2, what there is
SKY = [
    vector("skyserve", "15 ticks", *at(RISEN, *range(0, 300, 20)), totals=(*[2] * 14, 4)),
    vector(
        "skyserve", "one jittery tick resets", *at(RISEN, *range(0, 280, 20)), *at(LEVEL, 280),
        *at(RISEN, *range(300, 580, 20)), totals=(2,) * 29,
    ),
    # 15 / 10 -> 2 after 60 ticks
    vector(
        "skyserve", "60 ticks down", *at(situation(ready=5, demand=asked(15.0, end_s=0.0)), *range(0, 1200, 20)),
        totals=(*[5] * 59, 2),
    ),
    vector(
        "skyserve", "from zero at once",
        situation(ready=0, target=0, bounds=(0, 9), demand=asked(15.0, end_s=10_000.0)), totals=(2,),
    ),
    vector("skyserve", "between ticks nothing counts", *at(RISEN, *range(0, 75, 5)), totals=(2,) * 15),
    # 95 / 10 -> 10: the last tick's size
    vector(
        "skyserve", "sizes may differ", *at(RISEN, *range(0, 280, 20)),
        *at(situation(ready=2, demand=asked(95.0, end_s=0.0)), 280), totals=(*[2] * 14, 10),
    ),
    vector(
        "skyserve", "to zero", *at(situation(ready=1, bounds=(0, 9)), *range(0, 1200, 20)), totals=(*[1] * 59, 0)
    ),
]

# 54 s of 10 and 6 s of 400: (540 + 2400) / 60 = 49 -> 1; 400 / 70 -> 6, >= 2 x 1: panic
BURST = situation(ready=1, measures=busy(running=((54.0, 10.0), (6.0, 400.0))))
AFTER = situation(ready=1, starting=5, measures=busy(running=10.0))
KNATIVE = [
    vector("knative", "panic", BURST, totals=(6,)),
    # panic holds its largest wish for 60 s; then 10 / 70 -> 1, and floor(1 / 2) = 0 is less
    vector("knative", "panic lasts 60 s", *at(BURST, 0), *at(AFTER, 30, 60, 61), totals=(6, 6, 6, 1)),
    # 200 / 70 = 2.86 -> 3; 3 / 4 < 2
    vector("knative", "stable", situation(ready=4, measures=busy(running=40.0, waiting=10.0)), totals=(3,)),
    # 7 / 70 -> 1, but not below floor(10 / 2)
    vector("knative", "down by half at most", situation(ready=10, measures=busy(running=0.7)), totals=(5,)),
    vector(
        "knative", "to zero after grace",
        *at(situation(ready=1, bounds=(0, 9), measures=busy()), 0, 28, 30), totals=(1, 1, 0),
    ),
    vector("knative", "no figure keeps", situation(ready=3), totals=(3,)),
    # T = 28: 200 / 28 = 7.14 -> 8; >= 2 x 4: panic, the same 8
    vector("knative", "the knob", situation(ready=4, measures=busy(running=50.0)), totals=(8,), knob=2.5),
    vector("knative", "from zero", situation(ready=0, target=0, bounds=(0, 9), held=3), totals=(1,)),
]

SERVERLESS = [
    # 7 / 2 -> 4
    vector("serverless-llm", "up at once", situation(ready=1, measures=busy(running=6.0, waiting=1.0)), totals=(4,)),
    # 1 / 2 -> 1; two are idle: 3 - 2
    vector("serverless-llm", "the idle go", situation(ready=3, measures=busy(running=[0.0, 0.0, 1.0])), totals=(1,)),
    # 3 / 2 -> 2, but none is idle
    vector("serverless-llm", "the busy stay", situation(ready=3, measures=busy(running=1.0)), totals=(3,)),
    vector("serverless-llm", "to zero", situation(ready=1, bounds=(0, 9), measures=busy()), totals=(0,)),
    # 5 / 2 -> 3
    vector("serverless-llm", "from zero", situation(ready=0, target=0, bounds=(0, 9), held=5), totals=(3,)),
    # the silent one is not idle: 3 - 2
    vector(
        "serverless-llm", "the silent stay",
        situation(ready=3, bounds=(0, 9), measures=busy(running=[None, 0.0, 0.0])), totals=(1,),
    ),
]


@pytest.mark.parametrize("one", [*STATIC, *CRON, *RELEASED, *RAY, *SKY, *KNATIVE, *SERVERLESS], ids=str)
def test_policy_answers_as_worked_by_hand(one: Vector) -> None:
    assert answered(one) == one.totals


def test_static_fleet_takes_a_rate_that_is_known_beforehand() -> None:
    assert totals(static_peak(1.0, rate=61.0), [situation()]) == (7,)   # 61 / 10 = 6.1
