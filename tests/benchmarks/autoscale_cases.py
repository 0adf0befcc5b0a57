"""Twelve generated cases for every scaling policy at its published defaults: passed or failed, and why.

The cases and what passing means are in `enova_testing.scaling_cases`. Fleet: Llama-3.1-8B on A100-80GB (case 10: also
on H100), world (b); T0 = 1 s, 50 ms a token; a start takes 120 s (lognormal). Policies are told the capacity that the
recommender believes; it knows nothing of the world. LB is the programme of `scaling.lower_bound` after the warm-up, at
99 %, with the true capacity; in case 10 its relaxation on the type that is cheapest a request. Bounds are 1 to 24
replicas, the beginning is 1.2 x what the load of then needs. `static-peak` and `static-mean` know the load beforehand.
`cron` needs days of history and is left out. A peer is a reimplemented policy, not the product. With FULL=1 all five
knob values run, and the table holds the best of them beside the default. POLICIES=a,b chooses some. Runs that are in
`--out` are not repeated.

Raw results: `results.csv.gz` (policy, knob, case, seed, attainment, gpu_hours, cost_usd, lb_usd, cost_ratio,
direction_changes, wrong_acts, acts, passed, reason), `replicas.csv.gz` (policy, knob, case, t_s, holding, ready).
"""

from __future__ import annotations

import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from enova_recommender.scaling.bounds import Bounds
from enova_recommender.scaling.enova import EnovaPolicy
from enova_recommender.scaling.lower_bound import Floats, Programme, lower_bound, work_by_step
from enova_recommender.scaling.peers.static import static_mean, static_peak
from enova_recommender.scaling.policies import KNOBS, PEERS
from enova_recommender.scaling.situation import Objective, Policy
from enova_recommender.scaling.types import EngineSizes, GpuFacts, ModelFacts
from enova_simulator.cluster.capacity import believed, goodput, variant_of
from enova_simulator.cluster.fleet import Fleet
from enova_simulator.cluster.outcome import direction_changes, figures, replicas_over_time
from enova_simulator.cluster.setup import (
    DeploymentSetup,
    Facts,
    FleetSetup,
    Paces,
    Telemetry,
    Traffic,
    VariantSetup,
    pool_of,
)
from enova_simulator.cluster.startups import Lognormal
from enova_simulator.cluster.trace import Rows, drawn, requests_of
from enova_simulator.cluster.worlds import LLAMA_8B, Engine, World, engine
from enova_testing.benchmark import Benchmark, benchmark
from enova_testing.scaling_cases import (
    CASES,
    CHANGE_S,
    START_S,
    USUAL,
    WARM_UP_S,
    WIDTH_S,
    Case,
    Mix,
    Result,
    Seen,
    judged,
)

OBJECTIVE = Objective(ttft_s=1.0, tpot_s=0.05)
BOUNDS = Bounds(min_replicas=1, max_replicas=24)
MARGIN = 1.2               # of the replicas at the beginning over the load of then
GPU, OTHER_GPU = "A100-80G", "H100"
LB_SECONDS = 20.0
GIB = 1024**3
ENOVA_KNOBS = (0.5, 0.75, 1.0, 1.5, 2.0)
Row = dict[str, object]
LEFT_OUT = {"cron": "needs days of history"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run."""

    policy: str
    knob: float
    case: int
    seed: int

    @property
    def key(self) -> str:
        """What it is remembered by."""
        return f"{self.policy}|{self.knob:g}|{CASES[self.case].name}|{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What a case is run on, the same for all policies."""

    case: Case
    rows: Rows
    fleet: FleetSetup
    lb_usd: float
    peak_rps: float
    mean_rps: float


@lru_cache(maxsize=4)
def _engine(gpu: str, seed: int) -> Engine:
    return engine(World.PERTURBED, model=LLAMA_8B, gpu=gpu, seed=seed)


@lru_cache(maxsize=16)
def _carried(gpu: str, mix: Mix, seed: int) -> float:
    """Requests a second that one replica of the world carries within the objective."""
    return goodput(_engine(gpu, seed), mix.pairs(seed=seed), OBJECTIVE, seed=seed)


@lru_cache(maxsize=16)
def ground(number: int, seed: int) -> Ground:
    """A case's requests, its fleet without a policy, and its lower bound."""
    case = CASES[number]
    before, after = _carried(GPU, USUAL, seed), _carried(GPU, case.after, seed)
    counts, later = case.counts(before, after)
    names = [GPU, OTHER_GPU] if case.two_types else [GPU]
    variants = tuple(_variant(name, case, seed) for name in names)
    deployment = DeploymentSetup(
        name="chat", variants=variants, targets={variants[0].name: math.ceil(MARGIN * case.load(0.0))}, bounds=BOUNDS,
        objective=OBJECTIVE, facts=_facts(_engine(GPU, seed)),
    )
    setup = FleetSetup(
        gpus={pool_of(variant): BOUNDS.max_replicas for variant in variants}, deployments=(deployment,),
        end_s=case.end_s, seed=seed, faults=case.faults, telemetry=Telemetry(gaps=case.gaps),
        paces=Paces(restart_s=case.restart_s),
    )
    rows = _requests(counts, later, case, seed=seed, draw=number)
    worth = (counts / before + later / after) / WIDTH_S       # replicas, step by step
    return Ground(
        case=case, rows=rows, fleet=setup, lb_usd=_lower_bound(case, rows, before, after, seed),
        peak_rps=float(worth.max()) * before, mean_rps=float(worth[int(WARM_UP_S / WIDTH_S) :].mean()) * before,
    )


def _requests(counts: Floats, later: Floats, case: Case, *, seed: int, draw: int) -> Rows:
    usual, others = (
        drawn(count, width_s=WIDTH_S, lengths=mix.pairs(seed=seed), cv=1.0, seed=1000 * seed + 2 * draw + part)
        for part, (count, mix) in enumerate(((counts, USUAL), (later, case.after)))
    )
    return Rows(
        arrival_s=np.concatenate([usual.arrival_s, others.arrival_s]),
        prompt_tokens=np.concatenate([usual.prompt_tokens, others.prompt_tokens]),
        output_tokens=np.concatenate([usual.output_tokens, others.output_tokens]),
    )


def _variant(gpu: str, case: Case, seed: int) -> VariantSetup:
    one = _engine(gpu, seed)
    capacity = believed(one, USUAL.pairs(seed=seed), OBJECTIVE)
    starts = Lognormal(median_s=START_S, seed=seed, never=case.never)
    return variant_of(one, name=gpu, capacity=capacity, start_ups=starts, start_up=starts.prior())


def _facts(one: Engine) -> Facts:
    return Facts(
        configuration=EngineSizes(
            tensor_parallel_size=1, gpu_memory_utilization=0.9, max_num_seqs=one.limits.max_num_seqs
        ),
        model=ModelFacts(
            framework="llama", size_billion=8, parameters=8_030_000_000, kv_elements_per_token=65536,
            attention_heads=32, context_tokens=8192,
        ),
        gpu=GpuFacts(count=BOUNDS.max_replicas, memory_bytes=80 * GIB),
    )


def _lower_bound(case: Case, rows: Rows, before: float, after: float, seed: int) -> float:
    """USD of the cheapest fleet that knows the future, after the warm-up; work is in replica-seconds."""
    changed = (rows.arrival_s >= CHANGE_S) & (case.after != USUAL)
    inside = rows.arrival_s >= WARM_UP_S
    work = work_by_step(
        rows.arrival_s[inside] - WARM_UP_S, amounts=np.where(changed, 1 / after, 1 / before)[inside],
        horizon_s=case.end_s - WARM_UP_S, step_s=WIDTH_S,
    )
    bound = lower_bound(Programme(
        work=work, step_s=WIDTH_S, capacity=1.0, start_s=START_S, within_s=OBJECTIVE.ttft_s,
        time_limit_s=LB_SECONDS, min_replicas=BOUNDS.min_replicas,
    ))
    usd = _engine(GPU, seed).gpu.cost_per_hour(1)
    if not case.two_types:
        return bound.hours * usd
    other = _carried(OTHER_GPU, USUAL, seed) / before
    return bound.relaxed_hours * min(usd, _engine(OTHER_GPU, seed).gpu.cost_per_hour(1) / other)


def _policy(job: Job, on: Ground) -> Policy:
    if job.policy == "enova":
        return EnovaPolicy(scale=job.knob)
    if job.policy in {"static-peak", "static-mean"}:
        rate = on.peak_rps if job.policy == "static-peak" else on.mean_rps
        return (static_peak if job.policy == "static-peak" else static_mean)(job.knob, rate=rate)
    return PEERS[job.policy](job.knob)


def run(job: Job) -> tuple[Row, list[Row]]:
    """One policy in one case: its row, and its replicas over time."""
    on = ground(job.case, job.seed)
    seen = Seen(_policy(job, on), on.case)
    deployment = replace(on.fleet.deployments[0], policy=seen)
    requests = requests_of(on.rows)
    fleet = Fleet(
        replace(on.fleet, deployments=(deployment,)),
        Traffic(requests=requests, deployment=np.zeros(len(requests), dtype=np.int64)),
    )
    record = fleet.run()
    found = figures(record, "chat")
    counted = on.case.judged(record.requested.arrival_s)
    result = judged(
        job.policy, on.case.name, attainment=float(record.requested.met[counted].mean()),
        cost_ratio=found.cost_usd / on.lb_usd, wrong_acts=len(seen.wrong_acts),
        direction_changes=direction_changes(record.acts["chat"], since_s=WARM_UP_S),
    )
    keys: Row = {"policy": job.policy, "knob": job.knob, "case": on.case.name, "seed": job.seed}
    row: Row = {
        **keys, "attainment": result.attainment, "gpu_hours": found.gpu_hours, "cost_usd": found.cost_usd,
        "lb_usd": on.lb_usd, "cost_ratio": result.cost_ratio, "direction_changes": result.direction_changes,
        "wrong_acts": result.wrong_acts, "acts": found.acts, "passed": int(result.passed), "reason": result.reason,
    }
    holding, ready = replicas_over_time(record, "chat", step_s=WIDTH_S)
    return row, [
        {**keys, "t_s": place * WIDTH_S, "holding": int(held), "ready": int(serving)}
        for place, (held, serving) in enumerate(zip(holding, ready, strict=True))
    ]


def jobs(bench: Benchmark) -> list[Job]:
    """The runs: defaults, and with FULL=1 every knob value."""
    chosen = os.environ.get("POLICIES", "").split(",") if os.environ.get("POLICIES") else ["enova", *PEERS]
    names = [name for name in chosen if name not in LEFT_OUT]
    knobs = {name: KNOBS.get(name, ENOVA_KNOBS) if bench.full else (1.0,) for name in names}
    return [
        Job(policy=name, knob=knob, case=case, seed=bench.seed)
        for name in names for knob in knobs[name] for case in range(len(CASES))
    ]


def main() -> None:
    """All cases, all policies."""
    bench = benchmark("autoscale_cases", __doc__)
    bench.notes.update({name: f"left out: {why}" for name, why in LEFT_OUT.items()})
    todo = jobs(bench)
    bench.out.mkdir(parents=True, exist_ok=True)
    kept = bench.out / "kept.jsonl"
    rows: dict[str, tuple[Row, list[Row]]] = {}
    if kept.exists():
        rows = {key: (row, over_time) for key, row, over_time in map(json.loads, kept.read_text().splitlines())}
    missing = [job for job in todo if job.key not in rows]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool, kept.open("a") as file:
        for job, (row, over_time) in zip(missing, pool.map(run, missing), strict=True):
            rows[job.key] = row, over_time
            file.write(json.dumps([job.key, row, over_time]) + "\n")
            file.flush()
    bench.write("results", [rows[job.key][0] for job in todo])
    bench.write("replicas", [each for job in todo for each in rows[job.key][1]])
    results = [_result(rows[job.key][0]) for job in todo]
    bench.table("Twelve cases: passed at published defaults", _table(todo, results))
    bench.end(_figures(todo, results))


def _result(row: Row) -> Result:
    return judged(
        str(row["policy"]), str(row["case"]), attainment=float(str(row["attainment"])),
        cost_ratio=float(str(row["cost_ratio"])), direction_changes=int(str(row["direction_changes"])),
        wrong_acts=int(str(row["wrong_acts"])),
    )


def _by_policy(todo: list[Job], done: list[Result]) -> dict[str, dict[float, list[Result]]]:
    found: dict[str, dict[float, list[Result]]] = {}
    for job, result in zip(todo, done, strict=True):
        found.setdefault(job.policy, {}).setdefault(job.knob, []).append(result)
    return found


def _table(todo: list[Job], done: list[Result]) -> list[dict[str, object]]:
    rows = []
    for policy, by_knob in _by_policy(todo, done).items():
        results = by_knob[1.0]
        best = max(sum(result.passed for result in each) for each in by_knob.values())
        row: dict[str, object] = {"policy": policy, "passed": sum(result.passed for result in results)}
        if len(by_knob) > 1:
            row["best knob"] = best
        row |= {result.case.split()[0]: "yes" if result.passed else "-" for result in results}
        rows.append(row)
    return rows


def _figures(todo: list[Job], done: list[Result]) -> dict[str, object]:
    policies = {}
    for policy, by_knob in _by_policy(todo, done).items():
        results = by_knob[1.0]
        policies[policy] = {
            "passed": sum(result.passed for result in results),
            "passed_by_knob": {str(knob): sum(result.passed for result in each) for knob, each in by_knob.items()},
            "cases": {result.case: {"passed": result.passed, "reason": result.reason} for result in results},
        }
    ours = policies["enova"]["passed"] if "enova" in policies else None
    return {"passed": ours, "cases": len(CASES), "policies": policies}


if __name__ == "__main__":
    main()
