"""A fleet in virtual time: the coordinator's real core, model agents, and a network with faults, from one seed.

Theory of operation. Time moves in steps of half a second. The leader looks, decides and writes once a second
against a store with revisions; agents converge on the last assignment that reached them and report what is. Streams
keep order, may be slow, and break; what was under way is then lost. After every step the invariants are checked on
what agents really run, not on what the coordinator believes.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace

from enova_coordinator.core.liveness import Liveness, LivenessLimits, observe
from enova_coordinator.core.model import (
    AssignedMember,
    Assignment,
    Deployment,
    DeploymentSpec,
    Desired,
    Gpu,
    Intent,
    Node,
    NodeObservation,
    NodeReport,
    NodeView,
    Replica,
    ReplicaReport,
    ReplicaState,
    Snapshot,
    Stored,
    Variant,
)
from enova_coordinator.core.placement import double_claims
from enova_coordinator.core.plan import Change, Delete, Note, Plan
from enova_coordinator.core.reconcile import ReconcileLimits, reconcile

STEP_S = 0.5
GIB = 1 << 30
EPOCH_S = 1_000_000.0              # wall clock of step 0; the monotonic clock begins at 0


class StoreTwin:
    """Objects by name with revisions: what the reconciler assumes of the store, and no more."""

    def __init__(self) -> None:
        self.revision = 1
        self.values: dict[str, Stored] = {}
        self.revisions: dict[str, int] = {}

    def put(self, value: Stored) -> None:
        """A user's write."""
        self.revision += 1
        self.values[value.name] = value
        self.revisions[value.name] = self.revision

    def apply(self, change: Change) -> bool:
        """Apply a change if everything that it assumed still holds."""
        if any(self.revisions.get(write.name, 0) != write.revision for write in change.writes):
            return False
        self.revision += 1
        for write in change.writes:
            if isinstance(write, Delete):
                del self.values[write.name], self.revisions[write.name]
            else:
                self.values[write.name] = write.value
                self.revisions[write.name] = self.revision
        return True

    def of(self, kind: type[Stored]) -> dict[str, Stored]:
        """The objects of one kind."""
        return {name: value for name, value in self.values.items() if type(value) is kind}


@dataclass(slots=True)
class ModelEngine:
    """An engine that an agent runs."""

    member: AssignedMember
    state: ReplicaState
    until_s: float                 # when the present state ends
    ready_time_s: float = 0.0
    fails: bool = False
    forget: bool = False


@dataclass(slots=True)
class ModelAgent:
    """An agent with its engines; engines live on while it is cut off."""

    node: Node
    random: random.Random
    start_s: tuple[float, float] = (2.0, 6.0)
    drain_s: tuple[float, float] = (0.5, 4.0)
    failure_rate: float = 0.0
    broken_models: set[str] = field(default_factory=set)
    up: bool = True
    cut: bool = False
    connected: bool = False
    connect_at_s: float = 0.0
    heard_s: float = 0.0           # when the leader last heard of it
    sent_revision: int = 0
    assignment: Assignment | None = None
    engines: dict[str, ModelEngine] = field(default_factory=dict)
    inbox: deque[tuple[float, Assignment]] = field(default_factory=deque)
    outbox: deque[tuple[float, NodeReport]] = field(default_factory=deque)
    seen: NodeReport | None = None  # by the leader, on this stream
    foreign_bytes: int = 0         # of each GPU's memory, held by somebody else
    strangers: tuple[ReplicaReport, ...] = ()  # reported beside its engines

    def holds(self) -> dict[str, str]:
        """Which replica's processes are on which GPU."""
        ended = (ReplicaState.STOPPED, ReplicaState.FAILED)
        return {
            claim.gpu_uuid: engine.member.replica
            for engine in self.engines.values()
            if engine.state not in ended
            for claim in engine.member.member.claims
        }

    def converge(self, now_s: float) -> None:
        """One step of every engine towards the assignment."""
        if self.assignment is None:
            return
        wanted = {member.replica: member for member in self.assignment.members}
        for name, engine in list(self.engines.items()):
            member = wanted.get(name)
            engine.forget = member is None or member.uid != engine.member.uid
            if engine.forget or (member is not None and member.desired is Desired.DRAIN):
                self._end(engine, now_s)
            if engine.until_s <= now_s:
                self._advance(engine, now_s)
            if engine.forget and engine.state is ReplicaState.STOPPED:
                del self.engines[name]
        for name, member in wanted.items():
            if name not in self.engines:
                self._start(member, now_s)

    def _start(self, member: AssignedMember, now_s: float) -> None:
        taken = self.holds()
        for claim in member.member.claims:
            assert claim.gpu_uuid not in taken, (
                f"{self.node.name}: {member.replica} was started on {claim.gpu_uuid} beside {taken[claim.gpu_uuid]}"
            )
        fails = member.model in self.broken_models or self.random.random() < self.failure_rate
        until_s = now_s + self.random.uniform(*self.start_s)
        self.engines[member.replica] = ModelEngine(member, ReplicaState.STARTING, until_s, fails=fails)

    def _end(self, engine: ModelEngine, now_s: float) -> None:
        if engine.state in {ReplicaState.STARTING, ReplicaState.FAILED}:
            engine.state, engine.until_s = ReplicaState.STOPPING, now_s + STEP_S
        elif engine.state is ReplicaState.READY:
            engine.state, engine.until_s = ReplicaState.DRAINING, now_s + self.random.uniform(*self.drain_s)

    def _advance(self, engine: ModelEngine, now_s: float) -> None:
        if engine.state is ReplicaState.STARTING:
            engine.state = ReplicaState.FAILED if engine.fails else ReplicaState.READY
            engine.ready_time_s = 0.0 if engine.fails else EPOCH_S + now_s
        elif engine.state is ReplicaState.DRAINING:
            engine.state, engine.until_s = ReplicaState.STOPPING, now_s + STEP_S
        elif engine.state is ReplicaState.STOPPING:
            engine.state = ReplicaState.STOPPED

    def report(self) -> NodeReport:
        """What is, as the stream says it."""
        held = self.holds()
        gpus = tuple(
            replace(gpu, free_memory_bytes=GIB if gpu.uuid in held else gpu.memory_bytes - self.foreign_bytes)
            for gpu in self.node.gpus
        )
        replicas = tuple(
            ReplicaReport(
                replica=engine.member.replica,
                uid=engine.member.uid,
                state=engine.state,
                reason="the model cannot be loaded" if engine.state is ReplicaState.FAILED else "",
                ready_time_s=engine.ready_time_s,
                gave_up=engine.state is ReplicaState.FAILED,
            )
            for engine in self.engines.values()
        )
        revision = self.assignment.revision if self.assignment is not None else 0
        return NodeReport(
            assignment_revision=revision, replicas=replicas + self.strangers, gpus=gpus, ingress_connected=True
        )


class World:
    """A coordinator, agents and the network between them."""

    def __init__(
        self, seed: int = 0, *, nodes: int = 3, gpus: int = 4, gpu_type: str = "H100",
        limits: ReconcileLimits | None = None, delay_s: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.store = StoreTwin()
        self.agents: dict[str, ModelAgent] = {}
        self.limits = limits or ReconcileLimits(lost_grace_s=10.0)
        self.liveness_limits = LivenessLimits()
        self.delay_s = delay_s
        self.liveness = Liveness(started_s=0.0)
        self.leading = True
        self.loop_lag_s = 0.0
        self.refuse_rate = 0.0     # of changes, as if somebody had been faster
        self.routed: frozenset[str] | None = None  # replicas that every ingress has; None: nobody asks
        self.notes: list[Note] = []
        self.last_plan = Plan()
        for number in range(nodes):
            self.add_node(f"node-{number}", gpus=gpus, gpu_type=gpu_type)

    def add_node(self, name: str, *, gpus: int = 4, gpu_type: str = "H100", cluster: str = "") -> ModelAgent:
        """A node more, connected."""
        node = Node(
            name=f"nodes/{name}", uid=f"uid-{name}", cluster=cluster, engine="simulated",
            hop_address=f"{name}:1", openai_address=f"{name}:2",
            gpus=tuple(
                Gpu(uuid=f"GPU-{name}-{index}", index=index, type=gpu_type, memory_bytes=80 * GIB,
                    free_memory_bytes=80 * GIB)
                for index in range(gpus)
            ),
        )
        self.store.put(node)
        agent = ModelAgent(node=node, random=random.Random(self.random.random()))
        self.agents[node.name] = agent
        return agent

    # What users do.

    def deploy(self, name: str, spec: DeploymentSpec) -> None:
        """Create a deployment or change its spec."""
        before = self.store.values.get(f"deployments/{name}")
        if isinstance(before, Deployment):
            self.store.put(replace(before, spec=spec, generation=before.generation + 1))
        else:
            uid = f"uid-{name}-{self.store.revision}"
            now_s = EPOCH_S + self.now_s
            self.store.put(Deployment(name=f"deployments/{name}", uid=uid, spec=spec, create_time_s=now_s))

    def scale(self, name: str, replicas: int, *, leave_first: tuple[str, ...] = ()) -> None:
        """Write a target, as a decision does."""
        deployment = self.deployment(name)
        status = replace(deployment.status, target_replicas=replicas, leave_first=leave_first)
        self.store.put(replace(deployment, status=status))

    def delete(self, name: str) -> None:
        """Ask for a deployment's end."""
        self.store.put(replace(self.deployment(name), delete_time_s=EPOCH_S + self.now_s))

    def change_node(self, name: str, *, draining: bool) -> None:
        """Drain a node, or end its drain."""
        node = self.store.values[f"nodes/{name}"]
        assert isinstance(node, Node)
        self.store.put(replace(node, draining=draining, schedulable=not draining))

    # What one sees.

    def deployment(self, name: str) -> Deployment:
        """A deployment as stored."""
        value = self.store.values[f"deployments/{name}"]
        assert isinstance(value, Deployment)
        return value

    def replicas(self, name: str = "") -> list[Replica]:
        """Replicas as stored, oldest first."""
        found = [value for value in self.store.values.values() if isinstance(value, Replica)]
        kept = [replica for replica in found if not name or replica.deployment == f"deployments/{name}"]
        return sorted(kept, key=lambda replica: (replica.create_time_s, replica.name))

    def variants(self, name: str) -> list[Variant]:
        """A deployment's variants as stored."""
        found = [value for value in self.store.values.values() if isinstance(value, Variant)]
        return [variant for variant in found if variant.deployment == f"deployments/{name}"]

    def serving(self, name: str) -> int:
        """Engines of a deployment that really are ready, wherever they are."""
        return sum(
            engine.state is ReplicaState.READY and engine.member.replica.startswith(f"deployments/{name}/")
            for agent in self.agents.values() if agent.up
            for engine in agent.engines.values()
        )

    def running(self) -> set[str]:
        """The replicas whose engines agents have, in whatever state."""
        return {engine.member.replica for agent in self.agents.values() for engine in agent.engines.values()}

    def snapshot(self) -> Snapshot:
        """The leader's view now."""
        nodes: dict[str, NodeView] = {}
        for name, value in self.store.values.items():
            if not isinstance(value, Node):
                continue
            state = self.liveness.nodes[name]
            agent = self.agents[name]
            nodes[name] = NodeView(
                node=value, state=state.state, state_age_s=self.now_s - state.since_s, reason=state.reason,
                report=agent.seen if agent.connected else None,
            )
        values = self.store.values
        return Snapshot(
            revision=self.store.revision,
            deployments={name: value for name, value in values.items() if isinstance(value, Deployment)},
            variants={name: value for name, value in values.items() if isinstance(value, Variant)},
            replicas={name: value for name, value in values.items() if isinstance(value, Replica)},
            assignments={name: value for name, value in values.items() if isinstance(value, Assignment)},
            nodes=nodes,
            revisions=dict(self.store.revisions),
            replacement_held=self.liveness.replacement_held,
            routed=self.routed,
        )

    # What happens.

    def run(self, duration_s: float) -> None:
        """Let time pass."""
        end_s = self.now_s + duration_s
        while self.now_s < end_s:
            self.step()

    def step(self) -> None:
        """Half a second."""
        self.now_s += STEP_S
        for agent in self.agents.values():
            self._agent(agent)
        if self.leading and self.now_s % 1.0 == 0:
            self._lead()
        self.check()

    def crash_leader(self) -> None:
        """The leader is gone, and with it what it had in memory; every stream breaks."""
        self.leading = False
        for agent in self.agents.values():
            self._disconnect(agent)

    def elect(self) -> None:
        """A new leader, which knows the store and nothing else."""
        self.leading = True
        self.liveness = Liveness(started_s=self.now_s)
        for agent in self.agents.values():
            agent.connect_at_s = self.now_s + self.random.uniform(0.5, 5.0)

    def check(self) -> None:
        """What must hold after every step."""
        assert not double_claims({replica.name: replica for replica in self.replicas()})
        for replica in self.replicas():
            uuids = replica.gpus
            assert len(set(uuids)) == len(uuids)
            for member in replica.members:
                node = self.agents[member.node].node
                memory = {gpu.uuid: gpu.memory_bytes for gpu in node.gpus}
                assert all(claim.memory_bytes <= memory[claim.gpu_uuid] for claim in member.claims)

    def settled(self) -> bool:
        """Whether nothing is under way and nothing is left to do."""
        resting = {ReplicaState.READY, ReplicaState.PENDING}
        return (
            all(agent.connected for agent in self.agents.values() if agent.up)
            and all(replica.status.state in resting and replica.intent is Intent.RUN for replica in self.replicas())
            and all(
                engine.state is ReplicaState.READY
                for agent in self.agents.values()
                for engine in agent.engines.values()
            )
            and self.running() == {replica.name for replica in self.replicas() if replica.members}
            and not self.plan().changes
        )

    def plan(self) -> Plan:
        """What the reconciler would do now."""
        return reconcile(self.snapshot(), now_s=EPOCH_S + self.now_s, limits=self.limits)

    def _lead(self) -> None:
        names = tuple(name for name, value in self.store.values.items() if isinstance(value, Node))
        observations = {
            name: NodeObservation(node=name, connected=agent.connected, last_heard_s=agent.heard_s, report=agent.seen)
            for name, agent in self.agents.items()
            if agent.seen is not None or agent.connected or agent.heard_s > self.liveness.started_s
        }
        self.liveness = observe(
            self.liveness, names, observations,
            now_s=self.now_s, loop_lag_s=self.loop_lag_s, limits=self.liveness_limits,
        )
        self.last_plan = self.plan()
        for change in self.last_plan.changes:
            if self.random.random() >= self.refuse_rate and self.store.apply(change):
                self.notes.extend(change.notes)
        for name, agent in self.agents.items():
            wanted = self.store.values.get(name.replace("nodes/", "assignments/"))
            if agent.connected and isinstance(wanted, Assignment) and wanted.revision != agent.sent_revision:
                agent.sent_revision = wanted.revision
                agent.inbox.append((self._arrival(agent.inbox), wanted))

    def _agent(self, agent: ModelAgent) -> None:
        if not agent.up:
            return
        while agent.inbox and agent.inbox[0][0] <= self.now_s:
            agent.assignment = agent.inbox.popleft()[1]
        agent.converge(self.now_s)
        if agent.cut or not self.leading:
            return
        if not agent.connected and self.now_s >= agent.connect_at_s:
            agent.connected, agent.seen, agent.sent_revision = True, None, 0
            agent.heard_s = self.now_s
        if agent.connected:
            agent.outbox.append((self._arrival(agent.outbox), agent.report()))
            while agent.outbox and agent.outbox[0][0] <= self.now_s:
                agent.seen, agent.heard_s = agent.outbox.popleft()[1], self.now_s

    def _arrival(self, queue: deque[tuple[float, Assignment]] | deque[tuple[float, NodeReport]]) -> float:
        arrival_s = self.now_s + self.random.uniform(*self.delay_s)
        return max(arrival_s, queue[-1][0]) if queue else arrival_s

    def _disconnect(self, agent: ModelAgent) -> None:
        agent.connected, agent.seen = False, None
        agent.inbox.clear()
        agent.outbox.clear()
        agent.connect_at_s = self.now_s + self.random.uniform(0.5, 5.0)

    # Faults.

    def break_stream(self, name: str) -> None:
        """One stream breaks; the agent comes back by itself."""
        self._disconnect(self.agents[name])

    def cut(self, name: str) -> None:
        """A partition: nothing passes, engines run on."""
        agent = self.agents[name]
        agent.cut = True
        self._disconnect(agent)

    def heal(self, name: str) -> None:
        """The partition's end."""
        agent = self.agents[name]
        agent.cut = False
        agent.connect_at_s = self.now_s + self.random.uniform(0.5, 5.0)

    def crash_node(self, name: str) -> None:
        """The host is gone, engines with it."""
        agent = self.agents[name]
        agent.up = False
        agent.engines.clear()
        agent.assignment = None
        self._disconnect(agent)

    def boot_node(self, name: str) -> None:
        """The host is back, empty."""
        agent = self.agents[name]
        agent.up = True
        agent.connect_at_s = self.now_s + self.random.uniform(0.5, 3.0)
