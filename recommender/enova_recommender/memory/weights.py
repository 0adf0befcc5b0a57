"""Bytes of a model's weights: all of them, and those that one GPU of a replica holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from enova_recommender.types import (
    AS_PUBLISHED,
    ELEMENT_BYTES,
    EXPERTS_ONLY,
    QUANTIZED_WEIGHT_BYTES,
    Attention,
    Block,
    Experts,
    FeedForward,
    LatentAttention,
    Mixer,
    Mlp,
    ModelShape,
    Parallelism,
    Precision,
    Recurrence,
)


def plain_element_bytes(shape: ModelShape, precision: Precision = AS_PUBLISHED) -> float:
    """Bytes of one element of what is not quantised: embedding, head, activations."""
    return ELEMENT_BYTES[shape.dtype if precision.dtype == "auto" else precision.dtype]


def layer_weight_bytes(shape: ModelShape, precision: Precision = AS_PUBLISHED) -> float:
    """Bytes of the matrices of all layers, which quantisation covers."""
    method = precision.quantization or shape.quantization
    plain = plain_element_bytes(shape, precision)
    if method is None:
        return shape.linear_parameters * plain
    covered = shape.expert_parameters if method in EXPERTS_ONLY else shape.linear_parameters
    return covered * QUANTIZED_WEIGHT_BYTES[method] + (shape.linear_parameters - covered) * plain


def weight_bytes(shape: ModelShape, precision: Precision = AS_PUBLISHED) -> int:
    """Bytes of all weights, each counted once."""
    plain = plain_element_bytes(shape, precision) * (shape.parameters - shape.linear_parameters)
    return round(plain + layer_weight_bytes(shape, precision))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The GPUs of one pipeline stage: how many layers they hold, and how often the embedding's matrix."""

    layers: int
    embeddings: int


def stages(shape: ModelShape, pipeline: int) -> tuple[Stage, ...]:
    """The different stages that vLLM makes: what is left after an even cut goes to stages before the last."""
    head = 1 if shape.tied_embeddings else 2
    if pipeline == 1:
        return (Stage(layers=shape.layers, embeddings=head),)
    even, left = divmod(shape.layers, pipeline)
    first = even + (1 if left > pipeline - 2 else 0)
    found = {Stage(layers=first, embeddings=1), Stage(layers=even, embeddings=1)}
    if pipeline > 2:
        found.add(Stage(layers=even + (1 if left else 0), embeddings=0))
    return tuple(sorted(found, key=lambda stage: (stage.layers, stage.embeddings), reverse=True))


def gpu_weight_bytes(
    shape: ModelShape, *, parallelism: Parallelism, precision: Precision = AS_PUBLISHED, stage: Stage | None = None
) -> int:
    """Bytes of the weights on one GPU of a stage (the first of `stages` if none is given).

    Matrices are cut over the tensor-parallel GPUs; norms, biases, routers, key and value heads beyond their number,
    and the down projections of latent attention lie on each of them. Experts are spread over data ranks as well.
    """
    stage = stage or stages(shape, parallelism.pipeline)[0]
    method = precision.quantization or shape.quantization
    plain = plain_element_bytes(shape, precision)
    packed = QUANTIZED_WEIGHT_BYTES[method] if method else plain
    dense = plain if method in EXPERTS_ONLY else packed
    size = shape.hidden_size
    held = 0.0
    for block in shape.blocks:
        small = block.norm_parameters
        if block.mixer is not None:
            held += block.count * dense * _mixer_parameters(block.mixer, size, parallelism.tensor)
            small += block.mixer.extra_parameters
        if block.feed_forward is not None:
            routed, other = _feed_forward_parameters(block.feed_forward, size, parallelism)
            held += block.count * (packed * routed + dense * other)
            small += block.feed_forward.extra_parameters
        held += block.count * plain * small
    held *= stage.layers / max(1, shape.layers)
    embeddings = stage.embeddings * shape.embedding_parameters / parallelism.tensor
    return round(held + plain * (embeddings + shape.extra_parameters))


def _mixer_parameters(mixer: Mixer, hidden_size: int, tensor: int) -> float:
    """Weights of a mixer's matrices on one of `tensor` GPUs."""
    match mixer:
        case Attention():
            extra_heads = -(-mixer.kv_heads // tensor) * tensor - mixer.kv_heads
            replicated = 2 * hidden_size * mixer.head_dim * extra_heads
            return (mixer.matrix_parameters(hidden_size) + replicated) / tensor
        case LatentAttention():
            down = hidden_size * (mixer.kv_rank + mixer.rope_dim + (mixer.query_rank or 0)) + mixer.indexer_parameters
            return down + (mixer.matrix_parameters(hidden_size) - down) / tensor
        case Recurrence():
            return mixer.matrix_parameters(hidden_size) / tensor
        case _:
            assert_never(mixer)


def _feed_forward_parameters(part: FeedForward, hidden_size: int, parallelism: Parallelism) -> tuple[float, float]:
    """Weights on one GPU of a feed-forward layer's routed experts, and of the rest of it."""
    match part:
        case Mlp():
            return 0.0, part.matrix_parameters(hidden_size) / parallelism.tensor
        case Experts():
            spread = parallelism.tensor * parallelism.data
            experts = -(-part.experts // spread) if parallelism.expert else part.experts / spread
            router = hidden_size * part.experts
            shared = (part.shared_parameters(hidden_size) - router) / parallelism.tensor
            return experts * part.expert_parameters(hidden_size), shared + router
        case _:
            assert_never(part)


def widest_elements(block: Block, *, parallelism: Parallelism, hidden_size: int) -> float:
    """Elements that a layer's widest part makes of one token on one GPU, beside the residual stream."""
    return max(_mixer_elements(block.mixer, parallelism.tensor),
               _feed_forward_elements(block.feed_forward, parallelism, hidden_size))


def _mixer_elements(mixer: Mixer | None, tensor: int) -> float:
    """Queries, keys, values and their weighted sum."""
    match mixer:
        case None:
            return 0.0
        case Attention():
            queries = mixer.heads * mixer.head_dim
            return (queries * (3 if mixer.gated else 2) + 2 * mixer.kv_heads * mixer.head_dim) / tensor
        case LatentAttention():
            head = 2 * (mixer.nope_dim + mixer.rope_dim) + 2 * mixer.value_dim + mixer.nope_dim
            return (mixer.query_rank or 0) + mixer.kv_rank + mixer.rope_dim + mixer.heads * head / tensor
        case Recurrence():
            return 4 * mixer.heads * (mixer.key_dim + mixer.value_dim) / tensor
        case _:
            assert_never(mixer)


def _feed_forward_elements(part: FeedForward | None, parallelism: Parallelism, hidden_size: int) -> float:
    """Gate, up and their product; of experts for each that a token visits, and what each gives back."""
    match part:
        case None:
            return 0.0
        case Mlp():
            return (3 if part.gated else 2) * part.intermediate_size / parallelism.tensor
        case Experts():
            ways = 2 if part.gated else 1
            cut = 1 if parallelism.expert else parallelism.tensor * parallelism.data
            visited = part.experts_per_token / (parallelism.tensor * parallelism.data if parallelism.expert else 1)
            visited = max(1.0, visited)
            inner = part.intermediate_size / cut
            routed = visited * (max(ways * inner, hidden_size) + inner)
            return routed + (ways + 1) * part.shared_intermediate_size / parallelism.tensor
        case _:
            assert_never(part)
