"""An episode as it is stored: verdicts that belong together, what they rested on, and what a person said of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from enova_recommender.types import VerdictKind

MEMBERS_KEPT = 64              # replicas that an episode names; it counts all


class EpisodeState(StrEnum):
    """Whether it is over."""

    OPEN = "OPEN"
    CLOSED = "CLOSED"


class EpisodeLabel(StrEnum):
    """What a person says of it."""

    NONE = ""
    TRUE = "TRUE"
    FALSE = "FALSE"            # a false alarm


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One figure that a verdict rests on; `contribution` says how far it is beyond the threshold, as a ratio."""

    feature: str
    value: float
    threshold: float
    contribution: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceSeries:
    """What was measured of one replica around an episode; model time, NaN where nothing was measured."""

    object: str
    feature: str
    start_s: float
    step_s: float
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """What befell an object. Times are of the wall clock. The leader writes all but the label, which users write."""

    name: str                      # episodes/{when it opened, in milliseconds}-{digest of its root}
    object: str                    # its root: a replica, a deployment, a node, or "fleet"
    verdict: VerdictKind
    causes: tuple[str, ...] = ()   # those that stand, the most frequent first, then those that did
    members: tuple[str, ...] = ()  # replicas, at most MEMBERS_KEPT
    member_count: int = 0
    state: EpisodeState = EpisodeState.OPEN
    since_s: float = 0.0           # the first evidence
    since_model_s: float = 0.0     # the same in model time
    open_time_s: float = 0.0
    update_time_s: float = 0.0
    close_time_s: float = 0.0
    score: float = 0.0
    confidence: float = 0.0
    suggested_action: str = ""
    findings: tuple[Finding, ...] = ()
    series: tuple[EvidenceSeries, ...] = ()
    label: EpisodeLabel = EpisodeLabel.NONE
    label_cause: str = ""          # what it was, where the causes above are wrong
    label_actor: str = ""
    label_time_s: float = 0.0

    @property
    def etag(self) -> str:
        """Changes with what users write, so that the leader's writes refuse no user's."""
        return f"{self.label_time_s:.6f}"

    @property
    def doubt(self) -> tuple[float, float]:
        """How much a label would teach: the least confident first, then those whose score is nearest to a half."""
        return self.confidence, abs(self.score - 0.5)
