"""How fast advice is: candidates evaluated a second on one core, and the seconds of the fleet's integer programme.

A candidate counts once it has TTFT, TPOT and capacity with their intervals and a stored reason; each is asked for its
reason in words afterwards, apart from the time, which proves that it is there. Searches differ by model, lengths and
objectives; the median of all is told. Nothing is kept between searches but the kernel tables. `search_10k_s` is the CPU
time of all threads together, scaled to 10,000 candidates.

Raw results: `searches.csv.gz` with columns model, candidates, feasible, cpu_s, wall_s, reasons; `programmes.csv.gz`
with columns programme, seed, wall_s.
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
from enova_recommender.recommend.search_space import SearchSpace
from enova_recommender.recommend.types import InventoryNode, Objectives, Workload
from enova_recommender.types import GpuModel
from enova_testing.benchmark import benchmark
from enova_testing.fleets import milp_50_s, milp_1000_nodes_s

MODELS = ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-32B-Instruct", "meta-llama/Llama-3.1-70B-Instruct")
GPUS = ("H100", "H200", "A100-80G", "L40S")
NODES = 8                 # of each type, with 8 GPUs
PRICE = 3.0               # USD an hour, for types without a list price
PAIRS = 1000
SCALE = 10_000
SEEDS, FULL_SEEDS = 3, 10
SPACE = SearchSpace(prefix_caching=(True, False))

Row = dict[str, object]


def main() -> None:
    """Time searches and programmes; end in one JSON line."""
    bench = benchmark("recommender_speed", __doc__)
    seeds = range(bench.seed, bench.seed + (FULL_SEEDS if bench.full else SEEDS))
    _search(MODELS[0], seed=bench.seed)  # package data is read once
    searches = [_search(name, seed=seed) for name in MODELS for seed in seeds]
    programmes: list[Row] = [
        {"programme": name, "seed": seed, "wall_s": timed(seed)}
        for name, timed in (("milp_50_s", milp_50_s), ("milp_1000_nodes_s", milp_1000_nodes_s)) for seed in seeds
    ]  # fmt: skip
    bench.write("searches", searches)
    bench.write("programmes", programmes)
    bench.table("searches", searches)
    bench.table("programmes", programmes)
    each = statistics.median(float(str(row["cpu_s"])) / int(str(row["candidates"])) for row in searches)
    bench.end({
        "candidates_per_s": 1 / each, "search_10k_s": each * SCALE,
        **{name: _slowest(programmes, name) for name in ("milp_50_s", "milp_1000_nodes_s")},
        "cores": os.cpu_count(),
    })  # fmt: skip


def _search(model: str, *, seed: int) -> Row:
    """One search and its times."""
    draw = np.random.default_rng(seed)
    inventory = [
        InventoryNode(name=f"{name}-{index}", gpu=_priced(name), gpus=8, island_gpus=8)
        for name in GPUS for index in range(NODES)
    ]  # fmt: skip
    workload = Workload(requests_per_s=float(draw.uniform(2, 30)), lengths=_lengths(draw))
    objectives = Objectives(ttft_s=float(draw.uniform(1, 3)), tpot_s=float(draw.uniform(0.05, 0.1)))
    started_cpu_s, started_s = time.process_time(), time.perf_counter()
    found = search(catalog.models()[model], inventory, workload, objectives, space=SPACE)
    cpu_s, wall_s = time.process_time() - started_cpu_s, time.perf_counter() - started_s
    reasons = sum(bool(found.candidate(index).reason) for index in range(len(found)))
    assert reasons == len(found), "every candidate has its reason"
    return {
        "model": model, "candidates": len(found), "feasible": len(found.ranking), "cpu_s": cpu_s, "wall_s": wall_s,
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


def _slowest(rows: list[Row], name: str) -> float:
    return max(float(str(row["wall_s"])) for row in rows if row["programme"] == name)


if __name__ == "__main__":
    main()
