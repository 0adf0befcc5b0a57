"""Families whose layers are all attention and a dense feed-forward part, as a table of how they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

from enova_recommender.shape.body import Body, Reader
from enova_recommender.shape.fields import Fields
from enova_recommender.shape.parts import (
    CONTEXT,
    FULL,
    INTERMEDIATE,
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
    windowed_layers,
)
from enova_recommender.types import Block, FeedForward, Mixer, Mlp

MULTIPLE_BEYOND = 256  # nemotron-nas rounds the width of its feed-forward layers up to a multiple of this


@dataclass(frozen=True, slots=True, kw_only=True)
class Bias:
    """Whether some matrices have biases: what the key says, else the default."""

    default: bool
    key: str | None = None

    def read(self, fields: Fields) -> bool:
        """The answer for one model."""
        return self.default if self.key is None else fields.flag(self.key, default=self.default)


def if_said(key: str) -> Bias:
    """Biases only where the key says so."""
    return Bias(default=False, key=key)


def usually(key: str) -> Bias:
    """Biases, unless the key says no."""
    return Bias(default=True, key=key)


NO, YES = Bias(default=False), Bias(default=True)
ASKED, ALL = if_said("attention_bias"), usually("use_bias")




class Windows(StrEnum):
    """Which layers slide, where `layer_types` does not say."""

    NONE = "NONE"
    ALL = "ALL"              # every one, if sliding_window is given
    LAST = "LAST"            # those from max_window_layers on, if use_sliding_window is set
    PERIODIC = "PERIODIC"    # all but every n-th


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """How a family differs from the others."""

    tied: bool = False
    qkv: Bias = NO
    output: Bias = NO
    feed: Bias = NO
    gated: bool = True
    norms: int = 2                     # of the hidden size, in each layer
    norm_bias: bool = False            # LayerNorm has one, RMSNorm has none
    head_norm: HeadNorm = HeadNorm.NONE
    asked_norm: HeadNorm = HeadNorm.NONE   # instead, where use_qk_norm or qk_layernorm is set
    head_dim: int | None = None        # where config.json does not say; None: the hidden size divided by the heads
    grouped: bool = True               # heads may share keys
    sinks: bool = False                # a learnt weight a head that takes attention and gives nothing
    windows: Windows = Windows.NONE
    period: int = 1                    # of windows that are PERIODIC, where config.json does not say
    positions: int | None = None       # learnt positions: the context and so many more
    embedding_norm: bool = False
    head_bias: Bias = NO
    intermediate_ratio: int | None = None  # of intermediate to hidden size, where config.json does not say


_LLAMA = Dense(qkv=ASKED, output=ASKED, feed=if_said("mlp_bias"))
_GPT = Dense(tied=True, qkv=YES, output=YES, feed=YES, gated=False, norm_bias=True, intermediate_ratio=4,
             grouped=False)
_GPTJ = replace(_GPT, tied=False, qkv=NO, output=NO, norms=1, head_bias=YES)
_GEMMA = Dense(tied=True, qkv=ASKED, output=ASKED, head_dim=256)
_GEMMA2 = replace(_GEMMA, norms=4, windows=Windows.PERIODIC, period=2)
_COHERE = Dense(tied=True, qkv=ASKED, output=ASKED, norms=1, asked_norm=HeadNorm.ALL_HEADS)
_GLM4 = Dense(qkv=usually("attention_bias"), norms=4, head_dim=128)
_OLMO2 = Dense(qkv=ASKED, output=ASKED, head_norm=HeadNorm.ALL_HEADS)
_QWEN2 = Dense(qkv=YES, windows=Windows.LAST)
_QWEN3 = Dense(qkv=ASKED, output=ASKED, head_norm=HeadNorm.PER_HEAD, windows=Windows.LAST, head_dim=128)
_EXAONE4 = Dense(head_norm=HeadNorm.PER_HEAD, windows=Windows.PERIODIC, period=4)
FAMILIES: Mapping[str, Dense] = {
    "llama": _LLAMA, "aquila": Dense(), "granite": _LLAMA, "smollm3": replace(_LLAMA, tied=True),
    "arcee": replace(_LLAMA, gated=False), "internlm2": Dense(qkv=if_said("bias"), output=if_said("bias")),
    "seed_oss": replace(_LLAMA, qkv=usually("attention_bias"), output=if_said("attention_out_bias"),
                        head_dim=128),
    "mistral": Dense(windows=Windows.ALL), "ministral": Dense(windows=Windows.ALL), "ministral3": Dense(head_dim=128),
    "qwen2": _QWEN2, "mimo": _QWEN2, "qwen3": _QWEN3, "qwen3_vl_text": _QWEN3,
    "phi3": Dense(windows=Windows.ALL),
    "phi": Dense(qkv=YES, output=YES, feed=YES, gated=False, norms=1, norm_bias=True, head_bias=YES),
    "gemma": _GEMMA, "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, head_norm=HeadNorm.PER_HEAD, period=6),
    "cohere": _COHERE, "cohere2": replace(_COHERE, asked_norm=HeadNorm.NONE, windows=Windows.PERIODIC, period=4),
    "glm": replace(_GLM4, norms=2), "glm4": _GLM4,
    "olmo2": _OLMO2, "olmo3": replace(_OLMO2, windows=Windows.PERIODIC, period=4),
    "exaone4": _EXAONE4,
    "ernie4_5": Dense(tied=True, qkv=if_said("use_bias"), output=if_said("use_bias"),
                      feed=if_said("use_bias"), head_dim=128),
    "hunyuan_v1_dense": Dense(qkv=ASKED, output=ASKED, head_norm=HeadNorm.PER_HEAD),
    "stablelm": Dense(qkv=if_said("use_qkv_bias"), norm_bias=True, asked_norm=HeadNorm.ALL_HEADS),
    "starcoder2": Dense(tied=True, qkv=ALL, output=ALL, feed=ALL, gated=False, norm_bias=True, windows=Windows.ALL),
    "nemotron": Dense(qkv=ASKED, output=ASKED, feed=if_said("mlp_bias"), gated=False, norm_bias=True),
    "gpt_neox": replace(_GPT, tied=False, qkv=usually("attention_bias"), output=usually("attention_bias")),
    "gptj": _GPTJ, "codegen": _GPTJ, "gpt2": replace(_GPT, positions=0), "bloom": replace(_GPT, embedding_norm=True),
    "opt": replace(_GPT, positions=2, qkv=usually("enable_bias"), output=usually("enable_bias"),
                   feed=usually("enable_bias")),
}  # fmt: skip


def read_dense(fields: Fields, family: Dense) -> Body:
    """A model of one of the families in the table."""
    return _even(fields, family, family_sizes(fields, family))


def family_sizes(fields: Fields, family: Dense) -> Sizes:
    """The widths, as the family reads them."""
    said = fields if family.grouped else fields.without("num_key_value_heads", "head_dim")
    return read_sizes(said, head_dim=family.head_dim)


def dense_feed_forward(fields: Fields, family: Dense, hidden: int) -> Mlp:
    """The feed-forward part that all layers of a dense model have."""
    ratio = family.intermediate_ratio
    intermediate = fields.count(*INTERMEDIATE, default=ratio * hidden if ratio else None)
    return mlp(hidden, intermediate, gated=family.gated, bias=family.feed.read(fields))


def decoder(fields: Fields, family: Dense, sizes: Sizes, feed_forwards: Sequence[FeedForward]) -> Body:
    """Layers of the family's attention, each with the feed-forward part that is given for it."""
    projected = fields.optional_count("word_embed_proj_dim")
    if projected is not None and projected != sizes.hidden:
        raise fields.error("word_embed_proj_dim", f"{projected} is not hidden_size {sizes.hidden}: not modelled")
    asked = family.asked_norm is not HeadNorm.NONE and fields.flag("use_qk_norm", "qk_layernorm")
    mixer = attention(
        sizes, qkv_bias=family.qkv.read(fields), output_bias=family.output.read(fields), sinks=family.sinks,
        head_norm=family.asked_norm if asked else family.head_norm,
    )  # fmt: skip
    kinds = _kinds(fields, family, len(feed_forwards))
    context, window = fields.count(*CONTEXT, default=2048), fields.optional_count("sliding_window")
    norm = sizes.hidden * (2 if family.norm_bias else 1)
    return Body(
        hidden_size=sizes.hidden,
        blocks=stack(
            windowed_layers(fields, mixer, kinds, context=context, window=window), feed_forwards, norm * family.norms
        ),
        extra_parameters=norm * (2 if family.embedding_norm else 1) + _surroundings(fields, family, sizes.hidden),
        tied_embeddings=family.tied,
    )


def _surroundings(fields: Fields, family: Dense, hidden: int) -> int:
    positions = 0 if family.positions is None else hidden * (fields.count(*CONTEXT) + family.positions)
    return positions + (fields.count("vocab_size") if family.head_bias.read(fields) else 0)


def _kinds(fields: Fields, family: Dense, layers: int) -> tuple[str, ...]:
    slides = fields.has("sliding_window")
    match family.windows:
        case Windows.ALL if slides:
            default = (WINDOWED[0],) * layers
        case Windows.PERIODIC if slides:
            names = ("sliding_window_pattern", "_sliding_window_pattern")
            default = _pattern(fields, layers, names, family.period)
        case Windows.LAST if slides and fields.flag("use_sliding_window"):
            first = fields.count("max_window_layers", default=layers, least=0)
            default = tuple(FULL if index < first else WINDOWED[0] for index in range(layers))
        case _:
            default = (FULL,) * layers
    if family.windows is Windows.LAST and not fields.flag("use_sliding_window"):
        return default
    return layer_kinds(fields, layers, default)


def _pattern(fields: Fields, layers: int, names: tuple[str, ...], period: int) -> tuple[str, ...]:
    """The period as a number, or as a word of L (local) and G (global) that repeats."""
    value = fields.get(*names)
    if isinstance(value, str):
        if not value or set(value) - {"L", "G"}:
            raise fields.error(names[0], f"must be a number or a word of L and G, not {value!r}")
        return tuple(WINDOWED[0] if value[index % len(value)] == "L" else FULL for index in range(layers))
    return periodic(layers, fields.count(*names, default=period))


def read_falcon(fields: Fields) -> Body:
    """Falcon: one norm a layer where attention and feed-forward part run in parallel; one or few heads of keys."""
    new = fields.flag("new_decoder_architecture")
    heads = fields.count("num_attention_heads", "n_head")
    sizes = read_sizes(fields.without("num_kv_heads"))
    if new:
        sizes = replace(sizes, kv_heads=fields.count("num_kv_heads", "n_head_kv", default=heads))
    elif fields.flag("multi_query", default=True):
        sizes = replace(sizes, kv_heads=1)
    bias = if_said("bias")
    family = Dense(
        tied=True, qkv=bias, output=bias, feed=bias, gated=False, norm_bias=True, intermediate_ratio=4
    )
    if new:
        family = replace(family, norms=fields.count("num_ln_in_parallel_attn", default=2))
    elif fields.flag("parallel_attn", default=True):
        family = replace(family, norms=1)
    return _even(fields, family, sizes)


def _even(fields: Fields, family: Dense, sizes: Sizes) -> Body:
    return decoder(fields, family, sizes, [dense_feed_forward(fields, family, sizes.hidden)] * fields.layers())


def read_mpt(fields: Fields) -> Body:
    """MPT: no biases, and LayerNorms without any, unless it says so."""
    section = fields.section("attn_config")
    sizes = read_sizes(fields, kv_heads=None if section is None else section.optional_count("kv_n_heads"))
    biased = Bias(default=not fields.flag("no_bias", default=True))
    family = Dense(
        tied=True, qkv=biased, output=biased, feed=biased, gated=False, norm_bias=biased.default,
        intermediate_ratio=fields.count("expansion_ratio", default=4),
    )  # fmt: skip
    return _even(fields, family, sizes)


def read_gpt_bigcode(fields: Fields) -> Body:
    """StarCoder and SantaCoder: GPT-2 with one head of keys."""
    sizes = read_sizes(fields)
    one = fields.flag("multi_query", default=True)
    return _even(fields, replace(_GPT, positions=0), replace(sizes, kv_heads=1) if one else sizes)


def read_deci(fields: Fields) -> Body:
    """DeciLM: as Llama, but each layer has its own number of heads of keys."""
    layers = fields.layers()
    per_layer = fields.counts("num_key_value_heads_per_layer", least=1)
    if per_layer is None:
        raise fields.error("num_key_value_heads_per_layer", "is missing")
    if len(per_layer) != layers:
        raise fields.error("num_key_value_heads_per_layer", f"has {len(per_layer)} entries for {layers} layers")
    sizes = read_sizes(fields)
    mixers: list[Mixer | None] = [attention(replace(sizes, kv_heads=heads)) for heads in per_layer]
    feed_forward = mlp(sizes.hidden, fields.count(*INTERMEDIATE))
    blocks = stack(mixers, [feed_forward] * layers, 2 * sizes.hidden)
    return Body(hidden_size=sizes.hidden, blocks=blocks, extra_parameters=sizes.hidden)


def read_nemotron_nas(fields: Fields) -> Body:
    """Nemotron Super and Ultra of the Llama line: searched layers, some without attention or feed-forward part."""
    sections, layers = fields.sections("block_configs"), fields.layers()
    if sections is None:
        raise fields.error("block_configs", "is missing")
    if len(sections) != layers:
        raise fields.error("block_configs", f"has {len(sections)} entries for {layers} layers")
    sizes = read_sizes(fields.without("num_key_value_heads"))
    blocks = gather(_searched_layer(section, sizes) for section in sections)
    return Body(hidden_size=sizes.hidden, blocks=blocks, extra_parameters=sizes.hidden)


def _searched_layer(section: Fields, sizes: Sizes) -> Block:
    mixing, feeding = section.section("attention"), section.section("ffn")
    if mixing is None or feeding is None:
        raise section.error("attention" if mixing is None else "ffn", "is missing")
    for part in (mixing, feeding):
        if part.flag("replace_with_linear"):
            raise part.error("replace_with_linear", "is not modelled")
    mixer = feed_forward = None
    if not mixing.flag("no_op"):
        group = mixing.count("n_heads_in_group")
        if sizes.heads % group:
            raise mixing.error("n_heads_in_group", f"{group} does not divide {sizes.heads} heads")
        mixer = attention(replace(sizes, kv_heads=sizes.heads // group))
    if not feeding.flag("no_op"):
        factor = feeding.number("ffn_mult")
        if factor is None:
            raise feeding.error("ffn_mult", "is missing")
        width = int(2 * factor * sizes.hidden / 3)
        feed_forward = mlp(sizes.hidden, -(-width // MULTIPLE_BEYOND) * MULTIPLE_BEYOND)
    parts = (mixer is not None) + (feed_forward is not None)
    return Block(count=1, mixer=mixer, feed_forward=feed_forward, norm_parameters=parts * sizes.hidden)


READERS: Mapping[str, Reader] = {
    **{name: partial(read_dense, family=family) for name, family in FAMILIES.items()},
    "falcon": read_falcon, "RefinedWebModel": read_falcon, "RefinedWeb": read_falcon, "mpt": read_mpt,
    "gpt_bigcode": read_gpt_bigcode, "deci": read_deci, "nemotron-nas": read_nemotron_nas,
}  # fmt: skip
