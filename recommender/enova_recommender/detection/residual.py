"""Whether an engine is slow for its load: observed step times beside those that its load should take.

Theory of operation. The mean gap between two tokens of a sequence is the mean duration of a step, weighted by the
sequences that decode in it (as `enova_recommender.performance.live_steps` explains). From the same counters follow the
batches that those steps computed, so a model of step times says what they should have taken. The logarithm of the
ratio is near a constant of the model's own error while hardware and software are well, whatever the load; the constant
is taken off, as far as a model can be wrong and no further: a replica that is slow from its start must not pass for a
model that is too quick. Steps with preemptions are left out: their gaps are waiting, not computing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from enova_recommender.detection.extremes import DriftingThreshold
from enova_recommender.detection.features import Feature, FeatureStep, Flags, Floats
from enova_recommender.detection.observation import Placement
from enova_recommender.performance import Affine, StepTimes
from enova_recommender.types import Batch

TOKENS_MIN = 8.0           # gaps below which a step says nothing
BATCHED_TOKENS = 2048.0    # where the setting is not known
RATIO_MAX = 50.0           # beyond it is a stall, not a step
SMOOTHING = 0.5            # weight of the newest step: the mean lags by a step
BIAS_STEPS = 24            # of known normal time, after which a model's own error is known
BIAS_MAX = math.log(3.0)   # of a model; more is called slow from the start
BIAS_SPREADS = 4.0         # of a model that says how exact it is
BIAS_MIN = math.log(1.2)
OWN_MAX = 0.1              # by which the log of one replica's steps differs from its siblings' without a fault
SLOW_RATIO = 1.3           # below it nobody is harmed; the threshold while nobody knows how high quiet residuals go
SLOW_RATIO_MAX = 2.5       # above it nobody doubts
BIAS_KEEP = 1.0 - 1.0 / 720.0
ROUNDS = 4                 # of the robust fit
OUTLIER_SPREADS = 5.0      # robust standard deviations
MAD_UNIT = 1.4826          # from the median absolute deviation to a normal law's standard deviation
SPREAD_MIN = 0.02          # of log ratios: nothing is measured better


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatches:
    """What the mean steps of each replica computed: two kinds of step by replica (2 x n), with a prompt and without."""

    weights: Floats            # of each kind, adding up to 1; NaN where nothing is known
    prefill_tokens: Floats
    prefill_pairs: Floats
    decode_sequences: Floats
    context_tokens: Floats
    observed_s: Floats         # n


@runtime_checkable
class ManySteps(Protocol):
    """Step times that can be asked for many batches at once."""

    def steps_s(
        self, prefill_tokens: Floats, prefill_pairs: Floats, decode_sequences: Floats, context_tokens: Floats
    ) -> Floats:
        """Durations."""
        ...


@runtime_checkable
class Inexact(Protocol):
    """Step times that know how exact they are."""

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm of the error."""
        ...


class Expectation(Protocol):
    """Step times of each replica for the batches that it computed."""

    def expected_s(self, batches: StepBatches) -> Floats:
        """One mean duration a replica; NaN where unknown."""
        ...


@dataclass(frozen=True, slots=True)
class AffineExpectation:
    """Affine step times, one row of coefficients a replica: base, prefill token, pair, sequence, context token."""

    coefficients: Floats

    @classmethod
    def of(cls, times: Affine, *, series: int) -> AffineExpectation:
        """The same times for every replica."""
        row = (times.base_s, times.prefill_token_s, times.prefill_pair_s, times.sequence_s, times.context_token_s)
        return cls(np.tile(np.array(row), (series, 1)))

    def expected_s(self, batches: StepBatches) -> Floats:
        """One mean duration a replica."""
        base, token, pair, sequence, context = self.coefficients.T
        steps_s = (
            base + token * batches.prefill_tokens + pair * batches.prefill_pairs
            + sequence * batches.decode_sequences + context * batches.context_tokens
        )
        return np.asarray((batches.weights * steps_s).sum(axis=0))


@dataclass(frozen=True, slots=True)
class MixedExpectation:
    """Any model's step times, one for each replica that has one. Affine ones are computed all at once."""

    affine: AffineExpectation
    others: tuple[tuple[tuple[int, ...], StepTimes], ...]

    @classmethod
    def of(cls, times: Sequence[StepTimes | None]) -> MixedExpectation:
        """The times of each row; None where there is no model."""
        table = np.full((len(times), 5), np.nan)
        rows: dict[int, list[int]] = {}
        for row, each in enumerate(times):
            if isinstance(each, Affine):
                table[row] = AffineExpectation.of(each, series=1).coefficients[0]
            elif each is not None:
                rows.setdefault(id(each), []).append(row)
        others = tuple((tuple(found), times[found[0]]) for found in rows.values())
        return cls(AffineExpectation(table), tuple((found, each) for found, each in others if each is not None))

    def expected_s(self, batches: StepBatches) -> Floats:
        """One mean duration a replica."""
        found = self.affine.expected_s(batches)
        for rows, times in self.others:
            known = np.array([row for row in rows if np.isfinite(batches.weights[:, row]).all()], dtype=np.int64)
            if known.size:
                found[known] = (batches.weights[:, known] * _steps_s(times, batches, known)).sum(axis=0)
        return found


def step_batches(step: FeatureStep, placements: Mapping[str, Placement]) -> StepBatches:
    """What the steps of each replica computed, from what its counters moved by."""
    placed = [placements.get(name) for name in step.replicas]
    limit = np.array([each.max_num_batched_tokens if each else math.nan for each in placed])
    limit = np.where(np.isnan(limit), BATCHED_TOKENS, limit)
    kv_tokens = np.array([each.kv_tokens if each else math.nan for each in placed])
    span_s = step.of(Feature.SPAN_S)
    steps = step.of(Feature.ITERATIONS) * span_s
    prompts = np.maximum((step.of(Feature.PROMPT_TOKENS) - np.nan_to_num(step.of(Feature.PREFIX_HITS))) * span_s, 0.0)
    first, gaps = step.of(Feature.FIRST_TOKENS) * span_s, step.of(Feature.DECODE_TOKENS) * span_s
    known = (steps >= 1) & (gaps >= TOKENS_MIN) & (step.of(Feature.STEP_S) > 0)
    known &= ~(step.of(Feature.PREEMPTIONS) > 0) & np.isfinite(prompts) & np.isfinite(first)
    steps = np.where(known, steps, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        mixed = np.minimum(steps, np.maximum(first, prompts / limit))
        running = (gaps + first) / steps
        beside = np.maximum(0.0, running - np.where(mixed > 0, first / mixed, 0.0))
        weights = np.array([mixed * beside, (steps - mixed) * running])
        weights /= weights.sum(axis=0)
        chunk = np.where(mixed > 0, prompts / mixed, 0.0)
        whole = np.where(first > 0, prompts / first, chunk)
        context = step.of(Feature.KV_USAGE) * kv_tokens / np.maximum(step.of(Feature.RUNNING), 1.0)
        # Without the cache's size: a prompt and half of an answer.
        context = np.where(np.isfinite(context) & (context > 0), context, np.nan_to_num(whole))
    nothing = np.zeros(len(steps))
    return StepBatches(
        weights=weights,
        prefill_tokens=np.array([chunk, nothing]),
        prefill_pairs=np.array([chunk * whole / 2, nothing]),
        decode_sequences=np.array([beside, running]),
        context_tokens=np.array([beside * context, running * context]),
        observed_s=np.where(known, step.of(Feature.STEP_S), np.nan),
    )


def design(batches: StepBatches) -> Floats:
    """What affine step times are linear in: 1, prompt tokens, pairs, sequences and context of each replica's steps."""
    parts = (batches.prefill_tokens, batches.prefill_pairs, batches.decode_sequences, batches.context_tokens)
    return np.array([np.ones_like(batches.observed_s), *((batches.weights * values).sum(axis=0) for values in parts)])


def fit_affine(batches: list[StepBatches]) -> Affine:
    """The affine step times of normal steps, all of one configuration, robustly and without a negative part.

    Raises ValueError for fewer than BIAS_STEPS known steps.
    """
    table = np.concatenate([design(each) for each in batches], axis=1).T
    observed = np.concatenate([each.observed_s for each in batches])
    sound = np.isfinite(table).all(axis=1) & np.isfinite(observed)
    if sound.sum() < BIAS_STEPS:
        raise ValueError(f"batches: at least {BIAS_STEPS} known steps are needed, not {int(sound.sum())}")
    table, observed = table[sound], observed[sound]
    units = np.maximum(np.abs(table).mean(axis=0), 1e-12)
    weights = 1.0 / observed
    found = np.zeros(table.shape[1])
    for _ in range(ROUNDS):
        found = nnls(table / units * weights[:, None], observed * weights)[0] / units
        error = np.abs(table @ found / observed - 1.0)
        spread = max(SPREAD_MIN, MAD_UNIT * float(np.median(error)))
        weights = np.minimum(1.0, 1.5 * spread / np.maximum(error, 1e-9)) / observed
    base, token, pair, sequence, context = found.tolist()
    return Affine(
        base_s=base, prefill_token_s=token, prefill_pair_s=pair, sequence_s=sequence, context_token_s=context
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowness:
    """How slow each replica is for its load: `ratio` of observed to expected, 1 if well, NaN if unknown."""

    ratio: Floats
    threshold: Floats          # of the ratio
    alarm: Flags               # beyond it


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What each replica is held against: the log of its own ratio lies within `limit` of `centre` while it is well."""

    expected_s: Floats
    centre: Floats
    limit: Floats
    is_learnt: Flags           # expected from what its variant's own steps took
    level: Floats              # of the log ratio, that quiet steps exceed at the stated rate; NaN unknown
    doubt: Floats              # by how much the log of what is expected may be off at this load


def reference(expected_s: Floats, *, level: float = math.nan) -> Reference:
    """A model by itself."""
    nothing = np.zeros(len(expected_s))
    return Reference(
        expected_s=expected_s, centre=nothing, limit=nothing + BIAS_MAX, is_learnt=nothing > 0,
        level=nothing + level, doubt=nothing,
    )  # fmt: skip


def bias_limits(times: Sequence[StepTimes | None]) -> Floats:
    """By how much, as a log ratio, the model of each row can be wrong."""
    spreads = np.array([each.spread if isinstance(each, Inexact) else math.inf for each in times])
    return np.clip(BIAS_SPREADS * spreads, BIAS_MIN, BIAS_MAX)


class ResidualWatch:
    """Smooths each replica's log ratio, takes the model's own error off, and holds the rest against a threshold."""

    def __init__(self, *, series: int, threshold: DriftingThreshold | None = None) -> None:
        self._threshold = threshold
        self._mean = np.full(series, np.nan)
        self._bias = np.full(series, np.nan)
        self._seen = np.zeros(series)
        self._learnt = np.zeros(series, dtype=bool)

    @property
    def bias(self) -> Floats:
        """The log ratio of each replica while it is well."""
        return np.where(self._seen >= BIAS_STEPS, self._bias, np.nan)

    @property
    def residual(self) -> Floats:
        """The smoothed log ratio less that."""
        return np.where(self._seen > BIAS_STEPS, self._mean, np.nan)

    def fit(self, batches: list[StepBatches], expectation: Expectation, *, rate: float) -> None:
        """Learn bias and threshold from normal time of the same replicas."""
        logs = np.array([log_ratio(each, expectation) for each in batches])
        with np.errstate(all="ignore"):
            known = ~np.isnan(logs).all(axis=0)
            self._bias[known] = np.nanmedian(logs[:, known], axis=0)
        self._seen[known] = BIAS_STEPS
        # What is called normal may hold a fault that was not called yet: far outliers would raise the threshold.
        error = logs - self._bias
        error = np.where(np.abs(error) <= OUTLIER_SPREADS * _spread(error), error, np.nan)
        smooth = np.array([self._smooth(row, np.isfinite(row)) for row in error])
        threshold = DriftingThreshold(rate=rate)
        threshold.fit(smooth.reshape(-1))
        self._threshold = threshold
        self._mean[:] = np.nan

    def update(self, batches: StepBatches, against: Reference, *, learn: Flags | None = None) -> Slowness:
        """One step; bias is learnt only where `learn` says that the replica is well."""
        logs = _log_ratio(batches.observed_s, against.expected_s)
        self._grow(len(logs))
        known = np.isfinite(logs)
        self._turn(known, against.is_learnt)
        low, high = against.centre - against.limit, against.centre + against.limit
        fresh = known & (self._seen < BIAS_STEPS)
        learnt = known & (self._seen >= BIAS_STEPS) & (np.zeros(len(logs), bool) if learn is None else learn)
        start = np.where(np.isnan(self._bias), logs, self._bias)
        self._bias = np.where(fresh, start + (logs - start) / (self._seen + 1.0), self._bias)
        self._seen = np.where(known, self._seen + 1.0, self._seen)
        self._bias = np.where(learnt, BIAS_KEEP * self._bias + (1.0 - BIAS_KEEP) * logs, self._bias)
        bias = np.clip(self._bias, low, high)
        residual = self._smooth(logs - bias, known)
        judged = self._seen > BIAS_STEPS
        ratio = np.where(judged, np.exp(np.clip(residual, -10.0, 10.0)), np.nan)
        # One law for all, of which the level is used: each replica's own error is taken off already.
        level = against.level if self._threshold is None else np.full(len(logs), self._threshold.level)
        fitted = np.clip(np.exp(np.minimum(level, 10.0)), SLOW_RATIO, SLOW_RATIO_MAX)
        threshold = np.where(np.isnan(level), SLOW_RATIO, fitted) * np.exp(against.doubt)
        with np.errstate(invalid="ignore"):
            return Slowness(ratio=ratio, threshold=threshold, alarm=known & (ratio > threshold))

    def _turn(self, known: Flags, is_learnt: Flags) -> None:
        """Where another expectation holds from now on, what was learnt beside the one before is void."""
        better, worse = known & is_learnt & ~self._learnt, known & ~is_learnt & self._learnt
        self._bias = np.where(better, 0.0, np.where(worse, np.nan, self._bias))
        self._seen = np.where(better, np.maximum(self._seen, BIAS_STEPS), np.where(worse, 0.0, self._seen))
        self._mean = np.where(better | worse, np.nan, self._mean)
        self._learnt = np.where(known, is_learnt, self._learnt)

    def begin_anew(self, rows: Flags) -> None:
        """These were restarted: how slow the process before was says nothing of the one that runs now."""
        self._grow(len(rows))
        self._mean[: len(rows)][rows] = np.nan

    def forget(self, row: int) -> None:
        """Another replica has this row, or its engine was restarted on other hardware."""
        if row >= len(self._mean):
            return
        self._mean[row] = self._bias[row] = np.nan
        self._seen[row] = 0.0
        self._learnt[row] = False

    def save(self) -> dict[str, Floats]:
        """What it learnt, as arrays by row: it takes minutes to learn again."""
        saved = {"bias": self._bias.copy(), "seen": self._seen.copy(), "learnt": self._learnt.astype(np.float64)}
        if self._threshold is not None:
            saved.update({f"threshold/{key}": value for key, value in self._threshold.save().items()})
        return saved

    @classmethod
    def load(cls, saved: Mapping[str, Floats], *, rows: Sequence[int]) -> ResidualWatch:
        """What `save` returned, for rows that had these numbers then; -1 for a new one."""
        parts = {key.removeprefix("threshold/"): value for key, value in saved.items() if key.startswith("threshold/")}
        loaded = cls(series=len(rows), threshold=DriftingThreshold.load(parts) if parts else None)
        for row, before in enumerate(rows):
            if 0 <= before < len(saved["bias"]):
                loaded._bias[row], loaded._seen[row] = saved["bias"][before], saved["seen"][before]
                loaded._learnt[row] = saved["learnt"][before] > 0
        return loaded

    def _smooth(self, residual: Floats, known: Flags) -> Floats:
        moved = self._mean + SMOOTHING * (residual - self._mean)
        self._mean = np.where(known, np.where(np.isnan(self._mean), residual, moved), self._mean)
        return self._mean

    def _grow(self, series: int) -> None:
        more = series - len(self._mean)
        if more > 0:
            self._mean = np.pad(self._mean, (0, more), constant_values=np.nan)
            self._bias = np.pad(self._bias, (0, more), constant_values=np.nan)
            self._seen = np.pad(self._seen, (0, more))
            self._learnt = np.pad(self._learnt, (0, more))


def _scaled(batches: StepBatches, factor: float) -> StepBatches:
    return replace(
        batches,
        prefill_tokens=factor * batches.prefill_tokens,
        prefill_pairs=factor * batches.prefill_pairs,
        decode_sequences=factor * batches.decode_sequences,
        context_tokens=factor * batches.context_tokens,
    )


def halved(batches: StepBatches) -> StepBatches:
    """Steps of half of the work."""
    return _scaled(batches, 0.5)


def batch_gain(batches: StepBatches, expectation: Expectation) -> Floats:
    """How much more a step of twice the work would make in the same time: 2 where steps cost the same however full."""
    double = _scaled(batches, 2.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 2.0 * expectation.expected_s(batches) / expectation.expected_s(double)


def longest_steps_s(times: Sequence[StepTimes | None], placements: Sequence[Placement | None]) -> Floats:
    """How long the fullest step of each replica should take: a whole batch of prompt tokens late in the context."""
    found = np.full(len(times), np.nan)
    for row, (each, placement) in enumerate(zip(times, placements, strict=True)):
        if each is None or placement is None or not math.isfinite(placement.max_model_len):
            continue
        limit = placement.max_num_batched_tokens
        tokens = int(limit if math.isfinite(limit) else BATCHED_TOKENS)
        pairs = int(tokens * max(placement.max_model_len, tokens))
        found[row] = each.step_s(Batch(prefill_tokens=tokens, prefill_pairs=pairs))
    return found


def log_ratio(batches: StepBatches, expectation: Expectation) -> Floats:
    """The logarithm of observed over expected step time; NaN where either is unknown."""
    return _log_ratio(batches.observed_s, expectation.expected_s(batches))


def _log_ratio(observed_s: Floats, expected_s: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = observed_s / expected_s
        sound = (ratio > 1 / RATIO_MAX) & np.isfinite(ratio)
        return np.where(sound, np.log(np.clip(ratio, 1 / RATIO_MAX, RATIO_MAX)), np.nan)


def _steps_s(times: StepTimes, batches: StepBatches, rows: npt.NDArray[np.int64]) -> Floats:
    """Both kinds of step of these rows."""
    if isinstance(times, ManySteps):
        return times.steps_s(
            batches.prefill_tokens[:, rows], batches.prefill_pairs[:, rows], batches.decode_sequences[:, rows],
            batches.context_tokens[:, rows],
        )  # fmt: skip
    return np.array([
        [times.step_s(_batch(batches, kind, row)) if batches.weights[kind, row] > 0 else 0.0 for row in rows.tolist()]
        for kind in (0, 1)
    ])  # fmt: skip


def _spread(errors: Floats) -> float:
    known = np.abs(errors[np.isfinite(errors)])
    return max(SPREAD_MIN, MAD_UNIT * float(np.median(known))) if known.size else SPREAD_MIN


def _batch(batches: StepBatches, kind: int, row: int) -> Batch:
    return Batch(
        prefill_tokens=round(float(batches.prefill_tokens[kind, row])),
        prefill_pairs=round(float(batches.prefill_pairs[kind, row])),
        decode_sequences=round(float(batches.decode_sequences[kind, row])),
        context_tokens=round(float(batches.context_tokens[kind, row])),
    )
