"""The whole of live detection, from frames to verdicts and episodes: what the coordinator's child process runs.

It holds no clock: frames bring model time, and `close` is told it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.episodes import EpisodeBook, EpisodeChange
from enova_recommender.detection.evidence import Signals
from enova_recommender.detection.features import Feature, FeatureStep, Floats
from enova_recommender.detection.folding import FeatureFold, FoldSettings, Rejection
from enova_recommender.detection.observation import FrameReading, Placement
from enova_recommender.detection.peers import PeerWatch
from enova_recommender.detection.progress import Progress, ProgressLimits, ProgressWatch
from enova_recommender.detection.residual import (
    Expectation,
    MixedExpectation,
    ResidualWatch,
    StepBatches,
    batch_gain,
    longest_steps_s,
    step_batches,
)
from enova_recommender.detection.verdicts import Judge, Judgement
from enova_recommender.performance import StepTimes

Array = npt.NDArray[Any]     # Any: of figures or of names

PREEMPTIONS_OVER = 0.01      # a second, of late: below it no gap is left that a preemption made


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What one step came to."""

    step: FeatureStep
    batches: StepBatches       # that its engines computed, where that can be told: what step times are learnt from
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
        self._peers = PeerWatch(series=0)
        self._judge = Judge(series=0, limits=limits)
        self._expectation: Expectation | None = None
        self._times: Mapping[str, StepTimes] = {}
        self._longest_s: Floats = np.empty(0)
        self._well: Floats = np.empty(0)

    def place(self, placements: Iterable[Placement]) -> None:
        """Say which replicas there are, where, and with what settings."""
        before = self.fold.replicas
        self.fold.place(placements)
        after = self.fold.replicas
        for row, name in enumerate(before):
            if row >= len(after) or after[row] != name:
                self._forget(row)
        self._expectation = None

    def expect(self, times: Mapping[str, StepTimes]) -> None:
        """Say how long steps should take, by replica; those without a model are judged by their siblings."""
        self._times = dict(times)
        self._expectation = None

    def save(self) -> dict[str, Array]:
        """What outlives a restart, as arrays: how far each replica's steps are from the model of them."""
        return {"replicas": np.array(self.fold.replicas, dtype=str), **self._residual.save()}

    def restore(self, saved: Mapping[str, Array]) -> None:
        """Go on from what `save` returned; call it after `place`. Replicas that it does not know start anew."""
        before = {name: row for row, name in enumerate(saved["replicas"].tolist())}
        rows = [before.get(name, -1) for name in self.fold.replicas]
        self._residual = ResidualWatch.load({key: saved[key] for key in saved if key != "replicas"}, rows=rows)

    def add(self, frame: FrameReading, *, now_s: float) -> Rejection | None:
        """Take in one frame; the reason if it was left out."""
        return self.fold.add(frame, now_s=now_s)

    def close(self, now_s: float) -> list[Watched]:
        """Judge every step that is over."""
        return [self._judged(step) for step in self.fold.close(now_s)]

    def _judged(self, step: FeatureStep) -> Watched:
        placements, step_s = self.fold.placements, self.fold.settings.step_s
        groups = [placements[name].variant if name in placements else "" for name in step.replicas]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            batches = self._undisturbed(step_batches(step, placements))
            expectation = self._expected(step.replicas)
            progress = self._progress.update(step, step_s=step_s, longest_step_s=self._longest_s)
            quiet = (progress == Progress.BUSY) & (_padded(self._well, len(step.values)) > 0)
            signals = Signals(
                progress=progress,
                stalled_s=self._progress.stalled_s,
                slowness=self._residual.update(batches, expectation, learn=quiet),
                peers=self._peers.update(step, groups),
                batch_gain=batch_gain(batches, expectation),
            )
        judgement = self._judge.update(step, signals, placements, step_s=step_s)
        well = np.array([name not in judgement.verdicts for name in step.replicas], dtype=float)
        self._well = well * (step.of(Feature.READY) == 1.0)
        return Watched(
            step=step,
            batches=batches,
            judgement=judgement,
            changes=tuple(self.book.update(judgement, placements)),
        )

    def _undisturbed(self, batches: StepBatches) -> StepBatches:
        """Without replicas that stood still or preempted of late: gaps between tokens then hold more than a step."""
        count = len(batches.observed_s)
        stalled = _padded(self._progress.stalled_s, count) > 0
        preempted = _padded(self._judge.preemptions, count) > PREEMPTIONS_OVER
        return replace(batches, observed_s=np.where(stalled | preempted, np.nan, batches.observed_s))

    def _expected(self, replicas: tuple[str, ...]) -> Expectation:
        if self._expectation is None:
            times = [self._times.get(name) for name in replicas]
            self._expectation = MixedExpectation.of(times)
            self._longest_s = longest_steps_s(times, [self.fold.placements.get(name) for name in replicas])
        return self._expectation

    def _forget(self, row: int) -> None:
        for each in (self._progress, self._residual, self._peers, self._judge):
            each.forget(row)


def _padded(values: Floats, count: int) -> Floats:
    return np.pad(values, (0, max(0, count - len(values))))[:count]
