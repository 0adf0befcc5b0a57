"""Which GPUs a replica gets: a whole set of one type on one node, or for each node the reason why not.

A GPU is free if no replica in the store claims it (whatever its state: claims end with the record), no assignment
gives it to one, and its last report shows the memory that the engine will ask for. A node that reports engines which
the store does not know is left alone until its agent ended them. Among the nodes that have room: those where the
variant did not fail, then those with the fewest replicas of the same deployment (spread), then the fullest (best
fit). Within a node: the smallest run of neighbouring free indexes that fits, since neighbours share switches and
islands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from enova_common.vllm import DEFAULTS
from enova_coordinator.core.model import (
    Claim,
    Deployment,
    Gpu,
    Member,
    NodeState,
    NodeView,
    Replica,
    ReplicaState,
    Snapshot,
    Variant,
)

CPU_TYPE = "CPU"
MAX_REASONS = 16  # nodes named in a PENDING reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where a replica goes."""

    gpu_type: str
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplaced:
    """Why it goes nowhere: one sentence for each node."""

    reason: str


class Inventory:
    """The fleet's GPUs with what holds them, while a round hands them out."""

    def __init__(self, snapshot: Snapshot, replicas: Iterable[Replica]) -> None:
        self.handed_out = 0
        """Places that were given in this round."""
        self._nodes = tuple(snapshot.nodes[name] for name in sorted(snapshot.nodes))
        self._unheld = {view.node.name: {gpu.uuid: gpu for gpu in view.gpus} for view in self._nodes}
        self._held: dict[str, list[tuple[str, Gpu]]] = {}
        self._deployment_nodes: dict[tuple[str, str], int] = {}
        known: set[tuple[str, str]] = set()
        for replica in replicas:
            known.add((replica.name, replica.uid))
            self._hold(replica)
        for assignment in snapshot.assignments.values():
            # What a node was last told to run holds its GPUs even if the record is gone or cannot be read.
            for assigned in assignment.members:
                known.add((assigned.replica, assigned.uid))
                for claim in assigned.member.claims:
                    self._unheld.get(assigned.member.node, {}).pop(claim.gpu_uuid, None)
        self._strangers = {view.node.name: _strangers(view, known) for view in self._nodes}

    def give(self, replica: Replica) -> None:
        """Count the claims of a replica that was just placed."""
        self.handed_out += 1
        self._hold(replica)

    def place(
        self, deployment: Deployment, variant: Variant, *, gpu_budget: int | None = None, without: str = ""
    ) -> Placed | Unplaced:
        """A place for one replica more.

        `gpu_budget`: GPUs that the deployment may still take. `without`: a replica whose claims are taken as free,
        to ask whether its going would make room.
        """
        count = variant.gpus_per_replica
        if gpu_budget is not None and count > gpu_budget:
            return Unplaced(
                reason=f"hardware.max_gpus {deployment.spec.hardware.max_gpus} is reached: "
                f"{count} more are needed, {max(gpu_budget, 0)} are left"
            )
        if not self._nodes:
            return Unplaced(reason="no node is registered")
        for gpu_type in self._types(deployment, variant):
            place = self._place_on(gpu_type, deployment, variant, without)
            if place is not None:
                return place
        return Unplaced(reason=self._reasons(deployment, variant))

    def _hold(self, replica: Replica) -> None:
        for member in replica.members:
            here = (replica.deployment, member.node)
            self._deployment_nodes[here] = self._deployment_nodes.get(here, 0) + 1
            unheld = self._unheld.get(member.node, {})
            for claim in member.claims:
                gpu = unheld.pop(claim.gpu_uuid, None)
                if gpu is not None:
                    self._held.setdefault(replica.name, []).append((member.node, gpu))

    def _place_on(self, gpu_type: str, deployment: Deployment, variant: Variant, without: str) -> Placed | None:
        count = variant.gpus_per_replica
        returned = self._held.get(without, [])
        best: tuple[tuple[int, int, int, str], NodeView, tuple[Gpu, ...]] | None = None
        for view in self._nodes:
            name = view.node.name
            free = [gpu for gpu in self._unheld[name].values() if gpu.type == gpu_type and _has_memory(gpu, variant)]
            free += [gpu for node, gpu in returned if node == name and gpu.type == gpu_type]
            if len(free) < count or self._refusal(view, deployment):
                continue
            here = self._deployment_nodes.get((deployment.name, name), 0)
            rank = (variant.failed_nodes.count(name), here, len(free), name)
            if best is None or rank < best[0]:
                best = rank, view, tuple(free)
        if best is None:
            return None
        _, view, candidates = best
        return Placed(gpu_type=gpu_type, members=(_member(view, _best_run(candidates, count), variant),))

    def _types(self, deployment: Deployment, variant: Variant) -> tuple[str, ...]:
        if variant.gpu_type:
            return (variant.gpu_type,)
        if deployment.spec.hardware.allow:
            return deployment.spec.hardware.allow
        memory: dict[str, int] = {}
        for view in self._nodes:
            for gpu in view.gpus:
                memory[gpu.type] = max(memory.get(gpu.type, 0), gpu.memory_bytes)
        # Most memory first: without advice the widest fit; the CPU slot is for those who ask, or have nothing else.
        return tuple(sorted(memory, key=lambda name: (name == CPU_TYPE, -memory[name], name)))

    def _refusal(self, view: NodeView, deployment: Deployment) -> str:
        """Why this node takes no new replica of this deployment at all; "" = it does."""
        node = view.node
        if view.state is not NodeState.READY:
            return f"is {view.state}"
        if node.draining or not node.schedulable:
            return "is being drained" if node.draining else "is cordoned"
        if deployment.spec.engine and deployment.spec.engine != node.engine:
            return f"has the engine {node.engine!r}, not {deployment.spec.engine!r}"
        if not in_clusters(view, deployment):
            return f"is in cluster {node.cluster!r}, which is not allowed"
        if view.report is None:
            return "has not reported yet"
        if self._strangers[node.name]:
            return f"still ends {self._strangers[node.name]}, which nobody wants"
        return ""

    def _reasons(self, deployment: Deployment, variant: Variant) -> str:
        types = self._types(deployment, variant)
        sentences = [self._reason(view, types, deployment, variant) for view in self._nodes[:MAX_REASONS]]
        rest = len(self._nodes) - MAX_REASONS
        return "; ".join(sentences) + (f"; and {rest} nodes more" if rest > 0 else "")

    def _reason(self, view: NodeView, types: tuple[str, ...], deployment: Deployment, variant: Variant) -> str:
        short = view.node.name.removeprefix("nodes/")
        refusal = self._refusal(view, deployment)
        if refusal:
            return f"{short} {refusal}"
        there = [gpu for gpu in view.gpus if gpu.type in types]
        if not there:
            return f"{short} has no GPU of type {' or '.join(types) or 'any'}"
        unheld = [gpu for gpu in there if gpu.uuid in self._unheld[view.node.name]]
        crowded = sum(not _has_memory(gpu, variant) for gpu in unheld)
        free = f"{len(unheld) - crowded} of {len(there)} {'/'.join(types)} free"
        text = f"{short} has {free}, {variant.gpus_per_replica} needed"
        return text + (f" ({crowded} hold memory that is not enova's)" if crowded else "")


def in_clusters(view: NodeView, deployment: Deployment) -> bool:
    """Whether the deployment may use this node's cluster."""
    clusters = deployment.spec.hardware.clusters
    return not clusters or view.node.cluster in clusters


def _strangers(view: NodeView, known: set[tuple[str, str]]) -> str:
    reports = view.report.replicas if view.report is not None else ()
    return ", ".join(
        report.replica
        for report in reports
        if report.state is not ReplicaState.STOPPED and (report.replica, report.uid) not in known
    )


def _needed_bytes(gpu: Gpu, variant: Variant) -> int:
    if gpu.type == CPU_TYPE:
        return 0                   # a slot: the engine takes host memory as it is configured
    default = DEFAULTS["gpu_memory_utilization"]
    share = variant.configuration.get("gpu_memory_utilization", default if default is not None else 1.0)
    return int(float(share) * gpu.memory_bytes)


def _has_memory(gpu: Gpu, variant: Variant) -> bool:
    return gpu.free_memory_bytes >= _needed_bytes(gpu, variant)


def _best_run(free: tuple[Gpu, ...], count: int) -> tuple[Gpu, ...]:
    """`count` of the free GPUs: from the shortest run of neighbours that fits, else from several."""
    ordered = sorted(free, key=lambda gpu: (gpu.index, gpu.uuid))
    runs: list[list[Gpu]] = []
    for gpu in ordered:
        if runs and gpu.index == runs[-1][-1].index + 1:
            runs[-1].append(gpu)
        else:
            runs.append([gpu])
    fitting = [run for run in runs if len(run) >= count]
    if not fitting:
        return tuple(ordered[:count])
    run = min(fitting, key=lambda run: (len(run), run[0].index))
    start = next((at for at in range(len(run) - count + 1) if run[at].index % count == 0), 0)
    return tuple(run[start : start + count])


def _member(view: NodeView, chosen: tuple[Gpu, ...], variant: Variant) -> Member:
    claims = tuple(Claim(gpu_uuid=gpu.uuid, memory_bytes=_needed_bytes(gpu, variant)) for gpu in chosen)
    return Member(node=view.node.name, rank=0, claims=claims)


def gpus_held(replicas: Iterable[Replica]) -> int:
    """GPUs that these replicas hold."""
    return sum(len(replica.gpus) for replica in replicas)


def double_claims(replicas: Mapping[str, Replica]) -> tuple[str, ...]:
    """GPUs that two replicas claim, as sentences: always empty, checked by tests and by the leader."""
    holders: dict[tuple[str, str], str] = {}
    problems: list[str] = []
    for replica in replicas.values():
        for member in replica.members:
            for claim in member.claims:
                other = holders.setdefault((member.node, claim.gpu_uuid), replica.name)
                if other != replica.name:
                    problems.append(f"{claim.gpu_uuid} on {member.node} is claimed by {other} and {replica.name}")
    return tuple(problems)
