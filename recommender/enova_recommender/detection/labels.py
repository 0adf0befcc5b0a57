"""What people say of episodes, and which they should be asked about first.

A label says of a run of steps whether its alarm was true, and perhaps what it was. The most useful ones are of episodes
that the detector is least sure of: chances near one half, where members disagree. `LabelHead` turns labels into a score
by logistic regression with a prior that believes the detector: with no label it is the detector's score, and each
label moves the weights of the evidence as far as it bears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from enova_recommender.detection.detector import FALSE_ALARM, TRUE_ALARM, UNKNOWN, Flags, Marks

Floats = npt.NDArray[np.float64]

ROUNDS = 20              # of Newton's method; it is done long before
LEVEL_SPREAD = 100.0     # of the prior of a head's intercept: free
SLOPE_MIN = 1e-9         # of the posterior, where it is done
QUARTERS = 4             # of a whole, in which weights are tried
PRECISION_SCALE = 0.03   # of average precision: weights that are so much worse count a third
PRIOR_STEPS = 20.0       # labelled as true, before which the default weights count more than theirs
SIMILARITY_MIN = 0.7     # cosine of contributions from which an episode is like another


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeLabel:
    """What was said of the steps from `first` to `last`."""

    first: int
    last: int
    true: bool
    cause: str | None = None


def marks_of(labels: Iterable[EpisodeLabel], *, first: int, steps: int) -> Marks:
    """The labels as one mark a step, of so many steps from `first` on; later labels count where they overlap."""
    marks = np.full(steps, UNKNOWN, dtype=np.int8)
    for label in labels:
        begin, end = max(0, label.first - first), max(0, label.last + 1 - first)
        marks[begin:end] = TRUE_ALARM if label.true else FALSE_ALARM
    return marks


def chance_of_true(surprises: npt.ArrayLike, *, rate: float) -> Floats:
    """The chance that an alarm is true: its odds are how much rarer than the alarm rate normal time scores as high."""
    over = np.asarray(surprises, dtype=np.float64) + np.log10(rate)
    return np.asarray(expit(over * np.log(10.0)))


def uncertainty(chances: npt.ArrayLike) -> Floats:
    """How little is known of each, in bits: 1 at one half, 0 where it is sure. NaN, of which nothing is known, is 1."""
    chance = np.clip(np.nan_to_num(np.asarray(chances, dtype=np.float64), nan=0.5), 1e-12, 1.0 - 1e-12)
    return np.asarray(-(chance * np.log2(chance) + (1.0 - chance) * np.log2(1.0 - chance)))


def most_uncertain_first(names: Sequence[str], chances: npt.ArrayLike) -> list[str]:
    """Names in the order in which to ask; equal ones by name."""
    unsure = uncertainty(chances).round(9).tolist()
    return [names[index] for index in sorted(range(len(names)), key=lambda each: (-unsure[each], names[each]))]


def lattice(parts: int) -> Floats:
    """Weights of so many parts in quarters: all ways to share a whole among them."""
    cuts = np.stack(np.meshgrid(*[np.arange(QUARTERS + 1)] * parts, indexing="ij"), axis=-1).reshape(-1, parts)
    return np.asarray(cuts[cuts.sum(axis=1) == QUARTERS] / QUARTERS)


def average_precision(scores: Floats, true: Flags) -> float:
    """Mean precision at each true step, in falling order of scores. Needs a true step."""
    hits = true[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def weights_by_labels(score: Callable[[Floats], Floats], true: Flags, default: Floats) -> Floats:
    """The weights under which true alarms come before all other steps, as a mean over those that do well.

    `score` gives the scores of the steps under some weights. Few labels tell weights apart badly: the mean is over all
    of a lattice and the default, by how close each comes to the best, and the default counts as PRIOR_STEPS true ones.
    """
    choices = np.vstack((default, lattice(len(default))))
    worth = np.array([average_precision(score(weights), true) for weights in choices])
    chances = np.exp((worth - worth.max()) / PRECISION_SCALE)
    trust = true.sum() / (true.sum() + PRIOR_STEPS)
    return np.asarray(trust * (chances @ choices / chances.sum()) + (1.0 - trust) * default)


class LabelHead:
    """Logistic regression on rows of evidence, of which the first column is the detector's own score.

    Weights have a normal prior: 1 for the score, 0 for all other evidence. The level, by default, moves freely.
    """

    def __init__(self, *, spread: float, level_spread: float = LEVEL_SPREAD) -> None:
        self._spread = spread              # of the prior, of each weight
        self._level_spread = level_spread  # of the prior of the intercept, about 0
        self._weights: Floats = np.empty(0)

    @property
    def taught(self) -> bool:
        """Whether it has seen a label."""
        return bool(len(self._weights))

    def fit(self, evidence: Floats, true: Flags, counts: Floats) -> None:
        """Learn from rows, each of which counts so much."""
        columns = evidence.shape[1]
        rows = np.column_stack((evidence, np.ones(len(evidence))))
        centre = np.zeros(columns + 1)
        centre[0] = 1.0
        precision = np.full(columns + 1, 1.0 / self._spread**2)
        precision[-1] = 1.0 / self._level_spread**2
        weights = centre.copy()
        # Scores of true and normal rows lie far apart: the intercept starts between them.
        weights[-1] = -float(np.median(evidence[~true, 0])) if (~true).any() else 0.0
        for _ in range(ROUNDS):
            chance = expit(rows @ weights)
            slope = rows.T @ (counts * (chance - true)) + precision * (weights - centre)
            if np.abs(slope).max() < SLOPE_MIN:
                break
            bend = (rows * (counts * chance * (1.0 - chance))[:, None]).T @ rows + np.diag(precision)
            step = np.linalg.solve(bend, slope)
            weights = weights - step * min(1.0, 2.0 / max(1e-12, float(np.abs(step).max())))
        self._weights = weights

    def score(self, evidence: Floats) -> Floats:
        """The log odds of each row; the detector's own score if nothing was learnt."""
        if not self.taught:
            return evidence[:, 0]
        return np.asarray(evidence @ self._weights[:-1] + self._weights[-1])

    def save(self) -> dict[str, Floats]:
        """Everything that it knows, as arrays."""
        return {"spread": np.array([self._spread, self._level_spread]), "weights": self._weights.copy()}

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> LabelHead:
        """What `save` returned, as it was."""
        spread, level_spread = (float(each) for each in saved["spread"])
        loaded = cls(spread=spread, level_spread=level_spread)
        loaded._weights = saved["weights"].copy()
        return loaded


class CauseBook:
    """What people said that episodes were, by what contributed to them."""

    def __init__(self) -> None:
        self._known: list[tuple[Floats, str]] = []

    def remember(self, contributions: Floats, cause: str) -> None:
        """Keep one episode's contributions by feature, and its cause."""
        length = float(np.linalg.norm(contributions))
        if length > 0:
            self._known.append((contributions / length, cause))

    def likely(self, contributions: Floats) -> str | None:
        """The cause of the remembered episode that is most like this one; None if none is."""
        length = float(np.linalg.norm(contributions))
        if not self._known or length == 0:
            return None
        alike = [float(known @ contributions) / length for known, _ in self._known]
        best = int(np.argmax(alike))
        return self._known[best][1] if alike[best] >= SIMILARITY_MIN else None
