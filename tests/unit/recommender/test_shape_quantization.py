"""What a quantised checkpoint keeps in how many bits is read, or the key that is to blame is named."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from enova_recommender import catalog
from enova_recommender.memory import weight_bytes
from enova_recommender.shape import ShapeError, parse_shape
from enova_recommender.types import WEIGHT_FORMATS, Arithmetic, Part

DENSE = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": 2048, "torch_dtype": "bfloat16",
}  # fmt: skip
SPARSE = {
    **DENSE, "model_type": "deepseek_v3", "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 64, "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 48,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
Section = Mapping[str, object]


def group(bits: int, kind: str, *, activations: bool = False, **weights: object) -> Section:
    """A compressed-tensors section of one group."""
    one = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, **weights}}
    if activations:
        one["input_activations"] = {"num_bits": bits, "type": kind}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": one}}


@pytest.mark.parametrize(
    ("section", "method"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
        ({"quant_method": "fbgemm_fp8"}, "fp8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq"),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 32}, "int4_group32"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
        ({"quant_method": "gptq", "bits": 8}, "int8_weights"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quantization": {"quant_algo": "NVFP4"}}, "nvfp4"),
        (group(8, "float", activations=True, strategy="channel"), "fp8"),
        (group(8, "float", activations=True, strategy="block"), "fp8_block"),
        (group(8, "float"), "fp8_weights"),
        (group(4, "float", activations=True, group_size=16), "nvfp4"),
        (group(4, "float", group_size=16), "nvfp4_weights"),
        (group(4, "float", group_size=32), "mxfp4"),
        (group(8, "int", activations=True), "int8"),
        (group(8, "int"), "int8_weights"),
        (group(4, "int", group_size=128), "int4"),
        (group(4, "int", group_size=32), "int4_group32"),
    ],
)
def test_the_format_follows_from_method_and_bits(section: Section, method: str) -> None:
    assert parse_shape({**DENSE, "quantization_config": section}, name="m").quantization == method
    assert method in WEIGHT_FORMATS


@pytest.mark.parametrize(
    ("section", "field", "words"),
    [
        ({"bits": 4}, "quant_method", "is missing"),
        ({"quant_method": "aqlm"}, "quant_method", "'aqlm' is not modelled"),
        ({"quant_method": "awq", "bits": 8}, "bits", "is 8, and awq has 4"),
        ({"quant_method": "awq", "bits": 4, "w_bit": 8}, "w_bit", "is 8, but bits is 4"),
        ({"quant_method": "gptq"}, "bits", "is missing"),
        ({"quant_method": "gptq", "bits": 3}, "bits", "3 is not modelled"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit", "is false, and so is load_in_8bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit", "too"),
        ({"quant_method": "modelopt"}, "quant_algo", "is missing"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "quant_algo", "not modelled"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size", "two sizes"),
        ({"quant_method": "compressed-tensors"}, "config_groups", "is missing"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {}}}, "config_groups.a.weights", "is missing"),
        (group(3, "int"), "config_groups.group_0.weights.num_bits", "3 of type 'int' are not modelled"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {
                "a": {"weights": {"num_bits": 4, "type": "int"}}, "b": {"weights": {"num_bits": 8, "type": "int"}}}},
            "config_groups.b", "mixed formats",
        ),
        ({"quant_method": "fp8", "ignore": ["re:("]}, "ignore", "no regular expression"),
        ({"quant_method": "fp8", "ignore": ["re:(a+)+$"]}, "ignore", "repeats a group"),
        ({"quant_method": "fp8", "ignore": ["x" * 500]}, "ignore", "characters"),
        ({"quant_method": "fp8", "ignore": [3]}, "ignore", "list of texts"),
        ([1], "", "must be an object"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_quantisation_names_its_key(section: object, field: str, words: str) -> None:
    with pytest.raises(ShapeError, match=words) as caught:
        parse_shape({**DENSE, "quantization_config": section}, name="m")
    assert caught.value.field == ("quantization_config." + field).rstrip(".")


ATTENTION, MLP, SHARED, EXPERTS = Part.ATTENTION, Part.MLP, Part.SHARED_EXPERTS, Part.EXPERTS


@pytest.mark.parametrize(
    ("names", "plain"),
    [
        ([], set()),
        (["lm_head", "model.embed_tokens"], set()),
        (["self_attn"], {ATTENTION}),
        (["model.layers.*.self_attn"], {ATTENTION}),
        ([f"model.layers.{index}.self_attn*" for index in range(4)], {ATTENTION}),
        (["re:.*self_attn.*", "re:.*shared_experts.*"], {ATTENTION, SHARED}),
        ([f"language_model.model.layers.{index}.self_attn.o_proj" for index in (0, 1)], {ATTENTION}),
        (["model.layers.0.self_attn.o_proj"], set()),  # one layer of four
        ([f"model.layers.{index}.self_attn.q_proj" for index in range(4)], set()),  # the smaller part of it
        (["re:.*mlp\\.(gate|up|gate_up|down)_proj.*"], {MLP}),
        (["model.layers.0.mlp"], {MLP}),  # the one dense layer
        (["mlp.gate", "model.layers.1.mlp.gate"], set()),  # routers
        (["re:.*mlp.experts.*"], {EXPERTS}),
    ],
)
def test_parts_are_plain_where_the_checkpoint_names_them(names: list[str], plain: set[Part]) -> None:
    for key in ("ignore", "modules_to_not_convert", "exclude_modules"):
        section = {"quant_method": "fp8", key: names}
        assert set(parse_shape({**SPARSE, "quantization_config": section}, name="m").plain_parts) == plain


def test_parts_that_no_target_names_are_plain() -> None:
    section = {"quant_method": "compressed-tensors", "config_groups": {
        "g": {"targets": ["re:.*mlp.experts.*"], "weights": {"num_bits": 4, "type": "int"}}}}  # fmt: skip
    shape = parse_shape({**SPARSE, "quantization_config": section}, name="m")
    assert set(shape.plain_parts) == {ATTENTION, MLP, SHARED}
    assert shape.quantized_parameters == shape.expert_parameters


def test_mxfp4_leaves_all_but_the_experts_plain_where_nothing_is_named() -> None:
    shape = parse_shape({**SPARSE, "quantization_config": {"quant_method": "mxfp4"}}, name="m")
    assert set(shape.plain_parts) == {ATTENTION, MLP, SHARED}


def test_routers_embedding_and_head_are_never_quantised() -> None:
    shape = parse_shape({**SPARSE, "quantization_config": {"quant_method": "fp8"}}, name="m")
    routers = 3 * 8 * 256
    assert shape.quantized_parameters == shape.linear_parameters - routers


@pytest.mark.parametrize(
    ("section", "dtype"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": "FP8"}, "fp8"),
        ({**group(8, "int"), "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "fp8"),
        ({**group(8, "int"), "kv_cache_scheme": None}, None),
        ({"quant_method": "fp8"}, None),
    ],
)
def test_the_type_of_the_cache_is_what_the_checkpoint_asks_for(section: Section, dtype: str | None) -> None:
    assert parse_shape({**DENSE, "quantization_config": section}, name="m").kv_cache_dtype == dtype


def test_a_nested_section_is_read_too() -> None:
    nested = {"model_type": "kimi_vl", "text_config": {**SPARSE, "quantization_config": {"quant_method": "fp8"}}}
    assert parse_shape(nested, name="m").quantization == "fp8"


def test_quantising_changes_no_count_of_the_catalogue() -> None:
    for name, config in catalog.model_configs().items():
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        assert parse_shape(plain, name=name).parameters == catalog.models()[name].parameters


@pytest.mark.parametrize(
    ("name", "size"), [("openai/gpt-oss-20b", 13_761_264_768), ("openai/gpt-oss-120b", 65_248_815_744)]
)
def test_a_checkpoint_weighs_what_its_index_says(name: str, size: int) -> None:
    # metadata.total_size of model.safetensors.index.json
    assert weight_bytes(catalog.models()[name]) == size


def test_formats_weigh_their_bits_and_a_little_for_scales() -> None:
    for name, form in WEIGHT_FORMATS.items():
        bits = 4 if any(word in name for word in ("4", "awq", "gptq", "bitsandbytes")) else 8
        assert bits / 8 <= form.element_bytes <= 1.15 * bits / 8, name
        if form.arithmetic is Arithmetic.FP4:
            assert bits == 4
