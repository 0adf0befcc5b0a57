"""Fit the global constants of the performance model, to be written into `enova_recommender/performance/constants.py`.

    PYTHONPATH=tests python tests/tools/fit_performance.py --data DIR

Learns from vLLM's closed loops in `rec_silicon_concurrency` alone. Spreads are those of each family's errors when it is
left out of the fit (measured), and when its GPU and that GPU's kernel tables are left out as well (transferred). A type
of GPU has a spread of its own where several families were measured on it, each often enough (`has_own_spread`).
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from enova_recommender.performance.constants import GpuSpread
from enova_testing.latency_folds import Folds, has_own_spread, is_closed_vllm, is_tabled, spread_of
from enova_testing.latency_rows import silicon_rows


def main() -> None:
    """Fit and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    paths = sorted((parser.parse_args().data / "rec_silicon_concurrency").glob("*.csv.gz"))
    folds = Folds([row for row in silicon_rows(paths, set()) if is_closed_vllm(row)])
    errors = {
        far: [(row.gpu, np.log(folds.figures(row, gpu_too=far).tpot_s / (row.tpot_s or np.nan)))
              for row in folds.rows if is_tabled(row)]
        for far in (False, True)
    }  # fmt: skip
    spreads = []
    for gpu in sorted({row.gpu for row in folds.rows}, key=lambda one: one.name):
        near = [error for of, error in errors[False] if of == gpu]
        if near and has_own_spread(gpu, folds.rows):
            spreads.append(GpuSpread(
                bandwidth_bytes_per_s=gpu.bandwidth_bytes_per_s, bf16_flops=gpu.bf16_flops,
                spread=round(spread_of(near), 3),
            ))  # fmt: skip
    made = replace(
        folds.fit(), measured_spread=spread_of([error for _, error in errors[False]]),
        transferred_spread=spread_of([error for _, error in errors[True]]), gpu_spreads=tuple(spreads),
    )  # fmt: skip
    for field in fields(made):
        value = getattr(made, field.name)
        print(f"    {field.name}={value:.3g}," if isinstance(value, float) else f"    {field.name}={value},")


if __name__ == "__main__":
    main()
