"""What a simulated fleet is made of: GPUs, deployments with their variants, what befalls them, how they are watched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from enova_recommender.engine import Limits
from enova_recommender.scaling.bounds import Bounds
from enova_recommender.scaling.situation import Capacity, Demand, Objective, Policy, StartUp
from enova_recommender.scaling.types import EngineSizes, GpuFacts, ModelFacts
from enova_simulator.cluster.engines import Requests
from enova_simulator.cluster.kernel.state import Longs
from enova_simulator.cluster.tables import Tabulated


class SetupError(ValueError):
    """A fleet that cannot be simulated; `field` names what is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class StartUps(Protocol):
    """How long starts take, by their number in the whole run, so that every policy draws the same."""

    def seconds(self, number: int) -> float:
        """From the start command to READY; infinity for one that never is."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantSetup:
    """One configuration on one GPU type: what it is in this world, and what policies are told of it."""

    name: str
    gpu_type: str
    gpus: int                          # of one replica
    usd_per_hour: float                # of one replica
    limits: Limits
    times: Tabulated                   # of the world, not of the recommender
    capacity: Capacity                 # as policies are told it
    start_up: StartUp                  # as policies are told it until starts were seen
    start_ups: StartUps
    unloaded_ttft_s: Mapping[int, float] = field(default_factory=dict)   # by prompt tokens, for objectives
    first_token_delay_s: float = 0.0   # beside the prompt's steps
    weight: float = 1.0                # in routing
    replica_sigma: float = 0.0         # of the logarithm of a replica's slowness
    site: str = ""                     # where its GPUs are; "" where the requests come in


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What ENOVA 0.0.7 is told besides its series."""

    configuration: EngineSizes
    model: ModelFacts
    gpu: GpuFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentSetup:
    """One deployment; without a policy its targets stay."""

    name: str
    variants: tuple[VariantSetup, ...]
    targets: Mapping[str, int]         # replicas of each variant at the start, READY at once
    bounds: Bounds
    objective: Objective
    policy: Policy | None = None
    conservatism: float = 1.0
    priority: int = 0                  # lower is served first where GPUs are short
    queue_limit: int = 256             # of a replica's ingress
    facts: Facts | None = None
    history: Demand | None = None      # by the minute, of the time before the run


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Requests, and the place of each one's deployment in the fleet."""

    requests: Requests
    deployment: Longs


class Ill(StrEnum):
    """What may befall a replica."""

    SLOW = "SLOW"              # steps take `factor` times as long, until `until_s`
    HUNG = "HUNG"              # computes nothing, until it is restarted
    CRASHED = "CRASHED"        # its process ends; its agent starts it again
    LOST = "LOST"              # its node vanishes with its GPUs, until `until_s`


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something befalls the READY replica that is this share of the way down the list, by age."""

    at_s: float
    ill: Ill
    share: float
    until_s: float = float("inf")
    factor: float = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """A time in which nothing is measured."""

    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """How the leader sees the fleet."""

    step_s: float = 5.0
    sample_s: float = 1.0              # between two looks at gauges
    delay_s: float = 2.0               # until a figure is with the leader
    window_s: float = 900.0            # of recent steps
    history_s: float = 14 * 86_400.0
    gaps: tuple[Gap, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Paces:
    """How fast the control plane and its agents act. The detector is assumed to be right after `detected_s`."""

    routed_s: float = 1.0              # from READY until ingresses send requests
    detected_s: float = 20.0           # from the onset of an ill until the verdict on it
    restart_s: float = 30.0            # from the onset of a hang until its agent restarts it
    retry_s: float = 10.0              # from a crash until its agent starts it again
    lost_s: float = 30.0               # from a node's silence until its replicas are replaced
    drain_s: float = 600.0             # until a draining replica is stopped with what it has
    held_s: float = 300.0              # that requests wait for a first replica
    held_requests: int = 100
    held_bytes: int = 64 * 2**20
    tries: int = 8                     # replicas that are tried for one request
    surge: int = 1                     # replicas over the target while old ones are replaced


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSetup:
    """Everything but the requests."""

    gpus: Mapping[str, int]            # by type; of a site "type@site"
    deployments: tuple[DeploymentSetup, ...]
    end_s: float
    seed: int = 1000
    round_trip_s: Mapping[str, float] = field(default_factory=dict)   # to each site that is not where requests come in
    faults: tuple[Fault, ...] = ()
    telemetry: Telemetry = field(default_factory=Telemetry)
    paces: Paces = field(default_factory=Paces)

    def __post_init__(self) -> None:
        for deployment in self.deployments:
            _check(deployment, self.gpus)
        if self.end_s <= 0:
            raise SetupError("end_s", f"must be positive, is {self.end_s}")
        names = [deployment.name for deployment in self.deployments]
        if len(set(names)) != len(names):
            raise SetupError("deployments", "two have the same name")


def pool_of(variant: VariantSetup) -> str:
    """The name of the GPUs that a variant takes."""
    return f"{variant.gpu_type}@{variant.site}" if variant.site else variant.gpu_type


def _check(deployment: DeploymentSetup, gpus: Mapping[str, int]) -> None:
    bounds = deployment.bounds
    if not 0 <= bounds.min_replicas <= bounds.max_replicas:
        raise SetupError(
            f"{deployment.name}.bounds", f"min {bounds.min_replicas} and max {bounds.max_replicas} contradict"
        )
    if not deployment.variants:
        raise SetupError(f"{deployment.name}.variants", "there is none")
    if all(gpus.get(pool_of(variant), 0) < variant.gpus for variant in deployment.variants):
        needs = " or ".join(f"{variant.gpus} x {pool_of(variant)}" for variant in deployment.variants)
        raise SetupError("gpus", f"the fleet cannot hold one replica of {deployment.name}: it needs {needs}")
    unknown = set(deployment.targets) - {variant.name for variant in deployment.variants}
    if unknown:
        raise SetupError(f"{deployment.name}.targets", f"no variant is called {', '.join(sorted(unknown))}")
