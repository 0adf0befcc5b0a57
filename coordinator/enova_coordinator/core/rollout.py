"""How a deployment gets from the replicas that it has to those that it should have, one careful step at a time.

Theory of operation. Replicas that run are *new* (of the current variant, on nodes that may keep them) or *old*
(of a retired variant, or on a node that is being drained). One rule serves rollout, node drain and scaling: an old
replica that serves leaves only against a new one that is READY and routed by every ingress; at most `surge` more
than the target run meanwhile.
Old replicas that never served leave at once. A surplus of new ones leaves by worth: PENDING, FAILED, LOST,
STARTING, and only then READY ones; among equals those that a policy named, then the newest.
"""

from __future__ import annotations

from dataclasses import dataclass

from enova_coordinator.core.model import Replica, ReplicaState


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """A deployment's replicas that shall run, oldest first, without those that are written off."""

    target: int
    unrouted: frozenset[str] = frozenset()  # new ones that some ingress does not know yet
    first: tuple[str, ...] = ()             # who leaves before its equals, in this order
    new: tuple[Replica, ...] = ()
    old: tuple[Replica, ...] = ()

    @property
    def new_ready(self) -> int:
        """New replicas that serve."""
        return sum(is_ready(replica) for replica in self.new)

    @property
    def new_routed(self) -> int:
        """New replicas that serve and that requests reach from everywhere."""
        return sum(is_ready(replica) and replica.name not in self.unrouted for replica in self.new)

    @property
    def ready(self) -> int:
        """All replicas that serve."""
        return self.new_ready + sum(is_ready(replica) for replica in self.old)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What to do now: how many new replicas to create, and which to let go."""

    create: int = 0
    release: tuple[Replica, ...] = ()


# A surplus leaves in this order; within a state those that are named first, then the newest.
_WORTH = (
    ReplicaState.PENDING,
    ReplicaState.STOPPED,
    ReplicaState.STOPPING,
    ReplicaState.DRAINING,
    ReplicaState.FAILED,
    ReplicaState.LOST,
    ReplicaState.STARTING,
    ReplicaState.SLEEPING,
    ReplicaState.READY,
)


def is_ready(replica: Replica) -> bool:
    """Whether the replica serves."""
    return replica.status.state is ReplicaState.READY


def next_step(crew: Crew, *, surge: int) -> Step:
    """The step that may be taken now; taking it and asking again ends at `target` new replicas and no old ones."""
    kept = tuple(replica for replica in crew.old if _has_served(replica))
    never_served = tuple(replica for replica in crew.old if not _has_served(replica))
    keep = max(0, crew.target - crew.new_routed)
    leaving = _cheapest(kept, len(kept) - keep, crew.first)
    wanted = min(crew.target, max(0, crew.target + surge - min(len(kept), keep)))
    surplus = _cheapest(crew.new, len(crew.new) - crew.target, crew.first)
    return Step(create=max(0, wanted - len(crew.new)), release=never_served + leaving + surplus)


def sacrifice(crew: Crew, *, others_leaving: bool) -> tuple[Replica, ...]:
    """Old replicas of which one may go before its successor is READY, because there is no room for both.

    Only while all that should serve do serve, nothing else is on its way out, and somebody else stays to serve.
    """
    if others_leaving or crew.ready < max(crew.target, 2):
        return ()
    return tuple(replica for replica in reversed(crew.old) if is_ready(replica))


def _has_served(replica: Replica) -> bool:
    status = replica.status
    return is_ready(replica) or (status.ready_time_s > 0 and not status.gave_up)


def _cheapest(replicas: tuple[Replica, ...], count: int, first: tuple[str, ...]) -> tuple[Replica, ...]:
    newest_first = tuple(reversed(replicas))
    named = {name: place for place, name in enumerate(first)}
    ordered = sorted(
        newest_first,
        key=lambda replica: (_WORTH.index(replica.status.state), named.get(replica.name, len(named))),
    )
    return tuple(ordered[: max(0, count)])
