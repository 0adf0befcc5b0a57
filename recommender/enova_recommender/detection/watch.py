"""The whole of live detection, from frames to verdicts and episodes: what the coordinator's child process runs.

It holds no clock: frames bring model time, and `close` is told it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.burn import BurnRate, BurnRule
from enova_recommender.detection.episodes import Episode, EpisodeBook, EpisodeChange, from_text, to_text
from enova_recommender.detection.evidence import BURN_OBJECTIVE, PEER_CLEAR, QUEUE_MIN, Signals, queued
from enova_recommender.detection.features import Feature, FeatureStep, Flags, Floats
from enova_recommender.detection.folding import FeatureFold, FoldSettings, Rejection
from enova_recommender.detection.groups import Groups
from enova_recommender.detection.lessons import Lesson, Lessons
from enova_recommender.detection.observation import FrameReading, Placement
from enova_recommender.detection.peers import SIBLINGS_MIN, PeerWatch, common_part
from enova_recommender.detection.progress import Progress, ProgressLimits, ProgressWatch
from enova_recommender.detection.residual import (
    OWN_MAX,
    MixedExpectation,
    Reference,
    ResidualWatch,
    Slowness,
    StepBatches,
    batch_gain,
    bias_limits,
    halved,
    longest_steps_s,
    step_batches,
)
from enova_recommender.detection.variant_times import RATE, Learnt, VariantTimes
from enova_recommender.detection.verdicts import Judge, Judgement
from enova_recommender.performance import StepTimes

Array = npt.NDArray[Any]     # Any: of figures or of names

STRAINED_SHARE = 0.9         # of the objective for tokens, that the load must explain
PREEMPTIONS_OVER = 0.01      # a second, of late: below it no gap is left that a preemption made
COLD_S = 30.0                # of serving: an engine compiles kernels and fills caches at first
# Fast enough for a queue that grows in minutes; a day's slow burn is for people, not for a controller.
BURN_RULES = (BurnRule(long_s=300.0, short_s=30.0, factor=10.0), BurnRule(long_s=1800.0, short_s=180.0, factor=4.0))
SAVED_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What one step came to."""

    step: FeatureStep
    batches: StepBatches       # that its engines computed, where that can be told: what step times are learnt from
    signals: Signals           # what verdicts were made of, by row
    judgement: Judgement
    changes: tuple[EpisodeChange, ...]


class FleetWatch:
    """Watches every placed replica. `place` again whenever the coordinator's placements change."""

    def __init__(
        self, settings: FoldSettings, *, limits: ProgressLimits | None = None, residual: ResidualWatch | None = None
    ) -> None:
        limits = limits or ProgressLimits()
        self.fold = FeatureFold(settings)
        self.book = EpisodeBook()
        self._progress = ProgressWatch(series=0, limits=limits)
        self._residual = residual or ResidualWatch(series=0)
        self._variants = VariantTimes()
        self._peers = PeerWatch(series=0)
        self._burn = BurnRate(series=0, objective=BURN_OBJECTIVE, rules=BURN_RULES)
        self._judge = Judge(series=0, limits=limits)
        self._groups = Groups.of((), {})
        self._lessons = Lessons()
        self._times: Mapping[str, StepTimes] = {}
        self._model: _Model | None = None
        self._well: Flags = np.zeros(0, dtype=bool)

    def place(self, placements: Iterable[Placement]) -> None:
        """Say which replicas there are, where, and with what settings."""
        for row in self.fold.place(placements):
            for each in (self._progress, self._residual, self._peers, self._burn, self._judge):
                each.forget(row)
        self._groups = Groups.of(self.fold.replicas, self.fold.placements)
        self._variants.place(self._groups.names)
        self._model = None

    def expect(self, times: Mapping[str, StepTimes]) -> None:
        """Say how long steps should take, by replica; of those without a model their own quiet steps tell."""
        self._times = dict(times)
        self._model = None

    def save(self) -> dict[str, Array]:
        """What outlives a restart, as arrays: what was learnt, what verdicts rest on, and the open episodes."""
        parts: dict[str, Mapping[str, Array]] = {
            "residual": self._residual.save(), "judge": self._judge.save(), "times": self._variants.save(),
        }  # fmt: skip
        return {
            "version": np.array([SAVED_VERSION]),
            "replicas": np.array(self.fold.replicas, dtype=str),
            "stalled_s": self._progress.stalled_s,
            "episodes": np.array([to_text(self.book.open)]),
            **{f"{part}/{name}": values for part, saved in parts.items() for name, values in saved.items()},
        }

    def restore(self, saved: Mapping[str, Array]) -> None:
        """Go on from what `save` returned; call it after `place`. Replicas that it does not know start anew.

        Raises ValueError for what another version saved.
        """
        if "version" not in saved or int(saved["version"][0]) != SAVED_VERSION:
            raise ValueError("what was saved is of another version")

        def part(name: str) -> dict[str, Array]:
            return {key.removeprefix(f"{name}/"): each for key, each in saved.items() if key.startswith(f"{name}/")}

        before = {name: row for row, name in enumerate(saved["replicas"].tolist()) if name}
        rows = [before.get(name, -1) for name in self.fold.replicas]
        self._residual = ResidualWatch.load(part("residual"), rows=rows)
        self._judge.restore(part("judge"), rows=rows)
        self._variants.restore(part("times"))
        self._progress.restore(saved["stalled_s"], rows=rows)
        self.adopt(from_text(str(saved["episodes"][0])))

    def adopt(self, episodes: Iterable[Episode]) -> None:
        """Go on with open episodes under their names: those of `save`, or such as were stored elsewhere since."""
        self.book.adopt(episodes)

    def add(self, frame: FrameReading, *, now_s: float) -> Rejection | None:
        """Take in one frame; the reason if it was left out."""
        return self.fold.add(frame, now_s=now_s)

    def tell_restarts(self, counts: Mapping[str, int]) -> None:
        """How often agents started engines again, by replica."""
        self.fold.tell_restarts(counts)

    def teach(self, lessons: Iterable[Lesson]) -> None:
        """Everything that people said of episodes, in place of what they had said before."""
        self._lessons = Lessons(lessons)

    def close(self, now_s: float) -> list[Watched]:
        """Judge every step that is over; after a stall of the caller, the newest."""
        return [self._judged(step) for step in self.fold.close(now_s)]

    def _judged(self, step: FeatureStep) -> Watched:
        step_s, count = self.fold.settings.step_s, len(step.values)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            batches = self._undisturbed(step, step_batches(step, self.fold.placements))
            model = self._modelled(step.replicas)
            progress = self._progress.update(step, step_s=step_s, longest_step_s=model.longest_s)
            self._residual.begin_anew((step.of(Feature.RESTARTS) >= 1.0) | (step.of(Feature.READY) == 0.0))
            quiet = (progress == Progress.BUSY) & np.pad(self._well, (0, max(0, count - len(self._well))))[:count]
            slowness, peers, rarity = self._timed(step, batches, model, quiet)
            signals = Signals(
                progress=progress,
                stalled_s=self._progress.stalled_s,
                slowness=slowness,
                peers=peers,
                batch_gain=self._gain(step, batches, model),
                strain=self._strained(step, batches, model),
                burn=self._burnt(step),
                rarity=rarity,
            )
        judgement = self._judge.update(step, signals, self.fold.placements, step_s=step_s)
        judgement = replace(judgement, verdicts=self._lessons.applied(judgement.verdicts, self.fold.placements))
        self._well = np.array([name not in judgement.verdicts for name in step.replicas], dtype=bool)
        self._well &= step.of(Feature.READY) == 1.0
        return Watched(
            step=step,
            batches=batches,
            signals=signals,
            judgement=judgement,
            changes=tuple(self.book.update(judgement, self.fold.placements)),
        )

    def _timed(
        self, step: FeatureStep, batches: StepBatches, model: _Model, quiet: Flags
    ) -> tuple[Slowness, Floats, Floats]:
        """How slow each replica is for its load, beside its siblings, and how rare that is."""
        given_s = model.expectation.expected_s(batches)
        learnt = self._variants.expected(batches, given_s, self._groups)
        # No model is so wrong: what exceeds it so far was slow already when it was learnt from.
        bounded = np.clip(learnt.expected_s, given_s * np.exp(-model.limits), given_s * np.exp(model.limits))
        expected_s = np.where(np.isfinite(given_s), bounded, learnt.expected_s)
        against = self._reference(learnt, expected_s, model)
        slowness = self._residual.update(batches, against, learn=quiet)
        common = common_part(self._residual.residual, self._groups, rows=slowness.alarm)
        ratio = slowness.ratio * np.exp(-common)
        slowness = replace(slowness, ratio=ratio, alarm=slowness.alarm & (ratio > slowness.threshold))
        peers = self._peers.update(np.log(batches.observed_s / expected_s), self._groups, doubt=learnt.doubt)
        calm = quiet & ~slowness.alarm & ~(peers >= PEER_CLEAR)
        self._peers.learn(calm)
        self._variants.learn(
            batches, given_s, self._residual.residual, self._groups, quiet=calm, number=step.number
        )
        rarity = np.full(len(ratio), np.nan)
        for row in np.flatnonzero(slowness.alarm).tolist():
            rarity[row] = self._rarity(step.replicas[row], float(ratio[row]), float(slowness.threshold[row]))
        return slowness, peers, rarity

    def _rarity(self, replica: str, ratio: float, threshold: float) -> float:
        placement = self.fold.placements.get(replica)
        tail = self._variants.tail(placement.variant) if placement else None
        if tail is None:
            return -math.log10(RATE) * math.log(ratio) / math.log(threshold)
        return -math.log10(max(float(tail.probability(math.log(ratio))), 1e-30))

    def _reference(self, learnt: Learnt, expected_s: Floats, model: _Model) -> Reference:
        """A replica without a learnt expectation may differ from its siblings by little, from its model by much."""
        median, known = self._groups.quantile(self._residual_bias(len(expected_s)), 0.5)
        centre = self._groups.by_row(np.where(known > SIBLINGS_MIN, median, np.nan))
        alone = learnt.is_learnt | np.isnan(centre)
        return Reference(
            expected_s=expected_s,
            centre=np.where(alone, 0.0, np.clip(centre, -model.limits, model.limits)),
            limit=np.where(learnt.is_learnt | ~alone, OWN_MAX, model.limits),
            is_learnt=learnt.is_learnt,
            level=learnt.level,
            doubt=learnt.doubt,
        )

    def _residual_bias(self, count: int) -> Floats:
        bias = self._residual.bias
        return np.pad(bias, (0, max(0, count - len(bias))), constant_values=np.nan)[:count]

    def _gain(self, step: FeatureStep, batches: StepBatches, model: _Model) -> Floats:
        """Only where somebody waits is it asked what a larger batch would bring."""
        waits = queued(step) >= QUEUE_MIN
        if not waits.any():
            return np.full(len(step.values), np.nan)
        return batch_gain(replace(batches, weights=np.where(waits, batches.weights, np.nan)), model.expectation)

    def _strained(self, step: FeatureStep, batches: StepBatches, model: _Model) -> Flags:
        """Where steps are longer than the objective for tokens, but would not be with half of the load."""
        objective_s = model.tpot_p95_s
        late = step.of(Feature.STEP_S) > objective_s
        if not late.any():
            return late
        now = replace(batches, weights=np.where(late, batches.weights, np.nan))
        now_s, half_s = (
            self._variants.expected(each, model.expectation.expected_s(each), self._groups).expected_s
            for each in (now, halved(now))
        )
        return np.asarray(late & (now_s > STRAINED_SHARE * objective_s) & (half_s <= objective_s))

    def _burnt(self, step: FeatureStep) -> Floats:
        """How many times beyond a rule's factor each replica's objectives burn; NaN where there are none."""
        self._burn.grow(len(step.values))
        started = step.of(Feature.FIRST_TOKENS) * step.of(Feature.SPAN_S)
        late = np.clip(step.of(Feature.LATE_SHARE), 0.0, 1.0) * started
        burn = self._burn.update(now_s=step.end_s, good=started - late, bad=late)
        over = burn.rates / np.array([rule.factor for rule in BURN_RULES])[:, None]
        return np.asarray(np.fmax.reduce(np.where(burn.complete[:, None], over, np.nan)))[: len(step.values)]

    def _undisturbed(self, step: FeatureStep, batches: StepBatches) -> StepBatches:
        """Without replicas that stood still, preempted or began of late: gaps then hold more than a usual step."""
        count = len(batches.observed_s)
        stalled = _padded(self._progress.stalled_s, count) > 0
        preempted = _padded(self._judge.preemptions, count) > PREEMPTIONS_OVER
        serves_s = self._progress.serves_s
        cold = np.pad(serves_s, (0, max(0, count - len(serves_s))), constant_values=np.inf)[:count] < COLD_S
        cold |= step.of(Feature.RESTARTS) > 0
        return replace(batches, observed_s=np.where(stalled | preempted | cold, np.nan, batches.observed_s))

    def _modelled(self, replicas: tuple[str, ...]) -> _Model:
        if self._model is None or len(self._model.limits) != len(replicas):
            times = [self._times.get(name) for name in replicas]
            placed = [self.fold.placements.get(name) for name in replicas]
            self._model = _Model(
                expectation=MixedExpectation.of(times),
                longest_s=longest_steps_s(times, placed),
                limits=bias_limits(times),
                tpot_p95_s=np.array([each.tpot_p95_s if each else math.nan for each in placed], dtype=np.float64),
            )
        return self._model


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What is expected of each row: step times, the longest step, how far the model may be off, the objective."""

    expectation: MixedExpectation
    longest_s: Floats
    limits: Floats
    tpot_p95_s: Floats


def _padded(values: Floats, count: int) -> Floats:
    return np.pad(values, (0, max(0, count - len(values))))[:count]
