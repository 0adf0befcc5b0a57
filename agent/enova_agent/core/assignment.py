"""What must change so that exactly the assigned members run: desired beside running, pure and level-triggered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from enova_agent.core.model import Assignment, Desired, MemberSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Nothing of this replica is here: begin it (one that shall drain is then stopped by the next round)."""

    spec: MemberSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """The replica is not assigned: take it out of routing, drain it, end it, forget it."""

    replica: str
    drain_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """The replica shall take no new requests and stop, and stay known as stopped."""

    spec: MemberSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """The replica shall run again after all."""

    spec: MemberSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Replace:
    """Its engine cannot become what is wanted without a new process: stop it; the next round starts the new."""

    replica: str
    drain_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """A person asked for a restart since this engine was started."""

    spec: MemberSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Something that needs no new process: queue limit, drain time-out."""

    spec: MemberSpec


Change = Start | Stop | Drain | Resume | Replace | Restart | Update


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """One replica as the agent has it."""

    spec: MemberSpec
    stopping: bool = False         # asked to stop: draining, terminating or stopped
    leaving: bool = False          # asked to stop and to be forgotten


def converge(assignment: Assignment, running: Mapping[str, Running]) -> tuple[Change, ...]:
    """The changes that lead from what runs to what is assigned, one at most for each replica.

    Applying them and asking again ends: a replica that is right yields nothing. A replica that must be
    replaced is first stopped; only once it is gone does `converge` start its successor.
    """
    wanted = {spec.replica: spec for spec in assignment.members}
    changes: list[Change] = [
        Stop(replica=replica, drain_timeout_s=entry.spec.drain_timeout_s)
        for replica, entry in sorted(running.items())
        if replica not in wanted and not entry.leaving
    ]
    for replica, spec in wanted.items():
        entry = running.get(replica)
        change = Start(spec=spec) if entry is None else _change(spec, entry)
        if change is not None:
            changes.append(change)
    return tuple(changes)


def needs_new_process(old: MemberSpec, new: MemberSpec) -> bool:
    """True if an engine started for `old` cannot serve as `new`."""
    return _identity(old) != _identity(new)


def _identity(spec: MemberSpec) -> tuple[object, ...]:
    return (
        spec.uid,
        spec.model,
        spec.served_names,
        dict(spec.configuration),
        spec.engine,
        spec.role,
        spec.rank,
        spec.member_count,
        spec.claims,
    )


def _change(spec: MemberSpec, entry: Running) -> Change | None:
    if entry.leaving:
        return None                # it goes; once it is gone the next round starts it anew
    if needs_new_process(entry.spec, spec):
        return Replace(replica=spec.replica, drain_timeout_s=entry.spec.drain_timeout_s)
    if spec.desired is Desired.DRAIN:
        return None if entry.stopping else Drain(spec=spec)
    if entry.stopping:
        return Resume(spec=spec)
    if spec.restart_nonce > entry.spec.restart_nonce:
        return Restart(spec=spec)
    return Update(spec=spec) if spec != entry.spec else None
