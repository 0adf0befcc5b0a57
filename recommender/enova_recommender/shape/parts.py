"""What all families share: attention with its biases and norms, feed-forward layers, and equal layers gathered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from enova_recommender.shape.fields import Fields
from enova_recommender.types import Attention, Block, FeedForward, Mixer, Mlp

HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed")
HEADS = ("num_attention_heads", "n_head", "n_heads")
INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
CONTEXT = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "model_max_length",
)  # fmt: skip
# What `layer_types` calls a layer that attends to all tokens, and one that attends to some.
FULL, WINDOWED = "full_attention", ("sliding_attention", "chunked_attention")


class HeadNorm(StrEnum):
    """Norms of queries and keys."""

    NONE = "NONE"
    PER_HEAD = "PER_HEAD"    # one weight per element of a head
    ALL_HEADS = "ALL_HEADS"  # one weight per element of all heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The widths that every layer of a model has in common."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


def read_sizes(fields: Fields, *, kv_heads: int | None = None, head_dim: int | None = None) -> Sizes:
    """The widths; what is given stands in where config.json does not say, else heads divide the hidden size evenly."""
    hidden, heads = fields.count(*HIDDEN), fields.count(*HEADS)
    head_dim = fields.optional_count("head_dim", "attention_head_dim") or head_dim
    if head_dim is None:
        if hidden % heads:
            raise fields.error("head_dim", f"is missing, and hidden_size {hidden} is no multiple of {heads} heads")
        head_dim = hidden // heads
    found = fields.count("num_key_value_heads", "num_kv_heads", default=kv_heads or heads)
    if heads % found:
        raise fields.error("num_key_value_heads", f"{found} does not divide num_attention_heads {heads}")
    return Sizes(hidden=hidden, heads=heads, kv_heads=found, head_dim=head_dim)


def attention(
    sizes: Sizes,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    head_norm: HeadNorm = HeadNorm.NONE,
    gated: bool = False,
    sinks: bool = False,
) -> Attention:
    """Attention over all tokens, with the small weights that belong to it."""
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    extra = sizes.heads if sinks else 0
    extra += (queries * (2 if gated else 1) + 2 * keys if qkv_bias else 0) + (sizes.hidden if output_bias else 0)
    match head_norm:
        case HeadNorm.PER_HEAD:
            extra += 2 * sizes.head_dim
        case HeadNorm.ALL_HEADS:
            extra += queries + keys
        case HeadNorm.NONE:
            pass
    return Attention(
        heads=sizes.heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim, gated=gated, extra_parameters=extra
    )


def mlp(hidden: int, intermediate: int, *, gated: bool = True, bias: bool = False) -> Mlp:
    """A dense feed-forward layer."""
    extra = intermediate * (2 if gated else 1) + hidden if bias else 0
    return Mlp(intermediate_size=intermediate, gated=gated, extra_parameters=extra)


def layer_kinds(fields: Fields, layers: int, default: Sequence[str] | None = None) -> tuple[str, ...]:
    """What `layer_types` says of each layer; `default` (all of them full attention) where it is silent."""
    kinds = fields.texts("layer_types")
    if kinds is None:
        return tuple(default) if default is not None else (FULL,) * layers
    if len(kinds) != layers:
        raise fields.error("layer_types", f"has {len(kinds)} entries for {layers} layers")
    return kinds


def periodic(layers: int, period: int, *, windowed: str = WINDOWED[0]) -> tuple[str, ...]:
    """Every `period`-th layer attends to all tokens, those between to a window."""
    return tuple(windowed if (index + 1) % period else FULL for index in range(layers))


def windowed_layers(
    fields: Fields, mixer: Attention, kinds: Sequence[str], *, context: int, window: int | None
) -> list[Mixer]:
    """The attention of each layer by its kind. A window as long as the context is none."""
    layers: list[Mixer] = []
    for kind in kinds:
        if kind == FULL:
            layers.append(mixer)
        elif kind not in WINDOWED:
            raise fields.error("layer_types", f"{kind!r} is not modelled for {fields.text('model_type')}")
        elif window is None:
            raise fields.error("sliding_window", f"is missing, and layer_types names {kind}")
        else:
            layers.append(replace(mixer, window_tokens=window) if window < context else mixer)
    return layers


def gather(layers: Iterable[Block]) -> tuple[Block, ...]:
    """Equal layers as one block with their count, in the order of their first."""
    counts: dict[Block, int] = {}
    for layer in layers:
        counts[layer] = counts.get(layer, 0) + layer.count
    return tuple(replace(layer, count=count) for layer, count in counts.items())


def stack(mixers: Sequence[Mixer | None], feed_forwards: Sequence[FeedForward | None], norms: int) -> tuple[Block, ...]:
    """Layers of one mixer and one feed-forward part each, gathered."""
    pairs = zip(mixers, feed_forwards, strict=True)
    return gather(Block(count=1, mixer=m, feed_forward=f, norm_parameters=norms) for m, f in pairs)
