"""Fit the global constants of the performance model, to be written into `enova_recommender/performance/constants.py`.

    PYTHONPATH=tests python tests/tools/fit_performance.py --data DIR

Learns from vLLM's closed loops in `rec_silicon_concurrency` alone. Spreads are those of each family's errors when it is
left out of the fit (measured), and when its GPU and that GPU's kernel tables are left out as well (transferred). The
spread of a type of GPU is pooled with those of others as far as few families were measured on it (`pooled_spread`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

from enova_recommender.performance.constants import GpuSpread
from enova_recommender.types import GpuModel
from enova_testing.latency_folds import Folds, alike, is_closed_vllm, is_tabled, pooled_spread
from enova_testing.latency_rows import silicon_rows


def main() -> None:
    """Fit and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    paths = sorted((parser.parse_args().data / "rec_silicon_concurrency").glob("*.csv.gz"))
    folds = Folds([row for row in silicon_rows(paths, set()) if is_closed_vllm(row)])
    errors = {
        far: [(row, folds.error(row, gpu_too=far)) for row in folds.rows if is_tabled(row)] for far in (False, True)
    }
    spreads = [
        GpuSpread(
            bandwidth_bytes_per_s=gpu.bandwidth_bytes_per_s, bf16_flops=gpu.bf16_flops,
            spread=round(pooled_spread(errors[False], gpu), 3),
        )
        for gpu in _types(row.gpu for row, _ in errors[False])
    ]  # fmt: skip
    made = replace(
        folds.fit(), measured_spread=pooled_spread(errors[False], None),
        transferred_spread=pooled_spread(errors[True], None), gpu_spreads=tuple(spreads),
    )  # fmt: skip
    for field in fields(made):
        value = getattr(made, field.name)
        print(f"    {field.name}={value:.3g}," if isinstance(value, float) else f"    {field.name}={value},")


def _types(gpus: Iterable[GpuModel]) -> list[GpuModel]:
    """One GPU of each type."""
    found: list[GpuModel] = []
    for gpu in sorted(set(gpus), key=lambda one: one.name):
        if not any(alike(gpu, other) for other in found):
            found.append(gpu)
    return found


if __name__ == "__main__":
    main()
