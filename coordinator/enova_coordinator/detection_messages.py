"""What the coordinator and its detection child say to each other: frames as bytes in, findings with their figures out.

Answers are small whatever happens in the fleet: verdicts and changes over a bound are left out and counted, since the
next answer tells of what still stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.episodes import EpisodeChange
from enova_recommender.detection.folding import FoldSettings
from enova_recommender.detection.lessons import Lesson
from enova_recommender.detection.observation import Placement
from enova_recommender.detection.progress import ProgressLimits
from enova_recommender.detection.verdicts import Verdict
from enova_recommender.performance.correction import Correction
from enova_recommender.performance.engine_model import EngineModel


class ReceivedFrame(NamedTuple):
    """A frame as it came from a node, and the model time at which it did."""

    node: str
    received_s: float
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionSetup:
    """What a watch begins with. `scale`: of the model clock; `state_file`: what an earlier one knew, and this one will.

    The child itself reads and writes the file: for a large fleet it is more than an answer may be.
    """

    fold: FoldSettings
    limits: ProgressLimits
    scale: float
    state_file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What says how long steps of a variant should take."""

    model: EngineModel
    correction: Correction | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetFacts:
    """What the coordinator decided: where replicas run, and what is known of their engines, by variant."""

    placements: tuple[Placement, ...]
    engines: Mapping[str, EngineFacts]


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionRequest:
    """One step of work for the watch of a session.

    `setup` makes a new watch; without it the child goes on with the one it has. `fleet` is given when it changed.
    `ejected`: replicas that agents hold out of routing because they make no progress. `restarts`: how often agents
    started engines again, of replicas of which that changed; with `fleet`, of all. `lessons`: all that people said of
    episodes, when that changed.
    """

    session: str
    now_s: float
    frames: tuple[ReceivedFrame, ...] = ()
    setup: DetectionSetup | None = None
    fleet: FleetFacts | None = None
    ejected: frozenset[str] = frozenset()
    restarts: Mapping[str, int] = field(default_factory=dict)
    lessons: tuple[Lesson, ...] | None = None
    save: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSeries:
    """The newest steps of one figure of one replica."""

    replica: str
    feature: str
    start_s: float
    step_s: float
    values: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToldChange:
    """A change of an episode, with what was measured of its worst member."""

    change: EpisodeChange
    member_count: int
    series: tuple[MeasuredSeries, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionAnswer:
    """What a step of work came to. `known` False: the child has no watch of this session; ask again with all of it.

    `verdicts`: those that are not NORMAL after the last step that was closed; None if none was.
    """

    known: bool = True
    steps: int = 0
    verdicts: tuple[Verdict, ...] | None = None
    changes: tuple[ToldChange, ...] = ()
    omitted: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    took_s: float = 0.0
    saved: int = 0                 # times that the state was written
    trouble: str = ""              # why it was not, or not read
