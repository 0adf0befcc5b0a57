"""The values that a node says of itself to its coordinator."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from enova_agent.core.model import ReplicaState, ReplicaView
from enova_agent.core.telemetry import GpuFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """Who this node is; said once, when the stream opens."""

    name: str
    uid: str
    cluster: str
    labels: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[GpuFacts, ...] = ()
    boot_id: str = ""
    agent_version: str = ""
    engine: str = ""
    engine_version: str = ""
    openai_address: str = ""
    hop_address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """What is, on this node."""

    assignment_revision: int = 0
    routes_revision: int = 0
    ingress_connected: bool = False
    views: tuple[ReplicaView, ...] = ()
    gpus: tuple[GpuFacts, ...] = ()

    def differs(self, other: NodeStatus) -> bool:
        """Whether a coordinator that knows `other` must be told.

        Requests come and go all the time and frames carry their number; only where a replica drains does the
        number in flight say how far it is.
        """
        return self._steady() != other._steady()

    def _steady(self) -> NodeStatus:
        return dataclasses.replace(
            self,
            views=tuple(
                view if view.state is ReplicaState.DRAINING else dataclasses.replace(view, in_flight=0)
                for view in self.views
            ),
        )


def next_beat_s(now_s: float, interval_s: float) -> float:
    """The next multiple of the interval: all that has the same interval is then done in one waking of the program."""
    return (math.floor(now_s / interval_s) + 1) * interval_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a host knows of a model directory, or of a catalogue name where engines are simulated."""

    config_json: str
    weight_bytes: int
    digest: str
    vocabulary_size: int
