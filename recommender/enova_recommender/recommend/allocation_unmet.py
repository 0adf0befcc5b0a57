"""Why demand is not carried: for each deployment that lacks something the first obstacle in its way, with numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from enova_recommender.recommend.allocation_groups import Fleet, is_spread
from enova_recommender.recommend.allocation_types import FleetDeployment, Obstacle, Option, PlacedReplica, Unmet

RATE_SLACK = 1e-6  # relative: rates are sums


def unmet(
    fleet: Fleet, placed: Sequence[PlacedReplica], capacity_rps: Mapping[str, float], *, proven: bool
) -> tuple[Unmet, ...]:
    """What each deployment lacks, given the capacity that it got; `proven`: no allocation carries more."""
    found = []
    for index, deployment in enumerate(fleet.request.deployments):
        mine = [replica for replica in placed if replica.deployment == deployment.name]
        capacity, demand = capacity_rps.get(deployment.name, 0.0), deployment.demand_rps
        slack = RATE_SLACK * demand
        lacking = max(demand - capacity, 0.0)
        headroom = max(demand * (1 + deployment.headroom) - capacity - lacking, 0.0)
        replicas = max(deployment.min_replicas - len(mine), 0)
        if lacking <= slack and headroom <= slack * (1 + deployment.headroom) and not replicas:
            continue
        obstacle, reason = _obstacle(fleet, index, mine, placed, proven=proven)
        found.append(Unmet(
            deployment=deployment.name, requests_per_s=lacking if lacking > slack else 0.0,
            headroom_rps=headroom if headroom > slack else 0.0, replicas=replicas, obstacle=obstacle, reason=reason,
        ))
    return tuple(found)


def _obstacle(
    fleet: Fleet, index: int, mine: Sequence[PlacedReplica], placed: Sequence[PlacedReplica], *, proven: bool
) -> tuple[Obstacle, str]:
    deployment = fleet.request.deployments[index]
    if not deployment.options:
        return Obstacle.NO_OPTION, "no configuration is known that meets its objectives"
    choices = {c for c, choice in enumerate(fleet.choices) if choice.deployment == index}
    fitting = [group for group in fleet.groups if choices & set(group.choices)]
    if not fitting:
        return Obstacle.NO_NODE, _no_node(fleet, deployment)
    if deployment.max_replicas is not None and len(mine) >= deployment.max_replicas:
        return Obstacle.MAX_REPLICAS, f"max_replicas {deployment.max_replicas} is reached"
    held = sum(len(replica.gpus) for replica in mine)
    smallest = min(fleet.choices[c].option.gpus for group in fitting for c in choices & set(group.choices))
    if deployment.max_gpus is not None and held + smallest > deployment.max_gpus:
        return Obstacle.MAX_GPUS, (
            f"max_gpus {deployment.max_gpus} leaves {deployment.max_gpus - held}, the smallest replica takes {smallest}"
        )
    domains = {fleet.domains[at] for group in fitting for at in group.nodes}
    if is_spread(deployment) and (len(domains) < _domains_needed(deployment)):
        return Obstacle.SPREAD, (
            f"its spread asks for {_domains_needed(deployment)} failure domains, {len(domains)} have nodes that fit"
        )
    if not proven:
        return Obstacle.TIME_LIMIT, "the time limit ended the search; more may be possible"
    types = {group.gpu for group in fitting}
    if is_spread(deployment) and any(_idle(fleet, name, placed) >= smallest for name in types):
        return Obstacle.SPREAD, (
            f"GPUs are left over in too few of {len(domains)} failure domains for a share of at most "
            f"{deployment.spread.domain_share:.2f} in each"
        )
    left = ", ".join(f"{_idle(fleet, name, placed)} {name}" for name in sorted(types))
    return Obstacle.GPUS, (
        f"what is left over ({left}) has no room for {_needs(fleet, choices)} more; "
        "the rest it holds itself, or others of the same or a higher priority do"
    )


def _domains_needed(deployment: FleetDeployment) -> int:
    """At least so many, since shares of them add up to 1."""
    return max(deployment.spread.domains, -int(-1 / deployment.spread.domain_share + RATE_SLACK))


def _idle(fleet: Fleet, gpu: str, placed: Sequence[PlacedReplica]) -> int:
    """GPUs of a type that nothing holds."""
    nodes = {node.name: node for node in fleet.request.nodes if node.gpu.name == gpu}
    held = {(replica.node, index) for replica in placed if replica.node in nodes for index in replica.gpus}
    return sum(node.gpus for node in nodes.values()) - len(held)


def _needs(fleet: Fleet, choices: set[int]) -> str:
    needs = {(option.gpus, option.settings.gpu.name) for option in (fleet.choices[c].option for c in choices)}
    return " or ".join(f"{gpus} {name}" for gpus, name in sorted(needs))


def _no_node(fleet: Fleet, deployment: FleetDeployment) -> str:
    """Why none of its options fits anywhere: the reason of the one that comes nearest."""
    return max((_misfit(fleet, deployment, option) for option in deployment.options), key=lambda item: item[0])[1]


def _misfit(fleet: Fleet, deployment: FleetDeployment, option: Option) -> tuple[int, str]:
    """How far an option gets, and what stops it."""
    name, layout = option.settings.gpu.name, option.settings.parallelism
    nodes = [node for node in fleet.request.nodes if node.gpu.name == name]
    if not nodes:
        return 0, f"no node has a GPU of type {name}"
    if deployment.gpu_types and name not in deployment.gpu_types:
        return 1, f"{name} is not among its GPU types ({', '.join(deployment.gpu_types)})"
    nodes = [node for node in nodes if not deployment.clusters or node.cluster in deployment.clusters]
    if not nodes:
        return 2, f"no cluster that it may use ({', '.join(deployment.clusters)}) has {name}"
    if max(node.gpus for node in nodes) < option.gpus:
        return 3, f"a replica takes {option.gpus} {name} of one node, the largest has {max(n.gpus for n in nodes)}"
    island = max(min(node.island_gpus, node.gpus) for node in nodes)
    if island < layout.tensor:
        return 4, f"a tensor-parallel group takes {layout.tensor} {name} of one island, the largest has {island}"
    return 5, f"no node has {option.gpus} {name} with {option.claim_bytes} bytes free on each"
