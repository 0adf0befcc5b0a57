"""Fleets to allocate: inventories from files, and generated ones whose solution is timed."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from enova_recommender import catalog
from enova_recommender.recommend.allocation import allocate, check
from enova_recommender.recommend.allocation_types import (
    Allocation,
    AllocationRequest,
    ClassDemand,
    FleetDeployment,
    Option,
    PlacedReplica,
    SolveLimits,
    Spread,
)
from enova_recommender.recommend.types import InventoryNode
from enova_testing.allocations import gpu_model, node, option

TYPES = tuple(
    gpu_model(name, price_per_hour=price)
    for name, price in (("H100", 3.0), ("A100", 1.8), ("L40S", 1.0), ("L4", 0.7), ("H200", 3.8))
)
SMALL_TYPES = frozenset({"L40S", "L4"})
GROWTH = 0.93          # capacity a dollar, for each doubling of the tensor-parallel size
RACK_NODES = 25


def inventory(path: Path) -> tuple[InventoryNode, ...]:
    """The nodes of a file in `tests/samples/inventories`, whose README says what the keys are."""
    found: list[InventoryNode] = []
    for index, entry in enumerate(json.loads(path.read_text(encoding="utf-8"))["nodes"]):
        known = catalog.find_gpu(entry["gpu"])
        assert known is not None, entry["gpu"]
        gpu = replace(known, price_per_hour=entry.get("price_per_hour", known.price_per_hour))
        free = gpu.memory_bytes - entry.get("held_bytes", 0)
        racks = entry.get("domains", 0)
        found.extend(
            InventoryNode(
                name=f"{path.stem}-{index}-{number}", gpu=gpu, gpus=entry["gpus"], island_gpus=entry["island_gpus"],
                cluster=entry.get("cluster", "default"), domain=f"rack-{number % racks}" if racks else "",
                free_bytes=(free,) * entry["gpus"] if "held_bytes" in entry else (),
            )
            for number in range(entry["count"])
        )
    return tuple(found)


def generated(nodes: int, *, seed: int, load: float = 0.7) -> AllocationRequest:
    """A fleet of five GPU types in racks, a deployment for each 30 nodes (5 to 30), using about `load` of its worth."""
    draw = np.random.default_rng(seed)
    fleet = []
    for i in range(nodes):
        gpu = TYPES[i % len(TYPES)]
        small = gpu.name in SMALL_TYPES
        fleet.append(node(
            f"n{i}", gpu, 4 if small else 8, island_gpus=2 if small else 8, domain=f"rack-{i // RACK_NODES}",
        ))
    worth = sum(item.gpus * (item.gpu.price_per_hour or 0) for item in fleet) * load
    count = int(np.clip(nodes // 30, 5, 30))
    shares = draw.dirichlet(np.full(count, 2.0))
    return AllocationRequest(
        nodes=tuple(fleet), deployments=tuple(_deployment(i, float(shares[i]) * worth, draw) for i in range(count)),
    )


def _deployment(index: int, rate: float, draw: np.random.Generator) -> FleetDeployment:
    least = int(draw.choice([0, 0, 1, 2]))  # as the logarithm of the smallest tensor-parallel size
    options: list[Option] = []
    for gpu in TYPES:
        for power in range(least, 2 if gpu.name in SMALL_TYPES else 4):
            worth = 2**power * (gpu.price_per_hour or 0) * GROWTH**power * float(draw.lognormal(0, 0.25))
            options.append(option(f"{gpu.name}-tp{2**power}", gpu, worth, tensor=2**power))
    if not least:
        options.append(option(
            "shared", TYPES[3], 0.2 * float(draw.lognormal(0, 0.25)), shared=True, time_share=0.25,
            utilization=float(draw.choice([0.2, 0.3, 0.4])),
        ))
    return FleetDeployment(
        name=f"d{index}", options=tuple(options), headroom=0.1,
        classes=(ClassDemand(name="all", requests_per_s=rate, priority=int(draw.choice([0, 1, 2]))),),
        spread=Spread(domain_share=0.5, domains=2) if draw.random() < 0.5 else Spread(),
    )


def changed(request: AllocationRequest, running: tuple[PlacedReplica, ...], *, seed: int) -> AllocationRequest:
    """The same fleet a while later: one replica in ten is gone, each demand is 10 % off either way."""
    draw = np.random.default_rng(seed)
    stays = tuple(replace(replica, kept=False) for replica in running if draw.random() < 0.9)
    deployments = []
    for item in request.deployments:
        factor = float(draw.uniform(0.9, 1.1))
        classes = tuple(replace(part, requests_per_s=part.requests_per_s * factor) for part in item.classes)
        deployments.append(replace(item, classes=classes))
    return replace(request, running=stays, deployments=tuple(deployments))


def timed(request: AllocationRequest, limits: SolveLimits | None = None) -> tuple[float, Allocation]:
    """Wall seconds of an allocation that breaks no rule, and the allocation."""
    started = time.perf_counter()
    found = allocate(request, limits)
    seconds = time.perf_counter() - started
    violations = check(found, request)
    assert not violations, violations
    return seconds, found


def milp_50(seed: int) -> tuple[float, Allocation]:
    """50 combinations of GPU type and node, held to a limit of solving: seconds, and what was found by then."""
    return timed(generated(50, seed=seed), SolveLimits(time_limit_s=0.8))


def milp_1000_nodes(seed: int) -> tuple[float, Allocation]:
    """1,000 nodes, held to a limit that leaves time for placing: seconds, and what was found by then."""
    return timed(generated(1000, seed=seed), SolveLimits(time_limit_s=8.0))
