"""How well live capacity is read from telemetry: n_limit, the saturation point, and who is called saturated wrongly.

Simulated frames: the scheduler of `enova_recommender.engine` serves Poisson arrivals at loads below, at and above what
it carries, for several step-time models, batch limits and length mixes, with some frames missing. Its truth is a run
that never lacks waiting requests. In closed loops the number of users grows step by step and nobody ever waits:
overloaded are those that go on where the rate no longer grows (truth: the rate with the most users). Recorded frames:
part A of `vllm_runs` (truth: finished per second while requests waited, at the highest scale; scales of at most 200
are not overloaded) and part B (truth: the same of the run itself, over its whole queue, so only how soon the answer
comes and how far it is off before the end count). Part A has no licence and is never shipped: the default run uses
the simulated frames and one run of part B.

Each run is looked at again and again while it grows, as a coordinator would; `frames_p50` is the median number of
frames from the onset of overload until the first answer. `false_saturated_share` counts runs that are not overloaded
and end in an answer, `false_saturated_ever_share` those in which any look gave one.

Raw results: `looks.csv.gz` (source, run, load, seed, overloaded, frames, saturated, evidence, n_limit_rps, low, high,
saturation_load, max_num_seqs, true_rps, true_load).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from enova_recommender import catalog
from enova_recommender.engine import Finished, Limits, Request, Scheduler
from enova_recommender.memory import fit
from enova_recommender.performance import Affine, Roofline, Slowed, StepTimes
from enova_recommender.recommend.live import LiveCapacity, ReplicaFrames, live_capacity
from enova_recommender.types import Parallelism
from enova_testing.benchmark import Benchmark, benchmark, read_rows, wilson

Floats = npt.NDArray[np.float64]

BELOW, AT, ABOVE = (0.5, 0.7, 0.8), (1.0,), (1.25, 1.6, 2.5)
SEEDS = 3
FULL_SEEDS = 10
SERVICE_TIMES = 40       # that a run lasts
INTERVALS_MIN = 200
REQUESTS_MAX = 12_000    # of a run
MISSING_SHARE = 0.03     # of frames
LOOKS = 20               # at a run while it grows
TRUTH_REQUESTS = 15_000  # that the truth is read from
USERS_MAX, USER_STEPS = 400, 10
STEP_REQUESTS, STEP_INTERVALS = 400, 20  # that a step of users lasts at least
LOOKS_A_FRAME = 10       # moments at which users ask again
OVERLOADED_SCALE_MIN = 400   # part A, as measure.md has it
OVERLOADED_WAIT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """An engine and the lengths of what it is asked."""

    name: str
    times: StepTimes
    limits: Limits
    prompt_tokens: float   # medians of lognormal lengths
    output_tokens: float
    sigma: float = 0.8
    interval_s: float = 1.0

    def lengths(self, draw: np.random.Generator) -> tuple[int, int]:
        """One request's prompt and output tokens."""
        prompt = int(draw.lognormal(np.log(self.prompt_tokens), self.sigma))
        output = int(draw.lognormal(np.log(self.output_tokens), self.sigma))
        return min(max(prompt, 1), 6000), min(max(output, 2), 2000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What a world carries, its batch then, and how long a request is in it."""

    rate_rps: float
    load: float
    service_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Frames and what is known of them."""

    source: str
    name: str
    load: float            # in multiples of the capacity, or the scale of a recording
    seed: int
    overloaded: bool | None  # None: at the limit, neither right nor wrong
    onset: int             # first frame of overload
    frames: ReplicaFrames
    true_rps: float
    true_load: float | None  # None where the rate ends to grow little by little


def worlds() -> list[World]:
    """Step times from data sheets and of other forms; batches bound by their limit, by KV blocks, by prompts."""
    models, gpus = catalog.models(), catalog.gpus()
    small, large = models["meta-llama/Llama-3.1-8B-Instruct"], models["meta-llama/Llama-3.1-70B-Instruct"]
    four = Parallelism(tensor=4)
    h100, l4 = (fit(small, gpus[name]).kv_blocks for name in ("H100", "L4"))
    a100 = fit(large, gpus["A100-80G"], parallelism=four).kv_blocks
    slow = Slowed(times=Roofline(small, gpus["H100"]), factor=3.0)
    plain = Affine(base_s=0.02, prefill_token_s=8e-5, sequence_s=2e-4, context_token_s=5e-8)
    roofline = Roofline(small, gpus["H100"])
    return [
        World(name="8B on H100, 64 sequences", times=roofline, prompt_tokens=500, output_tokens=200,
              limits=Limits(num_blocks=h100, max_num_seqs=64)),
        World(name="8B on H100, 256 sequences", times=roofline, prompt_tokens=800, output_tokens=250,
              limits=Limits(num_blocks=h100, max_num_seqs=256)),
        World(name="8B slowed, 128 sequences", times=slow, prompt_tokens=300, output_tokens=300,
              limits=Limits(num_blocks=h100, max_num_seqs=128)),
        World(name="70B on 4 A100", times=Roofline(large, gpus["A100-80G"], parallelism=four), prompt_tokens=700,
              output_tokens=300, limits=Limits(num_blocks=a100, max_num_seqs=128), interval_s=2.0),
        World(name="8B on L4, bound by blocks", times=Roofline(small, gpus["L4"]), prompt_tokens=900,
              output_tokens=300, limits=Limits(num_blocks=l4, max_num_seqs=256), interval_s=2.0),
        World(name="affine, long prompts", times=plain, prompt_tokens=2500, output_tokens=40,
              limits=Limits(num_blocks=100_000, max_num_seqs=128, max_num_batched_tokens=2048)),
        World(name="affine, 32 sequences", times=plain, prompt_tokens=200, output_tokens=150,
              limits=Limits(num_blocks=100_000, max_num_seqs=32)),
        World(name="8B on H100, frames of 15 s", times=slow, prompt_tokens=500, output_tokens=400,
              limits=Limits(num_blocks=h100, max_num_seqs=96), interval_s=15.0),
    ]  # fmt: skip


def serve(world: World, arrivals_s: Floats, *, seed: int, intervals: int) -> ReplicaFrames:
    """Frames of a run with these arrivals."""
    draw = np.random.default_rng(seed)
    scheduler = Scheduler(world.limits, world.times)
    arrived: dict[str, float] = {}
    for index, at_s in enumerate(arrivals_s.tolist()):
        prompt, output = world.lengths(draw)
        arrived[str(index)] = at_s
        scheduler.submit(Request(id=str(index), prompt_tokens=prompt, output_tokens=output), at_s)
    columns = np.full((4, intervals), np.nan)
    for step in range(intervals):
        events = scheduler.advance((step + 1) * world.interval_s)
        latencies = [one.at_s - arrived[one.request.id] for one in events if isinstance(one, Finished)]
        columns[:3, step] = len(latencies), scheduler.running, scheduler.waiting
        if latencies:
            columns[3, step] = np.mean(latencies)
    columns[:, draw.random(intervals) < MISSING_SHARE] = np.nan
    return ReplicaFrames(
        interval_s=world.interval_s, finished=columns[0], running=columns[1], waiting=columns[2], latency_s=columns[3]
    )


def truth_of(world: World) -> Truth:
    """Rate and batch of a run that never lacks waiting requests."""
    draw = np.random.default_rng(0)
    scheduler = Scheduler(world.limits, world.times)
    for index in range(TRUTH_REQUESTS):
        prompt, output = world.lengths(draw)
        scheduler.submit(Request(id=str(index), prompt_tokens=prompt, output_tokens=output), 0.0)
    samples: list[tuple[float, int, int]] = []  # time, finished so far, running
    finished = 0
    while (at_s := scheduler.next_event()) < float("inf"):
        events = scheduler.advance(at_s)
        finished += sum(isinstance(event, Finished) for event in events)
        if scheduler.waiting == 0:
            break
        samples.append((at_s, finished, scheduler.running))
    settled = samples[len(samples) // 4 :]
    (first_s, first, _), (last_s, last, _) = settled[0], settled[-1]
    rate, running = (last - first) / (last_s - first_s), float(np.median([sample[2] for sample in settled]))
    return Truth(rate_rps=rate, load=running, service_s=running / rate)


def simulated(run: Benchmark) -> Iterator[Run]:
    """All worlds, loads and seeds."""
    for world in worlds():
        truth = truth_of(world)
        span_s = max(SERVICE_TIMES * truth.service_s, INTERVALS_MIN * world.interval_s)
        span_s = min(span_s, max(INTERVALS_MIN * world.interval_s, REQUESTS_MAX / max(ABOVE) / truth.rate_rps))
        intervals = int(span_s / world.interval_s)
        for load in (*BELOW, *AT, *ABOVE):
            for seed in range(run.seed, run.seed + (FULL_SEEDS if run.full else SEEDS)):
                rate = load * truth.rate_rps
                gaps = np.random.default_rng([seed, round(100 * load)]).exponential(1 / rate, int(rate * span_s) + 1)
                yield Run(
                    source="simulated", name=world.name, load=load, seed=seed,
                    overloaded=None if load in AT else load in ABOVE, onset=0,
                    frames=serve(world, np.cumsum(gaps), seed=seed, intervals=intervals),
                    true_rps=truth.rate_rps, true_load=truth.load,
                )  # fmt: skip


def ramps() -> list[tuple[World, float]]:
    """Closed loops of ever more users, and how far they go as a share of the most."""
    models, gpus = catalog.models(), catalog.gpus()
    small = models["meta-llama/Llama-3.1-8B-Instruct"]
    many = Limits(num_blocks=1_000_000, max_num_seqs=1024)
    plain = Affine(base_s=0.02, prefill_token_s=8e-5, sequence_s=2e-3, context_token_s=2e-7)
    found = [
        World(name="users on affine steps", times=plain, limits=many, prompt_tokens=200, output_tokens=100, sigma=0.5),
        World(name="users on 8B, H100", times=Roofline(small, gpus["H100"]), limits=many, prompt_tokens=3000,
              output_tokens=60, sigma=0.5),
    ]  # fmt: skip
    return [(world, share) for world in found for share in (0.03, 1.0)]


def closed_loops(run: Benchmark) -> Iterator[Run]:
    """Users that ask again as soon as they are answered, more of them step by step."""
    for world, share in ramps():
        steps = np.unique(np.geomspace(1, USERS_MAX * share, USER_STEPS).astype(int))
        for seed in range(run.seed, run.seed + (FULL_SEEDS if run.full else SEEDS)):
            frames = _ask(world, steps, seed=seed)
            last = frames.measured & (np.arange(len(frames.finished)) >= len(frames.finished) * (1 - 0.5 / len(steps)))
            yield Run(
                source="closed loop", name=world.name, load=share, seed=seed, overloaded=share == 1.0, onset=0,
                frames=frames, true_rps=float(frames.finished[last].mean() / frames.interval_s), true_load=None,
            )  # fmt: skip


def _ask(world: World, steps: npt.NDArray[np.int_], *, seed: int) -> ReplicaFrames:
    """Frames while each step of users lasts for STEP_REQUESTS answers and at least STEP_INTERVALS."""
    draw = np.random.default_rng(seed)
    scheduler = Scheduler(world.limits, world.times)
    arrived: dict[str, float] = {}
    rows: list[tuple[float, float, float, float]] = []
    now_s, answered = 0.0, 0
    for users in steps.tolist():
        done, intervals = 0, 0
        while done < STEP_REQUESTS or intervals < STEP_INTERVALS:
            latencies: list[float] = []
            for _ in range(LOOKS_A_FRAME):
                for _ in range(users - (len(arrived) - answered)):
                    prompt, output = world.lengths(draw)
                    name = str(len(arrived))
                    arrived[name] = now_s
                    scheduler.submit(Request(id=name, prompt_tokens=prompt, output_tokens=output), now_s)
                now_s += world.interval_s / LOOKS_A_FRAME
                ended = [one for one in scheduler.advance(now_s) if isinstance(one, Finished)]
                answered += len(ended)
                latencies += [one.at_s - arrived[one.request.id] for one in ended]
            mean = float(np.mean(latencies)) if latencies else float("nan")
            rows.append((len(latencies), scheduler.running, scheduler.waiting, mean))
            done, intervals = done + len(latencies), intervals + 1
    columns = np.array(rows, dtype=np.float64).T
    columns[:, draw.random(columns.shape[1]) < MISSING_SHARE] = np.nan
    return ReplicaFrames(
        interval_s=world.interval_s, finished=columns[0], running=columns[1], waiting=columns[2], latency_s=columns[3]
    )


def recorded_a(run: Benchmark) -> Iterator[Run]:
    """Part A: one run for each scale; the highest one is the truth of the others."""
    for path in run.files("vllm_runs", "*_engine.csv.gz"):
        prefix = path.name.removesuffix("_engine.csv.gz")
        engine = _by_scale(path)
        requests = _by_scale(path.with_name(f"{prefix}_requests.csv.gz"))
        built = {scale: _frames_a(rows, requests[scale]) for scale, rows in engine.items() if scale in requests}
        top = built[max(built)]
        waited = top.measured & (top.waiting > 0)
        rate = float(top.finished[waited].mean() / top.interval_s)
        load = float(np.median(top.running[waited]))
        for scale, frames in sorted(built.items())[:-1]:
            overloaded = scale >= OVERLOADED_SCALE_MIN
            onset = int(np.flatnonzero(frames.waiting > 0)[0]) if overloaded else 0
            yield Run(
                source="part A", name=prefix, load=scale, seed=0, onset=onset, frames=frames, true_rps=rate,
                overloaded=overloaded, true_load=load,
            )  # fmt: skip


def _by_scale(path: Path) -> dict[float, list[Mapping[str, str]]]:
    groups: dict[float, list[Mapping[str, str]]] = {}
    for row in read_rows(path):
        groups.setdefault(float(row["scale"]), []).append(row)
    return groups


def _frames_a(engine: Sequence[Mapping[str, str]], requests: Sequence[Mapping[str, str]]) -> ReplicaFrames:
    """Half-second samples put on a grid of whole seconds; a second without a sample is missing."""
    ended = np.array([float(row["t_s"]) for row in requests])
    latency = np.array([float(row["total_chunk_time"]) for row in requests])
    at_s = np.array([float(row["t_s"]) for row in engine])
    return _on_grid(
        at_s, np.array([float(row["num_running"]) for row in engine]),
        np.array([float(row["num_pending"]) for row in engine]), ended, latency,
    )  # fmt: skip


def _on_grid(at_s: Floats, running: Floats, waiting: Floats, ended_s: Floats, latency_s: Floats) -> ReplicaFrames:
    count = int(at_s.max()) + 1
    columns = np.full((4, count), np.nan)
    for index in range(count):
        seen = np.flatnonzero((at_s >= index) & (at_s < index + 1))
        done = (ended_s >= index) & (ended_s < index + 1)
        if len(seen):
            columns[:3, index] = done.sum(), running[seen[-1]], waiting[seen[-1]]
            columns[3, index] = latency_s[done].mean() if done.any() else np.nan
    return ReplicaFrames(
        interval_s=1.0, finished=columns[0], running=columns[1], waiting=columns[2], latency_s=columns[3]
    )


def recorded_b(run: Benchmark) -> Iterator[Run]:
    """Part B: overloaded from the first second that begins ten with waiting requests."""
    for path in run.files("vllm_runs", "*_timeseries.csv.gz"):
        rows = list(read_rows(path))
        requests = list(read_rows(path.with_name(path.name.replace("_timeseries", "_requests"))))
        ended, begun = (np.array([float(row[key]) for row in requests]) for key in ("last_token_s", "queued_s"))
        frames = _on_grid(
            np.array([float(row["t"]) for row in rows]), np.array([float(row["running"]) for row in rows]),
            np.array([float(row["waiting"]) for row in rows]), ended, ended - begun,
        )  # fmt: skip
        waited = frames.measured & (frames.waiting > 0)
        if waited.sum() < OVERLOADED_WAIT_S:
            continue
        yield Run(
            source="part B", name=path.name.removesuffix("_timeseries.csv.gz"), load=0.0, seed=0, overloaded=True,
            onset=int(np.flatnonzero(waited)[0]), frames=frames,
            true_rps=float(frames.finished[waited].mean()), true_load=float(np.median(frames.running[waited])),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was seen of a run at one moment: a row of the raw results."""

    source: str
    run: str
    load: float
    seed: int
    overloaded: bool | None
    onset: int
    frames: int
    last: bool
    saturated: bool
    evidence: str
    n_limit_rps: float | None
    low: float | None
    high: float | None
    saturation_load: float | None
    max_num_seqs: int | None
    true_rps: float
    true_load: float | None  # None where the rate ends to grow little by little

    @property
    def whole(self) -> tuple[str, str, float, int]:
        """The run that it belongs to."""
        return self.source, self.run, self.load, self.seed


def looks_at(run: Run) -> list[Look]:
    """A row for each look at the run while it grows."""
    total = len(run.frames.finished)
    sizes = sorted({round(total * (look + 1) / LOOKS) for look in range(LOOKS)})
    rows = []
    for size in sizes:
        cut = replace(
            run.frames, finished=run.frames.finished[:size], running=run.frames.running[:size],
            waiting=run.frames.waiting[:size], latency_s=run.frames.latency_s[:size],
        )  # fmt: skip
        answer = live_capacity([cut])
        found = answer if isinstance(answer, LiveCapacity) else None
        rows.append(Look(
            source=run.source, run=run.name, load=run.load, seed=run.seed, overloaded=run.overloaded,
            onset=run.onset, frames=size, last=size == total, saturated=found is not None,
            evidence=answer.evidence if isinstance(answer, LiveCapacity) else answer.doubt,
            n_limit_rps=found.n_limit_rps.value if found else None,
            low=found.n_limit_rps.low if found else None, high=found.n_limit_rps.high if found else None,
            saturation_load=found.saturation_load.value if found else None,
            max_num_seqs=found.max_num_seqs if found else None, true_rps=run.true_rps, true_load=run.true_load,
        ))  # fmt: skip
    return rows


def figures_of(rows: Sequence[Look]) -> dict[str, object]:
    """The figures of a set of looks."""
    ends = [row for row in rows if row.last]
    over = [row for row in ends if row.overloaded is True]
    found = [row for row in over if row.saturated]
    quiet = [row for row in ends if row.overloaded is False]
    wrong = [row for row in quiet if row.saturated]
    ever = {row.whole for row in rows if row.overloaded is False and row.saturated}
    first: dict[object, int] = {}
    for row in rows:
        if row.overloaded is True and row.saturated:
            first.setdefault(row.whole, row.frames - row.onset)
    errors = [_error(row.n_limit_rps, row.true_rps) for row in found]
    loads = [_error(row.saturation_load, row.true_load) for row in found if row.true_load is not None]
    inside = [row for row in found if (row.low or 0.0) <= row.true_rps <= (row.high or 0.0)]
    return {
        "n_limit_ape_p50": _quantile(errors, 0.5),
        "n_limit_ape_p90": _quantile(errors, 0.9),
        "saturation_load_ape_p50": _quantile(loads, 0.5),
        "coverage80": _share(len(inside), len(found)),
        "frames_p50": _quantile(list(first.values()), 0.5),
        "answered_share": _share(len(found), len(over)),
        "false_saturated_share": _share(len(wrong), len(quiet)),
        "false_saturated_interval": wilson(len(wrong), len(quiet)),
        "false_saturated_ever_share": _share(len(ever), len(quiet)),
        "runs": len(ends),
    }


def _error(value: float | None, wanted: float) -> float:
    return abs((value or 0.0) - wanted) / wanted


def _quantile(values: Sequence[float], share: float) -> float | None:
    return float(np.quantile(values, share)) if values else None


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def main() -> None:
    """Run it."""
    run = benchmark("recommender_live", __doc__)
    sources = (simulated, closed_loops, recorded_a, recorded_b)
    rows = [row for source in sources for one in source(run) for row in looks_at(one)]
    run.write("looks", [asdict(row) for row in rows])
    by_source = {name: figures_of([row for row in rows if row.source == name])
                 for name in sorted({row.source for row in rows})}
    by_run = {f"{source}: {name}": figures_of([row for row in rows if (row.source, row.run) == (source, name)])
              for source, name in sorted({(row.source, row.run) for row in rows})}
    run.table("Live capacity", [
        {"frames of": name, **{key: value for key, value in figures.items() if not key.endswith("interval")}}
        for name, figures in {**by_source, **by_run}.items()
    ])
    run.end({**figures_of(rows), "by_source": by_source})


if __name__ == "__main__":
    main()
