"""Small situations for tests of scaling policies: one or two variants, replicas r0, r1, ... and what each measures.

A measure is a number (held over the whole window), None (nothing was measured), or a row of (seconds, value) from the
oldest to the newest, before which there is nothing. One measure for all replicas, or a list with one for each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from enova_recommender.scaling.bounds import Bounds
from enova_recommender.scaling.situation import (
    Capacity,
    Demand,
    Floats,
    Objective,
    Phase,
    Recent,
    ReplicaSight,
    Signal,
    Situation,
    StartUp,
    VariantSight,
)
from enova_recommender.scaling.types import Observation
from enova_recommender.types import Interval, VerdictKind

WINDOW_S = 600
STEP_S = 1.0

Measure = float | tuple[tuple[float, float | None], ...] | None


def row(measure: Measure, *, steps: int = WINDOW_S, step_s: float = STEP_S) -> Floats:
    """One measure as an array that ends now."""
    if measure is None:
        return np.full(steps, math.nan)
    if not isinstance(measure, tuple):
        return np.full(steps, float(measure))
    values = np.full(steps, math.nan)
    end = steps
    for seconds, value in reversed(measure):
        begin = max(end - round(seconds / step_s), 0)
        values[begin:end] = math.nan if value is None else value
        end = begin
    return values


def capacity(
    rps: float = 10.0, *, prefill: float = 20_000.0, decode: float = 4_000.0, kv_tokens: float = 100_000.0,
    max_num_seqs: int = 100,
) -> Capacity:
    """What a replica carries."""
    interval = Interval(value=rps, low=0.9 * rps, high=1.1 * rps)
    return Capacity(
        requests_per_s=interval, prefill_tokens_per_s=prefill, decode_tokens_per_s=decode, kv_tokens=kv_tokens,
        max_num_seqs=max_num_seqs,
    )


def variant(
    name: str = "v", *, target: int = 1, carries: Capacity | None = None, usd: float = 2.0, places: int = 100,
    start_s: float = 120.0,
) -> VariantSight:
    """One configuration on one GPU type."""
    return VariantSight(
        name=name, target=target, gpu_type="H100", gpus=1, usd_per_hour=usd, capacity=carries or capacity(),
        start_up=StartUp(p50_s=start_s, p90_s=1.5 * start_s, count=10), places=places,
    )


def replicas(
    ready: int, *, starting: int = 0, pending: int = 0, since_s: float = 0.0, variant_name: str = "v", first: int = 0
) -> tuple[ReplicaSight, ...]:
    """Replicas of one variant, the ready ones first."""
    phases = [Phase.READY] * ready + [Phase.STARTING] * starting + [Phase.PENDING] * pending
    return tuple(
        ReplicaSight(name=f"r{first + index}", variant=variant_name, phase=phase, since_s=since_s)
        for index, phase in enumerate(phases)
    )


def asked(
    rate: Measure = 0.0, *, end_s: float, prompt: float = 500.0, output: float = 100.0, finished: Measure = None,
    steps: int = WINDOW_S, step_s: float = STEP_S,
) -> Demand:
    """What clients sent: `rate` requests a second, those that finished (by default as many) of these lengths."""
    arrived = row(rate, steps=steps, step_s=step_s) * step_s
    ended = arrived if finished is None else row(finished, steps=steps, step_s=step_s) * step_s
    return Demand(
        end_s=end_s, step_s=step_s, arrived=arrived, finished=ended, prompt_tokens=ended * prompt,
        output_tokens=ended * output,
    )


def situation(
    *,
    now_s: float = 10_000.0,
    target: int | None = None,
    sights: Sequence[ReplicaSight] | None = None,
    ready: int = 1,
    starting: int = 0,
    pending: int = 0,
    measures: Mapping[Signal, Measure | list[Measure]] | None = None,
    bounds: tuple[int, int] = (1, 100),
    variants: Sequence[VariantSight] | None = None,
    carries: Capacity | None = None,
    demand: Demand | None = None,
    history: Demand | None = None,
    minutes: Observation | None = None,
    objective: tuple[float, float] = (1.0, 0.05),
    held: int = 0,
    delay_s: float = 0.0,
    fleet_lost_share: float = 0.0,
    last_act_s: float = float("-inf"),
    conservatism: float = 1.0,
    verdict: VerdictKind = VerdictKind.NORMAL,
) -> Situation:
    """One deployment as it is seen at `now_s`; telemetry ends `delay_s` earlier."""
    shown = tuple(sights) if sights is not None else replicas(ready, starting=starting, pending=pending)
    rows = [one.name for one in shown if one.phase is Phase.READY]
    end_s = now_s - delay_s
    values = {
        signal: np.array([row(one) for one in (measure if isinstance(measure, list) else [measure] * len(rows))])
        for signal, measure in (measures or {}).items()
    }
    return Situation(
        now_s=now_s,
        deployment="chat",
        bounds=Bounds(min_replicas=bounds[0], max_replicas=bounds[1]),
        objective=Objective(ttft_s=objective[0], tpot_s=objective[1]),
        variants=tuple(variants) if variants is not None else (
            variant(target=len(shown) if target is None else target, carries=carries),
        ),
        replicas=shown,
        recent=Recent(end_s=end_s, step_s=STEP_S, replicas=tuple(rows), values=values),
        demand=demand or asked(end_s=end_s),
        history=history or asked(None, end_s=end_s, steps=0, step_s=60.0),
        minutes=minutes,
        held=held,
        last_act_s=last_act_s,
        conservatism=conservatism,
        fleet_lost_share=fleet_lost_share,
        verdict=verdict,
    )
