"""Keeps a proposal within the deployment's bounds, and says so when a bound had to be applied."""

from __future__ import annotations

from dataclasses import dataclass

from enova_recommender.scaling.types import Proposal

REPLICAS_MIN = 1  # min 0 is accepted; until requests are held at the ingress for it, one replica stays


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The fewest and the most replicas that the deployment may have."""

    min_replicas: int
    max_replicas: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Clamped:
    """The number of replicas after the bounds; `reason` is empty where they changed nothing."""

    replicas: int
    reason: str = ""


def clamp(proposal: Proposal, bounds: Bounds) -> Clamped:
    """The proposed replicas within `bounds`; one is held where the minimum is 0."""
    low = max(bounds.min_replicas, REPLICAS_MIN)
    high = max(bounds.max_replicas, low)
    if proposal.replicas > high:
        return Clamped(replicas=high, reason=f"max {high} allows no more: {proposal.replicas} replicas were wanted")
    if proposal.replicas < low:
        held = " (min 0 holds 1 under this policy)" if bounds.min_replicas < REPLICAS_MIN else ""
        return Clamped(replicas=low, reason=f"min {low}{held} allows no less: {proposal.replicas} were wanted")
    return Clamped(replicas=proposal.replicas)
