"""Fit how far hosts and versions of the engine are apart, for `enova_recommender/performance/constants.py`.

    PYTHONPATH=tests python tests/tools/fit_sites.py --data DIR

A site is one data set on one type of GPU whose kernels were measured: vLLM's closed loops in `rec_silicon_concurrency`,
and its fixed batches of 2024 in `perf_llm_inference_bench`. Of each site with several families three factors on the
shipped constants are found, on kernels, on the host's seconds a step and on those a sequence, so that logarithms of its
cycles fit best (large errors count linearly). The host's doubts are the root mean squares of their logarithms over the
sites. That of kernels is the one over models (in one format on one GPU) of the mean error of their closed loops, each
predicted without its family. A few sites are little proof: all are widened as Student's distribution of so many is.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares
from scipy.stats import t as student

from enova_recommender.performance import FITTED, KernelTimes
from enova_recommender.types import Batch
from enova_testing.latency_folds import NORMAL_80, Folds, is_closed_vllm, is_tabled
from enova_testing.latency_model import CLASSES, features, loop_of
from enova_testing.latency_rows import Load, Row, inference_bench_rows, silicon_rows

Floats = npt.NDArray[np.float64]

WIDTH = np.array([1.0, 2.0, 2.0])  # of the logarithms' prior: next to none
ERROR = 0.1
ROWS_PER_PRIOR = 10.0
FAMILIES_MIN = 2          # of a site: one model's fault is not its host's


def cycle_of(row: Row) -> tuple[Floats, float]:
    """Seconds of a cycle by kernels, host's steps and sequences, with the shipped constants; and how long it took."""
    times = KernelTimes(row.shape, row.gpu, parallelism=row.parallelism, precision=row.precision)
    if row.load is Load.CLOSED:
        loop = loop_of(row)
        beside = features(times, loop.around) if loop.around else 0.0
        prompt = sum((features(times, chunk) - beside for chunk in loop.chunks), np.zeros(len(CLASSES) + 3))
        total = row.output_tokens * features(times, loop.decode) + loop.clients * prompt
        took = (row.ttft_s or 0) + (row.output_tokens - 1) * (row.tpot_s or 0)
    else:
        batch, prompt_tokens = int(row.concurrency), row.prompt_tokens
        context = batch * (prompt_tokens + row.output_tokens // 2)
        prefill = Batch(prefill_tokens=batch * prompt_tokens, prefill_pairs=batch * prompt_tokens**2 // 2)
        decode = Batch(decode_sequences=batch, context_tokens=context)
        total = features(times, prefill) + row.output_tokens * features(times, decode)
        took = batch * (prompt_tokens + row.output_tokens) / (row.tokens_per_s or 1)
    steps, with_prompts, sequences = total[len(CLASSES) :]
    host = FITTED.step_s * steps + FITTED.prefill_step_s * with_prompts
    return np.array([total[: len(CLASSES)].sum(), host, FITTED.sequence_s * sequences]), took


def factors_of(rows: Sequence[Row]) -> Floats:
    """Logarithms of a site's three factors."""
    parts, took = (np.array(column) for column in zip(*(cycle_of(row) for row in rows), strict=True))
    families = [row.family for row in rows]
    weights = 1 / np.sqrt([families.count(one) for one in families])
    weights *= np.sqrt(ROWS_PER_PRIOR / len(set(families)))

    def errors(point: Floats) -> Floats:
        return np.concatenate([weights * np.log(parts @ np.exp(point) / took) / ERROR, point / WIDTH])

    return np.asarray(least_squares(errors, np.zeros(3), loss="soft_l1").x)


def model_errors(rows: Sequence[Row]) -> list[float]:
    """Mean logarithms of the errors between tokens of each model, format and GPU, predicted without the family."""
    folds, found = Folds(rows), defaultdict(list)
    for row in rows:
        if is_tabled(row):
            found[row.label].append(np.log(folds.figures(row).tpot_s / (row.tpot_s or np.nan)))
    return [float(np.mean(errors)) for errors in found.values()]


def doubt(logarithms: Sequence[float]) -> float:
    """The deviation of the normal distribution whose 80 % interval is that of one more of these."""
    scale = float(np.sqrt(np.mean(np.square(logarithms))))
    return scale * float(student.ppf(0.9, len(logarithms))) / NORMAL_80


def main() -> None:
    """Fit and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    folder = parser.parse_args().data
    closed = silicon_rows(sorted((folder / "rec_silicon_concurrency").glob("*.csv.gz")), set())
    batches = inference_bench_rows(sorted((folder / "perf_llm_inference_bench").glob("*.csv.gz")), set())
    sites: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in (*closed, *(row for row in batches if row.engine.startswith("vLLM"))):
        if is_tabled(row) and (row.load is Load.BATCH or is_closed_vllm(row)):
            sites[row.data_set, row.gpu.name].append(row)
    found = {
        name: factors_of(rows) for name, rows in sites.items() if len({one.family for one in rows}) >= FAMILIES_MIN
    }
    for name, logarithms in found.items():
        print(f"    # {name}, {len(sites[name])} rows: {np.round(np.exp(logarithms), 2)}")
    _, steps, sequences = np.array(list(found.values())).T
    print(f"    kernels_doubt={doubt(model_errors([row for row in closed if is_closed_vllm(row)])):.2f},")
    print(f"    step_doubt={doubt(steps):.2f},")
    print(f"    sequence_doubt={doubt(sequences):.2f},")


if __name__ == "__main__":
    main()
