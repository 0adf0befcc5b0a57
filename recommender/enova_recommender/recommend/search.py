"""The search for a configuration: every candidate evaluated in closed form, the cheapest feasible one first.

Candidates of one layout (GPU type, parallel sizes, precision) share step times and memory, so they are evaluated
together as arrays. A candidate is feasible if the objectives hold with the wanted assurance at the rate that each of
its replicas then carries, and the inventory holds as many replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from enova_recommender.memory import MemoryFit, fit
from enova_recommender.performance import KernelTimes
from enova_recommender.recommend.capacity import (
    Assessment,
    Integers,
    assess,
    factor_of,
    lanes_of,
    sequence_limits,
    slots_of,
)
from enova_recommender.recommend.capacity_curve import Curve, VectorTimes, curve, load_grid, spreads_of
from enova_recommender.recommend.capacity_lengths import (
    Floats,
    Lengths,
    check_objectives,
    check_workload,
    lengths_of,
)
from enova_recommender.recommend.errors import RecommendError
from enova_recommender.recommend.search_result import ALIKE, CODES, WON, Group, SearchResult
from enova_recommender.recommend.search_space import (
    Combinations,
    Pool,
    SearchSpace,
    check_space,
    combinations,
    parallelisms,
    pools_of,
    why_no_layout,
)
from enova_recommender.recommend.types import ASSURANCES, Constraint, InventoryNode, Objectives, Workload
from enova_recommender.types import GpuModel, ModelShape, Parallelism, Precision

TimesOf = Callable[[ModelShape, GpuModel, Parallelism, Precision], VectorTimes]


def kernel_times(shape: ModelShape, gpu: GpuModel, parallelism: Parallelism, precision: Precision) -> VectorTimes:
    """Step times from the shipped kernel tables, without any calibration."""
    return KernelTimes(shape, gpu, parallelism=parallelism, precision=precision)


def search(
    shape: ModelShape,
    inventory: Sequence[InventoryNode],
    workload: Workload,
    objectives: Objectives,
    *,
    space: SearchSpace | None = None,
    times_of: TimesOf = kernel_times,
    precision: Precision | None = None,
    assurance: float = ASSURANCES[0],
    check_floor: bool = True,
) -> SearchResult:
    """Evaluate all candidates. RecommendError names what cannot be answered, physical floors included.

    Without `check_floor` an objective that nothing can meet is no error: each candidate loses to it.
    `precision` is the model's own if None; its KV cache type is one of the space's.
    """
    chosen, given = space or SearchSpace(), precision or Precision()
    check_workload(workload)
    check_objectives(objectives)
    check_space(chosen)
    if not 0 < assurance < 1:
        raise RecommendError("assurance", f"must lie between 0 and 1, is {assurance}")
    whole = lengths_of(workload, prefix_caching=False)
    rest = lengths_of(workload, prefix_caching=True) if workload.cached_prefix_share else whole
    lengths = {False: whole, True: rest}
    longest = lengths[True].longest_tokens
    if longest > shape.context_tokens:
        raise RecommendError(
            "workload.lengths", f"the longest request has {longest} tokens, {shape.name} takes {shape.context_tokens}"
        )
    settings = combinations(chosen, longest_tokens=longest, context_tokens=shape.context_tokens)
    task = _Task(
        shape=shape, workload=workload, objectives=objectives, settings=settings, lengths=lengths,
        times_of=times_of, assurance=assurance, is_guarded=chosen.is_guarded,
    )  # fmt: skip
    groups = []
    for pool in pools_of(inventory):
        for parallelism in chosen.parallelisms or parallelisms(shape, pool):
            for cached in chosen.kv_cache_dtypes:
                groups.append(task.group(pool, parallelism, replace(given, kv_cache_dtype=cached)))  # noqa: PERF401
    if check_floor:
        _check_floor(groups, objectives)
    return SearchResult(
        shape=shape, workload=workload, objectives=objectives, groups=tuple(groups), settings=settings,
        lengths=lengths, ranking=_ranking(groups, len(settings)), assurance=assurance,
    )  # fmt: skip


def most_assured(
    shape: ModelShape,
    inventory: Sequence[InventoryNode],
    workload: Workload,
    objectives: Objectives,
    *,
    space: SearchSpace | None = None,
    times_of: TimesOf = kernel_times,
    precision: Precision | None = None,
    check_floor: bool = True,
) -> SearchResult:
    """The search with the highest of ASSURANCES with which any candidate keeps the objectives; with the first if none.

    An objective that is close to what the GPUs can do is better kept by half a chance than refused.
    """
    results = (
        search(
            shape, inventory, workload, objectives, space=space, times_of=times_of, precision=precision,
            assurance=assurance, check_floor=check_floor,
        )
        for assurance in ASSURANCES
    )  # fmt: skip
    first = next(results)
    if first.can_keep_objectives:
        return first
    return next((result for result in results if result.can_keep_objectives), first)


class _Task:
    """What all groups of one search share."""

    def __init__(
        self, *, shape: ModelShape, workload: Workload, objectives: Objectives, settings: Combinations,
        lengths: dict[bool, Lengths], times_of: TimesOf, assurance: float, is_guarded: bool,
    ) -> None:  # fmt: skip
        self._is_guarded = is_guarded
        self._shape, self._workload, self._objectives = shape, workload, objectives
        self._settings, self._lengths, self._times_of, self._assurance = settings, lengths, times_of, assurance
        self._batched, self._rows = np.unique(settings.max_num_batched_tokens, return_inverse=True)
        # Settings that differ in max_model_len alone behave alike: one of them is evaluated for all.
        alike = np.stack([
            settings.prefix_caching, settings.max_num_seqs, settings.max_num_batched_tokens,
            settings.gpu_memory_utilization,
        ])  # fmt: skip
        _, self._first, self._like = np.unique(alike, axis=1, return_index=True, return_inverse=True)

    def group(self, pool: Pool, parallelism: Parallelism, precision: Precision) -> Group:
        """Evaluate all settings of one layout."""
        size = len(self._settings)
        if (why := why_no_layout(self._shape, pool, parallelism, precision)) is not None:
            return Group(
                pool=pool, parallelism=parallelism, precision=precision, found=None, reason=why[1],
                codes=np.full(size, CODES[why[0]], dtype=np.int8), kv_tokens=np.zeros(size, dtype=np.int64),
                cost_per_hour=np.full(size, np.inf), room=0,
            )  # fmt: skip
        memory = _Memory(self._shape, pool.gpu, parallelism, precision, self._settings)
        times = self._times_of(self._shape, pool.gpu, parallelism, precision)
        found = self._assess(times, memory, parallelism)
        room = pool.room(parallelism)
        codes = self._codes(found, memory, room, slowest=factor_of(_spread_alone(times), self._assurance))
        cost = np.where(codes == WON, found.replicas * parallelism.gpus * pool.price_per_hour, np.inf)
        return Group(
            pool=pool, parallelism=parallelism, precision=precision, codes=codes, found=found,
            kv_tokens=memory.kv_tokens, cost_per_hour=cost, room=room,
        )  # fmt: skip

    def _assess(self, times: VectorTimes, memory: _Memory, parallelism: Parallelism) -> Assessment:
        """Figures of all settings; those without prefix caching come first among the distinct ones."""
        settings, parts = self._settings, []
        caching = settings.prefix_caching[self._first] == 1
        curves: dict[int, Curve] = {}
        for cached, chosen in ((False, self._first[~caching]), (True, self._first[caching])):
            if not len(chosen):
                continue
            lengths = self._lengths[cached]
            if id(lengths) not in curves:
                curves[id(lengths)] = self._curve(times, lengths)
            behaviour = curves[id(lengths)]
            slots = slots_of(
                lengths, memory.fits[cached].layout, kv_blocks=memory.kv_blocks[chosen],
                max_num_seqs=self._guarded(behaviour, chosen, parallelism.pipeline), pipeline=parallelism.pipeline,
            )  # fmt: skip
            parts.append(assess(
                behaviour, self._rows[chosen], slots, workload=self._workload,
                objectives=self._objectives, lanes=lanes_of(parallelism),
                decode_steps=lengths.mean_decode_steps, decode_scv=lengths.decode_scv, assurance=self._assurance,
            ))  # fmt: skip
        return _spread_out(parts, self._like.ravel())

    def _guarded(self, behaviour: Curve, chosen: Integers, pipeline: int) -> Floats:
        """max_num_seqs of settings, lowered to what keeps the objective between tokens in a full batch."""
        given, limit = self._settings.max_num_seqs[chosen], self._objectives.tpot_s
        if limit is None or not self._is_guarded:
            return given
        most = np.floor(pipeline * sequence_limits(behaviour, limit, self._assurance)[self._rows[chosen]])
        return np.minimum(given, np.maximum(most, 1.0))

    def _curve(self, times: VectorTimes, lengths: Lengths) -> Curve:
        grid = load_grid(times, lengths, most_sequences=float(self._settings.max_num_seqs.max()))
        return curve(
            times, lengths, self._batched, grid, percentile=self._objectives.percentile,
            arrival_cv=self._workload.arrival_cv,
        )  # fmt: skip

    def _codes(
        self, found: Assessment, memory: _Memory, room: int, *, slowest: float
    ) -> npt.NDArray[np.int8]:
        """What each candidate fell to, steps being `slowest` as long; the strongest reason is written last."""
        codes = np.full(len(self._settings), WON, dtype=np.int8)
        codes[found.replicas > room] = CODES[Constraint.INVENTORY]
        limit = self._objectives.tpot_s
        lost = found.replicas == 0
        slow = np.zeros_like(lost) if limit is None else slowest * found.least_tpot_s > limit
        codes[lost & slow] = CODES[Constraint.TPOT]
        codes[lost & ~slow] = CODES[Constraint.TTFT]
        codes[self._settings.max_model_len < self._lengths[True].longest_tokens] = CODES[Constraint.CONTEXT]
        codes[~memory.fitting] = CODES[Constraint.MEMORY]
        return codes


class _Memory:
    """KV blocks of all settings of one layout; what does not depend on a setting is computed once."""

    def __init__(
        self, shape: ModelShape, gpu: GpuModel, parallelism: Parallelism, precision: Precision, settings: Combinations
    ) -> None:
        keys = np.stack([settings.max_num_batched_tokens, settings.max_num_seqs, settings.prefix_caching])
        kinds, which = np.unique(keys, axis=1, return_inverse=True)
        full = [
            fit(
                shape, gpu, parallelism=parallelism, precision=precision, gpu_memory_utilization=1.0,
                max_num_batched_tokens=int(tokens), max_num_seqs=int(seqs), enable_prefix_caching=bool(caching),
            )
            for tokens, seqs, caching in kinds.T
        ]  # fmt: skip
        which = which.ravel()
        self.fits: dict[bool, MemoryFit] = {bool(kind[2]): one for kind, one in zip(kinds.T, full, strict=True)}
        fixed, block, budget = (
            np.array([getattr(one, name) for one in full], dtype=np.float64)[which]
            for name in ("fixed_bytes", "kv_block_bytes", "budget_bytes")
        )
        share = np.floor(budget * settings.gpu_memory_utilization)
        self.kv_blocks: Floats = np.floor((share - fixed) / block)
        # Blocks and printed tokens of one longest sequence: few values, asked one by one.
        pairs = np.stack([which.astype(np.float64), settings.max_model_len])
        asked, back = np.unique(pairs, axis=1, return_inverse=True)
        stages = parallelism.pipeline + 1
        each = np.array([
            full[int(kind)].layout.blocks(int(length), in_flight_tokens=stages * int(kinds[0, int(kind)]))
            for kind, length in asked.T
        ], dtype=np.float64)[back.ravel()]  # fmt: skip
        self.fitting = self.kv_blocks >= np.maximum(each, 1)
        room = np.maximum(self.kv_blocks, 0) / np.maximum(each, 1)
        self.kv_tokens: Integers = (room * settings.max_model_len).astype(np.int64)


def _spread_alone(times: VectorTimes) -> float:
    """The spread of a step that decodes one sequence."""
    return float(spreads_of(times, np.ones(1), np.ones(1))[0])


def _spread_out(parts: list[Assessment], places: Integers) -> Assessment:
    """The parts one after another, then each candidate's place among them."""
    names = Assessment.__dataclass_fields__
    return Assessment(**{name: np.concatenate([getattr(part, name) for part in parts])[places] for name in names})


def _ranking(groups: Sequence[Group], size: int) -> Integers:
    """Feasible candidates: the cheapest first, of those the largest capacity, then the order of the space."""
    cost = np.concatenate([group.cost_per_hour for group in groups])
    capacity = np.concatenate([
        np.zeros(size) if group.found is None else group.found.assured_rps * group.found.replicas for group in groups
    ])  # fmt: skip
    alike = np.round(np.log(np.maximum(capacity, 1e-9)) / ALIKE)
    order = np.lexsort((np.arange(len(cost)), -alike, np.round(cost, 6)))
    feasible: Integers = order[np.isfinite(cost[order])]
    return feasible


def _check_floor(groups: Sequence[Group], objectives: Objectives) -> None:
    """RecommendError if an objective is below what the best candidate does without any load."""
    for field, objective, words in (
        ("ttft_s", objectives.ttft_s, "the prefill of an unloaded replica"),
        ("tpot_s", objectives.tpot_s, "a sequence that decodes alone"),
    ):
        floors = [(_floor(group, field), group.name) for group in groups if group.found is not None]
        least, name = min(floors, default=(np.inf, ""))
        if objective is not None and np.isfinite(least) and objective < least:
            percent = round(objectives.percentile * 100)
            raise RecommendError(
                f"objectives.{field}",
                f"{objective:.4g} s is below the physical floor of {least:.4g} s: {words} at the {percent}th "
                f"percentile on {name}, the best of the inventory",
            )


def _floor(group: Group, field: str) -> float:
    """The least figure of a group's settings that fit, without load; infinite if none fits."""
    assert group.found is not None, "only possible groups have a floor"
    fits = ~np.isin(group.codes, [CODES[Constraint.MEMORY], CODES[Constraint.CONTEXT]])
    values: Floats = getattr(group.found, f"least_{field}")
    return float(np.min(values[fits], initial=np.inf))
