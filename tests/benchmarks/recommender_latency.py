"""How well step times from kernel tables predict measured latencies and throughput.

    python tests/benchmarks/recommender_latency.py [--data DIR] [--seed N] [--out DIR]

Reads `rec_silicon_concurrency` (closed loops; TTFT and TPOT), `perf_splitwise` (fixed batches; TTFT and TPOT),
`perf_llm_inference_bench` (fixed batches; throughput) and part B of `vllm_runs` (a recorded run, replayed through the
scheduler in virtual time; medians over its requests). Global constants are fitted on the closed loops of vLLM, each
row's family left out (tier A); its type of GPU and that type's kernel tables as well (tier B); or corrected by three
measured configurations of the same model and GPU (tier C; five draws). Tiers hold vLLM only. Other engines, and vLLM
of 2024 in `perf_llm_inference_bench`, get one factor per engine and GPU, the median over the other families; both
figures, cold and with the factor, stand in `by_set`.

Raw results: `predictions.csv.gz`, a row a prediction: set, source (the dump within it), engine, label, family, gpu,
layout, load, prompt_tokens, output_tokens, concurrency, protocol (tier_a, tier_b, tier_c, cold, factor, or a baseline),
measured and predicted ttft_s, tpot_s, tokens_per_s, and spread (standard deviation of the logarithm, of which the 80 %
interval is made).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau

from enova_testing.benchmark import Benchmark, benchmark
from enova_testing.latency_baselines import aiconfigurator, neighbours, rooflines
from enova_testing.latency_folds import (
    NORMAL_80,
    Factors,
    Folds,
    corrected,
    is_closed_vllm,
    is_tabled,
    trials,
)
from enova_testing.latency_model import Figures, loop_of, predicted
from enova_testing.latency_replay import Replay, replays
from enova_testing.latency_rows import Load, Row, by_layout, inference_bench_rows, silicon_rows, splitwise_rows

DRAWS = 5                # of three known rows, in tier C
ESTIMATES_MAX = 80       # rows, evenly spaced, that AIConfigurator is asked for (FULL=1: all); it takes seconds each
LOW_CONCURRENCY = 4      # up to which TTFT is judged
Key = str | float | int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A row, what was predicted of it, and by what."""

    row: Row
    protocol: str
    figures: Figures
    spread: float | None = None


def main() -> None:
    """Read, fit, predict, compare."""
    run = benchmark("recommender_latency", __doc__)
    unknown: set[str] = set()
    rows = read(run, unknown)
    recorded = replays(run.files("vllm_runs", "*_meta.json"))
    if unknown:
        run.notes["unknown"] = f"models or GPUs that the catalogue does not hold: {sorted(unknown)}"
    folds = Folds([row for row in rows if is_closed_vllm(row)])
    predictions = [*tiers(folds, run.seed), *replayed(folds, recorded), *others(folds, rows)]
    baselines = list(compared(run, folds.rows))
    run.write("predictions", (flat(one) for one in [*predictions, *baselines]))
    report(run, predictions, baselines)


def read(run: Benchmark, unknown: set[str]) -> list[Row]:
    """All measured rows but the recorded runs."""
    return [
        *silicon_rows(run.files("rec_silicon_concurrency", "*.csv.gz"), unknown),
        *splitwise_rows(run.files("perf_splitwise", "*.csv.gz"), unknown),
        *inference_bench_rows(run.files("perf_llm_inference_bench", "*.csv.gz"), unknown),
    ]


def tiers(folds: Folds, seed: int) -> Iterable[Prediction]:
    """Predictions of vLLM's closed loops by tier."""
    for row in folds.rows:
        far = folds.spread(row, gpu_too=True)
        if is_tabled(row):
            yield Prediction(row=row, protocol="tier_a", figures=folds.figures(row), spread=folds.spread(row))
            yield Prediction(row=row, protocol="tier_b", figures=folds.figures(row, gpu_too=True), spread=far)
        else:
            yield Prediction(row=row, protocol="tier_b", figures=folds.figures(row), spread=far)
    for draw in range(DRAWS):
        for trial in trials(folds.rows, seed + draw):
            made, correction = corrected(folds, trial)
            for row in trial.asked:
                times, decode = folds.times(row, made, correction=correction), loop_of(row).decode
                spread = float(times.spreads(decode.decode_sequences, decode.context_tokens))
                yield Prediction(
                    row=row, protocol="tier_c", figures=predicted(row, times, made), spread=spread
                )


def replayed(folds: Folds, recorded: Sequence[Replay]) -> Iterable[Prediction]:
    """Predictions of recorded runs."""
    for one in recorded:
        made = folds.fit(one.row.family)
        figures = one.predicted(folds.times(one.row, made))
        spread = folds.spread(one.row, gpu_too=True)
        tier = "tier_a" if is_tabled(one.row) else "tier_b"
        yield Prediction(row=one.row, protocol=tier, figures=figures, spread=spread)


def others(folds: Folds, rows: Sequence[Row]) -> Iterable[Prediction]:
    """Predictions of other engines, cold and with one factor."""
    asked = [row for row in rows if not is_closed_vllm(row)]
    cold = [folds.figures(row) for row in asked]
    factors = Factors(tuple(asked), tuple(cold))
    for row, figures in zip(asked, cold, strict=True):
        yield Prediction(row=row, protocol="cold", figures=figures)
        scaled = factors.applied(row, figures)
        if scaled is not None:
            yield Prediction(row=row, protocol="factor", figures=scaled)


def compared(run: Benchmark, rows: Sequence[Row]) -> Iterable[Prediction]:
    """Predictions of the baselines on vLLM's closed loops."""
    if not rows:
        return
    for row, figures in zip(rows, rooflines(rows), strict=True):
        yield Prediction(row=row, protocol="roofline", figures=figures)
    for row, found in zip(rows, neighbours(rows), strict=True):
        if found is not None:
            yield Prediction(row=row, protocol="neighbour", figures=found)
    asked = rows if run.full else rows[:: max(1, len(rows) // ESTIMATES_MAX)]
    estimates, why = aiconfigurator(asked)
    run.notes["aiconfigurator"] = why or f"asked for {len(asked)} of {len(rows)} rows; it has seen this data"
    for row, found in zip(asked, estimates, strict=True):
        if found is not None:
            yield Prediction(row=row, protocol="aiconfigurator (has seen this data)", figures=found)


def flat(one: Prediction) -> dict[str, Key]:
    """One line of raw results."""
    row, figures = one.row, one.figures
    split = row.parallelism
    return {
        "set": row.data_set, "source": row.source, "engine": row.engine, "label": row.label,
        "family": "/".join(map(str, row.family)),
        "gpu": row.gpu.name, "layout": f"tp{split.tensor} dp{split.data} ep{int(split.expert)}",
        "load": row.load.value, "prompt_tokens": row.prompt_tokens, "output_tokens": row.output_tokens,
        "concurrency": row.concurrency, "protocol": one.protocol, "ttft_s": row.ttft_s, "tpot_s": row.tpot_s,
        "tokens_per_s": row.tokens_per_s, "predicted_ttft_s": figures.ttft_s, "predicted_tpot_s": figures.tpot_s,
        "predicted_tokens_per_s": figures.tokens_per_s, "spread": one.spread,
    }  # fmt: skip


# -- figures


def quantile(values: Sequence[float], share: float) -> float | None:
    """A quantile of those that are numbers, None of none."""
    known = [value for value in values if math.isfinite(value)]
    return float(np.quantile(known, share)) if known else None


def apes(predictions: Sequence[Prediction], figure: str) -> list[float]:
    """Absolute errors of one figure as shares of what was measured, where it was."""
    pairs = ((getattr(one.row, figure), getattr(one.figures, figure)) for one in predictions)
    return [abs(found - measured) / measured for measured, found in pairs if measured]


def errors(predictions: Sequence[Prediction]) -> dict[str, Key]:
    """The figures of a group of predictions."""
    early = [one for one in predictions if one.row.concurrency <= LOW_CONCURRENCY or one.row.load is Load.BATCH]
    return {
        "tpot_ape_p50": quantile(apes(predictions, "tpot_s"), 0.5),
        "tpot_ape_p90": quantile(apes(predictions, "tpot_s"), 0.9),
        "ttft_ape_p50": quantile(apes(early, "ttft_s"), 0.5), "rows": len(predictions),
    }  # fmt: skip


def tau(predictions: Sequence[Prediction]) -> tuple[float | None, int]:
    """Mean rank correlation of predicted and measured TPOT over layouts at equal concurrency, and the groups."""
    by_row = {one.row: one.figures.tpot_s for one in predictions}
    found = []
    for group in by_layout(by_row):
        if len(group) >= 3:
            value = kendalltau([row.tpot_s for row in group], [by_row[row] for row in group]).statistic
            if math.isfinite(value):
                found.append(float(value))
    return (float(np.mean(found)) if found else None), len(found)


def coverage(predictions: Sequence[Prediction]) -> float | None:
    """Share of rows whose time between tokens lies within the 80 % interval of its prediction."""
    inside = [
        abs(math.log(one.figures.tpot_s / one.row.tpot_s)) <= NORMAL_80 * one.spread
        for one in predictions if one.row.tpot_s and one.spread
    ]  # fmt: skip
    return float(np.mean(inside)) if inside else None


def report(run: Benchmark, predictions: Sequence[Prediction], baselines: Sequence[Prediction]) -> None:
    """Tables and the last line."""
    of = {name: [one for one in predictions if one.protocol == name]
          for name in ("tier_a", "tier_b", "tier_c", "cold", "factor")}
    figures: dict[str, object] = {name: errors(of[name]) for name in ("tier_a", "tier_b", "tier_c")}
    half = [math.sinh(NORMAL_80 * one.spread) for one in of["tier_a"] if one.spread]
    bench = [one for one in of["factor"] if one.row.data_set == "perf_llm_inference_bench"]
    figures["throughput_ape_p50"] = quantile(apes(bench, "tokens_per_s"), 0.5)
    figures["coverage80"], figures["coverage80_tier_c"] = coverage(of["tier_a"]), coverage(of["tier_c"])
    figures["interval_half_width_p50"] = quantile(half, 0.5)
    figures["tau_layouts"], figures["tau_groups"] = tau(of["tier_a"])
    sources = sorted({one.row.source for one in of["tier_a"]})
    figures["by_source"] = {
        name: {**errors(members), "coverage80": coverage(members)}
        for name in sources for members in [[one for one in of["tier_a"] if one.row.source == name]]
    }  # fmt: skip
    figures["by_set"] = grouped([*of["tier_a"], *of["tier_b"], *of["cold"], *of["factor"]])
    names = sorted({one.protocol for one in baselines})
    figures["baselines"] = {
        name: {**errors(chosen), "tau_layouts": tau(chosen)[0]}
        for name in names for chosen in [[one for one in baselines if one.protocol == name]]
    }  # fmt: skip
    run.table("vLLM by tier", [
        {"tier": name, **errors(of[name])} for name in ("tier_a", "tier_b", "tier_c")
    ] + [{"tier": name, **errors([one for one in baselines if one.protocol == name])} for name in names])  # fmt: skip
    run.table("By set, engine and protocol", [
        {"group": name, **found} for name, found in grouped([*of["cold"], *of["factor"]]).items()
    ])  # fmt: skip
    run.table("Tier A by model, GPU and format", by_label(of["tier_a"]))
    run.table("Tier A by source", [
        {"source": name, **errors([one for one in of["tier_a"] if one.row.source == name])} for name in sources
    ])  # fmt: skip
    run.end(figures)


def grouped(predictions: Sequence[Prediction]) -> dict[str, dict[str, Key]]:
    """Figures by set, engine and protocol."""
    groups: dict[str, list[Prediction]] = {}
    for one in predictions:
        groups.setdefault(f"{one.row.data_set}, {one.row.engine}, {one.protocol}", []).append(one)
    return {
        name: {**errors(members), "throughput_ape_p50": quantile(apes(members, "tokens_per_s"), 0.5)}
        for name, members in sorted(groups.items())
    }


def by_label(predictions: Sequence[Prediction]) -> list[dict[str, Key]]:
    """Figures by model, GPU and format, with the bias."""
    groups: dict[str, list[Prediction]] = {}
    for one in predictions:
        groups.setdefault(one.row.label, []).append(one)
    return [
        {"group": name, **errors(members), "bias": quantile(
            [one.figures.tpot_s / one.row.tpot_s for one in members if one.row.tpot_s], 0.5)}
        for name, members in sorted(groups.items())
    ]  # fmt: skip


if __name__ == "__main__":
    main()
