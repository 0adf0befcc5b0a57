"""Verdicts with hysteresis: from votes, step by step, to what is said of a replica and since when.

A score says how improbable such figures are of a healthy replica: the negative logarithm (10) of their tail
probability, over SCORE_DECADES, at most 1. Of step times the probability is that of the fitted tail. Of every other
figure a healthy replica is taken to pass the threshold at THRESHOLD_RATE, with an exponential tail beyond: twice the
threshold is the square of the rate. The most improbable figure counts. Confidence says how settled the verdict is:
DOUBT when its rule has just been met, 1 after SURE_STEPS more of evidence of which every figure was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np

from enova_recommender.detection.causes import RULES, Cause, SuggestedAction
from enova_recommender.detection.evidence import (
    BATCH_GAIN,
    BATCH_KV_MAX,
    FAILED_SHARE,
    FAILURES_MIN,
    KV_FULL,
    PEER_SPREADS,
    PREEMPTIONS_MIN,
    QUEUE_MIN,
    RESTARTS_MIN,
    THROTTLED_RATIO,
    Evidence,
    Signals,
    Votes,
    queued,
)
from enova_recommender.detection.features import Feature, FeatureStep, Floats
from enova_recommender.detection.observation import Placement
from enova_recommender.detection.progress import Progress, ProgressLimits
from enova_recommender.types import VerdictKind

SURE_STEPS = 6           # of evidence beyond those that a rule asks for: then nothing more is learnt by waiting
COUNT_MAX = 1_000_000    # of steps of evidence
LAPSE_STEPS = 60         # without a vote, for or against: what nobody measures any more is not said for ever
DOUBT = 0.5              # confidence when a rule has just been met
PATIENT_STEPS = 12       # a slow replica still serves: before it is replaced it must have been slow for so long
SCORE_DECADES = 10.0
THRESHOLD_RATE = 1e-3    # of steps
HOT_C = 85.0             # of a GPU
_TIMED = frozenset({Cause.SLOW, Cause.THROTTLED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One figure that a verdict rests on, beside what it was held against."""

    feature: str
    value: float
    threshold: float
    is_below: bool = False       # bad where it is less than the threshold

    @property
    def weight(self) -> float:
        """How far it is beyond, as a ratio."""
        if self.is_below:
            return 1.0 + (self.threshold - self.value) / max(abs(self.threshold), 1e-9)
        return self.value / max(abs(self.threshold), 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is the matter with a replica; `contributions` are in order of their excess over the threshold."""

    replica: str
    kind: VerdictKind
    cause: Cause | None
    score: float
    confidence: float
    since_s: float
    action: SuggestedAction
    contributions: tuple[Contribution, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The verdicts of one step: those that are not NORMAL, by replica; of any other replica there is nothing to say."""

    number: int
    end_s: float
    verdicts: Mapping[str, Verdict]
    replicas: tuple[str, ...]

    def kind(self, replica: str) -> VerdictKind:
        """The verdict on one replica."""
        found = self.verdicts.get(replica)
        return found.kind if found is not None else VerdictKind.NORMAL

    @property
    def dead(self) -> frozenset[str]:
        """Replicas that scaling must not count: hung, or down again and again."""
        return frozenset(
            name for name, verdict in self.verdicts.items() if verdict.cause in {Cause.HUNG, Cause.CRASH_LOOP}
        )


class Judge:
    """Turns votes into verdicts, one step after another."""

    def __init__(self, *, series: int, limits: ProgressLimits | None = None) -> None:
        self._limits = limits or ProgressLimits()
        self._evidence = Evidence(series=series)
        shape = (series, len(Cause))
        self._for = np.zeros(shape, dtype=np.int32)
        self._against = np.zeros(shape, dtype=np.int32)
        self._silent = np.zeros(shape, dtype=np.int32)
        self._active = np.zeros(shape, dtype=bool)
        self._since = np.full(shape, np.nan)
        self._enter = np.array([RULES[cause].enter for cause in Cause])
        self._leave = np.array([RULES[cause].leave for cause in Cause])

    def update(
        self, step: FeatureStep, signals: Signals, placements: Mapping[str, Placement], *, step_s: float
    ) -> Judgement:
        """Judge one step."""
        self._grow(len(step.values))
        with np.errstate(invalid="ignore", divide="ignore"):
            votes = self._evidence.update(step, signals, placements, step_s=step_s)
        self._count(votes, step.end_s - step_s)
        verdicts: dict[str, Verdict] = {}
        for row in np.flatnonzero(self._active.any(axis=1)).tolist():
            name = step.replicas[row]
            if name in placements:
                cause = Cause(int(np.argmax(self._active[row])))
                verdicts[name] = self._verdict(step, signals, row, cause)
        return Judgement(number=step.number, end_s=step.end_s, verdicts=verdicts, replicas=step.replicas)

    @property
    def preemptions(self) -> Floats:
        """Preemptions a second of late, by row."""
        return self._evidence.preemptions

    def forget(self, row: int) -> None:
        """Another replica has this row."""
        if row < len(self._for):
            self._evidence.forget(row)
            self._for[row] = self._against[row] = self._silent[row] = 0
            self._active[row] = False
            self._since[row] = np.nan

    def _count(self, votes: Votes, start_s: float) -> None:
        yes, no = votes > 0, votes < 0
        self._since = np.where(yes & (self._for == 0) & ~self._active, start_s, self._since)
        self._for = np.clip(self._for + votes, 0, COUNT_MAX)
        self._against = np.where(yes, 0, np.where(no, self._against + 1, self._against))
        self._silent = np.where(yes | no, 0, np.minimum(self._silent + 1, COUNT_MAX))
        self._active |= self._for >= self._enter
        left = self._active & ((self._against >= self._leave) | (self._silent >= LAPSE_STEPS))
        self._active &= ~left
        self._for[left] = 0

    def _verdict(self, step: FeatureStep, signals: Signals, row: int, cause: Cause) -> Verdict:
        rule = RULES[cause]
        action = rule.action
        if cause is Cause.HUNG and signals.progress[row] != Progress.HUNG:
            action = SuggestedAction.EJECT
        if cause in _TIMED and self._for[row, cause] < PATIENT_STEPS:
            action = SuggestedAction.INSPECT
        figures = self._contributions(step, signals, row, cause)
        known = [each for each in figures if np.isfinite(each.value) and np.isfinite(each.threshold)]
        contributions = tuple(sorted(known, key=lambda each: -each.weight))
        beyond = min(1.0, max(0, int(self._for[row, cause]) - rule.enter) / SURE_STEPS)
        return Verdict(
            replica=step.replicas[row],
            kind=rule.kind,
            cause=cause,
            score=_score(contributions, float(signals.rarity[row]) if cause in _TIMED else math.nan),
            confidence=DOUBT + (1.0 - DOUBT) * beyond * len(known) / max(1, len(figures)),
            since_s=float(self._since[row, cause]),
            action=action,
            contributions=contributions,
        )

    def _contributions(
        self, step: FeatureStep, signals: Signals, row: int, cause: Cause
    ) -> tuple[Contribution, ...]:
        held = self._evidence.figures

        def figure(name: str, value: float, threshold: float, *, is_below: bool = False) -> Contribution:
            return Contribution(feature=name, value=float(value), threshold=float(threshold), is_below=is_below)

        def of(feature: Feature, threshold: float, *, is_below: bool = False) -> Contribution:
            return figure(feature.value, step.of(feature)[row], threshold, is_below=is_below)

        ratio, queue = signals.slowness.ratio[row], figure("queue", queued(step)[row], QUEUE_MIN)
        match cause:
            case Cause.MISSING:
                return (figure("silent_steps", self._for[row, cause], RULES[cause].enter),)
            case Cause.HUNG:
                return (
                    figure("stalled_s", signals.stalled_s[row], self._limits.suspect_after_s), of(Feature.HELD, 1.0),
                    of(Feature.GPU_POWER, self._limits.active_power, is_below=True),
                )  # fmt: skip
            case Cause.CRASH_LOOP:
                return figure("restarts", held["restarts"][row], RESTARTS_MIN), of(Feature.DOWN, 1.0)
            case Cause.KV_THRASH:
                thrash = figure("preemptions", held["preemptions"][row], PREEMPTIONS_MIN)
                return thrash, of(Feature.KV_USAGE, KV_FULL)
            case Cause.LEAK:
                return (of(Feature.KV_USAGE, held["kv_limit"][row]),)
            case Cause.SLOW:
                beside = figure("step_time_beside_siblings", signals.peers[row], PEER_SPREADS)
                return figure("step_time_ratio", ratio, signals.slowness.threshold[row]), beside
            case Cause.THROTTLED:
                slow = figure("step_time_ratio", ratio, THROTTLED_RATIO)
                return of(Feature.GPU_THROTTLED, 1.0), slow, of(Feature.GPU_TEMPERATURE_C, HOT_C)
            case Cause.FAILING:
                failed = figure("failed", held["failed"][row], FAILURES_MIN)
                return failed, figure("failed_share", held["failed_share"][row], FAILED_SHARE)
            case Cause.BATCH_SLACK:
                gain = figure("throughput_of_twice_the_batch", signals.batch_gain[row], BATCH_GAIN)
                return queue, gain, of(Feature.KV_USAGE, BATCH_KV_MAX, is_below=True)
            case Cause.OVERLOAD:
                return queue, figure("objectives_burnt", signals.burn[row], 1.0), of(Feature.KV_USAGE, KV_FULL)
            case Cause.CUT:
                return (figure("cut_share", held["cut_share"][row], held["cut_limit"][row]),)
            case Cause.IDLE:
                return of(Feature.HELD, 1.0, is_below=True), of(Feature.RUNNING, 1.0, is_below=True)
            case Cause.SURPLUS:
                load, spare = held["deployment_load_rps"][row], held["deployment_spare_rps"][row]
                return (figure("deployment_load_rps", load, spare, is_below=True),)
            case _:
                assert_never(cause)

    def save(self) -> dict[str, Floats]:
        """What it counted and remembers, by row."""
        counted = {"for": self._for, "against": self._against, "active": self._active, "since": self._since}
        return {name: values.astype(np.float64) for name, values in counted.items()} | self._evidence.save()

    def restore(self, saved: Mapping[str, Floats], *, rows: Sequence[int]) -> None:
        """What `save` returned, for rows that had these numbers then; -1 for a new one."""
        self._grow(len(rows))
        self._evidence.restore(saved, rows=rows)
        for row, before in enumerate(rows):
            if 0 <= before < len(saved["for"]):
                self._for[row], self._against[row] = saved["for"][before], saved["against"][before]
                self._active[row], self._since[row] = saved["active"][before] > 0, saved["since"][before]

    def _grow(self, series: int) -> None:
        more = series - len(self._for)
        if more > 0:
            wider = ((0, more), (0, 0))
            self._for, self._against = np.pad(self._for, wider), np.pad(self._against, wider)
            self._active, self._silent = np.pad(self._active, wider), np.pad(self._silent, wider)
            self._since = np.pad(self._since, wider, constant_values=np.nan)


def _score(contributions: Sequence[Contribution], rarity: float) -> float:
    """How improbable of a healthy replica."""
    decades = -math.log10(THRESHOLD_RATE) * max((each.weight for each in contributions), default=1.0)
    return float(np.clip((decades if math.isnan(rarity) else rarity) / SCORE_DECADES, 0.0, 1.0))
