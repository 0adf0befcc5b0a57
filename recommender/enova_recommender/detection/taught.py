"""A detector that people teach: an ensemble's score, moved by what was said of its alarms.

Before any label it scores as its ensemble does, on a log scale. Each label is learnt twice: the auto-encoder goes on
training with it, and `LabelHead` weighs the surprises of single features against the ensemble's score, so that what
false alarms have in common counts less and what true ones have in common counts more. An episode counts as much
whether it is long or short.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.detector import (
    FALSE_ALARM,
    TRUE_ALARM,
    Flags,
    Marks,
    NotFitted,
    check_features,
    measured,
    nested,
    part_of,
    thinned,
)
from enova_recommender.detection.ensemble import EnsembleDetector
from enova_recommender.detection.labels import LabelHead
from enova_recommender.detection.learned import VaeDetector
from enova_recommender.detection.surprise import Surprise

Floats = npt.NDArray[np.float64]

NORMAL_MAX = 1000        # rows of normal time that labels are weighed against
MARKED_MAX = 2000        # newest marked rows that are kept
PRIOR_SPREAD = 1.0       # of the weights of evidence, before labels
EPISODE_COUNT = 20.0     # rows that an episode counts for


class TaughtDetector:
    """An ensemble, an auto-encoder beside it, and labels."""

    name = "taught"

    def __init__(self, ensemble: EnsembleDetector | None = None, learned: VaeDetector | None = None) -> None:
        self._ensemble = ensemble or EnsembleDetector()
        self._learned = learned or VaeDetector()
        self._surprise = Surprise()
        self._head = LabelHead(spread=PRIOR_SPREAD)
        self._features = 0
        self._steps = 0
        self._normal: Floats = np.empty((0, 0))
        self._normal_at = np.empty(0, dtype=np.intp)
        self._marked: Floats = np.empty((0, 0))
        self._true: Flags = np.empty(0, dtype=np.bool_)
        self._counts: Floats = np.empty(0)

    @property
    def held_out(self) -> Floats:
        """Scores of steps that neither the ensemble nor the auto-encoder had learnt."""
        scores = np.full(self._steps, np.nan)
        scores[self._normal_at] = self._head.score(self._normal)
        return scores

    def fit(self, history: Floats, mask: Flags | None = None, *, first: int = 0) -> None:
        """Let both learn; labels of before are forgotten."""
        known = measured(history, mask)
        self._ensemble.fit(known, first=first)
        self._learned.fit(known, first=first)
        self._surprise.fit(self._learned.held_out)
        self._features, self._steps = history.shape[1], len(history)
        of_learned, of_ensemble = self._learned.held_out, self._ensemble.held_out
        self._normal_at = thinned(np.flatnonzero(np.isfinite(of_learned) & np.isfinite(of_ensemble)), NORMAL_MAX)
        surprises = self._learned.evidence(known)[self._normal_at]
        at = self._normal_at
        self._normal = self._joined(of_ensemble[at], self._surprise.of(of_learned[at]), surprises)
        self._head = LabelHead(spread=PRIOR_SPREAD)
        self._marked = np.empty((0, self._normal.shape[1]))
        self._true, self._counts = np.empty(0, dtype=np.bool_), np.empty(0)

    def learn(self, values: Floats, marks: Marks, *, first: int = 0) -> None:
        """Take in what was said of steps of one series."""
        check_features(values, self._features)
        known = np.flatnonzero((marks == TRUE_ALARM) | (marks == FALSE_ALARM))
        if not len(known):
            return
        self._learned.learn(values, marks, first=first)
        self._surprise.fit(self._learned.held_out)
        self._normal[:, 1] = self._surprise.of(self._learned.held_out)[self._normal_at]
        evidence = self._evidence(values, first)[known]
        counts = np.zeros(len(known))
        breaks = np.flatnonzero((np.diff(known) > 1) | (np.diff(marks[known]) != 0)) + 1
        for run in np.split(np.arange(len(known)), breaks):
            counts[run] = EPISODE_COUNT / len(run)
        self._marked = np.concatenate((self._marked, evidence))[-MARKED_MAX:]
        self._true = np.concatenate((self._true, marks[known] == TRUE_ALARM))[-MARKED_MAX:]
        self._counts = np.concatenate((self._counts, counts))[-MARKED_MAX:]
        self._head.fit(
            np.concatenate((self._normal, self._marked)),
            np.concatenate((np.zeros(len(self._normal), dtype=np.bool_), self._true)),
            np.concatenate((np.ones(len(self._normal)), self._counts)),
        )

    def score(self, values: Floats, *, first: int = 0) -> Floats:
        """One score a step of one series."""
        check_features(values, self._features)
        return self._told(self._evidence(values, first))

    def update(self, values: Floats, *, step: int = 0) -> Floats:
        """One score for each series."""
        check_features(values, self._features)
        scores = self._ensemble.update(values, step=step)
        of_learned = self._surprise.of(self._learned.update(values, step=step))
        return self._told(self._joined(scores, of_learned, self._learned.evidence_now()))

    def contributions(self) -> Floats:
        """Shares of the features, as the ensemble saw them."""
        return self._ensemble.contributions()

    def save(self) -> dict[str, Floats]:
        """Everything that it knows, as arrays."""
        if not self._features:
            raise NotFitted("fit the detector first")
        own = {
            "sizes": np.array([self._features, self._steps], dtype=np.float64), "normal": self._normal.copy(),
            "normal_at": self._normal_at.astype(np.float64), "marked": self._marked.copy(),
            "true": self._true.astype(np.float64), "counts": self._counts.copy(),
        }  # fmt: skip
        return {**own, **nested({
            "ensemble": self._ensemble.save(), "learned": self._learned.save(), "surprise": self._surprise.save(),
            "head": self._head.save(),
        })}  # fmt: skip

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> TaughtDetector:
        """What `save` returned, as it was."""
        loaded = cls(EnsembleDetector.load(part_of(saved, "ensemble")), VaeDetector.load(part_of(saved, "learned")))
        loaded._surprise = Surprise.load(part_of(saved, "surprise"))
        loaded._head = LabelHead.load(part_of(saved, "head"))
        loaded._features, loaded._steps = (int(size) for size in saved["sizes"])
        loaded._normal, loaded._normal_at = saved["normal"].copy(), saved["normal_at"].astype(np.intp)
        loaded._marked, loaded._true = saved["marked"].copy(), saved["true"] > 0
        loaded._counts = saved["counts"].copy()
        return loaded

    def _evidence(self, values: Floats, first: int) -> Floats:
        of_learned = self._surprise.of(self._learned.score(values, first=first))
        return self._joined(self._ensemble.score(values, first=first), of_learned, self._learned.evidence(values))

    @staticmethod
    def _joined(scores: Floats, of_learned: Floats, surprises: Floats) -> Floats:
        """The ensemble's score first, on a log scale; then that of the auto-encoder, then the features' surprises."""
        return np.column_stack((np.log1p(scores), of_learned, surprises))

    def _told(self, evidence: Floats) -> Floats:
        nothing = np.isnan(evidence[:, 0])
        return np.where(nothing, np.nan, self._head.score(np.nan_to_num(evidence)))
