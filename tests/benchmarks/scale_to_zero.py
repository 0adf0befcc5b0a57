"""What it costs and saves to let a deployment go to zero on sparse traffic: enova's policy and those that can.

Arrivals are those of gentd26 (a production image service, requests_*.csv.gz; it holds no tokens), twelve hours of them,
as dense as recorded (a request in 97 s on average) and thinned to a quarter, with FULL=1 also to a sixteenth and from
five places; without the set, a Poisson process of the same rates. Lengths are pairs of Azure's conversation service, or
drawn (mean 1,500 and 800). Llama-3.1-8B on A100-80GB, world (b), starts of 60 s (lognormal), 0 to 4 replicas, one at
the beginning; while none is READY the ingress holds up to 100 requests for 300 s. Saved is against one replica that
always runs. Figures are over all densities; a request that arrives in the last ten minutes is not judged.
POLICIES=a,b chooses some.

Raw results: `requests.csv.gz` (policy, density, seed, arrival_s, ttft_s, tpot_s, served, met), `runs.csv.gz` (policy,
density, seed, requests, lost, attainment, ttft_p50_s, ttft_p99_s, woken_share, gpu_hours, always_on_gpu_hours, wakes).
"""

from __future__ import annotations

import gzip
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from enova_recommender.scaling.bounds import Bounds
from enova_recommender.scaling.enova import EnovaPolicy
from enova_recommender.scaling.policies import PEERS
from enova_recommender.scaling.situation import Objective, Policy
from enova_simulator.cluster.capacity import believed, variant_of
from enova_simulator.cluster.fleet import Fleet
from enova_simulator.cluster.outcome import Record
from enova_simulator.cluster.serving import Fate
from enova_simulator.cluster.setup import DeploymentSetup, FleetSetup, Traffic, pool_of
from enova_simulator.cluster.startups import Lognormal
from enova_simulator.cluster.trace import Rows, read, requests_of
from enova_simulator.cluster.worlds import LLAMA_8B, World, engine
from enova_testing.benchmark import Benchmark, benchmark, read_rows
from enova_testing.scaling_cases import USUAL

OBJECTIVE = Objective(ttft_s=1.0, tpot_s=0.05)
BOUNDS = Bounds(min_replicas=0, max_replicas=4)
START_S = 60.0
SPAN_S = 43_200.0
TAIL_S = 600.0
RECORDED_GAP_S = 97.0
DENSITIES = (1.0, 0.25, 0.0625)
USUAL_DENSITIES = 2         # the others with FULL=1
REQUESTS_MIN = 100         # of a span of the recording
WOKEN_S = 5.0              # a first token that took longer had to wait for a start
POLICIES = ("enova", "keda-queue", "ray-serve", "skyserve", "knative", "llm-d-saturation", "serverless-llm")

Pairs = list[tuple[int, int]]
Row = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run."""

    policy: str
    density: float
    seed: int
    rows: Rows
    lengths: Pairs


def recorded(bench: Benchmark) -> list[float] | None:
    """Instants of the recorded requests; None where the set is absent."""
    found = bench.files("gentd26_gpu_serving", "requests_*.csv.gz")
    return sorted(float(row["arrival_s"]) for path in found for row in read_rows(path)) if found else None


def lengths(bench: Benchmark) -> Pairs:
    """Pairs of prompt and output tokens."""
    found = bench.files("azure_llm_2023", "conv*.csv.gz")
    if not found:
        return USUAL.pairs(seed=bench.seed)
    with gzip.open(found[0], "rt", encoding="utf-8") as lines:
        return list(read(lines).lengths)


def traffic(times: list[float] | None, density: float, pairs: Pairs, *, seed: int) -> Rows:
    """Twelve hours of requests, thinned."""
    generator = np.random.default_rng([seed, round(1 / density)])
    if times is None:
        count = generator.poisson(density * SPAN_S / RECORDED_GAP_S)
        arrival_s = np.sort(generator.uniform(0.0, SPAN_S, count))
    else:
        found = np.array(times)
        inside = np.searchsorted(found, found + SPAN_S) - np.arange(len(found))
        able = np.flatnonzero(inside >= min(REQUESTS_MIN, inside.max()))   # the recording has holes
        begin = int(able[generator.integers(len(able))])
        found = found[begin : begin + inside[begin]] - found[begin]
        arrival_s = found[generator.random(len(found)) < density]
    picked = np.array(pairs, dtype=np.int64)[generator.integers(0, len(pairs), len(arrival_s))]
    return Rows(arrival_s=arrival_s, prompt_tokens=picked[:, 0].copy(), output_tokens=picked[:, 1].copy())


def run(job: Job) -> tuple[Row, list[Row]]:
    """One policy on one span."""
    one = engine(World.PERTURBED, model=LLAMA_8B, gpu="A100-80G", seed=job.seed)
    starts = Lognormal(median_s=START_S, seed=job.seed)
    variant = variant_of(
        one, capacity=believed(one, job.lengths[:512], OBJECTIVE), start_ups=starts, start_up=starts.prior()
    )
    deployment = DeploymentSetup(
        name="sparse", variants=(variant,), targets={variant.name: 1}, bounds=BOUNDS, objective=OBJECTIVE,
        policy=_policy(job.policy),
    )
    setup = FleetSetup(
        gpus={pool_of(variant): BOUNDS.max_replicas}, deployments=(deployment,), end_s=SPAN_S, seed=job.seed
    )
    requests = requests_of(job.rows)
    record = Fleet(setup, Traffic(requests=requests, deployment=np.zeros(len(requests), dtype=np.int64))).run()
    return _row(job, record), _requests(job, record)


def _policy(name: str) -> Policy:
    return EnovaPolicy() if name == "enova" else PEERS[name](1.0)


def _row(job: Job, record: Record) -> Row:
    rows = record.requested
    counted = rows.arrival_s < SPAN_S - TAIL_S
    first, served = rows.first_s[counted], rows.fate[counted] == Fate.SERVED
    late = np.where(np.isnan(first), np.inf, first)
    held_s = sum(
        (SPAN_S if np.isnan(one.gone_s) else one.gone_s) - one.started_s
        for one in record.lived if not np.isnan(one.started_s)
    )
    return {
        "policy": job.policy, "density": job.density, "seed": job.seed, "requests": int(counted.sum()),
        "lost": int((~served).sum()), "attainment": float(rows.met[counted].mean()),
        "ttft_p50_s": float(np.median(late)), "ttft_p99_s": float(np.quantile(late, 0.99, method="higher")),
        "woken_share": float((late > WOKEN_S).mean()), "gpu_hours": held_s / 3600.0,
        "always_on_gpu_hours": SPAN_S / 3600.0,
        "wakes": sum(act.before == 0 for act in record.acts["sparse"].done),
    }


def _requests(job: Job, record: Record) -> list[Row]:
    rows = record.requested
    keys: Row = {"policy": job.policy, "density": job.density, "seed": job.seed}
    return [
        {**keys, "arrival_s": float(at_s), "ttft_s": float(first), "tpot_s": float(gap),
         "served": int(fate == Fate.SERVED), "met": int(met)}
        for at_s, first, gap, fate, met in zip(
            rows.arrival_s, rows.first_s, rows.tpot_s, rows.fate, rows.met, strict=True
        )
    ]


def figures(runs: list[Row], requests: list[Row], policy: str) -> dict[str, object]:
    """What is said of one policy over all its runs."""
    own = [row for row in runs if row["policy"] == policy]
    first = [
        float(str(row["ttft_s"])) for row in requests
        if row["policy"] == policy and float(str(row["arrival_s"])) < SPAN_S - TAIL_S
    ]
    late = np.where(np.isnan(first), np.inf, first)
    used, always = (sum(float(str(row[key])) for row in own) for key in ("gpu_hours", "always_on_gpu_hours"))
    told = float(np.median(late))
    return {
        "requests": sum(int(str(row["requests"])) for row in own),
        "requests_lost": sum(int(str(row["lost"])) for row in own),
        "first_token_p50_s": told if np.isfinite(told) else None,
        "gpu_hours_saved_share": 1 - used / always,
        "wakes": sum(int(str(row["wakes"])) for row in own),
    }


def main() -> None:
    """All policies on all densities."""
    bench = benchmark("scale_to_zero", __doc__)
    times, pairs = recorded(bench), lengths(bench)
    chosen = os.environ.get("POLICIES", "").split(",") if os.environ.get("POLICIES") else list(POLICIES)
    todo = [
        Job(policy=policy, density=density, seed=bench.seed + number, lengths=pairs,
            rows=traffic(times, density, pairs, seed=bench.seed + number))
        for number in range(5 if bench.full else 1)
        for density in DENSITIES[: None if bench.full else USUAL_DENSITIES] for policy in chosen
    ]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        done = list(pool.map(run, todo))
    runs, requests = [row for row, _ in done], [each for _, rows in done for each in rows]
    bench.write("runs", runs)
    bench.write("requests", requests)
    bench.table("Twelve hours of sparse traffic, with leave to go to zero", runs)
    by_policy = {policy: figures(runs, requests, policy) for policy in chosen}
    ours = by_policy.get("enova", {})
    told = {key: ours.get(key) for key in ("requests_lost", "first_token_p50_s", "gpu_hours_saved_share")}
    bench.end({**told, "policies": by_policy})


if __name__ == "__main__":
    main()
