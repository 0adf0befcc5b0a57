"""Hung, busy, in a long prefill, or idle: what an engine does, judged on several clues at once.

Theory of operation. No single figure tells. Tokens that stand still mean nothing without requests that wait for them,
and the engine's own count of running requests may read 0 when it is wedged: so requests count that the ingress holds
open as well. A long prefill stands still too, but draws power; a wedged GPU shows full utilisation at idle watts, so
utilisation alone proves nothing. A reading that is not new is no standstill: only readings that are new, with counters
that did not move, add to the time of a stall. An engine whose metrics do not answer at all while the agent lives and
requests are held stalls as well. A stall grows from SUSPECT to HUNG, and any progress ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.features import Feature, FeatureStep, Flags, Floats

Codes = npt.NDArray[np.int8]

_MOVING = (Feature.GENERATION_TOKENS, Feature.PROMPT_TOKENS, Feature.ITERATIONS, Feature.ENGINE_FINISHED)


class Progress(IntEnum):
    """What one engine does."""

    UNKNOWN = 0          # nothing was measured
    IDLE = 1             # nobody waits for it
    BUSY = 2             # tokens are made
    LONG_PREFILL = 3     # none yet, but it computes
    SUSPECT = 4          # none, and it does not seem to compute: route around it
    HUNG = 5             # so for long: keep evidence, then restart
    DOWN = 6             # its process failed or stopped


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressLimits:
    """When a standstill becomes a suspicion and a fact."""

    suspect_after_s: float = 10.0
    hung_after_s: float = 20.0
    prefill_max_s: float = 600.0     # computing without a token for longer is a hang that spins
    steps_expected: float = 3.0      # times as long as its longest step may an engine stand still
    active_power: float = 0.35       # share of the power limit above which a GPU computes: wedged ones draw under 0.25
    silent_age_s: float = 15.0       # of gauges: beyond it the engine does not answer


class ProgressWatch:
    """The state of every replica; give it each step in order."""

    def __init__(self, *, series: int, limits: ProgressLimits | None = None) -> None:
        self._limits = limits or ProgressLimits()
        self._stalled_s = np.zeros(series)
        self._serves_s = np.full(series, np.inf)

    @property
    def stalled_s(self) -> Floats:
        """For how long each replica has stood still while somebody waited."""
        return self._stalled_s.copy()

    @property
    def serves_s(self) -> Floats:
        """For how long each engine has served since its process began; infinity where nobody saw that."""
        return self._serves_s.copy()

    def update(self, step: FeatureStep, *, step_s: float, longest_step_s: Floats | None = None) -> Codes:
        """What each replica did in this step; `longest_step_s` is what its fullest step should take, NaN if unknown."""
        limits, count = self._limits, len(step.values)
        reported = ~np.isnan(step.of(Feature.AGE_S))
        silent = reported & _at_least(step.of(Feature.AGE_S), limits.silent_age_s + step_s)
        silent |= reported & np.isnan(step.of(Feature.RUNNING)) & np.isnan(step.of(Feature.GENERATION_TOKENS))
        ready = step.of(Feature.READY) != 0.0
        rates = np.array([step.of(each) for each in _MOVING])
        moving, counted = (rates > 0).any(axis=0), ~np.isnan(rates).all(axis=0)
        moving |= step.of(Feature.FINISHED) > 0.0  # as the ingress counts: also where metrics cannot be read
        held = np.fmax(step.of(Feature.HELD), step.of(Feature.RUNNING) + np.nan_to_num(step.of(Feature.WAITING)))
        works = _at_least(held, 1.0)
        nobody = ~np.isnan(held) & ~works
        stands = reported & works & ready & ~moving & (counted | silent)
        self._grow(count)
        began = reported & ~ready | _at_least(step.of(Feature.RESTARTS), 1.0)
        self._serves_s = np.where(began, 0.0, self._serves_s + step_s)
        span_s = np.where(np.isnan(step.of(Feature.SPAN_S)), step_s, step.of(Feature.SPAN_S))
        ended = reported & (moving | ~ready | (counted & nobody)) | _at_least(step.of(Feature.RESTARTS), 1.0)
        # A gap in the data neither ends a stall nor begins it earlier: nobody knows that anybody waited in it.
        most_s = np.where(self._stalled_s > 0, 2 * step_s, step_s)
        self._stalled_s = np.where(ended, 0.0, self._stalled_s + np.where(stands, np.minimum(span_s, most_s), 0.0))
        codes = np.full(count, Progress.UNKNOWN, dtype=np.int8)
        codes[reported & counted & nobody] = Progress.IDLE
        codes[reported & moving] = Progress.BUSY
        codes[stands] = self._stage(step, longest_step_s)[stands]
        codes[_at_least(step.of(Feature.DOWN), 1.0)] = Progress.DOWN
        return codes

    def forget(self, row: int) -> None:
        """Another replica has this row."""
        if row < len(self._stalled_s):
            self._stalled_s[row], self._serves_s[row] = 0.0, np.inf

    def restore(self, stalled_s: Floats, *, rows: Sequence[int]) -> None:
        """What `stalled_s` was, for rows that had these numbers then; -1 for a new one."""
        self._grow(len(rows))
        for row, before in enumerate(rows):
            if 0 <= before < len(stalled_s):
                self._stalled_s[row] = stalled_s[before]

    def _stage(self, step: FeatureStep, longest_step_s: Floats | None) -> Codes:
        limits = self._limits
        allowed_s = np.zeros(len(step.values)) if longest_step_s is None else np.nan_to_num(longest_step_s)
        extra_s = np.clip(allowed_s * limits.steps_expected - limits.suspect_after_s, 0.0, limits.prefill_max_s)
        power = step.of(Feature.GPU_POWER)
        computes = _at_least(power, limits.active_power) & (self._stalled_s < limits.prefill_max_s)
        suspect = self._stalled_s >= limits.suspect_after_s + extra_s
        hung = self._stalled_s >= limits.hung_after_s + extra_s
        return np.select(
            [computes & suspect, computes, hung, suspect],
            [Progress.LONG_PREFILL, Progress.BUSY, Progress.HUNG, Progress.SUSPECT],
            Progress.BUSY,
        ).astype(np.int8)

    def _grow(self, count: int) -> None:
        more = max(0, count - len(self._stalled_s))
        self._stalled_s = np.pad(self._stalled_s, (0, more))[:count]
        self._serves_s = np.pad(self._serves_s, (0, more), constant_values=np.inf)[:count]


def _at_least(values: Floats, bound: float) -> Flags:
    with np.errstate(invalid="ignore"):
        return np.asarray(values >= bound)
