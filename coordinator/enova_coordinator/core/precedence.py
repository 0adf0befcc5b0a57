"""Who gives way where GPUs are short: the less urgent deployment, down to its minimum, fair by weight. Pure.

Placement serves deployments by priority already; what is held is not taken back by it. Here one replica at a time is:
a replica that has waited for GPUs for a while may take those of a deployment with a higher priority number (less
urgent), if that one is scaled by a policy and runs more than its minimum. Among equals the one with the most replicas
over its minimum gives way, so that what is over is shared.
"""

from __future__ import annotations

from dataclasses import dataclass

from enova_coordinator.core.model import Deployment, Intent, NodeState, NodeView, Replica, Snapshot, Variant

WAITED_S = 10.0                    # real time that a replica waits for GPUs before another deployment gives way


@dataclass(frozen=True, slots=True, kw_only=True)
class Yielding:
    """A deployment that lets a replica go, and for whom."""

    deployment: str
    to_replicas: int
    reason: str


def yielding(snapshot: Snapshot, *, now_s: float) -> Yielding | None:
    """The next step by which a less urgent deployment makes room for a more urgent one; None where none is due."""
    if any(replica.intent is not Intent.RUN for replica in snapshot.replicas.values()):
        return None                # somebody leaves already: the GPUs may be those
    for waiting in _waiting(snapshot, now_s):
        owner = snapshot.deployments[waiting.deployment]
        for other in _less_urgent(snapshot, owner):
            if _frees_enough(snapshot, other, waiting):
                return Yielding(
                    deployment=other.name,
                    to_replicas=_placed(snapshot, other) - 1,
                    reason=(
                        f"gives way to {owner.id} (priority {owner.spec.priority} before {other.spec.priority}), "
                        f"which waits for GPUs: {waiting.status.reason or 'there is none for it'}"
                    ),
                )
    return None


def _waiting(snapshot: Snapshot, now_s: float) -> list[Replica]:
    """Replicas that have no GPUs yet and want them, the most urgent first."""
    found = [
        replica
        for replica in snapshot.replicas.values()
        if replica.intent is Intent.RUN
        and not replica.members
        and now_s - replica.create_time_s >= WAITED_S
        and replica.deployment in snapshot.deployments
    ]
    return sorted(found, key=lambda each: (snapshot.deployments[each.deployment].spec.priority, each.create_time_s))


def _less_urgent(snapshot: Snapshot, owner: Deployment) -> list[Deployment]:
    """Deployments that may give way to the owner, the least urgent first, then who has most over its minimum."""
    found = [
        each
        for each in snapshot.deployments.values()
        if each.spec.priority > owner.spec.priority
        and not (each.deleting or each.spec.fixed or each.spec.autoscaling_paused)
        and min(_over(each), _placed(snapshot, each) - each.spec.bounds[0]) > 0
    ]
    return sorted(found, key=lambda each: (-each.spec.priority, -_over(each), each.name))


def _placed(snapshot: Snapshot, deployment: Deployment) -> int:
    """Replicas that hold GPUs, no more than are wanted: one that waits for some frees none by going."""
    placed = sum(bool(replica.members) for replica in snapshot.replicas_of(deployment.name))
    return min(placed, deployment.status.target_replicas)


def _over(deployment: Deployment) -> int:
    return deployment.status.target_replicas - max(deployment.spec.bounds[0], 0)


def _frees_enough(snapshot: Snapshot, other: Deployment, waiting: Replica) -> bool:
    """Whether one replica less of the other leaves room on some node for the one that waits, which has none now."""
    variant = snapshot.variants.get(waiting.variant)
    if variant is None:
        return False
    size = max(variant.gpus_per_replica, 1)
    owner = snapshot.deployments[waiting.deployment]
    own = sum(len(replica.gpus) for replica in snapshot.replicas_of(owner.name))
    if owner.spec.hardware.max_gpus is not None and own + size > owner.spec.hardware.max_gpus:
        return False               # its own bound keeps it from more, not the other
    held = frozenset(gpu for replica in snapshot.replicas.values() for gpu in replica.gpus)
    nodes = [view for view in snapshot.nodes.values() if _may_hold(view, owner)]
    if any(_room(view, variant, owner, held) >= size for view in nodes):
        return False               # it will be placed without anybody's giving way
    return any(
        _room(view, variant, owner, held - frozenset(replica.gpus)) >= size
        for replica in snapshot.replicas_of(other.name)
        for view in nodes
        if view.node.name == replica.node
    )


def _may_hold(view: NodeView, owner: Deployment) -> bool:
    clusters = owner.spec.hardware.clusters
    open_to_all = view.state is NodeState.READY and view.node.schedulable and not view.node.draining
    return open_to_all and (not clusters or view.node.cluster in clusters)


def _room(view: NodeView, variant: Variant, owner: Deployment, held: frozenset[str]) -> int:
    """GPUs of a node that the variant could have if these were held."""
    allowed = owner.spec.hardware.allow
    return sum(
        gpu.uuid not in held and variant.gpu_type in {"", gpu.type} and (not allowed or gpu.type in allowed)
        for gpu in view.gpus
    )
