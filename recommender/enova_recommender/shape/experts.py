"""Families with mixtures of experts whose attention is that of the dense ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from enova_recommender.shape.body import Body, Reader
from enova_recommender.shape.dense import ASKED, NO, YES, Bias, Dense, Windows, decoder, family_sizes, if_said, usually
from enova_recommender.shape.fields import Fields
from enova_recommender.shape.parts import (
    CONTEXT,
    FULL,
    WINDOWED,
    HeadNorm,
    attention,
    layer_kinds,
    mlp,
    periodic,
    read_sizes,
    stack,
    windowed_layers,
)
from enova_recommender.types import Experts, FeedForward

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "moe_k", "num_experts_per_token", "moe_topk", "top_k_experts")
EXPERT_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """How a family's experts differ from the others'."""

    attention: Dense
    width: tuple[str, ...] = ("intermediate_size",)   # the key of an expert's intermediate size
    shared: bool = True                               # there may be shared experts
    shared_gate: bool = False                         # a learnt share of the shared expert
    correction: Bias = NO                             # a bias a routed expert that steers its choice
    biases: bool = False                              # of routers and experts


def read_experts(fields: Fields, hidden: int, family: Mixture) -> Experts:
    """The feed-forward part of a sparse layer."""
    experts, per_token = fields.count(*EXPERTS), fields.count(*PER_TOKEN)
    if per_token > experts:
        raise fields.error(PER_TOKEN[0], f"{per_token} is more than the {experts} experts")
    width = fields.count(*family.width)
    shared = shared_width(fields, width) if family.shared else 0
    gate = hidden if family.shared_gate and shared else 0
    correction = experts if family.correction.read(fields) else 0
    return Experts(
        experts=experts,
        experts_per_token=per_token,
        intermediate_size=width,
        shared_intermediate_size=shared,
        expert_extra_parameters=2 * width + hidden if family.biases else 0,
        extra_parameters=gate + correction + (experts if family.biases else 0),
    )


def shared_width(fields: Fields, expert_width: int) -> int:
    """The intermediate size of the shared experts together; 0 where there are none."""
    said = fields.optional_count(
        "shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size", least=0
    )
    number = fields.count("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", default=0, least=0)
    if said is None:
        return number * expert_width
    return said * max(1, number)


def sparse_layers(fields: Fields, layers: int) -> list[bool]:
    """Which layers have experts: all, but the first, but every n-th, but those named."""
    kinds = fields.texts("mlp_layer_types")
    if kinds is not None:
        if len(kinds) != layers:
            raise fields.error("mlp_layer_types", f"has {len(kinds)} entries for {layers} layers")
        return [kind == "sparse" for kind in kinds]
    if isinstance(fields.get("moe_layer_freq"), list):
        listed = fields.counts("moe_layer_freq") or ()
        if len(listed) != layers:
            raise fields.error("moe_layer_freq", f"has {len(listed)} entries for {layers} layers")
        return [bool(has_experts) for has_experts in listed]
    first = fields.count("first_k_dense_replace", "moe_layer_start_index", default=0, least=0)
    end = fields.count("moe_layer_end_index", default=-1, least=-1)
    last = layers - 1 if end < 0 else end
    step = fields.count("decoder_sparse_step", "moe_layer_interval", default=1, least=0)
    every = fields.count("moe_layer_freq", default=1)
    dense = set(fields.counts("mlp_only_layers") or ())
    return [
        first <= index <= last and index % every == 0 and step > 0 and (index + 1) % step == 0 and index not in dense
        for index in range(layers)
    ]


def feed_forwards(fields: Fields, hidden: int, sparse: Sequence[bool], family: Mixture) -> list[FeedForward]:
    """The feed-forward part of each layer."""
    experts = read_experts(fields, hidden, family) if any(sparse) else None
    dense = None if all(sparse) else mlp(hidden, fields.count("intermediate_size"))
    parts = (experts if has_experts else dense for has_experts in sparse)
    return [part for part in parts if part is not None]


def read_mixture(fields: Fields, family: Mixture) -> Body:
    """A model of one of the families in the table."""
    sizes = family_sizes(fields, family.attention)
    sparse = sparse_layers(fields, fields.layers())
    return decoder(fields, family.attention, sizes, feed_forwards(fields, sizes.hidden, sparse, family))


def read_llama4(fields: Fields) -> Body:
    """Llama 4: experts in every n-th layer, attention in chunks in three of four."""
    sizes, layers = read_sizes(fields), fields.layers()
    step = fields.count("interleave_moe_layer_step", default=1)
    named = fields.counts("moe_layers")
    sparse = set(range(step - 1, layers, step) if named is None else named)
    experts = read_experts(fields, sizes.hidden, Mixture(attention=Dense()))
    experts = replace(experts, shared_intermediate_size=experts.intermediate_size)  # always one, as wide as the others
    dense = mlp(sizes.hidden, fields.count("intermediate_size_mlp"))
    kinds = layer_kinds(fields, layers, _llama4_kinds(fields, layers))
    biased = fields.flag("attention_bias")
    mixers = windowed_layers(
        fields, attention(sizes, qkv_bias=biased, output_bias=biased), kinds, context=fields.count(*CONTEXT),
        window=fields.optional_count("attention_chunk_size"),
    )  # fmt: skip
    parts = [experts if index in sparse else dense for index in range(layers)]
    return Body(
        hidden_size=sizes.hidden, blocks=stack(mixers, parts, 2 * sizes.hidden), extra_parameters=sizes.hidden
    )


def _llama4_kinds(fields: Fields, layers: int) -> tuple[str, ...]:
    """Layers with rotary positions attend within chunks; `no_rope_layers` has a 0 for those without, or is empty."""
    if not fields.has("attention_chunk_size"):
        return (FULL,) * layers
    rotary = fields.counts("no_rope_layers")
    if not rotary:
        return periodic(layers, fields.count("no_rope_layer_interval", default=4), windowed=WINDOWED[1])
    if len(rotary) != layers:
        raise fields.error("no_rope_layers", f"has {len(rotary)} entries for {layers} layers")
    return tuple(WINDOWED[1] if rotates else FULL for rotates in rotary)


_ROUTED = Dense(qkv=ASKED, output=ASKED)
_QWEN2 = Mixture(
    attention=Dense(qkv=usually("qkv_bias"), windows=Windows.LAST), width=EXPERT_WIDTH, shared_gate=True
)
_QWEN3 = Mixture(
    attention=Dense(qkv=ASKED, output=ASKED, head_norm=HeadNorm.PER_HEAD, windows=Windows.LAST), width=EXPERT_WIDTH,
    shared=False,
)  # fmt: skip
_GLM4 = Mixture(
    attention=Dense(qkv=ASKED, asked_norm=HeadNorm.PER_HEAD), width=EXPERT_WIDTH, correction=YES
)
_GPT_OSS_ATTENTION = Dense(
    qkv=usually("attention_bias"), output=usually("attention_bias"), sinks=True, windows=Windows.PERIODIC,
    period=2,
)  # fmt: skip
FAMILIES: Mapping[str, Mixture] = {
    "mixtral": Mixture(attention=Dense(windows=Windows.ALL), shared=False),
    "qwen2_moe": _QWEN2, "qwen3_moe": _QWEN3, "qwen3_vl_moe_text": _QWEN3, "qwen3_omni_moe_text": _QWEN3,
    "olmoe": Mixture(attention=Dense(qkv=ASKED, output=ASKED, head_norm=HeadNorm.ALL_HEADS)),
    "phimoe": Mixture(attention=Dense(qkv=ASKED, output=ASKED, norm_bias=True, windows=Windows.ALL,
                                      head_bias=if_said("lm_head_bias")), shared=False),
    "granitemoe": Mixture(attention=_ROUTED, shared=False),
    "granitemoeshared": Mixture(attention=_ROUTED),
    "deepseek": Mixture(attention=_ROUTED, width=EXPERT_WIDTH),
    "ernie4_5_moe": Mixture(attention=Dense(tied=True, qkv=if_said("use_bias"), output=if_said("use_bias")),
                            width=EXPERT_WIDTH, correction=YES),
    "glm4_moe": _GLM4, "glm4v_moe_text": _GLM4,
    "minimax_m2": Mixture(attention=Dense(head_norm=HeadNorm.ALL_HEADS),
                          correction=usually("use_routing_bias")),
    "gpt_oss": Mixture(attention=_GPT_OSS_ATTENTION, shared=False, biases=True),
}  # fmt: skip
READERS: Mapping[str, Reader] = {
    **{name: partial(read_mixture, family=family) for name, family in FAMILIES.items()},
    "llama4_text": read_llama4,
}
