"""What a scaling policy is told of one deployment at one instant, and what it wishes: the policy interface.

Theory of operation. A policy is pure: `decide` gets a `Situation` and the `Memory` that its last call returned, and
answers with a `Wish` and the memory for the next call. So a wish can be computed again from what was recorded, in a
simulation of the fleet, in a replay of history, or by the leader that takes over. Everything in a situation was known
at `now_s`. Bounds, pauses, GPUs that are not there and acts in flight are the coordinator's business
(`bounds`, `core.scaling_guard`): a policy reads them, and what it wishes beyond them is clamped, not obeyed.

Arrays are float64, oldest step first, NaN where nothing was measured; a policy must not write into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from enova_recommender.recommend.types import Capacity as Capacity  # noqa: PLC0414  # part of what policies are told
from enova_recommender.scaling.bounds import Bounds
from enova_recommender.scaling.types import Action, Evidence, Observation
from enova_recommender.types import VerdictKind

Floats = NDArray[np.float64]
Memory = Mapping[str, "float | str | tuple[float, ...]"]   # JSON can hold it; empty at the start


class Signal(StrEnum):
    """What is measured of a replica in each step. Gauges are the step's mean; counts are what the step added."""

    RUNNING = "running"                        # requests in the engine's batch
    WAITING = "waiting"                        # requests that its queues hold: the engine's and its ingress's
    KV_CACHE_USAGE = "kv_cache_usage"          # share, 0 to 1
    GPU_UTILIZATION = "gpu_utilization"        # share, 0 to 1, the mean of its GPUs
    FINISHED = "finished"                      # requests
    PROMPT_TOKENS = "prompt_tokens"            # computed, those from the prefix cache left out
    GENERATION_TOKENS = "generation_tokens"
    PREEMPTIONS = "preemptions"
    TTFT_S = "ttft_s"                          # mean over the requests whose first token came in the step
    TPOT_S = "tpot_s"                          # mean over the requests that finished in it


class Phase(StrEnum):
    """How far a replica is; those that drain or have ended are not told."""

    PENDING = "PENDING"        # waits for GPUs
    STARTING = "STARTING"
    READY = "READY"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSight:
    """One replica that is meant to serve. `since_s` is when its phase began, `verdict` what the detector says."""

    name: str
    variant: str
    phase: Phase
    since_s: float
    verdict: VerdictKind = VerdictKind.NORMAL
    cause: str = ""            # of a DEGRADED one: HUNG, SLOW, ...; a hung or dead one carries no load
    certain: bool = True       # whether the verdict has stood for long enough to be acted on

    @property
    def carries(self) -> bool:
        """Whether its capacity counts: ready, and neither hung nor dead."""
        return self.phase is Phase.READY and self.cause not in {"HUNG", "DEAD"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recent:
    """The last steps of each replica; step i of n ends at `end_s - (n - 1 - i) * step_s`.

    `values[signal]` is replicas x steps; a row belongs to the replica of the same place in `replicas`. A signal that
    nobody measures is absent.
    """

    end_s: float
    step_s: float
    replicas: tuple[str, ...]
    values: Mapping[Signal, Floats]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Demand:
    """What clients sent to the deployment in each step (length n), refused requests included.

    `prompt_tokens` and `output_tokens` sum over the requests that *finished* in the step (lengths are known only
    then), `finished` counts those.
    """

    end_s: float
    step_s: float
    arrived: Floats
    finished: Floats
    prompt_tokens: Floats
    output_tokens: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class StartUp:
    """How long a replica takes from the start command to READY, learnt from `count` past starts (0: a prior)."""

    p50_s: float
    p90_s: float
    count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantSight:
    """One configuration on one GPU type: what it costs, carries and may have."""

    name: str
    target: int
    gpu_type: str
    gpus: int                          # of one replica
    usd_per_hour: float                # of one replica
    capacity: Capacity
    start_up: StartUp
    places: int                        # replicas of it that the fleet has room for, those that run included


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is promised: this share of requests has its first token and its mean gap between tokens in time."""

    ttft_s: float
    tpot_s: float
    attainment: float = 0.99


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Situation:
    """Everything that a policy may look at, as it was known at `now_s` (model time)."""

    now_s: float
    deployment: str
    bounds: Bounds
    objective: Objective
    variants: tuple[VariantSight, ...]
    replicas: tuple[ReplicaSight, ...]
    recent: Recent                     # seconds: for minutes to an hour
    demand: Demand                     # on the same steps as `recent`
    history: Demand                    # by the minute, up to 14 days; short or empty at first
    minutes: Observation | None        # the six series that ENOVA 0.0.7 looks at; None while nothing is measured
    held: int = 0                      # requests that ingresses hold while no replica is READY
    last_act_s: float = float("-inf")  # when a target was last changed, by anyone
    conservatism: float = 1.0          # the user's one knob: above 1 spends GPUs for safety, below 1 saves them
    fleet_lost_share: float = 0.0      # of the fleet's nodes that were lost within the last minutes
    verdict: VerdictKind = VerdictKind.UNKNOWN

    @property
    def target(self) -> int:
        """Replicas wanted now, over all variants."""
        return sum(variant.target for variant in self.variants)

    @property
    def ready(self) -> int:
        """Replicas whose capacity counts."""
        return sum(replica.carries for replica in self.replicas)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Demand that is expected at `at_s`, in requests a second, with the quantiles that were acted on."""

    at_s: float
    p50: float
    low: float
    high: float
    method: str                        # what made it, and on how much history: for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a policy wants: a target for each variant it names (the others keep theirs), and why.

    `replace` names replicas for which a new one is to become READY before they go; `remove_first` the order in which
    replicas leave when a target falls, among those that serve equally little (PENDING and STARTING ones go first
    whatever it says).
    """

    action: Action
    targets: Mapping[str, int]
    verdict: VerdictKind
    reason: str
    evidence: tuple[Evidence, ...] = ()
    forecast: Forecast | None = None
    replace: tuple[str, ...] = ()
    remove_first: tuple[str, ...] = ()
    cooldown_s: float = 0.0            # from now, until the policy would act again: shown to people


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A wish, and what the next call is to be given back."""

    wish: Wish
    memory: Memory = field(default_factory=dict)


class Policy(Protocol):
    """One way to scale a deployment; deterministic."""

    @property
    def name(self) -> str:
        """The name in the deployment's `policy` field."""
        ...

    @property
    def interval_s(self) -> float:
        """Model seconds between two calls."""
        ...

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """The wish for this situation; `memory` is empty at the first call."""
        ...
