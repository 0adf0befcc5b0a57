"""Which replicas are alike: those of one variant, as rows, and which of them share a node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.features import Floats
from enova_recommender.detection.observation import Placement

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Rows by variant. `index` names each row's group, -1 for a row that nobody has; `order` is rows by group."""

    names: tuple[str, ...]
    index: Indices
    node: Indices
    order: Indices
    first: Indices
    size: Indices

    @classmethod
    def of(cls, replicas: tuple[str, ...], placements: Mapping[str, Placement]) -> Groups:
        """The groups of these rows."""
        placed = [placements.get(name) for name in replicas]
        names, index = np.unique(np.array([each.variant if each else "" for each in placed], dtype=str),
                                 return_inverse=True)  # fmt: skip
        _, node = np.unique(np.array([",".join(each.nodes) if each else "" for each in placed], dtype=str),
                            return_inverse=True)  # fmt: skip
        unnamed = bool(len(names)) and not names[0]
        index = np.asarray(index, dtype=np.int64) - int(unnamed)
        order = np.argsort(index, kind="stable")
        order = order[index[order] >= 0]
        size = np.bincount(index[index >= 0], minlength=len(names) - int(unnamed))
        first = np.concatenate(([0], np.cumsum(size)[:-1])) if len(size) else np.zeros(0, dtype=np.int64)
        return cls(
            names=tuple(names.tolist()[int(unnamed) :]), index=index, node=np.asarray(node, dtype=np.int64),
            order=order, first=first.astype(np.int64), size=size.astype(np.int64),
        )  # fmt: skip

    def turn(self, number: int) -> Indices:
        """One row of each group, another with every number."""
        return self.order[self.first + number % np.maximum(self.size, 1)] if len(self.size) else self.order

    def quantile(self, values: Floats, share: float) -> tuple[Floats, Indices]:
        """By group: the lower `share` quantile of what is known of its rows, NaN of nothing, and how many are."""
        index = np.where(np.isfinite(values), self.index, -1)
        order = np.lexsort((values, index))
        order = order[index[order] >= 0]
        count = np.bincount(index[order], minlength=len(self.names))
        first = np.cumsum(count) - count
        picked = np.minimum(first + np.floor(share * np.maximum(count - 1, 0)).astype(np.int64), len(order) - 1)
        found = np.where(count > 0, values[order][picked], np.nan) if len(order) else np.full(len(count), np.nan)
        return found, count

    def by_row(self, by_group: Floats) -> Floats:
        """A figure of each group, by row."""
        if not len(by_group):
            return np.full(len(self.index), np.nan)
        return np.where(self.index >= 0, by_group[np.maximum(self.index, 0)], np.nan)
