"""Weights and cache are cut as vLLM cuts them; figures come from vLLM's own logs and from arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from enova_recommender import catalog
from enova_recommender.memory import (
    cache_layout,
    fit,
    fit_host,
    gpu_weight_bytes,
    kv_bytes_per_token,
    overheads_of,
    state_bytes,
    weight_bytes,
)
from enova_recommender.types import SINGLE_GPU, Attention, Block, Mlp, ModelShape, Parallelism, Precision, Recurrence

SMALL = catalog.models()["meta-llama/Llama-3.1-8B-Instruct"]
LARGE = catalog.models()["meta-llama/Llama-3.1-70B-Instruct"]
EXPERTS = catalog.models()["Qwen/Qwen3-30B-A3B"]
LATENT = catalog.models()["deepseek-ai/DeepSeek-V3"]
SPARSE = catalog.models()["deepseek-ai/DeepSeek-V3.2"]
HYBRID = catalog.models()["Qwen/Qwen3.5-35B-A3B"]
H100, RTX4090 = catalog.gpus()["H100"], catalog.gpus()["RTX4090"]
FP8_CACHE = Precision(kv_cache_dtype="fp8")
GIB = 1 << 30


def windowed(full: int, window: int, *, window_tokens: int = 1024) -> ModelShape:
    """So many layers of full attention and of a window, each of 2 x 8 x 128 elements a token."""
    layer = Mlp(intermediate_size=1024)
    heads = Attention(heads=8, kv_heads=8, head_dim=128)
    return ModelShape(
        name="windowed", hidden_size=1024, vocabulary_size=1000, context_tokens=65536,
        blocks=(Block(count=full, mixer=heads, feed_forward=layer),
                Block(count=window, mixer=replace(heads, window_tokens=window_tokens), feed_forward=layer)),
    )  # fmt: skip


def test_one_gpu_holds_all_weights() -> None:
    for shape in (SMALL, EXPERTS, LATENT, HYBRID):
        assert gpu_weight_bytes(shape, parallelism=SINGLE_GPU) == pytest.approx(weight_bytes(shape), rel=1e-6)


def test_tensor_parallelism_cuts_all_but_norms() -> None:
    # vLLM 0.18 printed 32.89 GiB for Llama-3.3-70B on each of 4 GPUs.
    assert gpu_weight_bytes(LARGE, parallelism=Parallelism(tensor=4)) / GIB == pytest.approx(32.89, rel=0.002)


def test_key_and_value_heads_beyond_their_number_lie_on_each_gpu() -> None:
    eight, sixteen = (gpu_weight_bytes(LARGE, parallelism=Parallelism(tensor=size)) for size in (8, 16))
    projections = 80 * 2 * 8192 * 128 * 2  # one head of keys and one of values in 80 layers
    small = 2 * (LARGE.parameters - LARGE.linear_parameters - 2 * LARGE.embedding_parameters)
    assert sixteen - small == pytest.approx((eight - small - projections) / 2 + projections, rel=1e-6)


def test_latent_down_projections_are_not_cut() -> None:
    # vLLM printed 79.74 GiB for DeepSeek-R1 in fp8 on each of 8 GPUs, which is more than an eighth of the checkpoint.
    held = gpu_weight_bytes(LATENT, parallelism=Parallelism(tensor=8))
    assert held > weight_bytes(LATENT) / 8
    assert held / GIB == pytest.approx(79.74, rel=0.01)


def test_experts_are_spread_over_data_ranks_and_attention_is_not() -> None:
    tensor = gpu_weight_bytes(EXPERTS, parallelism=Parallelism(tensor=4))
    data = gpu_weight_bytes(EXPERTS, parallelism=Parallelism(data=4, expert=True))
    routed = 2 * EXPERTS.expert_parameters // 4
    assert routed < tensor < data == routed + 2 * (EXPERTS.parameters - EXPERTS.expert_parameters)


def test_the_heaviest_pipeline_stage_decides() -> None:
    # 80 layers over 3 stages: 27, 27, 26; the first has the embedding as well.
    three = fit(LARGE, H100, parallelism=Parallelism(pipeline=3), max_model_len=8192)
    layer = (weight_bytes(LARGE) - 2 * 2 * LARGE.embedding_parameters) / 80
    assert three.weight_bytes == pytest.approx(27 * layer + 2 * LARGE.embedding_parameters, rel=1e-3)
    assert three.kv_block_bytes == 27 * 2 * 8 * 128 * 2 * 16


def test_latent_caches_lie_whole_on_each_gpu() -> None:
    one, eight = (kv_bytes_per_token(LATENT, tensor_parallel=size) for size in (1, 8))
    assert one == eight == 61 * 576 * 2


def test_an_indexer_keeps_8_bits_and_a_scale() -> None:
    assert kv_bytes_per_token(SPARSE) == 61 * (576 * 2 + 128 + 4)
    assert kv_bytes_per_token(SPARSE, FP8_CACHE) == 61 * (576 + 128 + 4)


def test_eight_bit_caches_hold_twice_the_tokens() -> None:
    assert kv_bytes_per_token(SMALL, FP8_CACHE) == kv_bytes_per_token(SMALL) // 2


def test_windows_hold_what_may_be_attended_to_and_what_is_in_flight() -> None:
    layout = cache_layout(windowed(4, 20), parallelism=SINGLE_GPU)
    assert layout.block_bytes == 4 * 2 * 8 * 128 * 2 * 16  # four layers a group
    assert [group.count for group in layout.groups] == [1, 5]
    full, window = 65536 // 16, -(-(1023 + 2048) // 16) + 1
    assert layout.blocks(65536, in_flight_tokens=2048) == full + 5 * window
    assert layout.blocks(160, in_flight_tokens=2048) == 10 + 5 * 11


def test_nearly_equal_kinds_are_padded_to_one_size() -> None:
    layout = cache_layout(windowed(12, 13), parallelism=SINGLE_GPU)
    assert [group.count for group in layout.groups] == [1, 1]
    assert layout.block_bytes == 13 * 2 * 8 * 128 * 2 * 16


def test_a_hybrid_cache_is_cut_as_vllm_prints_it() -> None:
    # vLLM 0.24 with an fp8 cache and 5.98 GiB: 567,978 tokens, 4.33 sequences of 131,072.
    layout = cache_layout(HYBRID, FP8_CACHE, parallelism=SINGLE_GPU)
    blocks = int(5.98 * GIB) // layout.block_bytes
    assert layout.tokens(blocks, 131_072, in_flight_tokens=8192) == 567_978


def test_states_are_held_a_sequence_and_not_a_token() -> None:
    layout = cache_layout(HYBRID, parallelism=SINGLE_GPU, enable_prefix_caching=False)
    long, short = layout.blocks(100_000), layout.blocks(1)
    states = sum(group.blocks(1, in_flight_tokens=1) for group in layout.groups if group.states)
    assert states == 3  # thirty layers in groups of ten, one state each
    assert short == states + 1 < long
    assert state_bytes(HYBRID) == 30 * (32 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 32 * 128) * 2)


def test_a_model_that_keeps_only_states_counts_sequences() -> None:
    block = Block(count=4, mixer=Recurrence(heads=8, key_dim=64, value_dim=64, projection_parameters=1 << 20),
                  feed_forward=Mlp(intermediate_size=4096))
    shape = ModelShape(name="states", hidden_size=1024, vocabulary_size=1000, context_tokens=4096, blocks=(block,))
    layout = cache_layout(shape, parallelism=SINGLE_GPU, enable_prefix_caching=False)
    assert layout.block_bytes == 4 * 8 * 64 * 64 * 2
    assert layout.blocks(1) == layout.blocks(4096) == 1


def test_a_hybrid_cache_counts_as_many_plain_blocks_as_carry_the_same() -> None:
    found = fit(HYBRID, H100, max_model_len=32768)
    assert found.plain_blocks == found.kv_tokens // 16
    held = found.kv_blocks * found.kv_block_bytes
    assert found.plain_blocks * found.plain_block_bytes == pytest.approx(held, rel=1e-3)
    plain = fit(SMALL, H100)
    assert (plain.plain_blocks, plain.plain_block_bytes) == (plain.kv_blocks, plain.kv_block_bytes)


def test_the_card_of_the_recorded_run_has_the_printed_tokens() -> None:
    # vllm_runs: Llama-3.1-8B on one RTX 4090, vLLM 0.19.0, printed 41,408.
    found = fit(SMALL, RTX4090, gpu_memory_utilization=0.9, max_num_batched_tokens=2048, max_num_seqs=256,
                max_model_len=32768, overheads=overheads_of((0, 19)))
    assert found.kv_tokens == pytest.approx(41_408, rel=0.03)
    assert found.fits


def test_releases_differ_in_the_sampler_and_in_what_covers_graphs() -> None:
    old, middle, new = (overheads_of(version) for version in ((0, 16), (0, 18), (0, 32)))
    tokens = [fit(SMALL, H100, max_num_seqs=1024, overheads=one).kv_tokens for one in (old, middle, new)]
    assert tokens[0] < tokens[2] < tokens[1]


def test_eager_engines_capture_no_graphs() -> None:
    assert fit(SMALL, H100, enforce_eager=True).graph_bytes == 0 < fit(SMALL, H100).graph_bytes


def test_the_engine_on_a_cpu_takes_its_cache_beside() -> None:
    found = fit_host(SMALL, kv_cache_bytes=4 * GIB, max_model_len=8192)
    assert found.kv_tokens == 4 * GIB // kv_bytes_per_token(SMALL)
    assert found.budget_bytes - found.weight_bytes == 4 * GIB
