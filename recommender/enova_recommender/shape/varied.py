"""Families whose layers of attention differ in more than their windows: Gemma 4, MiMo V2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from enova_recommender.shape.body import Body, Reader
from enova_recommender.shape.dense import YES, Dense
from enova_recommender.shape.experts import EXPERT_WIDTH, Mixture, feed_forwards, read_experts, sparse_layers
from enova_recommender.shape.fields import Fields
from enova_recommender.shape.parts import (
    CONTEXT,
    FULL,
    WINDOWED,
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
from enova_recommender.types import Attention, Block, FeedForward, Mixer


def read_gemma4(fields: Fields) -> Body:
    """Gemma 4: wide heads in the layers that see all, shared keys in the last ones, vectors of a token for each layer.

    Its layers with experts have the dense part beside them: here it is their shared expert. The small matrices that
    mix in a layer's own vectors count among the norms, the table of those vectors among what surrounds the layers.
    """
    sizes, layers = read_sizes(fields), fields.layers()
    kinds = layer_kinds(fields, layers, periodic(layers, 6))
    unshared = layers - fields.count("num_kv_shared_layers", default=0, least=0)
    if unshared < 1:
        raise fields.error("num_kv_shared_layers", f"leaves none of {layers} layers with keys of its own")
    per_layer = fields.count("hidden_size_per_layer_input", default=0, least=0)
    norms = (5 if per_layer else 4) * sizes.hidden + 2 * per_layer * sizes.hidden
    blocks = [
        Block(
            count=1,
            mixer=_gemma4_attention(fields, sizes, kind, shared=index >= unshared),
            feed_forward=_gemma4_feed_forward(fields, sizes.hidden, shared=index >= unshared),
            norm_parameters=norms,
        )
        for index, kind in enumerate(kinds)
    ]
    table = fields.count("vocab_size_per_layer_input", default=1) * layers * per_layer
    surrounding = table + layers * per_layer * sizes.hidden + per_layer
    return Body(
        hidden_size=sizes.hidden,
        blocks=gather(blocks),
        extra_parameters=sizes.hidden + surrounding,
        tied_embeddings=True,
    )


def _gemma4_attention(fields: Fields, sizes: Sizes, kind: str, *, shared: bool) -> Attention:
    biased = fields.flag("attention_bias")
    window: int | None = None
    both = False
    if kind == FULL:
        both = fields.flag("attention_k_eq_v")
        few = fields.optional_count("num_global_key_value_heads") if both else None
        sizes = replace(
            sizes, head_dim=fields.count("global_head_dim", default=512), kv_heads=few or sizes.kv_heads
        )
    elif kind == WINDOWED[0]:
        window = fields.count("sliding_window")
    else:
        raise fields.error("layer_types", f"{kind!r} is not modelled for gemma4")
    made = attention(sizes, qkv_bias=biased, output_bias=biased, head_norm=HeadNorm.PER_HEAD)
    windowed = window if window is not None and window < fields.count(*CONTEXT) else None
    if not shared:
        return replace(made, window_tokens=windowed, keys_are_values=both)
    # Without keys of its own it has no norm of them either.
    extra = made.extra_parameters - sizes.head_dim
    return replace(made, window_tokens=windowed, cached=False, extra_parameters=extra)


def _gemma4_feed_forward(fields: Fields, hidden: int, *, shared: bool) -> FeedForward:
    width = fields.count("intermediate_size")
    if shared and fields.flag("use_double_wide_mlp"):
        width *= 2
    if not fields.flag("enable_moe_block"):
        return mlp(hidden, width)
    experts = read_experts(fields, hidden, Mixture(attention=Dense(), width=EXPERT_WIDTH))
    small = hidden + experts.experts + 3 * hidden  # scales of the router, norms around the experts
    return replace(experts, shared_intermediate_size=width, extra_parameters=small)


def read_mimo_v2(fields: Fields) -> Body:
    """MiMo V2: layers with a window have other heads of keys, and sinks; values are narrower than keys."""
    layers = fields.layers()
    pattern = fields.counts("hybrid_layer_pattern")
    if pattern is None or len(pattern) != layers:
        raise fields.error("hybrid_layer_pattern", f"must be {layers} zeros and ones, one a layer")
    full = _mimo_attention(fields, "")
    window = fields.count("sliding_window", "sliding_window_size")
    sliding = replace(_mimo_attention(fields, "swa_"), window_tokens=window)
    hidden = fields.count("hidden_size")
    family = Mixture(attention=Dense(), width=EXPERT_WIDTH, correction=YES)
    mixers: list[Mixer] = [sliding if slides else full for slides in pattern]
    parts = feed_forwards(fields, hidden, sparse_layers(fields, layers), family)
    return Body(hidden_size=hidden, blocks=stack(mixers, parts, 2 * hidden), extra_parameters=hidden)


def _mimo_attention(fields: Fields, prefix: str) -> Attention:
    heads, kv_heads = fields.count(f"{prefix}num_attention_heads"), fields.count(f"{prefix}num_key_value_heads")
    if heads % kv_heads:
        raise fields.error(f"{prefix}num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
    sinks = "add_swa_attention_sink_bias" if prefix else "add_full_attention_sink_bias"
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=fields.count(f"{prefix}head_dim"),
        value_dim=fields.count(f"{prefix}v_head_dim"),
        extra_parameters=heads if fields.flag(sinks) else 0,
    )


READERS: Mapping[str, Reader] = {"gemma4_text": read_gemma4, "mimo_v2_flash": read_mimo_v2}
