"""Verdicts with hysteresis: from votes, step by step, to what is said of a replica and since when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from enova_recommender.detection.causes import RULES, Cause, SuggestedAction
from enova_recommender.detection.evidence import (
    FAILURES_MIN,
    PEER_SPREADS,
    PREEMPTIONS_MIN,
    QUEUE_MIN,
    RESTARTS_MIN,
    SLOW_RATIO,
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
DOUBT = 0.5              # confidence when a rule has just been met


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One figure that a verdict rests on, beside what it was held against."""

    feature: str
    value: float
    threshold: float

    @property
    def weight(self) -> float:
        """How far it is beyond, as a ratio."""
        return abs(self.value) / max(abs(self.threshold), 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is the matter with a replica; `score` grows with its gravity from 0 to 1, so does `confidence`."""

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
            self._for[row] = self._against[row] = 0
            self._active[row] = False
            self._since[row] = np.nan

    def _count(self, votes: Votes, start_s: float) -> None:
        yes, no = votes > 0, votes < 0
        self._since = np.where(yes & (self._for == 0) & ~self._active, start_s, self._since)
        fewer = np.where(no, np.maximum(self._for - 1, 0), self._for)
        self._for = np.where(yes, np.minimum(self._for + 1, COUNT_MAX), fewer)
        self._against = np.where(yes, 0, np.where(no, self._against + 1, self._against))
        self._active |= self._for >= self._enter
        left = self._active & (self._against >= self._leave)
        self._active &= ~left
        self._for[left] = 0

    def _verdict(self, step: FeatureStep, signals: Signals, row: int, cause: Cause) -> Verdict:
        rule = RULES[cause]
        action = rule.action
        if cause is Cause.HUNG and signals.progress[row] != Progress.HUNG:
            action = SuggestedAction.EJECT
        contributions = tuple(
            sorted(
                (each for each in self._contributions(step, signals, row, cause) if np.isfinite(each.value)),
                key=lambda each: -each.weight,
            )
        )
        weight = max((each.weight for each in contributions), default=1.0)
        beyond = min(1.0, max(0, int(self._for[row, cause]) - rule.enter) / SURE_STEPS)
        return Verdict(
            replica=step.replicas[row],
            kind=rule.kind,
            cause=cause,
            score=weight / (1.0 + weight),
            confidence=DOUBT + (1.0 - DOUBT) * beyond,
            since_s=float(self._since[row, cause]),
            action=action,
            contributions=contributions,
        )

    def _contributions(
        self, step: FeatureStep, signals: Signals, row: int, cause: Cause
    ) -> tuple[Contribution, ...]:
        def figure(name: str, value: float, threshold: float) -> Contribution:
            return Contribution(feature=name, value=float(value), threshold=threshold)

        def of(feature: Feature, threshold: float) -> Contribution:
            return figure(feature.value, step.of(feature)[row], threshold)

        ratio = figure("step_time_ratio", signals.slowness.ratio[row], SLOW_RATIO)
        queue = figure("queue", queued(step)[row], QUEUE_MIN)
        stalled = figure("stalled_s", signals.stalled_s[row], self._limits.suspect_after_s)
        preemptions = figure(Feature.PREEMPTIONS.value, self._evidence.preemptions[row], PREEMPTIONS_MIN)
        match cause:
            case Cause.HUNG:
                return stalled, of(Feature.HELD, 1.0), of(Feature.GPU_POWER, self._limits.active_power)
            case Cause.CRASH_LOOP:
                return figure("restarts", self._evidence.restarts[row], RESTARTS_MIN), of(Feature.DOWN, 1.0)
            case Cause.KV_THRASH:
                return preemptions, of(Feature.KV_USAGE, 1.0), queue
            case Cause.LEAK:
                return of(Feature.KV_USAGE, 1.0), preemptions, of(Feature.RESIDENT_BYTES, np.inf)
            case Cause.SLOW:
                return ratio, figure("step_time_beside_siblings", signals.peers[row, 0], PEER_SPREADS), queue
            case Cause.THROTTLED:
                slow = figure("step_time_ratio", signals.slowness.ratio[row], THROTTLED_RATIO)
                return of(Feature.GPU_THROTTLED, 1.0), slow, of(Feature.GPU_TEMPERATURE_C, 85.0)
            case Cause.FAILING:
                return (figure(Feature.FAILED.value, self._evidence.failed[row], FAILURES_MIN),)
            case Cause.BATCH_SLACK:
                return queue, figure("throughput_of_twice_the_batch", signals.batch_gain[row], 1.0)
            case Cause.OVERLOAD:
                return queue, of(Feature.QUEUE_S, 1.0), of(Feature.KV_USAGE, 1.0), ratio
            case Cause.CUT:
                return (of(Feature.CUT, 1.0),)
            case Cause.MISSING | Cause.IDLE | Cause.SURPLUS:
                return of(Feature.ARRIVALS, 1.0), of(Feature.RUNNING, 1.0)

    def _grow(self, series: int) -> None:
        more = series - len(self._for)
        if more > 0:
            wider = ((0, more), (0, 0))
            self._for, self._against = np.pad(self._for, wider), np.pad(self._against, wider)
            self._active = np.pad(self._active, wider)
            self._since = np.pad(self._since, wider, constant_values=np.nan)
