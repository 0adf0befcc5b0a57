"""Who may learn from whom: each row is predicted without its family, without its GPU too, or after a trial.

Tier A: the row's family is left out of the fit. Tier B: its type of GPU as well, kernel tables included. Tier C: as A,
then corrected by three measured configurations of the same model on the same GPU.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from enova_recommender.catalog.kernels import MeasuredGpu, measured_gpus
from enova_recommender.performance import GROUPS, Constants, Correction, KernelTimes
from enova_recommender.performance.calibration import measured as taught
from enova_recommender.performance.tables import LIKE, distance, sheet_of
from enova_recommender.types import GpuModel
from enova_testing.latency_fit import UNIT, Measured, constants, fitted, measured
from enova_testing.latency_model import Figures, loop_of, predicted
from enova_testing.latency_rows import Load, Row

Floats = npt.NDArray[np.float64]
Family = tuple[int, int, int]

TRIAL = 3                # configurations that tier C has measured
UNKNOWN_SPREAD = 0.5     # where nothing was measured
NORMAL_80 = 1.2815515594457


@dataclass(slots=True)
class Folds:
    """Fits without one family, one GPU, or both; step times are made once for each."""

    rows: Sequence[Row]      # closed loops of vLLM: what is learnt from
    _times: dict[tuple[object, ...], KernelTimes] = field(default_factory=dict)
    _fits: dict[tuple[object, ...], Constants] = field(default_factory=dict)
    _data: dict[str, Measured] = field(default_factory=dict)
    _figures: dict[tuple[Row, bool], Figures] = field(default_factory=dict)
    _spreads: dict[tuple[object, ...], float] = field(default_factory=dict)

    def times(
        self, row: Row, made: Constants = UNIT, *, without: GpuModel | None = None, correction: Correction | None = None
    ) -> KernelTimes:
        """Step times of a row's server."""
        key = (row.shape, row.gpu, row.parallelism, row.precision, made, without, correction)
        if key not in self._times:
            self._times[key] = KernelTimes(
                row.shape, row.gpu, parallelism=row.parallelism, precision=row.precision, constants=made,
                measured=tables_without(without), correction=correction or Correction(),
            )  # fmt: skip
        return self._times[key]

    def fit(self, *families: Family, gpu: GpuModel | None = None) -> Constants:
        """Constants from all rows but those of these families, and of this GPU."""
        key = (*sorted(families), gpu)
        if key not in self._fits:
            if "all" not in self._data:
                self._data["all"] = measured(self.rows, [self.times(row) for row in self.rows])
            keep = np.array([row.family not in families and not alike(row.gpu, gpu) for row in self.rows])
            if not keep.any():
                self._fits[key] = UNIT
                return UNIT
            kept = [row for row, is_kept in zip(self.rows, keep, strict=True) if is_kept]
            names = [(row.family, row.gpu.name, row.precision.quantization or "") for row in kept]
            numbers = {name: index for index, name in enumerate(sorted(set(names)))}
            groups = np.array([numbers[name] for name in names], dtype=np.intp)
            self._fits[key] = constants(fitted(self._data["all"].only(keep), groups))
        return self._fits[key]

    def figures(self, row: Row, *, gpu_too: bool = False) -> Figures:
        """What tier A (or B, without the GPU) predicts of a row."""
        if (row, gpu_too) not in self._figures:
            without = row.gpu if gpu_too else None
            made = self.fit(row.family, gpu=without)
            self._figures[row, gpu_too] = predicted(row, self.times(row, made, without=without), made)
        return self._figures[row, gpu_too]

    def spread(self, row: Row, *, gpu_too: bool = False) -> float:
        """Spread of errors of other families, each predicted without itself; without the GPU those on all others."""
        key = (row.family, None if gpu_too else row.gpu, gpu_too)
        if key not in self._spreads:
            errors = [(one, self.error(one, gpu_too=gpu_too)) for one in self.rows if one.family != row.family]
            self._spreads[key] = pooled_spread(errors, None if gpu_too else row.gpu) if errors else UNKNOWN_SPREAD
        return self._spreads[key]

    def error(self, row: Row, *, gpu_too: bool = False) -> float:
        """Logarithm of the error of a row's TPOT."""
        return math.log(self.figures(row, gpu_too=gpu_too).tpot_s / (row.tpot_s or math.nan))


def pooled_spread(errors: Sequence[tuple[Row, float]], gpu: GpuModel | None) -> float:
    """The spread of errors on a type of GPU, with those on other types as far as few families were seen on it.

    None: a type on which none was seen.

    Each of the k families on the type weighs as one, whatever its rows; all others, each again as one, together weigh
    as 1 / k^2 families: as much as what was seen here where that is one family, next to nothing where it is many.
    """
    groups: dict[tuple[Family, str], list[float]] = defaultdict(list)
    here: set[tuple[Family, str]] = set()
    for row, error in errors:
        name = (row.family, row.gpu.name)
        groups[name].append(abs(error))
        if alike(row.gpu, gpu):
            here.add(name)
    elsewhere = 1 / (max(len(here), 1) ** 2 * max(len(groups) - len(here), 1))
    values = np.concatenate([np.sort(found) for found in groups.values()])
    weights = np.concatenate([
        np.full(len(found), (1.0 if name in here else elsewhere) / len(found)) for name, found in groups.items()
    ])  # fmt: skip
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][np.searchsorted(reached, 0.8)] / NORMAL_80)


def alike(gpu: GpuModel, other: GpuModel | None) -> bool:
    """Whether two GPUs count as one type."""
    return other is not None and distance(sheet_of(gpu), sheet_of(other)) < LIKE


def tables_without(gpu: GpuModel | None) -> tuple[MeasuredGpu, ...]:
    """The shipped tables but those of this type of GPU."""
    if gpu is None:
        return measured_gpus()
    return tuple(one for one in measured_gpus() if distance(one.sheet, sheet_of(gpu)) >= LIKE)


def is_tabled(row: Row) -> bool:
    """Whether the row's GPU was measured, with all its kinds of operations: tier A."""
    kinds = {"latent": "latent_decode/", "recurrence": "gdn/"}
    for one in measured_gpus():
        if distance(one.sheet, sheet_of(row.gpu)) < LIKE:
            has = {name for name, start in kinds.items() if any(table.startswith(start) for table in one.tables)}
            return row.operations <= has | ({"experts"} if one.experts else set())
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A group of rows of one model on one GPU, of which some were measured beforehand."""

    known: tuple[Row, ...]
    asked: tuple[Row, ...]


def trials(rows: Sequence[Row], seed: int) -> list[Trial]:
    """Each model and GPU with TRIAL rows drawn as known."""
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.shape, row.gpu, row.precision].append(row)
    draw = np.random.default_rng(seed)
    found = []
    for members in groups.values():
        if len(members) >= 2 * TRIAL:
            order = draw.permutation(len(members))
            chosen = [members[index] for index in order]
            found.append(Trial(known=tuple(chosen[:TRIAL]), asked=tuple(chosen[TRIAL:])))
    return found


def corrected(folds: Folds, trial: Trial) -> tuple[Constants, Correction]:
    """Constants of the fold, and what the product's calibration learns from the known rows."""
    made = folds.fit(trial.known[0].family)
    known = [
        (_by_group(folds.times(row, made), row), row.ttft_s + (row.output_tokens - 1) * row.tpot_s)
        for row in trial.known if row.ttft_s is not None and row.tpot_s is not None
    ]  # fmt: skip
    return made, taught(known, spread=folds.spread(trial.known[0])).correction


def _by_group(times: KernelTimes, row: Row) -> Floats:
    """Seconds of a closed loop's cycle by group."""
    loop = loop_of(row)
    beside = times.features(loop.around) if loop.around else np.zeros(len(GROUPS))
    prompt = sum((times.features(chunk) - beside for chunk in loop.chunks), np.zeros(len(GROUPS)))
    return row.output_tokens * times.features(loop.decode) + loop.clients * prompt


@dataclass(frozen=True)
class Factors:
    """For engines that are not vLLM: what they take against the prediction, by engine and GPU, from other families."""

    rows: tuple[Row, ...]
    figures: tuple[Figures, ...]

    @cached_property
    def _ratios(self) -> dict[tuple[str, GpuModel], list[tuple[Family, float, float, float]]]:
        found: dict[tuple[str, GpuModel], list[tuple[Family, float, float, float]]] = defaultdict(list)
        for row, cold in zip(self.rows, self.figures, strict=True):
            found[row.engine, row.gpu].append((
                row.family, (row.ttft_s or np.nan) / cold.ttft_s, (row.tpot_s or np.nan) / cold.tpot_s,
                (row.tokens_per_s or np.nan) / cold.tokens_per_s,
            ))  # fmt: skip
        return found

    def applied(self, row: Row, cold: Figures) -> Figures | None:
        """The prediction with its factors; None if the engine served no other family on this GPU."""
        others = [ratios for family, *ratios in self._ratios[row.engine, row.gpu] if family != row.family]
        if not others:
            return None
        with np.errstate(all="ignore"):
            ttft, tpot, rate = (_median(np.array(column)) for column in zip(*others, strict=True))
        return Figures(ttft_s=cold.ttft_s * ttft, tpot_s=cold.tpot_s * tpot, tokens_per_s=cold.tokens_per_s * rate)


def _median(values: Floats) -> float:
    """The median of what is a number; one if nothing is."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else 1.0


def is_closed_vllm(row: Row) -> bool:
    """Rows to learn from."""
    return row.load is Load.CLOSED and row.engine == "vllm"
