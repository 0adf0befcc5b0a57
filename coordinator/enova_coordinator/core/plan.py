"""What the reconciler wants: ordered changes, each with the revisions it assumed.

A change is applied whole or not at all, in one transaction that compares the leader's guard and every assumed
revision; one that is refused means that the world moved on, and the next round decides anew from a new snapshot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from enova_coordinator.core.model import (
    Assignment,
    Deployment,
    Replica,
    ReplicaStatus,
    Severity,
    Snapshot,
    Stored,
    Variant,
)

MAX_WRITES = 100  # in one change: a transaction takes 128 operations, and the guard needs room


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """Write a value, provided its key was last changed at `revision` (0: it does not exist)."""

    value: Stored
    revision: int

    @property
    def name(self) -> str:
        """The full name of what is written."""
        return self.value.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """Remove the object of this name, provided it was last changed at `revision`."""

    name: str
    revision: int


Write = Put | Delete


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a change means to a person; becomes an event once the change is applied."""

    object: str
    reason: str
    message: str
    severity: Severity = Severity.NORMAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Writes that belong together. `subject` is the deployment or node that they are about."""

    subject: str
    writes: tuple[Write, ...]
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All changes of one round, in the order in which they are to be applied."""

    changes: tuple[Change, ...] = ()


V = TypeVar("V", Deployment, Variant, Replica)


class Draft:
    """The world as a round wants it: begins as the snapshot, is changed value by value, ends as a plan."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.deployments = dict(snapshot.deployments)
        self.variants = dict(snapshot.variants)
        self.replicas = dict(snapshot.replicas)
        self._notes: dict[str, list[Note]] = {}
        self._variants_of = _grouped(self.variants)
        self._replicas_of = _grouped(self.replicas)

    def owners(self) -> tuple[str, ...]:
        """The deployments that own anything, existing or not, in a fixed order."""
        return tuple(sorted({*self.deployments, *self._variants_of, *self._replicas_of}))

    def variants_of(self, deployment: str) -> tuple[Variant, ...]:
        """A deployment's variants, oldest first."""
        names = self._variants_of.get(deployment, ())
        found = [self.variants[name] for name in names if name in self.variants]
        return tuple(sorted(found, key=lambda variant: (variant.generation, variant.name)))

    def replicas_of(self, deployment: str) -> tuple[Replica, ...]:
        """A deployment's replicas, oldest first."""
        names = self._replicas_of.get(deployment, ())
        found = [self.replicas[name] for name in names if name in self.replicas]
        return tuple(sorted(found, key=lambda replica: (replica.create_time_s, len(replica.name), replica.name)))

    def put(self, value: Deployment | Variant | Replica) -> None:
        """Set a value."""
        match value:
            case Deployment():
                self.deployments[value.name] = value
            case Variant():
                self.variants[value.name] = value
                self._variants_of.setdefault(value.deployment, {})[value.name] = None
            case Replica():
                self.replicas[value.name] = value
                self._replicas_of.setdefault(value.deployment, {})[value.name] = None

    def put_status(self, replica: Replica, status: ReplicaStatus) -> Replica:
        """Set a replica's status; the same status changes nothing."""
        if status == replica.status:
            return replica
        changed = replace(replica, status=status)
        self.put(changed)
        return changed

    def delete(self, name: str) -> None:
        """Remove a value."""
        for values in (self.deployments, self.variants, self.replicas):
            values.pop(name, None)

    def note(self, owner: str, note: Note) -> None:
        """Keep what a change means."""
        self._notes.setdefault(owner, []).append(note)

    def plan(self, assignments: tuple[Assignment, ...]) -> Plan:
        """The plan that leads from the snapshot to here, assignments first: they follow from what is committed."""
        changes = [
            Change(subject=assignment.name.replace("assignments/", "nodes/"), writes=(self._put(assignment),))
            for assignment in assignments
        ]
        for name in self.snapshot.assignments:
            node = name.replace("assignments/", "nodes/")
            if node not in self.snapshot.nodes and node not in self.snapshot.unreadable:
                changes.append(Change(subject=node, writes=(self._delete(name),)))
        for owner in sorted({*self.snapshot.deployments, *self.owners()}):
            changes += self._changes(owner)
        return Plan(changes=tuple(changes))

    def _changes(self, owner: str) -> Iterator[Change]:
        writes = tuple(self._writes(owner))
        notes = tuple(self._notes.get(owner, ()))
        for start in range(0, len(writes), MAX_WRITES):
            part = writes[start : start + MAX_WRITES]
            yield Change(subject=owner, writes=part, notes=notes if start == 0 else ())

    def _writes(self, owner: str) -> Iterator[Write]:
        before, after = self.snapshot, self
        if owner in after.deployments or owner in before.deployments:
            yield from self._write(owner, before.deployments, after.deployments)
        for name in self._variants_of.get(owner, {}):
            yield from self._write(name, before.variants, after.variants)
        for name in self._replicas_of.get(owner, {}):
            yield from self._write(name, before.replicas, after.replicas)

    def _write(self, name: str, before: Mapping[str, V], after: Mapping[str, V]) -> Iterator[Write]:
        old, new = before.get(name), after.get(name)
        if old is new or old == new:
            return
        yield self._delete(name) if new is None else self._put(new)

    def _delete(self, name: str) -> Delete:
        return Delete(name=name, revision=self.snapshot.revisions.get(name, 0))

    def _put(self, value: Stored) -> Put:
        return Put(value=value, revision=self.snapshot.revisions.get(value.name, 0))


def _grouped(values: Mapping[str, Variant] | Mapping[str, Replica]) -> dict[str, dict[str, None]]:
    groups: dict[str, dict[str, None]] = {}
    for name, value in values.items():
        groups.setdefault(value.deployment, {})[name] = None
    return groups
