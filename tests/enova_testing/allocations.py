"""Builders of allocation requests, and the best allocation of a small one found by trying all of them.

The search places every replica on named GPUs and shares no code with the library: it is what the programme is held to.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from enova_recommender.recommend.allocation_types import (
    Allocation,
    AllocationRequest,
    FleetDeployment,
    Option,
    PlacedReplica,
)
from enova_recommender.recommend.types import EngineSettings, InventoryNode
from enova_recommender.types import AS_PUBLISHED, GpuModel, Parallelism

GIB = 1 << 30

Key = tuple[str, str]             # deployment, option
Counts = tuple[tuple[Key, int], ...]


def gpu_model(name: str, *, price_per_hour: float | None = 1.0, memory_gib: int = 80) -> GpuModel:
    """A GPU by what an allocation looks at."""
    return GpuModel(
        name=name, driver_names=(name,), memory_bytes=memory_gib * GIB, bandwidth_bytes_per_s=2e12, bf16_flops=3e14,
        fp8_flops=None, link_bytes_per_s=3e11, power_limit_w=400.0, idle_power_w=50.0, sm_clock_mhz=1500.0,
        memory_clock_mhz=1500.0, price_per_hour=price_per_hour, source="made up",
    )


def option(
    name: str, gpu: GpuModel, capacity_rps: float, *, tensor: int = 1, pipeline: int = 1, utilization: float = 0.9,
    shared: bool = False, time_share: float = 1.0, price_per_hour: float | None = None,
) -> Option:
    """A way to run a replica."""
    settings = EngineSettings(
        gpu=gpu, parallelism=Parallelism(tensor=tensor, pipeline=pipeline), precision=AS_PUBLISHED, max_num_seqs=64,
        max_num_batched_tokens=2048, gpu_memory_utilization=utilization, max_model_len=4096,
    )
    return Option(
        name=name, settings=settings, capacity_rps=capacity_rps, shared=shared, time_share=time_share,
        price_per_hour=price_per_hour,
    )


def node(
    name: str, gpu: GpuModel, gpus: int, *, island_gpus: int | None = None, cluster: str = "default", domain: str = "",
    free_gib: Sequence[int] = (),
) -> InventoryNode:
    """A host; all of its GPUs are one island unless said otherwise."""
    return InventoryNode(
        name=name, gpu=gpu, gpus=gpus, island_gpus=island_gpus or gpus, cluster=cluster, domain=domain,
        free_bytes=tuple(free * GIB for free in free_gib),
    )


@dataclass(frozen=True, slots=True)
class Value:
    """What an allocation is worth: carried shares by priority, highest first, then the cost with starts."""

    carried: tuple[float, ...]
    objective_per_hour: float


def value_of(allocation: Allocation, request: AllocationRequest) -> Value:
    """The worth of an answer, from its replicas alone."""
    counts = Counter((replica.deployment, replica.option) for replica in allocation.replicas)
    return Value(_carried(request, counts), allocation.objective_per_hour)


def best_value(request: AllocationRequest) -> Value:
    """The worth of the best allocation of all."""
    tables = [list(_node_table(request, item).items()) for item in request.nodes]
    domains = [(item.cluster, item.domain or f"\0{item.name}") for item in request.nodes]
    best: Value | None = None
    for combination in itertools.product(*tables):
        counts: Counter[Key] = Counter()
        for content, _ in combination:
            counts.update(dict(content))
        if not all(_allowed(item, request, combination, domains) for item in request.deployments):
            continue
        value = Value(_carried(request, counts), sum(cost for _, cost in combination))
        if best is None or _better(value, best):
            best = value
    assert best is not None
    return best


def _better(one: Value, other: Value) -> bool:
    for a, b in zip(one.carried, other.carried, strict=True):
        if abs(a - b) > 1e-6:
            return a > b
    return one.objective_per_hour < other.objective_per_hour - 1e-9


def _carried(request: AllocationRequest, counts: Mapping[Key, int]) -> tuple[float, ...]:
    """For each priority: weighted shares of demand less missing replicas, then weighted shares of headroom."""
    demand, headroom = defaultdict[int, float](float), defaultdict[int, float](float)
    for item in request.deployments:
        left = sum(counts.get((item.name, o.name), 0) * o.capacity_rps for o in item.options)
        pools = Counter[int]()
        for part in item.classes:
            pools[part.priority] += part.requests_per_s  # type: ignore[assignment]
        for priority in sorted(pools, reverse=True):
            demand[priority] += 0.0
            if pools[priority] > 0:
                carried = min(left, pools[priority])
                demand[priority] += item.weight * carried / pools[priority]
                spare = min(left - carried, pools[priority] * item.headroom)
                if item.headroom > 0:
                    headroom[priority] += item.weight * spare / (pools[priority] * item.headroom)
                left -= carried + spare
        if item.min_replicas:
            replicas = sum(counts.get((item.name, o.name), 0) for o in item.options)
            missing = max(item.min_replicas - replicas, 0) / item.min_replicas
            demand[max(pools, default=0)] -= item.weight * missing
    return tuple(part for priority in sorted(demand, reverse=True) for part in (demand[priority], headroom[priority]))


def _allowed(
    item: FleetDeployment, request: AllocationRequest, combination: Sequence[tuple[Counts, float]],
    domains: Sequence[tuple[str, str]],
) -> bool:
    replicas, rates = Counter[tuple[str, str]](), defaultdict[tuple[str, str], float](float)
    gpus = 0
    options = {o.name: o for o in item.options}
    for (content, _), domain in zip(combination, domains, strict=True):
        for (deployment, name), count in content:
            if deployment == item.name:
                replicas[domain] += count
                rates[domain] += count * options[name].capacity_rps
                gpus += count * options[name].gpus
    total = sum(replicas.values())
    if item.max_replicas is not None and total > item.max_replicas:
        return False
    if item.max_gpus is not None and gpus > item.max_gpus:
        return False
    if not total:
        return True
    share, rate = item.spread.domain_share, sum(rates.values())
    return (
        len(replicas) >= item.spread.domains
        and max(replicas.values()) <= share * total + 1e-6
        and max(rates.values()) <= share * rate * (1 + 1e-6)
    )


def _node_table(request: AllocationRequest, item: InventoryNode) -> dict[Counts, float]:
    """What can run on one node, with the least cost of it."""
    options = {
        (d.name, o.name): o for d in request.deployments for o in d.options
        if o.settings.gpu.name == item.gpu.name and (not d.gpu_types or item.gpu.name in d.gpu_types)
        and (not d.clusters or item.cluster in d.clusters)
    }
    running = Counter(
        ((replica.deployment, replica.option), tuple(sorted(replica.gpus)))
        for replica in request.running if replica.node == item.name
    )
    found: dict[Counts, float] = {}
    for placed in _placements(item, options, frozenset(range(item.gpus))):
        counts = tuple(sorted(Counter(key for key, _ in placed).items()))
        cost = _cost(request, item, options, placed, running)
        if counts not in found or cost < found[counts]:
            found[counts] = cost
    return found


def _cost(
    request: AllocationRequest, item: InventoryNode, options: Mapping[Key, Option],
    placed: Sequence[tuple[Key, tuple[int, ...]]], running: Counter[tuple[Key, tuple[int, ...]]],
) -> float:
    price = item.gpu.price_per_hour
    assert price is not None
    shared = {gpus for key, gpus in placed if options[key].shared}
    cost, stays = price * len(shared), Counter(running)
    for key, gpus in placed:
        chosen = options[key]
        if chosen.shared:
            own = price * max(chosen.claim_bytes / chosen.settings.gpu.memory_bytes, chosen.time_share)
        else:
            own = len(gpus) * price if chosen.price_per_hour is None else chosen.price_per_hour
            cost += own
        if stays[key, gpus]:
            stays[key, gpus] -= 1
        else:
            cost += own * request.start_hours / request.lasting_hours
    return cost


def _placements(
    item: InventoryNode, options: Mapping[Key, Option], open_gpus: frozenset[int]
) -> Iterator[list[tuple[Key, tuple[int, ...]]]]:
    """All ways to use these GPUs of a node."""
    if not open_gpus:
        yield []
        return
    first = min(open_gpus)
    rest = open_gpus - {first}
    for placed in _placements(item, options, rest):
        yield placed
    for key, chosen in options.items():
        if not chosen.shared:
            for others in itertools.combinations(sorted(rest), chosen.gpus - 1):
                gpus = (first, *others)
                if _fits(item, chosen, gpus):
                    for placed in _placements(item, options, rest - set(others)):
                        yield [(key, gpus), *placed]
    sharing = [(key, chosen) for key, chosen in options.items() if chosen.shared]
    for together in _sharings(item, sharing, first):
        for placed in _placements(item, options, rest):
            yield [*((key, (first,)) for key in together), *placed]


def _fits(item: InventoryNode, chosen: Option, gpus: Sequence[int]) -> bool:
    free = item.free_bytes or (item.gpu.memory_bytes,) * item.gpus
    islands = Counter(gpu // item.island_gpus for gpu in gpus)
    tensor = chosen.settings.parallelism.tensor
    return all(free[gpu] >= chosen.claim_bytes for gpu in gpus) and not any(n % tensor for n in islands.values())


def _sharings(item: InventoryNode, sharing: Sequence[tuple[Key, Option]], gpu: int) -> Iterator[list[Key]]:
    """All sets of replicas, not empty, that one GPU carries together."""
    free = item.free_bytes[gpu] if item.free_bytes else item.gpu.memory_bytes
    size = 1
    while True:
        fitting = [
            [key for key, _ in together]
            for together in itertools.combinations_with_replacement(sharing, size)
            if sum(o.claim_bytes for _, o in together) <= free and sum(o.time_share for _, o in together) <= 1 + 1e-9
        ]
        if not fitting:
            return
        yield from fitting
        size += 1


def placed(deployment: str, name: str, on: str, *gpus: int) -> PlacedReplica:
    """A replica that runs."""
    return PlacedReplica(deployment=deployment, option=name, node=on, gpus=gpus)
