"""The values of telemetry: what a GPU, an engine and a node measured, before they become a message.

Missing is None, never zero. Counters are cumulative since the engine's start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from enova_agent.core.local import LengthSample, Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverFacts:
    """What a driver tells of a GPU beyond its memory; from it one that no catalogue knows is described."""

    name: str                                 # the driver's
    sm_clock_mhz: float | None = None         # the highest
    memory_clock_mhz: float | None = None     # the highest
    bus_width_bits: int | None = None
    cores: int | None = None
    compute_capability: float | None = None
    power_limit_w: float | None = None
    link_bytes_per_s: float | None = None     # of all NVLinks that are up, one direction
    pcie_generation: int | None = None
    pcie_lanes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """What a GPU is. `type` is the driver's name where nobody knows a catalogue name for it."""

    uuid: str
    index: int
    type: str
    memory_bytes: int
    pci_bus_id: str = ""
    simulated: bool = False
    free_memory_bytes: int = 0     # what nobody holds, processes that are not ours included
    driver: DriverFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """One GPU at one instant."""

    uuid: str
    utilization: float | None = None          # share of time with a kernel running, 0..1
    memory_utilization: float | None = None   # share of time the memory was read or written, 0..1
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    throttle_reasons: int | None = None       # NVML's bit mask
    ecc_errors_total: int | None = None
    age_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Cumulative counts by the buckets that vLLM's table names for `metric`; the last is +Inf."""

    metric: str
    counts: tuple[int, ...]
    sum: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMetrics:
    """What one engine's /metrics said, all its data-parallel cores together."""

    running: float | None = None
    waiting: float | None = None
    kv_cache_usage: float | None = None       # 0..1
    prompt_tokens_total: float | None = None
    generation_tokens_total: float | None = None
    preemptions_total: float | None = None
    iterations_total: float | None = None
    prefix_cache_queries_total: float | None = None
    prefix_cache_hits_total: float | None = None
    kv_cache_tokens: float | None = None      # that the KV cache has room for
    finished_total: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    histograms: tuple[Histogram, ...] = ()
    error: str = ""                           # the first value that could not be used, and why

    @property
    def finished(self) -> float:
        """Requests that ended, whatever the reason."""
        return sum(self.finished_total.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryCounts:
    """Requests that the agent itself sent to one engine since it started: readiness tokens and canaries."""

    started: int = 0               # answered or still open; one that was broken off is taken back
    finished: int = 0              # of those, answered
    prompt_tokens: int = 0
    output_tokens: int = 0
    lasted_s: float = 0.0          # from asking to the answer, of all that were answered


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineScrape:
    """The newest look at one engine, as its supervision took it, canaries included."""

    replica: str
    instance: str                             # changes when the engine or the agent restarts
    taken_s: float                            # monotonic time of the scrape
    adopted: bool = False                     # the engine is older than this agent
    metrics: EngineMetrics | None = None
    error: str = ""                           # why there are no metrics
    resident_memory_bytes: float | None = None
    canaries_before: CanaryCounts = field(default_factory=CanaryCounts)  # when the page was asked for
    canaries: CanaryCounts = field(default_factory=CanaryCounts)  # when it had come


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSample:
    """One replica in one frame; `metrics` is None where there is no usable scrape."""

    replica: str
    state: str
    metrics: EngineMetrics | None = None
    age_s: float = 0.0                        # of the scrape when the frame was made
    resident_memory_bytes: float | None = None
    held: float | None = None
    scrape_error: str = ""
    instance: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One telemetry interval of one node; times in model seconds (Unix)."""

    node: str
    sequence: int
    boot: str
    start_s: float
    end_s: float
    gpus: tuple[GpuSample, ...] = ()
    replicas: tuple[ReplicaSample, ...] = ()
    requests: tuple[Summary, ...] = ()
    lengths: tuple[LengthSample, ...] = ()
    dropped_samples: int = 0
