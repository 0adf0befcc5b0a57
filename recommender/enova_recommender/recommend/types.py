"""The values that configuration advice speaks in: workload, objectives, inventory, candidates, predictions, advice."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from enova_recommender.types import GpuModel, Interval, Parallelism, Precision


class Constraint(StrEnum):
    """What keeps a configuration from being better, or from being possible at all."""

    MEMORY = "MEMORY"                  # weights, activations and one sequence do not fit
    LAYOUT = "LAYOUT"                  # heads, layers or experts cannot be cut so
    PRECISION = "PRECISION"            # the GPU cannot compute in this type
    CONTEXT = "CONTEXT"                # max_model_len is below what the workload needs
    TTFT = "TTFT"                      # the objective of the first token
    TPOT = "TPOT"                      # the objective between tokens
    KV_CACHE = "KV_CACHE"              # blocks run out before anything else does
    MAX_NUM_SEQS = "MAX_NUM_SEQS"      # the batch limit is reached first
    COMPUTE = "COMPUTE"                # the GPUs' arithmetic or bandwidth is used up
    INVENTORY = "INVENTORY"            # there are not so many GPUs
    COST = "COST"                      # feasible, but another one is cheaper


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """What a class of requests is promised: seconds at `percentile` of its requests; None promises nothing."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    percentile: float = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests to be served: their rate and a joint sample of their lengths.

    `lengths` holds pairs (prompt tokens, output tokens) that are equally likely; at least one, at most
    LENGTHS_MAX. `arrival_cv` is the coefficient of variation of the times between arrivals (1: Poisson).
    """

    requests_per_s: float
    lengths: tuple[tuple[int, int], ...]
    arrival_cv: float = 1.0
    cached_prefix_share: float = 0.0  # share of prompt tokens that a prefix cache would hold


# Chances that the objectives hold, given the step model's own error: the first with which any candidate keeps them is
# asked for. That of the first is the bound of the 80 % interval.
ASSURANCES = (0.9, 0.75, 0.5)
LENGTHS_MAX = 4096  # pairs of a workload; more are thinned by stride: percentiles up to the 99th need no more


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One configuration of the engine on one type of GPU, under vLLM's names."""

    gpu: GpuModel
    parallelism: Parallelism
    precision: Precision
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    max_model_len: int
    enable_prefix_caching: bool = True

    @property
    def cost_per_hour(self) -> float:
        """List price of one replica, USD an hour. Raises PriceMissing."""
        return self.gpu.cost_per_hour(self.parallelism.gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What one replica does at the rate it was asked for, each with its 80 % interval.

    `capacity_rps` is the highest rate at which the objectives hold; TTFT and TPOT are those of the objectives'
    percentile at `requests_per_s`.
    """

    requests_per_s: float
    ttft_s: Interval
    tpot_s: Interval
    capacity_rps: Interval
    prefill_tokens_per_s: float   # at capacity
    decode_tokens_per_s: float    # at capacity
    mean_sequences: float         # in the batch, at `requests_per_s`
    kv_tokens: int                # that the cache holds
    binding: Constraint           # what capacity ends at


@dataclass(frozen=True, slots=True)
class MeanLengths:
    """Tokens of a mean request."""

    prompt_tokens: float
    output_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What one replica carries while it meets the objectives, each with an 80 % interval.

    `requests_per_s` holds for the requests of `told_for` (None: of late); the others make it anew for another mix.
    """

    requests_per_s: Interval
    prefill_tokens_per_s: float        # with nothing else to do
    decode_tokens_per_s: float         # at the largest batch that meets the objectives
    kv_tokens: float                   # that its cache holds
    max_num_seqs: int
    told_for: MeanLengths | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One configuration that was evaluated. Without a prediction it is impossible, and `reason` says why."""

    settings: EngineSettings
    prediction: Prediction | None
    replicas: int                 # that carry the workload; 0 if impossible
    cost_per_hour: float          # of all replicas, USD; infinite if impossible
    constraint: Constraint | None  # why it lost; None for the winner
    reason: str                   # the same in words, with its numbers
    assured_rps: float = 0.0      # that one replica carries with the chance that was wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class InventoryNode:
    """A host with equal GPUs, as placement sees it."""

    name: str
    gpu: GpuModel
    gpus: int
    island_gpus: int              # GPUs joined by the fast link; a tensor-parallel group stays within one island
    cluster: str = "default"
    domain: str = ""              # failure domain (rack, power feed); empty: the node itself
    free_bytes: tuple[int, ...] = ()  # a GPU; empty: all of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What a change of the request would buy: the cost and the capacity after it, against those of the advice."""

    change: str
    cost_per_hour: float
    capacity_rps: float
    limit_s: float | None = None  # the objective, where the change is a looser one


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedReplicas:
    """The replicas of one configuration among several, and the share of requests that they get."""

    candidate: Candidate
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Several configurations together: what they carry, and which GPUs are missing for all of it."""

    parts: tuple[MixedReplicas, ...]
    cost_per_hour: float
    carried_rps: float                              # of the rate that was asked for
    missing: tuple[tuple[str, int, float], ...] = ()  # GPU type, GPUs, their cost an hour


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The answer for one deployment: what to run, how many, what to expect, and why not something else."""

    chosen: Candidate | None
    binding: Constraint | None
    explanation: tuple[str, ...]
    runners_up: tuple[Candidate, ...]
    pareto: tuple[Candidate, ...]      # no other one is cheaper and faster at once
    sensitivities: tuple[Sensitivity, ...]
    evaluated: int                     # candidates in all
    rejected: tuple[tuple[Constraint, int], ...]  # how many fell to what
    mix: Mix | None = None             # cheaper than the chosen one, or the most that there is without one
    assurance: float = ASSURANCES[0]   # chance that the chosen one keeps the objectives, by the step model's own error
