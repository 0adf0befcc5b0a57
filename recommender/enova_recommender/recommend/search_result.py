"""What a search found: every candidate with its figures and its reason, told when asked for.

Figures of all candidates are kept as arrays and reasons as codes, since most are never looked at; words are made from
the same numbers on demand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from enova_recommender.memory import MemorySettings, why_not
from enova_recommender.recommend.capacity import Assessment, Integers, prediction_of
from enova_recommender.recommend.capacity_lengths import Floats, Lengths
from enova_recommender.recommend.search_space import Combinations, Pool
from enova_recommender.recommend.types import Candidate, Constraint, EngineSettings, Objectives, Prediction, Workload
from enova_recommender.types import Interval, ModelShape, Parallelism, Precision

CONSTRAINTS = tuple(Constraint)
CODES = {constraint: code for code, constraint in enumerate(CONSTRAINTS)}
WON = -1                  # the code of candidates that lost to nothing but, perhaps, cost
ALIKE = 0.01              # capacities that differ by less count as equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All settings of one layout on one type of GPU; arrays run over the combinations."""

    pool: Pool
    parallelism: Parallelism
    precision: Precision
    codes: npt.NDArray[np.int8]          # index into CONSTRAINTS, or WON
    found: Assessment | None             # None: impossible as a whole, `reason` says why
    kv_tokens: Integers                  # of one data-parallel rank
    cost_per_hour: Floats                # of all replicas; infinite where it lost to more than cost
    room: int                            # replicas that the inventory holds
    reason: str = ""

    @property
    def name(self) -> str:
        """The layout in words."""
        layout = self.parallelism
        parts = [f"TP {layout.tensor}"]
        parts += [f"PP {layout.pipeline}"] if layout.pipeline > 1 else []
        parts += [f"DP {layout.data}"] if layout.data > 1 else []
        parts += ["EP"] if layout.expert else []
        cached = "" if self.precision.kv_cache_dtype == "auto" else f", {self.precision.kv_cache_dtype} KV cache"
        return f"{layout.gpus}x {self.pool.gpu.name} ({' '.join(parts)}{cached})"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """All candidates of one search. A candidate is known by its index."""

    shape: ModelShape
    workload: Workload
    objectives: Objectives
    groups: tuple[Group, ...]
    settings: Combinations
    lengths: Mapping[bool, Lengths]      # by prefix caching
    ranking: Integers                    # feasible candidates, the cheapest first
    assurance: float                     # chance with which the objectives hold of those
    _front: list[Integers] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.groups) * len(self.settings)

    @property
    def best(self) -> Candidate | None:
        """The cheapest feasible candidate; None if there is none."""
        return self.candidate(int(self.ranking[0])) if len(self.ranking) else None

    @property
    def can_keep_objectives(self) -> bool:
        """Whether any candidate keeps them, however many replicas it takes."""
        return any(np.isin(group.codes, [WON, CODES[Constraint.INVENTORY]]).any() for group in self.groups)

    def candidate(self, index: int) -> Candidate:
        """One candidate, with its reason in words."""
        group, column = self._at(index)
        code = int(group.codes[column])
        prediction = self._prediction(group, column)
        won = len(self.ranking) > 0 and index == int(self.ranking[0])
        lost = CONSTRAINTS[code] if code != WON else None if won else Constraint.COST
        cost = float(group.cost_per_hour[column])
        return Candidate(
            settings=self.settings_of(index),
            prediction=prediction,
            replicas=int(group.found.replicas[column]) if group.found is not None and prediction else 0,
            cost_per_hour=cost,
            constraint=lost,
            reason=self._reason(group, column, lost),
            assured_rps=float(group.found.assured_rps[column]) if group.found is not None and prediction else 0.0,
        )

    def settings_of(self, index: int) -> EngineSettings:
        """The settings of one candidate."""
        group, column = self._at(index)
        each = self.settings
        return EngineSettings(
            gpu=group.pool.gpu,
            parallelism=group.parallelism,
            precision=group.precision,
            max_num_seqs=int((each if group.found is None else group.found).max_num_seqs[column]),
            max_num_batched_tokens=int(each.max_num_batched_tokens[column]),
            gpu_memory_utilization=float(each.gpu_memory_utilization[column]),
            max_model_len=int(each.max_model_len[column]),
            enable_prefix_caching=bool(each.prefix_caching[column]),
        )

    def feasible(self) -> Iterator[Candidate]:
        """Feasible candidates, the cheapest first."""
        return (self.candidate(int(index)) for index in self.ranking)

    def finalists(self, count: int) -> tuple[Candidate, ...]:
        """The best candidate of each layout, the cheapest layouts first: the choices that differ in kind."""
        _, first = np.unique(self.ranking // len(self.settings), return_index=True)
        return tuple(self.candidate(int(self.ranking[place])) for place in np.sort(first)[:count])

    def losers(self) -> Iterator[Candidate]:
        """The best settings of each layout that has no feasible one, in the order of the search."""
        for number, group in enumerate(self.groups):
            if not np.any(group.codes == WON):
                yield self.candidate(number * len(self.settings) + _closest(group))

    def rejected(self) -> tuple[tuple[Constraint, int], ...]:
        """How many candidates fell to what, the most frequent first."""
        codes = np.concatenate([group.codes for group in self.groups])
        counts = {CONSTRAINTS[code]: int((codes == code).sum()) for code in np.unique(codes[codes != WON])}
        if len(self.ranking) > 1:
            counts[Constraint.COST] = len(self.ranking) - 1
        return tuple(sorted(counts.items(), key=lambda item: -item[1]))

    def pareto_indices(self) -> Integers:
        """Feasible candidates such that no other is cheaper, quicker (both ways) and larger at once; cheapest first."""
        if not self._front:
            self._front.append(self._pareto())
        return self._front[0]

    def pareto(self) -> tuple[Candidate, ...]:
        """The same as candidates."""
        return tuple(self.candidate(int(index)) for index in self.pareto_indices())

    def _pareto(self) -> Integers:
        points = np.array([self._point(int(index)) for index in self.ranking]).reshape(-1, 4)
        # Figures that differ by less than ALIKE are one: a front of equals says nothing.
        rounded = np.round(np.log(np.maximum(np.abs(points), 1e-9)) / ALIKE) * np.sign(points)
        kept: list[int] = []
        for place in np.lexsort(rounded.T[::-1]):
            above = rounded[kept] if kept else np.empty((0, 4))
            if not np.any(np.all(above <= rounded[place], axis=1)):
                kept.append(int(place))
        return self.ranking[kept] if kept else self.ranking[:0]

    def _point(self, index: int) -> tuple[float, float, float, float]:
        """Cost, TTFT, TPOT and capacity (negative: more is better), all to be small."""
        group, column = self._at(index)
        found = group.found
        assert found is not None, "only feasible candidates are ranked"
        capacity = found.capacity_rps[column, 0] * found.replicas[column]
        return float(group.cost_per_hour[column]), found.ttft_s[column, 0], found.tpot_s[column, 0], -capacity

    def _at(self, index: int) -> tuple[Group, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} candidates, {index} is none of them")
        return self.groups[index // len(self.settings)], index % len(self.settings)

    def _prediction(self, group: Group, column: int) -> Prediction | None:
        impossible = {CODES[Constraint.MEMORY], CODES[Constraint.CONTEXT]}
        if group.found is None or int(group.codes[column]) in impossible:
            return None
        return prediction_of(
            group.found, column, lengths=self.lengths[bool(self.settings.prefix_caching[column])],
            kv_tokens=int(group.kv_tokens[column]) * group.parallelism.data,
        )  # fmt: skip

    def _reason(self, group: Group, column: int, lost: Constraint | None) -> str:
        """Why a candidate lost, or what the winner does, in words with numbers."""
        if group.found is None:
            return f"{group.name}: {group.reason}"
        replicas, found = int(group.found.replicas[column]), group.found
        percent = round(self.objectives.percentile * 100)
        match lost:
            case Constraint.MEMORY:
                return f"{group.name}: {self._memory_reason(group, column)}"
            case Constraint.CONTEXT:
                longest, most = self.lengths[True].longest_tokens, int(self.settings.max_model_len[column])
                return f"{group.name}: the longest request has {longest} tokens, max_model_len is {most}"
            case Constraint.TTFT:
                return (
                    f"{group.name}: p{percent} TTFT is {_milliseconds(found.ttft_s[column])} even without load, "
                    f"the objective is {1000 * (self.objectives.ttft_s or 0):.4g} ms"
                )
            case Constraint.TPOT:
                return (
                    f"{group.name}: p{percent} TPOT is {_milliseconds(found.tpot_s[column])} even without load, "
                    f"the objective is {1000 * (self.objectives.tpot_s or 0):.4g} ms"
                )
            case Constraint.INVENTORY:
                return f"{group.name}: {_replicas(replicas)} needed, the inventory has room for {group.room}"
            case Constraint.COST:
                return self._cost_reason(group, column)
            case _:
                each, needed = found.assured_rps[column], self.workload.requests_per_s
                return f"{group.name}: {_replicas(replicas)} of {each:.4g} requests/s for {needed:.4g} requests/s"

    def _cost_reason(self, group: Group, column: int) -> str:
        """Why a feasible candidate lost to the best one."""
        best, place = self._at(int(self.ranking[0]))
        assert group.found is not None, "only feasible candidates lose to cost"
        assert best.found is not None, "only feasible candidates win"
        own, least = float(group.cost_per_hour[column]), float(best.cost_per_hour[place])
        replicas = int(group.found.replicas[column])
        if own > least:
            return f"{group.name}: {_replicas(replicas)} cost ${own:.2f}/h, the cheapest costs ${least:.2f}/h"
        carries = float(group.found.assured_rps[column]) * replicas
        most = float(best.found.assured_rps[place]) * int(best.found.replicas[place])
        if carries < most * (1 - ALIKE):
            return f"{group.name}: costs the same ${own:.2f}/h and carries {carries:.4g} requests/s, not {most:.4g}"
        return f"{group.name}: costs the same ${own:.2f}/h and carries no more, with settings further from the default"

    def _memory_reason(self, group: Group, column: int) -> str:
        settings = self.settings_of(group_index(self, group) * len(self.settings) + column)
        told = why_not(
            self.shape,
            MemorySettings(
                gpu=settings.gpu, parallelism=settings.parallelism, precision=settings.precision,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                max_num_batched_tokens=settings.max_num_batched_tokens, max_num_seqs=settings.max_num_seqs,
                max_model_len=settings.max_model_len, enable_prefix_caching=settings.enable_prefix_caching,
            ),
            gpu_count=group.pool.largest_gpus,
        )  # fmt: skip
        return told.reason if told is not None else "one sequence of max_model_len does not fit"


def group_index(result: SearchResult, group: Group) -> int:
    """The place of a group among those of its result."""
    return next(place for place, one in enumerate(result.groups) if one is group)


def _closest(group: Group) -> int:
    """The settings of a layout that came closest: possible ones before impossible ones, then the largest capacity."""
    if group.found is None:
        return 0
    possible = group.codes != CODES[Constraint.MEMORY]
    return int(np.argmax(np.where(possible, group.found.capacity_rps[:, 0], -1.0)))


def _replicas(count: int) -> str:
    return f"{count} replica{'s' if count != 1 else ''}"


def _milliseconds(row: Floats) -> str:
    value, low, high = (1000 * float(item) for item in row)
    if not math.isfinite(value):
        return "without bound"
    interval = Interval(value=value, low=low, high=high)
    return f"{interval.value:.4g} ms ({interval.low:.4g} to {interval.high:.4g})"
