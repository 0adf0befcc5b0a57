"""Replicas for a whole fleet: how many of which configuration on which node, at the least cost that carries the demand.

`allocate` sorts the nodes into groups, solves the integer programme over them, places its counts on GPUs, and says what
is not carried, why, and what is missing. Its answer can be checked by `check`, which knows nothing of the programme.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace

from enova_recommender.recommend.allocation_check import check
from enova_recommender.recommend.allocation_greedy import fill_up, worth
from enova_recommender.recommend.allocation_groups import Domain, Fleet, domain_of, fleet_of, is_spread
from enova_recommender.recommend.allocation_model import Counts, FleetModel, Outcome, pools
from enova_recommender.recommend.allocation_place import place
from enova_recommender.recommend.allocation_types import (
    Allocation,
    AllocationRequest,
    CarriedClass,
    FleetDeployment,
    MissingGpus,
    Option,
    PlacedReplica,
    Resource,
    SolveLimits,
    VariantShare,
    gpu_price,
)
from enova_recommender.recommend.allocation_unmet import unmet
from enova_recommender.recommend.allocation_validation import validate

__all__ = ["allocate", "check"]

SPREAD_TIME_SHARE = 0.8   # of the time for equal domains together, where domains matter; the rest for each alone
SPLIT_FIRST_VARIABLES_MAX = 600  # up to here each domain alone is no harder, and always placed
SPLIT_NODES_MAX = 300     # beyond so many nodes domains are never looked at alone
SPLIT_VARIABLES_MAX = 4000  # beyond it the programme with each domain alone finds nothing in useful time
MISSING_TIME_SHARE = 0.2  # of the time once more, to find what is missing
RATE_SLACK = 1e-6         # relative: rates are sums


def allocate(request: AllocationRequest, limits: SolveLimits | None = None) -> Allocation:
    """The cheapest allocation that carries all demand with headroom, or the one that carries the most."""
    limits = limits or SolveLimits()
    validate(request, limits)
    settled = _settled(request, limits)
    fleet, outcome, placed = settled.fleet, settled.outcome, settled.placed
    options = {(d.name, option.name): option for d in request.deployments for option in d.options}
    capacity: dict[str, float] = defaultdict(float)
    for replica in placed:
        capacity[replica.deployment] += options[replica.deployment, replica.option].capacity_rps
    cost, objective = _costs(request, options, placed)
    bound = outcome.bound_per_hour if fleet.keeps_exact else 0.0
    if bound == 0.0:
        bound = _relaxed_bound(fleet, outcome)
    lacking = unmet(fleet, placed, capacity, proven=settled.carried_proven)
    missing = _missing(fleet, _part(limits, MISSING_TIME_SHARE)) if lacking else ()
    return Allocation(
        replicas=placed, variants=_variants(request, placed), cost_per_hour=cost, objective_per_hour=objective,
        classes=tuple(item for d in request.deployments for item in _carried(d, capacity[d.name])),
        bound_per_hour=min(bound, objective), gap=max(objective - bound, 0.0) / objective if objective > 0 else 0.0,
        complete=not lacking, carried_proven=settled.carried_proven, unmet=lacking, missing=missing,
        resources=_resources(fleet, outcome, placed),
        stopped=_stopped(request, placed),
    )


@dataclass(frozen=True, slots=True)
class _Settled:
    """A solution on its GPUs."""

    fleet: Fleet
    outcome: Outcome
    placed: tuple[PlacedReplica, ...]
    carried_proven: bool


def _settled(request: AllocationRequest, limits: SolveLimits) -> _Settled:
    """A solution and its placing: over equal domains together, or if that cannot be placed, over each one alone.

    What neither places in time is filled up replica by replica.
    """
    fleet, alone = fleet_of(request), None
    spread = any(is_spread(deployment) for deployment in request.deployments)
    if spread and len(request.nodes) <= SPLIT_NODES_MAX:
        alone = fleet_of(request, split=True)
        if alone.variables <= SPLIT_FIRST_VARIABLES_MAX:
            fleet, alone = alone, None
    outcome = _solved(fleet, _part(limits, SPREAD_TIME_SHARE) if alone is not None else limits)
    placed, all_placed = place(fleet, outcome.counts)
    good = all_placed and _is_spread_over_enough(request, placed)
    if not good and alone is not None and alone.variables <= SPLIT_VARIABLES_MAX:
        apart = _solved(alone, _part(limits, 1 - SPREAD_TIME_SHARE))
        if apart.carried_proven:
            return _Settled(alone, apart, place(alone, apart.counts)[0], alone.exact)
    if good and outcome.carried_proven:
        return _Settled(fleet, outcome, placed, fleet.exact)
    ways = (placed if good else (), fill_up(fleet, placed), fill_up(fleet))
    return _Settled(fleet, outcome, max(ways, key=lambda way: worth(request, way)), carried_proven=False)


def _solved(fleet: Fleet, limits: SolveLimits) -> Outcome:
    outcome = FleetModel(fleet).solve(limits) if fleet.request.deployments else None
    if outcome is not None:
        return outcome
    deployments = fleet.request.deployments
    levels = [(d, level) for d, item in enumerate(deployments) for level in pools(item)]
    return Outcome(
        counts=Counts(replicas={}, kept={}, columns={}, fillings={}), bound_per_hour=0.0,
        carried_proven=not deployments, complete=False,
        carried=dict.fromkeys(levels, 0.0), headroom=dict.fromkeys(levels, 0.0),
        shortfall={d: float(item.min_replicas) for d, item in enumerate(deployments)},
    )


def _is_spread_over_enough(request: AllocationRequest, placed: tuple[PlacedReplica, ...]) -> bool:
    """Whether every deployment that runs at all is in as many domains as it asks for."""
    domains = {node.name: domain_of(node) for node in request.nodes}
    used: dict[str, set[Domain]] = defaultdict(set)
    for replica in placed:
        used[replica.deployment].add(domains[replica.node])
    return all(len(used[d.name]) >= d.spread.domains for d in request.deployments if d.name in used)


def _part(limits: SolveLimits, share: float) -> SolveLimits:
    return replace(limits, time_limit_s=limits.time_limit_s * share)


def _relaxed_bound(fleet: Fleet, outcome: Outcome) -> float:
    """A bound where some patterns are left out or HiGHS gave none: fractions, and replicas that stay in any pattern."""
    model = FleetModel(fleet, patterns=fleet.exact, pinned=False)
    model.demand_as_carried(outcome)
    relaxed = model.programme.relax(model.costs(), ())
    return relaxed[0] if relaxed is not None else 0.0


def _costs(
    request: AllocationRequest, options: dict[tuple[str, str], Option], placed: tuple[PlacedReplica, ...]
) -> tuple[float, float]:
    """USD an hour of the GPUs that are held, and the same with the charge for starts."""
    prices = {node.name: gpu_price(node) for node in request.nodes}
    shared = {(replica.node, replica.gpus) for replica in placed if options[replica.deployment, replica.option].shared}
    cost, starts = sum((prices[name] for name, _ in shared), 0.0), 0.0
    for replica in placed:
        option, price = options[replica.deployment, replica.option], prices[replica.node]
        if option.shared:
            own = price * max(option.claim_bytes / option.settings.gpu.memory_bytes, option.time_share)
        else:
            own = option.gpus * price if option.price_per_hour is None else option.price_per_hour
            cost += own
        starts += 0.0 if replica.kept else own * request.start_share
    return cost, cost + starts


def _variants(request: AllocationRequest, placed: tuple[PlacedReplica, ...]) -> tuple[VariantShare, ...]:
    """Replicas by option, with weights in proportion to capacity."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for replica in placed:
        counts[replica.deployment, replica.option] += 1
    found: list[VariantShare] = []
    for deployment in request.deployments:
        mine = {o.name: counts[deployment.name, o.name] * o.capacity_rps for o in deployment.options}
        total = sum(mine.values())
        found.extend(
            VariantShare(
                deployment=deployment.name, option=name, replicas=counts[deployment.name, name],
                capacity_rps=rate, weight=rate / total,
            )
            for name, rate in mine.items() if rate > 0
        )
    return tuple(found)


def _carried(deployment: FleetDeployment, capacity_rps: float) -> list[CarriedClass]:
    """Demand of its classes that the capacity carries: higher priorities first, equal ones in proportion."""
    left, shares = capacity_rps, dict[int, float]()
    for priority, rate in sorted(pools(deployment).items(), reverse=True):
        share = min(1.0, left / rate)
        shares[priority] = 1.0 if share > 1 - RATE_SLACK else share
        left = max(left - rate, 0.0)
    return [
        CarriedClass(
            deployment=deployment.name, request_class=item.name, priority=item.priority,
            demand_rps=item.requests_per_s, carried_rps=item.requests_per_s * shares.get(item.priority, 1.0),
        )
        for item in deployment.classes
    ]


def _missing(fleet: Fleet, limits: SolveLimits) -> tuple[MissingGpus, ...]:
    """The cheapest GPUs that would let everything be carried; none if no GPU would."""
    model = FleetModel(fleet, beyond=True)
    found = model.missing(limits) or {}
    prices = model.extra_prices()
    return tuple(
        MissingGpus(gpu=name, gpus=count, cost_per_hour=count * prices[name]) for name, count in sorted(found.items())
    )


def _resources(fleet: Fleet, outcome: Outcome, placed: tuple[PlacedReplica, ...]) -> tuple[Resource, ...]:
    """GPUs by type with their shadow prices."""
    saved = _shadow_costs(fleet, outcome)
    gained = _shadow_rates(fleet, outcome)
    gpu_of = {node.name: node.gpu.name for node in fleet.request.nodes}
    held: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for replica in placed:
        held[gpu_of[replica.node]].update((replica.node, gpu) for gpu in replica.gpus)
    totals: dict[str, int] = defaultdict(int)
    for node in fleet.request.nodes:
        totals[node.gpu.name] += node.gpus
    return tuple(
        Resource(
            gpu=name, total_gpus=total, held_gpus=len(held[name]), saved_per_hour=saved.get(name, 0.0),
            gained_rps=gained.get(name, 0.0),
        )
        for name, total in sorted(totals.items())
    )


def _shadow_costs(fleet: Fleet, outcome: Outcome) -> dict[str, float]:
    """By how much one GPU more of a type lowers the cost of what is carried."""
    model = FleetModel(fleet)
    model.demand_as_carried(outcome)
    return _per_gpu(model, model.costs())


def _shadow_rates(fleet: Fleet, outcome: Outcome) -> dict[str, float]:
    """How many requests/s one GPU more of a type adds to the first priority that is not carried in full."""
    short = {
        level for d, item in enumerate(fleet.request.deployments) for level, rate in pools(item).items()
        if outcome.carried[d, level] < rate * (1 - RATE_SLACK)
    }
    if not short:
        return {}
    model = FleetModel(fleet)
    model.carry_above(max(short), outcome)
    return _per_gpu(model, model.carried_at(max(short)))


def _per_gpu(model: FleetModel, objective: list[tuple[int, float]]) -> dict[str, float]:
    groups = list(model.node_rows)
    relaxed = model.programme.relax(objective, list(model.node_rows.values())) if groups else None
    if relaxed is None:
        return {}
    found: dict[str, float] = defaultdict(float)
    for g, value in zip(groups, relaxed[1], strict=True):
        group = model.fleet.groups[g]
        found[group.gpu] = max(found[group.gpu], float(value) / group.gpus)
    return {name: value for name, value in found.items() if value > RATE_SLACK}


def _stopped(request: AllocationRequest, placed: tuple[PlacedReplica, ...]) -> tuple[PlacedReplica, ...]:
    """What runs and does not stay; equal replicas that share a GPU are counted."""
    kept = Counter(_place(replica) for replica in placed if replica.kept)
    found = []
    for replica in request.running:
        key = _place(replica)
        if kept[key]:
            kept[key] -= 1
        else:
            found.append(replica)
    return tuple(found)


def _place(replica: PlacedReplica) -> tuple[str, str, str, tuple[int, ...]]:
    return replica.deployment, replica.option, replica.node, tuple(sorted(replica.gpus))
