"""Each node's assignment, from the replicas that are committed in the store."""

from __future__ import annotations

from dataclasses import dataclass

from enova_coordinator.core.model import AssignedMember, Assignment, Desired, Intent, Member, Replica, Snapshot, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignmentSettings:
    """What every member gets beside its variant's configuration."""

    drain_timeout_s: float = 30.0
    queue_limit: int = 256


def changed_assignments(snapshot: Snapshot, settings: AssignmentSettings) -> tuple[Assignment, ...]:
    """The assignments that are not yet what the replicas of the snapshot ask for.

    What belongs to a deployment that cannot be read stays assigned as it is: engines outlive a coordinator's defects.
    Revisions are at least the store's own, so that they grow even for a node that was deleted and came back.
    """
    wanted = _members(snapshot, settings)
    frozen = snapshot.frozen
    changed: list[Assignment] = []
    for node in sorted(snapshot.nodes):
        name = node.replace("nodes/", "assignments/")
        if name in snapshot.unreadable:
            continue
        before = snapshot.assignments.get(name)
        kept = [member for member in before.members if _owner(member) in frozen] if before is not None else []
        found = kept + [member for member in wanted.get(node, ()) if _owner(member) not in frozen]
        members = tuple(sorted(found, key=lambda member: (member.replica, member.member.rank)))
        if before is None or before.members != members:
            revision = max(before.revision + 1 if before is not None else 1, snapshot.revision)
            changed.append(Assignment(name=name, revision=revision, members=members))
    return tuple(changed)


def _members(snapshot: Snapshot, settings: AssignmentSettings) -> dict[str, list[AssignedMember]]:
    members: dict[str, list[AssignedMember]] = {}
    for replica in snapshot.replicas.values():
        variant = snapshot.variants.get(replica.variant)
        if variant is None or replica.intent is Intent.STOP:
            continue
        for member in replica.members:
            members.setdefault(member.node, []).append(_assigned(replica, variant, member, settings))
    return members


def _owner(member: AssignedMember) -> str:
    return member.replica.rpartition("/replicas/")[0]


def _assigned(replica: Replica, variant: Variant, member: Member, settings: AssignmentSettings) -> AssignedMember:
    return AssignedMember(
        replica=replica.name,
        uid=replica.uid,
        model=variant.model,
        member=member,
        desired=Desired.RUN if replica.intent is Intent.RUN else Desired.DRAIN,
        served_names=variant.served_names,
        configuration=variant.configuration,
        engine=variant.engine,
        role=replica.role,
        member_count=len(replica.members),
        drain_timeout_s=settings.drain_timeout_s,
        restart_nonce=replica.restart_nonce,
        queue_limit=settings.queue_limit,
    )
