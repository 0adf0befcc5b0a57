"""What steps take, as the replicas of each variant show it: learnt from their quiet time, beside what a model says.

Theory of operation. A model of step times knows how they grow with the load, but not how far it is off; quiet steps
know that, but only for the loads that they had. So a step is fitted as a share of what the model says plus parts for
the batch, none of them negative, and a ridge draws the fit to the model alone: what the samples do not tell, the model
does. Loads beyond those that were seen are judged with doubt, and with more of it without a model. One replica of each
variant is sampled a step, by turns, so that a slow one cannot outvote its siblings, and far samples weigh little. The
sampled replicas' smoothed residuals are kept as well: how high they go by chance is the threshold of slowness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from enova_recommender.detection.extremes import Tail, fit_tail
from enova_recommender.detection.features import Flags, Floats
from enova_recommender.detection.groups import Groups
from enova_recommender.detection.residual import MAD_UNIT, SPREAD_MIN, StepBatches, design

SAMPLES = 360              # of a variant that are kept
SAMPLES_MIN = 24           # before the first fit
RARE_EVERY = 4             # steps to a sample once all room is taken
REFIT_EVERY = 60           # samples to a new fit
FITS_MAX = 64              # a step
RIDGE = 0.01               # of the samples' weight
ROUNDS = 3                 # of the robust fit
TAIL_QUANTILE = 0.9        # residuals above it are peaks
PEAKS_MIN = 20             # fewer say nothing
RATE = 1e-5                # of quiet steps that may exceed the threshold: one in six replica-days
_BATCH = 5                 # parts of a batch: 1, prompt tokens, pairs, sequences, context
_GIVEN, _OBSERVED, _RESIDUAL = _BATCH, _BATCH + 1, _BATCH + 2
_TOKENS, _SEQUENCES = 1, 3
DOUBT_MODELLED, DOUBT_ALONE = 0.1, 0.25  # of the log ratio, for each doubling of load beyond what was seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """What is expected of each replica; `doubt` is by how much, as a log ratio, it may be off at this load."""

    expected_s: Floats
    is_learnt: Flags
    doubt: Floats
    level: Floats              # log ratio that quiet steps exceed at RATE; NaN while unknown


class VariantTimes:
    """The samples and the fit of every variant."""

    def __init__(self) -> None:
        self._slot: dict[str, int] = {}
        self._samples: npt.NDArray[np.float32] = np.full((0, SAMPLES, _RESIDUAL + 1), np.nan, dtype=np.float32)
        self._count = np.zeros(0, dtype=np.int64)
        self._due = np.zeros(0, dtype=np.int64)
        self._fit: Floats = np.full((0, _GIVEN + 1), np.nan)
        self._most: Floats = np.full((0, 2), np.nan)
        self._tails: list[Tail | None] = []
        self._level: Floats = np.full(0, np.nan)

    def place(self, variants: tuple[str, ...]) -> None:
        """Say which variants there are; what was learnt of others is forgotten."""
        for gone in self._slot.keys() - set(variants):
            self._clear(self._slot.pop(gone))
        free = sorted(set(range(len(self._count))) - set(self._slot.values()), reverse=True)
        missing = [name for name in variants if name not in self._slot]
        if len(missing) > len(free):
            before = len(self._count)
            self._grow(max(len(missing) - len(free), before))
            free = [*range(len(self._count) - 1, before - 1, -1), *free]
        for name in missing:
            self._slot[name] = free.pop()

    def expected(self, batches: StepBatches, given_s: Floats, groups: Groups) -> Learnt:
        """What is known of the steps of each replica; `given_s` is what a model says, NaN without one."""
        slots = self._slots(groups)
        parts = design(batches)
        fit = np.where((slots >= 0)[:, None], self._fit[np.maximum(slots, 0)], np.nan) if len(self._fit) else (
            np.full((len(slots), _GIVEN + 1), np.nan)
        )
        most = np.where((slots >= 0)[:, None], self._most[np.maximum(slots, 0)], np.nan) if len(self._most) else (
            np.full((len(slots), 2), np.nan)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = (fit[:, :_BATCH].T * parts).sum(axis=0) + fit[:, _GIVEN] * np.nan_to_num(given_s)
            over = np.fmax(parts[_TOKENS] / most[:, 0], parts[_SEQUENCES] / most[:, 1])
            beyond = np.log2(np.maximum(np.nan_to_num(over), 1.0))
            modelled = np.isfinite(given_s) == (fit[:, _GIVEN] > 0)
            sound = np.isfinite(expected) & (expected > 0) & modelled
            doubt = beyond * np.where(np.isfinite(given_s), DOUBT_MODELLED, DOUBT_ALONE)
        level = np.where(slots >= 0, self._level[np.maximum(slots, 0)], np.nan) if len(self._level) else (
            np.full(len(slots), np.nan)
        )
        return Learnt(
            expected_s=np.where(sound, expected, given_s), is_learnt=sound, doubt=np.where(sound, doubt, 0.0),
            level=level,
        )  # fmt: skip

    def tail(self, variant: str) -> Tail | None:
        """How the residuals of a variant's quiet steps are distributed."""
        slot = self._slot.get(variant)
        return None if slot is None else self._tails[slot]

    def learn(
        self, batches: StepBatches, given_s: Floats, residuals: Floats, groups: Groups, *, quiet: Flags, number: int
    ) -> None:
        """Take one quiet replica of each variant as a sample, and fit the variants that are due."""
        rows = groups.turn(number)
        rows = rows[quiet[rows] & np.isfinite(batches.observed_s[rows])]
        slots = self._slots(groups)[rows]
        seldom = (self._count[slots] >= SAMPLES) & (number % RARE_EVERY != 0)
        rows, slots = rows[~seldom], slots[~seldom]
        table = np.vstack((design(batches), given_s, batches.observed_s, residuals))[:, rows].T
        self._samples[slots, self._count[slots] % SAMPLES] = table
        self._count[slots] += 1
        due = np.flatnonzero(self._count >= self._due)
        for slot in due[np.argsort(self._due[due] - self._count[due])][:FITS_MAX].tolist():
            self._refit(slot)
            # At first the samples double between fits.
            self._due[slot] = self._count[slot] + min(REFIT_EVERY, self._count[slot])

    def save(self) -> dict[str, npt.NDArray[np.float64] | npt.NDArray[np.str_]]:
        """What was fitted, without the samples."""
        names = [name for name, slot in self._slot.items() if np.isfinite(self._fit[slot]).any()]
        slots = [self._slot[name] for name in names]
        return {
            "variants": np.array(names, dtype=str), "fit": self._fit[slots], "most": self._most[slots],
            "level": self._level[slots],
        }  # fmt: skip

    def restore(self, saved: Mapping[str, npt.NDArray[np.float64] | npt.NDArray[np.str_]]) -> None:
        """What `save` returned, for the variants that are placed."""
        for index, name in enumerate(saved["variants"].tolist()):
            slot = self._slot.get(name)
            if slot is not None:
                self._fit[slot] = saved["fit"][index]
                self._most[slot] = saved["most"][index]
                self._level[slot] = saved["level"][index]

    def _refit(self, slot: int) -> None:
        kept = self._samples[slot, : min(int(self._count[slot]), SAMPLES)].astype(np.float64)
        sound = np.isfinite(kept[:, : _BATCH]).all(axis=1) & (kept[:, _OBSERVED] > 0)
        modelled = np.isfinite(kept[sound, _GIVEN])
        if sound.sum() < SAMPLES_MIN or 0 < modelled.sum() < SAMPLES_MIN:
            return
        kept = kept[sound][modelled] if modelled.any() else kept[sound]
        self._fit[slot] = _fitted(kept, is_modelled=bool(modelled.any()))
        self._most[slot] = np.quantile(kept[:, [_TOKENS, _SEQUENCES]], 0.98, axis=0)
        residuals = kept[np.isfinite(kept[:, _RESIDUAL]), _RESIDUAL]
        if residuals.size * (1.0 - TAIL_QUANTILE) >= PEAKS_MIN:
            self._tails[slot] = tail = fit_tail(residuals, level_quantile=TAIL_QUANTILE)
            self._level[slot] = tail.quantile(RATE)

    def _slots(self, groups: Groups) -> npt.NDArray[np.int64]:
        known = np.array([self._slot.get(name, -1) for name in groups.names], dtype=np.int64)
        return np.where(groups.index >= 0, known[np.maximum(groups.index, 0)], -1) if len(known) else (
            np.full(len(groups.index), -1, dtype=np.int64)
        )

    def _clear(self, slot: int) -> None:
        self._samples[slot] = np.nan
        self._count[slot] = 0
        self._due[slot] = SAMPLES_MIN
        self._fit[slot] = self._most[slot] = np.nan
        self._tails[slot], self._level[slot] = None, np.nan

    def _grow(self, more: int) -> None:
        wider = ((0, more), (0, 0))
        self._samples = np.concatenate((self._samples, np.full((more, *self._samples.shape[1:]), np.nan, np.float32)))
        self._count = np.pad(self._count, (0, more))
        self._due = np.pad(self._due, (0, more), constant_values=SAMPLES_MIN)
        self._fit = np.pad(self._fit, wider, constant_values=np.nan)
        self._most = np.pad(self._most, wider, constant_values=np.nan)
        self._level = np.pad(self._level, (0, more), constant_values=np.nan)
        self._tails += [None] * more


def _fitted(kept: Floats, *, is_modelled: bool) -> Floats:
    """Coefficients of the batch's parts and of the model's own figure."""
    table = kept[:, : _GIVEN + 1].copy()
    observed = kept[:, _OBSERVED]
    if not is_modelled:
        table[:, _GIVEN] = 0.0
    shares = table / observed[:, None]
    # Each column in units of its usual share of a step; the model's, of the factor that it is off by.
    units = np.maximum(np.abs(shares).mean(axis=0), 1e-12)
    units[_GIVEN] = max(float(np.median(shares[:, _GIVEN])), 1e-12)
    shares = np.where(units > 1e-12, shares / units, 0.0)
    pull = np.zeros(shares.shape[1])
    pull[_GIVEN] = float(is_modelled)
    strength = math.sqrt(RIDGE * len(shares)) if is_modelled else 1e-6
    ridge = strength * np.eye(shares.shape[1])
    weights = np.ones(len(shares))
    found = pull
    for _ in range(ROUNDS):
        system = np.vstack((shares * weights[:, None], ridge))
        found = nnls(system, np.concatenate((weights, strength * pull)))[0]
        error = np.abs(shares @ found - 1.0)
        spread = max(SPREAD_MIN, MAD_UNIT * float(np.median(error)))
        weights = np.minimum(1.0, 1.5 * spread / np.maximum(error, 1e-9))
    return np.where(units > 1e-12, found / units, 0.0)
