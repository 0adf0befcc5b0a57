"""Scores of different detectors on one scale: how rarely normal time scores as high, in powers of ten.

Below the level where peaks begin the rarity is counted on held-out scores, above it a generalised Pareto law goes on
(`extremes`). A score of 3 is then exceeded once in a thousand normal steps, whichever detector gave it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.extremes import Tail, fit_tail

Floats = npt.NDArray[np.float64]

POINTS = 64              # of the counted part
PROBABILITY_MIN = 1e-12  # a bounded law ends somewhere: what lies past it is that rare, and a little rarer the farther
BEYOND_WEIGHT = 0.1      # of how far it lies there, on a log scale


class Surprise:
    """From scores to powers of ten."""

    def __init__(self) -> None:
        self._scores: Floats = np.empty(0)
        self._rarity: Floats = np.empty(0)
        self._tail = Tail(level=0.0, shape=0.0, scale=1.0, peaks=1, observations=1)

    @property
    def tail(self) -> Tail:
        """The law of high scores in normal time."""
        return self._tail

    def fit(self, held_out: Floats) -> None:
        """Learn from scores of normal steps that the detector had not learnt. Raises ValueError if there is none."""
        known = held_out[np.isfinite(held_out)]
        self._tail = fit_tail(known)
        shares = np.linspace(0.0, 1.0, POINTS)
        quantiles = np.minimum(np.quantile(known, shares), self._tail.level)
        least = self._tail.peaks / self._tail.observations
        self._scores, first = np.unique(quantiles, return_index=True)
        self._rarity = -np.log10(np.maximum(1.0 - shares[first], least))

    def of(self, scores: Floats) -> Floats:
        """The surprise of each score; NaN stays NaN."""
        counted = np.interp(scores, self._scores, self._rarity)
        above = np.maximum(scores - self._tail.level, 0.0) / self._tail.scale
        chance = np.maximum(self._tail.probability(scores), PROBABILITY_MIN)
        # Past the end of a bounded law all is equally impossible, yet some of it is stranger: it still counts a little.
        rare = -np.log10(chance) + BEYOND_WEIGHT * np.log1p(above)
        return np.asarray(np.where(np.isnan(scores), np.nan, np.where(above > 0, rare, counted)))

    def save(self) -> dict[str, Floats]:
        """Everything that it knows, as arrays."""
        return {"scores": self._scores.copy(), "rarity": self._rarity.copy(), "tail": self._tail.save()}

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> Surprise:
        """What `save` returned, as it was."""
        loaded = cls()
        loaded._scores, loaded._rarity = saved["scores"].copy(), saved["rarity"].copy()
        loaded._tail = Tail.load(saved["tail"])
        return loaded
