"""Fit the additive world of the fleet's simulation, for `enova_simulator/cluster/worlds.py`.

    python tests/tools/fit_additive_world.py --data DIR

Only `perf_splitwise` is used, and nothing else is fitted on it. A decode step of `batch_size` sequences that have
`prompt_size` and half of their answer takes base + sequences + context; a prompt step base + tokens + pairs. Both are
non-negative least squares on relative errors, over the means of repeated rows; prompt steps of up to 16,384 tokens.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

TOKENS_MAX = 16_384     # of a prompt step: engines compute no more at once
FILES = {"llama2_70b_bloom_176b.csv.gz": 1e-3, "llama3_a100_sageserve_seconds.csv.gz": 1.0}


def rows(folder: Path) -> dict[tuple[str, str, int], dict[tuple[int, int, int], list[tuple[float, float]]]]:
    """Prompt and decode-step seconds by (model, hardware, tensor parallel size), then by batch."""
    found: dict[tuple[str, str, int], dict[tuple[int, int, int], list[tuple[float, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for name, unit in FILES.items():
        with gzip.open(folder / name, "rt") as lines:
            for row in csv.DictReader(lines):
                tokens = int(row["token_size"])
                # In the file in seconds the decode time is that of the whole answer.
                step_s = float(row["token_time"]) * unit / (max(1, tokens - 1) if unit == 1.0 else 1)
                key = row["model"], row["hardware"], int(row["tensor_parallel"])
                batch = int(row["batch_size"]), int(row["prompt_size"]), tokens
                found[key][batch].append((float(row["prompt_time"]) * unit, step_s))
    return found


def fit(
    batches: dict[tuple[int, int, int], list[tuple[float, float]]], *, single: bool
) -> tuple[list[float], float, float]:
    """base, prefill token, prefill pair, sequence, context token; the median relative errors of both parts.

    `single`: prompts of batches were measured one after another, so that those of one request alone count.
    """
    decode, prompt = [], []
    for (size, length, tokens), times in batches.items():
        prompt_s, step_s = np.mean(times, axis=0)
        decode.append((1.0, size, size * (length + tokens / 2), step_s))
        if single and size > 1:
            continue
        prompt.append((1.0, size * length, size * length * (length + 1) / 2, prompt_s))
    step = np.array(decode)
    (base, sequence, context), _ = nnls(step[:, :3] / step[:, 3:], np.ones(len(step)))
    first = np.array([row for row in prompt if row[1] <= TOKENS_MAX])
    rest = np.maximum(first[:, 3] - base, 1e-4)
    (token, pair), _ = nnls(first[:, 1:3] / first[:, 3:], rest / first[:, 3])
    step_error = np.abs(step[:, :3] @ (base, sequence, context) / step[:, 3] - 1)
    first_error = np.abs((base + first[:, 1] * token + first[:, 2] * pair) / first[:, 3] - 1)
    return [base, token, pair, sequence, context], float(np.median(step_error)), float(np.median(first_error))


def main() -> None:
    """Print the constants."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    for key, batches in sorted(rows(parser.parse_args().data / "perf_splitwise").items()):
        constants, step_error, first_error = fit(batches, single="3" in key[0])
        print(key, " ".join(f"{value:.4g}" for value in constants), f"errors {step_error:.1%} {first_error:.1%}")


if __name__ == "__main__":
    main()
