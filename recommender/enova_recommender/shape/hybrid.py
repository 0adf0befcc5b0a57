"""Families that mix attention with linear attention (gated delta nets) or state-space layers (Mamba)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from enova_recommender.shape.body import Body, Reader
from enova_recommender.shape.dense import YES, Dense
from enova_recommender.shape.experts import EXPERT_WIDTH, Mixture, feed_forwards, read_experts, sparse_layers
from enova_recommender.shape.fields import Fields
from enova_recommender.shape.parts import (
    FULL,
    HeadNorm,
    Sizes,
    attention,
    gather,
    layer_kinds,
    mlp,
    periodic,
    read_sizes,
    stack,
)
from enova_recommender.types import ELEMENT_BYTES, Block, FeedForward, Mixer, Recurrence

LINEAR, MAMBA, ATTENTION = "linear_attention", "mamba", "attention"


def read_delta_net(fields: Fields, hidden: int) -> Recurrence:
    """A gated delta net (arXiv 2412.06464), as Qwen3-Next has it."""
    key_heads, value_heads = fields.count("linear_num_key_heads"), fields.count("linear_num_value_heads")
    key_dim, value_dim = fields.count("linear_key_head_dim"), fields.count("linear_value_head_dim")
    if value_heads % key_heads:
        raise fields.error("linear_num_key_heads", f"{key_heads} does not divide {value_heads} value heads")
    keys, values, taps = key_heads * key_dim, value_heads * value_dim, fields.count("linear_conv_kernel_dim")
    channels = 2 * keys + values
    return Recurrence(
        heads=value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        projection_parameters=hidden * (2 * keys + 3 * values + 2 * value_heads),
        convolution_elements=channels * (taps - 1),
        state_dtype=_state_dtype(fields),
        extra_parameters=channels * taps + 2 * value_heads + value_dim,
    )


def _state_dtype(fields: Fields) -> str:
    value = fields.text("mamba_ssm_dtype", "mamba_ssm_cache_dtype") or "auto"
    if value != "auto" and value not in ELEMENT_BYTES:
        key = "mamba_ssm_dtype" if fields.has("mamba_ssm_dtype") else "mamba_ssm_cache_dtype"
        raise fields.error(key, f"{value!r} is not known; these are: {', '.join(ELEMENT_BYTES)}")
    return value


def read_qwen_hybrid(fields: Fields, *, sparse: bool) -> Body:
    """Qwen3-Next and Qwen3.5: three delta nets to one gated attention."""
    sizes, layers = read_sizes(fields), fields.layers()
    default = periodic(layers, fields.count("full_attention_interval", default=4), windowed=LINEAR)
    biased = fields.flag("attention_bias")
    mixers: dict[str, Mixer] = {
        FULL: attention(sizes, qkv_bias=biased, output_bias=biased, head_norm=HeadNorm.PER_HEAD,
                        gated=fields.flag("attn_output_gate", default=True)),
        LINEAR: read_delta_net(fields, sizes.hidden),
    }  # fmt: skip
    kinds = layer_kinds(fields, layers, default)
    for kind in kinds:
        if kind not in mixers:
            raise fields.error("layer_types", f"{kind!r} is not modelled for {fields.text('model_type')}")
    family = Mixture(attention=Dense(), width=EXPERT_WIDTH, shared_gate=True)
    has_experts = sparse_layers(fields, layers) if sparse else [False] * layers
    parts = feed_forwards(fields, sizes.hidden, has_experts, family)
    return Body(
        hidden_size=sizes.hidden,
        blocks=stack([mixers[kind] for kind in kinds], parts, 2 * sizes.hidden),
        extra_parameters=sizes.hidden,
    )


def read_mamba2(fields: Fields, hidden: int, *, bias: str) -> Recurrence:
    """A Mamba-2 layer (arXiv 2405.21060); `bias` is the key of its projections' biases."""
    heads, dim = fields.count("mamba_num_heads", "mamba_n_heads"), fields.count("mamba_head_dim", "mamba_d_head")
    state, taps = fields.count("ssm_state_size", "mamba_d_state"), fields.count("conv_kernel", "mamba_d_conv")
    inner, groups = heads * dim, fields.count("n_groups", "mamba_n_groups", default=1)
    channels = inner + 2 * groups * state
    projected = inner + channels + heads
    biases = projected + hidden if fields.flag(bias) else 0
    convolution = channels * (taps + fields.flag("use_conv_bias", "mamba_conv_bias", default=True))
    return Recurrence(
        heads=heads,
        key_dim=state,
        value_dim=dim,
        projection_parameters=hidden * (projected + inner),
        convolution_elements=channels * (taps - 1),
        state_dtype=_state_dtype(fields),
        extra_parameters=convolution + 3 * heads + inner + biases,
    )


def read_nemotron_h(fields: Fields) -> Body:
    """Nemotron-H: a layer is one part only, as a letter of the pattern says."""
    sizes = read_sizes(fields)
    pattern = fields.text("hybrid_override_pattern") or _letters(fields)
    layers = fields.optional_count("num_hidden_layers")
    if layers is not None and layers != len(pattern):
        raise fields.error("num_hidden_layers", f"is {layers}, but hybrid_override_pattern has {len(pattern)} layers")
    made = {letter: _nemotron_layer(fields, sizes, letter) for letter in set(pattern)}
    return Body(
        hidden_size=sizes.hidden, blocks=gather(made[letter] for letter in pattern), extra_parameters=sizes.hidden
    )


def _letters(fields: Fields) -> str:
    words = {MAMBA: "M", ATTENTION: "*", "mlp": "-", "moe": "E"}
    kinds = fields.texts("layers_block_type")
    if not kinds:
        raise fields.error("hybrid_override_pattern", "is missing")
    return "".join(words.get(kind, "?") for kind in kinds)


def _nemotron_layer(fields: Fields, sizes: Sizes, letter: str) -> Block:
    mixer: Mixer | None = None
    feed_forward: FeedForward | None = None
    biased = fields.flag("mlp_bias")
    match letter:
        case "M":
            mixer = read_mamba2(fields, sizes.hidden, bias="use_bias")
        case "*":
            mixer = attention(sizes)
        case "-":
            feed_forward = mlp(sizes.hidden, fields.count("intermediate_size"), gated=False, bias=biased)
        case "E":
            feed_forward = _nemotron_experts(fields, sizes.hidden)
        case _:
            raise fields.error("hybrid_override_pattern", f"{letter!r} is none of M, *, - and E")
    return Block(count=1, mixer=mixer, feed_forward=feed_forward, norm_parameters=sizes.hidden)


def _nemotron_experts(fields: Fields, hidden: int) -> FeedForward:
    """Experts without gates; in the larger models they work on a projection of the token."""
    experts = read_experts(fields, hidden, Mixture(attention=Dense(), width=EXPERT_WIDTH, correction=YES))
    biases = experts.shared_intermediate_size + hidden if fields.flag("mlp_bias") else 0
    return replace(
        experts, gated=False, latent_size=fields.optional_count("moe_latent_size"),
        extra_parameters=experts.extra_parameters + biases,
    )  # fmt: skip


def read_mamba2_hybrid(fields: Fields) -> Body:
    """Granite 4 and Bamba: Mamba-2 or attention, then a feed-forward part, in every layer."""
    sizes, layers = read_sizes(fields), fields.layers()
    mixers: dict[str, Mixer] = {
        ATTENTION: attention(sizes, qkv_bias=fields.flag("attention_bias"), output_bias=fields.flag("attention_bias")),
        MAMBA: read_mamba2(fields, sizes.hidden, bias="mamba_proj_bias"),
    }
    indices = set(fields.counts("attn_layer_indices") or ())
    default = tuple(ATTENTION if index in indices else MAMBA for index in range(layers))
    kinds = fields.texts("layer_types", "layers_block_type") or default
    if len(kinds) != layers:
        raise fields.error("layer_types", f"has {len(kinds)} entries for {layers} layers")
    for kind in kinds:
        if kind not in mixers:
            raise fields.error("layer_types", f"{kind!r} is not modelled for {fields.text('model_type')}")
    if fields.count("num_local_experts", default=0, least=0):
        part: FeedForward = read_experts(fields, sizes.hidden, Mixture(attention=Dense()))
    else:
        shared = fields.optional_count("shared_intermediate_size")
        part = mlp(sizes.hidden, shared or fields.count("intermediate_size"), bias=fields.flag("mlp_bias"))
    return Body(
        hidden_size=sizes.hidden,
        blocks=stack([mixers[kind] for kind in kinds], [part] * layers, 2 * sizes.hidden),
        extra_parameters=sizes.hidden,
    )


def read_jamba(fields: Fields) -> Body:
    """Jamba: Mamba layers, with attention in every n-th and experts in every m-th."""
    sizes, layers = read_sizes(fields), fields.layers()
    mixing = attention(sizes)
    mamba = _mamba1(fields, sizes.hidden)
    sparse = read_experts(fields, sizes.hidden, Mixture(attention=Dense()))
    dense = mlp(sizes.hidden, fields.count("intermediate_size"))
    return Body(
        hidden_size=sizes.hidden,
        blocks=stack(
            [mixing if _at(fields, "attn", index) else mamba for index in range(layers)],
            [sparse if _at(fields, "expert", index) and sparse.experts > 1 else dense for index in range(layers)],
            2 * sizes.hidden,
        ),
        extra_parameters=sizes.hidden,
    )


def _at(fields: Fields, part: str, index: int) -> bool:
    period, offset = fields.count(f"{part}_layer_period"), fields.count(f"{part}_layer_offset", least=0)
    return index % period == offset


def _mamba1(fields: Fields, hidden: int) -> Recurrence:
    inner, state = fields.count("mamba_expand") * hidden, fields.count("mamba_d_state")
    taps, rank = fields.count("mamba_d_conv"), fields.count("mamba_dt_rank", default=-(-hidden // 16))
    convolution = inner * (taps + fields.flag("mamba_conv_bias", default=True))
    biases = 2 * inner + hidden if fields.flag("mamba_proj_bias") else 0
    return Recurrence(
        heads=inner,
        key_dim=state,
        value_dim=1,
        projection_parameters=3 * hidden * inner + inner * (rank + 2 * state) + rank * inner,
        convolution_elements=inner * (taps - 1),
        # the step's bias, the decays, the skip weights, and the norms of step, input and output maps
        extra_parameters=convolution + inner + inner * state + inner + rank + 2 * state + biases,
    )


_DENSE, _SPARSE = partial(read_qwen_hybrid, sparse=False), partial(read_qwen_hybrid, sparse=True)
READERS: Mapping[str, Reader] = {
    "qwen3_next": _SPARSE, "qwen3_5_moe_text": _SPARSE, "qwen3_5_text": _DENSE,
    "nemotron_h": read_nemotron_h, "granitemoehybrid": read_mamba2_hybrid, "bamba": read_mamba2_hybrid,
    "jamba": read_jamba,
}  # fmt: skip
