"""The values that the allocation of a fleet speaks in: what is asked, what runs, what goes where, what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from enova_recommender.recommend.types import Candidate, EngineSettings, InventoryNode

# Bounds of a request: what the design names (1,000 nodes), with room; over a bound the request is refused.
NODES_MAX = 4096
DEPLOYMENTS_MAX = 1024
OPTIONS_MAX = 64          # of one deployment, after those that another one dominates are left out
PRIORITIES_MAX = 16       # distinct ones: each costs two solves where not everything fits
NODE_GPUS_MAX = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to run a replica of a deployment, with the rate that it carries within the objectives.

    An exclusive replica holds whole GPUs. A shared one holds `claim_bytes` and at most `time_share` of the time of one
    GPU, beside others; its capacity is the one that it has in such company.
    """

    name: str                          # unique within its deployment
    settings: EngineSettings
    capacity_rps: float
    shared: bool = False
    time_share: float = 1.0
    price_per_hour: float | None = None  # of an exclusive replica that is sold whole; None: its GPUs, each at its price

    @property
    def claim_bytes(self) -> int:
        """Memory that the engine takes on each of its GPUs."""
        return int(self.settings.gpu_memory_utilization * self.settings.gpu.memory_bytes)

    @property
    def gpus(self) -> int:
        """GPUs of one replica; a shared one counts as one."""
        return self.settings.parallelism.gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassDemand:
    """Requests of one class; higher priorities are carried first where not all can be."""

    name: str
    requests_per_s: float
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How the replicas of a deployment lie over failure domains, if there are any."""

    domain_share: float = 1.0  # at most this share of the replicas, and of their capacity, in one domain
    domains: int = 1           # at least so many domains hold one


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetDeployment:
    """What one deployment wants of the fleet."""

    name: str
    classes: tuple[ClassDemand, ...]
    options: tuple[Option, ...]
    headroom: float = 0.0              # capacity beyond demand, as a share of the demand
    weight: float = 1.0                # against other deployments of the same priority
    min_replicas: int = 0
    max_replicas: int | None = None
    max_gpus: int | None = None
    gpu_types: tuple[str, ...] = ()    # allowed; empty: any
    clusters: tuple[str, ...] = ()     # allowed; empty: any
    spread: Spread = Spread()

    @property
    def demand_rps(self) -> float:
        """Requests of all classes."""
        return sum(item.requests_per_s for item in self.classes)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedReplica:
    """One replica on GPUs of one node, by their index there; `kept` if it runs there already."""

    deployment: str
    option: str
    node: str
    gpus: tuple[int, ...]
    kept: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationRequest:
    """A whole fleet: its nodes, its deployments, what runs now.

    `nodes[].free_bytes` leaves out what `running` holds: those GPUs are shared out anew. A start costs `start_hours` of
    the replica's price, spread over the `lasting_hours` that the allocation is expected to last.
    """

    nodes: tuple[InventoryNode, ...]
    deployments: tuple[FleetDeployment, ...]
    running: tuple[PlacedReplica, ...] = ()
    start_hours: float = 0.05
    lasting_hours: float = 1.0

    @property
    def start_share(self) -> float:
        """What a start adds to the hourly cost of a replica, as a share of it."""
        return self.start_hours / self.lasting_hours


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveLimits:
    """When to be content: at `gap` of the best that can be, or after `time_limit_s` of solving in all."""

    time_limit_s: float = 10.0
    gap: float = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantShare:
    """The replicas of one option and the share of the deployment's requests that they get."""

    deployment: str
    option: str
    replicas: int
    capacity_rps: float  # of all of them
    weight: float        # in proportion to capacity; those of a deployment add up to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CarriedClass:
    """What of a class's requests is carried."""

    deployment: str
    request_class: str
    priority: int
    demand_rps: float
    carried_rps: float


class Obstacle(StrEnum):
    """What keeps demand from being carried."""

    NO_OPTION = "NO_OPTION"          # no configuration is known
    NO_NODE = "NO_NODE"              # none of them fits on any node that is allowed
    GPUS = "GPUS"                    # all GPUs that would do are taken
    MAX_GPUS = "MAX_GPUS"            # the deployment's own bound
    MAX_REPLICAS = "MAX_REPLICAS"    # the deployment's own bound
    SPREAD = "SPREAD"                # too few failure domains have room
    TIME_LIMIT = "TIME_LIMIT"        # a better answer may exist


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmet:
    """What a deployment lacks, and why."""

    deployment: str
    requests_per_s: float    # not carried
    headroom_rps: float      # capacity that is missing from its headroom
    replicas: int            # missing from min_replicas
    obstacle: Obstacle
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingGpus:
    """GPUs that, added to the fleet, would let everything be carried (within the deployments' own bounds)."""

    gpu: str
    gpus: int
    cost_per_hour: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """GPUs of one type: how many are held, and what one more would buy (the linear programme's shadow prices).

    A shadow price holds for a small change; as GPUs come whole, one more may buy nothing and four more all of it.
    """

    gpu: str
    total_gpus: int
    held_gpus: int
    saved_per_hour: float    # USD, at the demand that is carried
    gained_rps: float        # requests/s of the highest priority that is not carried in full


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The answer: replicas on nodes, and how good it is.

    `objective_per_hour` is the cost and the charge for starts; no allocation that carries as much has less than
    `bound_per_hour`. `gap` is the distance between them as a share of the objective. `complete`: all demand, headroom
    and least replicas are there. `carried_proven`: no allocation carries more (by priority).
    """

    replicas: tuple[PlacedReplica, ...]
    variants: tuple[VariantShare, ...]
    classes: tuple[CarriedClass, ...]
    cost_per_hour: float
    objective_per_hour: float
    bound_per_hour: float
    gap: float
    complete: bool
    carried_proven: bool
    unmet: tuple[Unmet, ...] = ()
    missing: tuple[MissingGpus, ...] = ()
    resources: tuple[Resource, ...] = ()
    stopped: tuple[PlacedReplica, ...] = ()  # of those that run, those that do not stay where they are

    @property
    def carried_rps(self) -> float:
        """Requests of all classes that are carried."""
        return sum(item.carried_rps for item in self.classes)

    @property
    def demand_rps(self) -> float:
        """Requests of all classes."""
        return sum(item.demand_rps for item in self.classes)

    def counts(self) -> dict[tuple[str, str, str], int]:
        """Replicas by (deployment, option, node)."""
        found: dict[tuple[str, str, str], int] = {}
        for replica in self.replicas:
            key = (replica.deployment, replica.option, replica.node)
            found[key] = found.get(key, 0) + 1
        return found


def gpu_price(node: InventoryNode) -> float:
    """USD an hour of one GPU of a node."""
    price = node.gpu.price_per_hour
    assert price is not None, "requests without prices are refused"
    return price


def options_of(candidates: tuple[Candidate, ...], *, cautious: bool = False) -> tuple[Option, ...]:
    """The options that evaluated configurations are; `cautious` counts on the lower end of their capacity only."""
    found = []
    for index, candidate in enumerate(candidates):
        if candidate.prediction is None:
            continue
        capacity = candidate.prediction.capacity_rps
        rate = capacity.low if cautious else capacity.value
        if rate > 0:
            found.append(Option(name=f"option-{index}", settings=candidate.settings, capacity_rps=rate))
    return tuple(found)
