"""What the allocation is measured against: one GPU type, greedy, slices by GPU type, and the programme of the textbook.

The first three choose counts of instances for one deployment, from the same capacities and prices as we do. The last
one has a variable for each replica kind on each node and knows neither groups nor patterns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from enova_recommender.recommend.allocation_types import AllocationRequest, FleetDeployment, Option
from enova_recommender.recommend.types import InventoryNode

SLICES = 8  # of a deployment's demand, each on one type


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """Something that is rented whole, by name, with what it carries."""

    name: str
    price_per_hour: float
    capacity_rps: float


def single_type(instances: tuple[Instance, ...], demand_rps: float) -> dict[str, int]:
    """So many of one instance that they carry the demand, the one for which that is cheapest."""
    costs = {i.name: math.ceil(demand_rps / i.capacity_rps - 1e-9) * i.price_per_hour for i in instances}
    best = min(instances, key=lambda i: costs[i.name])
    return {best.name: math.ceil(demand_rps / best.capacity_rps - 1e-9)}


def greedy(instances: tuple[Instance, ...], demand_rps: float) -> dict[str, int]:
    """Always one more of the instance with the least price for its capacity, until it is enough."""
    best = min(instances, key=lambda i: i.price_per_hour / i.capacity_rps)
    whole = int(demand_rps / best.capacity_rps)
    left = demand_rps - whole * best.capacity_rps
    counts = defaultdict[str, int](int, {best.name: whole})
    if left > 1e-9 * demand_rps:
        # The last one is the cheapest that does.
        enough = [i for i in instances if i.capacity_rps >= left] or [best]
        counts[min(enough, key=lambda i: i.price_per_hour).name] += 1
    return {name: count for name, count in counts.items() if count}


def sliced(instances: tuple[Instance, ...], demand_rps: float) -> dict[str, int]:
    """Melange's programme (Griggs et al. 2024): slices of demand, each on one type, as many of it as they load."""
    types, slices = len(instances), SLICES
    load = np.array([demand_rps / slices / i.capacity_rps for i in instances])
    costs = np.concatenate([np.zeros(slices * types), [i.price_per_hour for i in instances]])
    rows = np.zeros((slices + types, len(costs)))
    for s in range(slices):
        rows[s, s * types : (s + 1) * types] = 1
    for t in range(types):
        rows[slices + t, t : slices * types : types] = load[t]
        rows[slices + t, slices * types + t] = -1
    low = np.concatenate([np.ones(slices), np.full(types, -np.inf)])
    high = np.concatenate([np.ones(slices), np.zeros(types)])
    upper = np.concatenate([np.ones(slices * types), np.full(types, np.inf)])
    found = milp(
        costs, constraints=LinearConstraint(rows, low, high), integrality=np.ones(len(costs)), bounds=Bounds(0, upper),
        options={"time_limit": 5.0},
    )
    counts = np.round(found.x[slices * types :]).astype(int)
    return {i.name: int(count) for i, count in zip(instances, counts, strict=True) if count}


@dataclass(frozen=True, slots=True)
class Textbook:
    """The least cost that was found, and the bound that HiGHS proved."""

    cost_per_hour: float | None
    bound_per_hour: float
    proven: bool


class _Rows:
    def __init__(self) -> None:
        self.entries: list[tuple[int, int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def add(self, terms: Mapping[int, float], low: float = -np.inf, high: float = np.inf) -> None:
        self.entries.extend((len(self.low), variable, value) for variable, value in terms.items())
        self.low.append(low)
        self.high.append(high)


def textbook(request: AllocationRequest, *, time_limit_s: float) -> Textbook:
    """All demand with headroom at the least cost: replicas of each option on each node, chunks on each island.

    Exclusive replicas only; nodes have equal GPUs with equal free memory; demand has to be carried in full.
    """
    costs: list[float] = []
    rows = _Rows()
    replicas: dict[tuple[int, int, int], int] = {}
    for n, node in enumerate(request.nodes):
        room: list[dict[int, float]] = [{} for _ in range(math.ceil(node.gpus / node.island_gpus))]
        for d, deployment in enumerate(request.deployments):
            for o, option in enumerate(deployment.options):
                if _fits(deployment, option, node):
                    replicas[d, o, n] = len(costs)
                    costs.append(option.gpus * (node.gpu.price_per_hour or math.nan))
                    chunks = {replicas[d, o, n]: -float(option.gpus // option.settings.parallelism.tensor)}
                    for island in room:
                        island[len(costs)] = option.settings.parallelism.tensor
                        chunks[len(costs)] = 1.0
                        costs.append(0.0)
                    rows.add(chunks, 0, 0)
        for i, island in enumerate(room):
            rows.add(island, high=min(node.island_gpus, node.gpus - i * node.island_gpus))
    for d, deployment in enumerate(request.deployments):
        mine = {(o, n): variable for (owner, o, n), variable in replicas.items() if owner == d}
        _demand(request, deployment, mine, rows, costs)
    entries = np.array(rows.entries)
    places = entries[:, :2].astype(int)
    matrix = csr_array((entries[:, 2], (places[:, 0], places[:, 1])), shape=(len(rows.low), len(costs)))
    found = milp(
        np.array(costs), constraints=LinearConstraint(matrix, rows.low, rows.high), integrality=np.ones(len(costs)),
        bounds=Bounds(0, np.inf), options={"time_limit": time_limit_s, "mip_rel_gap": 1e-6},
    )
    bound = found.mip_dual_bound
    return Textbook(
        cost_per_hour=float(found.fun) if found.x is not None else None, proven=found.status == 0,
        bound_per_hour=float(bound) if bound is not None and np.isfinite(bound) else 0.0,
    )


def _fits(deployment: FleetDeployment, option: Option, node: InventoryNode) -> bool:
    free = min(node.free_bytes) if node.free_bytes else node.gpu.memory_bytes
    return (
        option.settings.gpu.name == node.gpu.name and option.gpus <= node.gpus and free >= option.claim_bytes
        and (not deployment.clusters or node.cluster in deployment.clusters)
    )


def _demand(
    request: AllocationRequest, deployment: FleetDeployment, mine: Mapping[tuple[int, int], int], rows: _Rows,
    costs: list[float],
) -> None:
    """Capacity of one deployment, its spread over domains; `mine`: its variables by option and node."""
    rate = {variable: deployment.options[o].capacity_rps for (o, _), variable in mine.items()}
    rows.add(rate, low=deployment.demand_rps * (1 + deployment.headroom))
    share = deployment.spread.domain_share
    domains: dict[tuple[str, str], set[int]] = defaultdict(set)
    for (_, n), variable in mine.items():
        node = request.nodes[n]
        domains[node.cluster, node.domain or f"node {node.name}"].add(variable)
    used: dict[int, float] = {}
    for members in domains.values():
        if share < 1:
            rows.add({v: (v in members) - share for v in rate}, high=0)
            rows.add({v: value * ((v in members) - share) for v, value in rate.items()}, high=0)
        if deployment.spread.domains > 1:
            used[len(costs)] = 1.0
            rows.add({len(costs): 1.0, **dict.fromkeys(members, -1.0)}, high=0)
            rows.add({len(costs): 1.0}, high=1)
            costs.append(0.0)
    if used:
        rows.add(used, low=deployment.spread.domains)
