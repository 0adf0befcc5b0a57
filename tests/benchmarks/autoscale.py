"""Every scaling policy on production traces, at five values of its knob, against the bound that knows the future.

What is replayed is in `scenarios.toml`. By default one smooth trace (starts of 60 s and 300 s) and one bursty (120 s),
in worlds (a) and (b), each a window of half an hour (10 minutes of it warm-up) of the steepest change, at a density at
which the lower bound's 99th percentile is 6 replicas; with FULL=1 all traces, windows of an hour, 20 replicas and five
seeds, which takes days of one core: runs that are in `--out` are not repeated. POLICIES=a,b, TRACES=a,b and WORLDS=a
choose some.

Held equal between policies: arrivals, router, configuration, fleet, bounds, replicas at the beginning (1.2 x what the
load of then needs), start-ups and slowness by the number of a replica, metric delay, the capacity that policies are
told (the recommender's, which knows no world) and the history before the window. `cron`, `static-peak` and
`static-mean` know the load of the window itself, as published they would know a past one. Cost is in dollars, list
price, start-ups included. LB: `scaling.lower_bound` over what comes after the warm-up, at the attainment that is asked,
with the capacity that a replica has among as many as are wanted (one alone carries less: routing evens out what comes).

Raw results: `runs.csv.gz` (a row a run: trace, world, start_up_s, seed, policy, knob, attainment, gpu_hours, cost_usd,
ttft_p50_s, ttft_p99_s, worst_5_minutes, direction_changes_per_hour, acts, refused, cut, open, lb_usd),
`replicas.csv.gz` (the same keys, t_s, holding, ready by 30 s).
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from enova_recommender.scaling.bounds import Bounds
from enova_recommender.scaling.enova import EnovaPolicy
from enova_recommender.scaling.lower_bound import Programme, lower_bound, work_by_step
from enova_recommender.scaling.peers.static import static_mean, static_peak
from enova_recommender.scaling.policies import KNOBS, PEERS
from enova_recommender.scaling.situation import Objective, Policy
from enova_recommender.scaling.types import EngineSizes, GpuFacts, ModelFacts
from enova_recommender.types import Interval
from enova_simulator.cluster.capacity import believed, goodput, variant_of
from enova_simulator.cluster.engines import Requests
from enova_simulator.cluster.fleet import Fleet
from enova_simulator.cluster.outcome import figures, replicas_over_time
from enova_simulator.cluster.setup import DeploymentSetup, Facts, FleetSetup, Telemetry, Traffic, pool_of
from enova_simulator.cluster.startups import Lognormal
from enova_simulator.cluster.trace import Rows, requests_of
from enova_simulator.cluster.worlds import Engine, World, engine
from enova_testing.benchmark import Benchmark, benchmark
from enova_testing.scaling_scores import cost_at, gap_closed
from enova_testing.scaling_traces import GRID_S, Trace, Window, source, windows

SCENARIOS = tomllib.loads((Path(__file__).parent / "scenarios.toml").read_text())
USUAL, FULL = SCENARIOS["usual"], SCENARIOS["full"]
OBJECTIVE = Objective(ttft_s=USUAL["ttft_s"], tpot_s=USUAL["tpot_s"])
WARM_UP_S = 600.0
TAIL_S = 60.0              # at the end, that is not judged: its requests may still run
MARGIN = 1.2
ENOVA_KNOBS = (0.5, 0.75, 1.0, 1.5, 2.0)
ASKED = {"smooth": 0.99, "bursty": 0.97, "sparse": 0.97}
PRIOR_SIGMA = 0.3          # of the told capacity, where the recommender says that nothing holds the objective
LB_LIMIT_S = 20.0
LB_GAP = 1e-3
DENSITY_GAP = 0.1          # found long before the time limit, so that the density does not hang on the machine
GOODPUT_REQUESTS = 3000
LEFT_OUT = {"cron": "needs days of history, which one window of one trace has not"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What all policies of a comparison are run on."""

    trace: str
    kind: str
    world: str
    start_up_s: float
    seed: int
    data: str
    full: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run."""

    ground: Ground
    policy: str
    knob: float

    @property
    def key(self) -> str:
        """What it is remembered by."""
        on = self.ground
        return f"{on.trace}|{on.world}|{on.start_up_s:g}|{on.seed}|{self.policy}|{self.knob:g}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Laid:
    """A ground with everything laid out."""

    requests: Requests
    setup: FleetSetup
    lb_usd: Mapping[str, float]            # by the attainment that is asked
    factor: float
    peak_rps: float
    mean_rps: float


@lru_cache(maxsize=4)
def _engine(world: str, seed: int) -> Engine:
    named = SCENARIOS["worlds"][world]
    return engine(
        World(world), model=named["model"], gpu=named["gpu"], tensor_parallel=named["tensor_parallel"], seed=seed,
        max_num_batched_tokens=named["max_num_batched_tokens"],
    )


@lru_cache(maxsize=4)
def _window(name: str, data: str, seed: int, full: bool) -> Window | None:
    trace = next(one for one in traces() if one.name == name)
    found = source(trace, Path(data), seed=seed)
    if found is None:
        return None
    chosen = windows(found, window_s=(FULL if full else USUAL)["window_s"], count=1)
    return chosen[0] if chosen else None


@lru_cache(maxsize=8)
def _carried(ground: Ground, asked: float) -> float:
    """Requests a second of one replica among as many as are wanted, at the attainment that is asked."""
    window = _window(ground.trace, ground.data, ground.seed, ground.full)
    assert window is not None
    return goodput(
        _engine(ground.world, ground.seed), window.source.lengths, replace(OBJECTIVE, attainment=asked),
        seed=ground.seed, requests=GOODPUT_REQUESTS, replicas=(FULL if ground.full else USUAL)["replicas"],
    )


@lru_cache(maxsize=2)
def laid(ground: Ground) -> Laid:
    """The fleet, the requests at the wanted density, and the lower bounds."""
    window = _window(ground.trace, ground.data, ground.seed, ground.full)
    assert window is not None
    one = _engine(ground.world, ground.seed)
    carried = _carried(ground, OBJECTIVE.attainment)
    wanted = (FULL if ground.full else USUAL)["replicas"]
    factor = wanted * carried / max(1e-9, float(np.quantile(window.counts, 0.99)) / GRID_S)
    shape = _bound(factor * window.counts, carried, ground.start_up_s, 0.99, gap=DENSITY_GAP)
    factor *= wanted / max(1.0, float(np.quantile(shape[1], 0.99)))        # the load's own percentile is near
    rows = window.requests(factor, seed=ground.seed)
    rows = _fitting(rows, one)
    counts = np.bincount((rows.arrival_s // GRID_S).astype(int), minlength=len(window.counts)).astype(np.float64)
    prices = one.gpu.cost_per_hour(one.gpus)
    bounds = {
        f"{asked:g}": _bound(counts, _carried(ground, asked), ground.start_up_s, asked)[0] * prices
        for asked in sorted(set(ASKED.values()))
    }
    return Laid(
        requests=requests_of(rows), lb_usd=bounds, factor=factor,
        setup=_setup(ground, window, one, counts=counts, factor=factor, carried=carried),
        peak_rps=float(counts.max()) / GRID_S, mean_rps=float(counts.mean()) / GRID_S,
    )


def _fitting(rows: Rows, one: Engine) -> Rows:
    """Without the requests that no engine of this world holds."""
    most = one.kv_tokens // 2
    return rows.chosen(np.flatnonzero((rows.prompt_tokens + rows.output_tokens) < most))


def _bound(
    counts: np.ndarray[tuple[int, ...], np.dtype[np.float64]], carried: float, start_s: float, asked: float, *,
    gap: float = LB_GAP,
) -> tuple[float, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """Replica-hours of the lower bound after the warm-up, and its replicas over time."""
    first = round(WARM_UP_S / GRID_S)
    span = slice(first, len(counts) - round(TAIL_S / GRID_S))
    work = work_by_step(
        GRID_S * np.arange(len(counts[span])), horizon_s=GRID_S * len(counts[span]), step_s=GRID_S,
        amounts=counts[span],
    )
    found = lower_bound(Programme(
        work=work, step_s=GRID_S, capacity=carried, start_s=start_s, within_s=OBJECTIVE.ttft_s, attainment=asked,
        time_limit_s=LB_LIMIT_S, gap=gap, min_replicas=USUAL["least_replicas"],
    ))
    return found.hours, found.running


def _setup(
    ground: Ground, window: Window, one: Engine, *, counts: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    factor: float, carried: float,
) -> FleetSetup:
    bounds = Bounds(min_replicas=USUAL["least_replicas"], max_replicas=USUAL["most_replicas"])
    starts = Lognormal(median_s=ground.start_up_s, seed=ground.seed)
    capacity = believed(one, window.source.lengths, OBJECTIVE)
    if capacity.requests_per_s.value <= 0:         # told that nothing holds, nobody would have deployed this
        error = math.exp(PRIOR_SIGMA * float(np.random.default_rng([ground.seed, 13]).standard_normal()))
        value = carried * error
        capacity = replace(capacity, requests_per_s=Interval(value=value, low=value / 1.5, high=value * 1.5))
    variant = variant_of(one, capacity=capacity, start_ups=starts, start_up=starts.prior())
    begun = math.ceil(MARGIN * float(counts[: round(60 / GRID_S)].mean()) / GRID_S / carried)
    deployment = DeploymentSetup(
        name="d", variants=(variant,), targets={variant.name: max(bounds.min_replicas, begun)}, bounds=bounds,
        objective=OBJECTIVE, facts=_facts(one, bounds), history=window.history(factor),
    )
    return FleetSetup(
        gpus={pool_of(variant): variant.gpus * bounds.max_replicas}, deployments=(deployment,),
        end_s=len(counts) * GRID_S, seed=ground.seed, telemetry=Telemetry(delay_s=USUAL["metric_delay_s"]),
    )


def _facts(one: Engine, bounds: Bounds) -> Facts:
    from enova_recommender import catalog

    shape = catalog.models()[one.model]
    return Facts(
        configuration=EngineSizes(
            tensor_parallel_size=one.gpus, gpu_memory_utilization=0.9, max_num_seqs=one.limits.max_num_seqs
        ),
        model=ModelFacts(
            framework="llama", size_billion=round(shape.parameters / 1e9), parameters=shape.parameters,
            kv_elements_per_token=shape.kv_elements_per_token, attention_heads=shape.attention_heads,
            context_tokens=shape.context_tokens,
        ),
        gpu=GpuFacts(count=one.gpus * bounds.max_replicas, memory_bytes=one.gpu.memory_bytes),
    )


def _policy(job: Job, on: Laid) -> Policy:
    factories: Mapping[str, Callable[[float], Policy]] = {
        **PEERS,
        "enova": lambda knob: EnovaPolicy(scale=knob),
        "static-peak": lambda knob: static_peak(knob, rate=on.peak_rps),
        "static-mean": lambda knob: static_mean(knob, rate=on.mean_rps),
    }
    return factories[job.policy](job.knob)


def run(job: Job) -> tuple[dict[str, object], list[dict[str, object]]]:
    """One policy on one ground: its row, and its replicas over time."""
    on = laid(job.ground)
    deployment = replace(on.setup.deployments[0], policy=_policy(job, on))
    setup = replace(on.setup, deployments=(deployment,))
    places = np.zeros(len(on.requests), dtype=np.int64)
    record = Fleet(setup, Traffic(requests=on.requests, deployment=places)).run()
    found = figures(record, "d", until_s=setup.end_s - TAIL_S)
    keys: dict[str, object] = {
        "trace": job.ground.trace, "world": job.ground.world, "start_up_s": job.ground.start_up_s,
        "seed": job.ground.seed, "policy": job.policy, "knob": job.knob,
    }
    told = asdict(found)
    lb = {f"lb_usd_{asked}": value for asked, value in on.lb_usd.items()}
    holding, ready = replicas_over_time(record, "d", step_s=30.0)
    over_time = [
        {**keys, "t_s": 30.0 * place, "holding": int(held), "ready": int(serving)}
        for place, (held, serving) in enumerate(zip(holding, ready, strict=True))
    ]
    return {**keys, "kind": job.ground.kind, "factor": on.factor, **told, **lb}, over_time


def traces() -> list[Trace]:
    """The traces of the scenarios."""
    return [Trace(**one) for one in SCENARIOS["traces"]]


def grounds(bench: Benchmark) -> list[Ground]:
    """What is compared on."""
    chosen = os.environ.get("TRACES", "").split(",") if os.environ.get("TRACES") else None
    found = []
    for trace in traces():
        if (trace.name not in chosen) if chosen else not (trace.default or bench.full):
            continue
        if not bench.files(trace.folder, trace.files):
            continue
        starts = [USUAL["usual_start_up_s"]] if trace.kind != "smooth" else USUAL["start_ups_s"]
        if bench.full:
            starts = sorted({USUAL["usual_start_up_s"], *USUAL["start_ups_s"]})
        for world in os.environ.get("WORLDS", "").split(",") if os.environ.get("WORLDS") else SCENARIOS["worlds"]:
            for start_s in starts:
                found += [
                    Ground(
                        trace=trace.name, kind=trace.kind, world=world, start_up_s=start_s, seed=bench.seed + number,
                        data=str(bench.data), full=bench.full,
                    )
                    for number in range(FULL["seeds"] if bench.full else 1)
                ]
    return found


def jobs(on: Ground) -> list[Job]:
    """All policies with all values of their knobs."""
    chosen = os.environ.get("POLICIES", "").split(",") if os.environ.get("POLICIES") else None
    names = [name for name in ("enova", *PEERS) if name not in LEFT_OUT and (chosen is None or name in chosen)]
    return [
        Job(ground=on, policy=name, knob=knob)
        for name in names for knob in (ENOVA_KNOBS if name == "enova" else KNOBS[name])
    ]


Row = dict[str, object]


def _run_all(part: list[Job]) -> list[tuple[str, Row, list[Row]]]:
    return [(job.key, *run(job)) for job in part]


def main() -> None:
    """Run what is not in the output folder yet, then compare."""
    bench = benchmark("autoscale", __doc__)
    bench.notes.update(LEFT_OUT)
    todo = [job for on in grounds(bench) for job in jobs(on)]
    bench.out.mkdir(parents=True, exist_ok=True)
    kept = bench.out / "kept.jsonl"
    done: dict[str, tuple[Row, list[Row]]] = {}
    if kept.exists():
        for line in kept.read_text().splitlines():
            key, row, over_time = json.loads(line)
            done[key] = row, over_time
    missing = [job for job in todo if job.key not in done]
    # One policy of one ground at a time: a ground is laid once a process and kept.
    parts = [[job for job in missing if (job.ground, job.policy) == key] for key in _keys(missing)]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool, kept.open("a") as file:
        for part in pool.map(_run_all, parts):
            for key, row, over_time in part:
                done[key] = row, over_time
                file.write(json.dumps([key, row, over_time]) + "\n")
            file.flush()
    rows = [done[job.key][0] for job in todo]
    bench.write("runs", rows)
    bench.write("replicas", [each for job in todo for each in done[job.key][1]])
    compared = [_compared(part) for part in _by_ground(rows)]
    bench.table("Cost at the attainment that is asked, against the lower bound", _table(compared))
    found = _figures(compared, rows)
    for key, value in found.items():
        if value is None or value == math.inf:
            bench.notes[key] = "no ground of this kind was run, or a policy in it never reaches the asked attainment"
    bench.end(found)


def _keys(todo: Sequence[Job]) -> list[tuple[Ground, str]]:
    return list(dict.fromkeys((job.ground, job.policy) for job in todo))


def _by_ground(rows: Sequence[Row]) -> Iterator[list[Row]]:
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in ("trace", "world", "start_up_s", "seed")), []).append(row)
    yield from found.values()


def _compared(rows: Sequence[Row]) -> Row:
    """One ground: costs of all policies at the asked attainment, the best baseline, and how far enova gets."""
    first = rows[0]
    asked = ASKED[str(first["kind"])]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(str(row["policy"]), []).append((float(str(row["attainment"])), float(str(row["cost_usd"]))))
    costs = {policy: cost_at(each, asked) for policy, each in points.items()}
    peers = {policy: cost for policy, cost in costs.items() if policy != "enova"}
    best = min(peers, key=lambda policy: peers[policy]) if peers else ""
    baseline, ours = peers.get(best, math.inf), costs.get("enova", math.inf)
    bound = float(str(first[f"lb_usd_{asked:g}"]))
    return {
        "trace": first["trace"], "kind": first["kind"], "world": first["world"], "start_up_s": first["start_up_s"],
        "seed": first["seed"], "asked": asked, "factor": first["factor"], "lb_usd": bound, "enova_usd": ours,
        "enova_vs_lb": ours / bound, "best_baseline": best if math.isfinite(baseline) else None,
        "best_baseline_usd": baseline, "enova_vs_best": ours / baseline if math.isfinite(baseline) else None,
        "gap_closed": gap_closed(baseline, ours, bound), "costs": costs,
    }


def _table(compared: Sequence[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key not in {"costs", "seed", "kind"}} for row in compared]


def _worse_mean(compared: Sequence[Row], key: str, *, kind: str, start_s: float | None = None) -> float | None:
    """The mean over traces and seeds, in the world where it is worse; None where nothing was measured."""
    means = []
    for world in SCENARIOS["worlds"]:
        values = [
            math.inf if (value := row[key]) is None else float(str(value))
            for row in compared
            if row["kind"] == kind and row["world"] == world and start_s in {None, row["start_up_s"]}
        ]
        if values:
            means.append(float(np.mean(values)))
    return max(means) if means else None


def _figures(compared: Sequence[Row], rows: Sequence[Row]) -> Row:
    unjudged = {trace.name for trace in traces() if not trace.judged}
    judged = [row for row in compared if row["trace"] not in unjudged]
    gaps = [float(str(row["gap_closed"])) for row in judged if row["gap_closed"] is not None]
    default = [row for row in rows if float(str(row["knob"])) == 1.0]
    ours = [float(str(row["direction_changes_per_hour"])) for row in default if row["policy"] == "enova"]
    return {
        "smooth_cost99_vs_lb_60s": _worse_mean(judged, "enova_vs_lb", kind="smooth", start_s=60.0),
        "smooth_cost99_vs_lb_300s": _worse_mean(judged, "enova_vs_lb", kind="smooth", start_s=300.0),
        "bursty_cost97_vs_best_baseline": _worse_mean(judged, "enova_vs_best", kind="bursty"),
        "gap_closed_min": min(gaps, default=None), "gap_closed_mean": float(np.mean(gaps)) if gaps else None,
        "direction_changes_per_hour_max": max(ours, default=None),
        "by_trace": {f"{row['trace']} {row['world']} {row['start_up_s']:g} s {row['seed']}": row for row in compared},
        "policies": {
            policy: _of_policy([row for row in default if row["policy"] == policy])
            for policy in dict.fromkeys(str(row["policy"]) for row in default)
        },
    }


def _of_policy(rows: Sequence[Row]) -> Row:
    """A policy at its defaults, by ground."""
    told = ("attainment", "gpu_hours", "cost_usd", "ttft_p99_s", "worst_5_minutes", "direction_changes_per_hour")
    return {
        f"{row['trace']} {row['world']} {row['start_up_s']:g} s {row['seed']}": {key: row[key] for key in told}
        for row in rows
    }


if __name__ == "__main__":
    main()
