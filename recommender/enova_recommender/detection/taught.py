"""A detector that people teach: an ensemble, an auto-encoder, and what was said of their alarms.

Before any label it scores as its ensemble does, on a log scale. Labels are learnt four times. Members that put true
alarms before the other steps come to weigh more. What was a false alarm is learnt as normal time. The auto-encoder goes
on training, with the true alarms as anomalies. Once there are labels of both kinds, `LabelHead` weighs the surprises of
single features against the ensemble's score, so that what false alarms have in common counts less and what true ones
have in common counts more; an episode counts as much whether it is long or short. With true alarms alone it is left
out: that they are strange, the detector knew.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.detector import (
    FALSE_ALARM,
    TRUE_ALARM,
    UNKNOWN,
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
from enova_recommender.detection.labels import LabelHead, weights_by_labels
from enova_recommender.detection.learned import VaeDetector
from enova_recommender.detection.surprise import Surprise

Floats = npt.NDArray[np.float64]

NORMAL_MAX = 1000        # rows of normal time that labels are weighed against
MARKED_MAX = 2000        # newest marked rows that are kept
PAST_MAX = 50_000        # newest steps that are kept to learn anew from
PRIOR_SPREAD = 0.3       # of the weights of evidence, before labels
EPISODE_COUNT = 20.0     # rows that an episode counts for


class TaughtDetector:
    """An ensemble, an auto-encoder beside it, and labels."""

    name = "taught"

    def __init__(self, ensemble: EnsembleDetector | None = None, learned: VaeDetector | None = None) -> None:
        self._ensemble = ensemble or EnsembleDetector()
        self._learned = learned or VaeDetector()
        self._surprise = Surprise()
        self._head = LabelHead(spread=PRIOR_SPREAD)
        self._past: Floats = np.empty((0, 0))      # that the ensemble learnt from; what it must not learn is NaN
        self._first = 0                            # number of its first step
        self._marked: Floats = np.empty((0, 0))
        self._true: Flags = np.empty(0, dtype=np.bool_)
        self._counts: Floats = np.empty(0)

    @property
    def held_out(self) -> Floats:
        """Scores of the steps that the ensemble held out."""
        held = self._ensemble.held_out
        if not self._head.taught:
            return np.log1p(held)
        scores = np.full(len(held), np.nan)
        at, evidence = self._normal()
        scores[at] = self._head.score(evidence)
        return scores

    def fit(self, history: Floats, mask: Flags | None = None, *, first: int = 0) -> None:
        """Let both learn; labels of before are forgotten."""
        known = measured(history, mask)
        self._ensemble.fit(known, first=first)
        self._learned.fit(known, first=first)
        self._surprise.fit(self._learned.held_out)
        self._past, self._first = known, first
        self._head = LabelHead(spread=PRIOR_SPREAD)
        self._marked = np.empty((0, 2 + 2 * known.shape[1]))
        self._true, self._counts = np.empty(0, dtype=np.bool_), np.empty(0)

    def learn(self, values: Floats, marks: Marks, *, first: int = 0) -> None:
        """Take in what was said of steps of one series, the past of which is where it stands.

        Steps that come before the end of what it has learnt are marked, but not learnt again as normal time.
        """
        check_features(values, self._past.shape[1])
        known = np.flatnonzero(marks != UNKNOWN)
        if not len(known):
            return
        if (marks == FALSE_ALARM).any():
            self._extend(np.where((marks == FALSE_ALARM)[:, None], values, np.nan), first)
            self._ensemble.fit(self._past, first=self._first)
        if (marks == TRUE_ALARM).any():
            self._balance(values, marks == TRUE_ALARM, first)
        self._learned.learn(values, marks, first=first)
        self._surprise.fit(self._learned.held_out)
        counts = np.zeros(len(known))
        breaks = np.flatnonzero((np.diff(known) > 1) | (np.diff(marks[known]) != 0)) + 1
        for run in np.split(np.arange(len(known)), breaks):
            counts[run] = EPISODE_COUNT / len(run)
        self._marked = np.concatenate((self._marked, self._evidence(values, first)[known]))[-MARKED_MAX:]
        self._true = np.concatenate((self._true, marks[known] == TRUE_ALARM))[-MARKED_MAX:]
        self._counts = np.concatenate((self._counts, counts))[-MARKED_MAX:]
        if self._true.any() and not self._true.all():
            self._weigh()

    def score(self, values: Floats, *, first: int = 0) -> Floats:
        """One score a step of one series."""
        check_features(values, self._past.shape[1])
        if not self._head.taught:
            return np.log1p(self._ensemble.score(values, first=first))
        return self._told(self._evidence(values, first))

    def update(self, values: Floats, *, step: int = 0) -> Floats:
        """One score for each series."""
        check_features(values, self._past.shape[1])
        scores = self._ensemble.update(values, step=step)
        of_learned = self._surprise.of(self._learned.update(values, step=step))
        return self._told(self._joined(scores, of_learned, self._learned.evidence_now()))

    def contributions(self) -> Floats:
        """Shares of the features, as the ensemble saw them."""
        return self._ensemble.contributions()

    def save(self) -> dict[str, Floats]:
        """Everything that it knows, as arrays."""
        if not self._past.size:
            raise NotFitted("fit the detector first")
        own = {
            "past": self._past.copy(), "first": np.array([self._first], dtype=np.float64),
            "marked": self._marked.copy(), "true": self._true.astype(np.float64), "counts": self._counts.copy(),
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
        loaded._past, loaded._first = saved["past"].copy(), int(saved["first"][0])
        loaded._marked, loaded._true = saved["marked"].copy(), saved["true"] > 0
        loaded._counts = saved["counts"].copy()
        return loaded

    def _extend(self, values: Floats, first: int) -> None:
        """Append steps to the past; a gap before them is missing, and steps that overlap stay as they were."""
        end = self._first + len(self._past)
        gap = np.full((min(PAST_MAX, max(0, first - end)), values.shape[1]), np.nan)
        whole = np.concatenate((self._past, gap, values[max(0, end - first) :]))
        self._first += max(0, len(whole) - PAST_MAX)
        self._past = whole[-PAST_MAX:]

    def _balance(self, values: Floats, true: Flags, first: int) -> None:
        """Let members weigh as true alarms tell."""
        surprises = self._ensemble.surprises(values, first=first)
        default = np.array(list(self._ensemble.weights.values()))
        self._ensemble = self._ensemble.reweighed(weights_by_labels(
            lambda weights: np.nan_to_num(self._ensemble.weighed(surprises, weights.tolist())), true, default
        ))  # fmt: skip

    def _weigh(self) -> None:
        """Learn what true and false alarms differ in."""
        _, normal = self._normal()
        self._head.fit(
            np.concatenate((normal, self._marked)),
            np.concatenate((np.zeros(len(normal), dtype=np.bool_), self._true)),
            np.concatenate((np.ones(len(normal)), self._counts)),
        )

    def _normal(self) -> tuple[npt.NDArray[np.intp], Floats]:
        """Steps that the ensemble held out, and their evidence."""
        held = self._ensemble.held_out
        at = thinned(np.flatnonzero(np.isfinite(held)), NORMAL_MAX)
        of_learned = self._surprise.of(self._learned.score(self._past, first=self._first))
        evidence = self._joined(held[at], of_learned[at], self._learned.evidence(self._past)[at])
        return at, np.nan_to_num(evidence)

    def _evidence(self, values: Floats, first: int) -> Floats:
        of_learned = self._surprise.of(self._learned.score(values, first=first))
        return self._joined(self._ensemble.score(values, first=first), of_learned, self._learned.evidence(values))

    def _joined(self, scores: Floats, of_learned: Floats, surprises: Floats) -> Floats:
        """The ensemble's score on a log scale first, the auto-encoder's, then how low and how high features are."""
        return np.column_stack((np.log1p(scores), of_learned, surprises[:, : 2 * self._past.shape[1]]))

    def _told(self, evidence: Floats) -> Floats:
        nothing = np.isnan(evidence[:, 0])
        return np.where(nothing, np.nan, self._head.score(np.nan_to_num(evidence)))
