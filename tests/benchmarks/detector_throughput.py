"""How long one step of live detection takes for a large fleet, on one core, and how much memory its windows need.

A fleet of REPLICAS replicas, eight a node and four a deployment, works with noise, each at its own load; nodes send
FRAMES frames a step each. Expected are the step times of measured kernels, of KINDS models and GPUs, every deployment
with a correction of its own as live calibration makes them. One replica in a hundred waits for a larger batch. Steps
before anything is learnt and later ones, with the variants' own fits, count alike; `fit_step_max_s` is the longest of
all. Raw results: `steps.csv.gz` (step, seconds to take frames in, seconds to fold and judge, verdicts). The window of
an hour is filled before memory is read.
"""

from __future__ import annotations

import math
import resource
import time

import numpy as np

from enova_common.vllm import REQUEST_LATENCY_BUCKETS_S, TOKEN_LATENCY_BUCKETS_S, TTFT_BUCKETS_S
from enova_recommender.catalog import find_gpu, find_model
from enova_recommender.detection.features import COLUMN
from enova_recommender.detection.folding import FoldSettings
from enova_recommender.detection.observation import (
    INTER_TOKEN,
    QUEUE,
    TTFT,
    BucketCounts,
    FrameReading,
    GpuReading,
    Placement,
    ReplicaReading,
    RequestReading,
)
from enova_recommender.detection.watch import FleetWatch
from enova_recommender.performance import Correction, KernelTimes
from enova_recommender.types import Parallelism
from enova_testing.benchmark import benchmark

REPLICAS, PER_NODE, PER_VARIANT = 10_000, 8, 4
STEP_S, WINDOW_S = 5.0, 3600.0
STEPS = 32               # so that every variant is fitted once
WARM_STEPS = 2
FRAMES = 5               # a step, as agents send by default
KINDS = (
    ("meta-llama/Llama-3.1-8B-Instruct", "H100", 1), ("meta-llama/Llama-3.1-8B-Instruct", "A100-80G", 1),
    ("meta-llama/Llama-3.1-70B-Instruct", "H100", 4), ("Qwen/Qwen2.5-7B-Instruct", "L40S", 1),
)  # fmt: skip
BOUNDS = {TTFT: TTFT_BUCKETS_S, INTER_TOKEN: TOKEN_LATENCY_BUCKETS_S, QUEUE: REQUEST_LATENCY_BUCKETS_S}


def placements() -> list[Placement]:
    """The fleet."""
    return [
        Placement(
            replica=f"replica-{index}", deployment=f"deployment-{index // PER_VARIANT}",
            variant=f"variant-{index // PER_VARIANT}", nodes=(f"node-{index // PER_NODE}",), gpus=(f"gpu-{index}",),
            max_num_seqs=256.0, max_num_batched_tokens=2048.0, max_model_len=8192.0, kv_tokens=400_000.0,
            capacity_rps=5.0, ttft_p95_s=2.0, tpot_p95_s=0.05,
        )
        for index in range(REPLICAS)
    ]  # fmt: skip


def expected() -> dict[str, KernelTimes]:
    """Step times by replica: one object a deployment."""
    kinds = []
    for model, name, tensor in KINDS:
        shape, gpu = find_model(model), find_gpu(name)
        if shape is not None and gpu is not None:
            kinds.append(KernelTimes(shape, gpu, parallelism=Parallelism(tensor=tensor)))
    deployments = [
        kinds[number % len(kinds)].corrected(Correction(memory=1.0 + 0.001 * (number % 50), spread=0.06))
        for number in range(math.ceil(REPLICAS / PER_VARIANT))
    ]
    return {f"replica-{row}": deployments[row // PER_VARIANT] for row in range(REPLICAS)}


def frames(now_s: float, sequence: int, noise: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[FrameReading]:
    """One frame a node."""
    made = []
    for first in range(0, REPLICAS, PER_NODE):
        rows = range(first, min(first + PER_NODE, REPLICAS))
        made.append(FrameReading(
            node=f"node-{first // PER_NODE}", boot="boot", sequence=sequence, start_s=now_s - 1.0, end_s=now_s,
            gpus=tuple(GpuReading(f"gpu-{row}", 0.9, 400.0, 700.0, 60.0, 1980.0, 7e10, 8e10, 0.0) for row in rows),
            replicas=tuple(_reading(row, now_s, float(noise[row])) for row in rows),
            requests=tuple(
                RequestReading(f"deployment-{row // PER_VARIANT}", f"replica-{row}", "", 4.0, 4.0) for row in rows
            ),
        ))  # fmt: skip
    return made


def _reading(row: int, now_s: float, noise: float) -> ReplicaReading:
    load = 0.5 + (row % 17) / 17.0
    tokens, firsts = 1000.0 * load * now_s, 4.0 * load * now_s
    waiting = 20.0 if row % 100 == 0 else 0.0
    return ReplicaReading(
        replica=f"replica-{row}", instance="uid.1.0.000.agent", state="READY", running=15.0 * load, waiting=waiting,
        held=15.0 * load + waiting, kv_cache_usage=0.2, resident_memory_bytes=8e9, prompt_tokens=1600.0 * load * now_s,
        generation_tokens=tokens, preemptions=0.0, iterations=70.0 * now_s, prefix_cache_hits=0.0,
        finished={"stop": firsts},
        histograms={
            TTFT: BucketCounts([firsts] * (len(TTFT_BUCKETS_S) + 1), 0.1 * firsts),
            INTER_TOKEN: BucketCounts(
                [tokens] * (len(TOKEN_LATENCY_BUCKETS_S) + 1), tokens * (0.013 + 0.001 * load) + noise
            ),
            QUEUE: BucketCounts([firsts] * (len(REQUEST_LATENCY_BUCKETS_S) + 1), 0.01 * firsts),
        },
    )  # fmt: skip


def main() -> None:
    """Feed, time, print."""
    run = benchmark("detector_throughput", __doc__)
    draw = np.random.default_rng(run.seed)
    watch = FleetWatch(FoldSettings(step_s=STEP_S, window_s=WINDOW_S, bounds=BOUNDS))
    watch.place(placements())
    watch.expect(expected())
    every_s = STEP_S / FRAMES
    rows: list[dict[str, object]] = []
    added_s, sequence = 0.0, 0
    for tick in range(1, round(STEPS * STEP_S / every_s) + 1):
        now_s, sequence = tick * every_s, sequence + 1
        made = frames(now_s - 0.5, sequence, draw.normal(0.0, 0.05, REPLICAS))
        began_s = time.process_time()
        for frame in made:
            watch.add(frame, now_s=now_s)
        added_s += time.process_time() - began_s
        began_s = time.process_time()
        told = watch.close(now_s + 1.6)
        closed_s = time.process_time() - began_s
        rows += [
            {"step": each.step.number, "add_s": added_s, "close_s": closed_s, "verdicts": len(each.judgement.verdicts)}
            for each in told
        ]
        added_s = 0.0 if told else added_s
    per_step = [float(str(row["add_s"])) + float(str(row["close_s"])) for row in rows[WARM_STEPS:]]
    last = int(str(rows[-1]["step"])) * STEP_S
    for number in range(1, round(WINDOW_S / STEP_S) + 1):  # silence fills the window: memory is what it is when full
        watch.fold.close(last + number * STEP_S + 2 * STEP_S)
    run.write("steps", rows)
    run.table("steps", rows)
    run.end({
        "seconds_per_step": float(np.median(per_step)) if per_step else math.nan,
        "seconds_per_step_max": max(per_step, default=math.nan),
        "fit_step_max_s": max((float(str(row["close_s"])) for row in rows), default=math.nan),
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "replicas": REPLICAS, "features": len(COLUMN), "frames_per_step": FRAMES,
    })  # fmt: skip


if __name__ == "__main__":
    main()
