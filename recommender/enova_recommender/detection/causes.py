"""What can be the matter with a replica: causes, the verdict and act that each stands for, and how sure one must be."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from enova_recommender.types import VerdictKind


class Cause(IntEnum):
    """Why a verdict is not NORMAL; the first that holds is the one that is told."""

    MISSING = 0          # no frame tells of it
    CRASH_LOOP = 1       # its engine fails or restarts again and again
    HUNG = 2             # alive, without progress
    LEAK = 3             # more KV memory held than its requests can hold
    KV_THRASH = 4        # preemption: requests are computed twice
    THROTTLED = 5        # slow by heat or power brake
    SLOW = 6             # slow for its load, or beside its siblings
    FAILING = 7          # requests fail
    BATCH_SLACK = 8      # a queue, though more at once would cost little, or though there is room
    OVERLOAD = 9         # a queue or missed objectives that its load explains
    CUT = 10             # a limit on answers cuts more than it is meant to
    IDLE = 11            # nothing to do
    SURPLUS = 12         # one replica fewer would hold


class SuggestedAction(StrEnum):
    """What a verdict asks for."""

    NONE = "NONE"
    SCALE_UP = "SCALE_UP"
    SCALE_DOWN = "SCALE_DOWN"
    EJECT = "EJECT"              # out of routing, until it heals or is restarted
    RESTART = "RESTART"
    REPLACE = "REPLACE"
    RECONFIGURE = "RECONFIGURE"
    INSPECT = "INSPECT"          # by a person: nothing may be done on what is not known


DESTRUCTIVE = frozenset({SuggestedAction.EJECT, SuggestedAction.RESTART, SuggestedAction.REPLACE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a cause means. It holds after `enter` votes of evidence, until `leave` steps of the contrary in a row."""

    kind: VerdictKind
    action: SuggestedAction
    enter: int
    leave: int


RULES: dict[Cause, Rule] = {
    Cause.MISSING: Rule(kind=VerdictKind.UNKNOWN, action=SuggestedAction.INSPECT, enter=3, leave=1),
    Cause.CRASH_LOOP: Rule(kind=VerdictKind.DEGRADED, action=SuggestedAction.REPLACE, enter=2, leave=2),
    Cause.HUNG: Rule(kind=VerdictKind.DEGRADED, action=SuggestedAction.RESTART, enter=1, leave=1),
    Cause.LEAK: Rule(kind=VerdictKind.DEGRADED, action=SuggestedAction.RESTART, enter=3, leave=6),
    Cause.KV_THRASH: Rule(kind=VerdictKind.MISCONFIGURED, action=SuggestedAction.RECONFIGURE, enter=2, leave=2),
    Cause.THROTTLED: Rule(kind=VerdictKind.DEGRADED, action=SuggestedAction.REPLACE, enter=3, leave=4),
    Cause.SLOW: Rule(kind=VerdictKind.DEGRADED, action=SuggestedAction.REPLACE, enter=2, leave=3),
    Cause.FAILING: Rule(kind=VerdictKind.DEGRADED, action=SuggestedAction.REPLACE, enter=3, leave=4),
    Cause.BATCH_SLACK: Rule(kind=VerdictKind.MISCONFIGURED, action=SuggestedAction.RECONFIGURE, enter=3, leave=4),
    Cause.OVERLOAD: Rule(kind=VerdictKind.OVERLOADED, action=SuggestedAction.SCALE_UP, enter=6, leave=1),
    Cause.CUT: Rule(kind=VerdictKind.MISCONFIGURED, action=SuggestedAction.RECONFIGURE, enter=12, leave=12),
    Cause.IDLE: Rule(kind=VerdictKind.UNDERUSED, action=SuggestedAction.SCALE_DOWN, enter=6, leave=1),
    Cause.SURPLUS: Rule(kind=VerdictKind.UNDERUSED, action=SuggestedAction.SCALE_DOWN, enter=60, leave=1),
}
