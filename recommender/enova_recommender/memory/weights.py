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
    Part,
    Precision,
    Recurrence,
)

AUTO_BYTES_MAX = 2.0


def plain_element_bytes(shape: ModelShape, precision: Precision = AS_PUBLISHED) -> float:
    """Bytes of one element of what is not quantised: embedding, head, activations.

    vLLM's `auto` serves 32-bit checkpoints in 16 bits.
    """
    if precision.dtype == "auto":
        return min(ELEMENT_BYTES[shape.dtype], AUTO_BYTES_MAX)
    return ELEMENT_BYTES[precision.dtype]


def part_element_bytes(shape: ModelShape, part: Part, precision: Precision = AS_PUBLISHED) -> float:
    """Bytes of one weight of a part's matrices, its share of the scales included."""
    method = precision.quantization or shape.quantization
    if method is None or part is Part.ROUTER or part in shape.plain_parts:
        return plain_element_bytes(shape, precision)
    if method in EXPERTS_ONLY and not shape.plain_parts and part is not Part.EXPERTS:
        return plain_element_bytes(shape, precision)
    return QUANTIZED_WEIGHT_BYTES[method]


def layer_weight_bytes(shape: ModelShape, precision: Precision = AS_PUBLISHED) -> float:
    """Bytes of the matrices of all layers."""
    parts = shape.part_parameters.items()
    return sum(weights * part_element_bytes(shape, part, precision) for part, weights in parts)


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
    if pipeline == 1:
        return (Stage(layers=shape.layers, embeddings=1 if shape.tied_embeddings else 2),)
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
    plain = plain_element_bytes(shape, precision)
    layers = sum(block.count * _layer_bytes(block, shape, parallelism, precision) for block in shape.blocks)
    embeddings = stage.embeddings * shape.embedding_parameters / parallelism.tensor
    share = stage.layers / max(1, shape.layers)
    return round(layers * share + plain * (embeddings + shape.extra_parameters))


def _layer_bytes(block: Block, shape: ModelShape, parallelism: Parallelism, precision: Precision) -> float:
    """Bytes of one layer on one GPU."""
    plain = plain_element_bytes(shape, precision)
    held = plain * block.norm_parameters
    if (mixer := block.mixer) is not None:
        part = Part.RECURRENCE if isinstance(mixer, Recurrence) else Part.ATTENTION
        element = part_element_bytes(shape, part, precision)
        held += element * _mixer_parameters(mixer, shape.hidden_size, parallelism.tensor)
        held += plain * mixer.extra_parameters
    if (layer := block.feed_forward) is not None:
        for part, weights in _feed_forward_parameters(layer, shape.hidden_size, parallelism).items():
            held += part_element_bytes(shape, part, precision) * weights
        held += plain * layer.extra_parameters
        if isinstance(layer, Experts):
            held += plain * layer.expert_extra_parameters * _experts_held(layer, parallelism)
    return held


def _mixer_parameters(mixer: Mixer, hidden_size: int, tensor: int) -> float:
    """Weights of a mixer's matrices on one of `tensor` GPUs."""
    matrices = mixer.matrix_parameters(hidden_size)
    match mixer:
        case Attention():
            extra_heads = -(-mixer.kv_heads // tensor) * tensor - mixer.kv_heads if mixer.cached else 0
            pair = mixer.head_dim + (0 if mixer.keys_are_values else mixer.value_dim or mixer.head_dim)
            return (matrices + hidden_size * pair * extra_heads) / tensor
        case LatentAttention():
            down = hidden_size * (mixer.kv_rank + mixer.rope_dim + (mixer.query_rank or 0)) + mixer.indexer_parameters
            return down + (matrices - down) / tensor
        case Recurrence():
            return matrices / tensor
        case _:
            assert_never(mixer)


def _feed_forward_parameters(layer: FeedForward, hidden_size: int, parallelism: Parallelism) -> dict[Part, float]:
    """Weights of a feed-forward layer's matrices on one GPU."""
    match layer:
        case Mlp():
            return {Part.MLP: layer.matrix_parameters(hidden_size) / parallelism.tensor}
        case Experts():
            router = hidden_size * layer.experts
            return {
                Part.EXPERTS: _experts_held(layer, parallelism) * layer.expert_parameters(hidden_size),
                Part.SHARED_EXPERTS: (layer.shared_parameters(hidden_size) - router) / parallelism.tensor,
                Part.ROUTER: router,
            }
        case _:
            assert_never(layer)


def _experts_held(layer: Experts, parallelism: Parallelism) -> float:
    """Routed experts on one GPU: whole ones, or so many in all if each is cut."""
    spread = parallelism.tensor * parallelism.data
    return -(-layer.experts // spread) if parallelism.expert else layer.experts / spread
