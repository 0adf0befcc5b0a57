"""What a replica is: its members' reports and its nodes' liveness, put together."""

from __future__ import annotations

from dataclasses import replace

from enova_coordinator.core.model import (
    Intent,
    Member,
    NodeState,
    Replica,
    ReplicaReport,
    ReplicaState,
    ReplicaStatus,
    Snapshot,
)

# A replica of several members is as good as its worst one: earlier here is worse.
_WORST_FIRST = (
    ReplicaState.LOST,
    ReplicaState.FAILED,
    ReplicaState.STOPPED,
    ReplicaState.STOPPING,
    ReplicaState.DRAINING,
    ReplicaState.PENDING,
    ReplicaState.STARTING,
    ReplicaState.SLEEPING,
    ReplicaState.READY,
)


def observed_status(replica: Replica, snapshot: Snapshot, *, now_s: float) -> ReplicaStatus:
    """The replica's status as of now; the one that it has where nothing new is known."""
    before = replica.status
    if not replica.members:
        return before
    lost = _lost_reason(replica, snapshot)
    if lost:
        return _entered(before, replace(before, state=ReplicaState.LOST, reason=lost), now_s)
    views = [snapshot.nodes.get(member.node) for member in replica.members]
    if any(view is None or view.report is None for view in views):
        return before
    reports = [_report(replica, member, snapshot) for member in replica.members]
    found = [report for report in reports if report is not None]
    if len(found) < len(reports):
        return _entered(before, _unreported(replica), now_s)
    return _entered(before, _merged(before, found), now_s)


def gone(replica: Replica, snapshot: Snapshot, *, lost_grace_s: float) -> bool:
    """Whether nothing of a replica that shall not run is left, so that its claims may be given to others."""
    if replica.intent is Intent.RUN:
        return False
    return all(_member_gone(replica, member, snapshot, lost_grace_s) for member in replica.members)


def _member_gone(replica: Replica, member: Member, snapshot: Snapshot, lost_grace_s: float) -> bool:
    view = snapshot.nodes.get(member.node)
    if view is None:
        # A node that was deleted takes its replicas with it; one that cannot be read is still there.
        return member.node not in snapshot.unreadable
    if view.state is NodeState.LOST:
        # Nothing else can be placed there. When the node returns, its assignment lacks this replica, and it takes
        # nothing new while it still reports it.
        return view.state_age_s >= lost_grace_s
    if view.report is None:
        return False
    report = _report(replica, member, snapshot)
    if report is not None:
        return report.state is ReplicaState.STOPPED
    assignment = snapshot.assignments.get(member.node.replace("nodes/", "assignments/"))
    if assignment is None:
        return True
    assigned = any(other.uid == replica.uid for other in assignment.members)
    return not assigned and view.report.assignment_revision >= assignment.revision


def _lost_reason(replica: Replica, snapshot: Snapshot) -> str:
    for member in replica.members:
        view = snapshot.nodes.get(member.node)
        if view is None and member.node not in snapshot.unreadable:
            return f"{member.node} was deleted"
        if view is not None and view.state is NodeState.LOST:
            return f"{member.node} is lost: {view.reason}"
    return ""


def _report(replica: Replica, member: Member, snapshot: Snapshot) -> ReplicaReport | None:
    report = snapshot.nodes[member.node].report
    for entry in report.replicas if report is not None else ():
        if entry.replica == replica.name and entry.uid == replica.uid and entry.rank == member.rank:
            return entry
    return None


def _unreported(replica: Replica) -> ReplicaStatus:
    """The status of a replica that an agent which did report does not know (yet, or any more)."""
    before = replica.status
    if replica.intent is not Intent.RUN:
        return replace(before, state=ReplicaState.STOPPING)
    if before.state is ReplicaState.STARTING:
        return before
    return replace(before, state=ReplicaState.STARTING, reason="its agent has not begun yet", phase="", gave_up=False)


def _merged(before: ReplicaStatus, reports: list[ReplicaReport]) -> ReplicaStatus:
    worst = min(reports, key=lambda report: (_WORST_FIRST.index(report.state), report.rank))
    first = min(reports, key=lambda report: report.rank)
    # An agent calls an engine that waits for its next start PENDING; here PENDING means that it has no place.
    state = ReplicaState.STARTING if worst.state is ReplicaState.PENDING else worst.state
    return ReplicaStatus(
        state=state,
        reason=worst.reason,
        state_time_s=before.state_time_s,
        phase=worst.phase,
        pid=first.pid,
        endpoint=first.endpoint,
        restarts=sum(report.restarts for report in reports),
        start_time_s=first.start_time_s or before.start_time_s,
        ready_time_s=max(report.ready_time_s for report in reports) or before.ready_time_s,
        in_routing=all(report.in_routing for report in reports),
        gave_up=any(report.gave_up for report in reports),
    )


def _entered(before: ReplicaStatus, after: ReplicaStatus, now_s: float) -> ReplicaStatus:
    return after if after.state is before.state else replace(after, state_time_s=now_s)
