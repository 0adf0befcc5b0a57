"""What a detector says of a deployment or replica, as it is kept and shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from enova_coordinator.core.model import Intent, Replica, ReplicaState
from enova_recommender.scaling.situation import Wish
from enova_recommender.scaling.types import Evidence, Proposal, VerdictKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is the matter with an object, since when (wall clock), and on what figures that rests, heaviest first.

    `score` grows with its gravity from 0 to 1, so does `confidence`; both are 0 where the detector gives none.
    """

    object: str
    kind: VerdictKind
    since_s: float
    reason: str
    detector: str
    evidence: tuple[Evidence, ...] = ()
    suggested_action: str = ""
    score: float = 0.0
    confidence: float = 0.0
    cause: str = ""
    weights: tuple[float, ...] = ()  # of the evidence: how far each is beyond its threshold, as a ratio


def of_proposal(deployment: str, policy: str, proposal: Proposal, *, now_s: float) -> Verdict:
    """The verdict that a policy's proposal rests on."""
    return Verdict(
        object=deployment,
        kind=proposal.verdict,
        since_s=now_s,
        reason=proposal.reason,
        detector=policy,
        evidence=proposal.evidence,
        suggested_action=proposal.action.value,
    )


def of_wish(deployment: str, policy: str, wish: Wish, *, now_s: float) -> Verdict:
    """The verdict that a policy's wish rests on; the band of its forecast is among the evidence."""
    forecast, carried = wish.forecast, wish.evidence[0].threshold if wish.evidence else 0.0
    band = () if forecast is None else tuple(
        Evidence(feature=f"forecast_{name}_requests_per_s", value=value, threshold=carried)
        for name, value in (("low", forecast.low), ("p50", forecast.p50), ("high", forecast.high))
    )
    wait = (Evidence(feature="cooldown_s", value=wish.cooldown_s, threshold=0.0),) if wish.cooldown_s > 0 else ()
    return Verdict(
        object=deployment,
        kind=wish.verdict,
        since_s=now_s,
        reason=wish.reason,
        detector=policy,
        evidence=(*wish.evidence, *band, *wait),
        suggested_action=wish.action.value,
    )


def unknown(deployment: str, policy: str, reason: str, *, now_s: float) -> Verdict:
    """The verdict where there is nothing to go by."""
    return Verdict(object=deployment, kind=VerdictKind.UNKNOWN, since_s=now_s, reason=reason, detector=policy)


def updated(before: Mapping[str, Verdict], verdict: Verdict) -> Verdict:
    """The verdict with the time since which its kind has stood."""
    known = before.get(verdict.object)
    if known is None or known.kind is not verdict.kind:
        return verdict
    return replace(verdict, since_s=known.since_s)


def of_replica(replica: Replica) -> Verdict | None:
    """What the agent's supervision found of a replica that should serve: hung or failed is DEGRADED."""
    status = replica.status
    if replica.intent is not Intent.RUN:
        return None
    if status.state is ReplicaState.READY and not status.in_routing:
        reason = status.reason or "its engine makes no progress: it is out of routing"
        detector, action = "hang", "RESTART"
    elif status.state is ReplicaState.FAILED:
        reason, detector, action = status.reason or "its engine failed", "supervision", "REPLACE"
    else:
        return None
    return Verdict(
        object=replica.name,
        kind=VerdictKind.DEGRADED,
        since_s=status.state_time_s,
        reason=reason,
        detector=detector,
        suggested_action=action,
    )
