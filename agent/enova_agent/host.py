"""What the replicas of one node share, and the small values that they tell others."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enova_agent.core.machine import Limits
from enova_agent.core.progress import HangLimits
from enova_agent.core.telemetry import CanaryCounts, EngineMetrics
from enova_agent.engine import EngineProbe
from enova_agent.engine_settings import EngineSettings
from enova_agent.process import Processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something that people want to know happened to a replica (empty: to the agent); `kind` as the API's events."""

    replica: str
    kind: str
    message: str
    warning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """The newest /metrics of one engine: the page as it came, its figures, when (monotonic), or why there is none."""

    time_s: float = 0.0
    page: bytes = b""
    metrics: EngineMetrics | None = None
    error: str = "not scraped yet"
    canaries_before: CanaryCounts = field(default_factory=CanaryCounts)  # when the page was asked for
    canaries: CanaryCounts = field(default_factory=CanaryCounts)  # when it had come


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The node as its replicas need it."""

    settings: EngineSettings
    limits: Limits
    hang_limits: HangLimits
    processes: Processes
    probe: EngineProbe
    log_folder: Path
    evidence_folder: Path
    token_prefix: str
    environment: Mapping[str, str]
    monotonic: Callable[[], float]
    wall: Callable[[], float]
    draw: Callable[[], float]
    notice: Callable[[Notice], None]
    changed: Callable[[], None]
    journal: Callable[[], Coroutine[Any, Any, None]]
    taken_ports: Callable[[], set[int]]
    gpu_types: Callable[[], Mapping[str, str]]
    gpu_utilization: Callable[[tuple[str, ...]], float | None]
