"""The nouns of enova as the coordinator decides on them: nodes, deployments, variants, replicas, assignments.

Names are full resource names (`deployments/d`, `deployments/d/variants/v`, `deployments/d/replicas/r`, `nodes/n`).
Times are Unix seconds of the wall clock, 0 = not yet. Each field has one writer: users write `Deployment.spec`, the
leader writes plans (variants, the plan part of replicas, assignments), agents report what becomes `ReplicaStatus`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from enova_coordinator.core.calibration import StoredCalibration
from enova_coordinator.core.episode import Episode
from enova_coordinator.core.gpu_facts import GpuFacts

FlagValue = bool | int | float | str
Configuration = Mapping[str, FlagValue]  # vLLM's flag names in snake_case; absent = vLLM's default or enova's choice


class DeploymentState(StrEnum):
    """How a deployment stands."""

    PENDING = "PENDING"    # nothing is ready yet
    UPDATING = "UPDATING"  # serving, on the way to the newest generation or target
    READY = "READY"        # target reached at the current generation
    FAILED = "FAILED"      # the newest generation cannot start; what served before is kept
    DELETING = "DELETING"


class NodeState(StrEnum):
    """Whether a node's agent can be reached."""

    READY = "READY"      # its stream is open and heartbeats arrive
    SUSPECT = "SUSPECT"  # late, not yet given up
    LOST = "LOST"        # given up; its replicas are LOST


class ReplicaState(StrEnum):
    """The states of a replica."""

    PENDING = "PENDING"
    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"
    SLEEPING = "SLEEPING"
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"
    FAILED = "FAILED"
    LOST = "LOST"


class Intent(StrEnum):
    """What the leader wants of a replica."""

    RUN = "RUN"
    DRAIN = "DRAIN"  # assigned still, takes no new requests, ends by itself
    STOP = "STOP"    # left out of the assignment; its claims are held until its node says that it is gone


class Desired(StrEnum):
    """What an assignment wants of a member. A member that is not assigned must not run."""

    RUN = "RUN"
    DRAIN = "DRAIN"


class Role(StrEnum):
    """What a replica does in a disaggregated deployment."""

    AGGREGATED = "AGGREGATED"
    PREFILL = "PREFILL"
    DECODE = "DECODE"


class DecisionAction(StrEnum):
    """What a decision did."""

    SCALE_UP = "SCALE_UP"
    SCALE_DOWN = "SCALE_DOWN"
    REPLACE = "REPLACE"
    RECONFIGURE = "RECONFIGURE"
    HOLD = "HOLD"


class Reconfiguration(StrEnum):
    """What becomes of a better configuration that is found for a deployment."""

    PROPOSE = "PROPOSE"  # shown with its gain; a user decides
    APPLY = "APPLY"      # rolled out
    OFF = "OFF"          # no advice at all


class MaxTokensMode(StrEnum):
    """Whether limits on answers are learned, and used."""

    OFF = "OFF"
    OBSERVE = "OBSERVE"  # learned and shown; no request is changed
    APPLY = "APPLY"


class Severity(StrEnum):
    """Whether an event asks for attention."""

    NORMAL = "NORMAL"
    WARNING = "WARNING"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU of a node; type "CPU" is the slot that an engine on the CPU takes."""

    uuid: str
    index: int = 0
    type: str = ""
    memory_bytes: int = 0
    pci_bus_id: str = ""
    simulated: bool = False
    free_memory_bytes: int = 0
    facts: GpuFacts | None = None  # what its driver tells of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A GPU host with an agent, as stored. State and heartbeats are the leader's, in memory."""

    name: str
    uid: str
    cluster: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    schedulable: bool = True
    draining: bool = False
    gpus: tuple[Gpu, ...] = ()
    boot_id: str = ""
    agent_version: str = ""
    engine: str = ""
    engine_version: str = ""
    openai_address: str = ""
    hop_address: str = ""
    create_time_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingClass:
    """A kind of request with its objectives. A lower `priority` is served earlier."""

    name: str
    priority: int = 0
    ttft_p95_s: float | None = None
    tpot_p95_s: float | None = None
    attainment: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Which hardware a deployment may use; empty allows all."""

    allow: tuple[str, ...] = ()
    max_gpus: int | None = None
    clusters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxTokensPolicy:
    """Limits on the length of answers for requests that give none. `cut_share` is of each kind's answers."""

    mode: MaxTokensMode = MaxTokensMode.OFF
    cut_share: float = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentSpec:
    """What the user wants served. `replicas` means min = max = replicas: no policy acts."""

    model: str
    served_names: tuple[str, ...] = ()
    engine: str = ""
    classes: tuple[ServingClass, ...] = ()
    replicas: int | None = None
    min: int | None = None
    max: int | None = None
    hardware: Hardware = Hardware()
    configuration: Configuration = field(default_factory=dict)
    policy: str = ""
    conservatism: float = 1.0      # the policy's one knob: above 1 spends GPUs for safety, below 1 saves them
    priority: int = 0              # deployments with a lower number are placed first
    autoscaling_paused: bool = False
    reconfiguration: Reconfiguration = Reconfiguration.PROPOSE
    max_tokens_policy: MaxTokensPolicy = MaxTokensPolicy()

    @property
    def bounds(self) -> tuple[int, int]:
        """The fewest and the most replicas. Nothing given means one replica, fixed."""
        if self.replicas is not None:
            return self.replicas, self.replicas
        if self.min is None and self.max is None:
            return 1, 1
        least = self.min if self.min is not None else min(1, self.max or 0)
        return least, self.max if self.max is not None else max(least, 1)

    @property
    def fixed(self) -> bool:
        """Whether only users change the number of replicas."""
        return self.replicas is not None or (self.min is None and self.max is None)

    def clamped(self, replicas: int) -> int:
        """The number of replicas nearest to `replicas` that the bounds allow."""
        least, most = self.bounds
        return max(least, min(most, replicas))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentStatus:
    """How a deployment stands, written by the leader. `target_replicas` is what user or policy last asked for.

    `leave_first` names replicas that a policy wants to go first, in this order, until the surplus has left.
    """

    observed_generation: int = 0
    state: DeploymentState = DeploymentState.PENDING
    reason: str = ""
    target_replicas: int = 0
    ready_replicas: int = 0
    leave_first: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentAdvice:
    """The configuration that the recommender gave a deployment, or proposes to it, and why.

    Without a GPU type there is none: `reason` says why, and engines run with their own defaults.
    """

    gpu_type: str = ""
    configuration: Configuration = field(default_factory=dict)
    reason: str = ""
    explanation: tuple[str, ...] = ()
    cost_per_hour: float = 0.0     # of one replica, USD
    capacity_rps: float = 0.0      # of one replica, while the objectives hold
    gain: float = 0.0              # of a proposal: share of the cost of a request that it saves
    create_time_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What the user wants served, and how it stands. `generation` counts changes of the spec, from 1."""

    name: str
    uid: str
    spec: DeploymentSpec
    generation: int = 1
    status: DeploymentStatus = DeploymentStatus()
    create_time_s: float = 0.0
    update_time_s: float = 0.0
    delete_time_s: float = 0.0
    advice: DeploymentAdvice | None = None    # what it runs by, where the spec has no configuration
    proposal: DeploymentAdvice | None = None  # a better one, that a user may take up

    @property
    def configuration(self) -> Configuration:
        """What its engines run with: what the spec says, else what the recommender advised."""
        if self.spec.configuration or self.advice is None:
            return self.spec.configuration
        return self.advice.configuration

    @property
    def advised_gpu_type(self) -> str:
        """The GPU type that its configuration was advised for; empty: any that the spec allows."""
        return self.advice.gpu_type if self.advice is not None and not self.spec.configuration else ""

    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.name.removeprefix("deployments/")

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names that clients call; the deployment's own if none is given."""
        return self.spec.served_names or (self.id,)

    @property
    def deleting(self) -> bool:
        """Whether a user asked for its end."""
        return self.delete_time_s > 0

    @property
    def etag(self) -> str:
        """Changes with the spec and not with the status, so that a status never refuses a user's change."""
        return f"{self.uid}.{self.generation}{'.deleting' if self.deleting else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One configuration on one GPU type, with a target and a weight.

    It holds all that its engines need, so that what served before goes on unchanged while a new spec rolls out.
    """

    name: str
    deployment: str
    model: str
    served_names: tuple[str, ...]
    engine: str = ""
    gpu_type: str = ""             # "" until the first replica finds a place
    configuration: Configuration = field(default_factory=dict)
    target_replicas: int = 0
    weight: float = 1.0
    role: Role = Role.AGGREGATED
    generation: int = 1
    retired: bool = False          # being replaced: drains as its successor becomes ready
    failures: int = 0              # replicas that gave up, in a row
    failure_time_s: float = 0.0
    failure_reason: str = ""
    failed_nodes: tuple[str, ...] = ()
    replicas_made: int = 0         # numbers its replicas, so that no name is used twice

    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.name.rpartition("/")[2]

    @property
    def gpus_per_replica(self) -> int:
        """GPUs that one replica takes."""
        return int(self.configuration.get("tensor_parallel_size", 1)) * int(
            self.configuration.get("pipeline_parallel_size", 1)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a member holds of a GPU."""

    gpu_uuid: str
    memory_bytes: int = 0
    shared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """The part of a replica that runs on one node."""

    node: str
    rank: int = 0
    claims: tuple[Claim, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """What a replica is, put together from what the nodes of its members report."""

    state: ReplicaState = ReplicaState.PENDING
    reason: str = ""
    state_time_s: float = 0.0      # when the leader first saw this state
    phase: str = ""
    pid: int = 0
    endpoint: str = ""
    restarts: int = 0
    start_time_s: float = 0.0
    ready_time_s: float = 0.0
    in_routing: bool = True
    gave_up: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One serving endpoint of one variant. No members = not placed yet."""

    name: str
    uid: str
    deployment: str
    variant: str
    role: Role = Role.AGGREGATED
    members: tuple[Member, ...] = ()
    intent: Intent = Intent.RUN
    generation: int = 1
    restart_nonce: int = 0
    create_time_s: float = 0.0
    drain_time_s: float = 0.0
    replace_reason: str = ""       # why a new one is to take its part; it serves until that one is READY
    status: ReplicaStatus = ReplicaStatus()

    @property
    def node(self) -> str:
        """The node of rank 0; "" while not placed."""
        return self.members[0].node if self.members else ""

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPU UUIDs of all members."""
        return tuple(claim.gpu_uuid for member in self.members for claim in member.claims)

    @property
    def etag(self) -> str:
        """Changes with what users may change of a replica."""
        return f"{self.uid}.{self.restart_nonce}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignedMember:
    """One member that a node should run, and how."""

    replica: str
    uid: str
    model: str
    member: Member
    desired: Desired = Desired.RUN
    served_names: tuple[str, ...] = ()
    configuration: Configuration = field(default_factory=dict)
    engine: str = ""
    role: Role = Role.AGGREGATED
    member_count: int = 1
    drain_timeout_s: float = 30.0
    restart_nonce: int = 0
    queue_limit: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Everything that a node should run. `name` is assignments/{node}; revisions only grow."""

    name: str
    revision: int
    members: tuple[AssignedMember, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionInput:
    """A series that a policy saw; NaN where nothing was measured."""

    object: str
    feature: str
    start_s: float
    step_s: float
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A recorded scaling act, with everything needed to check it. `name` is decisions/{deployment}.{number}."""

    name: str
    deployment: str
    action: DecisionAction
    actor: str
    reason: str
    from_replicas: int = 0
    to_replicas: int = 0
    create_time_s: float = 0.0
    model_time_s: float = 0.0
    inputs: tuple[DecisionInput, ...] = ()
    frames: tuple[str, ...] = ()
    term: int = 0
    from_configuration: Configuration = field(default_factory=dict)
    to_configuration: Configuration = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to an object. `reason` is CamelCase: ReplicaReady, EngineCrashed, NodeLost."""

    name: str
    object: str
    reason: str
    message: str
    create_time_s: float
    severity: Severity = Severity.NORMAL

    @property
    def revision(self) -> int:
        """Where a watch goes on behind it."""
        return int(self.name.removeprefix("events/"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """A request that was carried out, kept so that its repetition is answered and not done again."""

    name: str                      # requests/{request_id}
    method: str
    object: str                    # the name of what it made or changed
    fingerprint: str               # of the request, so that a reused id with other content is refused
    create_time_s: float


Stored = Deployment | Variant | Replica | Node | Assignment | Decision | RequestRecord | StoredCalibration | Episode


# What is observed of nodes; never stored.


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """What one member is, as its agent reported it."""

    replica: str
    uid: str
    state: ReplicaState
    rank: int = 0
    reason: str = ""
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
class NodeReport:
    """What is on one node, as its agent last said on the stream that is open now."""

    assignment_revision: int = 0   # the one that the agent works on
    routes_revision: int = 0       # the one that its ingress serves
    ingress_connected: bool = False
    replicas: tuple[ReplicaReport, ...] = ()
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeObservation:
    """One node's stream as the leader sees it. Times are of the leader's monotonic clock."""

    node: str
    connected: bool
    last_heard_s: float            # when the last heartbeat or other message arrived
    report: NodeReport | None = None  # None until the first status on this stream


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A node with all that is known of it now."""

    node: Node
    state: NodeState
    state_age_s: float = 0.0
    reason: str = ""
    report: NodeReport | None = None  # only from a stream that is open

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """Its GPUs, freshest figures first choice."""
        return self.report.gpus if self.report is not None and self.report.gpus else self.node.gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything at one store revision, joined with the nodes as they are now. All keyed by full name."""

    revision: int = 0
    deployments: Mapping[str, Deployment] = field(default_factory=dict)
    variants: Mapping[str, Variant] = field(default_factory=dict)
    replicas: Mapping[str, Replica] = field(default_factory=dict)
    nodes: Mapping[str, NodeView] = field(default_factory=dict)
    assignments: Mapping[str, Assignment] = field(default_factory=dict)
    revisions: Mapping[str, int] = field(default_factory=dict)  # mod revision by full name
    replacement_held: str = ""     # why nothing lost may be replaced now (mass loss); "" = it may
    routed: frozenset[str] | None = None  # replicas that every connected ingress has in its routes; None: not known
    unreadable: frozenset[str] = frozenset()  # names of stored objects that this release cannot read

    @property
    def frozen(self) -> frozenset[str]:
        """Deployments of which something cannot be read: nothing of theirs is started, stopped or written."""
        parts = (name.split("/") for name in self.unreadable if name.startswith("deployments/"))
        return frozenset("/".join(part[:2]) for part in parts)

    def replicas_of(self, deployment: str) -> tuple[Replica, ...]:
        """A deployment's replicas, oldest first."""
        return tuple(sorted(
            (replica for replica in self.replicas.values() if replica.deployment == deployment),
            key=lambda replica: (replica.create_time_s, replica.name),
        ))

    def variants_of(self, deployment: str) -> tuple[Variant, ...]:
        """A deployment's variants, oldest first."""
        return tuple(sorted(
            (variant for variant in self.variants.values() if variant.deployment == deployment),
            key=lambda variant: (variant.generation, variant.name),
        ))
