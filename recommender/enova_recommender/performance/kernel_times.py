"""Step times as a sum over kernel classes, with the kernels' times read from measured tables.

Theory of operation. At construction each layer's kernels are evaluated on fixed knots (`layers`), giving curves over
the tokens of a step and over its sequences, and two grids: prompt tokens x pairs, decoding sequences x context. They
are weighted by the correction's factors and added up, so that a step is a few linear interpolations. With the decoding
sequences fixed a step is piecewise linear in the context: a run of decode steps has a closed form.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Self, assert_never

import numpy as np
import numpy.typing as npt

from enova_recommender.catalog.kernels import MeasuredGpu, measured_gpus
from enova_recommender.performance.constants import FITTED, Constants, Tier
from enova_recommender.performance.correction import GROUPS, UNCORRECTED, Correction, KernelGroup
from enova_recommender.performance.layers import (
    CONTEXT,
    PAIRS,
    SEQUENCES,
    TOKENS,
    Basis,
    KernelClass,
    Piece,
    model_pieces,
    setting_of,
)
from enova_recommender.performance.pieces import across, along, located, run_total, value_at
from enova_recommender.performance.tables import LIKE
from enova_recommender.performance.times import FirstTokenDelay
from enova_recommender.types import (
    AS_PUBLISHED,
    SINGLE_GPU,
    Batch,
    GpuModel,
    Interval,
    ModelShape,
    Parallelism,
    Precision,
)

Floats = npt.NDArray[np.float64]
Counts = npt.ArrayLike

NORMAL_80 = 1.2815515594457  # standard deviations within which 80 of 100 draws lie
_TOKENS, _SEQUENCES, _CONTEXT, _PAIRS = (
    np.concatenate([[0.0], knots]) for knots in (TOKENS, SEQUENCES, CONTEXT, PAIRS)
)
_TOKENS_LIST, _SEQUENCES_LIST = _TOKENS.tolist(), _SEQUENCES.tolist()
_CONTEXT_LIST, _PAIRS_LIST = _CONTEXT.tolist(), _PAIRS.tolist()
_SHAPES = {
    Basis.TOKENS: (len(_TOKENS),), Basis.PROMPT_TOKENS: (len(_TOKENS),), Basis.SAMPLED: (len(_SEQUENCES),),
    Basis.SEQUENCES: (len(_SEQUENCES),), Basis.PROMPT_PAIRS: (len(_TOKENS), len(_PAIRS)),
    Basis.CONTEXT: (len(_SEQUENCES), len(_CONTEXT)),
}  # fmt: skip
DECODE_ROWS_MAX = 4096  # numbers of sequences whose curve over the context is kept


class KernelTimes:
    """Step times of one replica from the shape of its model and measured kernels.

    With data-parallel attention (`parallelism.data`) a batch is that of one rank; the other ranks are taken to be as
    busy. `co_runners` holds, for each other engine on the same GPU, the share of time that it keeps the GPU busy: the
    driver gives contexts turns, so that kernels take so much longer. `measured` are the GPUs whose kernels are known
    (by default all that ship with the package).
    """

    def __init__(
        self,
        shape: ModelShape,
        gpu: GpuModel,
        *,
        parallelism: Parallelism = SINGLE_GPU,
        precision: Precision = AS_PUBLISHED,
        co_runners: Sequence[float] = (),
        correction: Correction = UNCORRECTED,
        constants: Constants = FITTED,
        measured: tuple[MeasuredGpu, ...] | None = None,
    ) -> None:
        self._constants = constants
        setting = setting_of(shape, gpu, parallelism, precision, measured_gpus() if measured is None else measured)
        slowed = 1.0 + sum(co_runners)
        self._pieces = _gathered(model_pieces(shape, setting), constants, slowed)
        self._is_measured = setting.kernels.is_measured
        self._spread = _spread(gpu, constants, is_measured=self._is_measured)
        self._correct(correction)

    def corrected(self, correction: Correction) -> Self:
        """The same times with these factors in place of any they had; no kernel is evaluated again."""
        other = copy(self)
        other._correct(correction)
        return other

    def _correct(self, correction: Correction) -> None:
        self.correction = correction
        factors = dict(zip(GROUPS, correction.factors, strict=True))
        self._host, self._each = factors[KernelGroup.HOST], factors[KernelGroup.SEQUENCE]
        self._totals = dict.fromkeys(Basis, np.zeros(1))
        for basis in Basis:
            parts = [factors[group] * values for (_, group, of), values in self._pieces.items() if of is basis]
            self._totals[basis] = np.sum(parts, axis=0) if parts else np.zeros(_SHAPES[basis])
        self._lists = {basis: values.tolist() for basis, values in self._totals.items() if values.ndim == 1}
        self._decode_rows: dict[int, list[float]] = {}

    @property
    def tier(self) -> Tier:
        """On what these times rest."""
        if self.correction.spread is not None:
            return Tier.CALIBRATED
        return Tier.MEASURED if self._is_measured else Tier.TRANSFERRED

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm of the error."""
        if self.correction.spread is not None:
            return self.correction.spread
        return self._spread

    def spreads(self, decode_sequences: Counts, context_tokens: Counts) -> Floats:
        """Spreads of steps that only decode, where nobody measured the site, or this load.

        The host is known least. Its seconds a step and a sequence are lognormal, as the kernels' are, each for itself:
        what is told has the upper end of their sum's 80 % interval. After a calibration it is the covariance of the
        factors that tells.
        """
        if self.correction.spread is not None:
            return self._corrected_spreads(decode_sequences, context_tokens, self.correction.spread)
        points = _Points(0, 0, decode_sequences, context_tokens)
        seconds, constants = self.steps_s(0, 0, decode_sequences, context_tokens), self._constants
        step, each = points.host(constants), points.each(constants)
        parts = (
            (seconds - step - each, max(self._spread, constants.kernels_doubt)),
            (step, constants.step_doubt), (each, constants.sequence_doubt),
        )  # fmt: skip
        squares = sum((part * math.expm1(NORMAL_80 * doubt)) ** 2 for part, doubt in parts)
        return np.asarray(np.log1p(np.sqrt(squares) / seconds) / NORMAL_80)

    def _corrected_spreads(self, sequences: Counts, context: Counts, seen: float) -> Floats:
        """The spreads of corrected steps that only decode; `seen` is that at the load that was seen."""
        points, constants = _Points(0, 0, sequences, context), self._constants
        if not self.correction.covariance:
            return np.full(points.shape, seen)
        by_group = {group: np.zeros(points.shape) for group in GROUPS}
        for (_, group, basis), values in self._pieces.items():
            by_group[group] = by_group[group] + points.of(basis, values)
        by_group[KernelGroup.HOST] = by_group[KernelGroup.HOST] + points.host(constants)
        by_group[KernelGroup.SEQUENCE] = by_group[KernelGroup.SEQUENCE] + points.each(constants)
        factors = zip(GROUPS, self.correction.factors, strict=True)
        seconds = np.stack([factor * by_group[group] for group, factor in factors])
        shares = seconds / seconds.sum(axis=0)
        matrix = np.array(self.correction.covariance).reshape(len(GROUPS), len(GROUPS))
        explained = np.einsum("i...,ij,j...->...", shares, matrix, shares)
        return np.asarray(np.sqrt(explained + self.correction.noise**2))

    @property
    def first_token_delay(self) -> FirstTokenDelay:
        """What first tokens of measured servers take beside their prompts' steps."""
        return self._constants.first_token_delay

    def interval(self, seconds: float) -> Interval:
        """A predicted time with the bounds that hold it in 80 of 100 cases."""
        factor = math.exp(NORMAL_80 * self.spread)
        return Interval(value=seconds, low=seconds / factor, high=seconds * factor)

    def step_s(self, batch: Batch) -> float:
        """Duration of one step."""
        prompts, sequences = batch.prefill_tokens, batch.decode_sequences
        seconds = self._fixed_s(prompts, sequences)
        if sequences:
            seconds += value_at(_CONTEXT_LIST, self._decode_row(sequences), batch.context_tokens)
        if prompts:
            low, share = _located_one(_TOKENS_LIST, prompts)
            grid = self._totals[Basis.PROMPT_PAIRS]
            row = grid[low] + share * (grid[low + 1] - grid[low])
            column, right = _located_one(_PAIRS_LIST, batch.prefill_pairs)
            seconds += float(row[column] + right * (row[column + 1] - row[column]))
        return seconds

    def decode_run_s(self, *, sequences: int, context_tokens: int, steps: int) -> float:
        """Duration of `steps` steps in a row that only decode the same sequences."""
        context = run_total(
            _CONTEXT_LIST, self._decode_row(sequences), first=context_tokens, stride=sequences, count=steps
        )
        return steps * self._fixed_s(0, sequences) + context

    def steps_s(
        self, prefill_tokens: Counts, prefill_pairs: Counts, decode_sequences: Counts, context_tokens: Counts
    ) -> Floats:
        """Durations of many steps at once; the arguments are broadcast against each other."""
        points = _Points(prefill_tokens, prefill_pairs, decode_sequences, context_tokens)
        kernels = sum((points.of(basis, values) for basis, values in self._totals.items()), np.zeros(points.shape))
        host = self._host * points.host(self._constants) + self._each * points.each(self._constants)
        return np.asarray(kernels + host)

    def features(self, batch: Batch) -> Floats:
        """Seconds of one step by group (in the order of GROUPS) at factor one: what a correction is fitted on."""
        by_group = dict.fromkeys(GROUPS, 0.0)
        for (_, group), seconds in self._parts(batch).items():
            by_group[group] += seconds
        return np.array([by_group[group] for group in GROUPS])

    def shares(self, batch: Batch) -> Mapping[KernelClass, float]:
        """Seconds of one step by kernel class; their sum is the step's."""
        factors = dict(zip(GROUPS, self.correction.factors, strict=True))
        by_class = dict.fromkeys(KernelClass, 0.0)
        for (kind, group), seconds in self._parts(batch).items():
            by_class[kind] += factors[group] * seconds
        return by_class

    def _parts(self, batch: Batch) -> dict[tuple[KernelClass, KernelGroup], float]:
        """Seconds of one step by class and group, at factor one."""
        points = _Points(
            batch.prefill_tokens, batch.prefill_pairs, batch.decode_sequences, batch.context_tokens
        )
        parts: dict[tuple[KernelClass, KernelGroup], float] = {}
        for (kind, group, basis), values in self._pieces.items():
            parts[kind, group] = parts.get((kind, group), 0.0) + float(points.of(basis, values))
        parts[KernelClass.HOST, KernelGroup.HOST] = float(points.host(self._constants))
        parts[KernelClass.HOST, KernelGroup.SEQUENCE] = float(points.each(self._constants))
        return parts

    def _fixed_s(self, prompts: int, sequences: int) -> float:
        """The part of a step that depends neither on the context nor on pairs."""
        constants = self._constants
        host = constants.step_s + (constants.prefill_step_s if prompts else 0.0)
        sampled = sequences + (1 if prompts else 0)
        return (
            self._host * host
            + self._each * constants.sequence_s * sequences
            + value_at(_TOKENS_LIST, self._lists[Basis.TOKENS], prompts + sequences)
            + value_at(_TOKENS_LIST, self._lists[Basis.PROMPT_TOKENS], prompts)
            + value_at(_SEQUENCES_LIST, self._lists[Basis.SAMPLED], sampled)
            + value_at(_SEQUENCES_LIST, self._lists[Basis.SEQUENCES], sequences)
        )

    def _decode_row(self, sequences: int) -> list[float]:
        """Seconds of decode attention over the knots of the context, for so many sequences."""
        row = self._decode_rows.get(sequences)
        if row is None:
            low, share = _located_one(_SEQUENCES_LIST, sequences)
            grid = self._totals[Basis.CONTEXT]
            row = (grid[low] + share * (grid[low + 1] - grid[low])).tolist()
            if len(self._decode_rows) < DECODE_ROWS_MAX:
                self._decode_rows[sequences] = row
        return row


class _Points:
    """Batches located on the knots of each basis."""

    def __init__(self, prefill_tokens: Counts, prefill_pairs: Counts, sequences: Counts, context: Counts) -> None:
        prompts, pairs, decoding, read = np.broadcast_arrays(
            *(np.asarray(part, dtype=np.float64) for part in (prefill_tokens, prefill_pairs, sequences, context))
        )
        self.shape = prompts.shape
        self._prompts, self._sequences = prompts, decoding
        sampled = decoding + (prompts > 0)
        self._places = {
            Basis.TOKENS: located(_TOKENS, prompts + decoding), Basis.PROMPT_TOKENS: located(_TOKENS, prompts),
            Basis.SAMPLED: located(_SEQUENCES, sampled), Basis.SEQUENCES: located(_SEQUENCES, decoding),
        }  # fmt: skip
        self._pairs, self._context = located(_PAIRS, pairs), located(_CONTEXT, read)

    def of(self, basis: Basis, values: Floats) -> Floats:
        """Seconds of one piece at the points."""
        match basis:
            case Basis.PROMPT_PAIRS:
                return across(values, self._places[Basis.PROMPT_TOKENS], self._pairs)
            case Basis.CONTEXT:
                return across(values, self._places[Basis.SEQUENCES], self._context)
            case Basis.TOKENS | Basis.PROMPT_TOKENS | Basis.SAMPLED | Basis.SEQUENCES:
                return along(values, *self._places[basis])
            case _:
                assert_never(basis)

    def host(self, constants: Constants) -> Floats:
        """Seconds that the host takes for a step at the points."""
        return np.asarray(constants.step_s + constants.prefill_step_s * (self._prompts > 0))

    def each(self, constants: Constants) -> Floats:
        """Seconds that the host takes for the sequences of the points."""
        return np.asarray(constants.sequence_s * self._sequences)


def _spread(gpu: GpuModel, constants: Constants, *, is_measured: bool) -> float:
    """The spread of uncorrected predictions for a GPU."""
    apart = {
        max(
            abs(math.log(gpu.bandwidth_bytes_per_s / known.bandwidth_bytes_per_s)),
            abs(math.log(gpu.bf16_flops / known.bf16_flops)),
        ): known.spread
        for known in constants.gpu_spreads
    }  # fmt: skip
    if apart and min(apart) < LIKE:
        return apart[min(apart)]
    return constants.measured_spread if is_measured else constants.transferred_spread


def _from_zero(piece: Piece) -> Floats:
    """The seconds of a piece with knots at zero put before the others: no tokens take no time."""
    values = np.pad(piece.seconds, [(1, 0)] * piece.seconds.ndim)
    if piece.basis in {Basis.PROMPT_PAIRS, Basis.CONTEXT}:
        values[:, 0] = values[:, 1]  # little context costs the launch
    return values


def _factors(constants: Constants) -> dict[KernelClass, float]:
    """What engines take of the measured times of each class."""
    return {
        KernelClass.GEMM: constants.gemm, KernelClass.EXPERTS: constants.experts,
        KernelClass.BLOCK_EXPERTS: constants.block_experts,
        KernelClass.PREFILL_ATTENTION: constants.prefill_attention,
        KernelClass.DECODE_ATTENTION: constants.decode_attention,
        KernelClass.LATENT_ATTENTION: constants.latent_attention, KernelClass.RECURRENCE: constants.recurrence,
        KernelClass.ELEMENTWISE: constants.elementwise, KernelClass.COLLECTIVE: constants.collective,
    }  # fmt: skip


def _gathered(
    pieces: Iterable[Piece], constants: Constants, slowed: float
) -> dict[tuple[KernelClass, KernelGroup, Basis], Floats]:
    """Pieces of equal class, group and basis as one."""
    factors = _factors(constants)
    found: dict[tuple[KernelClass, KernelGroup, Basis], Floats] = {}
    for piece in pieces:
        key = (piece.kind, piece.group, piece.basis)
        values = slowed * factors[piece.kind] * _from_zero(piece)
        found[key] = found[key] + values if key in found else values
    return found


def _located_one(knots: Sequence[float], point: float) -> tuple[int, float]:
    """Segment of one point, and how far along it the point is."""
    low = min(max(bisect_right(knots, point) - 1, 0), len(knots) - 2)
    return low, (point - knots[low]) / (knots[low + 1] - knots[low])
