"""What a request for an allocation must hold: each fault is refused with the field that is at fault."""

from __future__ import annotations

import math
from collections.abc import Iterable

from enova_recommender.recommend.allocation_types import (
    DEPLOYMENTS_MAX,
    NODE_GPUS_MAX,
    NODES_MAX,
    OPTIONS_MAX,
    PRIORITIES_MAX,
    AllocationRequest,
    FleetDeployment,
    Option,
    SolveLimits,
)
from enova_recommender.recommend.errors import RecommendError
from enova_recommender.recommend.types import InventoryNode


def validate(request: AllocationRequest, limits: SolveLimits) -> None:
    """Raise RecommendError at the first field that no fleet can have."""
    if not request.nodes:
        raise RecommendError("nodes", "the inventory holds no GPU")
    _at_most("nodes", len(request.nodes), NODES_MAX)
    _at_most("deployments", len(request.deployments), DEPLOYMENTS_MAX)
    _unique("nodes", (node.name for node in request.nodes))
    _unique("deployments", (deployment.name for deployment in request.deployments))
    for i, node in enumerate(request.nodes):
        _check_node(f"nodes[{i}]", node)
    for i, deployment in enumerate(request.deployments):
        _check_deployment(f"deployments[{i}]", deployment)
    priorities = {item.priority for deployment in request.deployments for item in deployment.classes}
    _at_most("deployments.classes.priority", len(priorities), PRIORITIES_MAX)
    _at_least("start_hours", request.start_hours, 0)
    _above("lasting_hours", request.lasting_hours, 0)
    _above("limits.time_limit_s", limits.time_limit_s, 0)
    _at_least("limits.gap", limits.gap, 0)
    _check_running(request)


def _check_node(field: str, node: InventoryNode) -> None:
    if node.gpus < 1:
        raise RecommendError(f"{field}.gpus", f"{node.name} has {node.gpus} GPUs")
    _at_most(f"{field}.gpus", node.gpus, NODE_GPUS_MAX)
    if node.island_gpus < 1:
        raise RecommendError(f"{field}.island_gpus", f"{node.island_gpus} is below 1")
    if node.free_bytes and len(node.free_bytes) != node.gpus:
        raise RecommendError(f"{field}.free_bytes", f"{len(node.free_bytes)} amounts for {node.gpus} GPUs")
    if any(free < 0 for free in node.free_bytes):
        raise RecommendError(f"{field}.free_bytes", "an amount is negative")
    price = node.gpu.price_per_hour
    if price is None or not (math.isfinite(price) and price > 0):
        raise RecommendError(f"{field}.gpu.price_per_hour", f"{node.gpu.name} has no price (got {price})")


def _check_deployment(field: str, deployment: FleetDeployment) -> None:
    _unique(f"{field}.classes", (item.name for item in deployment.classes))
    _unique(f"{field}.options", (option.name for option in deployment.options))
    for i, item in enumerate(deployment.classes):
        _at_least(f"{field}.classes[{i}].requests_per_s", item.requests_per_s, 0)
    for i, option in enumerate(deployment.options):
        _check_option(f"{field}.options[{i}]", option)
    _at_most(f"{field}.options", len(deployment.options), OPTIONS_MAX)
    _at_least(f"{field}.headroom", deployment.headroom, 0)
    _above(f"{field}.weight", deployment.weight, 0)
    _at_least(f"{field}.min_replicas", deployment.min_replicas, 0)
    if deployment.max_replicas is not None and deployment.max_replicas < deployment.min_replicas:
        raise RecommendError(f"{field}.max_replicas", f"{deployment.max_replicas} is below min_replicas")
    if deployment.max_gpus is not None:
        _at_least(f"{field}.max_gpus", deployment.max_gpus, 0)
    if not 0 < deployment.spread.domain_share <= 1:
        raise RecommendError(f"{field}.spread.domain_share", f"{deployment.spread.domain_share} is not in (0, 1]")
    _at_least(f"{field}.spread.domains", deployment.spread.domains, 1)


def _check_option(field: str, option: Option) -> None:
    _above(f"{field}.capacity_rps", option.capacity_rps, 0)
    if not 0 < option.settings.gpu_memory_utilization <= 1:
        share = option.settings.gpu_memory_utilization
        raise RecommendError(f"{field}.settings.gpu_memory_utilization", f"{share} is not in (0, 1]")
    if option.claim_bytes < 1:
        raise RecommendError(f"{field}.settings.gpu.memory_bytes", "the claim is empty")
    if option.gpus < 1:
        raise RecommendError(f"{field}.settings.parallelism", "takes no GPU")
    if not 0 < option.time_share <= 1:
        raise RecommendError(f"{field}.time_share", f"{option.time_share} is not in (0, 1]")
    if option.shared and option.gpus != 1:
        raise RecommendError(f"{field}.shared", f"a replica of {option.gpus} GPUs cannot share them")
    if option.price_per_hour is not None:
        _above(f"{field}.price_per_hour", option.price_per_hour, 0)
        if option.shared:
            raise RecommendError(f"{field}.price_per_hour", "a shared replica has no price of its own")


def _check_running(request: AllocationRequest) -> None:
    nodes = {node.name: node for node in request.nodes}
    for i, replica in enumerate(request.running):
        node = nodes.get(replica.node)
        if node is None:
            raise RecommendError(f"running[{i}].node", f"{replica.node} is not in the inventory")
        known = all(0 <= gpu < node.gpus for gpu in replica.gpus)
        if not replica.gpus or not known or len(set(replica.gpus)) != len(replica.gpus):
            raise RecommendError(f"running[{i}].gpus", f"{replica.gpus} are not GPUs of {replica.node}")


def _unique(field: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for i, name in enumerate(names):
        if name in seen:
            raise RecommendError(f"{field}[{i}].name", f"{name!r} is there twice")
        seen.add(name)


def _at_most(field: str, value: int, most: int) -> None:
    if value > most:
        raise RecommendError(field, f"{value} is more than {most}")


def _at_least(field: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise RecommendError(field, f"{value} is not a number of at least {least}")


def _above(field: str, value: float, bound: float) -> None:
    if not (math.isfinite(value) and value > bound):
        raise RecommendError(field, f"{value} is not a number above {bound}")
