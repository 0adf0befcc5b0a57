"""What the services need of the rest, and who may answer: writes and what lives in memory are the leader's alone."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from enova_common.errors import Conflict
from enova_common.identity import Role
from enova_common.rpc import peer_identity
from enova_common.rpc.peer import CallContext
from enova_coordinator.advisor import Advisor
from enova_coordinator.agents import Agents
from enova_coordinator.calibration_loop import CalibrationLoop
from enova_coordinator.core.lengths import LengthState
from enova_coordinator.core.model import Decision, Event, RequestRecord, Snapshot
from enova_coordinator.core.routes import RouteTable
from enova_coordinator.core.verdicts import Verdict
from enova_coordinator.detection_loop import DetectionLoop
from enova_coordinator.frame_inbox import FrameInbox
from enova_coordinator.known_models import KnownModels
from enova_coordinator.recorder import Recorder
from enova_coordinator.rollups import Rollups
from enova_coordinator.store import Compare
from enova_coordinator.telemetry import Telemetry


class Fence(Protocol):
    """One term of this coordinator's leadership."""

    @property
    def term(self) -> int:
        """The fencing number, borne by every message to an agent."""
        ...

    def guard(self) -> Compare:
        """The compare that every write includes."""
        ...

    def is_leading(self) -> bool:
        """Whether it may still act."""
        ...

    def end(self, reason: str) -> None:
        """End the term here and now."""
        ...


class Control(Protocol):
    """The leader's control loop."""

    snapshot: Snapshot
    """The state that the last round looked at."""
    table: RouteTable
    """The routes as they were last told to the agents."""

    def wake(self) -> None:
        """Something changed: look again soon."""
        ...

    async def set_target(
        self, deployment: str, replicas: int, decision: Decision, *, request: RequestRecord | None = None
    ) -> None:
        """Make this the deployment's target, record why and which request asked for it, in one transaction."""
        ...

    async def record_decision(self, decision: Decision) -> Decision:
        """Record a decision that changes nothing."""
        ...


class Events(Protocol):
    """What happened, as long as it is remembered."""

    def list(self, obj: str = "") -> Sequence[Event]:
        """Newest first; of one object and what belongs to it, or of all."""
        ...

    @property
    def revision(self) -> int:
        """Of the newest event: to watch on from."""
        ...

    def watch(self, obj: str = "", *, after: int = 0) -> AsyncIterator[Sequence[Event]]:
        """What happened after a revision, or from now on, and what happens."""
        ...


@dataclass(slots=True)
class Leading:
    """Everything that exists while this coordinator leads."""

    fence: Fence
    control: Control
    agents: Agents
    telemetry: Telemetry
    rollups: Rollups
    recorder: Recorder
    events: Events
    advisor: Advisor
    calibration: CalibrationLoop | None = None
    detection: DetectionLoop | None = None
    inbox: FrameInbox | None = None
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    lengths: Mapping[str, LengthState] = field(default_factory=dict)
    models: KnownModels = field(default_factory=lambda: KnownModels(now_s=time.monotonic))


class NotLeading(Conflict):
    """Another coordinator leads, or none at the moment."""

    reason = "NOT_LEADER"


@dataclass(slots=True)
class Chair:
    """Who leads: this coordinator, where `current` is set, else who answers at `leader_address()` ("": unknown)."""

    leader_address: Callable[[], str]
    current: Leading | None = None

    def leading(self) -> Leading:
        """What exists while this coordinator leads; raises NotLeading with the leader's address otherwise."""
        current = self.current
        if current is not None and current.fence.is_leading():
            return current
        raise self.refusal()

    def refusal(self) -> NotLeading:
        """Why this coordinator does not answer, and who would."""
        if address := self.leader_address():
            return NotLeading(
                f"this coordinator does not lead; {address} does",
                remedy="ask there",
                metadata={"leader_address": address},
            )
        return NotLeading("no coordinator leads at the moment", remedy="try again in a few seconds")


def actor(context: CallContext) -> str:
    """Who calls, as decisions and events name them. Raises Denied unless it is a user."""
    peer = peer_identity(context)
    peer.require(Role.USER, Role.COORDINATOR)
    return f"user/{peer.identity.name}" if peer.identity is not None else "user/local"
