"""A small cluster in virtual time for detectors: engines that are the scheduler, seen only through agents' frames.

Faults are put in by changing the world (`engine.slow(2.0)`), never by telling the detector.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from enova_common.vllm import REQUEST_LATENCY_BUCKETS_S, TOKEN_LATENCY_BUCKETS_S, TTFT_BUCKETS_S
from enova_recommender.detection.folding import FoldSettings
from enova_recommender.detection.observation import (
    INTER_TOKEN,
    QUEUE,
    TTFT,
    BucketCounts,
    FrameReading,
    GpuReading,
    Placement,
    ReplicaReading,
    RequestReading,
)
from enova_recommender.detection.watch import FleetWatch, Watched
from enova_recommender.engine.events import Admitted, Finished, FirstToken, Limits, Preempted, Request, Stepped
from enova_recommender.engine.scheduler import Scheduler
from enova_recommender.performance import Affine, Slowed, StepTimes

BOUNDS = {TTFT: TTFT_BUCKETS_S, INTER_TOKEN: TOKEN_LATENCY_BUCKETS_S, QUEUE: REQUEST_LATENCY_BUCKETS_S}
TIMES = Affine(base_s=0.012, prefill_token_s=6e-5, prefill_pair_s=4e-9, sequence_s=2.5e-4, context_token_s=8e-8)
POWER_LIMIT_W = 700.0
IDLE_W, BUSY_W, WEDGED_W = 75.0, 480.0, 135.0
HOT = 0x40                   # NVML: slowed by the hardware's own thermal limit


@dataclass(slots=True)
class _Histogram:
    bounds: tuple[float, ...]
    counts: list[float] = field(default_factory=list)
    sum: float = 0.0

    def add(self, value: float, count: float = 1.0) -> None:
        self.counts = self.counts or [0.0] * (len(self.bounds) + 1)
        self.counts[bisect.bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def read(self) -> BucketCounts:
        counts = self.counts or [0.0] * (len(self.bounds) + 1)
        return BucketCounts(np.cumsum(counts).tolist(), self.sum)


@dataclass(slots=True, kw_only=True)
class Engine:
    """One replica: its scheduler, its counters, and what may befall it."""

    name: str
    node: str
    limits: Limits
    times: StepTimes = TIMES
    rate_rps: float = 4.0
    prompt_tokens: int = 400
    output_tokens: int = 120
    seed: int = 0
    deployment: str = "chat"
    hung: bool = False
    blind: bool = False              # its running gauge reads 0, as in some wedges
    power_w: float | None = None
    throttle_reasons: int = 0
    clock_mhz: float = 1980.0
    state: str = "READY"
    lost_blocks: int = 0
    max_model_len: float = 2048.0
    instance: int = 1
    agent: int = 1
    failing: float = 0.0             # share of the requests that end in an error
    starts_at_s: float = 0.0         # until then its process does not serve
    efficiency: float = 1.0          # of its own: its steps are so many times as long as the world's
    neighbour: float = 1.0           # by which others on its GPU make them longer now
    noise_at: int = 0                # place in a world's residuals
    now_s: float = 0.0
    scheduler: Scheduler = field(init=False)
    frozen: ReplicaReading | None = field(default=None, init=False)
    _draw: np.random.Generator = field(init=False)
    _next_s: float = field(default=0.0, init=False)
    _number: int = field(default=0, init=False)
    _counts: dict[str, float] = field(init=False)
    _histograms: dict[str, _Histogram] = field(init=False)
    _arrived: dict[str, float] = field(default_factory=dict, init=False)
    _stuck: list[Request] = field(default_factory=list, init=False)
    _busy_s: float = field(default=0.0, init=False)
    _interval: tuple[int, int, int] = field(default=(0, 0, 0), init=False)
    _came: int = field(default=0, init=False)
    _lost: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._draw = np.random.default_rng(self.seed)
        self._start()

    def placement(self) -> Placement:
        """Where it runs."""
        return Placement(
            replica=self.name, deployment=self.deployment, variant=f"{self.deployment}-1", nodes=(self.node,),
            gpus=(f"gpu-{self.name}",), max_num_seqs=self.limits.max_num_seqs,
            max_num_batched_tokens=self.limits.max_num_batched_tokens, max_model_len=self.max_model_len,
            kv_tokens=float(self.limits.num_blocks * self.limits.block_size),
        )  # fmt: skip

    def slow(self, factor: float) -> None:
        """Steps take longer from now on."""
        self.scheduler.times = Slowed(times=self.times, factor=factor)

    def leak(self, blocks: int) -> None:
        """KV blocks get lost."""
        self.lost_blocks += self.scheduler.withhold_blocks(blocks)

    def restart(self, *, after_s: float = 0.0) -> None:
        """The process ends and comes back, maybe later: requests are lost, counters begin anew."""
        self.instance += 1
        self.starts_at_s = self.now_s + after_s
        self._lost += len(self._arrived)
        self._start()

    @property
    def is_up(self) -> bool:
        """Whether it serves."""
        return self.now_s >= self.starts_at_s

    @property
    def in_flight(self) -> int:
        """What its ingress holds."""
        return len(self._arrived)

    def adopt(self) -> None:
        """Another agent comes to it: what it counts begins anew, what it computes goes on."""
        self.agent += 1
        self._counts = dict.fromkeys(self._counts, 0.0)
        self._histograms = {name: _Histogram(bounds) for name, bounds in BOUNDS.items()}

    def ask(self, *, prompt_tokens: int, output_tokens: int, at_s: float | None = None) -> None:
        """One request, by default now, besides those that arrive by themselves."""
        self._submit(self.now_s if at_s is None else max(at_s, self.now_s), prompt_tokens, output_tokens)

    def run(self, until_s: float) -> None:
        """Let time pass."""
        while self.rate_rps > 0 and self._next_s <= until_s:
            prompt = max(1, round(float(self._draw.gamma(4.0, self.prompt_tokens / 4.0))))
            output = max(1, round(float(self._draw.gamma(4.0, self.output_tokens / 4.0))))
            self._submit(max(self._next_s, self.now_s), min(prompt, 1200), min(output, 800))
            self._next_s += float(self._draw.exponential(1.0 / self.rate_rps))
        if self.rate_rps <= 0:
            self._next_s = until_s
        finished = self._counts["finished"]
        self._busy_s = 0.0
        if not self.hung and until_s >= self.starts_at_s:
            for request in self._stuck:
                self.scheduler.submit(request, self.now_s)
            self._stuck.clear()
            for event in self.scheduler.advance(until_s):
                self._tell(event)
        ended = round(self._counts["finished"] - finished)
        failed = int(self._draw.binomial(ended, self.failing)) if self.failing > 0 else 0
        self._interval = self._came, ended - failed, failed + self._lost
        self._came = self._lost = 0
        self.now_s = until_s

    def reading(self) -> ReplicaReading:
        """What a scrape shows."""
        if self.hung and self.frozen is not None:
            held = float(len(self._arrived))
            return self.frozen._replace(held=held, running=0.0 if self.blind else self.frozen.running, state=self.state)
        if not self.is_up:
            self.frozen = None
            return ReplicaReading(replica=self.name, state="STARTING", held=float(len(self._arrived)))
        counts, scheduler = self._counts, self.scheduler
        used = scheduler.kv_usage * (self.limits.num_blocks - self.lost_blocks) + self.lost_blocks
        self.frozen = ReplicaReading(
            replica=self.name, instance=f"uid.{self.instance}.0.000.{self.agent}", state=self.state,
            running=float(scheduler.running), waiting=float(scheduler.waiting), held=float(len(self._arrived)),
            kv_cache_usage=used / self.limits.num_blocks, resident_memory_bytes=8e9,
            prompt_tokens=counts["prompt"], generation_tokens=counts["generation"],
            preemptions=counts["preemptions"], iterations=counts["iterations"], prefix_cache_hits=0.0,
            finished={"stop": counts["finished"]},
            histograms={name: histogram.read() for name, histogram in self._histograms.items()},
        )  # fmt: skip
        return self.frozen

    def requests(self) -> RequestReading:
        """What the ingress counted in the last interval."""
        came, finished, failed = self._interval
        return RequestReading(
            deployment=self.deployment, replica=self.name, arrived=came, finished=finished, failed=failed,
            held=len(self._arrived),
        )  # fmt: skip

    def gpu(self) -> GpuReading:
        """Its GPU."""
        busy = min(1.0, self._busy_s)
        power_w = IDLE_W + (BUSY_W - IDLE_W) * busy
        if self.hung:
            busy, power_w = 1.0, WEDGED_W
        if not self.is_up:
            busy, power_w = 0.0, IDLE_W
        return GpuReading(
            uuid=f"gpu-{self.name}", utilization=busy, power_w=self.power_w or power_w, power_limit_w=POWER_LIMIT_W,
            temperature_c=60.0, sm_clock_mhz=self.clock_mhz, memory_used_bytes=7e10, memory_total_bytes=8e10,
            throttle_reasons=float(self.throttle_reasons),
        )  # fmt: skip

    def _start(self) -> None:
        self.scheduler = Scheduler(self.limits, self.times, start_s=max(self.now_s, self.starts_at_s))
        self.lost_blocks = 0
        self._stuck = []
        self._counts = dict.fromkeys(("prompt", "generation", "preemptions", "iterations", "finished"), 0.0)
        self._histograms = {name: _Histogram(bounds) for name, bounds in BOUNDS.items()}
        self._arrived = {}

    def _submit(self, at_s: float, prompt_tokens: int, output_tokens: int) -> None:
        self._number += 1
        self._came += 1
        request = Request(id=f"{self.name}-{self._number}", prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        self._arrived[request.id] = at_s
        if self.hung:
            self._stuck.append(request)
        else:
            self.scheduler.submit(request, max(at_s, self.starts_at_s))

    def _tell(self, event: object) -> None:
        counts, histograms = self._counts, self._histograms
        match event:
            case Stepped():
                counts["iterations"] += event.count
                counts["generation"] += event.made_tokens * event.count
                duration_s = (event.end_s - event.start_s) / event.count
                self._busy_s += event.end_s - event.start_s
                if event.decode_sequences:
                    histograms[INTER_TOKEN].add(duration_s, event.decode_sequences * event.count)
            case Admitted() if not event.again:
                histograms[QUEUE].add(event.at_s - self._arrived[event.request.id])
            case FirstToken():
                counts["prompt"] += event.request.prompt_tokens
                histograms[TTFT].add(event.at_s - self._arrived[event.request.id])
            case Preempted():
                counts["preemptions"] += 1
            case Finished():
                counts["finished"] += 1
                del self._arrived[event.request.id]


@dataclass(slots=True)
class World:
    """Engines on nodes, and one agent a node."""

    engines: list[Engine]
    unreachable: set[str] = field(default_factory=set)
    now_s: float = 0.0
    _sequence: int = 0

    def frames(self, until_s: float) -> Iterator[FrameReading]:
        """Let time pass and yield each second's frames of the nodes that can be reached."""
        while self.now_s < until_s:
            start_s, self.now_s = self.now_s, self.now_s + 1.0
            self._sequence += 1
            for engine in self.engines:
                engine.run(self.now_s)
            for node in sorted({engine.node for engine in self.engines} - self.unreachable):
                here = [engine for engine in self.engines if engine.node == node]
                yield FrameReading(
                    node=node, boot="boot", sequence=self._sequence, start_s=start_s, end_s=self.now_s,
                    gpus=tuple(engine.gpu() for engine in here),
                    replicas=tuple(engine.reading() for engine in here),
                    # As the real ingress does: nothing of replicas that nothing happened to.
                    requests=tuple(
                        r for each in here if (r := each.requests()).arrived or r.finished or r.failed or r.held
                    ),
                )  # fmt: skip


LIMITS = Limits(num_blocks=4096, max_num_seqs=32, max_num_batched_tokens=2048, enable_prefix_caching=False)


def cluster(
    *, replicas: int = 1, per_node: int = 1, limits: Limits = LIMITS, rate_rps: float = 4.0,
    times: StepTimes = TIMES,
) -> World:  # fmt: skip
    """Equal engines, so many on a node."""
    return World([
        Engine(
            name=f"replica-{index}", node=f"node-{index // per_node}", limits=limits, rate_rps=rate_rps, times=times,
            seed=index,
        )
        for index in range(replicas)
    ])  # fmt: skip


@dataclass(slots=True)
class Watching:
    """A detector that sees a world's frames and nothing else."""

    world: World
    watch: FleetWatch
    told: list[Watched] = field(default_factory=list)

    def until(self, until_s: float, *, each: Callable[[float], None] | None = None) -> list[Watched]:
        """Watch until then; `each` may change the world every second. The steps that this call closed."""
        first = len(self.told)
        while self.world.now_s < until_s:
            for frame in self.world.frames(self.world.now_s + 1.0):
                self.watch.add(frame, now_s=self.world.now_s)
            self.told += self.watch.close(self.world.now_s)
            if each is not None:
                each(self.world.now_s)
        return self.told[first:]


def watching(world: World, *, times: StepTimes | None = TIMES, watch: FleetWatch | None = None) -> Watching:
    """A detector that knows the placements and, unless None, what steps should take."""
    watch = watch or FleetWatch(FoldSettings(bounds=BOUNDS))
    watch.place([engine.placement() for engine in world.engines])
    if times is not None:
        watch.expect({engine.name: times for engine in world.engines})
    return Watching(world, watch)


def kinds(steps: Iterable[Watched], replica: str) -> list[str]:
    """The verdicts on one replica, one after another without repeats."""
    found: list[str] = []
    for each in steps:
        kind = each.judgement.kind(replica).value
        if not found or found[-1] != kind:
            found.append(kind)
    return found


def first_s(steps: Iterable[Watched], replica: str) -> float:
    """When something was first said of a replica; infinity for never."""
    return next((each.step.end_s for each in steps if replica in each.judgement.verdicts), math.inf)
