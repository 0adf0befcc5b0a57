"""How fast the fleet's simulation is, and how far it is from the live simulated engine and from recorded engines.

Speed: Poisson arrivals of 1,000,000 requests (100,000 with QUICK=1) with the lengths of Azure's conversation service on
50 replicas of Llama-3.1-8B on H100 at 70 % of what they carry, prefix cache on, router and gates of production; CPU
seconds of one core, the compilation left out. Engine: the same 150 requests over HTTP to a live simulated engine and in
the simulator, with the same step times; the largest relative error of TTFT and of the gap between tokens at p50 and p99
(a busy machine delays the live engine: run it alone). Recordings: `enova_testing.recorded_replay`;
`error_vs_recorded_p50` is the median over runs of the errors at p50, both figures.

Raw results: `recorded.csv.gz` (run, ttft_p50, ttft_p95, gap_p50, gap_p95: relative errors), `engine.csv.gz` (request,
live_ttft_s, live_gap_s, simulated_ttft_s, simulated_gap_s).
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import httpx
import numpy as np

from enova_recommender.engine import Limits
from enova_recommender.performance import Affine
from enova_recommender.scaling.bounds import Bounds
from enova_recommender.scaling.situation import Objective
from enova_simulator.cluster.capacity import goodput, variant_of
from enova_simulator.cluster.engines import Requests
from enova_simulator.cluster.fleet import Fleet
from enova_simulator.cluster.kernel import columns as at
from enova_simulator.cluster.outcome import figures
from enova_simulator.cluster.setup import DeploymentSetup, FleetSetup, Traffic
from enova_simulator.cluster.trace import Rows, read, requests_of
from enova_simulator.cluster.worlds import LLAMA_8B, World, engine
from enova_testing.benchmark import Benchmark, benchmark
from enova_testing.recorded_replay import Recorded, errors, recordings, simulated
from enova_testing.simulated_engine import MODEL, SimulatedEngine

REQUESTS, QUICK_REQUESTS = 1_000_000, 100_000
REPLICAS, LOAD = 50, 0.7
OBJECTIVE = Objective(ttft_s=1.0, tpot_s=0.05)
LIVE_REQUESTS, LIVE_RATE = 150, 4.0
LIVE_TIMES = Affine(base_s=0.02, prefill_token_s=1e-4, sequence_s=5e-4, context_token_s=1e-7)
LIVE_LIMITS = Limits(num_blocks=4096, max_num_seqs=32, max_num_batched_tokens=2048)
LENGTHS_SHIPPED = Path(__file__).parents[2] / "cli" / "enova_cli" / "samples"


def lengths(bench: Benchmark) -> Rows:
    """Azure's conversation service: of the data folder, else what ships with the command line."""
    import gzip

    found = bench.files("azure_llm_2023", "conv*.csv.gz") or sorted(LENGTHS_SHIPPED.glob("azure_conv*.csv.gz"))
    with gzip.open(found[0], "rt") as lines:
        return read(lines)


def fleet_of(pairs: Rows, *, requests: int, seed: int) -> Fleet:
    """The fleet whose speed is measured."""
    one = engine(World.MATCHED, model=LLAMA_8B, gpu="H100")
    rate = LOAD * REPLICAS * goodput(one, pairs.lengths, OBJECTIVE, seed=seed)
    draw = np.random.default_rng(seed)
    picked = draw.integers(0, len(pairs), requests)
    rows = Rows(
        arrival_s=np.cumsum(draw.exponential(1.0 / rate, requests)), prompt_tokens=pairs.prompt_tokens[picked],
        output_tokens=pairs.output_tokens[picked],
    )
    variant = variant_of(one)
    deployment = DeploymentSetup(
        name="d", variants=(variant,), targets={variant.name: REPLICAS},
        bounds=Bounds(min_replicas=REPLICAS, max_replicas=REPLICAS), objective=OBJECTIVE,
    )
    setup = FleetSetup(
        gpus={variant.gpu_type: REPLICAS}, deployments=(deployment,), end_s=float(rows.arrival_s[-1]) + 60.0, seed=seed
    )
    return Fleet(setup, Traffic(requests=requests_of(rows), deployment=np.zeros(requests, dtype=np.int64)))


def speed(bench: Benchmark) -> dict[str, object]:
    """Requests and engine steps a CPU second, of a whole run."""
    count = QUICK_REQUESTS if os.environ.get("QUICK") else REQUESTS
    fleet = fleet_of(lengths(bench), requests=count, seed=bench.seed)       # compiles, too
    started_s = time.process_time()
    record = fleet.run()
    spent_s = time.process_time() - started_s
    told = figures(record, "d", warm_up_s=0.0, until_s=record.end_s - 60.0)
    steps = float(fleet.engines.state.clocks[:, at.STEPPED].sum())
    return {
        "requests": count, "cpu_s": spent_s, "requests_per_second": count / spent_s,
        "steps_per_second": steps / spent_s, "attainment": told.attainment, "ttft_p50_s": told.ttft_p50_s,
    }


async def _ask(client: httpx.AsyncClient, url: str, start_s: float, one: tuple[float, int, int]) -> tuple[float, float]:
    """TTFT and mean gap of one streamed completion, sent at its time."""
    arrival_s, prompt, output = one
    await asyncio.sleep(max(0.0, start_s + arrival_s - time.monotonic()))
    body = {"model": MODEL, "prompt": [7] * prompt, "max_tokens": output, "ignore_eos": True, "stream": True}
    sent_s, first_s, last_s = time.monotonic(), 0.0, 0.0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                last_s = time.monotonic()
                first_s = first_s or last_s
    return first_s - sent_s, (last_s - first_s) / max(1, output - 1)


async def _live(url: str, requests: Requests) -> list[tuple[float, float]]:
    ones = list(zip(
        requests.arrival_s.tolist(), requests.prompt_tokens.tolist(), requests.output_tokens.tolist(), strict=True
    ))
    limits = httpx.Limits(max_connections=256)
    async with httpx.AsyncClient(timeout=120.0, limits=limits) as client:
        start_s = time.monotonic() + 1.0
        return await asyncio.gather(*(_ask(client, url, start_s, one) for one in ones))


def against_engine(bench: Benchmark) -> dict[str, float]:
    """Relative errors at p50 and p99 against the live simulated engine."""
    draw = np.random.default_rng(bench.seed)
    none = np.zeros(LIVE_REQUESTS, dtype=np.int64)
    requests = Requests(
        arrival_s=np.cumsum(draw.exponential(1.0 / LIVE_RATE, LIVE_REQUESTS)),
        prompt_tokens=draw.integers(200, 1500, LIVE_REQUESTS), output_tokens=draw.integers(20, 120, LIVE_REQUESTS),
        priority=none, hashes=np.zeros(0, dtype=np.int64), hash_ends=none,
    )
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times.json"
        times.write_text(json.dumps({"format": "enova.step_times/v1", **asdict(LIVE_TIMES)}))
        words = (
            "--simulated-step-times", str(times), "--max-num-seqs", str(LIVE_LIMITS.max_num_seqs),
            "--max-num-batched-tokens", str(LIVE_LIMITS.max_num_batched_tokens),
            "--num-gpu-blocks-override", str(LIVE_LIMITS.num_blocks), "--no-enable-prefix-caching",
        )
        with SimulatedEngine(Path(folder), *words) as live:
            seen = np.array(asyncio.run(_live(live.url, requests)))
    everything = np.ones(LIVE_REQUESTS, dtype=np.bool_)
    run = Recorded(
        name="live", limits=LIVE_LIMITS, requests=requests, ttft_s=seen[:, 0], gap_s=seen[:, 1], counts=everything
    )
    told = simulated(run, LIVE_TIMES)
    bench.write("engine", [
        {"request": place, "live_ttft_s": seen[place, 0], "live_gap_s": seen[place, 1],
         "simulated_ttft_s": told[0][place], "simulated_gap_s": told[1][place]}
        for place in range(LIVE_REQUESTS)
    ])
    found = {}
    for place, name in enumerate(("ttft", "gap")):
        for share in (0.5, 0.99):
            truth = float(np.quantile(seen[:, place], share))
            found[f"{name}_p{100 * share:.0f}"] = abs(float(np.quantile(told[place], share)) - truth) / truth
    return found


def main() -> None:
    """Measure all three."""
    bench = benchmark("simulator", __doc__)
    fast = speed(bench)
    bench.table("Speed", [fast])
    live = against_engine(bench)
    bench.table("Relative error against the live simulated engine", [dict(live)])
    rows: list[dict[str, object]] = [{"run": run.name, **errors(run)} for run in recordings(bench.data)]
    if rows:
        bench.write("recorded", rows)
        bench.table("Relative error against recordings, second half", rows)
    else:
        bench.notes["error_vs_recorded_p50"] = "no recordings in the data folder"
    middles = [float(str(row[key])) for row in rows for key in ("ttft_p50", "gap_p50")]
    bench.end({
        "requests_per_second": fast["requests_per_second"], "steps_per_second": fast["steps_per_second"],
        "requests": fast["requests"], "cpu_s": fast["cpu_s"], "error_vs_engine": max(live.values()),
        "engine": live, "error_vs_recorded_p50": float(np.median(middles)) if middles else None, "recorded": rows,
    })


if __name__ == "__main__":
    main()
