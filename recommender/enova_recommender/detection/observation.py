"""What the detector is told: the frames of agents, decoded, and where replicas run. Missing figures are NaN.

Nothing else reaches it: no field of a simulator, of an injector or of a label. The frames' values are named tuples,
for some ten thousand are made a second in a large fleet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

TTFT, INTER_TOKEN, QUEUE = "time_to_first_token_seconds", "inter_token_latency_seconds", "request_queue_time_seconds"


class BucketCounts(NamedTuple):
    """One histogram of an engine: cumulative counts by bucket, the last being all, and the sum, since its start."""

    counts: Sequence[float]
    sum: float


class SketchCounts(NamedTuple):
    """One interval's quantile sketch: bucket `offset + i` holds (gamma^(b-1), gamma^b]."""

    relative_accuracy: float
    offset: int
    counts: Sequence[int]
    zero_count: int = 0


class GpuReading(NamedTuple):
    """One GPU at one instant; shares are 0 to 1, `throttle_reasons` is NVML's bit mask."""

    uuid: str
    utilization: float = math.nan
    power_w: float = math.nan
    power_limit_w: float = math.nan
    temperature_c: float = math.nan
    sm_clock_mhz: float = math.nan
    memory_used_bytes: float = math.nan
    memory_total_bytes: float = math.nan
    throttle_reasons: float = math.nan
    age_s: float = 0.0


class ReplicaReading(NamedTuple):
    """One engine as its metrics said it `age_s` before the frame's end; counters since the start of `instance`."""

    replica: str
    instance: str = ""
    state: str = ""              # the agent's view: STARTING, READY, ...
    age_s: float = 0.0
    running: float = math.nan
    waiting: float = math.nan
    held: float = math.nan       # requests that the node's ingress holds open for it
    kv_cache_usage: float = math.nan
    resident_memory_bytes: float = math.nan
    prompt_tokens: float = math.nan
    generation_tokens: float = math.nan
    preemptions: float = math.nan
    iterations: float = math.nan
    prefix_cache_hits: float = math.nan
    finished: Mapping[str, float] = {}
    histograms: Mapping[str, BucketCounts] = {}


class RequestReading(NamedTuple):
    """What one ingress counted of one class of requests on one replica in one interval."""

    deployment: str
    replica: str
    serving_class: str = ""
    arrived: float = 0.0
    finished: float = 0.0
    failed: float = 0.0
    cut: float = 0.0
    refused: float = 0.0
    held: float = 0.0
    ttft_s: SketchCounts | None = None
    tpot_s: SketchCounts | None = None


class FrameReading(NamedTuple):
    """One telemetry interval of one node; times in model seconds, `sequence` counts within `boot`."""

    node: str
    boot: str
    sequence: int
    start_s: float
    end_s: float
    gpus: Sequence[GpuReading] = ()
    replicas: Sequence[ReplicaReading] = ()
    requests: Sequence[RequestReading] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a replica runs and with what settings, as the coordinator decided; NaN where the engine chose itself."""

    replica: str
    deployment: str
    variant: str
    nodes: tuple[str, ...]
    gpus: tuple[str, ...] = ()
    max_num_seqs: float = math.nan
    max_num_batched_tokens: float = math.nan
    max_model_len: float = math.nan
    kv_tokens: float = math.nan          # that its KV cache has room for
    capacity_rps: float = math.nan       # requests a second that it carries while it meets its objectives
    cut_share: float = math.nan          # of answers, that a limit of ours is meant to cut
    ttft_p95_s: float = math.nan         # objectives: that 95 of 100 requests should meet
    tpot_p95_s: float = math.nan
