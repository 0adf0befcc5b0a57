"""The leader's loop: look, reconcile, apply under the guard, tell the agents, sleep.

Theory of operation. Events (a write in the store, a report of an agent, a beat of one second) only wake the loop; it
decides from a snapshot. Each change of the plan is one transaction that compares the leader's key and every revision
the plan assumed; a refused one is forgotten, since the next round decides anew. Before the next round the mirror must
have seen our own writes. A write whose outcome is unknown ends the term: it may still land, and a new term is
what keeps it from doing so after somebody decided otherwise. Any other failure ends the step, not the loop, and is
kept as an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from enova_common.errors import Conflict, EnovaError, NotFound, TimedOut, Unavailable
from enova_coordinator.core.liveness import Liveness, LivenessLimits, observe
from enova_coordinator.core.model import (
    Assignment,
    Configuration,
    Decision,
    Deployment,
    NodeObservation,
    NodeState,
    Replica,
    ReplicaState,
    RequestRecord,
    Severity,
    Snapshot,
)
from enova_coordinator.core.placement import double_claims
from enova_coordinator.core.plan import Change, Put, Write
from enova_coordinator.core.reconcile import ReconcileLimits, reconcile
from enova_coordinator.core.routes import LengthRules, RouteTable, next_table, routed
from enova_coordinator.election import Leadership
from enova_coordinator.events import EventLog
from enova_coordinator.snapshot import Mirror
from enova_coordinator.store import Store, codec
from enova_coordinator.store.changes import commit, unknown_ends

SELF = "coordinator"               # the object of events that are about no other
LAG_PERIOD_S = 0.1
SET_TARGET_ATTEMPTS = 5
SETTLE_S = 0.3                     # until what refused a write is seen here

log = logging.getLogger(__name__)


class Fleet(Protocol):
    """The agents that are connected, as the loop needs them."""

    def observations(self) -> Mapping[str, NodeObservation]:
        """All nodes as their streams are now."""
        ...

    def assign(self, node: str, assignment: Assignment) -> None:
        """Give a node its assignment, now or when it connects."""
        ...

    def route(self, table: RouteTable) -> None:
        """Give all nodes these routes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSettings:
    """The loop's paces, real seconds."""

    interval_s: float = 1.0        # a round without any event: ages and delays pass
    pause_s: float = 0.02          # between rounds, so that events which come together are looked at together
    reached_timeout_s: float = 5.0
    quiet_s: float = 5.0           # without a full look, while all serves and nothing changed
    liveness: LivenessLimits = field(default_factory=LivenessLimits)
    reconcile: ReconcileLimits = field(default_factory=ReconcileLimits)


class LoopLag:
    """How late this process's event loop runs."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._beat_s = now_s()
        self._worst_s = 0.0

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            self._beat_s = self._now_s()
            await asyncio.sleep(LAG_PERIOD_S)
            self._worst_s = max(self._worst_s, self._overdue_s())

    def take(self) -> float:
        """The worst lag since the last call, one that is not over included."""
        worst_s, self._worst_s = max(self._worst_s, self._overdue_s()), 0.0
        return worst_s

    def _overdue_s(self) -> float:
        return max(0.0, self._now_s() - self._beat_s - LAG_PERIOD_S)


class Controller:
    """Reconciles while it leads. One for the life of the process; `run` once for each term."""

    def __init__(
        self,
        store: Store,
        mirror: Mirror,
        fleet: Fleet,
        events: EventLog,
        *,
        settings: ControllerSettings | None = None,
        wall_s: Callable[[], float] = time.time,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.events = events
        self.table = RouteTable()
        """The routes as they were last told to the agents."""
        self.snapshot = Snapshot()
        """The state that the last round looked at."""
        self.loop_lag_s = 0.0
        self.rounds = 0
        self.last_error = ""
        self._store = store
        self._mirror = mirror
        self._fleet = fleet
        self._settings = settings or ControllerSettings()
        self._wall_s = wall_s
        self._monotonic_s = monotonic_s
        self._wake = asyncio.Event()
        self._lag = LoopLag(monotonic_s)
        self._liveness = Liveness(started_s=0.0)
        self._leadership: Leadership | None = None
        self._written = 0          # the newest revision of our own writes
        self._assigned: dict[str, int] = {}
        self._quiet: Snapshot | None = None
        self._quiet_until_s = 0.0
        self._length_rules: Mapping[str, LengthRules] = {}

    def wake(self) -> None:
        """Something changed: look soon."""
        self._wake.set()

    def set_length_rules(self, rules: Mapping[str, LengthRules]) -> None:
        """Routes say these rules of answers' lengths from now on, by deployment."""
        if rules != self._length_rules:
            self._length_rules, self._quiet = dict(rules), None
            self.wake()

    async def run(self, leadership: Leadership) -> None:
        """Reconcile until this term ends or the task is cancelled."""
        self._lag = LoopLag(self._monotonic_s)
        self._liveness = Liveness(started_s=self._monotonic_s())
        self._leadership, self._written = leadership, leadership.term
        self._assigned.clear()
        self._quiet = None
        self.table = RouteTable()
        lag = asyncio.create_task(self._lag.run(), name="loop-lag")
        try:
            while leadership.is_leading():
                self._wake.clear()
                started_s = self._monotonic_s()
                await self._round(leadership)
                round_s = self._monotonic_s() - started_s
                with contextlib.suppress(TimeoutError):  # nothing woke us: the beat of every second
                    await asyncio.wait_for(self._wake.wait(), self._settings.interval_s)
                # At least as long as the round took: streams and calls get half of the loop, however large the fleet.
                await asyncio.sleep(max(self._settings.pause_s, round_s))
        finally:
            self._leadership = None
            lag.cancel()

    async def _round(self, leadership: Leadership) -> None:
        try:
            async with asyncio.timeout(self._settings.reached_timeout_s):
                await self._mirror.reached(self._written)
            with unknown_ends(leadership):
                await self._step(leadership)
            self.last_error = ""
        except TimeoutError:
            self._failed("the store's changes do not arrive: nothing is decided on a stale view")
        except EnovaError as error:
            self._failed(str(error))
        except Exception as error:
            # A defect must cost a round, not the term: else the next leader meets it, and nobody leads.
            log.exception("round failed")
            self._failed(f"internal error: {type(error).__name__}: {error}")
        self.rounds += 1

    async def _step(self, leadership: Leadership) -> None:
        snapshot = self.snapshot = self._look()
        problems = double_claims(snapshot.replicas)
        if problems:
            # It cannot happen; if it did, every further placement would rest on it.
            self._failed("; ".join(problems))
            return
        for name, problem in self._mirror.unreadable.items():
            self.events.record(name, "Unreadable", problem, Severity.WARNING)
        if self._is_quiet(snapshot):
            return
        self._tell(snapshot)
        reports = (view.report for view in snapshot.nodes.values() if view.report is not None)
        snapshot = replace(snapshot, routed=routed(self.table, reports))
        plan = reconcile(snapshot, now_s=self._wall_s(), limits=self._settings.reconcile)
        for change in plan.changes:
            if not leadership.is_leading():
                return
            await self._apply(leadership, change)
        serving = all(replica.status.state is ReplicaState.READY for replica in snapshot.replicas.values())
        if serving and not plan.changes:
            self._quiet = snapshot
            self._quiet_until_s = self._monotonic_s() + self._settings.quiet_s

    def _is_quiet(self, snapshot: Snapshot) -> bool:
        """Whether the last round found everything as it should be, and nothing is different now."""
        before = self._quiet
        same = (
            before is not None
            and self._monotonic_s() < self._quiet_until_s
            and before.revision == snapshot.revision
            and before.nodes.keys() == snapshot.nodes.keys()
            and all(
                view.state is before.nodes[name].state and view.report is before.nodes[name].report
                for name, view in snapshot.nodes.items()
            )
        )
        if not same:
            self._quiet = None
        return same

    def _look(self) -> Snapshot:
        now_s = self._monotonic_s()
        self.loop_lag_s = self._lag.take()
        observations = self._fleet.observations()
        before = self._liveness
        self._liveness = observe(
            before,
            tuple(self._mirror.nodes),
            observations,
            now_s=now_s,
            loop_lag_s=self.loop_lag_s,
            limits=self._settings.liveness,
        )
        self._note_liveness(before, self._liveness)
        return self._mirror.snapshot(self._liveness, observations, now_s=now_s)

    def _tell(self, snapshot: Snapshot) -> None:
        for assignment in snapshot.assignments.values():
            if self._assigned.get(assignment.name) != assignment.revision:
                self._fleet.assign(assignment.name.replace("assignments/", "nodes/"), assignment)
                self._assigned[assignment.name] = assignment.revision
        table = next_table(self.table, snapshot, self._length_rules)
        if table is not self.table:
            self._fleet.route(table)
            self.table = table

    async def _apply(self, leadership: Leadership, change: Change) -> None:
        try:
            result = await commit(self._store, leadership.guard(), change.writes)
        except TimedOut:
            raise
        except EnovaError as error:
            # One object that the store refuses (too large, no space) must not keep the others from their changes.
            self.events.record(change.subject, "ChangeFailed", str(error), Severity.WARNING)
            self.last_error = str(error)
            if isinstance(error, Unavailable):
                raise
            return
        if not result.succeeded:
            log.info("refused, since the world moved on: a change of %s", change.subject)
            self._wake.set()
            return
        self._written = max(self._written, result.revision)
        for note in change.notes:
            self.events.record_note(note)

    def _note_liveness(self, before: Liveness, after: Liveness) -> None:
        for name, node in after.nodes.items():
            old = before.nodes.get(name)
            if old is not None and old.state is node.state:
                continue
            severity = Severity.NORMAL if node.state is NodeState.READY else Severity.WARNING
            if old is not None or node.state is NodeState.READY:
                self.events.record(name, f"Node{node.state.capitalize()}", node.reason or "connected", severity)
        if after.replacement_held and not before.replacement_held:
            self.events.record(SELF, "MassLoss", after.replacement_held, Severity.WARNING)

    def _failed(self, text: str) -> None:
        log.warning("round failed: %s", text)
        self.last_error = text
        self.events.record(SELF, "RoundFailed", text, Severity.WARNING)

    # Scaling.

    async def set_target(
        self, deployment: str, replicas: int, decision: Decision, *, request: RequestRecord | None = None,
        leave_first: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        """Write a decision, the target that it sets and the request that asked for it in one transaction.

        Of `decision` the name, term, numbers of replicas and, if 0, the time are filled in here. Users may set any
        target of a fixed deployment: its spec follows. Every other target is kept within the spec's bounds. Flags
        that the decision changes are written into the spec, and roll out as a user's change does.
        """
        leadership = self._leading()
        if self._liveness.replacement_held and not decision.actor.startswith("user/"):
            raise Conflict(self._liveness.replacement_held, reason="MASS_LOSS_HOLD")
        for _ in range(SET_TARGET_ATTEMPTS):
            before, revision = await self._read(deployment)
            after = _with_target(
                before, replicas, now_s=self._wall_s(), flags=_changed_flags(decision), leave_first=leave_first
            )
            full = self._completed(decision, leadership, before, after)
            writes: list[Write] = [Put(value=full, revision=0), Put(value=after, revision=revision)]
            writes += self._variant_writes(after)
            if request is not None:
                writes.append(Put(value=request, revision=0))
            with unknown_ends(leadership):
                result = await commit(self._store, leadership.guard(), writes)
            if result.succeeded:
                self._recorded(full, result.revision)
                return
            with contextlib.suppress(TimeoutError):  # the store's revision may be of keys that the mirror does not see
                async with asyncio.timeout(SETTLE_S):
                    await self._mirror.reached(result.revision)
            leadership = self._leading()
        raise Conflict(f"{deployment} changes too fast: its target was not set", remedy="try again")

    async def record_decision(self, decision: Decision) -> Decision:
        """Write a decision that changes nothing (the policy wanted to act and something forbade it)."""
        leadership = self._leading()
        full = self._completed(decision, leadership, None, None)
        with unknown_ends(leadership):
            result = await commit(self._store, leadership.guard(), [Put(value=full, revision=0)])
        if not result.succeeded:
            raise Conflict(f"the decision {full.name} was not written", remedy="try again")
        self._recorded(full, result.revision)
        return full

    async def replace(self, replica: str, decision: Decision) -> None:
        """Write that a new replica is to take this one's part once it is READY, and the decision that says why."""
        leadership = self._leading()
        if self._liveness.replacement_held:
            raise Conflict(self._liveness.replacement_held, reason="MASS_LOSS_HOLD")
        entry = await self._store.get(codec.key(replica))
        if entry is None:
            raise NotFound(f"{replica} does not exist any more")
        before = codec.decode_as(Replica, entry.value, key=entry.key)
        full = self._completed(decision, leadership, None, None)
        after = replace(before, replace_reason=decision.reason)
        with unknown_ends(leadership):
            result = await commit(
                self._store,
                leadership.guard(),
                [Put(value=full, revision=0), Put(value=after, revision=entry.mod_revision)],
            )
        if not result.succeeded:
            raise Conflict(f"{replica} changed meanwhile: it is not replaced", remedy="try again")
        self._recorded(full, result.revision)
        self.events.record(replica, "ReplicaToBeReplaced", decision.reason, severity=Severity.WARNING)

    def _leading(self) -> Leadership:
        leadership = self._leadership
        if leadership is None or not leadership.is_leading():
            raise Unavailable("this coordinator does not lead", reason="NOT_LEADER", remedy="ask the leader")
        return leadership

    async def _read(self, deployment: str) -> tuple[Deployment, int]:
        key = codec.key(deployment)
        entry = await self._store.get(key)
        if entry is None:
            raise NotFound(f"{deployment} does not exist", remedy="enova get deployments shows what does")
        value = codec.decode_as(Deployment, entry.value, key=key)
        if value.deleting:
            raise Conflict(f"{deployment} is being deleted", reason="DELETING")
        return value, entry.mod_revision

    def _variant_writes(self, deployment: Deployment) -> list[Write]:
        return [
            Put(
                value=replace(variant, target_replicas=deployment.status.target_replicas),
                revision=self._mirror.revisions[variant.name],
            )
            for variant in self._mirror.variants.values()
            if variant.deployment == deployment.name and not variant.retired
        ]

    def _completed(
        self, decision: Decision, leadership: Leadership, before: Deployment | None, after: Deployment | None
    ) -> Decision:
        time_s = decision.create_time_s or self._wall_s()
        if before is not None and after is not None:
            numbers = (before.status.target_replicas, after.status.target_replicas)
            decision = replace(decision, from_replicas=numbers[0], to_replicas=numbers[1])
        name = codec.decision_name(decision.deployment, self._wall_s())
        return replace(decision, name=name, term=leadership.term, create_time_s=time_s)

    def _recorded(self, decision: Decision, revision: int) -> None:
        self._written = max(self._written, revision)
        text = f"{decision.from_replicas} -> {decision.to_replicas} by {decision.actor}: {decision.reason}"
        self.events.record(decision.deployment, f"Decision{_camel(decision.action)}", text)
        self._wake.set()


def _changed_flags(decision: Decision) -> Configuration:
    before = decision.from_configuration
    return {name: value for name, value in decision.to_configuration.items() if before.get(name) != value}


def _with_target(
    deployment: Deployment, replicas: int, *, now_s: float, flags: Configuration, leave_first: tuple[str, ...]
) -> Deployment:
    spec = deployment.spec
    if spec.fixed and spec.replicas != replicas:
        spec = replace(spec, replicas=replicas)
    if flags:
        spec = replace(spec, configuration={**deployment.configuration, **flags})
    generation = deployment.generation + (spec != deployment.spec)
    status = replace(
        deployment.status,
        target_replicas=spec.clamped(replicas),
        # The target counts as asked for, so that the reconciler does not take its first one.
        observed_generation=max(deployment.status.observed_generation, 1),
        leave_first=leave_first,
    )
    update_time_s = now_s if generation != deployment.generation else deployment.update_time_s
    return replace(deployment, spec=spec, generation=generation, status=status, update_time_s=update_time_s)


def _camel(word: str) -> str:
    return "".join(part.capitalize() for part in word.split("_"))
