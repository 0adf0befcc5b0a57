"""Vectors worked by hand for the reimplemented policies that look at tokens and latency: llm-d and Dynamo.

A replica holds 100,000 KV tokens and 100 sequences, prefills 20,000 and decodes 4,000 tokens/s; requests have prompts
of 500 and outputs of 100 tokens. So a worker of Dynamo's does 1 / (500 / 20,000 + 100 / 4,000) = 20 requests/s, and
llm-d's capacity of one is min(0.8 x 100,000, min(8,192 x 100 / 600, 100) x (500 + 50)) = 55,000 tokens.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from enova_recommender.scaling.peers.dynamo_forecast import Forecaster, next_value
from enova_recommender.scaling.peers.dynamo_load import estimate
from enova_recommender.scaling.situation import Signal, Situation
from enova_testing.policy_runs import Vector, answered, vector
from enova_testing.situations import Measure, asked, situation

Given = Measure | list[Measure]
FIVE_ROUNDS_S = (0, 60, 120, 180, 240)


def loaded(
    kv: Given, *, ready: int, waiting: Given = 0.0, starting: int = 0, pending: int = 0, rate: Measure = 1.0,
    ttft: Given = None, tpot: Given = None, bounds: tuple[int, int] = (1, 100), prompt: float = 500.0,
    output: float = 100.0,
) -> Situation:
    return situation(
        ready=ready, starting=starting, pending=pending, bounds=bounds,
        measures={
            Signal.KV_CACHE_USAGE: kv, Signal.WAITING: waiting, Signal.TTFT_S: ttft, Signal.TPOT_S: tpot,
        },
        demand=asked(rate, end_s=10_000.0, prompt=prompt, output=output),
    )


def at(seen: Situation, *times_s: float) -> tuple[Situation, ...]:
    """The same picture at several instants."""
    return tuple(
        replace(
            seen, now_s=time_s, recent=replace(seen.recent, end_s=time_s), demand=replace(seen.demand, end_s=time_s)
        )
        for time_s in times_s
    )


def rounds(seen: Situation) -> tuple[Situation, ...]:
    """Five rounds: a wish of the first is the target in the fifth, 240 s later."""
    return at(seen, *FIVE_ROUNDS_S)


SATURATION = [
    # spare 0.80 - 0.75 = 0.05 < 0.10
    vector("llm-d-saturation", "KV short", *rounds(loaded(0.75, ready=2)), totals=(2, 2, 2, 2, 3)),
    # spare 5 - 3 = 2 < 3
    vector("llm-d-saturation", "queue short", *rounds(loaded(0.1, ready=2, waiting=3.0)), totals=(2, 2, 2, 2, 3)),
    # with one fewer 0.5 x 2 / 1 = 1.0: spare -0.2
    vector("llm-d-saturation", "one fewer is not safe", *rounds(loaded(0.5, ready=2)), totals=(2,) * 5),
    # with one fewer 0.2 x 3 / 2 = 0.3: spare 0.5, queue 5
    vector("llm-d-saturation", "one fewer is safe", *rounds(loaded(0.2, ready=3)), totals=(3, 3, 3, 3, 2)),
    # what is wished (3) does exist, but one does not report
    vector("llm-d-saturation", "a stuck one freezes", *rounds(loaded(0.79, ready=2, pending=1)), totals=(3,) * 5),
    # none below 0.80: spare 0
    vector("llm-d-saturation", "all saturated", *rounds(loaded(0.9, ready=1)), totals=(1, 1, 1, 1, 2)),
    # 0.80 / 1.6 = 0.5: spare 0.5 - 0.45 = 0.05
    vector("llm-d-saturation", "the knob", *rounds(loaded(0.45, ready=1)), totals=(1, 1, 1, 1, 2), knob=1.6),
    vector("llm-d-saturation", "no figure keeps", *rounds(loaded(None, ready=2)), totals=(2,) * 5),
    # the largest of the minute counts: 0.75 for 10 s of it
    vector(
        "llm-d-saturation", "maximum of a minute", *rounds(loaded(((50.0, 0.3), (10.0, 0.75)), ready=2)),
        totals=(2, 2, 2, 2, 3),
    ),
    vector(
        "llm-d-saturation", "to zero after ten minutes",
        *at(loaded(0.0, ready=1, rate=0.0, bounds=(0, 9)), 0, 599, 600), totals=(1, 1, 0),
    ),
]
TOKENS = [
    # 2 x 50,000 / 0.85 = 117,647; less 2 x 55,000: 7,647 -> 1
    vector("llm-d-tokens", "need", *rounds(loaded(0.5, ready=2)), totals=(2, 2, 2, 2, 3)),
    # 90,000 / 0.85 = 105,882 < 110,000; 110,000 - 90,000 / 0.7 < 0
    vector("llm-d-tokens", "neither", *rounds(loaded(0.45, ready=2)), totals=(2,) * 5),
    # 220,000 - 40,000 / 0.7 = 162,857; / 55,000 = 2.96 -> 2
    vector("llm-d-tokens", "spare", *rounds(loaded(0.1, ready=4)), totals=(4, 4, 4, 4, 2)),
    # queue of 10 >= 5: it is full at 30,000; (30,000 + 10 x 500) / 0.85 - 30,000 = 11,176 -> 1
    vector("llm-d-tokens", "a full one shows its limit", *rounds(loaded(0.3, ready=1, waiting=10.0)),
           totals=(1, 1, 1, 1, 2)),
    # 117,647 - 3 x 55,000 < 0; 110,000 - 100,000 / 0.7 < 0
    vector("llm-d-tokens", "starting ones count", *rounds(loaded(0.5, ready=2, starting=1)), totals=(3,) * 5),
    vector("llm-d-tokens", "no figure keeps", *rounds(loaded(None, ready=2)), totals=(2,) * 5),
    # 90,000 x 1.25 / 0.85 = 132,353 - 110,000 -> 1
    vector("llm-d-tokens", "the knob", *rounds(loaded(0.45, ready=2)), totals=(2, 2, 2, 2, 3), knob=1.25),
    # outputs of 1,000: min(8,192 x 1,000 / 1,500, 100) x 1,000 = 100,000 > k1 = 80,000;
    # 2 x 70,000 / 0.85 = 164,706 - 160,000 -> 1
    vector("llm-d-tokens", "memory limits long outputs", *rounds(loaded(0.7, ready=2, output=1000.0)),
           totals=(2, 2, 2, 2, 3)),
]
LOAD = [
    vector("dynamo-load", "between the thresholds", loaded(0.9, ready=2), totals=(2,)),
    # 0.9 + 30 x 500 / 100,000 = 1.05: one is enough
    vector("dynamo-load", "any over 1", loaded([0.9, 0.7], ready=2, waiting=[30.0, 0.0]), totals=(3,)),
    vector("dynamo-load", "all under 0.6", loaded([0.5, 0.3], ready=2), totals=(1,)),
    vector("dynamo-load", "not all under 0.6", loaded([0.5, 0.7], ready=2), totals=(2,)),
    vector("dynamo-load", "stops while one starts", loaded(0.9, ready=2, waiting=90.0, starting=1), totals=(3,)),
    vector("dynamo-load", "stops while one is silent", loaded([0.9, None], ready=2, waiting=90.0), totals=(2,)),
    # 1 / 2 = 0.5 < 0.55
    vector("dynamo-load", "the knob", loaded(0.55, ready=2), totals=(3,), knob=2.0),
    vector("dynamo-load", "one stays", loaded(0.0, ready=1), totals=(1,)),
]
LATENCY = [
    vector("dynamo-load-latency", "any over 0.4", loaded([0.5, 0.2], ready=2), totals=(3,)),
    vector("dynamo-load-latency", "between", loaded(0.3, ready=2), totals=(2,)),
    vector("dynamo-load-latency", "all under 0.1", loaded([0.05, 0.09], ready=2), totals=(1,)),
    vector("dynamo-load-latency", "not all under 0.1", loaded([0.05, 0.2], ready=2), totals=(2,)),
    # 0.3 + 30 x 500 / 100,000 = 0.45
    vector("dynamo-load-latency", "queued tokens count", loaded(0.3, ready=1, waiting=30.0), totals=(2,)),
]
# ttft = 0.1 + 0.1 x waiting, 16 s at each of 0, 2, 4, 12; now 12: 1.3 s > 1 s
STEPS: Measure = ((16.0, 0.0), (16.0, 2.0), (16.0, 4.0), (16.0, 12.0))
SLOWER: Measure = ((16.0, 0.1), (16.0, 0.3), (16.0, 0.5), (16.0, 1.3))
SLA = [
    vector("dynamo-load-sla", "all late", loaded(0.5, ready=2, waiting=STEPS, ttft=SLOWER, tpot=0.02), totals=(3,)),
    vector(
        "dynamo-load-sla", "one late", loaded(0.5, ready=2, waiting=[STEPS, 0.0], ttft=[SLOWER, 0.1], tpot=0.02),
        totals=(2,),
    ),
    # 0.1 < 0.8 x 1, 0.02 < 0.8 x 0.05
    vector("dynamo-load-sla", "all early", loaded(0.5, ready=2, ttft=0.1, tpot=0.02), totals=(1,)),
    vector("dynamo-load-sla", "all slow per token", loaded(0.5, ready=2, ttft=0.1, tpot=0.06), totals=(3,)),
    # 0.045 is neither over 0.05 nor under 0.04
    vector("dynamo-load-sla", "between", loaded(0.5, ready=2, ttft=0.1, tpot=0.045), totals=(2,)),
    vector("dynamo-load-sla", "too few samples", loaded(0.5, ready=2, ttft=((4.0, 9.0),), tpot=0.02), totals=(2,)),
    # 0.05 / 1.25 = 0.04 < 0.045
    vector("dynamo-load-sla", "the knob", loaded(0.5, ready=2, ttft=0.1, tpot=0.045), totals=(3,), knob=1.25),
]


def flow(rate: Measure, *, ready: int = 1, kv: Given = 0.9, output: float = 100.0, finished: bool = True) -> Situation:
    seen = loaded(kv, ready=ready, rate=rate, output=output)
    if finished:
        return seen
    none = np.zeros_like(seen.demand.arrived)
    return replace(seen, demand=replace(seen.demand, finished=none, prompt_tokens=none, output_tokens=none))


def plans(*rates: Measure) -> tuple[Situation, ...]:
    """One interval of 180 s at each rate."""
    return tuple(at(flow(rate), 180.0 * index)[0] for index, rate in enumerate(rates))


THROUGHPUT = [
    one
    for name in ("dynamo-throughput", "dynamo-throughput-constant", "dynamo-throughput-kalman")
    for one in (
        # the first interval is the forecast: 50 / 20 = 2.5
        vector(name, "rate over a worker's", flow(50.0), totals=(3,)),
        vector(name, "one at least", flow(0.0), totals=(1,)),
        # 50 x 1.6 / 20 = 4
        vector(name, "the knob", flow(50.0), totals=(4,), knob=1.6),
        # 500 / 20,000 + 300 / 4,000 = 0.1 s: 10/s; 5
        vector(name, "longer outputs", flow(50.0, output=300.0), totals=(5,)),
        vector(name, "no count keeps", flow(None, ready=4), totals=(4,)),
        # no request finished: requests_per_s 10
        vector(name, "without lengths", flow(50.0, finished=False), totals=(5,)),
        vector(name, "a constant rate", *plans(*[50.0] * 7), totals=(3,) * 7),
    )
] + [
    # 20, then 70: the last is 70 / 20 = 3.5
    vector("dynamo-throughput-constant", "the last value", *plans(20.0, 70.0), totals=(1, 4)),
    # gain (12, 1) / 22; 20 + 50 x (12 + 1) / 22 = 49.5; / 20 = 2.48
    vector("dynamo-throughput-kalman", "half way", *plans(20.0, 70.0), totals=(1, 3)),
    # fewer than 5: the last
    vector("dynamo-throughput", "too short for ARIMA", *plans(20.0, 70.0), totals=(1, 4)),
]
BOTH = [
    vector("dynamo", "no plan at first", *at(flow(70.0, ready=2), 0), totals=(2,)),
    # after 180 s: 70 / 20 -> 4, though 0.9 of KV asks for nothing
    vector("dynamo", "the plan is a floor", *at(flow(70.0, ready=2), 0, 175, 180), totals=(2, 2, 4)),
    # floor 30 / 20 -> 2 stops the load loop that would go to 1
    vector("dynamo", "no step below the floor", *at(flow(30.0, ready=2, kv=0.1), 0, 180), totals=(1, 2)),
    # floor 2, load over 1: 3 + 1
    vector(
        "dynamo", "steps above the floor",
        *at(loaded(0.9, ready=3, waiting=90.0, rate=30.0), 0, 180), totals=(4, 4),
    ),
    # the plan is made, nothing is done while one starts
    vector("dynamo", "stops while one starts", *at(loaded(0.9, ready=2, starting=1, rate=90.0), 0, 180), totals=(3, 3)),
]


@pytest.mark.parametrize(
    "one", [*SATURATION, *TOKENS, *LOAD, *LATENCY, *SLA, *THROUGHPUT, *BOTH], ids=str
)
def test_policy_answers_as_worked_by_hand(one: Vector) -> None:
    assert answered(one) == one.totals


def test_latency_line_is_read_at_the_load_of_now() -> None:
    load, latency = np.array([0.0, 2.0, 4.0, 6.0, 8.0]), np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    assert estimate(load, latency, now=20.0) == pytest.approx(2.1)


def test_latency_line_averages_samples_within_a_bucket_of_load() -> None:
    # 0 to 16 in 16 buckets: 0.2 and 0.4 share the first, and weigh as much there as the one sample at 16 does
    load, latency = np.array([0.0, 0.2, 0.4, 0.6, 16.0]), np.array([1.0, 2.0, 3.0, 4.0, 7.0])
    # points (0.3, 2.5) and (16, 7): slope 4.5 / 15.7
    assert estimate(load, latency, now=16.0) == pytest.approx(7.0)


def test_arima_follows_a_ramp_and_is_never_negative() -> None:
    rising = tuple(100.0 + 10.0 * index for index in range(12))
    assert next_value(rising, Forecaster.ARIMA) == pytest.approx(220.0, rel=0.05)
    falling = tuple(110.0 - 10.0 * index for index in range(12))
    assert next_value(falling, Forecaster.ARIMA) == pytest.approx(0.0, abs=5.0)
    assert next_value((5.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0), Forecaster.KALMAN) >= 0.0
