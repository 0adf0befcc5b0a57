"""Replicas of several configurations together: where types of GPU are mixed, or where no single one carries it all.

The integer programme of `allocation` gets the best settings of each layout as options, counted by the lower bound of
their capacity, and the nodes as they are. What it cannot carry, and which GPUs are missing, is part of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from enova_recommender.recommend.allocation import allocate
from enova_recommender.recommend.allocation_types import (
    AllocationRequest,
    ClassDemand,
    FleetDeployment,
    SolveLimits,
    options_of,
)
from enova_recommender.recommend.request import AdviceRequest
from enova_recommender.recommend.search_result import SearchResult
from enova_recommender.recommend.types import Candidate, Constraint, InventoryNode, Mix, MixedReplicas

LAYOUTS = 12               # options of the programme: the best settings of so many layouts
LIMITS = SolveLimits(time_limit_s=2.0)
DEPLOYMENT = "asked"
SAVING_MIN = 0.001         # of the cost, below which one configuration is simpler
NODE_GPUS_MAX = 8          # larger nodes are looked at island by island: the ways to fill them are too many


def mixed(
    request: AdviceRequest, result: SearchResult, verified: Sequence[Candidate], chosen: Candidate | None
) -> Mix | None:
    """The cheapest mix, if it is cheaper than the one configuration that was chosen, or if there is none."""
    if chosen is not None and len({node.gpu for node in request.nodes}) == 1:
        return None                        # several layouts on one type of GPU are not worth their trouble
    candidates = _candidates(result, verified)
    options = options_of(tuple(candidates), cautious=True)
    if not options:
        return None
    deployment = FleetDeployment(
        name=DEPLOYMENT,
        classes=(ClassDemand(name="all", requests_per_s=request.workload.requests_per_s),),
        options=options,
        max_gpus=request.max_gpus,
    )
    found = allocate(AllocationRequest(nodes=_islands(request.nodes), deployments=(deployment,)), LIMITS)
    by_name = {option.name: option.settings for option in options}
    by_settings = {each.settings: each for each in candidates}
    parts = tuple(
        MixedReplicas(candidate=_part(by_settings[by_name[share.option]], share.replicas), weight=share.weight)
        for share in found.variants
        if share.replicas
    )
    if not parts:
        return None
    cheaper = chosen is not None and found.complete and found.cost_per_hour < chosen.cost_per_hour * (1 - SAVING_MIN)
    if chosen is not None and not cheaper:
        return None
    return Mix(
        parts=parts,
        cost_per_hour=found.cost_per_hour,
        carried_rps=found.carried_rps,
        missing=tuple((each.gpu, each.gpus, each.cost_per_hour) for each in found.missing),
    )


def _islands(nodes: Sequence[InventoryNode]) -> tuple[InventoryNode, ...]:
    """The nodes, large ones cut into their islands."""
    found: list[InventoryNode] = []
    for node in nodes:
        size = min(NODE_GPUS_MAX, max(1, node.island_gpus)) if node.gpus > NODE_GPUS_MAX else node.gpus
        for start in range(0, node.gpus, size):
            gpus = min(size, node.gpus - start)
            found.append(replace(node, name=f"{node.name}-{start}", gpus=gpus, island_gpus=min(node.island_gpus, gpus)))
    return tuple(found)


def _candidates(result: SearchResult, verified: Sequence[Candidate]) -> list[Candidate]:
    """The best settings of each layout whose replicas carry something, however few there is room for."""
    known = {(each.settings.gpu.name, each.settings.parallelism, each.settings.precision): each for each in verified}
    lacking = (each for each in result.losers() if each.constraint is Constraint.INVENTORY)
    for each in (*result.finalists(LAYOUTS), *lacking):
        settings = each.settings
        known.setdefault((settings.gpu.name, settings.parallelism, settings.precision), each)
    return list(known.values())[:LAYOUTS]


def _part(candidate: Candidate, replicas: int) -> Candidate:
    """A candidate with the replicas that the mix has of it."""
    cost = replicas * candidate.settings.cost_per_hour
    return replace(candidate, replicas=replicas, cost_per_hour=cost, constraint=None, reason="")
