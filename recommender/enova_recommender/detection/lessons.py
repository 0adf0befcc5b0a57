"""What people said of episodes, and what that changes in verdicts from then on.

Theory of operation. A label tells of the verdicts that an episode was made of whether they were right. For each
deployment and cause that has labels, `LabelHead` weighs a verdict's score and how far its figures are beyond their
thresholds: with no label it believes the detector, and each label moves it as far as it bears, mostly by the score from
which on an alarm is true. A verdict that is more likely false than true is not told, and one that may well be false
asks for nothing that ends a process. What people called an episode, where that was another cause, is proposed for
those with like figures (`CauseBook`).

Labels speak of judgements, not of facts: that nothing is heard of a replica, that its engine restarts again and again
or does not move is told whatever was said before. And a label never makes a suggestion destructive that was not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from enova_recommender.detection.causes import DESTRUCTIVE, RULES, Cause, SuggestedAction
from enova_recommender.detection.labels import CauseBook, LabelHead
from enova_recommender.detection.observation import Placement
from enova_recommender.detection.verdicts import SCORE_DECADES, THRESHOLD_RATE, Verdict

Floats = npt.NDArray[np.float64]

FACTS = frozenset({Cause.MISSING, Cause.CRASH_LOOP, Cause.HUNG})  # no label speaks against these, or for them
LESSONS_MAX = 1_000            # the newest
LABEL_COUNT = 2.0              # rows that a label counts for
SCORE_SPREAD = 0.15            # of the prior of weights: one label does not turn what the score means
LEVEL_SPREAD = 3.0             # in natural logarithms of odds: but it moves the level by some decades
FALSE_BELOW = 0.5              # chance of being true
ACTS_FROM = 0.8                # below it nothing destructive is suggested
WEIGHT_MIN, WEIGHT_MAX = 0.01, 100.0  # of a figure over its threshold, that are told apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What was said of one episode: whether it was true, and perhaps what it was.

    `weights`: how far its figures were beyond their thresholds, by feature.
    """

    deployments: frozenset[str]
    causes: tuple[Cause, ...]
    is_true: bool
    score: float
    weights: Mapping[str, float]
    said: Cause | None = None


class Lessons:
    """Everything that people said, as it bears on verdicts."""

    def __init__(self, lessons: Iterable[Lesson] = ()) -> None:
        found: dict[tuple[str, Cause], list[Lesson]] = {}
        for lesson in list(lessons)[-LESSONS_MAX:]:
            for deployment in sorted(lesson.deployments):
                for cause in lesson.causes:
                    if cause not in FACTS:
                        found.setdefault((deployment, cause), []).append(lesson)
        self._heads = {key: _Head(cause=key[1], lessons=each) for key, each in found.items()}

    def applied(self, verdicts: Mapping[str, Verdict], placements: Mapping[str, Placement]) -> Mapping[str, Verdict]:
        """The verdicts of a step, by replica, as labels let them stand."""
        if not self._heads:
            return verdicts
        heard = ((name, self._heard(each, placements.get(name))) for name, each in verdicts.items())
        return {name: each for name, each in heard if each is not None}

    def _heard(self, verdict: Verdict, placement: Placement | None) -> Verdict | None:
        if placement is None or verdict.cause is None:
            return verdict
        head = self._heads.get((placement.deployment, verdict.cause))
        return verdict if head is None else head.heard(verdict)


class _Head:
    """What was said of one cause in one deployment."""

    def __init__(self, *, cause: Cause, lessons: list[Lesson]) -> None:
        self._features = sorted({name for each in lessons for name in each.weights})
        self._head = LabelHead(spread=SCORE_SPREAD, level_spread=LEVEL_SPREAD)
        self._causes = CauseBook()
        rows = np.array([self._row(each.score, each.weights) for each in lessons])
        true = np.array([each.is_true for each in lessons], dtype=np.bool_)
        self._head.fit(rows, true, np.full(len(lessons), LABEL_COUNT))
        for each in reversed(lessons):     # of equal ones the newest counts
            if each.is_true:
                self._causes.remember(self._figures(each.weights), (each.said or cause).name)

    def heard(self, verdict: Verdict) -> Verdict | None:
        """The verdict as labels let it stand; None if it is more likely false than true."""
        weights = {each.feature: each.weight for each in verdict.contributions}
        chance = float(expit(self._head.score(self._row(verdict.score, weights)[None, :])[0]))
        if chance < FALSE_BELOW:
            return None
        doubtful = chance < ACTS_FROM and verdict.action in DESTRUCTIVE
        verdict = replace(
            verdict,
            confidence=min(verdict.confidence, chance),
            action=SuggestedAction.INSPECT if doubtful else verdict.action,
        )
        said = self._causes.likely(self._figures(weights))
        return verdict if said is None else _called(verdict, Cause[said])

    def _row(self, score: float, weights: Mapping[str, float]) -> Floats:
        """The odds that the score stands for, and each figure's excess, as natural logarithms."""
        odds = (SCORE_DECADES * score + math.log10(THRESHOLD_RATE)) * math.log(10.0)
        return np.array([odds, *np.log(np.clip([weights.get(name, 1.0) for name in self._features], WEIGHT_MIN,
                                               WEIGHT_MAX))])  # fmt: skip

    def _figures(self, weights: Mapping[str, float]) -> Floats:
        return np.clip([weights.get(name, 0.0) for name in self._features], 0.0, WEIGHT_MAX)


def _called(verdict: Verdict, cause: Cause) -> Verdict:
    """The verdict under the name that people gave to its like."""
    if verdict.cause is None or cause is verdict.cause or {cause, verdict.cause} & FACTS:
        return verdict
    rule = RULES[cause]
    action = rule.action
    if action in DESTRUCTIVE and verdict.action not in DESTRUCTIVE:
        action = SuggestedAction.INSPECT
    return replace(verdict, cause=cause, kind=rule.kind, action=action)
