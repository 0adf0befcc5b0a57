"""The benchmark's fit finds constants again, its two ways to predict agree, and nobody learns from his own family."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from enova_recommender import catalog
from enova_recommender.performance import Constants, KernelTimes, ObservedStep, Tier, calibrated
from enova_recommender.types import GpuModel, Parallelism, Precision
from enova_testing.latency_fit import FIELDS, PRIOR, UNIT, constants, fitted, measured
from enova_testing.latency_folds import (
    Factors,
    Folds,
    Trial,
    corrected,
    pooled_spread,
    tables_without,
    trials,
)
from enova_testing.latency_model import Figures, loop_of, predicted
from enova_testing.latency_rows import Load, Row, silicon_gpus, told_once

MODELS = ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-70B-Instruct", "openai/gpt-oss-120b")
TRUTH = replace(UNIT, experts=0.7, collective=1.3, step_s=9e-4, first_token_s=0.012)


def server(name: str, tensor: int, clients: int, prompt: int) -> Row:
    return Row(
        data_set="made", engine="vllm", shape=catalog.models()[name], gpu=catalog.gpus()["H100"],
        parallelism=Parallelism(tensor=tensor), precision=Precision(), load=Load.CLOSED, prompt_tokens=prompt,
        output_tokens=500, concurrency=clients,
    )  # fmt: skip


def rows_by(made: Constants) -> list[Row]:
    """Rows whose figures are what these constants predict."""
    found = []
    for name in MODELS:
        for tensor in (1, 2, 4, 8)[2 if "70B" in name else 0 :]:
            for clients in (1, 4, 32):
                row = server(name, tensor, clients, 2000)
                figures = predicted(row, times(row, made), made)
                found.append(replace(row, ttft_s=figures.ttft_s, tpot_s=figures.tpot_s))
    return found


def times(row: Row, made: Constants) -> KernelTimes:
    return KernelTimes(row.shape, row.gpu, parallelism=row.parallelism, precision=row.precision, constants=made)


def test_the_fit_moves_towards_the_constants_that_made_the_rows() -> None:
    """Not all the way: constants keep to their priors, and groups have offsets of their own."""
    rows = rows_by(TRUTH)
    data = measured(rows, [times(row, UNIT) for row in rows])
    values = fitted(data, np.array([MODELS.index(_named(row)) for row in rows]))
    found = constants(values)
    assert found.experts < 0.87
    assert found.step_s > 1.3 * UNIT.step_s
    before, after = (
        np.median(np.abs(np.log(data.predicted(point)[2] / data.tpot_s))) for point in (PRIOR, values)
    )
    assert after < 0.04
    assert after < before / 2


def _named(row: Row) -> str:
    return row.shape.name


def test_sums_over_classes_predict_what_step_times_do() -> None:
    rows = rows_by(TRUTH)
    data = measured(rows, [times(row, UNIT) for row in rows])
    values = PRIOR.copy()
    for field in ("experts", "collective", "step_s", "first_token_s"):
        values[FIELDS.index(field)] = getattr(TRUTH, field)
    _, ttft, tpot = data.predicted(values)
    assert ttft == pytest.approx([row.ttft_s for row in rows], rel=1e-9)
    assert tpot == pytest.approx([row.tpot_s for row in rows], rel=1e-9)


def test_a_family_that_is_left_out_changes_nothing() -> None:
    rows = rows_by(TRUTH)
    family = rows[0].family
    spoilt = [replace(row, tpot_s=(row.tpot_s or 0) * 9) if row.family == family else row for row in rows]
    assert Folds(rows).fit(family) == Folds(spoilt).fit(family)
    assert Folds(rows).fit() != Folds(spoilt).fit()


def test_a_gpu_that_is_left_out_takes_its_tables_along() -> None:
    h100, b200 = catalog.gpus()["H100"], catalog.gpus()["B200"]
    assert len(tables_without(h100)) == len(tables_without(None)) - 1
    small, tables = catalog.models()[MODELS[0]], tables_without(h100)
    assert KernelTimes(small, h100, measured=tables).tier is Tier.TRANSFERRED
    assert KernelTimes(small, b200, measured=tables).tier is Tier.MEASURED


def test_engines_get_their_factor_from_other_families_only() -> None:
    rows = tuple(replace(row, engine="other", tpot_s=2.0 if "8B" in row.shape.name else 3.0) for row in rows_by(TRUTH))
    cold = Figures(ttft_s=1.0, tpot_s=1.0, tokens_per_s=1.0)
    factors = Factors(rows, (cold,) * len(rows))
    small = next(row for row in rows if "8B" in row.shape.name)
    found = factors.applied(small, cold)
    assert found is not None
    assert found.tpot_s == 3.0
    alone = tuple(row for row in rows if row.family == small.family)
    assert Factors(alone, (cold,) * len(alone)).applied(small, cold) is None


def test_trials_are_drawn_by_seed_and_ask_for_the_rest() -> None:
    rows = rows_by(TRUTH)
    one, again, other = (trials(rows, seed) for seed in (1000, 1000, 1001))
    assert one == again != other
    assert all(len(trial.known) == 3 and not set(trial.known) & set(trial.asked) for trial in one)


def test_a_trial_teaches_what_the_products_calibration_learns() -> None:
    rows = [replace(row, ttft_s=2.1 * (row.ttft_s or 0), tpot_s=2.1 * (row.tpot_s or 0)) for row in rows_by(TRUTH)]
    folds = Folds(rows)
    row = next(row for row in rows if "8B" in row.shape.name and row.concurrency == 1)
    made, correction = corrected(folds, Trial(known=(row,), asked=()))
    loop, took_s = loop_of(row), (row.ttft_s or 0) + (row.output_tokens - 1) * (row.tpot_s or 0)
    parts = ((row.output_tokens, loop.decode), *((1, chunk) for chunk in loop.chunks))
    count = sum(share for share, _ in parts)
    step = ObservedStep(parts=tuple((share / count, batch) for share, batch in parts), step_s=took_s / count)
    learnt = calibrated(times(row, replace(made, measured_spread=folds.spread(row))), [step])
    assert correction.factors == pytest.approx(learnt.correction.factors, rel=1e-6)
    assert correction.spread == pytest.approx(learnt.spread, rel=1e-6)


def errors_on(gpu: GpuModel, spreads: dict[str, float], count: int = 400) -> list[tuple[Row, float]]:
    """Errors of some families on one type of GPU, normal with these deviations."""
    draw = np.random.default_rng(1)
    return [
        (replace(server(name, 8, 1, 2000), gpu=gpu), float(error))
        for name, spread in spreads.items() for error in draw.normal(0, spread, count)
    ]  # fmt: skip


def test_a_spread_holds_eighty_of_a_hundred_errors_of_the_families_on_its_gpu() -> None:
    h200 = catalog.gpus()["H200"]
    assert pooled_spread(errors_on(h200, dict.fromkeys(MODELS, 0.2)), h200) == pytest.approx(0.2, rel=0.07)


def test_the_fewer_families_were_seen_on_a_gpu_the_more_those_on_others_count() -> None:
    h200, h100 = catalog.gpus()["H200"], catalog.gpus()["H100"]
    far = errors_on(h100, dict.fromkeys(MODELS, 0.5))
    found = [pooled_spread([*errors_on(h200, dict.fromkeys(MODELS[:count], 0.1)), *far], h200) for count in range(4)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(0.5, rel=0.07)
    assert found[3] < 0.15
    assert pooled_spread(far, None) == pytest.approx(0.5, rel=0.07)


def test_many_rows_of_one_family_weigh_no_more_than_few_of_another() -> None:
    h200 = catalog.gpus()["H200"]
    few, many = (
        pooled_spread(
            [*errors_on(h200, {MODELS[0]: 0.05}, count=count), *errors_on(h200, {MODELS[1]: 0.5}, count=100)], h200
        )
        for count in (100, 2000)
    )
    assert few == pytest.approx(many, rel=0.1)


# -- rows of dumps


def dumped(ttft: str, *, ranks: str = "1.0", experts: str = "4.0", concurrency: str = "16.0") -> dict[str, str]:
    return {
        "backend": "vllm", "model_path": "a", "system": "b", "gemm_quant_mode": "nvfp4", "isl": "1024", "osl": "1024",
        "concurrency": concurrency, "tp_size": "4.0", "pp_size": "1.0", "attention_dp_size": ranks,
        "moe_tp_size": "1.0", "moe_ep_size": experts, "silicon_ttft_ms": ttft, "silicon_tpot_ms": "14.2201",
    }  # fmt: skip


def test_one_measurement_under_two_layouts_is_that_of_the_fewer_gpus() -> None:
    small, large = dumped("207.73"), dumped("207.7301", ranks="4.0", experts="16.0")
    other = dumped("190.0", ranks="4.0", experts="16.0")
    later = dumped("207.73", ranks="4.0", experts="16.0", concurrency="32.0")
    assert silicon_gpus(small) == 4
    assert silicon_gpus(large) == 16
    assert told_once([large, small, other, small, later]) == [small, small, other, later]
