"""Strangeness as the distance to the nearest normal rows that were kept."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.detector import thinned
from enova_recommender.detection.scorer import ROWS_MIN, check_normal

Floats = npt.NDArray[np.float64]

KEPT_MAX = 250           # normal rows that are kept, evenly spaced: more cost time and change little
KEPT_VALUES_MAX = 10_000  # in all of them, which bounds the work of a step of many features
NEIGHBOURS = 5           # whose mean distance counts: one alone may be a stray
CHUNK_VALUES = 1_000_000  # distances computed at once: 8 MB


class Nearest:
    """Mean distance to the nearest kept rows (Ramaswamy et al., SIGMOD 2000; the mean of several, not the last)."""

    name = "nearest"

    def __init__(self) -> None:
        self._kept: Floats = np.empty((0, 0))

    def fit(self, normal: Floats) -> None:
        """Keep rows, evenly spaced in time, so that all of it is there."""
        check_normal(normal)
        self._kept = np.array(thinned(normal, max(ROWS_MIN, min(KEPT_MAX, KEPT_VALUES_MAX // normal.shape[1]))))

    def distances(self, rows: Floats) -> Floats:
        """Mean Euclidean distance to the nearest kept rows."""
        count = min(NEIGHBOURS, len(self._kept))
        means = np.empty(len(rows))
        for part in self._chunks(len(rows)):
            nearest = np.partition(self._squared(rows[part]), count - 1, axis=1)[:, :count]
            means[part] = np.sqrt(nearest).mean(axis=1)
        return means

    def contributions(self, rows: Floats) -> Floats:
        """Mean absolute difference to the nearest kept rows, by column."""
        count = min(NEIGHBOURS, len(self._kept))
        found = np.empty_like(rows)
        for part in self._chunks(len(rows)):
            nearest = np.argpartition(self._squared(rows[part]), count - 1, axis=1)[:, :count]
            found[part] = np.abs(self._kept[nearest] - rows[part][:, None, :]).mean(axis=1)
        return found

    def save(self) -> dict[str, Floats]:
        """The kept rows."""
        return {"kept": self._kept.copy()}

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> Nearest:
        """What `save` returned, as it was."""
        loaded = cls()
        loaded._kept = saved["kept"].copy()
        return loaded

    def _squared(self, rows: Floats) -> Floats:
        """Squared distances of rows to kept rows, by one product; its rounding may fall below 0."""
        of_kept = np.einsum("ij,ij->i", self._kept, self._kept)
        squared = rows @ (-2.0 * self._kept.T)
        squared += of_kept
        squared += np.einsum("ij,ij->i", rows, rows)[:, None]
        return np.asarray(np.maximum(squared, 0.0, out=squared))

    def _chunks(self, rows: int) -> list[slice]:
        step = max(1, CHUNK_VALUES // len(self._kept))
        return [slice(start, start + step) for start in range(0, rows, step)]
