"""What a scaling policy is told, and what it answers.

A policy is a pure function of one `Observation`: the series that the coordinator has stored, the configuration that
runs, facts of model and GPU. It answers with a `Proposal`. Bounds, pauses and actions in flight are not its business:
`bounds.clamp` and the coordinator's rules see to them, so that a policy can be judged by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from enova_recommender.types import VerdictKind as VerdictKind  # noqa: PLC0414  # part of what policies speak in


class Feature(StrEnum):
    """The six series a replica that ENOVA 0.0.7 looks at, under its names. KV usage is in per cent."""

    ACTIVE = "active_requests"
    RUNNING = "running_requests"
    PENDING = "pending_requests"
    NEW = "server_new_requests"
    SUCCESS = "server_success_requests"
    KV_USAGE = "gpu_kv_cache_usage"


class Action(StrEnum):
    """What a policy wants done. KEEP is no act, and is not recorded."""

    KEEP = "KEEP"
    SCALE_UP = "SCALE_UP"
    SCALE_DOWN = "SCALE_DOWN"
    RECONFIGURE = "RECONFIGURE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Values on a grid; value i is stamped `start_s + i * step_s`, the end of the interval that it sums up.

    NaN where nothing was measured.
    """

    start_s: float
    step_s: float
    values: tuple[float, ...]

    def points(self) -> tuple[tuple[float, float], ...]:
        """The measured values with their stamps."""
        return tuple(
            (self.start_s + index * self.step_s, value)
            for index, value in enumerate(self.values)
            if not math.isnan(value)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSeries:
    """The series of one replica; a feature that is absent was never measured."""

    replica: str
    series: dict[Feature, Series]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """The part of a configuration that the policies reason about."""

    tensor_parallel_size: int
    gpu_memory_utilization: float
    max_num_seqs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a policy may know of the model. `size_billion` and `framework` are how 0.0.7 looks it up."""

    framework: str
    size_billion: float
    parameters: int
    kv_elements_per_token: int
    attention_heads: int
    context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """The GPUs that the deployment may use: how many of one type, and the memory of each."""

    count: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Everything that a policy may look at, as it was stored at `now_s` (model time)."""

    now_s: float
    replicas: int
    series: tuple[ReplicaSeries, ...]
    configuration: EngineSizes
    model: ModelFacts
    gpu: GpuFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One figure that a verdict rests on, beside the threshold that it was held against."""

    feature: str
    value: float
    threshold: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What the policy wants: `replicas` and `configuration` are to be applied, `recommended` was merely computed."""

    verdict: VerdictKind
    action: Action
    replicas: int
    configuration: EngineSizes
    reason: str
    recommended: EngineSizes | None = None
    evidence: tuple[Evidence, ...] = ()


class ScalingPolicy(Protocol):
    """A rule from one observation to one proposal; stateless and deterministic."""

    @property
    def name(self) -> str:
        """The name in the deployment's `policy` field."""

    def decide(self, observation: Observation) -> Proposal:
        """The proposal for what was observed."""
