"""What one replica carries: in a world, by simulating it; and in the recommender's belief, which policies are told."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from enova_recommender import catalog
from enova_recommender.memory import fit
from enova_recommender.performance import KernelTimes
from enova_recommender.recommend.capacity import predict
from enova_recommender.recommend.types import LENGTHS_MAX, EngineSettings, Objectives, Workload
from enova_recommender.scaling.bounds import Bounds
from enova_recommender.scaling.situation import Capacity, Objective, StartUp
from enova_recommender.types import AS_PUBLISHED, Interval, Parallelism
from enova_simulator.cluster.engines import Requests
from enova_simulator.cluster.fleet import Fleet
from enova_simulator.cluster.outcome import figures
from enova_simulator.cluster.setup import DeploymentSetup, FleetSetup, StartUps, Traffic, VariantSetup
from enova_simulator.cluster.startups import Lognormal
from enova_simulator.cluster.worlds import Engine

REQUESTS = 3000                    # of one run
SETTLED_SHARE = 0.25               # of a run, before requests count
TAIL_S = 240.0                     # for the last requests to finish
BISECTIONS = 9
NOTHING_KNOWN = Capacity(
    requests_per_s=Interval(value=1.0, low=0.5, high=2.0), prefill_tokens_per_s=1.0, decode_tokens_per_s=1.0,
    kv_tokens=1.0, max_num_seqs=1,
)  # fmt: skip


def variant_of(
    engine: Engine, *, name: str = "v", capacity: Capacity = NOTHING_KNOWN, start_ups: StartUps | None = None,
    start_up: StartUp | None = None, site: str = "",
) -> VariantSetup:  # fmt: skip
    """A variant of a fleet with this configuration."""
    drawn = Lognormal(median_s=120.0, seed=0)
    return VariantSetup(
        name=name, gpu_type=engine.gpu.name, gpus=engine.gpus, usd_per_hour=engine.gpu.cost_per_hour(engine.gpus),
        limits=engine.limits, times=engine.times, capacity=capacity, start_up=start_up or drawn.prior(),
        start_ups=start_ups or drawn, unloaded_ttft_s=engine.unloaded_ttft_s,
        first_token_delay_s=engine.first_token_delay_s, weight=max(1e-3, capacity.requests_per_s.value),
        replica_sigma=engine.replica_sigma, site=site,
    )  # fmt: skip


def believed(engine: Engine, lengths: Sequence[tuple[int, int]], objective: Objective) -> Capacity:
    """What the recommender, which knows no world, says of this configuration at this mix."""
    shape = catalog.models()[engine.model]
    parallelism = Parallelism(tensor=engine.gpus)
    memory = fit(
        shape, engine.gpu, parallelism=parallelism, max_num_seqs=engine.limits.max_num_seqs,
        max_num_batched_tokens=engine.limits.max_num_batched_tokens,
    )  # fmt: skip
    settings = EngineSettings(
        gpu=engine.gpu, parallelism=parallelism, precision=AS_PUBLISHED, max_num_seqs=engine.limits.max_num_seqs,
        max_num_batched_tokens=engine.limits.max_num_batched_tokens, gpu_memory_utilization=0.9,
        max_model_len=shape.context_tokens,
    )  # fmt: skip
    thinned = tuple(lengths[:: max(1, math.ceil(len(lengths) / LENGTHS_MAX))])
    prompts, outputs = np.mean(np.array(thinned), axis=0)
    predicted = predict(
        settings, Workload(requests_per_s=1.0, lengths=thinned),
        Objectives(ttft_s=objective.ttft_s, tpot_s=objective.tpot_s, percentile=objective.attainment),
        KernelTimes(shape, engine.gpu, parallelism=parallelism), memory=memory,
    )  # fmt: skip
    rate = predicted.capacity_rps
    prompt_s = np.interp(prompts, list(engine.unloaded_ttft_s), list(engine.unloaded_ttft_s.values()))
    return Capacity(
        requests_per_s=rate, prefill_tokens_per_s=float(prompts / prompt_s),
        decode_tokens_per_s=float(max(rate.value * outputs, outputs / max(prompt_s, 1e-3))),
        kv_tokens=float(engine.kv_tokens), max_num_seqs=engine.limits.max_num_seqs,
    )  # fmt: skip


def goodput(
    engine: Engine, lengths: Sequence[tuple[int, int]], objective: Objective, *, seed: int, requests: int = REQUESTS,
    replicas: int = 1,
) -> float:  # fmt: skip
    """The highest Poisson rate, of one replica among so many, at which this world meets the objective; 0 for none.

    Replicas that share requests carry more each than one alone: the router evens out what happens to come.
    """
    pairs = np.array(lengths, dtype=np.int64)
    generator = np.random.default_rng([seed, 11])
    picked = pairs[generator.integers(0, len(pairs), requests)]
    unit_s = np.cumsum(generator.exponential(1.0, requests))
    low, high = 0.0, replicas * _most(engine, pairs)
    for _ in range(BISECTIONS):
        rate = (low + high) / 2
        if _attainment(engine, picked, unit_s / rate, objective, replicas) >= objective.attainment:
            low = rate
        else:
            high = rate
    return low / replicas


def _most(engine: Engine, pairs: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> float:
    """A rate that no replica carries: prompts alone would fill it, or answers at a full batch."""
    prompts, outputs = pairs.mean(axis=0)
    prompt_s = np.interp(prompts, list(engine.unloaded_ttft_s), list(engine.unloaded_ttft_s.values()))
    step_s = float(engine.times.tables.decode[0, engine.limits.max_num_seqs])
    return float(2.0 / max(prompt_s / 4, outputs * step_s / engine.limits.max_num_seqs, 1e-4))


def _attainment(
    engine: Engine, pairs: np.ndarray[tuple[int, ...], np.dtype[np.int64]], arrival_s: np.ndarray[
        tuple[int, ...], np.dtype[np.float64]
    ], objective: Objective, replicas: int,
) -> float:  # fmt: skip
    count = len(pairs)
    none = np.zeros(count, dtype=np.int64)
    requests = Requests(
        arrival_s=arrival_s, prompt_tokens=pairs[:, 0].copy(), output_tokens=pairs[:, 1].copy(), priority=none,
        hashes=np.zeros(0, dtype=np.int64), hash_ends=none,
    )  # fmt: skip
    variant = variant_of(engine)
    deployment = DeploymentSetup(
        name="one", variants=(variant,), targets={variant.name: replicas},
        bounds=Bounds(min_replicas=replicas, max_replicas=replicas), objective=objective,
    )  # fmt: skip
    last_s = float(arrival_s[-1])
    setup = FleetSetup(
        gpus={variant.gpu_type: replicas * variant.gpus}, deployments=(deployment,), end_s=last_s + TAIL_S
    )  # fmt: skip
    record = Fleet(setup, Traffic(requests=requests, deployment=none)).run()
    return figures(record, "one", until_s=last_s + 1.0, warm_up_s=SETTLED_SHARE * last_s).attainment
