"""Recorded runs of real engines, replayed in the simulator: calibrated on the first half, judged on the second.

Five numbers are fitted (what a step takes, a prompt token, a decoding sequence, a token of context, and what a first
token takes beside its steps) so that the logarithms of TTFT and of the mean gap between tokens of the first half's
requests are met; the whole run is then simulated, since what waits at its half waits in both. Requests of labelled
events and of the recovery from them are not replayed.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from enova_recommender import catalog
from enova_recommender.engine import Limits
from enova_recommender.memory import fit
from enova_recommender.performance import Affine
from enova_simulator.cluster.engines import Engines, Kind, Requests
from enova_simulator.cluster.kernel import columns as at
from enova_simulator.cluster.tables import tabulated

Floats = NDArray[np.float64]
START = (0.01, 5e-5, 1e-4, 1e-7, 0.01)
EVALUATIONS = 160
LEAST_GAPS = 3                     # tokens that a mean gap between them takes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recorded:
    """One run: NaN where the client saw nothing. `counts` are requests that were served whole."""

    name: str
    limits: Limits
    requests: Requests
    ttft_s: Floats
    gap_s: Floats
    counts: NDArray[np.bool_]


def recordings(data: Path) -> Iterator[Recorded]:
    """The runs of part B of `vllm_runs`, and those of `vllm_cpu_faults`."""
    for path in sorted((data / "vllm_runs").glob("*_requests.csv.gz")):
        meta = path.with_name(path.name.replace("_requests.csv.gz", "_meta.json"))
        if meta.exists():
            yield _gpu_run(path, json.loads(meta.read_text()))
    for folder in sorted((data / "vllm_cpu_faults").glob("*/run.json")):
        yield _cpu_run(folder.parent)


def errors(run: Recorded) -> dict[str, float]:
    """Relative errors of p50 and p95 of TTFT and of the gap between tokens, on the second half."""
    half = float(run.requests.arrival_s[-1]) / 2
    first = run.counts & (run.requests.arrival_s < half)
    second = run.counts & (run.requests.arrival_s >= half)
    times, delay_s = calibrated(run, first)
    ttft_s, gap_s = simulated(run, times, delay_s)
    found: dict[str, float] = {}
    for name, told, seen in (("ttft", ttft_s, run.ttft_s), ("gap", gap_s, run.gap_s)):
        both = second & ~np.isnan(told) & ~np.isnan(seen)
        for share in (0.5, 0.95):
            truth = float(np.quantile(seen[both], share))
            found[f"{name}_p{100 * share:.0f}"] = abs(float(np.quantile(told[both], share)) - truth) / truth
    return found


def calibrated(run: Recorded, chosen: NDArray[np.bool_]) -> tuple[Affine, float]:
    """Step times that these requests were served with, and what first tokens took beside them."""

    def loss(logs: Floats) -> float:
        ttft_s, gap_s = simulated(run, *_times(np.exp(logs)))
        parts = [
            np.abs(np.log(np.maximum(told[both], 1e-6) / np.maximum(seen[both], 1e-6))).mean()
            for told, seen in ((ttft_s, run.ttft_s), (gap_s, run.gap_s))
            if (both := chosen & ~np.isnan(told) & ~np.isnan(seen)).any()
        ]
        return float(sum(parts))

    options = {"maxfev": EVALUATIONS, "initial_simplex": np.log(START) + np.vstack([np.zeros(5), np.eye(5)])}
    found = minimize(loss, np.log(START), method="Nelder-Mead", options=options)
    return _times(np.exp(found.x))


def simulated(run: Recorded, times: Affine, delay_s: float = 0.0) -> tuple[Floats, Floats]:
    """TTFT and mean gap of every request under these step times."""
    limits = run.limits
    table = tabulated(
        times, max_num_seqs=limits.max_num_seqs, max_num_batched_tokens=limits.max_num_batched_tokens
    )
    engines = Engines([Kind(limits=limits, times=table)], run.requests, count=1)
    for index, arrival_s in enumerate(run.requests.arrival_s.tolist()):
        _pass(engines, arrival_s)
        engines.submit(0, index, arrival_s)
    _pass(engines, 1e9)
    seen = engines.state.times
    gaps = (seen[:, at.FINISH] - seen[:, at.FIRST]) / np.maximum(run.requests.output_tokens - 1, 1)
    ttft_s = seen[:, at.FIRST] - seen[:, at.ARRIVAL] + delay_s
    return ttft_s, np.where(run.requests.output_tokens >= LEAST_GAPS, gaps, np.nan)


def _pass(engines: Engines, until_s: float) -> None:
    while True:
        engines.advance(until_s)
        engines.happened()
        if not engines.stopped:
            return


def _times(values: Floats) -> tuple[Affine, float]:
    base, token, sequence, context, delay = values.tolist()
    return Affine(base_s=base, prefill_token_s=token, sequence_s=sequence, context_token_s=context), delay


def _gpu_run(path: Path, meta: Mapping[str, object]) -> Recorded:
    rows = sorted(_rows(path), key=lambda row: float(row["arrival_s"]))
    column = {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0] if name != "request_id"}
    engine = meta["engine_kwargs"]
    assert isinstance(engine, Mapping)
    outputs = column["output_toks"].astype(np.int64)
    return Recorded(
        name=path.name.removesuffix("_requests.csv.gz"),
        limits=Limits(
            num_blocks=_blocks(meta), max_num_seqs=int(engine["max_num_seqs"]),
            max_num_batched_tokens=int(engine["max_num_batched_tokens"]),
        ),
        requests=_requests(column["arrival_s"], column["input_toks"], outputs),
        ttft_s=column["first_token_s"] - column["arrival_s"],
        gap_s=np.where(
            outputs >= LEAST_GAPS, (column["last_token_s"] - column["first_token_s"]) / np.maximum(outputs - 1, 1),
            np.nan,
        ),
        counts=np.ones(len(rows), dtype=np.bool_),
    )


def _blocks(meta: Mapping[str, object]) -> int:
    """What the engine printed, else what the memory model says of a card that is not in the catalogue but alike."""
    cache = meta.get("kv_cache")
    if isinstance(cache, Mapping) and cache.get("num_gpu_blocks"):
        return int(cache["num_gpu_blocks"])
    return fit(catalog.models()["meta-llama/Llama-3.1-8B"], catalog.gpus()["H100-NVL"]).kv_blocks


def _cpu_run(folder: Path) -> Recorded:
    rows = sorted(_rows(folder / "requests.csv.gz"), key=lambda row: float(row["t"]))
    words = json.loads((folder / "run.json").read_text())["engine"]

    def setting(name: str) -> int:
        return int(words[words.index(name) + 1])

    with (folder / "events.csv").open() as lines:
        spans = [(float(event["start_s"]), float(event["recovered_s"])) for event in csv.DictReader(lines)]
    rows = [row for row in rows if not any(start <= float(row["t"]) <= end for start, end in spans)]
    arrival_s = np.array([float(row["t"]) for row in rows])
    ok = np.array([row["outcome"] == "ok" for row in rows])
    outputs = np.array([max(1, int(float(row["tokens"] or row["max_tokens"]))) for row in rows])
    return Recorded(
        name=f"cpu_{folder.name}",
        limits=Limits(
            num_blocks=setting("--num-gpu-blocks-override"), block_size=setting("--block-size"),
            max_num_seqs=setting("--max-num-seqs"), max_num_batched_tokens=setting("--max-num-batched-tokens"),
        ),
        requests=_requests(arrival_s, np.array([float(row["prompt_tokens"]) for row in rows]), outputs),
        ttft_s=np.array([float(row["ttft_s"] or "nan") for row in rows]),
        gap_s=np.where(outputs >= LEAST_GAPS, [float(row["tpot_s"] or "nan") for row in rows], np.nan),
        counts=ok,
    )


def _requests(arrival_s: Floats, prompts: Floats, outputs: NDArray[np.int64]) -> Requests:
    none = np.zeros(len(arrival_s), dtype=np.int64)
    return Requests(
        arrival_s=arrival_s, prompt_tokens=np.maximum(1, prompts).astype(np.int64),
        output_tokens=np.maximum(1, outputs).astype(np.int64), priority=none, hashes=np.zeros(0, dtype=np.int64),
        hash_ends=none,
    )


def _rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt") as lines:
        return list(csv.DictReader(lines))
