"""A step beside its recent past: each feature as it is, and its averages over the last steps.

One step can be ordinary by itself and strange after what went before. Averages with exponential weights tell of it at a
fixed cost a step, whatever the length of the past, and for many series at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter

Floats = npt.NDArray[np.float64]

WEIGHTS = (0.3,)      # of the newest step in each average: a memory of about 3 steps


class Context:
    """The averages of many series; `features` of each."""

    def __init__(self, *, series: int, features: int, weights: tuple[float, ...] = WEIGHTS) -> None:
        self._weights = np.array(weights)
        self._averages = np.full((len(weights), series, features), np.nan)

    @property
    def series(self) -> int:
        """How many it remembers."""
        return self._averages.shape[1]

    @property
    def columns(self) -> int:
        """Values of one extended step."""
        weights, _, features = self._averages.shape
        return (1 + weights) * features

    def update(self, values: Floats) -> Floats:
        """Extend one step, series by features. What is missing is filled from the past; NaN if there is none."""
        known = np.isfinite(values)
        fresh = known & np.isnan(self._averages)
        moved = self._averages + self._weights[:, None, None] * (values - self._averages)
        self._averages = np.where(fresh, values, np.where(known, moved, self._averages))
        now = np.where(known, values, self._averages[0])
        return np.concatenate((now, *self._averages), axis=1)

    def extend(self, history: Floats) -> Floats:
        """Extend all steps of one series, as `update` would from the start; what is kept does not change."""
        if not np.isfinite(history).all():
            past = Context(series=1, features=history.shape[1], weights=tuple(self._weights.tolist()))
            return np.concatenate([past.update(step[None, :]) for step in history])
        start = history[:1]
        averages = [lfilter([w], [1.0, w - 1.0], history - start, axis=0) + start for w in self._weights.tolist()]
        return np.concatenate((history, *averages), axis=1)

    def save(self) -> dict[str, Floats]:
        """Everything that it knows, as arrays."""
        return {"weights": self._weights.copy(), "averages": self._averages.copy()}

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> Context:
        """What `save` returned, as it was."""
        _, series, features = saved["averages"].shape
        loaded = cls(series=series, features=features, weights=tuple(saved["weights"].tolist()))
        loaded._averages = saved["averages"].copy()
        return loaded
