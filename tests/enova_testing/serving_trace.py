"""What the worlds of serving benchmarks take from data: real requests, and the residuals of a real engine's steps."""

from __future__ import annotations

import numpy as np

from enova_recommender.detection.folding import FoldSettings
from enova_recommender.detection.residual import AffineExpectation, fit_affine, log_ratio
from enova_recommender.detection.watch import FleetWatch
from enova_testing.benchmark import Benchmark, read_rows
from enova_testing.recorded_faults import recordings

DRAWN = 20_000               # requests, where there is no trace
RESIDUAL_MAX = 0.25          # beyond: something that nobody called
Requests = tuple[tuple[float, int, int], ...]


def trace(run: Benchmark) -> Requests:
    """Seconds since the one before, prompt and output tokens of real requests."""
    for path in run.files("azure_llm_2023", "conv*.csv.gz"):
        found, before_s = [], 0.0
        for row in read_rows(path):
            at_s = float(row["arrival_s"])
            found.append((at_s - before_s, int(row["prompt_tokens"]), max(1, int(row["output_tokens"]))))
            before_s = at_s
        return tuple(found)
    run.notes["trace"] = "azure_llm_2023 is absent: lengths of servegen, Gamma arrivals with a CV of 1.2"
    draw = np.random.default_rng(run.seed)
    pairs = [
        (float(row["input_p50"]), float(row["output_p50"]))
        for path in run.files("servegen", "*lengths*.csv.gz") for row in read_rows(path) if row["input_p50"]
    ]  # fmt: skip
    picks = draw.integers(0, len(pairs), DRAWN)
    shape = 1.0 / 1.2**2
    gaps = draw.gamma(shape, 1.0 / shape, DRAWN)
    spread = np.exp(draw.normal(0.0, 0.5, (DRAWN, 2)))
    return tuple(
        (float(gap), max(1, round(pairs[pick][0] * x)), max(1, round(pairs[pick][1] * y)))
        for gap, pick, (x, y) in zip(gaps, picks, spread.tolist(), strict=True)
    )


def recorded_residuals(run: Benchmark) -> tuple[float, ...]:
    """Logs of observed over fitted step times in the quiet steps of a real engine, in their order."""
    found: list[float] = []
    for recording in recordings(run.data / "vllm_cpu_faults"):
        if not recording.name.startswith("train_"):
            continue
        watch = FleetWatch(FoldSettings(bounds=recording.bounds))
        watch.place([recording.placement])
        batches = []
        for frame in recording.frames:
            watch.add(frame, now_s=frame.end_s)
            batches += [told.batches for told in watch.close(frame.end_s) if not told.judgement.verdicts]
        expectation = AffineExpectation.of(fit_affine(batches), series=1)
        logs = np.array([log_ratio(each, expectation)[0] for each in batches])
        logs = logs[np.isfinite(logs)]
        middle = float(np.median(logs))
        found += [float(each) for each in logs - middle if abs(each - middle) < RESIDUAL_MAX]
    if not found:
        run.notes["residuals"] = "vllm_cpu_faults is absent: world b has no noise of recordings"
    return tuple(found)
