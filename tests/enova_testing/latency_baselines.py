"""What else could predict latencies: a plain roofline, the nearest measured neighbour, and AIConfigurator."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from enova_recommender.memory import layer_weight_bytes
from enova_recommender.performance import FITTED, Efficiency, Roofline, Slowed
from enova_testing.latency_model import Figures, predicted
from enova_testing.latency_rows import Row

PERFECT = Efficiency(
    matrix_compute=1, matrix_memory=1, attention_compute=1, attention_memory=1, link=1, collective_s=0, step_s=0,
    sequence_s=0,
)  # fmt: skip
PLAIN = replace(FITTED, first_token_s=0.0, first_token_steps=1.0)
ESTIMATES = Path(__file__).parents[1] / "tools" / "aiconfigurator_estimates.py"
ESTIMATES_TIMEOUT_S = 900


def rooflines(rows: Sequence[Row]) -> list[Figures]:
    """Data sheets at one global efficiency, which is fitted on the times between tokens of the other families."""
    bare = []
    for row in rows:
        times = Roofline(
            row.shape, row.gpu, parallelism=row.parallelism, precision=row.precision, efficiency=PERFECT
        )
        bare.append((times, predicted(row, times, PLAIN).tpot_s))
    found = []
    for row, (times, _) in zip(rows, bare, strict=True):
        ratios = [
            other.tpot_s / tpot for other, (_, tpot) in zip(rows, bare, strict=True)
            if other.family != row.family and other.tpot_s
        ]  # fmt: skip
        factor = float(np.median(ratios)) if ratios else 1.0
        found.append(predicted(row, Slowed(times=times, factor=factor), PLAIN))
    return found


def neighbours(rows: Sequence[Row]) -> list[Figures | None]:
    """The figures of the nearest row of another family: sizes, GPU, layout and load, in standard deviations of logs."""
    places = np.array([_place(row) for row in rows])
    places = (places - places.mean(axis=0)) / np.where(places.std(axis=0) > 0, places.std(axis=0), 1)
    found: list[Figures | None] = []
    for row, place in zip(rows, places, strict=True):
        far = ((places - place) ** 2).sum(axis=1)
        far[[index for index, other in enumerate(rows) if other.family == row.family]] = np.inf
        nearest = rows[int(np.argmin(far))]
        if not np.isfinite(far.min()) or nearest.ttft_s is None or nearest.tpot_s is None:
            found.append(None)
            continue
        cycle = nearest.ttft_s + nearest.tpot_s * (row.output_tokens - 1)
        found.append(Figures(
            ttft_s=nearest.ttft_s, tpot_s=nearest.tpot_s, tokens_per_s=row.concurrency * row.output_tokens / cycle
        ))  # fmt: skip
    return found


def _place(row: Row) -> list[float]:
    """Logarithms of what a row's times depend on."""
    gpus = row.parallelism.gpus
    values = (
        row.shape.active_linear_parameters, layer_weight_bytes(row.shape, row.precision) / gpus,
        row.gpu.bandwidth_bytes_per_s, row.gpu.bf16_flops, gpus, row.concurrency, row.prompt_tokens, row.output_tokens,
    )  # fmt: skip
    return [math.log(value) for value in values]


def aiconfigurator(rows: Sequence[Row]) -> tuple[list[Figures | None], str]:
    """AIConfigurator's estimates, in an environment of its own, and why there are none if there are none.

    The interpreter is that of AICONFIGURATOR_PYTHON, else one that `uv` makes.
    """
    asked = os.environ.get("AICONFIGURATOR_PYTHON")
    uv = shutil.which("uv")
    if asked:
        command = [asked, str(ESTIMATES)]
    elif uv:
        command = [uv, "run", "--no-project", "--python", "3.11", "--with", "aiconfigurator", "python", str(ESTIMATES)]
    else:
        return [None] * len(rows), "neither AICONFIGURATOR_PYTHON nor uv: not run"
    lines = "".join(json.dumps([*row.silicon, row.precision.kv_cache_dtype]) + "\n" for row in rows)
    try:
        done = subprocess.run(
            command, input=lines, capture_output=True, text=True, timeout=ESTIMATES_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return [None] * len(rows), f"no answer within {ESTIMATES_TIMEOUT_S} s"
    if done.returncode != 0:
        return [None] * len(rows), f"ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    if len(answers) != len(rows):
        return [None] * len(rows), f"{len(answers)} answers to {len(rows)} questions"
    found: list[Figures | None] = []
    for row, answer in zip(rows, answers, strict=True):
        if not answer or not answer[1]:
            found.append(None)
            continue
        ttft, tpot = answer[0] / 1e3, answer[1] / 1e3
        rate = row.concurrency * row.output_tokens / (ttft + tpot * (row.output_tokens - 1))
        found.append(Figures(ttft_s=ttft, tpot_s=tpot, tokens_per_s=rate))
    return found, ""

