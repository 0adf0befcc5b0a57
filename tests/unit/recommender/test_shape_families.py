"""Each family's layers are what its config.json says: what slides, what is kept of a token, what is left out."""

from __future__ import annotations

import pytest

from enova_recommender import catalog
from enova_recommender.shape import parse_shape
from enova_recommender.types import Attention, Experts, LatentAttention, Mlp, ModelShape, Recurrence

LLAMA = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 8192,
}  # fmt: skip


def known(name: str) -> ModelShape:
    """A model of the catalogue."""
    return catalog.models()[name]


def windows(shape: ModelShape) -> dict[int | None, int]:
    """Layers of attention by window."""
    found: dict[int | None, int] = {}
    for count, mixer in shape.attention_layers:
        window = mixer.window_tokens if isinstance(mixer, Attention) else None
        found[window] = found.get(window, 0) + count
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mistralai/Mistral-7B-v0.1", {4096: 32}),
        ("mistralai/Mistral-7B-Instruct-v0.3", {None: 32}),
        ("microsoft/Phi-3-mini-4k-instruct", {2047: 32}),
        ("microsoft/Phi-3-medium-128k-instruct", {None: 40}),  # its window is as long as the context
        ("Qwen/Qwen2-7B", {None: 28}),                         # has one, and does not use it
        ("google/gemma-2-9b", {4096: 21, None: 21}),
        ("google/gemma-3-1b-it", {512: 22, None: 4}),
        ("google/gemma-3-27b-it", {1024: 52, None: 10}),
        ("openai/gpt-oss-20b", {128: 12, None: 12}),
        ("LGAI-EXAONE/EXAONE-4.0-32B", {4096: 48, None: 16}),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", {8192: 36, None: 12}),
        ("google/gemma-4-31B-it", {1024: 50, None: 10}),
        ("XiaomiMiMo/MiMo-V2-Flash", {128: 39, None: 9}),
    ],
)
def test_windows_lie_on_the_layers_that_have_them(name: str, expected: dict[int | None, int]) -> None:
    assert windows(known(name)) == expected


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("meta-llama/Llama-2-7b-hf", 2 * 32 * 32 * 128),          # every head has its own
        ("meta-llama/Llama-3.1-8B", 2 * 32 * 8 * 128),            # groups of heads share
        ("bigcode/starcoder", 2 * 40 * 128),                      # all heads share
        ("tiiuae/falcon-7b", 2 * 32 * 64),
        ("Deci/DeciLM-7B", 2 * 67 * 128),                         # each layer has its own number
        ("deepseek-ai/DeepSeek-V3", 61 * (512 + 64)),             # one latent vector
        ("deepseek-ai/DeepSeek-V3.2", 61 * (512 + 64 + 128)),     # and the indexer's key
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", 2 * 12 * 2 * 256),   # one layer of four
        ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", 2 * 4 * 8 * 128),
        ("ai21labs/AI21-Jamba-1.5-Mini", 2 * 4 * 8 * 128),
        ("google/gemma-4-31B-it", 2 * (50 * 16 * 256 + 10 * 4 * 512)),             # wider heads where all is seen
        ("XiaomiMiMo/MiMo-V2-Flash", (39 * 8 + 9 * 4) * (192 + 128)),              # values narrower than keys
    ],
)
def test_what_is_kept_of_a_token_is_what_the_attention_layers_keep(name: str, elements: int) -> None:
    assert known(name).kv_elements_per_token == elements


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("Qwen/Qwen3.5-397B-A17B", {Attention: 15, Recurrence: 45, Experts: 60}),
        ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", {Attention: 4, Recurrence: 27, Mlp: 25}),
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", {Attention: 6, Recurrence: 23, Experts: 23}),
        ("ai21labs/AI21-Jamba-1.5-Mini", {Attention: 4, Recurrence: 28, Experts: 16, Mlp: 16}),
        ("ibm-granite/granite-4.0-h-small", {Attention: 4, Recurrence: 36, Experts: 40}),
        ("deepseek-ai/DeepSeek-V3", {LatentAttention: 61, Mlp: 3, Experts: 58}),
        ("moonshotai/Kimi-K2-Instruct", {LatentAttention: 61, Mlp: 1, Experts: 60}),
        ("meta-llama/Llama-4-Maverick-17B-128E-Instruct", {Attention: 48, Mlp: 24, Experts: 24}),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", {Attention: 48, Experts: 48}),
        ("nvidia/Llama-3_3-Nemotron-Super-49B-v1", {Attention: 49, Mlp: 80}),
        ("zai-org/GLM-4.5", {Attention: 92, Mlp: 3, Experts: 89}),
    ],
)
def test_hybrids_and_mixtures_have_their_parts_in_the_layers_they_name(name: str, layers: dict[type, int]) -> None:
    found: dict[type, int] = {}
    for block in known(name).blocks:
        for part in (block.mixer, block.feed_forward):
            if part is not None:
                found[type(part)] = found.get(type(part), 0) + block.count
    assert found == layers


def test_the_state_of_a_recurrence_does_not_grow_with_the_context() -> None:
    (delta,) = {b.mixer for b in known("Qwen/Qwen3-Next-80B-A3B-Instruct").blocks if isinstance(b.mixer, Recurrence)}
    assert delta.state_elements == 32 * 128 * 128
    assert delta.convolution_elements == (2 * 16 * 128 + 32 * 128) * 3
    (mamba,) = {b.mixer for b in known("nvidia/NVIDIA-Nemotron-Nano-9B-v2").blocks if isinstance(b.mixer, Recurrence)}
    assert mamba.state_elements == 128 * 80 * 128
    assert mamba.state_dtype == "float32"


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("google/gemma-3-27b-it", ("vision tower",)),
        ("Qwen/Qwen3-VL-8B-Instruct", ("vision tower",)),
        ("Qwen/Qwen3-Omni-30B-A3B-Instruct", ("speech decoder", "vision tower", "audio tower")),
        ("nvidia/NVIDIA-Nemotron-Nano-12B-v2-VL-BF16", ("vision tower",)),
        ("deepseek-ai/DeepSeek-V3", ("multi-token prediction layers",)),
        ("Qwen/Qwen3.5-27B", ("vision tower", "multi-token prediction layers")),
        ("meta-llama/Llama-3.1-8B", ()),
    ],
)
def test_what_the_figures_leave_out_is_named(name: str, left_out: tuple[str, ...]) -> None:
    assert known(name).not_modelled == left_out


def test_gated_attention_makes_its_gate_with_the_query() -> None:
    mixers = {mixer for _, mixer in known("Qwen/Qwen3.5-27B").attention_layers}
    (gated,) = mixers
    assert isinstance(gated, Attention)
    assert gated.gated
    plain = Attention(heads=gated.heads, kv_heads=gated.kv_heads, head_dim=gated.head_dim)
    gate = 5120 * gated.heads * gated.head_dim
    assert gated.matrix_parameters(5120) == plain.matrix_parameters(5120) + gate


def test_layers_that_share_the_choice_of_an_indexer_have_none() -> None:
    base = {**catalog.model_configs()["zai-org/GLM-5"]}
    kinds = ["full", "full", "full"] + ["shared", "shared", "shared", "full"] * 18 + ["shared"] * 3
    shared = parse_shape({**base, "indexer_types": kinds}, name="m")
    alone = parse_shape(base, name="m")
    without = kinds.count("shared")
    assert alone.kv_elements_per_token - shared.kv_elements_per_token == without * 128
    assert shared.parameters < alone.parameters
    assert all(isinstance(m, LatentAttention) and m.top_tokens == 2048 for _, m in shared.attention_layers)


def test_layers_that_share_keys_keep_none_and_have_no_matrices_for_them() -> None:
    base = {
        "model_type": "gemma4_text", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "global_head_dim": 128,
        "sliding_window": 512, "vocab_size": 1000, "max_position_embeddings": 8192,
    }  # fmt: skip
    alone = parse_shape(base, name="m")
    shared = parse_shape({**base, "num_kv_shared_layers": 6}, name="m")
    assert windows(alone) == windows(shared) == {512: 10, None: 2}
    assert shared.kv_elements_per_token == alone.kv_elements_per_token // 2 == 2 * (5 * 64 + 128)
    assert alone.linear_parameters - shared.linear_parameters == 256 * shared.kv_elements_per_token
    wide = parse_shape({**base, "num_kv_shared_layers": 6, "use_double_wide_mlp": True}, name="m")
    assert wide.linear_parameters - shared.linear_parameters == 6 * 3 * 256 * 512
    per_layer = parse_shape({**base, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 1000}, name="m")
    assert per_layer.linear_parameters == alone.linear_parameters
    tables = 12 * 32 * (1000 + 256) + 32
    assert per_layer.parameters - alone.parameters == tables + 12 * (2 * 32 * 256 + 256)


@pytest.mark.parametrize(
    ("change", "context"),
    [
        ({}, 8192),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 32768),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, 16384),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 8192),
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, 8192),
        ({"rope_scaling": None}, 8192),
    ],
)
def test_the_context_is_stretched_by_those_scalings_that_mean_it(change: dict[str, object], context: int) -> None:
    assert parse_shape({**LLAMA, **change}, name="m").context_tokens == context


def test_a_nested_section_leaves_out_the_defaults_of_its_class() -> None:
    llava = {"model_type": "llava", "text_config": {"model_type": "mistral", "vocab_size": 32064},
             "vision_config": {"model_type": "clip_vision_model"}}  # fmt: skip
    shape = parse_shape(llava, name="m")
    mistral = known("mistralai/Mistral-7B-v0.1")
    assert shape.linear_parameters == mistral.linear_parameters
    assert shape.vocabulary_size == 32064


def test_tied_embeddings_are_what_the_language_part_says_else_the_whole_else_the_family() -> None:
    def tied(outer: dict[str, object], inner: dict[str, object]) -> bool:
        config = {"model_type": "vlm", "text_config": {**LLAMA, **inner}, **outer}
        return parse_shape(config, name="m").tied_embeddings

    assert not tied({}, {})
    assert tied({"tie_word_embeddings": True}, {})
    assert not tied({"tie_word_embeddings": True}, {"tie_word_embeddings": False})
    assert parse_shape({**LLAMA, "model_type": "gemma"}, name="m").tied_embeddings


def test_a_sliding_window_that_is_switched_off_is_no_matter() -> None:
    config = {**LLAMA, "model_type": "qwen2", "sliding_window": 4096}
    assert windows(parse_shape(config, name="m")) == {None: 12}
    used = {**config, "use_sliding_window": True, "max_window_layers": 8}
    assert windows(parse_shape(used, name="m")) == {None: 8, 4096: 4}


def test_layer_types_say_more_than_the_family() -> None:
    kinds = ["sliding_attention"] * 4 + ["full_attention"] * 8
    config = {**LLAMA, "model_type": "gemma2", "sliding_window": 1024, "layer_types": kinds}
    assert windows(parse_shape(config, name="m")) == {1024: 4, None: 8}


def test_keys_go_by_the_names_of_every_library() -> None:
    gpt = {"model_type": "gpt2", "n_embd": 256, "n_layer": 12, "n_head": 8, "n_positions": 1024, "vocab_size": 1000}
    shape = parse_shape(gpt, name="m")
    assert (shape.hidden_size, shape.layers, shape.attention_heads, shape.context_tokens) == (256, 12, 8, 1024)
    assert parse_shape({**gpt, "hidden_size": 256, "num_hidden_layers": 12}, name="m") == shape


def test_every_known_name_is_found_whatever_its_case() -> None:
    assert catalog.find_model("qwen/qwen3-8b") == known("Qwen/Qwen3-8B")
    assert catalog.find_model("nobody/nothing") is None
    assert catalog.model_config("nobody/nothing") is None
    for name in catalog.models():
        assert catalog.find_model(name) is catalog.models()[name]
