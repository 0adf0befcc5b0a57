"""What can happen to a replica (events, in the past tense) and what its machine wants done (actions, imperative)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from enova_agent.core.failure import Cause


class Phase(StrEnum):
    """The phases of a start, in their order."""

    FETCH = "fetch"
    LOAD = "load"
    COMPILE = "compile"
    WARM = "warm"


# --- events ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passed. `blocked_by` names what forbids a start now (a GPU that is still held)."""

    now_s: float
    blocked_by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawned:
    """The engine's first process exists."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SpawnFailed:
    """No process could be made."""

    now_s: float
    cause: Cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """A process that an earlier agent started was found alive and is ours."""

    now_s: float
    ready: bool
    stopping: bool = False
    drain_timeout_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseSeen:
    """The engine's log names a phase of the start."""

    now_s: float
    phase: Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressSeen:
    """The starting engine does something: it logs, reads, computes or grows."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthOk:
    """/health answered 200 from a process of this engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenGenerated:
    """The engine generated a token: it serves."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HangSuspected:
    """No progress although there is work."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HangHealed:
    """Progress again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HangConfirmed:
    """No progress for too long."""

    now_s: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceCollected:
    """What can be known of the hung engine is on disk."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Exited:
    """The engine's first process ended."""

    now_s: float
    cause: Cause


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWanted:
    """It is not wanted any more, or shall drain."""

    now_s: float
    drain_timeout_s: float
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunWanted:
    """It is wanted after all."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartWanted:
    """A person asked for a restart."""

    now_s: float
    drain_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainDone:
    """Nothing runs in the engine and nothing is held for it."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KillDone:
    """No process of the engine is left. `draw` is uniform in [0, 1)."""

    now_s: float
    draw: float


Event = (
    Tick
    | Spawned
    | SpawnFailed
    | Adopted
    | PhaseSeen
    | ProgressSeen
    | HealthOk
    | TokenGenerated
    | HangSuspected
    | HangHealed
    | HangConfirmed
    | EvidenceCollected
    | Exited
    | StopWanted
    | RunWanted
    | RestartWanted
    | DrainDone
    | KillDone
)


# --- actions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Spawn:
    """Start the engine; answer Spawned or SpawnFailed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeHealth:
    """Ask /health; answer HealthOk if it is this engine that says 200."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateToken:
    """Let it generate one token; answer TokenGenerated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnounceRouting:
    """Tell ingress and coordinator whether requests may go to it."""

    on: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckDrained:
    """See whether anything runs or is held; answer DrainDone if not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SendTerm:
    """SIGTERM to the engine's first process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KillAll:
    """SIGKILL to every process of the engine; answer KillDone when none is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectEvidence:
    """Keep what can be known of a hung engine; answer EvidenceCollected."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveSharedMemory:
    """Remove the shared memory segments that the dead left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Something that people want to know happened."""

    kind: str                      # CamelCase, as the API's events have it
    message: str
    warning: bool = False


Action = (
    Spawn
    | ProbeHealth
    | GenerateToken
    | AnnounceRouting
    | CheckDrained
    | SendTerm
    | KillAll
    | CollectEvidence
    | RemoveSharedMemory
    | Report
)
