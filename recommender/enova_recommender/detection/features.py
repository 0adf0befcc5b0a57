"""The figures that detectors look at: which there are, one step of them, and a bounded window for every replica.

All rates are by second, all shares 0 to 1, NaN is what was not measured. A window is one array, step by replica by
feature, in single precision: 10,000 replicas x 35 features x 720 steps take 1.01 GB,
and less while fewer report.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Figures = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

VALUE_MAX = 1e18         # beyond it a figure is a defect, not a measurement


class Feature(StrEnum):
    """One column of a step."""

    RUNNING = "running"
    WAITING = "waiting"
    HELD = "held"
    KV_USAGE = "kv_cache_usage"
    RESIDENT_BYTES = "resident_memory_bytes"
    ARRIVALS = "arrivals"
    FINISHED = "finished"
    FAILED = "failed"
    REFUSED = "refused"
    PROMPT_TOKENS = "prompt_tokens"
    GENERATION_TOKENS = "generation_tokens"
    ITERATIONS = "iterations"
    PREEMPTIONS = "preemptions"
    PREFIX_HITS = "prefix_cache_hits"
    ENGINE_FINISHED = "engine_finished"
    CUT = "cut_by_length"
    FIRST_TOKENS = "first_tokens"
    DECODE_TOKENS = "decode_tokens"
    STEP_S = "step_s"                  # mean gap between two tokens of a sequence
    TTFT_S = "ttft_s"                  # mean
    TTFT_P95_S = "ttft_p95_s"
    TPOT_P95_S = "tpot_p95_s"
    QUEUE_S = "queue_s"                # mean
    LATE_SHARE = "late_share"          # of requests, that missed the objective of first tokens or of those after
    GPU_UTILIZATION = "gpu_utilization"
    GPU_POWER = "gpu_power_share"      # of the limit
    GPU_CLOCK_MHZ = "gpu_sm_clock_mhz"
    GPU_TEMPERATURE_C = "gpu_temperature_c"
    GPU_MEMORY = "gpu_memory_share"
    GPU_THROTTLED = "gpu_throttled"    # 1: by heat, power brake or hardware
    AGE_S = "age_s"                    # of the newest gauges
    READY = "ready"                    # 1 or 0, as the agent says
    DOWN = "down"                      # 1: failed or stopped
    RESTARTS = "restarts"
    SPAN_S = "span_s"                  # that the rates were counted over


COLUMN: dict[Feature, int] = {feature: index for index, feature in enumerate(Feature)}


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureStep:
    """One step of every replica that is placed: `values` is replica by feature; `known` says what was measured."""

    number: int
    end_s: float
    replicas: tuple[str, ...]
    values: Figures

    @property
    def known(self) -> Flags:
        """The mask that travels along."""
        return ~np.isnan(self.values)

    def of(self, feature: Feature) -> Floats:
        """One column."""
        return self.values[:, COLUMN[feature]].astype(np.float64)

    def of_row(self, replica: str) -> dict[str, float]:
        """What was measured of one replica, by the feature's name."""
        row = self.values[self.replicas.index(replica)]
        return {feature.value: float(row[index]) for feature, index in COLUMN.items() if not np.isnan(row[index])}


class Window:
    """The newest `steps` steps of up to `rows` replicas. A slot is written whole, so what it held before is gone."""

    def __init__(self, *, steps: int, rows: int) -> None:
        self._values: Figures = np.empty((steps, rows, len(COLUMN)), dtype=np.float32)  # untouched, it takes no memory
        self._numbers = np.full(steps, -1, dtype=np.int64)

    @property
    def rows(self) -> int:
        """How many replicas there is room for."""
        return int(self._values.shape[1])

    def put(self, number: int, values: Figures) -> None:
        """Write the newest step; rows beyond those given are missing."""
        slot = number % len(self._numbers)
        self._values[slot, : len(values)] = values
        self._values[slot, len(values) :] = np.nan
        self._numbers[slot] = number

    def forget(self, row: int) -> None:
        """Let another replica have a row."""
        self._values[self._numbers >= 0, row] = np.nan

    def clear(self) -> None:
        """Forget every step: the clock was set back."""
        self._numbers[:] = -1

    def history(self, row: int, *, first: int, last: int) -> Figures:
        """The steps `first` to `last` of one replica, both included; NaN where the window does not reach."""
        wanted = np.arange(first, last + 1)
        slots = wanted % len(self._numbers)
        found: Figures = self._values[slots, row]
        found[self._numbers[slots] != wanted] = np.nan
        return found

    def grown(self, rows: int) -> Window:
        """The same with room for more replicas."""
        larger = Window(steps=len(self._numbers), rows=rows)
        for slot in np.flatnonzero(self._numbers >= 0).tolist():
            larger.put(int(self._numbers[slot]), self._values[slot])
        return larger


def clean(values: Floats) -> Floats:
    """What can be a measurement: finite, not negative, not absurd; NaN else."""
    with np.errstate(invalid="ignore"):
        return np.where((values >= 0) & (values < VALUE_MAX), values, np.nan)
