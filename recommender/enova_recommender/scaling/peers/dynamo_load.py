"""Dynamo planner's load-based loop for aggregated workers, in its three modes (P8).

Each 5 s, one step of one replica at most, and only while every replica of the target is ready and reports.
- throughput (default): util = (KV tokens in use + queued prompt tokens) / KV tokens. Up if ANY > 1.0; down if ALL are
  < 0.6.
- latency: the same with 0.4 and 0.1.
- sla: per worker two least-squares lines over its last 64 samples, averaged in 16 buckets of load: time to first token
  over queued prompt tokens, time per token over KV tokens in use; with 5 samples or more they give an estimate at
  the load of now. Up if ALL estimates of either are over its objective; down if ALL of both are under 0.8 x it. The
  objectives are the deployment's (published: 500 ms and 50 ms).
Never to zero. Missing: a replica that starts, or does not report, stops the loop (a stuck one for good, as published);
samples without a figure are left out of the lines. The GPU budget is the deployment's maximum.
Knob: the thresholds, or the objectives, over the knob.
Source: ai-dynamo/dynamo, components/src/dynamo/planner/core/load_scaling.py and its defaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from enova_recommender.scaling.peers.answers import answer, keep
from enova_recommender.scaling.peers.sights import lengths, means, ready
from enova_recommender.scaling.situation import Decided, Floats, Memory, Signal, Situation

INTERVAL_S = 5.0
LENGTHS_WINDOW_S = 60.0
SAMPLES, SAMPLES_MIN, BUCKETS = 64, 5, 16
SLA_DOWN = 0.8


class Mode(StrEnum):
    """What the loop optimises for."""

    THROUGHPUT = "throughput"
    LATENCY = "latency"
    SLA = "sla"


THRESHOLDS = {Mode.THROUGHPUT: (1.0, 0.6), Mode.LATENCY: (0.4, 0.1)}


def estimate(load: Floats, latency: Floats, *, now: float) -> float:
    """The line through the last samples, at the load of now; NaN with too few of them."""
    known = ~np.isnan(load) & ~np.isnan(latency)
    load, latency = load[known][-SAMPLES:], latency[known][-SAMPLES:]
    if load.size < SAMPLES_MIN or math.isnan(now):
        return math.nan
    width = float(np.ptp(load)) / BUCKETS
    if width == 0:
        return float(latency.mean())
    index = np.minimum(((load - load.min()) / width).astype(int), BUCKETS - 1)
    counts = np.bincount(index, minlength=BUCKETS)
    filled = counts > 0
    x = np.bincount(index, load, BUCKETS)[filled] / counts[filled]
    y = np.bincount(index, latency, BUCKETS)[filled] / counts[filled]
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return float(y.mean()) + slope * (now - float(x.mean()))


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamoLoad:
    """The reimplemented policy."""

    name: str
    mode: Mode = Mode.THROUGHPUT
    knob: float = 1.0
    interval_s: float = INTERVAL_S

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """One round."""
        stopped = stopped_by(situation)
        if stopped:
            return keep(situation, reason=stopped, memory=memory, missing=True)
        step, reason = self.step(situation)
        return answer(situation, situation.target + step, reason=reason, memory=memory)

    def step(self, situation: Situation) -> tuple[int, str]:
        """One more, one fewer, or none; and why."""
        if self.mode is Mode.SLA:
            return self._by_latency(situation)
        shares = list(_utilizations(situation).values())
        up, down = (threshold / self.knob for threshold in THRESHOLDS[self.mode])
        reason = f"use of {min(shares):.2f} to {max(shares):.2f} against {up:.2f} and {down:.2f}"
        if max(shares) > up:
            return 1, reason
        return (-1 if max(shares) < down else 0), reason

    def _by_latency(self, situation: Situation) -> tuple[int, str]:
        ttft, tpot = _estimates(situation)
        if any(math.isnan(one) for one in ttft + tpot):
            return 0, f"fewer than {SAMPLES_MIN} samples of a worker"
        ttft_s, tpot_s = situation.objective.ttft_s / self.knob, situation.objective.tpot_s / self.knob
        reason = f"first token in {min(ttft):.3g} to {max(ttft):.3g} s, a token in {min(tpot):.3g} to {max(tpot):.3g}"
        if min(ttft) > ttft_s or min(tpot) > tpot_s:
            return 1, reason
        return (-1 if max(ttft) < SLA_DOWN * ttft_s and max(tpot) < SLA_DOWN * tpot_s else 0), reason


def stopped_by(situation: Situation) -> str:
    """Why the loop does not run; empty where it does."""
    serving = len(ready(situation))
    if serving != situation.target or serving != len(situation.replicas):
        return f"scaling in progress: {serving} of {situation.target} workers are ready"
    if situation.target == 0:
        return "no worker"
    reporting = sum(not math.isnan(share) for share in _utilizations(situation).values())
    return f"{reporting} of {serving} workers report" if reporting != serving else ""


def dynamo_load(knob: float) -> DynamoLoad:
    """The default mode."""
    return DynamoLoad(name="dynamo-load", knob=knob)


def dynamo_load_latency(knob: float) -> DynamoLoad:
    """Thresholds for low latency."""
    return DynamoLoad(name="dynamo-load-latency", mode=Mode.LATENCY, knob=knob)


def dynamo_load_sla(knob: float) -> DynamoLoad:
    """Estimates against the objectives."""
    return DynamoLoad(name="dynamo-load-sla", mode=Mode.SLA, knob=knob)


def _utilizations(situation: Situation) -> dict[str, float]:
    usage = means(situation, Signal.KV_CACHE_USAGE, window_s=INTERVAL_S)
    waiting = means(situation, Signal.WAITING, window_s=INTERVAL_S)
    prompt = _prompt(situation)
    kv_tokens = _kv_tokens(situation)
    return {name: usage[name] + waiting[name] * prompt / kv_tokens[name] for name in usage}


def _prompt(situation: Situation) -> float:
    """Tokens of a queued prompt: the mean of late; 0 while no request has finished."""
    found = lengths(situation.demand, window_s=LENGTHS_WINDOW_S)
    return found.prompt if found.known else 0.0


def _kv_tokens(situation: Situation) -> dict[str, float]:
    by_variant = {variant.name: variant.capacity.kv_tokens for variant in situation.variants}
    return {replica.name: by_variant[replica.variant] for replica in situation.replicas}


def _estimates(situation: Situation) -> tuple[list[float], list[float]]:
    """Time to first token and time per token of each worker, at its load of now."""
    waiting = means(situation, Signal.WAITING, window_s=INTERVAL_S)
    usage = means(situation, Signal.KV_CACHE_USAGE, window_s=INTERVAL_S)
    ttft = [_line(situation, name, Signal.WAITING, Signal.TTFT_S, now) for name, now in waiting.items()]
    tpot = [_line(situation, name, Signal.KV_CACHE_USAGE, Signal.TPOT_S, now) for name, now in usage.items()]
    return ttft, tpot


def _line(situation: Situation, name: str, load: Signal, latency: Signal, now: float) -> float:
    """Queued requests stand for their tokens and KV usage for its: a line does not mind the unit."""
    values, row = situation.recent.values, situation.recent.replicas.index(name)
    if load not in values or latency not in values:
        return math.nan
    return estimate(values[load][row], values[latency][row], now=now)
