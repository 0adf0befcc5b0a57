"""Twelve generated cases for every scaling policy at its published defaults: passed or failed, and why.

The cases and what passing means are in `enova_testing.scaling_cases`. Fleet: Llama-3.1-8B on A100-80GB (case 10: also
on H100), world (b); T0 = 1 s, 50 ms a token; a start takes 120 s (lognormal). Policies are told the capacity that the
recommender believes; it knows nothing of the world. LB is the programme of `scaling.lower_bound` after the warm-up, at
99 %, with the true capacity of a replica among four; in case 10 its relaxation on the type that is cheapest a
request. Bounds are 1 to 24 replicas, the beginning is 1.2 x what the load of then needs. `static-peak` and
`static-mean` know the load beforehand. `cron` needs days of history and is left out. A peer is a reimplemented policy,
not the product. With FULL=1 all five knob values run, and the table holds the best of them beside the default.
POLICIES=a,b chooses some. Runs that are in `--out` are not repeated.

Raw results: `results.csv.gz` (policy, knob, case, seed, attainment, gpu_hours, cost_usd, lb_usd, cost_ratio,
direction_changes, wrong_acts, acts, passed, reason), `replicas.csv.gz` (policy, knob, case, t_s, holding, ready).
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from enova_recommender.scaling.policies import KNOBS, PEERS
from enova_simulator.cluster.outcome import replicas_over_time
from enova_testing.benchmark import Benchmark, benchmark
from enova_testing.case_fleet import DEPLOYMENT, ground, run_case
from enova_testing.scaling_cases import CASES, WIDTH_S, Result, judged

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


def run(job: Job) -> tuple[Row, list[Row]]:
    """One policy in one case: its row, and its replicas over time."""
    case = CASES[job.case]
    ran = run_case(job.policy, job.knob, case, seed=job.seed)
    keys: Row = {"policy": job.policy, "knob": job.knob, "case": case.name, "seed": job.seed}
    row: Row = {
        **keys, "attainment": ran.result.attainment, "gpu_hours": ran.figures.gpu_hours,
        "cost_usd": ran.figures.cost_usd, "lb_usd": ran.lb_usd, "cost_ratio": ran.result.cost_ratio,
        "direction_changes": ran.result.direction_changes, "wrong_acts": ran.result.wrong_acts,
        "acts": ran.figures.acts, "passed": int(ran.result.passed), "reason": ran.result.reason,
    }
    holding, ready = replicas_over_time(ran.record, DEPLOYMENT, step_s=WIDTH_S)
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
    for case in {job.case for job in missing}:
        ground(CASES[case], bench.seed)            # once, before the processes fork
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
