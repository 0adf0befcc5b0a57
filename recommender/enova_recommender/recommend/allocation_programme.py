"""A mixed-integer programme that grows row by row, and its solution by HiGHS."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, vstack

from enova_recommender.recommend.allocation_types import SolveLimits

Floats = npt.NDArray[np.float64]
Terms = Iterable[tuple[int, float]]

# What scipy's milp answers.
OPTIMAL, LIMIT_REACHED = 0, 1


@dataclass(frozen=True, slots=True)
class Solution:
    """Values of all variables, a bound that no solution is below, and whether the limits left it unproven."""

    values: Floats
    objective: float
    bound: float
    proven: bool


class Programme:
    """Variables at or above 0 with upper bounds, and rows between bounds; minimises."""

    def __init__(self) -> None:
        self._upper: list[float] = []
        self._relaxed_upper: list[float] = []
        self._lower: list[float] = []
        self._integer: list[int] = []
        self._entries: list[tuple[int, int, float]] = []
        self._row_bounds: list[tuple[float, float]] = []

    @property
    def variables(self) -> int:
        """How many there are."""
        return len(self._upper)

    def variable(self, upper: float = np.inf, *, integer: bool = True, implied: bool = False) -> int:
        """A new variable; its index. An upper bound that rows imply is none in `relax`: it would hide their price."""
        self._upper.append(upper)
        self._relaxed_upper.append(np.inf if implied else upper)
        self._lower.append(0.0)
        self._integer.append(int(integer))
        return len(self._upper) - 1

    def at_least(self, variable: int, value: float) -> None:
        """Raise the lower bound of a variable."""
        self._lower[variable] = value

    def upper(self, variable: int) -> float:
        """The upper bound of a variable."""
        return self._upper[variable]

    def row(self, terms: Terms, low: float = -np.inf, high: float = np.inf) -> int:
        """Bound a sum of (variable, coefficient); the index of the row."""
        index = len(self._row_bounds)
        self._entries.extend((index, variable, coefficient) for variable, coefficient in terms)
        self._row_bounds.append((low, high))
        return index

    def solve(self, objective: Terms, limits: SolveLimits) -> Solution | None:
        """The best solution within the limits; None if there is none, or none was found."""
        if not self.variables:
            return Solution(values=np.zeros(0), objective=0.0, bound=0.0, proven=True)
        costs = self._costs(objective)
        low, high = self._bounds()
        answer = milp(
            costs, integrality=np.array(self._integer), bounds=Bounds(np.array(self._lower), np.array(self._upper)),
            constraints=LinearConstraint(self._matrix(), low, high) if self._row_bounds else None,
            options={"time_limit": limits.time_limit_s, "mip_rel_gap": limits.gap},
        )
        if answer.x is None:
            return None
        values = np.where(self._integer, np.round(answer.x), answer.x)
        bound = answer.mip_dual_bound
        return Solution(
            values=values, objective=float(costs @ values), proven=answer.status == OPTIMAL,
            bound=float(bound) if bound is not None and np.isfinite(bound) else -np.inf,
        )

    def relax(self, objective: Terms, rows: Sequence[int]) -> tuple[float, Floats] | None:
        """The optimum with fractions allowed, and by how much it falls with one more on the right of these rows."""
        if not self._row_bounds:
            return None
        low, high = self._bounds()
        if not self.variables:  # every sum is empty
            return (0.0, np.zeros(len(rows))) if bool((low <= 0).all() and (high >= 0).all()) else None
        matrix = self._matrix()
        above, below = np.isfinite(high), np.isfinite(low)
        bounded = vstack([matrix[above], -matrix[below]], format="csr")
        answer = linprog(
            self._costs(objective), A_ub=bounded, b_ub=np.concatenate([high[above], -low[below]]),
            bounds=np.column_stack([self._lower, self._relaxed_upper]), method="highs",
        )
        if answer.status != OPTIMAL:
            return None
        places = np.cumsum(above) - 1
        return float(answer.fun), -answer.ineqlin.marginals[places[np.array(rows, dtype=int)]]

    def _costs(self, objective: Terms) -> Floats:
        costs = np.zeros(self.variables)
        for variable, coefficient in objective:
            costs[variable] += coefficient
        return costs

    def _bounds(self) -> tuple[Floats, Floats]:
        bounds = np.array(self._row_bounds, dtype=float).reshape(-1, 2)
        return bounds[:, 0], bounds[:, 1]

    def _matrix(self) -> csr_array:
        entries = np.array(self._entries, dtype=float).reshape(-1, 3)
        shape = (len(self._row_bounds), self.variables)
        places = entries[:, :2].astype(int)
        return csr_array((entries[:, 2], (places[:, 0], places[:, 1])), shape=shape)
