"""From a request to advice: search in closed form, finalists measured by the scheduler, what other wishes would buy.

The search counts on the lower bound of each capacity's interval; the finalists, the best settings of each of the
cheapest layouts, are then run through the real scheduler in virtual time, and their replicas are counted anew from what
that measured: the figures of the chosen one are the scheduler's. What other wishes would buy is told by the closed
form, corrected by how far the two are apart for the chosen one. For a deployment, whose workload is an estimate and
whose user waits, the closed form is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from enova_recommender.memory import fit
from enova_recommender.performance import KernelTimes, Tier
from enova_recommender.performance.engine_model import corrected_times
from enova_recommender.recommend.errors import RecommendError
from enova_recommender.recommend.mix import mixed
from enova_recommender.recommend.request import AdviceRequest
from enova_recommender.recommend.search import most_assured, search
from enova_recommender.recommend.search_result import SearchResult
from enova_recommender.recommend.search_space import SearchSpace, parallelisms, pools_of
from enova_recommender.recommend.types import (
    ASSURANCES,
    Advice,
    Candidate,
    Constraint,
    EngineSettings,
    InventoryNode,
    Objectives,
    Sensitivity,
)
from enova_recommender.recommend.verify import verify
from enova_recommender.types import GpuModel, ModelShape, Parallelism, Precision

FINALISTS = 2              # layouts that are measured
RECOUNTS = 3               # of the replicas of one finalist; each measures anew
AS_MUCH = 0.05             # share by which carried requests may differ and count as equal
SEED = 20_240_709          # of the arrivals: the same question gets the same answer
VERIFIED_MAX = 5           # where the first do not hold
RUNNERS_UP = 6
LOSERS = 4                 # of them that are impossible, at most
PARETO_MAX = 40
CONTEXTS_MAX = 8           # lengths of a deployment's context that are tried
LOOSER = 1.5               # objectives that sensitivities try
ENDLESS_GPUS = 4096        # of a type, where the question is what would be enough


def advise(request: AdviceRequest) -> Advice:
    """The cheapest configuration that carries the workload, and why. RecommendError says what cannot be answered."""
    result = searched(request)
    verified = result.finalists(FINALISTS) if request.deployable else _verified_finalists(request, result)
    feasible = sorted((each for each in verified if each.constraint is not Constraint.INVENTORY), key=_preference)
    chosen = replace(feasible[0], constraint=None, reason=_won(feasible[0], result)) if feasible else None
    others = [each for each in verified if chosen is None or each.settings != chosen.settings]
    return Advice(
        chosen=chosen,
        binding=chosen.prediction.binding if chosen is not None and chosen.prediction is not None else _lacks(result),
        explanation=(),
        runners_up=tuple(_runners_up(result, chosen, others)),
        pareto=result.pareto()[:PARETO_MAX],
        sensitivities=tuple(_sensitivities(request, chosen, result.best)),
        evaluated=len(result),
        rejected=result.rejected(),
        mix=None if request.deployable else mixed(request, result, verified, chosen),
        assurance=result.assurance,
    )


def evaluate(
    request: AdviceRequest, settings: EngineSettings, *, assurance: float = ASSURANCES[0]
) -> Candidate | None:
    """One configuration as the search judges it, on as many GPUs as it takes; None if the model cannot be cut so.

    What is held against an advice is judged with the advice's own chance.
    """
    space = SearchSpace(
        parallelisms=(settings.parallelism,),
        max_num_seqs=(settings.max_num_seqs,),
        max_num_batched_tokens=(max(settings.max_num_batched_tokens, settings.max_num_seqs),),
        gpu_memory_utilizations=(settings.gpu_memory_utilization,),
        max_model_lens=(settings.max_model_len,),
        kv_cache_dtypes=(settings.precision.kv_cache_dtype,),
        prefix_caching=(settings.enable_prefix_caching,),
        is_guarded=False,  # asked is what these very settings do
    )
    nodes = _endless(tuple(node for node in request.nodes if node.gpu.name == settings.gpu.name) or _node_of(settings))
    found = search(
        request.shape, nodes, request.workload, request.objectives, space=space, precision=settings.precision,
        times_of=times_of(request), assurance=assurance, check_floor=False,
    )  # fmt: skip
    return found.candidate(0) if len(found) else None


def times_of(request: AdviceRequest) -> Callable[[ModelShape, GpuModel, Parallelism, Precision], KernelTimes]:
    """Step times by measured kernels, corrected by what live engines taught where anything did."""
    return corrected_times(request.corrections)


def tier_of(request: AdviceRequest, settings: EngineSettings) -> Tier:
    """On what the step times of a configuration rest."""
    return times_of(request)(request.shape, settings.gpu, settings.parallelism, settings.precision).tier


def searched(request: AdviceRequest) -> SearchResult:
    """All configurations that a request allows, evaluated in closed form."""
    return most_assured(
        request.shape, _within(request.nodes, request.max_gpus), request.workload, request.objectives,
        space=_space(request), times_of=times_of(request),
    )  # fmt: skip


def _space(request: AdviceRequest) -> SearchSpace:
    """What is tried: for a deployment only what it can be given."""
    layouts = (layout for pool in pools_of(request.nodes) for layout in parallelisms(request.shape, pool))
    allowed = dict.fromkeys(layout for layout in layouts if layout.data == 1 or not request.deployable)
    return SearchSpace(
        parallelisms=tuple(allowed), kv_cache_dtypes=request.kv_cache_dtypes, max_model_lens=_context_lengths(request)
    )


def _context_lengths(request: AdviceRequest) -> tuple[int, ...]:
    """The model's own context, then halves of it down to what the workload needs; empty: only these two.

    What a deployment will be sent is not known for sure: it gets the longest context that costs it nothing.
    """
    if not request.deployable:
        return ()
    needed = max(prompt + output for prompt, output in request.workload.lengths)
    context = request.shape.context_tokens
    halves = [context >> shift for shift in range(context.bit_length()) if context >> shift >= needed]
    return tuple(halves[:CONTEXTS_MAX])


def _within(nodes: Sequence[InventoryNode], max_gpus: int | None) -> tuple[InventoryNode, ...]:
    """The nodes cut to so many GPUs of each type: a choice of one type then never takes more."""
    if max_gpus is None:
        return tuple(nodes)
    kept: list[InventoryNode] = []
    left: dict[str, int] = {}
    for node in sorted(nodes, key=lambda each: -each.gpus):
        room = min(node.gpus, left.setdefault(node.gpu.name, max_gpus))
        left[node.gpu.name] -= room
        if room:
            kept.append(replace(node, gpus=room, island_gpus=min(node.island_gpus, room)))
    return tuple(kept)


def _endless(nodes: Sequence[InventoryNode]) -> tuple[InventoryNode, ...]:
    """The same kinds of nodes, as many as anybody could want."""
    kinds = {(node.gpu.name, node.gpus): node for node in nodes}
    return tuple(
        replace(node, name=f"{node.name}-{copy}")
        for node in kinds.values()
        for copy in range(max(1, ENDLESS_GPUS // node.gpus))
    )


def _node_of(settings: EngineSettings) -> tuple[InventoryNode, ...]:
    gpus = max(settings.parallelism.gpus, settings.gpu.island_gpus)
    return (InventoryNode(name="any", gpu=settings.gpu, gpus=gpus, island_gpus=settings.gpu.island_gpus),)


def _verified_finalists(request: AdviceRequest, result: SearchResult) -> tuple[Candidate, ...]:
    """The best layouts with the scheduler's figures; more of them while none has room for what it then takes."""
    found: list[Candidate] = []
    for each in result.finalists(VERIFIED_MAX):
        found.append(_verified(request, each, result))
        if len(found) >= FINALISTS and any(one.constraint is not Constraint.INVENTORY for one in found):
            break
    return tuple(found)


def _verified(request: AdviceRequest, candidate: Candidate, result: SearchResult) -> Candidate:
    """A finalist with the scheduler's figures, and the replicas that it takes by them."""
    settings, rate = candidate.settings, request.workload.requests_per_s
    assert candidate.prediction is not None, "finalists are feasible"
    times = times_of(request)(request.shape, settings.gpu, settings.parallelism, settings.precision)
    memory = fit(
        request.shape, settings.gpu, parallelism=settings.parallelism, precision=settings.precision,
        gpu_memory_utilization=settings.gpu_memory_utilization, max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens, enable_prefix_caching=settings.enable_prefix_caching,
    )  # fmt: skip
    room = next(
        group.room
        for group in result.groups
        if group.pool.gpu == settings.gpu and group.parallelism == settings.parallelism
    )
    found, replicas = candidate.prediction, candidate.replicas
    share = candidate.assured_rps / found.capacity_rps.value
    for _ in range(RECOUNTS):
        found = verify(
            settings, request.workload, request.objectives, times, predicted=found, memory=memory, seed=SEED
        )
        assured = share * found.capacity_rps.value
        needed = max(1, math.ceil(rate / assured - 1e-9)) if assured > 0 else room + 1
        if needed == replicas or needed > room:
            break
        replicas = needed
        found = replace(found, requests_per_s=rate / replicas)
    else:  # the last count was not measured yet
        found = verify(
            settings, request.workload, request.objectives, times, predicted=found, memory=memory, seed=SEED
        )
    cost = replicas * settings.cost_per_hour
    if needed > room:
        reason = f"{_name(candidate, result)}: the scheduler says {needed} replicas, the inventory has room for {room}"
        return replace(
            candidate, prediction=found, replicas=needed, cost_per_hour=math.inf, constraint=Constraint.INVENTORY,
            reason=reason,
        )  # fmt: skip
    return replace(candidate, prediction=found, replicas=replicas, cost_per_hour=cost)


def _preference(candidate: Candidate) -> tuple[float, int, int]:
    """The cheapest first, then what carries most, then the smallest replicas: they fail apart."""
    carried = round(math.log(max(_carried(candidate), 1e-9)) / AS_MUCH)
    return candidate.cost_per_hour, -carried, candidate.settings.parallelism.gpus


def _carried(candidate: Candidate) -> float:
    return candidate.replicas * candidate.prediction.capacity_rps.value if candidate.prediction is not None else 0.0


def _won(candidate: Candidate, result: SearchResult) -> str:
    return f"{_name(candidate, result)}: the cheapest that carries it, ${candidate.cost_per_hour:.2f}/h"


def _name(candidate: Candidate, result: SearchResult) -> str:
    """Its layout in words, as the search has it."""
    settings = candidate.settings
    wanted = (settings.gpu, settings.parallelism, settings.precision)
    return next(each.name for each in result.groups if (each.pool.gpu, each.parallelism, each.precision) == wanted)


def _lacks(result: SearchResult) -> Constraint | None:
    """What most of the candidates that came closest fell to."""
    rejected = [constraint for constraint, _ in result.rejected() if constraint is not Constraint.COST]
    for constraint in (Constraint.INVENTORY, Constraint.TPOT, Constraint.TTFT, Constraint.MEMORY):
        if constraint in rejected:
            return constraint
    return rejected[0] if rejected else None


def _runners_up(result: SearchResult, chosen: Candidate | None, verified: Sequence[Candidate]) -> Iterator[Candidate]:
    """The other finalists, the next layouts, then some that are impossible; each with its reason."""
    told = {_layout(each) for each in verified} | ({_layout(chosen)} if chosen is not None else set())
    left = RUNNERS_UP
    for each in verified:
        if chosen is not None and each.constraint is not Constraint.INVENTORY:
            count = "1 replica carries" if each.replicas == 1 else f"{each.replicas} replicas carry"
            carries = f"{count} {_carried(each):.3g} requests/s for ${each.cost_per_hour:.2f}/h"
            instead = f"the chosen {_carried(chosen):.3g} for ${chosen.cost_per_hour:.2f}/h"
            reason = f"{_name(each, result)}: {carries}, {instead}"
            each = replace(each, constraint=Constraint.COST, reason=reason)  # noqa: PLW2901
        left -= 1
        yield each
    for each in result.finalists(FINALISTS + RUNNERS_UP):
        if left > 0 and _layout(each) not in told:
            left -= 1
            yield each
    for number, each in enumerate(result.losers()):
        if left <= 0 or number >= LOSERS:
            return
        left -= 1
        yield each


def _layout(candidate: Candidate) -> tuple[object, ...]:
    settings = candidate.settings
    return settings.gpu.name, settings.parallelism, settings.precision


def _sensitivities(
    request: AdviceRequest, chosen: Candidate | None, estimated: Candidate | None
) -> Iterator[Sensitivity]:
    """What more GPUs, looser objectives or a smaller cache would buy; `estimated`: the search's own best."""
    if chosen is not None and chosen.prediction is not None:
        yield Sensitivity(
            change="one more GPU" if chosen.settings.parallelism.gpus == 1 else "one more replica",
            cost_per_hour=chosen.cost_per_hour + chosen.settings.cost_per_hour,
            capacity_rps=_carried(chosen) + chosen.prediction.capacity_rps.value,
        )
    else:
        endless = replace(request, nodes=_endless(request.nodes), max_gpus=None)
        yield from _bought(endless, "as many GPUs as it takes", None)
    if request.deployable:
        return
    factor = 1.0
    if chosen is not None and estimated is not None and chosen.settings == estimated.settings:
        factor = _each(chosen) / _each(estimated)
    objectives = request.objectives
    for name, change in (("ttft_s", "a looser first-token objective"), ("tpot_s", "a looser objective between tokens")):
        limit = getattr(objectives, name)
        if limit is not None:
            looser: Objectives = replace(objectives, **{name: limit * LOOSER})
            for bought in _bought(replace(request, objectives=looser), change, chosen, factor):
                yield replace(bought, limit_s=limit * LOOSER)
    if "fp8" not in request.kv_cache_dtypes:
        change = "an fp8 KV cache, which changes answers a little"
        yield from _bought(replace(request, kv_cache_dtypes=("auto", "fp8")), change, chosen, factor)


def _each(candidate: Candidate) -> float:
    assert candidate.prediction is not None, "only feasible candidates are compared"
    return candidate.prediction.capacity_rps.value


def _bought(
    request: AdviceRequest, change: str, chosen: Candidate | None, factor: float = 1.0
) -> Iterator[Sensitivity]:
    """The best under an easier wish; what was chosen under the harder one is open to it as well."""
    try:
        best = searched(request).best
    except RecommendError:
        return                             # the changed wish cannot be answered either
    options = [] if best is None else [(best.cost_per_hour, -_carried(best) * factor)]
    options += [] if chosen is None else [(chosen.cost_per_hour, -_carried(chosen))]
    if options:
        cost, carried = min(options)
        yield Sensitivity(change=change, cost_per_hour=cost, capacity_rps=-carried)
