"""The replicas of one simulated deployment: who is wanted, who starts, who leaves, on whose GPUs.

How many to create and whom to let go is the production rule (`enova_coordinator.core.rollout.next_step`), asked once
a variant. Placement on nodes is not: GPUs of a type are a number here, which is what the production placement comes
to where nodes are equal and replicas fit their nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from enova_coordinator.core.model import Replica, ReplicaState, ReplicaStatus
from enova_coordinator.core.rollout import Crew, next_step
from enova_simulator.cluster.setup import Ill, VariantSetup, pool_of


class Stage(StrEnum):
    """How far a simulated replica is."""

    PENDING = "PENDING"
    STARTING = "STARTING"
    READY = "READY"
    DRAINING = "DRAINING"
    LOST = "LOST"
    GONE = "GONE"


_STATES = {
    Stage.PENDING: ReplicaState.PENDING, Stage.STARTING: ReplicaState.STARTING, Stage.READY: ReplicaState.READY,
    Stage.DRAINING: ReplicaState.DRAINING, Stage.LOST: ReplicaState.LOST, Stage.GONE: ReplicaState.STOPPED,
}  # fmt: skip


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """One simulated replica."""

    name: str
    deployment: int
    variant: VariantSetup
    kind: int                          # of its engine
    number: int                        # of starts in the whole run
    created_s: float
    stage: Stage = Stage.PENDING
    since_s: float = 0.0
    engine: int = -1
    started_s: float = float("nan")    # when GPUs were taken
    ready_s: float = float("nan")      # the first time
    gone_s: float = float("nan")
    is_old: bool = False               # to leave once another is READY
    ill: Ill | None = None
    ill_since_s: float = float("inf")
    slowness: float = 1.0              # of its steps against the variant's
    starts: int = 0                    # of its process; what was scheduled for an older one is void

    def move(self, stage: Stage, at_s: float) -> None:
        """The stage changes."""
        self.stage, self.since_s = stage, at_s

    @property
    def present(self) -> bool:
        """Whether it is meant to serve; a lost one is, until it is written off."""
        return self.stage in {Stage.PENDING, Stage.STARTING, Stage.READY, Stage.LOST}


@dataclass(slots=True)
class Pools:
    """Free GPUs by pool."""

    free: dict[str, int]

    def take(self, variant: VariantSetup) -> bool:
        """Take a replica's GPUs; False if there are too few."""
        name = pool_of(variant)
        if self.free.get(name, 0) < variant.gpus:
            return False
        self.free[name] -= variant.gpus
        return True

    def give(self, variant: VariantSetup) -> None:
        """Give a replica's GPUs back."""
        self.free[pool_of(variant)] += variant.gpus

    def room(self, variant: VariantSetup) -> int:
        """Replicas more that would fit."""
        return self.free.get(pool_of(variant), 0) // variant.gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What leads towards a variant's target."""

    create: int
    release: tuple[Member, ...]


@dataclass(slots=True)
class Roll:
    """The replicas of a deployment, oldest first; those that are gone are kept apart."""

    members: list[Member] = field(default_factory=list)
    gone: list[Member] = field(default_factory=list)

    def of(self, variant: VariantSetup) -> list[Member]:
        """The members of a variant that are meant to serve."""
        return [member for member in self.members if member.variant is variant and member.present]

    def ready(self) -> list[Member]:
        """Those that serve."""
        return [member for member in self.members if member.stage is Stage.READY]

    def leave(self, member: Member, at_s: float) -> None:
        """A member's process has ended, and its GPUs are free."""
        member.move(Stage.GONE, at_s)
        member.gone_s = at_s
        self.members.remove(member)
        self.gone.append(member)

    def change(self, variant: VariantSetup, target: int, *, surge: int, first: Iterable[str] = ()) -> Change:
        """The production rule's step towards the target; of equals those named `first` leave first."""
        present = self.of(variant)
        by_name = {member.name: member for member in present}
        step = next_step(
            Crew(
                target=target,
                first=tuple(first),
                new=tuple(_as_replica(member) for member in present if not member.is_old),
                old=tuple(_as_replica(member) for member in present if member.is_old),
            ),
            surge=surge,
        )
        return Change(create=step.create, release=tuple(by_name[replica.name] for replica in step.release))


def _as_replica(member: Member) -> Replica:
    ready_s = member.ready_s if member.ready_s == member.ready_s else 0.0
    status = ReplicaStatus(state=_STATES[member.stage], state_time_s=member.since_s, ready_time_s=ready_s)
    return Replica(
        name=member.name, uid=member.name, deployment=str(member.deployment), variant=member.variant.name,
        create_time_s=member.created_s, status=status,
    )  # fmt: skip
