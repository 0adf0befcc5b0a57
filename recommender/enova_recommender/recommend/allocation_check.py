"""What every allocation must hold, checked from its replicas and the request alone, without anything of the programme.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from enova_recommender.recommend.allocation_types import (
    Allocation,
    AllocationRequest,
    FleetDeployment,
    Option,
    PlacedReplica,
    gpu_price,
)
from enova_recommender.recommend.types import InventoryNode

TOLERANCE = 1e-5  # relative, of rates and costs that were added up


def check(allocation: Allocation, request: AllocationRequest) -> list[str]:
    """A sentence for each rule that is broken; none for a valid allocation."""
    return list(_Checked(allocation, request).violations())


class _Checked:
    """An allocation beside its request, by name."""

    def __init__(self, allocation: Allocation, request: AllocationRequest) -> None:
        self._allocation = allocation
        self._request = request
        self._nodes = {node.name: node for node in request.nodes}
        self._deployments = {item.name: item for item in request.deployments}
        self._options = {(d.name, option.name): option for d in request.deployments for option in d.options}

    def violations(self) -> Iterator[str]:
        unknown = [
            replica for replica in self._allocation.replicas
            if replica.node not in self._nodes or (replica.deployment, replica.option) not in self._options
        ]
        yield from (f"{_shown(replica)} is of no node or option that was given" for replica in unknown)
        if unknown:
            return
        for replica in self._allocation.replicas:
            yield from self._misplaced(replica)
        yield from self._overfull()
        yield from self._not_kept()
        for deployment in self._request.deployments:
            mine = [replica for replica in self._allocation.replicas if replica.deployment == deployment.name]
            yield from self._bounds(deployment, mine)
            yield from self._spread(deployment, mine)
            yield from self._rates(deployment, mine)
        yield from self._costs()

    def _misplaced(self, replica: PlacedReplica) -> Iterator[str]:
        """Type, cluster, number of GPUs, islands."""
        node, option = self._nodes[replica.node], self._options[replica.deployment, replica.option]
        deployment, layout = self._deployments[replica.deployment], option.settings.parallelism
        if node.gpu.name != option.settings.gpu.name:
            yield f"{_shown(replica)} is for {option.settings.gpu.name}, the node has {node.gpu.name}"
        if deployment.gpu_types and node.gpu.name not in deployment.gpu_types:
            yield f"{_shown(replica)} is on a type that is not allowed"
        if deployment.clusters and node.cluster not in deployment.clusters:
            yield f"{_shown(replica)} is in a cluster that is not allowed"
        if len(set(replica.gpus)) != layout.gpus or len(replica.gpus) != layout.gpus:
            yield f"{_shown(replica)} has not its {layout.gpus} GPUs"
        if not all(0 <= gpu < node.gpus for gpu in replica.gpus):
            yield f"{_shown(replica)} has GPUs that the node has not"
        in_islands = Counter(gpu // node.island_gpus for gpu in replica.gpus)
        if any(count % layout.tensor for count in in_islands.values()):
            yield f"{_shown(replica)} has a tensor-parallel group across islands"

    def _overfull(self) -> Iterator[str]:
        """Exclusive GPUs, claimed memory, shares of time."""
        holders: dict[tuple[str, int], list[Option]] = defaultdict(list)
        for replica in self._allocation.replicas:
            for gpu in replica.gpus:
                holders[replica.node, gpu].append(self._options[replica.deployment, replica.option])
        for (name, gpu), options in holders.items():
            node = self._nodes[name]
            free = node.free_bytes[gpu] if node.free_bytes else node.gpu.memory_bytes
            if len(options) > 1 and not all(option.shared for option in options):
                yield f"GPU {gpu} of {name} is held by {len(options)} replicas, not all of which share"
            if sum(option.claim_bytes for option in options) > free:
                yield f"GPU {gpu} of {name} has {free} bytes, and more are claimed"
            if all(option.shared for option in options) and sum(o.time_share for o in options) > 1 + TOLERANCE:
                yield f"GPU {gpu} of {name} is promised for more than all of its time"

    def _not_kept(self) -> Iterator[str]:
        """What is said to stay does run there; what runs and does not stay is said to be stopped."""
        running = Counter(_place(replica) for replica in self._request.running)
        kept = Counter(_place(replica) for replica in self._allocation.replicas if replica.kept)
        stopped = Counter(_place(replica) for replica in self._allocation.stopped)
        if kept - running:
            yield f"{len(kept - running)} replicas are said to stay where none runs"
        if kept + stopped != running:
            yield "what stays and what is stopped is not what runs"

    def _bounds(self, deployment: FleetDeployment, mine: Sequence[PlacedReplica]) -> Iterator[str]:
        if deployment.max_replicas is not None and len(mine) > deployment.max_replicas:
            yield f"{deployment.name} has {len(mine)} replicas, at most {deployment.max_replicas} are allowed"
        if deployment.max_gpus is not None and sum(len(replica.gpus) for replica in mine) > deployment.max_gpus:
            yield f"{deployment.name} holds more than {deployment.max_gpus} GPUs"
        short = any(item.deployment == deployment.name and item.replicas for item in self._allocation.unmet)
        if len(mine) < deployment.min_replicas and not short:
            yield f"{deployment.name} has {len(mine)} replicas, at least {deployment.min_replicas} are wanted"

    def _spread(self, deployment: FleetDeployment, mine: Sequence[PlacedReplica]) -> Iterator[str]:
        by_domain = Counter(_domain(self._nodes[replica.node]) for replica in mine)
        share = deployment.spread.domain_share
        if any(count > share * len(mine) + TOLERANCE for count in by_domain.values()):
            yield f"{deployment.name} has {max(by_domain.values())} of {len(mine)} replicas in one domain"
        rates: dict[tuple[str, str], float] = defaultdict(float)
        for replica in mine:
            rates[_domain(self._nodes[replica.node])] += self._options[replica.deployment, replica.option].capacity_rps
        total = sum(rates.values())
        if any(rate > share * total * (1 + TOLERANCE) for rate in rates.values()):
            yield f"{deployment.name} has {max(rates.values())}/s of {total}/s in one domain"
        if mine and len(by_domain) < deployment.spread.domains:
            yield f"{deployment.name} is in {len(by_domain)} domains, {deployment.spread.domains} are wanted"

    def _rates(self, deployment: FleetDeployment, mine: Sequence[PlacedReplica]) -> Iterator[str]:
        """Carried demand is covered by capacity, what is missing is named, weights add up."""
        capacity = sum(self._options[replica.deployment, replica.option].capacity_rps for replica in mine)
        classes = {item.request_class: item for item in self._allocation.classes if item.deployment == deployment.name}
        if set(classes) != {item.name for item in deployment.classes}:
            yield f"{deployment.name}: not every class has its figures"
            return
        carried = sum(item.carried_rps for item in classes.values())
        slack = TOLERANCE * max(deployment.demand_rps, 1e-9)
        if carried > capacity + slack:
            yield f"{deployment.name} is said to carry {carried}/s with a capacity of {capacity}/s"
        if any(not 0 <= classes[item.name].carried_rps <= item.requests_per_s + slack for item in deployment.classes):
            yield f"{deployment.name}: a class is carried below nothing or beyond its demand"
        unmet = [item for item in self._allocation.unmet if item.deployment == deployment.name]
        missing = deployment.demand_rps * (1 + deployment.headroom) - capacity
        if missing > slack * (1 + deployment.headroom) and not unmet:
            yield f"{deployment.name} lacks {missing}/s, and nothing says so"
        mine_shares = [item for item in self._allocation.variants if item.deployment == deployment.name]
        if sum(item.replicas for item in mine_shares) != len(mine):
            yield f"{deployment.name}: its variants are not its replicas"
        if mine and not math.isclose(sum(item.weight for item in mine_shares), 1.0, rel_tol=TOLERANCE):
            yield f"{deployment.name}: weights do not add up to 1"
        for item in mine_shares:
            if not math.isclose(item.weight * capacity, item.capacity_rps, rel_tol=TOLERANCE):
                yield f"{deployment.name}: the weight of {item.option} is not in proportion to its capacity"

    def _costs(self) -> Iterator[str]:
        """GPUs that are held, each once; replicas that are sold whole; starts."""
        shared: set[tuple[str, int]] = set()
        cost = starts = 0.0
        for replica in self._allocation.replicas:
            node, option = self._nodes[replica.node], self._options[replica.deployment, replica.option]
            price = gpu_price(node) * len(replica.gpus)
            if option.shared:
                shared.add((replica.node, replica.gpus[0]))
                price *= max(option.claim_bytes / option.settings.gpu.memory_bytes, option.time_share)
            else:
                price = price if option.price_per_hour is None else option.price_per_hour
                cost += price
            starts += 0 if replica.kept else price * self._request.start_share
        cost += sum(gpu_price(self._nodes[name]) for name, _ in shared)
        if not math.isclose(cost, self._allocation.cost_per_hour, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield f"the cost is {cost}, not {self._allocation.cost_per_hour}"
        if not math.isclose(cost + starts, self._allocation.objective_per_hour, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield f"the objective is {cost + starts}, not {self._allocation.objective_per_hour}"
        if self._allocation.bound_per_hour > self._allocation.objective_per_hour * (1 + TOLERANCE) + TOLERANCE:
            yield "the bound is above the objective"


def _shown(replica: PlacedReplica) -> str:
    return f"{replica.deployment}/{replica.option} on GPUs {replica.gpus} of {replica.node}"


def _place(replica: PlacedReplica) -> tuple[str, str, str, tuple[int, ...]]:
    return replica.deployment, replica.option, replica.node, tuple(sorted(replica.gpus))


def _domain(node: InventoryNode) -> tuple[str, str]:
    return node.cluster, f"domain {node.domain}" if node.domain else f"node {node.name}"
