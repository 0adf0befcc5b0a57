"""What faults cost a deployment that scales: replica losses, stragglers, hangs, lost telemetry, start-up failures.

One day in forty minutes (the diurnal case of `enova_testing.scaling_cases`, Llama-3.1-8B on A100-80GB, world (b),
starts of 120 s) is run without faults and with each kind of fault; attainment_loss is the attainment without them less
the attainment with them, the worst over the kinds; wrong_destructive_acts counts healthy replicas that a policy had
replaced. The detector is taken to be right 20 s after an onset, the agent restarts a hung replica after 30 s, for all
policies alike. By default the policies that held up best in `autoscale_cases`; POLICIES=a,b chooses others, FULL=1 runs
five seeds. Reimplemented policies, at their published defaults.

Raw results: `runs.csv.gz` (policy, fault, seed, attainment, cost_usd, lb_usd, worst_5_minutes, direction_changes, acts,
wrong_acts).
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from enova_testing.benchmark import benchmark
from enova_testing.case_fleet import ground, run_case
from enova_testing.scaling_cases import FAULTLESS, FAULTY

POLICIES = ("enova", "static-peak", "static-mean", "aibrix-optimizer", "dynamo-throughput", "llm-d-tokens", "skyserve")
CASES = (FAULTLESS, *FAULTY)
SEEDS = 5

Row = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run."""

    policy: str
    case: int
    seed: int


def run(job: Job) -> Row:
    """One policy under one kind of fault."""
    case = CASES[job.case]
    ran = run_case(job.policy, 1.0, case, seed=job.seed)
    return {
        "policy": job.policy, "fault": case.name, "seed": job.seed, "attainment": ran.result.attainment,
        "cost_usd": ran.figures.cost_usd, "lb_usd": ran.lb_usd, "worst_5_minutes": ran.figures.worst_5_minutes,
        "direction_changes": ran.result.direction_changes, "acts": ran.figures.acts,
        "wrong_acts": ran.result.wrong_acts,
    }


def figures(rows: list[Row], policy: str) -> dict[str, object]:
    """The losses of one policy by kind of fault, means over the seeds."""
    own = [row for row in rows if row["policy"] == policy]
    means = {
        case.name: _mean([row for row in own if row["fault"] == case.name]) for case in CASES
    }
    losses = {case.name: means[FAULTLESS.name] - means[case.name] for case in FAULTY}
    return {
        "attainment_loss": max(losses.values()), "by_fault": losses, "attainment": means[FAULTLESS.name],
        "wrong_destructive_acts": sum(int(str(row["wrong_acts"])) for row in own),
    }


def _mean(rows: list[Row]) -> float:
    return sum(float(str(row["attainment"])) for row in rows) / len(rows)


def main() -> None:
    """All kinds of fault, all policies."""
    bench = benchmark("autoscale_faults", __doc__)
    chosen = os.environ.get("POLICIES", "").split(",") if os.environ.get("POLICIES") else list(POLICIES)
    todo = [
        Job(policy=policy, case=case, seed=bench.seed + number)
        for number in range(SEEDS if bench.full else 1) for policy in chosen for case in range(len(CASES))
    ]
    for seed, case in {(job.seed, job.case) for job in todo}:
        ground(CASES[case], seed)                  # once, before the processes fork
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        rows = list(pool.map(run, todo))
    bench.write("runs", rows)
    bench.table("Faults while scaling", rows)
    by_policy = {policy: figures(rows, policy) for policy in chosen}
    ours = by_policy.get("enova", {})
    bench.end({
        "attainment_loss": ours.get("attainment_loss"), "wrong_destructive_acts": ours.get("wrong_destructive_acts"),
        "policies": by_policy,
    })


if __name__ == "__main__":
    main()
