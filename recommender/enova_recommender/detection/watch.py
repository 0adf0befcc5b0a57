"""The whole of live detection, from frames to verdicts and episodes: what the coordinator's child process runs.

It holds no clock: frames bring model time, and `close` is told it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

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
    batch_gain,
    step_batches,
)
from enova_recommender.detection.verdicts import Judge, Judgement
from enova_recommender.performance import StepTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What one step came to."""

    step: FeatureStep
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
            batches = step_batches(step, placements)
            expectation = self._expected(step.replicas)
            progress = self._progress.update(step, step_s=step_s, longest_step_s=None)
            quiet = (progress == Progress.BUSY) & (self._wellness(len(step.values)) > 0)
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
            step=step, judgement=judgement, changes=tuple(self.book.update(judgement, placements))
        )

    def _expected(self, replicas: tuple[str, ...]) -> Expectation:
        if self._expectation is None:
            self._expectation = MixedExpectation.of([self._times.get(name) for name in replicas])
        return self._expectation

    def _wellness(self, series: int) -> Floats:
        return np.pad(self._well, (0, max(0, series - len(self._well))))[:series]

    def _forget(self, row: int) -> None:
        for each in (self._progress, self._residual, self._peers, self._judge):
            each.forget(row)
