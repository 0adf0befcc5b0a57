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
    SPREAD_ROWS_MIN,
    Factors,
    Folds,
    Trial,
    corrected,
    has_own_spread,
    spread_of,
    tables_without,
    trials,
)
from enova_testing.latency_model import Figures, loop_of, predicted
from enova_testing.latency_rows import Load, Row

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


def test_a_type_of_gpu_has_a_spread_of_its_own_once_three_families_were_measured_often() -> None:
    h200, h100 = catalog.gpus()["H200"], catalog.gpus()["H100"]
    often = [row for name in MODELS for row in measured_on(h200, name, SPREAD_ROWS_MIN)]
    assert has_own_spread(h200, often)
    assert not has_own_spread(h100, often)
    assert not has_own_spread(h200, often[:-1]), "one family was not seen often enough"
    assert not has_own_spread(h200, often[: 2 * SPREAD_ROWS_MIN]), "two families may be off for reasons of their own"


def measured_on(gpu: GpuModel, name: str, count: int) -> list[Row]:
    return [replace(server(name, 8, clients, 2000), gpu=gpu) for clients in range(1, count + 1)]


def test_a_spread_holds_eighty_of_a_hundred_errors() -> None:
    errors = np.random.default_rng(1).normal(0, 0.2, 10_000).tolist()
    assert spread_of(errors) == pytest.approx(0.2, rel=0.05)
