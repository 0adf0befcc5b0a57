"""Small simulated fleets: builders with plain defaults, and policies that follow a script."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from enova_recommender.engine import Limits
from enova_recommender.performance import Affine
from enova_recommender.scaling.bounds import Bounds
from enova_recommender.scaling.situation import (
    Capacity,
    Decided,
    Memory,
    Objective,
    Situation,
    StartUp,
    Wish,
)
from enova_recommender.scaling.types import Action
from enova_recommender.types import Interval, VerdictKind
from enova_simulator.cluster.engines import Requests
from enova_simulator.cluster.fleet import Fleet
from enova_simulator.cluster.outcome import Record
from enova_simulator.cluster.setup import DeploymentSetup, FleetSetup, Traffic, VariantSetup
from enova_simulator.cluster.tables import Tabulated, tabulated

TIMES = Affine(base_s=0.01, prefill_token_s=6e-5, prefill_pair_s=4e-9, sequence_s=2.5e-4, context_token_s=8e-8)
LIMITS = Limits(num_blocks=4096, max_num_seqs=16, max_num_batched_tokens=2048)
TABLE: Tabulated = tabulated(TIMES, max_num_seqs=16, max_num_batched_tokens=2048)
CAPACITY = Capacity(
    requests_per_s=Interval(value=5.0, low=4.0, high=6.0), prefill_tokens_per_s=12_000, decode_tokens_per_s=800,
    kv_tokens=65_536, max_num_seqs=16,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Starts:
    """Every start takes as long, but for those named."""

    usual_s: float = 60.0
    others: Mapping[int, float] = field(default_factory=dict)

    def seconds(self, number: int) -> float:
        """From the start command to READY."""
        return self.others.get(number, self.usual_s)


def variant(name: str = "v", **changes: object) -> VariantSetup:
    """A variant on one GPU of type G."""
    plain = VariantSetup(
        name=name, gpu_type="G", gpus=1, usd_per_hour=2.0, limits=LIMITS, times=TABLE, capacity=CAPACITY,
        start_up=StartUp(p50_s=60, p90_s=80), start_ups=Starts(),
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]  # the caller's fields are the class's


def deployment(name: str = "d", *, replicas: int = 2, **changes: object) -> DeploymentSetup:
    """A deployment of one variant without a policy."""
    plain = DeploymentSetup(
        name=name, variants=(variant(),), targets={"v": replicas}, bounds=Bounds(min_replicas=0, max_replicas=10),
        objective=Objective(ttft_s=1.0, tpot_s=0.05),
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]  # the caller's fields are the class's


def fleet(*deployments: DeploymentSetup, gpus: int = 10, end_s: float = 300.0, **changes: object) -> FleetSetup:
    """A fleet of G GPUs."""
    plain = FleetSetup(gpus={"G": gpus}, deployments=deployments or (deployment(),), end_s=end_s)
    return replace(plain, **changes)  # type: ignore[arg-type]  # the caller's fields are the class's


def requests(
    *, rate: float = 4.0, until_s: float = 300.0, seed: int = 7, prompt: int = 300, output: int = 60,
    priority: int = 0,
) -> Requests:  # fmt: skip
    """Poisson arrivals with drawn lengths."""
    draw = np.random.default_rng(seed)
    arrival_s = np.cumsum(draw.exponential(1.0 / rate, size=max(1, round(rate * until_s * 1.3))))
    return at_times(
        arrival_s[arrival_s < until_s], prompt=prompt, output=output, priority=priority, spread=draw
    )  # fmt: skip


def at_times(
    arrival_s: object, *, prompt: int = 300, output: int = 60, priority: int = 0,
    spread: np.random.Generator | None = None,
) -> Requests:  # fmt: skip
    """Requests at these times, of equal lengths or spread around them."""
    times = np.array(arrival_s, dtype=np.float64)
    count = len(times)
    prompts, outputs = np.full(count, prompt, dtype=np.int64), np.full(count, output, dtype=np.int64)
    if spread is not None:
        prompts, outputs = spread.integers(1, 2 * prompt, count), spread.integers(1, 2 * output, count)
    none = np.zeros(count, dtype=np.int64)
    return Requests(
        arrival_s=times, prompt_tokens=prompts, output_tokens=outputs, priority=none + priority,
        hashes=np.zeros(0, dtype=np.int64), hash_ends=none,
    )  # fmt: skip


def traffic(these: Requests) -> Traffic:
    """All requests of the first deployment."""
    return Traffic(requests=these, deployment=np.zeros(len(these), dtype=np.int64))


def run(setup: FleetSetup, these: Requests) -> Record:
    """A run of one deployment's requests."""
    return Fleet(setup, traffic(these)).run()


@dataclass(slots=True)
class Scripted:
    """A policy that wishes what a function says, and keeps what it was told."""

    wish: Callable[[Situation], Mapping[str, float]]
    interval_s: float = 10.0
    replace: tuple[str, ...] = ()
    seen: list[Situation] = field(default_factory=list)
    name: str = "scripted"

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """The scripted wish."""
        self.seen.append(situation)
        targets: dict[str, int] = dict(self.wish(situation))  # type: ignore[arg-type]  # nonsense is wished for, too
        wish = Wish(
            action=Action.KEEP, targets=targets, verdict=VerdictKind.NORMAL, reason="scripted", replace=self.replace
        )
        return Decided(wish=wish, memory=memory)


def stepwise(*steps: tuple[float, int]) -> Callable[[Situation], Mapping[str, float]]:
    """From each moment on so many replicas."""

    def wish(situation: Situation) -> Mapping[str, float]:
        return {"v": [count for at_s, count in steps if situation.now_s >= at_s][-1]} if (
            any(situation.now_s >= at_s for at_s, _ in steps)
        ) else {}

    return wish
