"""The fewest replica-hours with which a fluid fleet that knows the future could keep its objective: a linear programme.

Theory of operation. Time is cut into steps of dt. In step t, n_t replicas run and s_t are started; one started in step
t runs from step t + L on (L = start-up / dt) and is paid from its start. Work that arrives is either in time (X_t: that
served by the end of step t) or among the share 1 - attainment that may be late (D_t: how much of what has arrived
is; Y_t: how much of that has been served). All three only grow. With A_t the work arrived by the end of step t:

    minimise   dt x sum(n_t) + dt x sum(min(L, T - t) x s_t)
    n_t <= n_{t-1} + s_{t-L}                        a replica runs one start-up after its start, and may leave at once
    X_t - X_{t-1} + Y_t - Y_{t-1} <= capacity x dt x n_t
    X_t <= A_t - D_t,  Y_t <= D_t                   nothing is served before it came
    X_t >= A_{t-W} - D_{t-W}                        in time: within W of its arrival
    D_t - D_{t-1} <= work arrived in step t;  D_T <= (1 - attainment) x A_T
    Y_T >= D_{T-W}                                  what is late is served too, but for what may still wait

W is the objective rounded up to whole steps. n_t whole makes it an integer programme (HiGHS); its relaxation is told
beside it. Both bound the *fluid* model from below: requests are divisible, routing is perfect, and capacity is the same
at every mix. Work is in whatever unit capacity is told in. Work that arrives in the warm-up may be late without limit,
as it is not judged. What is left unproven by the time limit is told: `hours` is then HiGHS' proven bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array, csr_array, diags_array, eye_array, hstack

Floats = NDArray[np.float64]
HOUR_S = 3600.0
SLACK = 1e-7


@dataclass(frozen=True, slots=True, kw_only=True)
class Programme:
    """What the bound is asked for. `capacity` is the work that one replica does in a second, within the objective."""

    work: Floats                       # that arrives in each step
    step_s: float
    capacity: float
    start_s: float
    within_s: float                    # of its arrival work is to be served
    attainment: float = 0.99
    initial: int | None = None         # replicas that run at the beginning; None: as many as are wanted, for nothing
    warmup_s: float = 0.0
    min_replicas: int = 0
    max_replicas: int | None = None
    time_limit_s: float = 60.0
    gap: float = 2e-3                  # of the integer programme, as a share

    def __post_init__(self) -> None:
        if self.capacity <= 0 or self.step_s <= 0:
            raise ValueError("capacity and step_s must be above 0")
        if not 0 < self.attainment <= 1:
            raise ValueError("attainment must be above 0 and at most 1")
        if self.work.ndim != 1 or self.work.size == 0 or not np.isfinite(self.work).all() or self.work.min() < 0:
            raise ValueError("work must be a row of finite amounts that are not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class LowerBound:
    """The bound in replica-hours, start-ups included; `running` is the whole-replica plan that was found."""

    hours: float                       # no whole-replica fleet needs fewer
    found_hours: float                 # of the plan
    relaxed_hours: float               # of the relaxation
    running: Floats
    proven: bool                       # whether the plan is the best, to the gap


class Infeasible(ValueError):
    """No fleet within the bounds holds the objective: what it starts with or may have is too little."""


def work_by_step(at_s: ArrayLike, *, horizon_s: float, step_s: float, amounts: ArrayLike | None = None) -> Floats:
    """Work that arrives in each step, from instants and what each brings (by default one: requests)."""
    instants = np.asarray(at_s, dtype=np.float64)
    weights = np.ones(instants.size) if amounts is None else np.asarray(amounts, dtype=np.float64)
    inside = (instants >= 0) & (instants < horizon_s)
    steps = math.ceil(horizon_s / step_s - SLACK)
    return np.bincount((instants[inside] // step_s).astype(int), weights[inside], minlength=steps).astype(np.float64)


def lower_bound(programme: Programme) -> LowerBound:
    """Solves the relaxation and the integer programme. Raises Infeasible."""
    model = _Model(programme)
    relaxed = model.solve(whole=False)
    if relaxed.x is None:
        raise Infeasible("no fleet holds this objective, however many replicas were started in time")
    rounded = np.ceil(relaxed.x[: model.steps] - SLACK)
    solved = model.solve(whole=True)
    plans = [rounded] if solved.x is None else [rounded, np.round(solved.x[: model.steps])]
    running = min(plans, key=model.cost)
    found, proven_bound = model.cost(running), max(float(relaxed.fun), float(solved.mip_dual_bound or 0.0))
    return LowerBound(
        hours=min(proven_bound, found) / HOUR_S,
        found_hours=found / HOUR_S,
        relaxed_hours=float(relaxed.fun) / HOUR_S,
        running=running,
        proven=found <= proven_bound * (1 + programme.gap) + SLACK,
    )


class _Model:
    """The programme as matrices; the variables are n, s, X, Y and D, each for all steps."""

    def __init__(self, programme: Programme) -> None:
        self._asked = programme
        self.steps = programme.work.size
        self._start = int(programme.start_s / programme.step_s + SLACK)
        self._within = math.ceil(programme.within_s / programme.step_s - SLACK)
        self._arrived = np.cumsum(programme.work)
        self._paid_s = programme.step_s * np.minimum(self._start, self.steps - np.arange(self.steps))
        self._limits = self._constraints()

    def cost(self, running: Floats) -> float:
        """Replica-seconds of a plan, with the starts that it takes."""
        rises = np.maximum(np.diff(running), 0.0)
        starts = np.zeros(self.steps)
        begun = np.arange(1, self.steps) - self._start
        np.add.at(starts, begun[begun >= 0], rises[begun >= 0])
        return float(running.sum() * self._asked.step_s + starts @ self._paid_s)

    def solve(self, *, whole: bool) -> OptimizeResult:
        """HiGHS on the programme, or on its relaxation."""
        asked, steps = self._asked, self.steps
        objective = np.concatenate([np.full(steps, asked.step_s), self._paid_s, np.zeros(3 * steps)])
        integrality = np.zeros(5 * steps)
        integrality[:steps] = 1 if whole else 0
        return milp(
            objective, integrality=integrality, bounds=self._bounds(), constraints=self._limits,
            options={"time_limit": asked.time_limit_s, "mip_rel_gap": asked.gap},
        )

    def _bounds(self) -> Bounds:
        asked, steps = self._asked, self.steps
        most = math.inf if asked.max_replicas is None else float(asked.max_replicas)
        low = np.concatenate([np.full(steps, float(asked.min_replicas)), np.zeros(4 * steps)])
        high = np.concatenate([np.full(steps, most), np.full(4 * steps, math.inf)])
        if asked.initial is not None:
            high[0] = min(high[0], float(asked.initial))
        return Bounds(low, high)

    def _constraints(self) -> list[LinearConstraint]:
        asked, steps, arrived = self._asked, self.steps, self._arrived
        each, none = eye_array(steps), csr_array((steps, steps))
        rise = diags_array([1.0, -1.0], offsets=[0, -1], shape=(steps, steps))     # v_t - v_{t-1}
        ready = diags_array([1.0], offsets=[-self._start], shape=(steps, steps))   # s_{t-L}
        limits = [
            # the first step has what it begins with
            _limit([rise, -ready, none, none, none], high=_but_first(np.zeros(steps), math.inf)),
            _limit([-asked.capacity * asked.step_s * each, none, rise, rise, none], high=0.0),
            _limit([none, none, each, none, each], high=arrived),
            _limit([none, none, none, each, -each], high=0.0),
            _limit([none, none, none, none, rise], low=0.0, high=asked.work),
            _limit([none, none, rise, none, none], low=0.0),
            _limit([none, none, none, rise, none], low=0.0),
        ]
        if self._within < steps:
            due = steps - self._within
            lagged = diags_array([1.0], offsets=[-self._within], shape=(steps, steps))
            shifted = np.concatenate([np.zeros(self._within), arrived[:due]])
            limits.append(_limit([none, none, each, none, lagged], low=shifted))
            limits.append(LinearConstraint(_row(steps, {4 * steps - 1: 1.0, 4 * steps + due - 1: -1.0}), 0.0))
        return [*limits, self._late_share()]

    def _late_share(self) -> LinearConstraint:
        """What may be late of the work that is judged, that after the warm-up."""
        asked, steps = self._asked, self.steps
        warm = min(int(asked.warmup_s / asked.step_s + SLACK), steps - 1)
        entries = {5 * steps - 1: 1.0}
        before = 0.0
        if warm > 0:
            entries[4 * steps + warm - 1] = -1.0
            before = float(self._arrived[warm - 1])
        share = (1 - asked.attainment) * (float(self._arrived[-1]) - before)
        return LinearConstraint(_row(steps, entries), -math.inf, share)


def _limit(
    blocks: list[csr_array], *, low: float | Floats = -math.inf, high: float | Floats = math.inf
) -> LinearConstraint:
    return LinearConstraint(hstack(blocks, format="csr"), low, high)


def _row(steps: int, entries: dict[int, float]) -> csr_array:
    columns = list(entries)
    shape = (1, 5 * steps)
    return coo_array((list(entries.values()), ([0] * len(columns), columns)), shape=shape).tocsr()


def _but_first(values: Floats, first: float) -> Floats:
    values[0] = first
    return values
