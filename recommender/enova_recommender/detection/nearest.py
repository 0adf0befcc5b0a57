"""Strangeness as the distance to the nearest normal rows that were kept."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.scorer import check_normal

Floats = npt.NDArray[np.float64]

KEPT_MAX = 4000          # normal rows that are kept, drawn by the seed: more cost time and change little
NEIGHBOURS = 5           # whose mean distance counts: one alone may be a stray
CHUNK_VALUES = 1_000_000  # distances computed at once: 4 MB


class Nearest:
    """Mean distance to the nearest kept rows (Ramaswamy et al., SIGMOD 2000; the mean of several, not the last)."""

    name = "nearest"

    def __init__(self, *, seed: int = 0) -> None:
        self._seed = seed
        self._kept: npt.NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
        self._squares: npt.NDArray[np.float32] = np.empty(0, dtype=np.float32)

    def fit(self, normal: Floats) -> None:
        """Keep a seeded choice of the rows."""
        check_normal(normal)
        count = min(KEPT_MAX, len(normal))
        chosen = np.sort(np.random.default_rng(self._seed).choice(len(normal), count, replace=False))
        self._keep(normal[chosen].astype(np.float32))

    def distances(self, rows: Floats) -> Floats:
        """Mean Euclidean distance to the nearest kept rows."""
        _, distances = self._neighbours(rows)
        return distances

    def contributions(self, rows: Floats) -> Floats:
        """Mean absolute difference to the nearest kept rows, by column."""
        nearest, _ = self._neighbours(rows)
        return np.asarray(np.abs(self._kept[nearest] - rows[:, None, :]).mean(axis=1), dtype=np.float64)

    def save(self) -> dict[str, Floats]:
        """The kept rows."""
        return {"kept": self._kept.astype(np.float64), "seed": np.array([self._seed], dtype=np.float64)}

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> Nearest:
        """What `save` returned, as it was."""
        loaded = cls(seed=int(saved["seed"][0]))
        loaded._keep(saved["kept"].astype(np.float32))
        return loaded

    def _keep(self, kept: npt.NDArray[np.float32]) -> None:
        self._kept = kept
        self._squares = np.einsum("ij,ij->i", kept, kept)

    def _neighbours(self, rows: Floats) -> tuple[npt.NDArray[np.intp], Floats]:
        """The kept rows nearest to each row, and their mean distance."""
        count = min(NEIGHBOURS, len(self._kept))
        nearest = np.empty((len(rows), count), dtype=np.intp)
        means = np.empty(len(rows))
        step = max(1, CHUNK_VALUES // len(self._kept))
        for start in range(0, len(rows), step):
            part = rows[start : start + step].astype(np.float32)
            squared = np.einsum("ij,ij->i", part, part)[:, None] + self._squares - 2.0 * part @ self._kept.T
            found = np.argpartition(squared, count - 1, axis=1)[:, :count]
            nearest[start : start + step] = found
            # The product finds the neighbours; their distances, too small for its rounding, are computed anew.
            apart = self._kept[found] - rows[start : start + step, None, :]
            means[start : start + step] = np.sqrt(np.einsum("ijk,ijk->ij", apart, apart)).mean(axis=1)
        return nearest, means
