"""A config.json that cannot be read names its key; none makes the reader fail in another way."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping

import pytest

from enova_recommender import catalog
from enova_recommender.shape import FAMILIES, ShapeError, parse_shape
from enova_recommender.types import ModelShape

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}  # fmt: skip
JUNK: tuple[object, ...] = (
    None, -1, 0, 1, True, "x", "", 1.5, math.nan, math.inf, 10**30, [], [None], [7], ["x"], {}, {"x": 1},
)  # fmt: skip


def like(name: str, **change: object) -> dict[str, object]:
    """A model's configuration with some keys changed; None removes."""
    return {**catalog.model_configs()[name], **change}


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers", "is missing"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers", "more than 10000"),
        ({"vocab_size": "many"}, "vocab_size", "whole number"),
        ({"hidden_size": -1}, "hidden_size", "whole number"),
        ({"hidden_size": 4097}, "head_dim", "4097 is no multiple of 32 heads"),
        ({"num_key_value_heads": 7}, "num_key_value_heads", "7 does not divide num_attention_heads 32"),
        ({"num_local_experts": 8}, "num_local_experts", "'llama' has no such part"),
        ({"n_routed_experts": 8}, "n_routed_experts", "'llama' has no such part"),
        ({"kv_lora_rank": 512}, "kv_lora_rank", "'llama' has no such part"),
        ({"n_embd": 2048}, "n_embd", "is 2048, but hidden_size is 4096"),
        ({"model_type": "rwkv"}, "model_type", "'rwkv' is not modelled"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "model_type", "encoder-decoder"),
        ({"model_type": None}, "model_type", "is missing"),
        ({"model_type": 3}, "model_type", "must be a text"),
        ({"attention_bias": "yes"}, "attention_bias", "true or false"),
        ({"torch_dtype": "int3"}, "torch_dtype", "is not known"),
        ({"torch_dtype": None, "dtype": "int3"}, "dtype", "is not known"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types", "3 entries for 32 layers"),
        ({"layer_types": "full"}, "layer_types", "must be a list"),
        ({"model_type": "gemma2", "sliding_window": 1024, "layer_types": ["mamba"] * 32}, "layer_types", "'mamba'"),
        ({"model_type": "gemma2", "layer_types": ["sliding_attention"] * 32}, "sliding_window", "is missing"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor", "above 0"),
        ({"quantization_config": {"quant_method": "secret"}}, "quantization_config.quant_method", "'secret' is not"),
        ({"text_config": {"model_type": "llama", "hidden_size": "x"}}, "text_config.hidden_size", "whole number"),
        ({"text_config": {"hidden_size": 8}}, "text_config.model_type", "is missing"),
        ({"text_config": 3}, "text_config", "must be an object"),
    ],
)
def test_what_cannot_be_read_names_its_key(change: dict[str, object], field: str, words: str) -> None:
    with pytest.raises(ShapeError, match=words) as caught:
        parse_shape({**LLAMA, **change}, name="m")
    assert caught.value.field == field
    assert str(caught.value).startswith(field)


@pytest.mark.parametrize(
    ("config", "field", "words"),
    [
        (like("mistralai/Mixtral-8x7B-v0.1", num_experts_per_tok=9), "num_experts_per_tok", "more than the 8 experts"),
        (like("mistralai/Mixtral-8x7B-v0.1", num_local_experts=None), "num_local_experts", "is missing"),
        (like("openai/gpt-oss-20b", experts_per_token=5), "experts_per_token", "but num_experts_per_tok is 4"),
        (like("openai/gpt-oss-20b", sliding_window=None, layer_types=["sliding_attention"] * 24), "sliding_window",
         "is missing"),
        (like("deepseek-ai/DeepSeek-V3", kv_lora_rank=None), "kv_lora_rank", "is missing"),
        (like("deepseek-ai/DeepSeek-V3.2", q_lora_rank=None), "q_lora_rank", "the indexer of index_topk reads it"),
        (like("deepseek-ai/DeepSeek-V3.2", index_head_dim=None), "index_head_dim", "is missing"),
        (like("zai-org/GLM-5", indexer_types=["full"]), "indexer_types", "1 entries for 78 layers"),
        (like("Qwen/Qwen3-Next-80B-A3B-Instruct", linear_num_value_heads=30), "linear_num_key_heads", "not divide"),
        (like("Qwen/Qwen3-Next-80B-A3B-Instruct", layer_types=["mamba"] * 48), "layer_types", "'mamba'"),
        (like("nvidia/NVIDIA-Nemotron-Nano-9B-v2", num_hidden_layers=7), "num_hidden_layers", "has 56 layers"),
        (like("nvidia/NVIDIA-Nemotron-Nano-9B-v2", hybrid_override_pattern="MXM", num_hidden_layers=3),
         "hybrid_override_pattern", "'X' is none of"),
        (like("nvidia/NVIDIA-Nemotron-Nano-9B-v2", hybrid_override_pattern=None), "hybrid_override_pattern", "missing"),
        (like("nvidia/NVIDIA-Nemotron-Nano-9B-v2", mamba_ssm_cache_dtype="tiny"), "mamba_ssm_cache_dtype", "not known"),
        (like("Deci/DeciLM-7B", num_key_value_heads_per_layer=[4]), "num_key_value_heads_per_layer", "1 entries"),
        (like("LGAI-EXAONE/EXAONE-4.0-32B", sliding_window_pattern="LLX"), "sliding_window_pattern", "L and G"),
        (like("facebook/opt-6.7b", word_embed_proj_dim=512), "word_embed_proj_dim", "not modelled"),
        (like("meta-llama/Llama-3.1-8B", model_type="llama4_text", attention_chunk_size=64, intermediate_size_mlp=9,
              num_local_experts=4, num_experts_per_tok=1, no_rope_layers=[1]), "no_rope_layers", "1 entries for 32"),
        (like("nvidia/Llama-3_3-Nemotron-Super-49B-v1", block_configs=[{}]), "block_configs", "1 entries for 80"),
    ],
)  # fmt: skip
def test_contradictions_of_families_name_their_key(config: dict[str, object], field: str, words: str) -> None:
    with pytest.raises(ShapeError, match=words) as caught:
        parse_shape(config, name="m")
    assert caught.value.field == field


def read(config: Mapping[str, object], name: str) -> ModelShape | None:
    """The shape, or None where the reader refuses and blames a key."""
    try:
        return parse_shape(config, name=name)
    except ShapeError as error:
        return None if error.field else pytest.fail("no key is blamed")


def one_of_each_family() -> Iterator[tuple[str, Mapping[str, object]]]:
    """The first model of the catalogue of each type."""
    seen: set[object] = set()
    for name, config in catalog.model_configs().items():
        if config["model_type"] not in seen:
            seen.add(config["model_type"])
            yield name, config


@pytest.mark.parametrize(("name", "config"), list(one_of_each_family()))
def test_junk_in_any_key_is_read_or_refused_and_never_worse(name: str, config: Mapping[str, object]) -> None:
    nested = [key for key, value in config.items() if isinstance(value, Mapping)]
    for section in (None, *nested):
        inside = config if section is None else config[section]
        assert isinstance(inside, Mapping)
        for key in [*inside, "layer_types", "quantization_config", "text_config", "rope_scaling", "sliding_window"]:
            for junk in JUNK:
                changed = {**inside, key: junk}
                shape = read(changed if section is None else {**config, section: changed}, name)
                assert shape is None or shape.parameters > 0


def test_an_empty_configuration_names_its_first_key() -> None:
    with pytest.raises(ShapeError, match="model_type: is missing"):
        parse_shape({}, name="m")


def test_every_family_is_named_in_the_error_of_an_unknown_one() -> None:
    with pytest.raises(ShapeError) as caught:
        parse_shape({**LLAMA, "model_type": "unheard-of"}, name="m")
    assert all(family in str(caught.value) for family in FAMILIES)


def test_shapes_can_be_hashed_compared_and_their_configurations_written_as_json() -> None:
    assert len(set(catalog.models().values())) == len(catalog.models())
    for name, config in catalog.model_configs().items():
        again = json.loads(json.dumps(dict(config)))
        assert parse_shape(again, name=name) == catalog.models()[name]
