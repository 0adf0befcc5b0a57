"""The performance model follows what steps really take: quickly, boundedly, and no further than it was shown."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enova_recommender import catalog
from enova_recommender.performance import GROUPS, Correction, KernelTimes
from enova_recommender.performance.calibration import (
    FACTOR_MAX,
    FACTOR_MIN,
    HUBER,
    RUN,
    Calibration,
    calibrated,
    learnt,
    measured,
    prior,
    seconds_of,
    updated,
)
from enova_recommender.performance.engine_model import EngineModel, Fit, corrected_times, fitted
from enova_recommender.performance.live_steps import EngineChange, ObservedStep, observed_step
from enova_recommender.types import Batch, Parallelism, Precision
from enova_testing.engine_world import Recorded, frames
from enova_testing.examples import examples

SHAPE = catalog.models()["meta-llama/Llama-3.1-8B-Instruct"]
H100 = catalog.gpus()["H100"]
TIMES = KernelTimes(SHAPE, H100)
TRUTH = Correction.of((1.5, 1.25, 1.6, 1.0, 2.0, 2.0))
BATCHES = [
    Batch(decode_sequences=n, context_tokens=n * context, prefill_tokens=prompt, prefill_pairs=prompt * prompt // 2)
    for n in (4, 24, 64)
    for context in (300, 1500)
    for prompt in (0, 700)
]


def error(model: KernelTimes, world: KernelTimes) -> float:
    """The worst relative error over some batches."""
    return max(abs(model.step_s(batch) / world.step_s(batch) - 1) for batch in BATCHES)


def decoding(sequences: int, context: int = 800) -> Batch:
    return Batch(decode_sequences=sequences, context_tokens=sequences * context)


def seconds(*, memory: float = 6e-3, attention: float = 2e-3, compute: float = 1e-3, host: float = 1e-3) -> np.ndarray:
    by_group = {"MEMORY": memory, "ATTENTION": attention, "COMPUTE": compute, "HOST": host}
    return np.array([by_group.get(group.value, 0.0) for group in GROUPS])


def settled(factor: float = 1.0, *, frames_count: int = 300) -> Calibration:
    """What is known after a long time of steps `factor` times as long as thought, with 2 % of noise."""
    draw = np.random.default_rng(7)
    calibration = prior(0.35)
    for _ in range(frames_count):
        parts = seconds(compute=draw.uniform(0, 4e-3), attention=draw.uniform(0, 4e-3))
        calibration = updated(calibration, parts, factor * parts.sum() * math.exp(draw.normal(0, 0.02)))
    return calibration


def relative(calibration: Calibration, parts: np.ndarray, step_s: float) -> float:
    return float(parts @ np.array(calibration.factors)) / step_s - 1


def test_three_measured_batches_shrink_the_error_of_a_wrong_prior() -> None:
    world = TIMES.corrected(TRUTH)
    steps = [ObservedStep.of(batch, world.step_s(batch)) for batch in (decoding(8), decoding(32), decoding(96))]
    model = calibrated(TIMES, steps)
    assert abs(TIMES.step_s(decoding(64)) / world.step_s(decoding(64)) - 1) > 0.2
    assert abs(model.step_s(decoding(64)) / world.step_s(decoding(64)) - 1) < 0.05
    assert model.spread < 0.75 * TIMES.spread
    assert TIMES.correction.factors == (1.0,) * len(GROUPS)  # the prior itself is untouched


def test_measurements_on_purpose_find_the_one_group_that_is_far_off_and_bear_a_wrong_one() -> None:
    truth = np.array([1.0, 1.0, 1.0, 1.0, 3.5, 1.0])  # the host alone
    batches = [seconds(memory=m, attention=a, host=h) for m, a, h in ((6, 1, 1), (6, 4, 1.2), (6, 1, 6), (3, 1, 3))]
    steps = [(parts * 1e-3, float(parts @ truth) * 1e-3) for parts in batches]
    known = measured(steps)
    assert np.abs(np.subtract(known.factors, truth) / truth)[-2] < 0.15
    assert known.updates == 4
    # One of them measured something else: the others still say what they said.
    wrong = measured([*steps, (batches[0] * 1e-3, 40 * steps[0][1])])
    for parts, step_s in steps:
        assert relative(wrong, parts, step_s) == pytest.approx(0, abs=0.1)
    assert measured([]) == prior()
    assert measured([(seconds() * 0, 1.0), (seconds(), math.nan)]) == prior()


def test_live_frames_correct_a_wrong_prior_within_minutes() -> None:
    world = TIMES.corrected(TRUTH)
    calibration = prior(TIMES.spread)
    before = error(TIMES, world)
    for change in frames(world, rate=12.0, frame_s=10.0, count=20, seed=3):
        if (step := observed_step(change, batched_tokens_max=2048)) is not None:
            calibration = learnt(calibration, TIMES, [step])
    assert before > 0.25
    assert error(TIMES.corrected(calibration.correction), world) < 0.12
    assert calibration.spread < 0.12


@pytest.mark.parametrize("rate", [0.05, 1.0, 6.0, 20.0])
def test_a_frame_tells_the_mean_step_that_decoding_sequences_saw(rate: float) -> None:
    recorded = Recorded(TIMES)
    told = []
    for change in frames(recorded, rate=rate, frame_s=10.0, count=5, seed=5):
        # The engine's truth: each step weighted by the sequences that waited for their next token in it.
        seen = [(batch.decode_sequences, batch, step_s) for batch, step_s in recorded.steps]
        recorded.steps.clear()
        step = observed_step(change, batched_tokens_max=2048)
        weight = sum(count for count, _, _ in seen)
        if step is None or not weight:
            continue
        true_s = sum(count * float(TIMES.features(batch).sum()) for count, batch, _ in seen) / weight
        told.append(float(seconds_of(TIMES, step).sum()) / true_s - 1)
        assert step.step_s == pytest.approx(sum(n * s for n, _, s in seen) / weight, rel=0.02)
        assert sum(share for share, _ in step.parts) == pytest.approx(1, abs=5e-3)
    assert told
    assert abs(float(np.mean(told))) < 0.05, told
    assert max(map(abs, told)) < 0.12, told


def test_frames_that_say_nothing_change_nothing() -> None:
    known = settled()
    idle = EngineChange(
        steps=0.0, prompt_tokens=0.0, first_tokens=0.0, decode_tokens=0.0, decode_s=0.0, context_tokens=0.0
    )
    assert observed_step(idle, batched_tokens_max=2048) is None
    for step_s in (0.0, -1.0, math.nan, math.inf, 1e4):
        assert updated(known, seconds(), step_s) is known
    assert updated(known, seconds() * math.nan, 0.01) is known
    assert updated(known, seconds() * 0.0, 0.01) is known


def test_a_frame_in_which_sequences_were_interrupted_is_left_out() -> None:
    change = EngineChange(
        steps=100.0, prompt_tokens=500.0, first_tokens=2.0, decode_tokens=800.0, decode_s=8.0, context_tokens=400.0
    )
    assert observed_step(change, batched_tokens_max=2048) is not None
    interrupted = EngineChange(
        steps=100.0, prompt_tokens=500.0, first_tokens=2.0, decode_tokens=800.0, decode_s=8.0, context_tokens=400.0,
        preemptions=1.0,
    )  # fmt: skip
    assert observed_step(interrupted, batched_tokens_max=2048) is None


@pytest.mark.parametrize("times_as_long", [0.01, 3.0, 50.0, 1e4])
def test_one_outlier_bends_the_model_by_no_more_than_its_own_deviations(times_as_long: float) -> None:
    known = settled()
    parts = seconds()
    after = updated(known, parts, times_as_long * parts.sum())
    assert after.outliers == known.outliers + 1
    assert abs(relative(after, parts, parts.sum()) - relative(known, parts, parts.sum())) < HUBER * known.spread
    deviations = np.array(known.deviations)
    assert np.all(np.abs(np.subtract(after.factors, known.factors)) <= HUBER * deviations * 1.05)


def test_some_outliers_among_good_frames_leave_it_right() -> None:
    draw = np.random.default_rng(11)
    calibration = prior(0.35)
    for index in range(200):
        parts = seconds(compute=draw.uniform(0, 4e-3))
        slow = 6.0 if index % 8 == 5 else 1.0
        calibration = updated(calibration, parts, slow * 1.4 * parts.sum())
    assert relative(calibration, seconds(), 1.4 * seconds().sum()) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("factor", [0.6, 1.3, 2.5])
def test_a_lasting_change_is_followed(factor: float) -> None:
    calibration = settled()
    parts = seconds()
    for _ in range(RUN + 12):
        calibration = updated(calibration, parts, factor * parts.sum())
    assert relative(calibration, parts, factor * parts.sum()) == pytest.approx(0, abs=0.05)


def test_a_slow_replica_among_healthy_ones_is_no_change() -> None:
    calibration = settled()
    parts = seconds()
    for index in range(120):
        calibration = updated(calibration, parts, (1.8 if index % 4 == 0 else 1.0) * parts.sum())
    assert relative(calibration, parts, parts.sum()) < 0.06


def test_what_is_no_longer_measured_goes_back_to_the_prior() -> None:
    calibration = prior(0.35)
    for _ in range(100):
        parts = seconds(compute=8e-3)
        calibration = updated(calibration, parts, float(parts @ np.array([2.0, 1.0, 1.0, 1.0, 1.0, 1.0])))
    assert calibration.factors[0] > 1.3
    rest = seconds(compute=0.0)
    for _ in range(500):  # twenty-five half-lives without any prompt
        calibration = updated(calibration, rest, float(rest.sum()), half_life=20.0)
    assert calibration.factors == pytest.approx((1.0,) * len(GROUPS), abs=0.05)


def test_directions_that_no_load_excites_do_not_wind_up() -> None:
    calibration = prior(0.35)
    first = calibration.deviations
    parts = seconds(compute=0.0)
    for _ in range(5000):
        calibration = updated(calibration, parts, parts.sum())
    assert all(now <= before * 1.001 for now, before in zip(calibration.deviations, first, strict=True))
    # The first load of another kind is learnt from at once, and throws nothing over.
    other = seconds(compute=8e-3)
    for _ in range(10):
        calibration = updated(calibration, other, 1.2 * other.sum())
    assert relative(calibration, other, 1.2 * other.sum()) == pytest.approx(0, abs=0.04)


@given(st.lists(st.tuples(*(st.floats(0, 0.1) for _ in GROUPS), st.floats(1e-6, 10)), max_size=40))
@examples(60)
def test_whatever_comes_factors_stay_in_range_and_the_covariance_positive(rows: list[tuple[float, ...]]) -> None:
    calibration = prior(0.35)
    for *parts, step_s in rows:
        calibration = updated(calibration, np.array(parts), step_s)
    assert all(FACTOR_MIN <= factor <= FACTOR_MAX for factor in calibration.factors)
    matrix = np.array(calibration.covariance).reshape(len(GROUPS), -1)
    assert np.allclose(matrix, matrix.T)
    assert np.linalg.eigvalsh(matrix).min() > 0
    assert math.isfinite(calibration.spread)


def test_what_is_fitted_says_what_a_step_takes_by_kernel() -> None:
    world = TIMES.corrected(TRUTH)
    steps = tuple(ObservedStep.of(decoding(n), world.step_s(decoding(n))) for n in (8, 16, 32, 64))
    shown = (steps[3], steps[0])
    result = fitted(Fit(model=EngineModel(shape=SHAPE, gpu=H100), calibration=None, steps=steps, shown=shown))
    assert result.calibration.updates == 4
    for step, predicted in zip(shown, result.predicted, strict=True):
        assert sum(predicted.kernels.values()) == pytest.approx(predicted.step_s)
        assert predicted.step_s == pytest.approx(step.step_s, rel=0.05)
    again = fitted(Fit(model=EngineModel(shape=SHAPE, gpu=H100), calibration=result.calibration, steps=steps))
    assert again.calibration.updates == 8


def test_an_identity_follows_from_shape_and_layout_and_not_from_the_name() -> None:
    one = EngineModel(shape=SHAPE, gpu=H100)
    assert EngineModel(shape=replace(SHAPE, name="another"), gpu=H100).identity == one.identity
    others = (
        EngineModel(shape=replace(SHAPE, hidden_size=SHAPE.hidden_size + 1), gpu=H100),
        EngineModel(shape=SHAPE, gpu=H100, parallelism=Parallelism(tensor=2)),
        EngineModel(shape=SHAPE, gpu=H100, precision=Precision(quantization="fp8")),
        EngineModel(shape=SHAPE, gpu=H100, eager=True),
    )
    assert len({one.identity, *(other.identity for other in others)}) == 5
    assert [other.key.startswith(one.kin) for other in others] == [False, True, True, True]


def test_what_one_layout_taught_counts_less_for_another_and_nothing_for_another_model_or_gpu() -> None:
    known = Correction.of((1.5,) * len(GROUPS), spread=0.05)
    times_of = corrected_times({EngineModel(shape=SHAPE, gpu=H100).key: known})
    plain, batch = Precision(), decoding(16)

    def factor(times: KernelTimes, prior_times: KernelTimes) -> float:
        return times.step_s(batch) / prior_times.step_s(batch)

    same = times_of(SHAPE, H100, Parallelism(), plain)
    assert factor(same, TIMES) == pytest.approx(1.5)
    assert same.spread == 0.05
    two = Parallelism(tensor=2)
    kin = times_of(SHAPE, H100, two, plain)
    assert factor(kin, KernelTimes(SHAPE, H100, parallelism=two)) == pytest.approx(1.5)
    assert 0.05 < kin.spread < KernelTimes(SHAPE, H100, parallelism=two).spread
    other = catalog.gpus()["A100-80G"]
    elsewhere = times_of(SHAPE, other, Parallelism(), plain)
    assert factor(elsewhere, KernelTimes(SHAPE, other)) == 1.0
    wider = replace(SHAPE, hidden_size=2 * SHAPE.hidden_size)
    assert times_of(wider, H100, Parallelism(), plain).correction.spread is None
