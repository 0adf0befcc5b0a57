"""From measured steps to one score a step: scale, context, scorers, and what they say together.

Each scorer's distances are divided by what normal time exceeds once in a hundred steps, on blocks of the history that
the scorer did not learn from, so that scorers count alike whatever their units. Their mean is the score: about 1 where
normal time ends. `tail` turns it into a chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.context import WEIGHTS, Context
from enova_recommender.detection.extremes import Tail, fit_tail
from enova_recommender.detection.nearest import Nearest
from enova_recommender.detection.scaling import RobustScale
from enova_recommender.detection.scorer import ROWS_MIN, Scorer
from enova_recommender.detection.subspace import Subspace

Floats = npt.NDArray[np.float64]

STEPS_MIN = 4 * ROWS_MIN     # of history; fewer cannot be both learnt from and judged by
BLOCKS = 10                  # into which the history is cut: every second one is held out
UNIT_QUANTILE = 0.99         # of held-out distances: the unit of a scorer
UNIT_MIN = 1e-6              # for a history that never moved
RATIO_MAX = 20.0             # units beyond which a scorer has said what it can say
SCORERS: tuple[type[Scorer], ...] = (Nearest, Subspace)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one scorer adds to a score, in its unit."""

    name: str
    ratio: float


class NotFitted(RuntimeError):
    """A detector was asked before it had learnt."""


class ContextDetector:
    """Scores steps of many series with one model. Deterministic; what is missing is filled from each series' past.

    A step of which nothing was ever measured has the score NaN.
    """

    def __init__(self, scorers: Sequence[Scorer] | None = None, *, weights: tuple[float, ...] = WEIGHTS) -> None:
        self._scorers = tuple(scorers) if scorers is not None else (Nearest(), Subspace())
        self._weights = weights
        self._units = np.ones(len(self._scorers))
        self._scale = RobustScale()
        self._features = 0
        self._context: Context | None = None
        self._rows: Floats = np.empty((0, 0))
        self._tail: Tail | None = None

    @property
    def tail(self) -> Tail:
        """The law of high scores in normal time."""
        if self._tail is None:
            raise NotFitted("fit the detector first")
        return self._tail

    def fit(self, history: Floats) -> None:
        """Learn from the steps of one series (steps by features, NaN where missing), most of them normal.

        Raises ValueError for fewer than STEPS_MIN steps of which something was measured.
        """
        self._features = history.shape[1]
        self._scale.fit(history)
        rows = self._fresh().extend(self._scale.scaled(history))
        rows = np.nan_to_num(rows[~np.isnan(rows).all(axis=1)])
        if len(rows) < STEPS_MIN:
            raise ValueError(f"history: at least {STEPS_MIN} steps are needed, not {len(rows)}")
        block = np.arange(len(rows)) * BLOCKS // len(rows)
        learnt, held = rows[block % 2 == 0], rows[block % 2 == 1]
        for index, scorer in enumerate(self._scorers):
            scorer.fit(learnt)
            self._units[index] = max(UNIT_MIN, float(np.quantile(scorer.distances(held), UNIT_QUANTILE)))
        self._tail = fit_tail(self._together(held))
        for scorer in self._scorers:  # what was held out is normal as well
            scorer.fit(rows)
        self._context = None

    def score(self, values: Floats) -> Floats:
        """One score a step of one series, as `update` would give them from a fresh start; nothing changes."""
        self._check(values)
        return self._together(self._fresh().extend(self._scale.scaled(values)))

    def update(self, values: Floats) -> Floats:
        """One score for each series at their next step, series by features; the first call says how many there are."""
        self._check(values)
        if self._context is None:
            self._context = Context(series=len(values), features=self._features, weights=self._weights)
        self._rows = self._context.update(self._scale.scaled(values))
        return self._together(self._rows)

    def contributions(self) -> Floats:
        """How much each feature added to the scores of the last `update`: series by features, rows sum to 1 or 0."""
        rows = np.nan_to_num(self._rows)
        total = np.zeros((len(rows), self._features))
        for scorer, unit in zip(self._scorers, self._units.tolist(), strict=True):
            parts = scorer.contributions(rows) / unit
            total += parts.reshape(len(rows), -1, self._features).sum(axis=1)
        sums = total.sum(axis=1, keepdims=True)
        return np.asarray(np.divide(total, sums, out=np.zeros_like(total), where=sums > 0))

    def shares(self, series: int) -> tuple[Share, ...]:
        """What each scorer added to the last score of one series."""
        row = np.nan_to_num(self._rows[series : series + 1])
        ratios = [self._ratio(index, row)[0] for index in range(len(self._scorers))]
        return tuple(Share(name=each.name, ratio=float(r)) for each, r in zip(self._scorers, ratios, strict=True))

    def save(self) -> dict[str, Floats]:
        """Everything that it knows, as arrays."""
        tail = self.tail
        saved = {
            "units": self._units.copy(),
            "weights": np.array(self._weights),
            "features": np.array([self._features], dtype=np.float64),
            "tail": np.array([tail.level, tail.shape, tail.scale, tail.peaks, tail.observations]),
        }
        parts: dict[str, Mapping[str, Floats]] = {"scale": self._scale.save()}
        parts.update({scorer.name: scorer.save() for scorer in self._scorers})
        if self._context is not None:
            parts["context"] = self._context.save()
        saved.update({f"{part}/{key}": value for part, arrays in parts.items() for key, value in arrays.items()})
        return saved

    @classmethod
    def load(cls, saved: Mapping[str, Floats], *, scorers: Sequence[type[Scorer]] = SCORERS) -> ContextDetector:
        """What `save` of a detector with these scorers returned, as it was."""

        def part(name: str) -> dict[str, Floats]:
            prefix = f"{name}/"
            return {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}

        weights = tuple(saved["weights"].tolist())
        loaded = cls([kind.load(part(str(kind.name))) for kind in scorers], weights=weights)
        loaded._units, loaded._features = saved["units"].copy(), int(saved["features"][0])
        loaded._scale = RobustScale.load(part("scale"))
        level, shape, scale, peaks, observations = saved["tail"].tolist()
        loaded._tail = Tail(
            level=level, shape=shape, scale=scale, peaks=int(peaks), observations=int(observations)
        )
        loaded._context = Context.load(part("context")) if part("context") else None
        return loaded

    def _fresh(self) -> Context:
        return Context(series=1, features=self._features, weights=self._weights)

    def _check(self, values: Floats) -> None:
        if self._tail is None:
            raise NotFitted("fit the detector first")
        if values.ndim != 2 or values.shape[1] != self._features:
            raise ValueError(f"values: {self._features} features were learnt, the shape {values.shape} has others")

    def _ratio(self, index: int, rows: Floats) -> Floats:
        return np.asarray(np.minimum(self._scorers[index].distances(rows) / self._units[index], RATIO_MAX))

    def _together(self, rows: Floats) -> Floats:
        nothing = np.isnan(rows).all(axis=1)
        filled = np.nan_to_num(rows)  # 0 is the median: what was never measured says nothing
        total = sum((self._ratio(index, filled) for index in range(len(self._scorers))), start=np.zeros(len(rows)))
        return np.where(nothing, np.nan, total / len(self._scorers))
