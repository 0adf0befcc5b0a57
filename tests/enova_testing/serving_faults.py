"""Incidents of a small serving cluster in three worlds, seen by a detector through agents' bytes alone.

A cluster is one deployment of REPLICAS engines, each on a node of its own, under a real trace's arrivals and lengths.
Requests go to the replica that holds the fewest. A world says how long steps truly take: (a) additive, fitted to
perf_splitwise; (b) measured kernels times an efficiency by model and GPU and one by replica, with residuals of
recordings and a co-runner now and then; (c) what the recommender believes. The detector believes (c) in all of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
from scipy.optimize import nnls

from enova_recommender.catalog import find_gpu, find_model
from enova_recommender.detection.evidence import BURN_OBJECTIVE
from enova_recommender.detection.folding import FoldSettings
from enova_recommender.detection.observation import FrameReading, Placement
from enova_recommender.detection.watch import FleetWatch, Watched
from enova_recommender.engine.events import Finished, FirstToken, Limits, Request
from enova_recommender.engine.scheduler import Scheduler
from enova_recommender.performance import Affine, KernelTimes, Slowed, StepTimes
from enova_recommender.types import Batch, Parallelism
from enova_testing.frame_bytes import received, sent
from enova_testing.latency_rows import Row
from enova_testing.serving_world import BOUNDS, HOT, Engine

REPLICAS = 4
WARM_S, EVENT_S, TAIL_S = 300.0, 150.0, 90.0
LOAD = 0.5                   # of capacity, in quiet time
KV_BLOCKS = 24_000           # of 16 tokens
LIMITS = Limits(num_blocks=KV_BLOCKS, max_num_seqs=256, max_num_batched_tokens=2048, enable_prefix_caching=False)
CONTEXT = 8192
LOST_SHARE, LATE_SHARE = 0.01, 0.1  # of frames: never, and a second late
SCRAPE_AGE_S = 0.3
TTFT_P95_S, TPOT_P95_S = 2.0, 0.05
GOODPUT_SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)  # of what saturates
GOODPUT_REQUESTS = 600
SMALL_STEPS = 3.0            # steps of a small batch, that the objective for tokens is
CAPACITY_SIGMA = 0.2         # of the log of what the coordinator takes for a replica's capacity
EFFICIENCY_SIGMA, REPLICA_SIGMA = 0.15, 0.03
NOISE_STEPS = 12             # of residuals in a row, that are drawn together
NEIGHBOUR = 1.08             # of world (b), now and then: no fault
CLOCK_MHZ = 1980.0


class World(StrEnum):
    """What step times are made of."""

    ADDITIVE = "a"
    PERTURBED = "b"
    MATCHED = "c"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One model on one GPU in one world. `requests` are a trace: seconds since the one before, prompt, output."""

    world: World
    name: str
    times: StepTimes
    believed: StepTimes
    requests: Sequence[tuple[float, int, int]]
    residuals: Sequence[float] = ()
    efficiency: float = 1.0

    @property
    def tpot_p95_s(self) -> float:
        """An objective for tokens: steps of a small batch, and no less than usual."""
        small = Batch(decode_sequences=8, context_tokens=8 * 1200)
        return max(TPOT_P95_S, SMALL_STEPS * self.efficiency * self.times.step_s(small))

    def capacity_rps(self) -> float:
        """Requests a second that one replica carries while 95 of 100 keep the objective for tokens."""
        most = self._saturated_rps()
        return next((share * most for share in GOODPUT_SHARES if self._keeps(share * most)), GOODPUT_SHARES[-1] * most)

    def _saturated_rps(self) -> float:
        """By a run that never lacks any."""
        scheduler = Scheduler(LIMITS, Slowed(times=self.times, factor=self.efficiency))
        for number in range(700):
            _, prompt, output = self.requests[number % len(self.requests)]
            scheduler.submit(Request(id=str(number), prompt_tokens=prompt, output_tokens=output), 0.0)
        ends = [event.at_s for event in scheduler.advance(3600.0) if isinstance(event, Finished)]
        early, late = ends[len(ends) // 4], ends[3 * len(ends) // 4]
        return (len(ends) / 2) / max(late - early, 1e-9)

    def _keeps(self, rate_rps: float) -> bool:
        """Whether the objective holds at this rate, the trace's bursts included."""
        scheduler = Scheduler(LIMITS, Slowed(times=self.times, factor=self.efficiency))
        mean_gap_s = float(np.mean([each[0] for each in self.requests])) or 1.0
        at_s = 0.0
        for number, (gap_s, prompt, output) in enumerate(self.requests[:GOODPUT_REQUESTS]):
            at_s += gap_s / mean_gap_s / rate_rps
            scheduler.submit(Request(id=str(number), prompt_tokens=prompt, output_tokens=output), at_s)
        firsts: dict[str, float] = {}
        kept = []
        for event in scheduler.advance(at_s + 3600.0):
            if isinstance(event, FirstToken):
                firsts[event.request.id] = event.at_s
            elif isinstance(event, Finished) and event.request.output_tokens > 1:
                taken_s = event.at_s - firsts[event.request.id]
                kept.append(taken_s / (event.request.output_tokens - 1) <= self.tpot_p95_s)
        return float(np.mean(kept)) >= BURN_OBJECTIVE


def additive(rows: Iterable[Row]) -> Affine:
    """Affine step times of batches that were measured as a whole: prompts in one step, then one token a step."""
    table, measured = [], []
    for row in rows:
        batch, prompt = float(row.concurrency), float(row.prompt_tokens)
        table.append((1.0, batch * prompt, batch * prompt**2 / 2, 0.0, 0.0))
        measured.append(row.ttft_s)
        table.append((1.0, 0.0, 0.0, batch, batch * (prompt + row.output_tokens / 2)))
        measured.append(row.tpot_s)
    matrix, seconds = np.array(table), np.array(measured)
    units = np.maximum(matrix.mean(axis=0), 1e-12)
    found = nnls(matrix / units / seconds[:, None], np.ones(len(seconds)))[0] / units
    return Affine(
        base_s=float(found[0]), prefill_token_s=float(found[1]), prefill_pair_s=float(found[2]),
        sequence_s=float(found[3]), context_token_s=float(found[4]),
    )  # fmt: skip


def kernel_times(model: str, gpu: str, tensor: int) -> KernelTimes:
    """What the recommender believes."""
    shape, kind = find_model(model), find_gpu(gpu)
    assert shape is not None
    assert kind is not None
    return KernelTimes(shape, kind, parallelism=Parallelism(tensor=tensor))


@dataclass(slots=True, kw_only=True)
class Stage:
    """A cluster at work; incidents change it."""

    setting: Setting
    engines: list[Engine]
    capacity_rps: float
    draw: np.random.Generator
    load: float = LOAD
    prompt_factor: float = 1.0
    output_factor: float = 1.0
    lost_share: float = LOST_SHARE
    unreachable: set[str] = field(default_factory=set)
    factors: dict[str, float] = field(default_factory=dict)   # by which an incident makes steps longer
    own: dict[str, float] = field(default_factory=dict)       # each replica's, and its noise
    now_s: float = 0.0
    sent_requests: int = 0
    preempted_s: float | None = None
    queued_s: float = 0.0            # the last second in which somebody waited in an engine
    loads: list[float] = field(default_factory=list)
    _number: int = 0
    _next_s: float = 0.0
    _sequence: int = 0
    _waiting: deque[tuple[float, str, bytes]] = field(default_factory=deque)

    def slow(self, engine: Engine, factor: float) -> None:
        """Steps take so much longer; 1 ends it."""
        self.factors[engine.name] = factor
        self._set_times(engine)

    def passing(self, interval_s: float = 1.0) -> Iterator[tuple[str, bytes]]:
        """Let an interval of telemetry pass; what arrives at the coordinator meanwhile."""
        until_s = self.now_s + interval_s
        self._arrive(until_s)
        if self.setting.residuals and self.now_s % 5 == 0:
            self._make_noise()
        for engine in self.engines:
            engine.run(until_s)
        start_s, self.now_s = self.now_s, until_s
        self.loads.append(self.load)
        self._sequence += 1
        if any(each.scheduler.waiting or each.hung for each in self.engines):
            self.queued_s = until_s
        for engine in self.engines:
            frame = self._frame(engine, start_s)
            lost = self.draw.random() < self.lost_share or engine.node in self.unreachable
            if not lost:
                late_s = 1.0 if self.draw.random() < LATE_SHARE else 0.0
                self._waiting.append((until_s + late_s, engine.node, sent(frame)))
        due = [each for each in self._waiting if each[0] <= until_s]
        self._waiting = deque(each for each in self._waiting if each[0] > until_s)
        yield from ((node, data) for _, node, data in due)

    def placements(self) -> list[Placement]:
        """What the coordinator decided, with what it takes for the capacity."""
        guess = self.capacity_rps * math.exp(CAPACITY_SIGMA * float(np.random.default_rng(self._number).normal()))
        return [
            replace(each.placement(), capacity_rps=guess, ttft_p95_s=TTFT_P95_S, tpot_p95_s=self.setting.tpot_p95_s)
            for each in self.engines
        ]

    def demand_rps(self) -> float:
        """What arrives a second."""
        return self.load * self.capacity_rps * REPLICAS

    def _arrive(self, until_s: float) -> None:
        mean_gap_s = self._mean_gap_s()
        while self._next_s < until_s:
            gap_s, prompt, output = self.setting.requests[self._number % len(self.setting.requests)]
            rate = self.demand_rps()
            if rate <= 0:
                self._next_s = until_s
                return
            # The trace's own bursts, at the rate that is wanted.
            at_s, self._next_s = self._next_s, self._next_s + gap_s / mean_gap_s / rate
            self._number += 1
            up = [each for each in self.engines if each.is_up]
            if not up:
                continue
            chosen = min(up, key=lambda each: (each.in_flight, each.name))
            room = int(chosen.max_model_len)
            prompt = min(max(1, round(prompt * self.prompt_factor)), room - 2)
            output = min(max(1, round(output * self.output_factor)), room - prompt)
            chosen.ask(prompt_tokens=prompt, output_tokens=output, at_s=at_s)
            self.sent_requests += 1

    def _mean_gap_s(self) -> float:
        return float(np.mean([each[0] for each in self.setting.requests])) or 1.0

    def _make_noise(self) -> None:
        residuals = self.setting.residuals
        for engine in self.engines:
            if self.now_s % (5 * NOISE_STEPS) == 0:
                engine.noise_at = int(self.draw.integers(0, len(residuals)))
                engine.neighbour = NEIGHBOUR if self.draw.random() < 0.1 else 1.0
            noise = residuals[(engine.noise_at + int(self.now_s) // 5 % NOISE_STEPS) % len(residuals)]
            self.own[engine.name] = engine.efficiency * engine.neighbour * math.exp(noise)
            self._set_times(engine)

    def _set_times(self, engine: Engine) -> None:
        engine.slow(self.factors.get(engine.name, 1.0) * self.own.get(engine.name, engine.efficiency))

    def _frame(self, engine: Engine, start_s: float) -> FrameReading:
        reading = engine.reading()
        requests = engine.requests()
        if self.preempted_s is None and reading.preemptions > 0:
            self.preempted_s = self.now_s
        quiet = not (requests.arrived or requests.finished or requests.failed or requests.held)
        return FrameReading(
            node=engine.node, boot="boot", sequence=self._sequence, start_s=start_s + SCRAPE_AGE_S,
            end_s=self.now_s + SCRAPE_AGE_S, gpus=(engine.gpu(),), replicas=(reading._replace(age_s=SCRAPE_AGE_S),),
            requests=() if quiet else (requests,),
        )  # fmt: skip


def stage(
    setting: Setting, *, seed: int, capacity_rps: float, limits: Limits = LIMITS, context: int = CONTEXT
) -> Stage:
    """A cluster at its start."""
    draw = np.random.default_rng(seed)
    perturbed = setting.world is World.PERTURBED
    engines = []
    for index in range(REPLICAS):
        engine = Engine(
            name=f"replica-{index}", node=f"node-{index}", limits=limits, rate_rps=0.0, times=setting.times,
            seed=seed * REPLICAS + index, max_model_len=float(context),
        )  # fmt: skip
        own = math.exp(REPLICA_SIGMA * float(draw.normal())) if perturbed else 1.0
        engine.efficiency = setting.efficiency * own
        engine.slow(engine.efficiency)
        engines.append(engine)
    made = Stage(setting=setting, engines=engines, capacity_rps=capacity_rps, draw=draw)
    made._number = int(draw.integers(0, len(setting.requests)))
    return made


Act = Callable[[Stage, float], None]   # at so many seconds of the incident


def _nothing(stage: Stage, elapsed_s: float) -> None:
    """Let everything be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """What befalls a cluster. `verdicts` are right; none means that it is no fault; `allowed` are no error besides."""

    name: str
    act: Act
    undo: Act = _nothing
    verdicts: frozenset[str] = frozenset()
    allowed: frozenset[str] = frozenset()
    replica: str = ""                # that it befalls; "" is the whole deployment
    duration_s: float = EVENT_S
    limits: Limits = LIMITS
    context: int = CONTEXT
    apart: bool = False              # its delay is reported apart
    starts_over: bool = False        # at first preemption

    def onset_s(self, stage: Stage) -> float:
        """When it can be seen at first."""
        if self.name == "overload_ramp":
            return WARM_S + self.duration_s * (1.0 - LOAD) / (RAMP_TO - LOAD)
        if self.starts_over:
            return math.inf if stage.preempted_s is None else max(WARM_S, stage.preempted_s)
        return WARM_S


RAMP_TO = 2.0
VICTIM = "replica-1"


def _victim(stage: Stage) -> Engine:
    return stage.engines[1]


def _throttle(factor: float) -> tuple[Act, Act]:
    def act(stage: Stage, elapsed_s: float) -> None:
        stage.slow(_victim(stage), factor)
        _victim(stage).throttle_reasons, _victim(stage).clock_mhz = HOT, CLOCK_MHZ / factor

    def undo(stage: Stage, elapsed_s: float) -> None:
        stage.slow(_victim(stage), 1.0)
        _victim(stage).throttle_reasons, _victim(stage).clock_mhz = 0, CLOCK_MHZ

    return act, undo


def _slow(factor: float) -> tuple[Act, Act]:
    return (lambda stage, _: stage.slow(_victim(stage), factor)), (lambda stage, _: stage.slow(_victim(stage), 1.0))


def _co_runner(stage: Stage, elapsed_s: float) -> None:
    if elapsed_s % 10 == 0:
        stage.slow(_victim(stage), float(stage.draw.uniform(1.4, 2.6)))


def _load(value: float) -> Act:
    def act(stage: Stage, elapsed_s: float) -> None:
        stage.load = value

    return act


def _ramp(stage: Stage, elapsed_s: float) -> None:
    stage.load = LOAD + (RAMP_TO - LOAD) * elapsed_s / EVENT_S


def _season(stage: Stage, elapsed_s: float) -> None:
    stage.load = LOAD + 0.15 * math.sin(2 * math.pi * elapsed_s / EVENT_S)


def _burst(stage: Stage, elapsed_s: float) -> None:
    stage.load = 1.5 if elapsed_s < 6 else LOAD


def _hang(blind: bool) -> tuple[Act, Act]:
    def act(stage: Stage, elapsed_s: float) -> None:
        _victim(stage).hung, _victim(stage).blind = True, blind

    def undo(stage: Stage, elapsed_s: float) -> None:
        _victim(stage).hung = False
        _victim(stage).restart(after_s=5.0)
        stage.slow(_victim(stage), 1.0)

    return act, undo


def _crash(stage: Stage, elapsed_s: float) -> None:
    if elapsed_s % 30 == 0:
        _victim(stage).restart(after_s=12.0)
        stage.slow(_victim(stage), 1.0)


def _fail(share: float) -> Act:
    def act(stage: Stage, elapsed_s: float) -> None:
        _victim(stage).failing = share

    return act


def _leak(stage: Stage, elapsed_s: float) -> None:
    _victim(stage).leak(KV_BLOCKS // 60)


def _heal_leak(stage: Stage, elapsed_s: float) -> None:
    _victim(stage).restart(after_s=5.0)
    stage.slow(_victim(stage), 1.0)


def _longer_answers(stage: Stage, elapsed_s: float) -> None:
    stage.output_factor, stage.load = 6.0, 0.25


def _shorter_answers(stage: Stage, elapsed_s: float) -> None:
    stage.output_factor, stage.load = 1.0, LOAD


def _mix(prompt: float, load: float) -> tuple[Act, Act]:
    def act(stage: Stage, elapsed_s: float) -> None:
        stage.prompt_factor, stage.load = prompt, load

    def undo(stage: Stage, elapsed_s: float) -> None:
        stage.prompt_factor, stage.load = 1.0, LOAD

    return act, undo


def _cut_off(stage: Stage, elapsed_s: float) -> None:
    stage.unreachable.add(_victim(stage).node)


def _reach(stage: Stage, elapsed_s: float) -> None:
    stage.unreachable.clear()


def _deploy(stage: Stage, elapsed_s: float) -> None:
    stage.load = 0.4
    if elapsed_s % 35 == 0 and elapsed_s // 35 < REPLICAS:
        engine = stage.engines[int(elapsed_s // 35)]
        engine.restart(after_s=25.0)
        stage.slow(engine, 1.0)


def _cold_start(stage: Stage, elapsed_s: float) -> None:
    if elapsed_s == 0:
        _victim(stage).restart(after_s=60.0)
    # Kernels are compiled and caches filled at first.
    stage.slow(_victim(stage), 1.8 if 60 <= elapsed_s < 70 else 1.0)


def _long_prefill(stage: Stage, elapsed_s: float) -> None:
    if elapsed_s % 50 == 0:
        _victim(stage).ask(prompt_tokens=110_000, output_tokens=20)


def _gaps(stage: Stage, elapsed_s: float) -> None:
    stage.lost_share = 0.3


def _no_gaps(stage: Stage, elapsed_s: float) -> None:
    stage.lost_share = LOST_SHARE


def _adopt(stage: Stage, elapsed_s: float) -> None:
    if elapsed_s % 50 == 0:
        for engine in stage.engines:
            engine.adopt()


_DEGRADED, _OVERLOADED = frozenset({"DEGRADED"}), frozenset({"OVERLOADED"})
_MISCONFIGURED = frozenset({"MISCONFIGURED"})
_LONG = replace(LIMITS, max_num_batched_tokens=131_072)


def _on_victim(name: str, acts: tuple[Act, Act], **more: object) -> Incident:
    act, undo = acts
    return replace(Incident(name=name, act=act, undo=undo, verdicts=_DEGRADED, replica=VICTIM), **more)  # type: ignore[arg-type]


INCIDENTS: tuple[Incident, ...] = (
    Incident(name="overload_step", act=_load(1.6), undo=_load(LOAD), verdicts=_OVERLOADED),
    # A trace's bursts reach capacity a little before its mean does.
    Incident(name="overload_ramp", act=_ramp, undo=_load(LOAD), verdicts=_OVERLOADED, allowed=_OVERLOADED),
    Incident(name="idle", act=_load(0.0), undo=_load(LOAD), verdicts=frozenset({"UNDERUSED"}), apart=True),
    _on_victim("throttle_1.2", _throttle(1.2), apart=True),
    _on_victim("throttle_1.5", _throttle(1.5)),
    _on_victim("throttle_2", _throttle(2.0)),
    _on_victim("throttle_3", _throttle(3.0)),
    _on_victim("slow_gpu_of_group", _slow(1.7)),
    _on_victim("co_runner", (_co_runner, _slow(1.0)[0])),
    _on_victim("hung", _hang(blind=False)),
    _on_victim("hung_blind", _hang(blind=True)),
    _on_victim("crash_loop", (_crash, _nothing)),
    _on_victim("failing", (_fail(0.6), _fail(0.0))),
    _on_victim(
        "leak", (_leak, _heal_leak), verdicts=_DEGRADED | _MISCONFIGURED, apart=True, starts_over=True
    ),
    Incident(
        name="kv_misconfiguration", act=_longer_answers, undo=_shorter_answers, verdicts=_MISCONFIGURED,
        limits=replace(LIMITS, num_blocks=2500), starts_over=True,
    ),
    Incident(
        name="batch_misconfiguration", act=_load(0.6), undo=_load(0.03), verdicts=_MISCONFIGURED,
        limits=replace(LIMITS, max_num_seqs=3),
    ),
    Incident(name="network_loss", act=_cut_off, undo=_reach, verdicts=frozenset({"UNKNOWN"}), replica=VICTIM),
    Incident(name="longer_prompts", act=_mix(3.0, LOAD / 2.5)[0], undo=_mix(3.0, LOAD)[1]),
    Incident(name="shorter_prompts", act=_mix(0.3, LOAD)[0], undo=_mix(0.3, LOAD)[1]),
    Incident(name="season", act=_season, undo=_load(LOAD)),
    Incident(name="short_burst", act=_burst, undo=_load(LOAD), allowed=_OVERLOADED),
    Incident(name="deploy", act=_deploy, undo=_load(LOAD)),
    Incident(name="cold_start", act=_cold_start),
    Incident(name="long_prefill", act=_long_prefill, limits=_LONG, context=131_072, allowed=_OVERLOADED),
    Incident(name="frame_gaps", act=_gaps, undo=_no_gaps),
    Incident(name="agent_restarts", act=_adopt),
    Incident(name="nothing", act=_nothing),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """One incident in one world, as it was seen."""

    setting: Setting
    incident: Incident
    seed: int
    told: list[Watched]
    placements: list[Placement]
    onset_s: float
    end_s: float
    recovered_s: float
    capacity_rps: float
    requests: int
    loads: tuple[float, ...]         # by second, of the capacity


def play(setting: Setting, incident: Incident, *, seed: int, capacity_rps: float) -> Played:
    """Let it happen and watch."""
    cluster = stage(
        setting, seed=seed, capacity_rps=capacity_rps, limits=incident.limits, context=incident.context
    )
    if incident.name == "batch_misconfiguration":
        cluster.load = 0.03
    if incident.name == "kv_misconfiguration":
        cluster.load = 0.2
    watch = FleetWatch(FoldSettings(bounds=BOUNDS))
    placements = cluster.placements()
    watch.place(placements)
    watch.expect({each.name: setting.believed for each in cluster.engines})
    told: list[Watched] = []
    end_s = WARM_S + incident.duration_s
    while cluster.now_s < end_s + TAIL_S:
        elapsed_s = cluster.now_s - WARM_S
        if 0 <= elapsed_s < incident.duration_s:
            incident.act(cluster, elapsed_s)
        elif elapsed_s == incident.duration_s:
            incident.undo(cluster, elapsed_s)
        for node, data in cluster.passing():
            watch.add(received(node, data), now_s=cluster.now_s)
        told += watch.close(cluster.now_s)
    return Played(
        setting=setting, incident=incident, seed=seed, told=told, placements=placements,
        onset_s=incident.onset_s(cluster), end_s=end_s, recovered_s=cluster.queued_s, capacity_rps=capacity_rps,
        requests=cluster.sent_requests, loads=tuple(cluster.loads),
    )  # fmt: skip

