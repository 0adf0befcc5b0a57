"""The values that agent and ingress decide on: what should run here, and where served names lead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

FlagValue = bool | int | float | str


class ReplicaState(StrEnum):
    """The states of a replica, as design and API name them."""

    PENDING = "PENDING"
    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"
    SLEEPING = "SLEEPING"
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"
    FAILED = "FAILED"
    LOST = "LOST"


class Desired(StrEnum):
    """What the assignment wants of a member. A member that is not assigned must not run."""

    RUN = "RUN"
    DRAIN = "DRAIN"


class Role(StrEnum):
    """What a replica does in a disaggregated deployment."""

    AGGREGATED = "AGGREGATED"
    PREFILL = "PREFILL"
    DECODE = "DECODE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a member holds of one GPU."""

    gpu_uuid: str
    memory_bytes: int = 0
    shared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSpec:
    """One member that this node should run. `replica` is the full name, deployments/{d}/replicas/{r}."""

    replica: str
    uid: str
    model: str
    desired: Desired = Desired.RUN
    served_names: tuple[str, ...] = ()
    configuration: Mapping[str, FlagValue] = field(default_factory=lambda: MappingProxyType({}))
    engine: str = ""
    role: Role = Role.AGGREGATED
    rank: int = 0
    member_count: int = 1
    claims: tuple[Claim, ...] = ()
    drain_timeout_s: float = 30.0
    restart_nonce: int = 0
    queue_limit: int = 256

    @property
    def deployment(self) -> str:
        """The deployment's full name, deployments/{d}."""
        return self.replica.rsplit("/replicas/", 1)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Everything that this node should run, as of `revision`, decided in `term`."""

    revision: int
    term: int
    members: tuple[MemberSpec, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """What one member is, as the agent reports it. Times are Unix seconds of the wall clock; 0 = not yet."""

    replica: str
    uid: str
    state: ReplicaState
    reason: str = ""
    rank: int = 0
    phase: str = ""
    pid: int = 0
    endpoint: str = ""
    restarts: int = 0
    start_time_s: float = 0.0
    ready_time_s: float = 0.0
    in_routing: bool = True
    in_flight: int = 0
    gave_up: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingClass:
    """A kind of request. A lower `priority` is served earlier."""

    name: str
    priority: int = 0
    ttft_p95_s: float | None = None
    tpot_p95_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTarget:
    """One replica that answers for a served name, behind the ingress of its node."""

    replica: str
    node: str
    hop_address: str
    weight: float = 1.0
    max_concurrency: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthRule:
    """One kind of prompt and the limit of its answers; the centroid is base64 of a signed byte an entry."""

    centroid: str
    reach: float               # the smallest cosine of a prompt that belongs
    limit_tokens: int = 0      # 0: none


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthRules:
    """How prompts become vectors, and which limits on answers follow from them."""

    method: int
    seed: int
    dimension: int
    apply: bool = False        # False: answers are observed, no request is changed
    context_tokens: int = 0    # that every engine accepts, prompt and answer together; 0: not known
    limit_tokens: int = 0      # of prompts of no kind; 0: none
    kinds: tuple[LengthRule, ...] = ()
    samples_per_s: float = 1.0  # answers that are reported at most; real time


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where one served name leads."""

    served_name: str
    deployment: str
    targets: tuple[RouteTarget, ...] = ()
    classes: tuple[ServingClass, ...] = ()
    lengths: LengthRules | None = None  # None: prompts are not looked at
    wakes: bool = False                 # requests without a target wait for the first one


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTable:
    """All routes by served name, as of `revision`."""

    revision: int = 0
    routes: Mapping[str, Route] = field(default_factory=lambda: MappingProxyType({}))

    def merged(
        self, *, revision: int, base_revision: int, routes: tuple[Route, ...], removed: tuple[str, ...]
    ) -> RouteTable | None:
        """The table after a delta; None if the delta builds on another revision (base 0 builds on none)."""
        if base_revision == 0:
            return RouteTable(revision=revision, routes={route.served_name: route for route in routes})
        if base_revision != self.revision:
            return None
        kept = {name: route for name, route in self.routes.items() if name not in removed}
        return RouteTable(revision=revision, routes=kept | {route.served_name: route for route in routes})


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalEngine:
    """A replica of this node as its ingress needs to know it."""

    replica: str
    endpoint: str
    max_concurrency: int
    queue_limit: int
    admitting: bool                # False: ejected as hung, draining, or not ready: no new requests
    served_names: tuple[str, ...] = ()
