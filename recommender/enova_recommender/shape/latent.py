"""Families with multi-head latent attention: DeepSeek V2 to V3.2, Kimi K2, GLM 5, MiniCPM 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from enova_recommender.shape.body import Body, Reader
from enova_recommender.shape.dense import NO, YES, Bias, Dense
from enova_recommender.shape.experts import EXPERT_WIDTH, Mixture, feed_forwards, sparse_layers
from enova_recommender.shape.fields import Fields
from enova_recommender.shape.parts import HEADS, HIDDEN, mlp, stack
from enova_recommender.types import FeedForward, LatentAttention


def read_latent_attention(fields: Fields, hidden: int) -> LatentAttention:
    """The attention of a layer; with the keys of an indexer, sparse attention by an indexer of its own."""
    rank = fields.optional_count("q_lora_rank")
    kv_rank, rope = fields.count("kv_lora_rank"), fields.count("qk_rope_head_dim")
    biases = (rank or 0) + kv_rank + rope + hidden if fields.flag("attention_bias") else 0
    matrices, norms, cache = _indexer(fields, hidden, rank)
    return LatentAttention(
        heads=fields.count(*HEADS),
        query_rank=rank,
        kv_rank=kv_rank,
        nope_dim=fields.count("qk_nope_head_dim"),
        rope_dim=rope,
        value_dim=fields.count("v_head_dim"),
        top_tokens=fields.optional_count("index_topk"),
        indexer_parameters=matrices,
        indexer_cache_dim=cache,
        extra_parameters=(rank or 0) + kv_rank + biases + norms,
    )


def _indexer(fields: Fields, hidden: int, rank: int | None) -> tuple[int, int, int]:
    """Matrices and norms of the indexer, and the elements of a token that it keeps; zeros where there is none."""
    if not fields.has("index_topk"):
        return 0, 0, 0
    if rank is None:
        raise fields.error("q_lora_rank", "is missing, and the indexer of index_topk reads it")
    heads, dim = fields.count("index_n_heads"), fields.count("index_head_dim")
    return rank * heads * dim + hidden * dim + hidden * heads, 2 * dim, dim


def _body(fields: Fields, hidden: int, parts: Sequence[FeedForward]) -> Body:
    own = read_latent_attention(fields, hidden)
    # A layer that shares the choice of the last one with an indexer has none itself.
    norms = 2 * own.indexer_cache_dim
    shared = replace(
        own, indexer_parameters=0, indexer_cache_dim=0, extra_parameters=own.extra_parameters - norms
    )
    kinds = fields.texts("indexer_types") or ("full",) * len(parts)
    if len(kinds) != len(parts):
        raise fields.error("indexer_types", f"has {len(kinds)} entries for {len(parts)} layers")
    mixers = [shared if kind == "shared" else own for kind in kinds]
    return Body(hidden_size=hidden, blocks=stack(mixers, parts, 2 * hidden), extra_parameters=hidden)


def read_latent_mixture(fields: Fields, correction: Bias) -> Body:
    """DeepSeek and those built alike: dense layers first, then experts beside shared ones."""
    hidden, layers = fields.count(*HIDDEN), fields.layers()
    family = Mixture(attention=Dense(), width=EXPERT_WIDTH, correction=correction)
    return _body(fields, hidden, feed_forwards(fields, hidden, sparse_layers(fields, layers), family))


def read_minicpm3(fields: Fields) -> Body:
    """MiniCPM 3: latent attention with dense feed-forward layers."""
    hidden = fields.count(*HIDDEN)
    body = _body(fields, hidden, [mlp(hidden, fields.count("intermediate_size"))] * fields.layers())
    return replace(body, tied_embeddings=True)


_V2 = partial(read_latent_mixture, correction=NO)
_V3 = partial(read_latent_mixture, correction=YES)
READERS: Mapping[str, Reader] = {
    "deepseek_v2": _V2, "deepseek_v3": _V3, "deepseek_v32": _V3, "kimi_k2": _V3, "glm_moe_dsa": _V3,
    "glm4_moe_lite": _V3, "minicpm3": read_minicpm3,
}  # fmt: skip
