"""Step times from measured kernels: sums of what was measured, growing with the batch, blind to names."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from enova_recommender import catalog
from enova_recommender.catalog.kernels import measured_gpus
from enova_recommender.memory import weight_bytes
from enova_recommender.performance import (
    FITTED,
    GROUPS,
    Correction,
    KernelClass,
    KernelGroup,
    KernelTimes,
    ObservedStep,
    Tier,
    calibrated,
)
from enova_recommender.performance.layers import TOKENS
from enova_recommender.performance.pieces import run_total, value_at
from enova_recommender.performance.tables import LAUNCH_S, PLAIN_FORMAT, ExpertWork, kernels_of, sheet_of
from enova_recommender.types import (
    WEIGHT_FORMATS,
    Attention,
    Batch,
    GpuModel,
    ModelShape,
    Parallelism,
    Precision,
    Recurrence,
)

GPUS, MODELS = catalog.gpus(), catalog.models()
SMALL = MODELS["meta-llama/Llama-3.1-8B-Instruct"]
LARGE = MODELS["meta-llama/Llama-3.1-70B-Instruct"]
EXPERTS = MODELS["openai/gpt-oss-120b"]
LATENT = MODELS["deepseek-ai/DeepSeek-R1"]
HYBRID = MODELS["Qwen/Qwen3.5-397B-A17B"]
H100, B200, L4, RTX4090 = (GPUS[name] for name in ("H100", "B200", "L4", "RTX4090"))
KERNELS = measured_gpus()

CASES = [
    (SMALL, H100, Parallelism(), Precision()),
    (SMALL, RTX4090, Parallelism(), Precision(quantization="awq")),
    (LARGE, B200, Parallelism(tensor=4), Precision(quantization="nvfp4", kv_cache_dtype="fp8")),
    (LARGE, L4, Parallelism(tensor=4, pipeline=2), Precision(quantization="fp8")),
    (EXPERTS, H100, Parallelism(tensor=2), Precision()),
    (LATENT, GPUS["H200"], Parallelism(tensor=1, data=8, expert=True), Precision()),
    (HYBRID, B200, Parallelism(tensor=8), Precision(quantization="fp8")),
]
DECODE = Batch(decode_sequences=23, context_tokens=23 * 700)
MIXED = Batch(prefill_tokens=3000, prefill_pairs=3000 * 1500, decode_sequences=100, context_tokens=90_000)


def times_of(shape: ModelShape, gpu: GpuModel, split: Parallelism, precision: Precision) -> KernelTimes:
    return KernelTimes(shape, gpu, parallelism=split, precision=precision)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].name.split('/')[1]}-{case[1].name}")
def times(request: pytest.FixtureRequest) -> KernelTimes:
    return times_of(*request.param)


def test_a_product_that_was_measured_lasts_as_long_as_it_did() -> None:
    # The raw table says of H100, bf16, m 8, n 4096, k 8192: 26.6 us.
    (found,) = kernels_of(H100, KERNELS).gemm_s(PLAIN_FORMAT, None, np.array([8.0]), n=4096, k=8192)
    assert found == pytest.approx(26.6e-6, rel=0.03)


def test_a_gpu_that_nobody_measured_takes_the_same_share_of_its_roofline() -> None:
    """Half the bandwidth of an H100: reading takes twice as long, the launch as long as it did."""
    slow = replace(H100, bandwidth_bytes_per_s=H100.bandwidth_bytes_per_s / 2, bf16_flops=H100.bf16_flops / 2)
    m, n, k = np.array([8.0]), 8192, 8192
    tables = tuple(one for one in KERNELS if one.sheet.bandwidth == H100.bandwidth_bytes_per_s)
    fast_s, slow_s = (kernels_of(gpu, tables).gemm_s(PLAIN_FORMAT, None, m, n=n, k=k)[0] for gpu in (H100, slow))
    moved_s = (n * k * 2 + 8 * (n + k) * 2) / sheet_of(H100).bandwidth
    assert slow_s / fast_s == pytest.approx((LAUNCH_S + 2 * moved_s) / (LAUNCH_S + moved_s), rel=1e-9)


def test_few_tokens_read_few_experts() -> None:
    work = ExpertWork(hidden=2880, intermediate=2880, chosen=4, experts=128, cut=1, spread=1)
    one, many = work.roofline_s(sheet_of(H100), "bfloat16", element=0.53, tokens=np.array([1.0, 4096.0]))
    expert_bytes = 3 * 2880 * 2880 * 0.53
    # One token hits 128 x (1 - (1 - 1/128)^4) = 3.95 experts; thousands hit all.
    hit = 128 * (1 - (127 / 128) ** 4)
    moved = hit * expert_bytes + 4 * (2880 + 2880) * 4
    assert one == pytest.approx(20e-6 + moved / sheet_of(H100).bandwidth)
    assert many > 128 * expert_bytes / sheet_of(H100).bandwidth


def test_weights_in_few_bits_decode_faster_and_prefill_no_faster_without_the_arithmetic() -> None:
    kernels, m = kernels_of(H100, KERNELS), np.array([8.0, 8192.0])
    plain = kernels.gemm_s(PLAIN_FORMAT, None, m, n=8192, k=8192)
    packed = kernels.gemm_s(WEIGHT_FORMATS["int4"], "int4", m, n=8192, k=8192)
    assert packed[0] < 0.5 * plain[0]
    assert packed[1] == pytest.approx(plain[1])


def test_weights_in_32_bits_are_read_for_twice_as_long_and_multiplied_without_tensor_cores() -> None:
    wide = times_of(SMALL, H100, Parallelism(), Precision(dtype="float32"))
    plain = times_of(SMALL, H100, Parallelism(), Precision(dtype="float16"))
    decode = Batch(decode_sequences=1, context_tokens=100)
    assert 1.7 < wide.step_s(decode) / plain.step_s(decode) < 2.1
    prompt = Batch(prefill_tokens=4096, prefill_pairs=4096 * 2048)
    # 16 GFLOP a token at 61.8 TFLOP/s.
    assert wide.step_s(prompt) == pytest.approx(4096 * 2 * 7.0e9 / (H100.bf16_flops / 16), rel=0.5)
    assert wide.step_s(prompt) > 8 * plain.step_s(prompt)


def test_a_checkpoint_in_32_bits_is_served_in_16_unless_it_is_asked_for() -> None:
    stored = replace(SMALL, dtype="float32")
    assert times_of(stored, H100, Parallelism(), Precision()).step_s(DECODE) == times_of(
        SMALL, H100, Parallelism(), Precision()
    ).step_s(DECODE)
    sizes = [weight_bytes(stored, Precision(dtype=kind)) for kind in ("auto", "bfloat16", "float32")]
    assert sizes[0] == sizes[1] == sizes[2] / 2


def test_names_of_models_and_gpus_do_not_matter() -> None:
    for shape, gpu, split, precision in CASES:
        renamed = times_of(replace(shape, name="x"), replace(gpu, name="y", driver_names=("z",)), split, precision)
        known = times_of(shape, gpu, split, precision)
        for batch in (DECODE, MIXED):
            assert renamed.step_s(batch) == known.step_s(batch)
        assert (renamed.tier, renamed.spread) == (known.tier, known.spread)


def test_each_part_of_a_batch_makes_a_step_longer(times: KernelTimes) -> None:
    longer = (
        replace(MIXED, prefill_tokens=6000), replace(MIXED, prefill_pairs=6000 * 1500),
        replace(MIXED, decode_sequences=200), replace(MIXED, context_tokens=180_000),
    )  # fmt: skip
    assert all(times.step_s(batch) > times.step_s(MIXED) for batch in longer)


@pytest.mark.parametrize("steps", [1, 2, 17, 4000])
def test_a_run_of_decode_steps_lasts_as_long_as_its_steps(times: KernelTimes, steps: int) -> None:
    single = math.fsum(
        times.step_s(replace(DECODE, context_tokens=DECODE.context_tokens + step * 23)) for step in range(steps)
    )
    run = times.decode_run_s(sequences=23, context_tokens=DECODE.context_tokens, steps=steps)
    assert run == pytest.approx(single, rel=1e-12)


def test_many_steps_at_once_are_the_single_ones(times: KernelTimes) -> None:
    sequences = np.arange(0, 400, 7)
    many = times.steps_s(512, 512 * 300, sequences, sequences * 900)
    single = [
        times.step_s(Batch(prefill_tokens=512, prefill_pairs=512 * 300, decode_sequences=n, context_tokens=n * 900))
        for n in sequences.tolist()
    ]
    assert many == pytest.approx(single, rel=1e-12)


def test_shares_and_features_add_up_to_the_step(times: KernelTimes) -> None:
    for batch in (DECODE, MIXED):
        assert sum(times.shares(batch).values()) == pytest.approx(times.step_s(batch), rel=1e-12)
        assert sum(times.features(batch)) == pytest.approx(times.step_s(batch), rel=1e-12)


def test_a_correction_multiplies_each_group_by_its_factor() -> None:
    factors = (0.8, 1.3, 1.1, 2.0, 0.5, 1.7)
    plain = times_of(*CASES[2])
    shape, gpu, split, precision = CASES[2]
    corrected = KernelTimes(shape, gpu, parallelism=split, precision=precision, correction=Correction.of(factors))
    for batch in (DECODE, MIXED):
        assert corrected.step_s(batch) == pytest.approx(float(plain.features(batch) @ np.array(factors)), rel=1e-12)
        assert corrected.features(batch) == pytest.approx(plain.features(batch))


def test_factors_are_above_zero() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Correction(memory=0.0)


def test_what_a_prediction_rests_on_decides_its_interval() -> None:
    calibrated = KernelTimes(SMALL, L4, correction=Correction(memory=1.1, spread=0.05))
    assert KernelTimes(SMALL, H100).tier is Tier.MEASURED
    assert KernelTimes(SMALL, L4).tier is Tier.TRANSFERRED
    assert calibrated.tier is Tier.CALIBRATED
    interval = calibrated.interval(2.0)
    assert (interval.low, interval.value, interval.high) == pytest.approx((1.8757, 2.0, 2.1325), rel=1e-3)


def test_a_gpu_on_which_no_server_was_measured_has_the_common_spread() -> None:
    shape = catalog.models()["meta-llama/Llama-3.1-8B-Instruct"]
    spreads = {name: KernelTimes(shape, GPUS[name]).spread for name in ("A100-80G", "H100", "H200", "B200", "L4")}
    assert spreads["A100-80G"] == FITTED.measured_spread
    assert spreads["L4"] == FITTED.transferred_spread
    assert spreads["B200"] < spreads["H100"] < spreads["H200"]


def test_a_host_that_nobody_measured_makes_large_batches_doubtful(times: KernelTimes) -> None:
    sequences = np.array([1.0, 16.0, 256.0, 1024.0])
    spreads = times.spreads(sequences, sequences * 100)
    assert np.all(spreads > 0.3)
    bare = replace(FITTED, step_doubt=0.0, sequence_doubt=0.0, kernels_doubt=0.5)
    shape, gpu, split, precision = CASES[0]
    sure = KernelTimes(shape, gpu, parallelism=split, precision=precision, constants=bare)
    assert np.all(sure.spreads(sequences, sequences * 100) < 0.5)
    host = replace(bare, sequence_doubt=2.0)
    unsure = KernelTimes(shape, gpu, parallelism=split, precision=precision, constants=host)
    ratio = unsure.spreads(sequences, sequences * 100) / sure.spreads(sequences, sequences * 100)
    assert np.all(np.diff(ratio) > 0)


def test_a_load_unlike_those_that_were_measured_is_known_less() -> None:
    shape, gpu, split, precision = CASES[0]
    plain = times_of(shape, gpu, split, precision)
    steps = [ObservedStep.of(Batch(decode_sequences=n, context_tokens=n * 500), 0.01) for n in (8, 12, 16)]
    known = calibrated(plain, steps)
    near, far = known.spreads(np.array([12.0, 1024.0]), np.array([6_000.0, 512_000.0]))
    assert near < 0.15 < far
    assert near < float(plain.spreads(np.array([12.0]), np.array([6_000.0]))[0])
    without = plain.corrected(replace(known.correction, covariance=()))
    assert without.spreads(np.array([12.0, 1024.0]), np.array([6_000.0, 512_000.0])).tolist() == [known.spread] * 2


def test_states_of_many_sequences_are_read_at_the_memorys_pace() -> None:
    shape, gpu = MODELS["nvidia/NVIDIA-Nemotron-Nano-9B-v2"], H100
    recurrence = next(b for b in shape.blocks if isinstance(b.mixer, Recurrence))
    assert isinstance(recurrence.mixer, Recurrence)
    layers = sum(block.count for block in shape.blocks if isinstance(block.mixer, Recurrence))
    few, many = (
        KernelTimes(shape, gpu).shares(Batch(decode_sequences=n, context_tokens=n * 100))[KernelClass.RECURRENCE]
        for n in (512, 1024)
    )
    moved = 2 * 512 * layers * recurrence.mixer.state_elements * 4  # each state is read and written, in 32 bits
    assert many - few >= 0.99 * moved / gpu.bandwidth_bytes_per_s


def test_experts_with_a_scale_a_block_are_a_class_of_their_own() -> None:
    blocks = KernelTimes(MODELS["Qwen/Qwen3-235B-A22B-FP8"], GPUS["H200"], parallelism=Parallelism(tensor=4))
    plain = KernelTimes(MODELS["Qwen/Qwen3-235B-A22B-Instruct-2507"], GPUS["H200"], parallelism=Parallelism(tensor=8))
    kinds = (KernelClass.EXPERTS, KernelClass.BLOCK_EXPERTS)
    assert [blocks.shares(DECODE)[kind] > 0 for kind in kinds] == [False, True]
    assert [plain.shares(DECODE)[kind] > 0 for kind in kinds] == [True, False]


def test_engines_on_the_same_gpu_slow_kernels_down_but_not_the_host() -> None:
    alone, shared = KernelTimes(SMALL, H100), KernelTimes(SMALL, H100, co_runners=(0.5, 0.25))
    host = alone.shares(DECODE)[KernelClass.HOST]
    assert shared.step_s(DECODE) == pytest.approx(1.75 * (alone.step_s(DECODE) - host) + host, rel=1e-12)


def test_only_several_gpus_talk_to_each_other() -> None:
    alone = KernelTimes(LARGE, H100).shares(MIXED)[KernelClass.COLLECTIVE]
    together = KernelTimes(LARGE, H100, parallelism=Parallelism(tensor=8)).shares(MIXED)[KernelClass.COLLECTIVE]
    assert alone == 0 < together


def test_a_sliding_window_spares_decoding_long_contexts() -> None:
    full = replace(EXPERTS, blocks=tuple(
        replace(block, mixer=replace(block.mixer, window_tokens=None))
        for block in EXPERTS.blocks if isinstance(block.mixer, Attention)
    ))  # fmt: skip
    batch = Batch(decode_sequences=32, context_tokens=32 * 30_000)
    windowed, unbound = (
        KernelTimes(shape, H100).shares(batch)[KernelClass.DECODE_ATTENTION] for shape in (EXPERTS, full)
    )
    assert windowed < 0.7 * unbound


def test_heads_of_keys_beyond_their_number_are_read_by_each_gpu() -> None:
    batch = Batch(decode_sequences=64, context_tokens=64 * 8000)
    eight, sixteen = (
        KernelTimes(SMALL, H100, parallelism=Parallelism(tensor=n)).shares(batch)[KernelClass.DECODE_ATTENTION]
        for n in (8, 16)
    )
    assert sixteen > 0.9 * eight


def test_groups_name_what_decoding_and_prompts_are_bound_by() -> None:
    times = KernelTimes(SMALL, H100)
    decode = dict(zip(GROUPS, times.features(Batch(decode_sequences=1, context_tokens=100)), strict=True))
    prompt = dict(zip(GROUPS, times.features(Batch(prefill_tokens=8192, prefill_pairs=8192 * 4096)), strict=True))
    assert decode[KernelGroup.MEMORY] > 10 * decode[KernelGroup.COMPUTE]
    assert prompt[KernelGroup.COMPUTE] > 5 * prompt[KernelGroup.MEMORY]


def test_no_tables_no_times() -> None:
    with pytest.raises(ValueError, match="at least one GPU"):
        KernelTimes(SMALL, H100, measured=())


def test_tables_are_of_the_size_that_they_say() -> None:
    for gpu in KERNELS:
        for name, table in gpu.tables.items():
            assert table.log2_us.shape == tuple(len(axis) for axis in table.axes), name
            assert all(len(axis) > 1 and np.all(np.diff(axis) > 0) for axis in table.axes), name
        for experts in gpu.experts.values():
            assert experts.log2_us.shape == (len(experts.shapes), len(experts.log2_tokens))


def test_curves_go_on_beyond_their_ends_and_runs_add_them_up() -> None:
    knots, values = [0.0, 10.0, 30.0], [1.0, 3.0, 4.0]
    assert [value_at(knots, values, at) for at in (0, 5, 20, 50)] == pytest.approx([1, 2, 3.5, 5])
    assert run_total(knots, values, first=5, stride=10, count=5) == pytest.approx(2 + 3.25 + 3.75 + 4.25 + 4.75)
    assert run_total(knots, values, first=5, stride=0, count=3) == pytest.approx(6)


def test_curves_hold_at_each_knot_what_the_kernels_take() -> None:
    times = KernelTimes(SMALL, H100)
    seconds = times.steps_s(TOKENS, TOKENS * 100, 0, 0)
    assert np.all(np.diff(seconds) > 0)
