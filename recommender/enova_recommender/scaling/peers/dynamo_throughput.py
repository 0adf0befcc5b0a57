"""Dynamo planner's throughput loop for aggregated workers, alone and as the floor of the load loop (P9).

Each 180 s the count of requests and the mean prompt (ISL) and output (OSL) of the interval are forecast one interval
ahead, and R = ceil(knob x rps / engine_rps), at least 1. engine_rps of an aggregated worker, from its profile at the
objectives: it spends ISL / (prefill tokens/s) + OSL / (decode tokens/s) seconds on a request; without lengths,
requests_per_s. With the load loop on (`dynamo`), this R is only the lower bound of what the load loop steps to.
Never to zero. Missing: an interval without any count is no observation, and the last plan stands; lengths: the last
known. Knob: the factor on the rate, and in `dynamo` the thresholds of the load loop.
Source: ai-dynamo/dynamo, components/src/dynamo/planner/core/throughput_scaling.py and its predictors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from enova_recommender.scaling.peers.answers import answer, keep, number, numbers
from enova_recommender.scaling.peers.dynamo_forecast import Forecaster, next_value
from enova_recommender.scaling.peers.dynamo_load import INTERVAL_S as LOAD_INTERVAL_S
from enova_recommender.scaling.peers.dynamo_load import DynamoLoad, stopped_by
from enova_recommender.scaling.peers.sights import lengths, whole
from enova_recommender.scaling.situation import Capacity, Decided, Memory, Situation

INTERVAL_S = 180.0
OBSERVATIONS = 60      # three hours
SERIES = ("counts", "prompts", "outputs")


def engine_rps(capacity: Capacity, *, prompt: float, output: float) -> float:
    """Requests a second of one aggregated worker at these lengths."""
    busy_s = prompt / capacity.prefill_tokens_per_s + output / capacity.decode_tokens_per_s
    return 1 / busy_s if busy_s > 0 else capacity.requests_per_s.value


def observed(situation: Situation, memory: Memory) -> dict[str, tuple[float, ...]]:
    """The three series with the interval that just ended."""
    demand = situation.demand
    steps = max(1, round(INTERVAL_S / demand.step_s))
    window = demand.arrived[-steps:]
    series = {key: numbers(memory, key) for key in SERIES}
    if not np.isnan(window).all():
        found = lengths(demand, window_s=INTERVAL_S)
        known = window.size * (1 - float(np.isnan(window).mean()))
        count = float(np.nansum(window)) * steps / known
        series["counts"] = (*series["counts"], count)[-OBSERVATIONS:]
        if found.known:
            series["prompts"] = (*series["prompts"], found.prompt)[-OBSERVATIONS:]
            series["outputs"] = (*series["outputs"], found.output)[-OBSERVATIONS:]
    return series


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamoThroughput:
    """The reimplemented policy."""

    name: str
    forecaster: Forecaster = Forecaster.ARIMA
    knob: float = 1.0
    interval_s: float = INTERVAL_S

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """One round."""
        series = observed(situation, memory)
        kept: Memory = {key: values for key, values in series.items() if values}
        if not series["counts"]:
            return keep(situation, reason="no interval has been observed", memory=kept, missing=True)
        total, reason = self.plan(situation, series)
        return answer(situation, total, reason=reason, memory=kept)

    def plan(self, situation: Situation, series: dict[str, tuple[float, ...]]) -> tuple[int, str]:
        """Replicas for the interval ahead, and why."""
        ahead = {key: next_value(values, self.forecaster) for key, values in series.items() if values}
        rps = ahead["counts"] / INTERVAL_S
        capacity = situation.variants[0].capacity
        one = engine_rps(capacity, prompt=ahead.get("prompts", 0.0), output=ahead.get("outputs", 0.0))
        return max(whole(self.knob * rps / one), 1), f"{rps:.3g} requests/s are expected, a worker does {one:.3g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamo:
    """The reimplemented policy with both loops on."""

    name: str = "dynamo"
    knob: float = 1.0
    interval_s: float = LOAD_INTERVAL_S

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """The load loop above the floor, which is planned anew each 180 s."""
        kept, reason = self._planned(situation, memory)
        floor = int(number(kept, "floor", 1.0))
        stopped = stopped_by(situation)
        if stopped:
            return keep(situation, reason=stopped, memory=kept, missing=True)
        step, why = DynamoLoad(name=self.name, knob=self.knob).step(situation)
        said = f"{why}; floor {floor}: {reason}"
        return answer(situation, max(situation.target + step, floor), reason=said, memory=kept)

    def _planned(self, situation: Situation, memory: Memory) -> tuple[Memory, str]:
        begun_s = number(memory, "planned_s", situation.now_s)
        if situation.now_s - begun_s < INTERVAL_S:
            return {**memory, "planned_s": begun_s}, "of the last plan"
        series = observed(situation, memory)
        kept: Memory = {**memory, **series, "planned_s": situation.now_s}
        if not series["counts"]:
            return kept, "no interval has been observed"
        total, reason = DynamoThroughput(name=self.name, knob=self.knob).plan(situation, series)
        return {**kept, "floor": float(total)}, reason


def dynamo_throughput(knob: float) -> DynamoThroughput:
    """With its default forecast."""
    return DynamoThroughput(name="dynamo-throughput", knob=knob)


def dynamo_throughput_constant(knob: float) -> DynamoThroughput:
    """With the last value as forecast."""
    return DynamoThroughput(name="dynamo-throughput-constant", forecaster=Forecaster.CONSTANT, knob=knob)


def dynamo_throughput_kalman(knob: float) -> DynamoThroughput:
    """With the Kalman filter as forecast."""
    return DynamoThroughput(name="dynamo-throughput-kalman", forecaster=Forecaster.KALMAN, knob=knob)


def dynamo(knob: float) -> Dynamo:
    """Both loops."""
    return Dynamo(knob=knob)
