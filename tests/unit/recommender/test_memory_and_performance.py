"""Memory adds up and shrinks with parallel size; step times grow with the batch and have exact closed forms."""

from __future__ import annotations

import math

import pytest

from enova_recommender import catalog
from enova_recommender.memory import fit, kv_bytes_per_token, weight_bytes
from enova_recommender.performance import Affine, Roofline, Slowed, StepTimes
from enova_recommender.types import Batch, Parallelism, Precision

SMALL = catalog.models()["meta-llama/Llama-3.1-8B-Instruct"]
LARGE = catalog.models()["meta-llama/Llama-3.1-70B-Instruct"]
H100, A100, L4 = (catalog.gpus()[name] for name in ("H100", "A100-80G", "L4"))
FP8 = Precision(quantization="fp8", kv_cache_dtype="fp8")


def test_weights_and_kv_bytes_follow_from_the_shape() -> None:
    assert weight_bytes(SMALL) == 2 * 8_030_261_248
    assert kv_bytes_per_token(SMALL) == 2 * 32 * 8 * 128 * 2
    assert kv_bytes_per_token(LARGE) == 2 * 80 * 8 * 128 * 2
    assert kv_bytes_per_token(SMALL, FP8) == kv_bytes_per_token(SMALL) // 2


def test_kv_heads_are_split_and_beyond_their_number_replicated() -> None:
    assert kv_bytes_per_token(SMALL, tensor_parallel=4) == kv_bytes_per_token(SMALL) // 4
    assert kv_bytes_per_token(SMALL, tensor_parallel=16) == kv_bytes_per_token(SMALL, tensor_parallel=8)


def test_quantisation_covers_the_layers_only() -> None:
    plain = SMALL.parameters - SMALL.linear_parameters
    assert weight_bytes(SMALL, FP8) == SMALL.linear_parameters + 2 * plain


def test_the_division_of_memory_adds_up() -> None:
    divided = fit(SMALL, H100)
    assert 0 <= divided.budget_bytes - divided.used_bytes < divided.kv_block_bytes
    assert divided.used_bytes <= divided.budget_bytes
    # vLLM reports some 430,000 to 460,000 tokens for this model on this card.
    assert 400_000 < 16 * divided.kv_blocks < 480_000


def test_a_model_that_does_not_fit_has_no_blocks_until_it_is_split() -> None:
    assert fit(LARGE, H100).kv_blocks <= 0
    assert fit(LARGE, H100, parallelism=Parallelism(tensor=4)).kv_blocks > 0
    assert fit(LARGE, H100, parallelism=Parallelism(tensor=2, pipeline=2)).kv_blocks > 0
    assert fit(SMALL, L4).kv_blocks > 0


def test_more_memory_for_the_engine_means_more_blocks() -> None:
    blocks = [fit(SMALL, H100, gpu_memory_utilization=share).kv_blocks for share in (0.5, 0.7, 0.9)]
    assert blocks == sorted(set(blocks))


TIMES: list[StepTimes] = [
    Affine(base_s=0.004, prefill_token_s=1e-5, prefill_pair_s=1e-9, sequence_s=2e-5, context_token_s=3e-8),
    Roofline(SMALL, H100),
    Roofline(LARGE, A100, parallelism=Parallelism(tensor=4)),
    Slowed(times=Roofline(SMALL, L4, precision=FP8), factor=2.5),
]


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("steps", [1, 2, 17, 400])
def test_a_run_of_decode_steps_lasts_as_long_as_its_steps(times: StepTimes, steps: int) -> None:
    sequences, context = 23, 23 * 700
    single = math.fsum(
        times.step_s(Batch(decode_sequences=sequences, context_tokens=context + step * sequences))
        for step in range(steps)
    )
    run = times.decode_run_s(sequences=sequences, context_tokens=context, steps=steps)
    assert run == pytest.approx(single, rel=1e-12)


@pytest.mark.parametrize("times", TIMES)
def test_each_part_of_a_batch_makes_a_step_longer(times: StepTimes) -> None:
    batch = Batch(prefill_tokens=3000, prefill_pairs=3000 * 1500, decode_sequences=100, context_tokens=90_000)
    larger = (
        Batch(prefill_tokens=6000, prefill_pairs=3000 * 1500, decode_sequences=100, context_tokens=90_000),
        Batch(prefill_tokens=3000, prefill_pairs=6000 * 1500, decode_sequences=100, context_tokens=90_000),
        Batch(prefill_tokens=3000, prefill_pairs=3000 * 1500, decode_sequences=200, context_tokens=90_000),
        Batch(prefill_tokens=3000, prefill_pairs=3000 * 1500, decode_sequences=100, context_tokens=180_000),
    )
    assert all(times.step_s(one) > times.step_s(batch) for one in larger)


def test_a_lone_sequence_is_bound_by_reading_the_weights() -> None:
    step_s = Roofline(SMALL, H100).step_s(Batch(decode_sequences=1, context_tokens=500))
    read_s = weight_bytes(SMALL) / H100.bandwidth_bytes_per_s
    assert read_s < step_s < 2 * read_s


def test_splitting_shortens_steps_by_less_than_the_number_of_gpus() -> None:
    batch = Batch(decode_sequences=64, context_tokens=64_000)
    one, four = (Roofline(SMALL, H100, parallelism=Parallelism(tensor=n)).step_s(batch) for n in (1, 4))
    assert one / 4 < four < one


def test_eight_bit_weights_make_decoding_faster_where_the_card_has_them() -> None:
    batch = Batch(decode_sequences=8, context_tokens=8_000)
    assert Roofline(SMALL, H100, precision=FP8).step_s(batch) < 0.7 * Roofline(SMALL, H100).step_s(batch)
