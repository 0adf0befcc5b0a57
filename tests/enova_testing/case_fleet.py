"""A generated case laid out in the simulated fleet: its requests, its replicas, its lower bound, and one run of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from enova_recommender.scaling.bounds import Bounds
from enova_recommender.scaling.enova import EnovaPolicy
from enova_recommender.scaling.lower_bound import Floats, Programme, lower_bound, work_by_step
from enova_recommender.scaling.peers.static import static_mean, static_peak
from enova_recommender.scaling.policies import PEERS
from enova_recommender.scaling.situation import Objective, Policy
from enova_recommender.scaling.types import EngineSizes, GpuFacts, ModelFacts
from enova_simulator.cluster.capacity import believed, goodput, variant_of
from enova_simulator.cluster.fleet import Fleet
from enova_simulator.cluster.outcome import Figures, Record, direction_changes, figures
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
from enova_testing.scaling_cases import (
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

DEPLOYMENT = "chat"
OBJECTIVE = Objective(ttft_s=1.0, tpot_s=0.05)
BOUNDS = Bounds(min_replicas=1, max_replicas=24)
MARGIN = 1.2               # of the replicas at the beginning over the load of then
AMONG = 4                  # replicas: one alone carries less, since routing evens out what comes
GPU, OTHER_GPU = "A100-80G", "H100"
LB_SECONDS = 4.0           # after which the bound that is proven by then is taken
GIB = 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What a case is run on, the same for all policies."""

    case: Case
    rows: Rows
    fleet: FleetSetup
    lb_usd: float
    peak_rps: float
    mean_rps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What came of one policy in one case."""

    result: Result
    figures: Figures
    lb_usd: float
    record: Record


@lru_cache(maxsize=4)
def _engine(gpu: str, seed: int) -> Engine:
    return engine(World.PERTURBED, model=LLAMA_8B, gpu=gpu, seed=seed)


@lru_cache(maxsize=16)
def _carried(gpu: str, mix: Mix, seed: int) -> float:
    """Requests a second that a replica of the world carries within the objective, among a few that share the load."""
    return goodput(_engine(gpu, seed), mix.pairs(seed=seed), OBJECTIVE, seed=seed, replicas=AMONG)


@lru_cache(maxsize=64)
def ground(case: Case, seed: int) -> Ground:
    """A case's requests, its fleet without a policy, and its lower bound."""
    before, after = _carried(GPU, USUAL, seed), _carried(GPU, case.after, seed)
    counts, later = case.counts(before, after)
    names = [GPU, OTHER_GPU] if case.two_types else [GPU]
    variants = tuple(_variant(name, case, seed) for name in names)
    deployment = DeploymentSetup(
        name=DEPLOYMENT, variants=variants, targets={variants[0].name: math.ceil(MARGIN * case.load(0.0))},
        bounds=BOUNDS, objective=OBJECTIVE, facts=_facts(_engine(GPU, seed)),
    )
    setup = FleetSetup(
        gpus={pool_of(variant): BOUNDS.max_replicas for variant in variants}, deployments=(deployment,),
        end_s=case.end_s, seed=seed, faults=case.faults, telemetry=Telemetry(gaps=case.gaps),
        paces=Paces(restart_s=case.restart_s),
    )
    rows = _requests(counts, later, case, seed=seed)
    worth = (counts / before + later / after) / WIDTH_S       # replicas, step by step
    return Ground(
        case=case, rows=rows, fleet=setup, lb_usd=_lower_bound(case, rows, before, after, seed),
        peak_rps=float(worth.max()) * before, mean_rps=float(worth[int(WARM_UP_S / WIDTH_S) :].mean()) * before,
    )


def _requests(counts: Floats, later: Floats, case: Case, *, seed: int) -> Rows:
    usual, others = (
        drawn(count, width_s=WIDTH_S, lengths=mix.pairs(seed=seed), cv=1.0, seed=1000 * seed + 2 * case.draw + part)
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
    starts = Lognormal(median_s=START_S, seed=seed, never=case.never, failing=case.failing)
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


def policy_named(name: str, knob: float, on: Ground) -> Policy:
    """A policy of the registry, or enova's; static fleets know the load of the case beforehand."""
    match name:
        case "enova":
            return EnovaPolicy(scale=knob)
        case "static-peak":
            return static_peak(knob, rate=on.peak_rps)
        case "static-mean":
            return static_mean(knob, rate=on.mean_rps)
        case _:
            return PEERS[name](knob)


def run_case(name: str, knob: float, case: Case, *, seed: int) -> Ran:
    """One policy in one case."""
    on = ground(case, seed)
    seen = Seen(policy_named(name, knob, on), case)
    requests = requests_of(on.rows)
    fleet = Fleet(
        replace(on.fleet, deployments=(replace(on.fleet.deployments[0], policy=seen),)),
        Traffic(requests=requests, deployment=np.zeros(len(requests), dtype=np.int64)),
    )
    record = fleet.run()
    found = figures(record, DEPLOYMENT)
    counted = case.judged(record.requested.arrival_s)
    result = judged(
        name, case.name, attainment=float(record.requested.met[counted].mean()),
        cost_ratio=found.cost_usd / on.lb_usd, wrong_acts=len(seen.wrong_acts),
        direction_changes=int(direction_changes(record.acts[DEPLOYMENT], since_s=WARM_UP_S)),
    )
    return Ran(result=result, figures=found, lb_usd=on.lb_usd, record=record)
