"""How fast advice is: candidates evaluated a second on one core, and the seconds of the fleet's integer programme.

A candidate counts once it has TTFT, TPOT and capacity with their intervals and a stored reason; each is asked for its
reason in words afterwards, apart from the time, which proves that it is there. Searches differ by model, lengths,
cached share and objectives; the median of all is told. Nothing is kept between searches but the kernel tables.
`search_10k_s` is the CPU time of all threads together, scaled to 10,000 candidates. Candidates that differ in
max_model_len alone share their figures, and impossible layouts need none: `evaluations_per_s` and `evaluated_10k_s`
count each computation once. Programmes stop at a limit of time; `milp_50_gap` and `milp_1000_nodes_gap` are the largest
shares by which what they found may be too dear.

Raw results: `searches.csv.gz` with columns model, cached_share, candidates, evaluations, feasible, cpu_s, wall_s,
reasons; `programmes.csv.gz` with columns programme, seed, wall_s, gap, is_complete.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from dataclasses import replace

import numpy as np

from enova_recommender import catalog
from enova_recommender.recommend.search import search
from enova_recommender.recommend.types import InventoryNode, Objectives, Workload
from enova_recommender.types import GpuModel
from enova_testing.benchmark import benchmark
from enova_testing.fleets import milp_50, milp_1000_nodes
from enova_testing.search_speed import evaluations, space_for

MODELS = ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-32B-Instruct", "meta-llama/Llama-3.1-70B-Instruct")
GPUS = ("H100", "H200", "A100-80G", "L40S")
NODES = 8                 # of each type, with 8 GPUs
PRICE = 3.0               # USD an hour, for types without a list price
PAIRS = 1000
SCALE = 10_000
SEEDS, FULL_SEEDS = 3, 10
CACHED_SHARES = (0.0, 0.3)  # of prompts, in turn
PROGRAMMES = {"milp_50": milp_50, "milp_1000_nodes": milp_1000_nodes}

Row = dict[str, object]


def main() -> None:
    """Time searches and programmes; end in one JSON line."""
    bench = benchmark("recommender_speed", __doc__)
    seeds = range(bench.seed, bench.seed + (FULL_SEEDS if bench.full else SEEDS))
    _search(MODELS[0], seed=bench.seed)  # package data is read once
    searches = [_search(name, seed=seed) for name in MODELS for seed in seeds]
    programmes = [_programme(name, seed=seed) for name in PROGRAMMES for seed in seeds]
    bench.write("searches", searches)
    bench.write("programmes", programmes)
    bench.table("searches", searches)
    bench.table("programmes", programmes)
    each, distinct = (_cpu_s(searches, of) for of in ("candidates", "evaluations"))
    bench.end({
        "candidates_per_s": 1 / each, "search_10k_s": each * SCALE, "evaluations_per_s": 1 / distinct,
        "evaluated_10k_s": distinct * SCALE,
        **{f"{name}_s": _largest(programmes, name, "wall_s") for name in PROGRAMMES},
        **{f"{name}_gap": _largest(programmes, name, "gap") for name in PROGRAMMES},
        "cores": os.cpu_count(),
    })  # fmt: skip


def _cpu_s(searches: list[Row], of: str) -> float:
    """Median CPU seconds of one candidate, or of one evaluation."""
    return statistics.median(float(str(row["cpu_s"])) / int(str(row[of])) for row in searches)


def _programme(name: str, *, seed: int) -> Row:
    """One allocation, its time and how far from the best it may be."""
    wall_s, found = PROGRAMMES[name](seed)
    return {"programme": name, "seed": seed, "wall_s": wall_s, "gap": found.gap, "is_complete": int(found.complete)}


def _search(model: str, *, seed: int) -> Row:
    """One search and its times."""
    draw = np.random.default_rng(seed)
    inventory = [
        InventoryNode(name=f"{name}-{index}", gpu=_priced(name), gpus=8, island_gpus=8)
        for name in GPUS for index in range(NODES)
    ]  # fmt: skip
    workload = Workload(
        requests_per_s=float(draw.uniform(2, 30)), lengths=_lengths(draw),
        cached_prefix_share=CACHED_SHARES[seed % len(CACHED_SHARES)],
    )  # fmt: skip
    objectives = Objectives(ttft_s=float(draw.uniform(1, 3)), tpot_s=float(draw.uniform(0.05, 0.1)))
    started_cpu_s, started_s = time.process_time(), time.perf_counter()
    found = search(catalog.models()[model], inventory, workload, objectives, space=space_for(workload))
    cpu_s, wall_s = time.process_time() - started_cpu_s, time.perf_counter() - started_s
    reasons = sum(bool(found.candidate(index).reason) for index in range(len(found)))
    assert reasons == len(found), "every candidate has its reason"
    return {
        "model": model, "cached_share": workload.cached_prefix_share, "candidates": len(found),
        "evaluations": evaluations(found), "feasible": len(found.ranking), "cpu_s": cpu_s, "wall_s": wall_s,
        "reasons": reasons,
    }  # fmt: skip


def _priced(name: str) -> GpuModel:
    gpu = catalog.gpus()[name]
    return gpu if gpu.price_per_hour else replace(gpu, price_per_hour=PRICE)


def _lengths(draw: np.random.Generator) -> tuple[tuple[int, int], ...]:
    """Lognormal prompts and answers."""
    means = draw.uniform((300, 100), (2000, 500))
    columns = [
        np.clip(np.rint(draw.lognormal(math.log(mean) - 0.5, 1.0, PAIRS)), 1, 6000).astype(int).tolist()
        for mean in means
    ]
    return tuple(zip(*columns, strict=True))


def _largest(rows: list[Row], name: str, figure: str) -> float:
    return max(float(str(row[figure])) for row in rows if row["programme"] == name)


if __name__ == "__main__":
    main()
