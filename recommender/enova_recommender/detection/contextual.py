"""A detector of steps that lie far from normal ones: scale, recent context, and one scorer of the rows they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.context import WEIGHTS, Context
from enova_recommender.detection.detector import (
    LEARNT_MAX,
    Flags,
    NotFitted,
    check_features,
    check_history,
    measured,
    nested,
    part_of,
    shares_of,
    splits,
    thinned,
)
from enova_recommender.detection.nearest import Nearest
from enova_recommender.detection.scaling import RobustScale
from enova_recommender.detection.scorer import ROWS_MIN, Scorer
from enova_recommender.detection.subspace import Subspace

Floats = npt.NDArray[np.float64]

STEPS_MIN = 4 * ROWS_MIN     # of history; fewer cannot be both learnt from and judged by
SCORERS: dict[str, type[Scorer]] = {Nearest.name: Nearest, Subspace.name: Subspace}


class ContextDetector:
    """Scores steps of many series with one model. What is missing is filled from each series' own past."""

    def __init__(self, scorer: Scorer | None = None, *, weights: tuple[float, ...] = WEIGHTS) -> None:
        self._scorer = scorer if scorer is not None else Nearest()
        self._weights = weights
        self._scale = RobustScale()
        self._features = 0
        self._held: Floats = np.empty(0)
        self._context: Context | None = None
        self._rows: Floats = np.empty((0, 0))

    @property
    def name(self) -> str:
        """That of its scorer."""
        return self._scorer.name

    @property
    def held_out(self) -> Floats:
        """Scores of held-out blocks of the history."""
        return self._held

    def fit(self, history: Floats, mask: Flags | None = None, *, first: int = 0) -> None:  # noqa: ARG002
        """Learn from one series. Raises ValueError for fewer than STEPS_MIN steps of which something is known."""
        known = measured(history, mask)
        something = np.flatnonzero(~np.isnan(known).all(axis=1))
        check_history(len(something), STEPS_MIN)
        self._features = known.shape[1]
        self._scale.fit(known)
        rows = np.nan_to_num(self._fresh().extend(self._scale.scaled(known))[something])
        self._held = np.full(len(known), np.nan)
        for learnt, held in splits(len(rows)):
            self._scorer.fit(rows[learnt])
            self._held[something[held]] = self._scorer.distances(rows[held])
        self._scorer.fit(thinned(rows, LEARNT_MAX))  # what was held out is normal as well
        self._context = None

    def score(self, values: Floats, *, first: int = 0) -> Floats:  # noqa: ARG002  # it knows no time of day
        """One score a step of one series."""
        check_features(values, self._features)
        return self._distances(self._fresh().extend(self._scale.scaled(values)))

    def update(self, values: Floats, *, step: int = 0) -> Floats:  # noqa: ARG002  # it knows no time of day
        """One score for each series."""
        check_features(values, self._features)
        if self._context is None or self._context.series != len(values):
            self._context = Context(series=len(values), features=self._features, weights=self._weights)
        self._rows = self._context.update(self._scale.scaled(values))
        return self._distances(self._rows)

    def contributions(self) -> Floats:
        """Shares of the features in the distances of the last steps."""
        rows = np.nan_to_num(self._rows)
        parts = self._scorer.contributions(rows)
        return shares_of(parts.reshape(len(rows), -1, self._features).sum(axis=1))

    def save(self) -> dict[str, Floats]:
        """Everything that it knows, as arrays."""
        if not self._features:
            raise NotFitted("fit the detector first")
        own = {
            "weights": np.array(self._weights), "features": np.array([self._features], dtype=np.float64),
            "held": self._held.copy(),
        }  # fmt: skip
        parts: dict[str, Mapping[str, Floats]] = {
            "scale": self._scale.save(), f"scorer/{self._scorer.name}": self._scorer.save(),
        }  # fmt: skip
        if self._context is not None:
            parts["context"] = self._context.save()
        return {**own, **nested(parts)}

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> Self:
        """What `save` returned, as it was."""
        (name,) = {key.split("/")[1] for key in saved if key.startswith("scorer/")}
        scorer = SCORERS[name].load(part_of(saved, f"scorer/{name}"))
        loaded = cls(scorer, weights=tuple(saved["weights"].tolist()))
        loaded._features, loaded._held = int(saved["features"][0]), saved["held"].copy()
        loaded._scale = RobustScale.load(part_of(saved, "scale"))
        context = part_of(saved, "context")
        loaded._context = Context.load(context) if context else None
        return loaded

    def _fresh(self) -> Context:
        return Context(series=1, features=self._features, weights=self._weights)

    def _distances(self, rows: Floats) -> Floats:
        nothing = np.isnan(rows).all(axis=1)
        # 0 is the median: what was never measured says nothing.
        return np.where(nothing, np.nan, self._scorer.distances(np.nan_to_num(rows)))
