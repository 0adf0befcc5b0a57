"""What the reimplemented policies read out of a situation: means of windows, concurrency, rates, lengths.

A window ends where the telemetry ends, however late that comes; once it is older than five minutes (Prometheus'
look-back) everything is missing. Missing is NaN here; what a policy makes of it, the policy says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from enova_recommender.scaling.situation import Demand, Floats, Phase, ReplicaSight, Signal, Situation

LOOK_BACK_S = 300.0
ROUNDING = 1e-9        # a ratio that is whole but for its last bits is whole


def whole(value: float) -> int:
    """The next whole number up."""
    return math.ceil(value - ROUNDING)


def ready(situation: Situation) -> tuple[ReplicaSight, ...]:
    """The replicas that answer their probes; a hung one does, a dead one does not."""
    return tuple(one for one in situation.replicas if one.phase is Phase.READY and one.cause != "DEAD")


def unready(situation: Situation) -> int:
    """Replicas that wait for GPUs, start, or are dead."""
    return len(situation.replicas) - len(ready(situation))


def means(situation: Situation, signal: Signal, *, window_s: float) -> dict[str, float]:
    """The mean over the window of each ready replica; NaN where nothing was measured in it."""
    return _folded(situation, signal, window_s, _mean)


def maxima(situation: Situation, signal: Signal, *, window_s: float) -> dict[str, float]:
    """The largest value in the window of each ready replica; NaN where nothing was measured in it."""
    return _folded(situation, signal, window_s, _largest)


def concurrency(situation: Situation, *, window_s: float) -> dict[str, float]:
    """Requests that each ready replica has, waiting ones included; NaN where either is missing."""
    running = means(situation, Signal.RUNNING, window_s=window_s)
    waiting = means(situation, Signal.WAITING, window_s=window_s)
    return {name: value + waiting[name] for name, value in running.items()}


def measured(values: dict[str, float]) -> list[float]:
    """Those that are not missing."""
    return [value for value in values.values() if not math.isnan(value)]


def arrival_rate(demand: Demand, *, window_s: float) -> float:
    """Requests a second over the last steps; 0 where none is known."""
    steps = _steps(window_s, demand.step_s)
    known = demand.arrived[-steps:]
    return float(np.nansum(known)) / (steps * demand.step_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Mean tokens of the requests that finished in a window; NaN where none did."""

    prompt: float = math.nan
    output: float = math.nan

    @property
    def known(self) -> bool:
        """Whether any request finished."""
        return not math.isnan(self.prompt + self.output)


def lengths(demand: Demand, *, window_s: float) -> Lengths:
    """The mean lengths of late."""
    steps = _steps(window_s, demand.step_s)
    finished = float(np.nansum(demand.finished[-steps:]))
    if finished <= 0:
        return Lengths()
    return Lengths(
        prompt=float(np.nansum(demand.prompt_tokens[-steps:])) / finished,
        output=float(np.nansum(demand.output_tokens[-steps:])) / finished,
    )


def _folded(
    situation: Situation, signal: Signal, window_s: float, fold: Callable[[Floats], float]
) -> dict[str, float]:
    recent = situation.recent
    values = recent.values.get(signal)
    found = {one.name: math.nan for one in ready(situation)}
    if values is None or situation.now_s - recent.end_s > LOOK_BACK_S:
        return found
    steps = _steps(window_s, recent.step_s)
    for row, name in enumerate(recent.replicas):
        if name in found:
            window = values[row, -steps:]
            found[name] = fold(window[~np.isnan(window)])
    return found


def _mean(known: Floats) -> float:
    return float(known.mean()) if known.size else math.nan


def _largest(known: Floats) -> float:
    return float(known.max()) if known.size else math.nan


def _steps(window_s: float, step_s: float) -> int:
    return max(1, round(window_s / step_s))
