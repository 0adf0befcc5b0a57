"""What every detector holds to, whatever it is made of: learn, score steps in order, blame, be saved as arrays.

Steps are rows of features, NaN where nothing was measured, and have a number that grows by one a step of time: those
who know a time of day read it from there, so that a gap or a restart does not shift their day. One fitted detector
scores any number of series; each has its own past. The same suite of tests holds all of them to this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Marks = npt.NDArray[np.int8]
Indices = npt.NDArray[np.intp]

FALSE_ALARM, UNKNOWN, TRUE_ALARM = 0, -1, 1  # what a mark says of a step

BLOCKS = 20              # into which a history is cut: every second one is held out
LEARNT_MAX = 4000        # steps that are learnt, evenly spaced: more take time and change little
HELD_MAX = 4000          # steps that are held out, in runs, since what lingers is judged as well
CROSSED_MAX = 2000       # steps of a history so short that each half is held out once


class NotFitted(RuntimeError):
    """A detector was asked before it had learnt."""


class Detector(Protocol):
    """Scores are larger the stranger a step is; NaN where nothing of a series was ever measured."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    @property
    def held_out(self) -> Floats:
        """One score a step of the history, from a model that had not learnt the step; NaN where there was none.

        Thresholds are fitted on these: a detector is less surprised by what it has learnt.
        """
        ...

    def fit(self, history: Floats, mask: Flags | None = None, *, first: int = 0) -> None:
        """Learn from the steps of one series, most of them normal; `first` is the number of the first.

        What `mask` does not hold true, and what is not finite, was not measured. Raises ValueError if too little was.
        """
        ...

    def score(self, values: Floats, *, first: int = 0) -> Floats:
        """One score a step of one series, as `update` would give them from a fresh start; nothing changes."""
        ...

    def update(self, values: Floats, *, step: int = 0) -> Floats:
        """One score for each series at their next step, series by features; the first call says how many there are."""
        ...

    def contributions(self) -> Floats:
        """How much each feature added to the scores of the last `update`: series by features, rows sum to 1 or 0."""
        ...

    def save(self) -> dict[str, Floats]:
        """Everything that it knows, as arrays."""
        ...

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> Self:
        """What `save` returned, as it was."""
        ...


class Teachable(Detector, Protocol):
    """A detector that people can tell what its alarms were."""

    def learn(self, values: Floats, marks: Marks, *, first: int = 0) -> None:
        """Take in steps of one series with a mark each: FALSE_ALARM, TRUE_ALARM, or UNKNOWN; from where it stands."""
        ...


def measured(values: Floats, mask: Flags | None = None) -> Floats:
    """A copy in which all that was not measured is NaN."""
    known = np.isfinite(values) if mask is None else np.isfinite(values) & mask
    return np.where(known, values, np.nan)


def check_features(values: Floats, features: int) -> None:
    """Raises NotFitted or ValueError for steps that do not have the learnt features."""
    if features == 0:
        raise NotFitted("fit the detector first")
    if values.ndim != 2 or values.shape[1] != features:
        raise ValueError(f"values: {features} features were learnt, the shape {values.shape} has others")


def check_history(known_steps: int, least: int) -> None:
    """Raises ValueError for a history of which nothing can be learnt and judged."""
    if known_steps < least:
        raise ValueError(f"history: at least {least} steps are needed, not {known_steps}")


def splits(steps: int) -> list[tuple[Indices, Indices]]:
    """Which steps to learn and which to hold out of it, once or, of a short history, twice the other way round."""
    every = np.arange(steps)
    odd = (every * BLOCKS // max(1, steps)) % 2 == 1
    if steps <= CROSSED_MAX:
        return [(every[~odd], every[odd]), (every[odd], every[~odd])]
    run = max(1, 2 * HELD_MAX // BLOCKS)
    held = [block[-run:] for block in np.array_split(every, BLOCKS)[1::2]]
    return [(thinned(every[~odd], LEARNT_MAX), np.concatenate(held))]


def thinned(rows: npt.NDArray[Any], most: int) -> npt.NDArray[Any]:
    """At most so many rows, evenly spaced."""
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).round().astype(np.intp)]


def shares_of(amounts: Floats) -> Floats:
    """Amounts as shares of their row; a row of nothing stays 0."""
    sums = amounts.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(amounts, sums, out=np.zeros_like(amounts), where=sums > 0))


def nested(parts: Mapping[str, Mapping[str, Floats]]) -> dict[str, Floats]:
    """What several parts saved, under the name of each."""
    return {f"{part}/{key}": value for part, arrays in parts.items() for key, value in arrays.items()}


def part_of(saved: Mapping[str, Floats], name: str) -> dict[str, Floats]:
    """What one part had saved."""
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
