"""How far a step is from normal ones: scorers, which know no time, and what each must hold to.

A scorer learns from rows of normal time (all finite) and gives every row a distance, never negative and larger the
stranger the row is. It tells how much each column contributes, and it is saved as arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ROWS_MIN = 8             # of normal time; fewer say nothing


class Scorer(Protocol):
    """One way to measure strangeness."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    def fit(self, normal: Floats) -> None:
        """Learn from rows of normal time. Raises ValueError for fewer than ROWS_MIN."""
        ...

    def distances(self, rows: Floats) -> Floats:
        """One distance a row."""
        ...

    def contributions(self, rows: Floats) -> Floats:
        """How much each column adds to the distance: rows by columns, never negative."""
        ...

    def save(self) -> dict[str, Floats]:
        """Everything that it knows, as arrays."""
        ...

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> Self:
        """What `save` returned, as it was."""
        ...


def check_normal(normal: Floats) -> None:
    """Raises ValueError for rows that nothing can be learnt from."""
    if len(normal) < ROWS_MIN:
        raise ValueError(f"normal: at least {ROWS_MIN} rows are needed, not {len(normal)}")
    if not np.isfinite(normal).all():
        raise ValueError("normal: every value must be finite; fill or leave out what is missing")
