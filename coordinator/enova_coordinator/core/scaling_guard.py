"""When a policy's proposal may become an act: bounds, pauses, one action in flight, a cool-down. Pure.

A policy is judged by its proposals alone; these are the coordinator's rules around every policy. What they forbid is
recorded as HOLD, once for as long as it stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from enova_coordinator.core.model import DecisionAction, Deployment, Intent, Replica, ReplicaState
from enova_recommender.scaling.bounds import Bounds, clamp
from enova_recommender.scaling.situation import Wish
from enova_recommender.scaling.types import Action, Proposal


class Guard(StrEnum):
    """Which rule held a proposal back."""

    FIXED = "FIXED"
    PAUSED = "PAUSED"
    IN_FLIGHT = "IN_FLIGHT"
    NO_GPU = "NO_GPU"
    COOLDOWN = "COOLDOWN"
    BOUNDS = "BOUNDS"
    NOT_APPLICABLE = "NOT_APPLICABLE"
    NONSENSE = "NONSENSE"


# What a person can change, or should know; the others pass by themselves and are not recorded.
RECORDED = frozenset({Guard.PAUSED, Guard.NO_GPU, Guard.BOUNDS, Guard.NOT_APPLICABLE, Guard.NONSENSE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruling:
    """What becomes of a proposal: an act, or a HOLD with the rule that held it; None where nothing was proposed."""

    action: DecisionAction
    to_replicas: int
    reason: str
    guard: Guard | None = None
    wanted: int | None = None      # of a HOLD, where another number is another wish
    leave_first: tuple[str, ...] = ()  # replicas that go before their equals, where some are to go


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """When the deployment was last acted on (model time); minus infinity for never."""

    last_act_s: float


_ACTIONS = {
    Action.SCALE_UP: DecisionAction.SCALE_UP,
    Action.SCALE_DOWN: DecisionAction.SCALE_DOWN,
    Action.RECONFIGURE: DecisionAction.RECONFIGURE,
}


def rule(
    proposal: Proposal,
    deployment: Deployment,
    replicas: tuple[Replica, ...],
    *,
    history: History,
    now_s: float,
    cooldown_s: float,
    gpus_per_node: int,
    dead: frozenset[str] = frozenset(),
) -> Ruling | None:
    """The ruling on one proposal; None where the policy wants nothing. Replicas that are `dead` hold nothing up."""
    if proposal.action is Action.KEEP:
        return None
    target = deployment.status.target_replicas
    least, most = deployment.spec.bounds
    bounds = Bounds(min_replicas=least, max_replicas=most)
    guard, why = _guard(proposal, deployment, replicas, history.last_act_s + cooldown_s - now_s, dead)
    tensor_parallel = proposal.configuration.tensor_parallel_size
    if guard is None and not 1 <= tensor_parallel <= gpus_per_node:
        guard = Guard.NOT_APPLICABLE
        why = f"tensor_parallel_size {tensor_parallel} fits no node: the largest has {gpus_per_node} GPUs"
    if guard is not None:
        return _hold(proposal, target, guard, why)
    clamped = clamp(proposal, bounds)
    if clamped.replicas == target and proposal.action is not Action.RECONFIGURE:
        return _hold(proposal, target, Guard.BOUNDS, clamped.reason)
    reason = f"{proposal.reason}; {clamped.reason}" if clamped.reason else proposal.reason
    return Ruling(action=_ACTIONS[proposal.action], to_replicas=clamped.replicas, reason=reason)


def rule_wish(wish: Wish, deployment: Deployment, replicas: tuple[Replica, ...]) -> Ruling | None:
    """The ruling on the wish of a policy that looks ahead; None where it wants nothing.

    Such a policy counts what starts and waits out its own patience, so no act in flight and no cool-down hold it.
    """
    if wish.action is Action.KEEP:
        return None
    target = deployment.status.target_replicas
    wanted = sum(wish.targets.values())
    guard, why = _wish_guard(wish, deployment, replicas, wanted)
    if guard is None and wish.action is not Action.RECONFIGURE and deployment.spec.clamped(wanted) == target:
        least, most = deployment.spec.bounds
        guard, why = Guard.BOUNDS, f"the bounds are {least} and {most}"
    if guard is not None:
        reason = f"{wish.action} to {wanted} replicas was wanted ({wish.reason}); held: {why}"
        number = wanted if guard is not Guard.NONSENSE else None
        return Ruling(action=DecisionAction.HOLD, to_replicas=target, reason=reason, guard=guard, wanted=number)
    to_replicas = target if wish.action is Action.RECONFIGURE else deployment.spec.clamped(wanted)
    clamped = f"; the bounds allow {to_replicas} of {wanted}" if to_replicas != wanted else ""
    return Ruling(
        action=_ACTIONS[wish.action],
        to_replicas=to_replicas,
        reason=f"{wish.reason}{clamped}",
        leave_first=wish.remove_first[: max(0, target - to_replicas)],
    )


def _wish_guard(
    wish: Wish, deployment: Deployment, replicas: tuple[Replica, ...], wanted: int
) -> tuple[Guard | None, str]:
    if any(type(count) is not int or count < 0 for count in wish.targets.values()):
        return Guard.NONSENSE, f"{dict(wish.targets)} are no numbers of replicas"
    if deployment.spec.fixed:
        return Guard.FIXED, "the number of replicas is fixed"
    if deployment.spec.autoscaling_paused:
        return Guard.PAUSED, "autoscaling is paused"
    if wish.action is Action.RECONFIGURE:
        return Guard.NOT_APPLICABLE, "the recommender proposes other settings by itself"
    unplaced = [replica for replica in replicas if replica.intent is Intent.RUN and not replica.members]
    if wanted > deployment.status.target_replicas and unplaced:
        return Guard.NO_GPU, f"{len(unplaced)} replicas wait for GPUs already: {unplaced[0].status.reason}"
    return None, ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """A replica that is to be replaced, and the ruling that says so."""

    replica: str
    ruling: Ruling


def replacements(wish: Wish, deployment: Deployment, replicas: tuple[Replica, ...]) -> tuple[Replacement, ...]:
    """Those of the replicas that the policy wants replaced which may be; one at a time, in a settled deployment."""
    if deployment.spec.autoscaling_paused or not settled(deployment, replicas):
        return ()
    if any(replica.replace_reason for replica in replicas):
        return ()
    target = deployment.status.target_replicas
    return tuple(
        Replacement(
            replica=replica.name,
            ruling=Ruling(
                action=DecisionAction.REPLACE,
                to_replicas=target,
                reason=f"{replica.name.rpartition('/')[2]} is degraded: a new one takes its part, then it goes",
            ),
        )
        for replica in replicas
        if replica.name in wish.replace
    )[:1]


def settled(
    deployment: Deployment, replicas: tuple[Replica, ...], dead: frozenset[str] = frozenset()
) -> bool:
    """Whether every replica that is wanted is ready or dead, and no other is left: nothing is in flight."""
    running = [replica for replica in replicas if replica.intent is Intent.RUN]
    ready = [each for each in running if each.status.state is ReplicaState.READY or each.name in dead]
    return len(running) == len(ready) == deployment.status.target_replicas


def _guard(
    proposal: Proposal,
    deployment: Deployment,
    replicas: tuple[Replica, ...],
    cooldown_left_s: float,
    dead: frozenset[str],
) -> tuple[Guard | None, str]:
    if deployment.spec.fixed:
        return Guard.FIXED, "the number of replicas is fixed"
    if deployment.spec.autoscaling_paused:
        return Guard.PAUSED, "autoscaling is paused"
    unplaced = [replica for replica in replicas if replica.intent is Intent.RUN and not replica.members]
    if proposal.action is Action.SCALE_UP and unplaced:
        return Guard.NO_GPU, f"{len(unplaced)} replicas wait for GPUs already: {unplaced[0].status.reason}"
    if not settled(deployment, replicas, dead):
        return Guard.IN_FLIGHT, "the last change is not complete"
    if cooldown_left_s > 0:
        return Guard.COOLDOWN, f"{cooldown_left_s:.0f} s of the cool-down are left"
    return None, ""


def _hold(proposal: Proposal, target: int, guard: Guard, why: str) -> Ruling:
    return Ruling(
        action=DecisionAction.HOLD,
        to_replicas=target,
        reason=f"{proposal.action} to {proposal.replicas} replicas was wanted ({proposal.reason}); held: {why}",
        guard=guard,
    )
