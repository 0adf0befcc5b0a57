"""Bounded windows of figures, aligned to a step; and frames as the coordinator keeps them.

Theory of operation. Time is cut into steps of `step_s`; step n covers [n * step_s, (n+1) * step_s) and a frame belongs
to the step that its end falls into. A `Ring` holds the newest `slots` steps of one object, one row a step and one
column a feature, NaN where nothing was measured. Gauges replace what the step held, increments add to it, so that two
frames in one step lose nothing, and a gap stays a gap. Counters come in as they are, cumulative since the engine's
start, and are kept as increments: `Counters` knows the last value and that a new instance starts from zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Figures = NDArray[np.float32]

# Columns of a replica's row. Gauges first, then increments of the engine's counters, then what ingresses counted.
REPLICA_GAUGES = ("running", "waiting", "kv_cache_usage", "resident_memory_bytes", "held")
REPLICA_COUNTERS = (
    "prompt_tokens",
    "generation_tokens",
    "preemptions",
    "iterations",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "engine_finished",
)
REQUEST_COUNTS = ("arrived", "finished", "failed", "cut", "refused", "cancelled")
REQUEST_SKETCHES = ("ttft_s", "tpot_s", "queue_s", "e2e_s")
DEMAND_FEATURES = ("arrived", "finished", "prompt_tokens", "output_tokens")  # of a deployment, at all ingresses
REPLICA_FEATURES = REPLICA_GAUGES + REPLICA_COUNTERS + REQUEST_COUNTS
GPU_FEATURES = (
    "utilization",
    "memory_utilization",
    "memory_used_bytes",
    "memory_total_bytes",
    "power_w",
    "power_limit_w",
    "temperature_c",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "throttle_reasons",
    "ecc_errors",
)
COLUMN = {name: index for index, name in enumerate(REPLICA_FEATURES)}
FIRST_COUNTER = len(REPLICA_GAUGES)
FIRST_REQUEST_COUNT = FIRST_COUNTER + len(REPLICA_COUNTERS)
GPU_FIRST_COUNTER = len(GPU_FEATURES) - 1

MINUTE_S = 60.0
STEPS_S = (1.0, 2.0, 3.0, 5.0, 6.0, 10.0, 12.0, 15.0, 20.0, 30.0, 60.0)  # each divides a minute
STEP_WANTED_S = 15.0            # under a fast model clock: four steps make a minute that gaps rarely empty
FRAME_INTERVAL_S_MIN = 0.2      # real time; more frames cost more than they tell


# The next three are made some sixty times a frame: a named tuple costs a third of a frozen dataclass.


class ObjectFigures(NamedTuple):
    """One GPU or replica in one frame, by the columns above; NaN where it was not measured.

    Counters are cumulative here. `source` is the message that it was read from, kept as the newest.
    """

    name: str
    row: list[float]
    instance: str = ""
    source: object = None


class SketchCounts(NamedTuple):
    """A quantile sketch as it came: bucket `offset + i` holds (gamma^(b-1), gamma^b]."""

    relative_accuracy: float
    offset: int
    counts: list[int]
    zero_count: int
    sum: float
    min: float
    max: float


class RequestFigures(NamedTuple):
    """What one ingress saw of one class of requests on one replica in one interval."""

    deployment: str
    replica: str
    serving_class: str
    counts: tuple[int, ...]      # in the order of REQUEST_COUNTS
    prompt_tokens: int
    output_tokens: int
    held: int
    sketches: tuple[SketchCounts | None, ...]  # in the order of REQUEST_SKETCHES
    lengths: tuple[tuple[int, int], ...] = ()  # tokens of some requests: prompt, answer


class LengthFigures(NamedTuple):
    """How long the answer to one prompt became; the prompt is a vector of signed bytes."""

    deployment: str
    method: int
    vector: bytes
    tokens: int
    stopped: bool


@dataclass(frozen=True, slots=True)
class NodeFrame:
    """One telemetry interval of one node, decoded; times in model seconds. `rejected` counts by reason."""

    node: str
    boot: str
    sequence: int
    start_s: float
    end_s: float
    gpus: Sequence[ObjectFigures]
    replicas: Sequence[ObjectFigures]
    requests: Sequence[RequestFigures]
    dropped_samples: int = 0
    lengths: Sequence[LengthFigures] = ()
    rejected: dict[str, int] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """What decisions cite it by: node/boot/sequence."""
        return f"{self.node}/{self.boot}/{self.sequence}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How model time is cut into steps, and how often frames are wanted for that (real time)."""

    step_s: float
    frame_interval_s: float


def pace(*, time_scale: float, frame_interval_s: float) -> Pace:
    """One step a frame at natural speed; under a fast model clock, frames dense enough to fill a minute."""
    wanted_s = frame_interval_s * time_scale
    if wanted_s > STEP_WANTED_S:
        wanted_s = max(STEP_WANTED_S, FRAME_INTERVAL_S_MIN * time_scale)
    step_s = next((step for step in STEPS_S if step >= wanted_s), STEPS_S[-1])
    return Pace(step_s=step_s, frame_interval_s=max(FRAME_INTERVAL_S_MIN, min(frame_interval_s, step_s / time_scale)))


class Ring:
    """The newest `slots` steps of one object."""

    __slots__ = ("_first_counter", "_newest", "_slots", "_steps", "_values")

    def __init__(self, *, slots: int, features: int, first_counter: int) -> None:
        self._values: Figures = np.full((slots, features), np.nan, dtype=np.float32)
        self._steps = np.full(slots, -1, dtype=np.int64)  # which step each slot holds
        self._slots = slots
        self._first_counter = first_counter
        self._newest = -1

    @property
    def newest(self) -> int:
        """The newest step that holds anything; -1 for none."""
        return self._newest

    def put(self, step: int, row: Sequence[float]) -> None:
        """Write a row: gauges replace where they were measured, increments add up. Older than the window: ignored."""
        slot = step % self._slots
        if self._steps[slot] != step:
            if self._open(step, slot):
                self._values[slot] = row
            return
        old, first = self._values[slot], self._first_counter
        new = np.asarray(row, dtype=np.float32)
        merged = np.where(np.isnan(new), old, new)
        both = ~np.isnan(new[first:]) & ~np.isnan(old[first:])
        merged[first:][both] = new[first:][both] + old[first:][both]
        self._values[slot] = merged

    def add(self, step: int, column: int, increments: Sequence[float]) -> None:
        """Add increments to neighbouring columns from `column` on; a column without a figure starts from zero."""
        slot = step % self._slots
        if self._steps[slot] != step:
            if not self._open(step, slot):
                return
            self._values[slot] = np.nan
        # Six figures: plain floats are quicker than arrays of them.
        known = self._values[slot, column : column + len(increments)].tolist()
        self._values[slot, column : column + len(increments)] = [
            new if math.isnan(old) else old + new for old, new in zip(known, increments, strict=True)
        ]

    def spread(self, first: int, last: int, column: int, increments: Sequence[float]) -> None:
        """Add the same increments to each of these steps, as `add` does to one."""
        if first == last:
            self.add(last, column, increments)
            return
        steps = np.arange(max(first, max(last, self._newest) - self._slots + 1), last + 1)
        slots = steps % self._slots
        fresh = self._steps[slots] != steps
        self._steps[slots[fresh]] = steps[fresh]
        self._values[slots[fresh]] = np.nan
        self._newest = max(self._newest, last)
        columns = slice(column, column + len(increments))
        known, new = self._values[slots, columns], np.asarray(increments, dtype=np.float32)
        self._values[slots, columns] = np.where(np.isnan(known), new, known + new)

    def window(self, first: int, last: int) -> Figures:
        """The rows of the steps `first` to `last`, both included; NaN where the ring does not reach."""
        wanted = np.arange(first, last + 1)
        slots = wanted % self._slots
        rows: Figures = self._values[slots]
        rows[self._steps[slots] != wanted] = np.nan
        return rows

    def _open(self, step: int, slot: int) -> bool:
        """Give the slot to `step`; False if the window is past it."""
        if step <= self._newest - self._slots:
            return False
        self._steps[slot] = step
        self._newest = max(self._newest, step)
        return True


class Counters:
    """Turns counters that grow since an engine's start into increments; a reset is never a negative one."""

    __slots__ = ("_instance", "_last")

    def __init__(self) -> None:
        self._instance: str | None = None
        self._last: list[float] = []

    def increments(self, instance: str, values: Sequence[float]) -> list[float]:
        """What was added since the last call; NaN where either figure is missing or nothing is known before."""
        last, known = self._last, self._instance
        self._last = list(values)
        self._instance = instance
        if known is None:
            return [math.nan] * len(values)
        if known != instance:  # a new engine: all that it has counted is new
            return list(values)
        increments = [
            new - old if not new < old else new  # less than before under one name: it was reset unseen
            for new, old in zip(values, last, strict=True)
        ]
        # A missing figure must not be forgotten as a base: the next one counts from the last that was known.
        self._last = [
            old if math.isnan(new) else new for new, old in zip(values, last, strict=True)
        ]
        return increments


def waiting_at(rows: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """By REPLICA_FEATURES in the last axis, what waits for each replica: in its engine, or in its ingress."""
    running, waiting, held = (rows[..., COLUMN[name]] for name in ("running", "waiting", "held"))
    # What the ingress holds beyond what the engine has is waiting in the ingress.
    found: NDArray[np.float64] = np.where(np.isnan(held), waiting, np.fmax(waiting, held - running))
    return found


def minutes(rows: Figures, *, per_minute: int, first_counter: int) -> NDArray[np.float64]:
    """Rows of steps folded to minutes: the mean of gauges, the sum of increments; NaN where nothing was measured."""
    steps, features = rows.shape
    assert steps % per_minute == 0, (steps, per_minute)
    cut = rows.astype(np.float64).reshape(steps // per_minute, per_minute, features)
    known = ~np.isnan(cut)
    count = known.sum(axis=1)
    total: NDArray[np.float64] = np.where(known, cut, 0.0).sum(axis=1)
    total[:, :first_counter] /= np.maximum(count[:, :first_counter], 1)
    total[count == 0] = np.nan
    return total
