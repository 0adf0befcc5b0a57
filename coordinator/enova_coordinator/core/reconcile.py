"""From what is to what should be: snapshot and now -> plan.

Theory of operation. Level-triggered: each round looks at everything anew, keeps no memory of its own, and wants
only steps that are safe now; a world that is as wanted gives an empty plan. A round (1) writes down what replicas
are, (2) removes the records of those that are gone, which frees their claims, (3) winds down deployments that
were deleted, (4) takes one step towards the target of every other deployment, by priority, then age: variants,
failures, rollout, placement, and (5) derives each node's assignment from what the snapshot had committed.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from enova_coordinator.core.assignment import AssignmentSettings, changed_assignments
from enova_coordinator.core.model import (
    Deployment,
    DeploymentState,
    DeploymentStatus,
    Intent,
    NodeState,
    Replica,
    ReplicaState,
    ReplicaStatus,
    Severity,
    Snapshot,
    Variant,
)
from enova_coordinator.core.placement import Inventory, Placed, Unplaced, gpus_held, in_clusters
from enova_coordinator.core.plan import Draft, Note, Plan
from enova_coordinator.core.rollout import Crew, is_ready, next_step, sacrifice
from enova_coordinator.core.status import gone, observed_status
from enova_coordinator.core.variants import current_variant

MAX_FAILED_NODES = 8               # remembered by a variant, so as to try elsewhere first


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcileLimits:
    """The paces and bounds of reconciling. Seconds of real time."""

    lost_grace_s: float = 20.0     # from LOST to replacement
    routed_wait_s: float = 15.0    # for ingresses to take up a new replica; then one that does not is not waited for
    surge: int = 1                 # replicas over the target while old ones are replaced
    creates_per_round: int = 32    # of one deployment, so that its change fits one transaction
    places_per_round: int = 256    # of all deployments: bounds how long a round holds the loop
    failure_delay_s: float = 10.0  # before a replica that gave up is replaced; doubles with each failure in a row
    failure_delay_max_s: float = 600.0
    failure_reset_s: float = 3600.0  # without a failure, after which the next one counts as the first
    assignment: AssignmentSettings = field(default_factory=AssignmentSettings)


def reconcile(snapshot: Snapshot, *, now_s: float, limits: ReconcileLimits) -> Plan:
    """The changes that one round wants; empty when everything is as it should be."""
    draft = Draft(snapshot)
    frozen = snapshot.frozen
    for replica in snapshot.replicas.values():
        if replica.deployment not in frozen:
            _observe(draft, replica, now_s)
    for replica in tuple(draft.replicas.values()):
        if replica.deployment not in frozen and gone(replica, snapshot, lost_grace_s=limits.lost_grace_s):
            _remove(draft, replica)
    for owner in draft.owners():
        deployment = draft.deployments.get(owner)
        if owner not in frozen and (deployment is None or deployment.deleting):
            _wind_down(draft, owner, now_s)
    # Claims that this round removes count still: their removal may be refused where a placement is not.
    inventory = Inventory(snapshot, snapshot.replicas.values())
    living = (deployment for deployment in draft.deployments.values() if not deployment.deleting)
    for deployment in sorted(living, key=lambda each: (each.spec.priority, each.create_time_s, each.name)):
        if deployment.name not in frozen:
            _Round(draft, inventory, deployment, now_s, limits).run()
    return draft.plan(changed_assignments(snapshot, limits.assignment))


class _Round:
    """One deployment's step in one round."""

    def __init__(
        self, draft: Draft, inventory: Inventory, deployment: Deployment, now_s: float, limits: ReconcileLimits
    ) -> None:
        self.draft = draft
        self.inventory = inventory
        self.deployment = deployment
        self.now_s = now_s
        self.limits = limits
        self.target = _target(deployment)
        self.variant = current_variant(draft, deployment, target=self.target)

    def run(self) -> None:
        """Take the step and write down how the deployment stands."""
        self._adopt_generation()
        self._replace_failed()
        crew = self._crew()
        self._release_written_off(crew)
        step = next_step(crew, surge=self.limits.surge)
        for replica in step.release:
            _release(self.draft, replica, self.now_s)
        for _ in range(min(step.create, self.limits.creates_per_round)):
            self._create()
        unplaced = self._place()
        if unplaced is not None:
            self._make_room()
        self._drop_empty_variants()
        self._report()

    def _replicas(self) -> tuple[Replica, ...]:
        return self.draft.replicas_of(self.deployment.name)

    def _running(self) -> tuple[Replica, ...]:
        return tuple(replica for replica in self._replicas() if replica.intent is Intent.RUN)

    def _crew(self) -> Crew:
        present = tuple(replica for replica in self._running() if not self._written_off(replica))
        return Crew(
            target=self.target,
            unrouted=frozenset(replica.name for replica in present if self._unrouted(replica)),
            first=self.deployment.status.leave_first,
            new=tuple(replica for replica in present if self._stays(replica)),
            old=tuple(replica for replica in present if not self._stays(replica)),
        )

    def _stays(self, replica: Replica) -> bool:
        """Whether the replica is what the spec wants, where it may be, and nobody wants another in its stead."""
        if replica.variant != self.variant.name or replica.replace_reason:
            return False
        views = [self.draft.snapshot.nodes.get(member.node) for member in replica.members]
        return all(
            view is None or (not view.node.draining and in_clusters(view, self.deployment)) for view in views
        )

    def _unrouted(self, replica: Replica) -> bool:
        waited_s = self.now_s - replica.status.state_time_s
        routed = self.draft.snapshot.routed
        return routed is not None and replica.name not in routed and waited_s < self.limits.routed_wait_s

    def _written_off(self, replica: Replica) -> bool:
        """Whether it is lost for so long that another takes its part. It counts again if its node returns."""
        snapshot = self.draft.snapshot
        if replica.status.state is not ReplicaState.LOST or snapshot.replacement_held:
            return False
        views = [snapshot.nodes.get(member.node) for member in replica.members]
        readable = (member.node not in snapshot.unreadable for member in replica.members)
        return all(readable) and any(
            view is None or (view.state is NodeState.LOST and view.state_age_s >= self.limits.lost_grace_s)
            for view in views
        )

    def _release_written_off(self, crew: Crew) -> None:
        for replica in self._running():
            if self._written_off(replica) and (not self._stays(replica) or crew.new_ready >= self.target):
                _release(self.draft, replica, self.now_s)

    def _adopt_generation(self) -> None:
        for replica in self._running():
            if replica.variant == self.variant.name and replica.generation != self.deployment.generation:
                self.draft.put(replace(replica, generation=self.deployment.generation))

    def _replace_failed(self) -> None:
        """Let go of replicas that gave up, at a pace that slows down with each failure in a row."""
        variant, limits = self.variant, self.limits
        recent = self.now_s - variant.failure_time_s < limits.failure_reset_s
        failures = variant.failures if recent else 0
        delay_s = min(limits.failure_delay_s * 2 ** min(failures, 30), limits.failure_delay_max_s)
        due = [
            replica
            for replica in self._running()
            if replica.variant == variant.name
            and replica.status.gave_up
            and self.now_s - replica.status.state_time_s >= delay_s
        ]
        if not due:
            return
        nodes = tuple(member.node for replica in due for member in replica.members)
        self.variant = replace(
            variant,
            failures=failures + 1,
            failure_time_s=self.now_s,
            failure_reason=due[-1].status.reason,
            failed_nodes=(variant.failed_nodes + nodes)[-MAX_FAILED_NODES:],
        )
        self.draft.put(self.variant)
        for replica in due:
            _release(self.draft, replica, self.now_s)

    def _create(self) -> None:
        number = self.variant.replicas_made
        self.variant = replace(self.variant, replicas_made=number + 1)
        self.draft.put(self.variant)
        replica = Replica(
            name=f"{self.deployment.name}/replicas/{self.variant.id}-{number}",
            uid=f"{self.deployment.uid}-{self.variant.id}-{number}",
            deployment=self.deployment.name,
            variant=self.variant.name,
            role=self.variant.role,
            generation=self.deployment.generation,
            create_time_s=self.now_s,
            status=ReplicaStatus(state_time_s=self.now_s),
        )
        self.draft.put(replica)
        _note(self.draft, replica, "ReplicaCreated", f"for {self.variant.id}, target {self.target}")

    def _place(self) -> Unplaced | None:
        """Give every waiting replica a place; why the rest has none."""
        for replica in self._running():
            if replica.members or replica.variant != self.variant.name:
                continue
            if self.inventory.handed_out >= self.limits.places_per_round:
                return None        # the rest has its turn in the next round
            place = self._find_place()
            if isinstance(place, Unplaced):
                self._explain_pending(place)
                return place
            self._settle(replica, place)
        return None

    def _find_place(self, *, without: Replica | None = None) -> Placed | Unplaced:
        variant = self.variant
        if not any(replica.members for replica in self._replicas() if replica.variant == variant.name):
            variant = replace(variant, gpu_type="")  # nothing binds it to a type yet
        most = self.deployment.spec.hardware.max_gpus
        held = gpus_held(replica for replica in self._replicas() if replica != without)
        budget = most - held if most is not None else None
        return self.inventory.place(
            self.deployment, variant, gpu_budget=budget, without=without.name if without is not None else ""
        )

    def _settle(self, replica: Replica, place: Placed) -> None:
        if self.variant.gpu_type != place.gpu_type:
            self.variant = replace(self.variant, gpu_type=place.gpu_type)
            self.draft.put(self.variant)
        status = replace(
            replica.status, state=ReplicaState.STARTING, state_time_s=self.now_s, reason="waits for its agent"
        )
        placed = replace(replica, members=place.members, status=status)
        self.draft.put(placed)
        self.inventory.give(placed)
        _note(self.draft, placed, "ReplicaPlaced", f"on {placed.node}, {len(placed.gpus)} x {place.gpu_type}")

    def _explain_pending(self, place: Unplaced) -> None:
        for replica in self._running():
            if not replica.members and replica.variant == self.variant.name:
                self.draft.put_status(replica, replace(replica.status, reason=place.reason))

    def _make_room(self) -> None:
        """With no room beside the old replicas, let one of them go first, if that makes room and others serve."""
        others_leaving = any(replica.intent is not Intent.RUN for replica in self._replicas())
        for replica in sacrifice(self._crew(), others_leaving=others_leaving):
            if replica.replace_reason:
                continue           # its GPUs are what is in doubt: a successor on them would be no better
            if isinstance(self._find_place(without=replica), Placed):
                _release(self.draft, replica, self.now_s)
                return

    def _drop_empty_variants(self) -> None:
        used = {replica.variant for replica in self._replicas()}
        for variant in self.draft.variants_of(self.deployment.name):
            if variant.retired and variant.name not in used:
                self.draft.delete(variant.name)

    def _report(self) -> None:
        crew = self._crew()
        state, reason = _standing(crew, self.variant, others_leaving=len(self._replicas()) > len(crew.new))
        status = DeploymentStatus(
            observed_generation=self.deployment.generation,
            state=state,
            reason=reason,
            target_replicas=self.target,
            ready_replicas=crew.ready,
            leave_first=crew.first if len(crew.new) > crew.target else (),
        )
        if status == self.deployment.status:
            return
        self.draft.put(replace(self.deployment, status=status))
        if status.state is not self.deployment.status.state:
            severity = Severity.WARNING if state is DeploymentState.FAILED else Severity.NORMAL
            name = f"Deployment{state.capitalize()}"
            message = reason or f"{crew.ready} of {self.target} replicas ready"
            note = Note(object=self.deployment.name, reason=name, message=message, severity=severity)
            self.draft.note(self.deployment.name, note)


def _target(deployment: Deployment) -> int:
    """The number of replicas to reach: what user or policy last asked for, within the spec's bounds."""
    if deployment.status.observed_generation == 0:
        return deployment.spec.clamped(max(1, deployment.spec.bounds[0]))
    return deployment.spec.clamped(deployment.status.target_replicas)


def _standing(crew: Crew, variant: Variant, *, others_leaving: bool) -> tuple[DeploymentState, str]:
    settled = len(crew.new) == crew.target == crew.new_ready and not crew.old
    if settled:
        # Those on their way out do not make a deployment less ready.
        return DeploymentState.READY, "" if crew.target else _idle_reason(others_leaving=others_leaving)
    failed = [replica for replica in crew.new if replica.status.gave_up]
    reasons = [f"{_short(replica)}: {replica.status.reason}" for replica in failed]
    if not reasons and variant.failures and not crew.new_ready:
        reasons = [f"{variant.failure_reason} ({variant.failures} failures, trying again)"]
    if reasons and not crew.new_ready and crew.target:
        return DeploymentState.FAILED, _kept(reasons[0], crew)
    waiting = [
        ": ".join(filter(None, (f"{_short(replica)} is {replica.status.state}", _detail(replica))))
        for replica in crew.new
        if not is_ready(replica)
    ]
    reason = (reasons + waiting + ["replicas are being replaced"])[0]
    return (DeploymentState.UPDATING if crew.ready else DeploymentState.PENDING), reason


def _kept(reason: str, crew: Crew) -> str:
    return f"{reason}; {crew.ready} replicas of before go on serving" if crew.ready else reason


def _idle_reason(*, others_leaving: bool) -> str:
    return "target 0: the last replicas are leaving" if others_leaving else "target 0"


def _observe(draft: Draft, replica: Replica, now_s: float) -> None:
    before = replica.status
    after = draft.put_status(replica, observed_status(replica, draft.snapshot, now_s=now_s)).status
    if after.restarts > before.restarts and replica.intent is Intent.RUN:
        _note(draft, replica, "EngineRestarted", after.reason or "its engine ended", Severity.WARNING)
    if after.state is before.state:
        return
    # Passing states are in the record; an event for each would drown the others.
    if after.state is ReplicaState.READY:
        _note(draft, replica, "ReplicaReady", f"on {replica.node}")
    elif after.state in {ReplicaState.FAILED, ReplicaState.LOST}:
        _note(draft, replica, f"Replica{after.state.capitalize()}", after.reason, Severity.WARNING)


def _release(draft: Draft, replica: Replica, now_s: float) -> None:
    """Let go of a replica: one that serves drains, one that has no place is forgotten, every other is stopped."""
    if not replica.members:
        _remove(draft, replica)
    elif replica.intent is Intent.RUN and is_ready(replica):
        draft.put(replace(draft.replicas[replica.name], intent=Intent.DRAIN, drain_time_s=now_s))
        _note(draft, replica, "ReplicaDraining", f"on {replica.node}")
    elif replica.intent is Intent.RUN:
        draft.put(replace(draft.replicas[replica.name], intent=Intent.STOP))
        _note(draft, replica, "ReplicaStopping", f"on {replica.node}, it was {replica.status.state}")


def _remove(draft: Draft, replica: Replica) -> None:
    draft.delete(replica.name)
    _note(draft, replica, "ReplicaRemoved", f"it was {replica.status.state}")


def _wind_down(draft: Draft, owner: str, now_s: float) -> None:
    """Let go of all that a deleted deployment has; with the last replica it ends itself."""
    for replica in draft.replicas_of(owner):
        _release(draft, replica, now_s)
    left = draft.replicas_of(owner)
    deployment = draft.deployments.get(owner)
    if left and deployment is not None:
        reason = f"{len(left)} replicas are leaving"
        status = replace(deployment.status, state=DeploymentState.DELETING, reason=reason, target_replicas=0)
        draft.put(replace(deployment, status=replace(status, ready_replicas=0)))
    elif not left:
        for variant in draft.variants_of(owner):
            draft.delete(variant.name)
        draft.delete(owner)
        draft.note(owner, Note(object=owner, reason="DeploymentDeleted", message="nothing of it is left"))


def _note(
    draft: Draft, replica: Replica, reason: str, message: str, severity: Severity = Severity.NORMAL
) -> None:
    note = Note(object=replica.name, reason=reason, message=message, severity=severity)
    draft.note(replica.deployment, note)


def _detail(replica: Replica) -> str:
    return replica.status.reason or replica.status.phase


def _short(replica: Replica) -> str:
    return replica.name.rpartition("/")[2]
