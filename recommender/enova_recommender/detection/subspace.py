"""Strangeness as what is left of a row outside of the few directions in which normal rows vary together."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.scorer import check_normal

Floats = npt.NDArray[np.float64]

DIRECTIONS_MAX = 10      # that are taken as normal
DIRECTIONS_SHARE = 0.5   # of the columns, at most: or nothing would be left


class Subspace:
    """Norm of the residual outside of the principal directions (Jackson and Mudholkar, 1979)."""

    name = "subspace"

    def __init__(self) -> None:
        self._mean: Floats = np.empty(0)
        self._directions: Floats = np.empty((0, 0))

    def fit(self, normal: Floats) -> None:
        """Find the mean and the principal directions."""
        check_normal(normal)
        self._mean = normal.mean(axis=0)
        count = min(DIRECTIONS_MAX, int(normal.shape[1] * DIRECTIONS_SHARE))
        spread = normal - self._mean
        _, vectors = np.linalg.eigh(spread.T @ spread / len(normal))
        self._directions = vectors[:, ::-1][:, :count]

    def distances(self, rows: Floats) -> Floats:
        """Norm of the residual."""
        return np.asarray(np.linalg.norm(self._residual(rows), axis=1))

    def contributions(self, rows: Floats) -> Floats:
        """Absolute residual by column."""
        return np.abs(self._residual(rows))

    def save(self) -> dict[str, Floats]:
        """Mean and directions."""
        return {"mean": self._mean.copy(), "directions": self._directions.copy()}

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> Subspace:
        """What `save` returned, as it was."""
        loaded = cls()
        loaded._mean, loaded._directions = saved["mean"].copy(), saved["directions"].copy()
        return loaded

    def _residual(self, rows: Floats) -> Floats:
        spread = rows - self._mean
        return np.asarray(spread - spread @ self._directions @ self._directions.T)
