"""Shapes are read from config.json, or the key that is to blame is named; the catalogue is plausible."""

from __future__ import annotations

import pytest

from enova_recommender import catalog
from enova_recommender.shape import ShapeError, parse_shape
from enova_recommender.types import Attention

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-72B-Instruct", 72_706_203_648),
        ("Qwen/Qwen3-8B", 8_190_735_360),
    ],
)
def test_parameters_are_those_of_the_published_checkpoints(name: str, parameters: int) -> None:
    assert catalog.models()[name].parameters == parameters


def test_what_a_config_leaves_out_follows_from_the_rest() -> None:
    shape = parse_shape({key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}, name="m")
    ((_, attention),) = shape.attention_layers
    assert attention == Attention(heads=32, kv_heads=32, head_dim=128)
    assert not shape.tied_embeddings


def test_a_quantised_checkpoint_says_so() -> None:
    assert parse_shape({**LLAMA, "quantization_config": {"quant_method": "awq"}}, name="m").quantization == "awq"


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers", "is missing"),
        ({"vocab_size": "many"}, "vocab_size", "whole number"),
        ({"hidden_size": -1}, "hidden_size", "whole number"),
        ({"num_local_experts": 8}, "num_local_experts", "'llama' has no such part"),
        ({"kv_lora_rank": 512}, "kv_lora_rank", "'llama' has no such part"),
        ({"model_type": "mamba"}, "model_type", "'mamba' is not modelled"),
        ({"model_type": None}, "model_type", "is missing"),
        ({"torch_dtype": "int3"}, "torch_dtype", "is not known"),
        ({"quantization_config": {"quant_method": "secret"}}, "quantization_config.quant_method", "'secret' is"),
    ],
)
def test_what_cannot_be_read_names_its_key(change: dict[str, object], field: str, words: str) -> None:
    with pytest.raises(ShapeError, match=words) as caught:
        parse_shape({**LLAMA, **change}, name="m")
    assert caught.value.field == field


def test_a_sliding_window_that_is_switched_off_is_no_matter() -> None:
    assert parse_shape({**LLAMA, "sliding_window": 4096, "use_sliding_window": False}, name="m").layers == 32


@pytest.mark.parametrize(
    ("name", "found"),
    [("H100", "H100"), ("h100", "H100"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-40GB", "A100-40G"),
     (" nvidia l4 ", "L4"), ("GeForce 256", None)],
)  # fmt: skip
def test_gpus_are_found_by_catalogue_and_by_driver_name(name: str, found: str | None) -> None:
    gpu = catalog.find_gpu(name)
    assert (gpu.name if gpu else None) == found


def test_every_gpu_has_a_source_and_possible_figures() -> None:
    names = [name for gpu in catalog.gpus().values() for name in (gpu.name, *gpu.driver_names)]
    assert len(names) == len(set(names))
    for gpu in catalog.gpus().values():
        assert gpu.source
        assert 0 < gpu.idle_power_w < gpu.power_limit_w
        assert 15 << 30 <= gpu.memory_bytes < 400 << 30
        # The ridge of the roofline of every current card lies between these.
        assert 30 < gpu.bf16_flops / gpu.bandwidth_bytes_per_s < 500
        assert gpu.fp8_flops is None or 1.9 < gpu.fp8_flops / gpu.bf16_flops < 2.1
