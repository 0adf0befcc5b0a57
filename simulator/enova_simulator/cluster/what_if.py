"""What would a deployment cost on a fleet, under a trace, by each policy, and would it hold: plain values in and out.

Step times are the recommender's own (world (c)): the answer is as good as its predictions. Everything else is the
simulated fleet: production router, gates and rollout, the policies themselves, starts drawn around a given median.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from enova_coordinator.core.validation import CONSERVATISM
from enova_recommender import catalog
from enova_recommender.scaling.bounds import Bounds
from enova_recommender.scaling.enova import EnovaPolicy
from enova_recommender.scaling.peers.static import static_mean, static_peak
from enova_recommender.scaling.policies import PEERS
from enova_recommender.scaling.situation import Objective, Policy
from enova_recommender.scaling.types import EngineSizes, GpuFacts, ModelFacts
from enova_recommender.types import Interval
from enova_simulator.cluster.capacity import believed, variant_of
from enova_simulator.cluster.fleet import Fleet
from enova_simulator.cluster.outcome import Figures, Record, figures, replicas_over_time
from enova_simulator.cluster.setup import (
    DeploymentSetup,
    Facts,
    FleetSetup,
    SetupError,
    Traffic,
    VariantSetup,
    pool_of,
)
from enova_simulator.cluster.startups import Lognormal
from enova_simulator.cluster.trace import Rows, requests_of
from enova_simulator.cluster.worlds import Engine, World, engine

ALL = "all"
FIXED = "fixed"                    # as many replicas as the deployment says, always
LEFT_OUT = frozenset({"cron"})     # knows only days that are past
STEP_S = 60.0                      # of what is shown over time
TAIL_S = 120.0                     # after the last arrival, for answers to end
WARM_UP_SHARE = 0.1                # of the trace, at most ten minutes
WARM_UP_S = 600.0
MARGIN = 1.2                       # of the replicas at the beginning over the load of the first minutes
ACTS_TOLD = 200
TENSOR_PARALLEL = (1, 2, 4, 8)
DEFAULT_ATTAINMENT = 0.95          # of objectives that are said for the 95th percentile
DEFAULT_MOST = 64
UNLIMITED_S = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be found out. `deployment` is a deployment.yaml as plain values, `fleet` GPUs by type."""

    deployment: Mapping[str, object]
    rows: Rows
    fleet: Mapping[str, int]
    policies: tuple[str, ...] = ()
    start_up_s: float = 120.0
    seed: int = 1000


def what_if(asked: Asked) -> dict[str, object]:
    """The answer. Raises SetupError for what cannot be simulated."""
    rows, name = asked.rows, str(asked.deployment.get("name", "")).removeprefix("deployments/") or "deployment"
    objective = _objective(asked.deployment)
    variants = _variants(asked, objective)
    bounds, fixed = _bounds(asked.deployment, variants, asked.fleet)
    rates = _Rates.of(rows)
    setups = {
        policy: _setup(asked, name, variants, objective=objective, bounds=bounds, rates=rates, policy=made)
        for policy, made in _policies(asked, rates, fixed=fixed).items()
    }
    requests = requests_of(rows)
    places = np.zeros(len(requests), dtype=np.int64)
    results = []
    for policy, setup in setups.items():
        record = Fleet(setup, Traffic(requests=requests, deployment=places)).run()
        results.append(_result(policy, record, name, setup))
    return {
        "deployment": name, "requests": len(rows), "span_s": float(rows.arrival_s[-1]),
        "objectives": {"ttft_s": _told(objective.ttft_s), "tpot_s": _told(objective.tpot_s),
                       "attainment": objective.attainment},
        "variants": [_shown(variant) for variant in variants],
        "step_times": "the recommender's predictions",
        "arrived": np.histogram(rows.arrival_s, np.arange(0.0, rows.arrival_s[-1] + STEP_S, STEP_S))[0].tolist(),
        "step_s": STEP_S, "policies": results,
    }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rates:
    """Requests a second of a trace."""

    peak: float
    mean: float
    first: float

    @classmethod
    def of(cls, rows: Rows) -> _Rates:
        span_s = max(1.0, float(rows.arrival_s[-1]))
        counts = np.histogram(rows.arrival_s, np.arange(0.0, span_s + STEP_S, STEP_S))[0]
        return cls(
            peak=float(counts.max()) / min(STEP_S, span_s), mean=len(rows) / span_s,
            first=float(counts[:5].mean()) / min(STEP_S, span_s),
        )  # fmt: skip


def _objective(deployment: Mapping[str, object]) -> Objective:
    classes = deployment.get("classes") or [{}]
    first = classes[0] if isinstance(classes, list) and isinstance(classes[0], Mapping) else {}
    return Objective(
        ttft_s=float(first.get("ttft_p95_s", UNLIMITED_S)), tpot_s=float(first.get("tpot_p95_s", UNLIMITED_S)),
        attainment=float(first.get("attainment", DEFAULT_ATTAINMENT)),
    )  # fmt: skip


def _variants(asked: Asked, objective: Objective) -> tuple[VariantSetup, ...]:
    """One for each type of GPU that the fleet has and the deployment may use."""
    hardware = asked.deployment.get("hardware")
    allowed = hardware.get("allow") if isinstance(hardware, Mapping) else None
    types = [name for name, count in asked.fleet.items() if count > 0 and (not allowed or name in allowed)]
    if not types:
        raise SetupError("fleet", f"has none of the GPUs that the deployment may use: {allowed or 'any'}")
    starts = Lognormal(median_s=asked.start_up_s, seed=asked.seed)
    found: list[VariantSetup] = []
    problems: list[str] = []
    for gpu in types:
        try:
            one = _engine(asked, gpu)
        except SetupError as error:
            if error.field in {"model", "fleet"}:
                raise
            problems.append(error.message)
            continue
        capacity = believed(one, asked.rows.lengths, objective)
        if capacity.requests_per_s.value <= 0:
            # Nothing holds the objective by prediction: policies are told what prompts alone would allow.
            rate = 0.5 * capacity.prefill_tokens_per_s / float(asked.rows.prompt_tokens.mean())
            capacity = replace(capacity, requests_per_s=Interval(value=rate, low=rate / 2, high=rate))
        variant = variant_of(one, name=gpu.lower(), capacity=capacity, start_ups=starts, start_up=starts.prior())
        found.append(replace(variant, unloaded_ttft_s={}))     # a user's objective is what the user said
    if not found:
        raise SetupError("fleet", "; ".join(problems))
    return tuple(sorted(found, key=lambda each: each.usd_per_hour / each.capacity.requests_per_s.value))


def _engine(asked: Asked, gpu: str) -> Engine:
    model = str(asked.deployment.get("model", ""))
    configuration = asked.deployment.get("configuration") or {}
    settings = configuration if isinstance(configuration, Mapping) else {}
    named = settings.get("tensor_parallel_size")
    sizes = TENSOR_PARALLEL if named is None else (int(named),)
    problem = SetupError("fleet", f"{model} does not fit {asked.fleet[gpu]} x {gpu}")
    for size in sizes:
        if size > asked.fleet[gpu]:
            break
        try:
            return engine(
                World.MATCHED, model=model, gpu=gpu, tensor_parallel=size,
                max_num_seqs=int(settings.get("max_num_seqs", 256)),
                max_num_batched_tokens=int(settings.get("max_num_batched_tokens", 8192)),
                enable_prefix_caching=bool(settings.get("enable_prefix_caching", True)),
            )  # fmt: skip
        except SetupError as error:
            if error.field != "gpu" or "does not fit" not in error.message:
                raise
            problem = error
    raise problem


def _bounds(
    deployment: Mapping[str, object], variants: Sequence[VariantSetup], fleet: Mapping[str, int]
) -> tuple[Bounds, bool]:
    """The deployment's bounds, and whether they leave a policy nothing to do."""
    most = sum(fleet[variant.gpu_type] // variant.gpus for variant in variants)
    if deployment.get("replicas") is not None:
        count = int(str(deployment["replicas"]))
        if count > most:
            raise SetupError("fleet", f"cannot hold {count} replicas: it has room for {most}")
        return Bounds(min_replicas=count, max_replicas=count), True
    low = int(str(deployment.get("min", 1)))
    high = int(str(deployment.get("max", min(most, DEFAULT_MOST))))
    return Bounds(min_replicas=low, max_replicas=high), False


def _policies(asked: Asked, rates: _Rates, *, fixed: bool) -> dict[str, Policy | None]:
    if fixed:
        return {FIXED: None}
    factories: dict[str, Callable[[float], Policy]] = {
        "enova": lambda knob: EnovaPolicy(scale=knob), **PEERS,
        "static-peak": lambda knob: static_peak(knob, rate=rates.peak),
        "static-mean": lambda knob: static_mean(knob, rate=rates.mean),
    }  # fmt: skip
    names = asked.policies or (str(asked.deployment.get("policy") or "enova"),)
    if ALL in names:
        names = tuple(name for name in factories if name not in LEFT_OUT)
    unknown = [name for name in names if name not in factories]
    if unknown:
        raise SetupError("policy", f"{', '.join(unknown)} is unknown: one of {', '.join(sorted(factories))}")
    return {name: factories[name](1.0) for name in names}


def _setup(
    asked: Asked, name: str, variants: tuple[VariantSetup, ...], *, objective: Objective, bounds: Bounds,
    rates: _Rates, policy: Policy | None,
) -> FleetSetup:  # fmt: skip
    first = variants[0]
    needed = math.ceil(MARGIN * rates.first / first.capacity.requests_per_s.value)
    room = asked.fleet[first.gpu_type] // first.gpus
    begun = min(max(bounds.min_replicas, needed, 1), bounds.max_replicas, room)
    deployment = DeploymentSetup(
        name=name, variants=variants, targets={first.name: begun}, bounds=bounds, objective=objective,
        policy=policy, facts=_facts(asked, first),
        conservatism=_conservatism(asked.deployment),
    )  # fmt: skip
    pools = {pool_of(variant): asked.fleet[variant.gpu_type] for variant in variants}
    end_s = float(asked.rows.arrival_s[-1]) + TAIL_S
    return FleetSetup(gpus=pools, deployments=(deployment,), end_s=end_s, seed=asked.seed)


def _conservatism(deployment: Mapping[str, object]) -> float:
    value = float(str(deployment.get("conservatism", 1.0)))
    low, high = CONSERVATISM
    if not low <= value <= high:
        raise SetupError("conservatism", f"must lie between {low:g} and {high:g}, not {value:g}")
    return value


def _facts(asked: Asked, variant: VariantSetup) -> Facts:
    shape, gpu = catalog.models()[str(asked.deployment["model"])], catalog.gpus()[variant.gpu_type]
    return Facts(
        configuration=EngineSizes(
            tensor_parallel_size=variant.gpus, gpu_memory_utilization=0.9, max_num_seqs=variant.limits.max_num_seqs
        ),
        model=ModelFacts(
            framework="llama", size_billion=max(1, round(shape.parameters / 1e9)), parameters=shape.parameters,
            kv_elements_per_token=shape.kv_elements_per_token, attention_heads=shape.attention_heads,
            context_tokens=shape.context_tokens,
        ),
        gpu=GpuFacts(count=asked.fleet[variant.gpu_type], memory_bytes=gpu.memory_bytes),
    )  # fmt: skip


def _result(policy: str, record: Record, name: str, setup: FleetSetup) -> dict[str, object]:
    last_s = setup.end_s - TAIL_S
    warm_up_s = min(WARM_UP_S, WARM_UP_SHARE * last_s)
    found = figures(record, name, until_s=last_s + 1e-6, warm_up_s=warm_up_s)
    wanted = setup.deployments[0].objective.attainment
    holding, ready = replicas_over_time(record, name, step_s=STEP_S)
    acts = record.acts[name].done
    return {
        "policy": policy, "holds": bool(found.attainment >= wanted), **_finite(found),
        "replicas": holding.astype(int).tolist(), "ready": ready.astype(int).tolist(),
        "ttft_p50_by_step_s": _by_step(record), "warm_up_s": warm_up_s,
        "decisions": [asdict(act) for act in acts[:ACTS_TOLD]], "decisions_left_out": max(0, len(acts) - ACTS_TOLD),
    }  # fmt: skip


def _by_step(record: Record) -> list[float | None]:
    """The median time to first token of what arrived in each step; None where nothing did, or nothing was served."""
    rows = record.requested
    known = ~np.isnan(rows.first_s)
    place = (rows.arrival_s[known] // STEP_S).astype(int)
    steps = math.ceil(record.end_s / STEP_S)
    return [
        float(np.median(rows.first_s[known][place == step])) if np.any(place == step) else None
        for step in range(steps)
    ]


def _finite(found: Figures) -> dict[str, object]:
    return {
        key: (value if not isinstance(value, float) or math.isfinite(value) else None)
        for key, value in asdict(found).items()
    }


def _shown(variant: VariantSetup) -> dict[str, object]:
    rate = variant.capacity.requests_per_s
    return {
        "gpu_type": variant.gpu_type, "gpus": variant.gpus, "usd_per_hour": variant.usd_per_hour,
        "capacity_rps": {"value": rate.value, "low": rate.low, "high": rate.high},
        "kv_tokens": variant.limits.num_blocks * variant.limits.block_size,
    }  # fmt: skip


def _told(seconds: float) -> float | None:
    return None if seconds >= UNLIMITED_S else seconds


__all__ = ["ALL", "Asked", "what_if"]
