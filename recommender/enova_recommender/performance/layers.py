"""Seconds of one model's layers by kernel class: curves over tokens, grids over batch and context.

Everything is of one GPU of the replica, on the knots below. With data-parallel attention a batch is that of one rank
(each has a scheduler and a cache of its own, as in vLLM) and the other ranks are taken to be as busy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import assert_never

import numpy as np
import numpy.typing as npt

from enova_recommender.catalog.kernels import MeasuredGpu
from enova_recommender.memory import cache_element_bytes, plain_element_bytes
from enova_recommender.performance.correction import KernelGroup
from enova_recommender.performance.tables import ExpertWork, Kernels, kernels_of, peak
from enova_recommender.types import (
    ELEMENT_BYTES,
    EXPERTS_ONLY,
    WEIGHT_FORMATS,
    Arithmetic,
    Attention,
    Experts,
    FeedForward,
    GpuModel,
    LatentAttention,
    Mixer,
    Mlp,
    ModelShape,
    Parallelism,
    Part,
    Precision,
    Recurrence,
    WeightFormat,
)

Floats = npt.NDArray[np.float64]

TOKENS = np.array([
    1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288,
    16384, 32768, 65536, 1 << 18,
], dtype=np.float64)  # fmt: skip
SEQUENCES = np.array([
    1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096,
], dtype=np.float64)  # fmt: skip
CONTEXT = np.exp2(np.arange(8, 54) / 2)   # tokens of all decoding sequences
PAIRS = np.exp2(np.arange(0, 37, dtype=np.float64))


class KernelClass(StrEnum):
    """What a step spends its time on."""

    GEMM = "GEMM"
    EXPERTS = "EXPERTS"                        # grouped products of a mixture of experts
    BLOCK_EXPERTS = "BLOCK_EXPERTS"            # of 8-bit weights with a scale a block: kernels that engines tune least
    PREFILL_ATTENTION = "PREFILL_ATTENTION"
    DECODE_ATTENTION = "DECODE_ATTENTION"
    LATENT_ATTENTION = "LATENT_ATTENTION"
    RECURRENCE = "RECURRENCE"
    ELEMENTWISE = "ELEMENTWISE"                # norms, rotary positions, activations, quantisation
    COLLECTIVE = "COLLECTIVE"
    HOST = "HOST"


class Basis(StrEnum):
    """What a part of a step depends on."""

    TOKENS = "TOKENS"            # all tokens of the step
    PROMPT_TOKENS = "PROMPT_TOKENS"
    SAMPLED = "SAMPLED"          # sequences that get a token
    SEQUENCES = "SEQUENCES"      # decoding sequences
    PROMPT_PAIRS = "PROMPT_PAIRS"  # a grid over prompt tokens and pairs
    CONTEXT = "CONTEXT"          # a grid over decoding sequences and their context


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Seconds of one kernel class on the knots of its basis."""

    kind: KernelClass
    group: KernelGroup
    basis: Basis
    seconds: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the seconds of a layer depend on beside its shape."""

    gpu: GpuModel
    parallelism: Parallelism
    hidden: int
    plain_bytes: float
    cache_bytes: float
    formats: tuple[tuple[Part, str | None], ...]
    measured: tuple[MeasuredGpu, ...]

    @property
    def kernels(self) -> Kernels:
        """The kernels of the GPU."""
        return kernels_of(self.gpu, self.measured)

    def format_of(self, part: Part) -> tuple[WeightFormat, str | None]:
        """How the weights of a part are kept, None if plainly."""
        name = dict(self.formats)[part]
        return (self.plain_format if name is None else WEIGHT_FORMATS[name]), name

    @property
    def plain_format(self) -> WeightFormat:
        """How weights are kept that are not quantised."""
        return WeightFormat(element_bytes=self.plain_bytes, arithmetic=Arithmetic.PLAIN)


def setting_of(
    shape: ModelShape, gpu: GpuModel, parallelism: Parallelism, precision: Precision, measured: tuple[MeasuredGpu, ...]
) -> Setting:
    """The setting of a model's layers."""
    method = precision.quantization or shape.quantization
    formats = tuple((part, _part_format(shape, part, method)) for part in Part)
    return Setting(
        gpu=gpu, parallelism=parallelism, hidden=shape.hidden_size, plain_bytes=plain_element_bytes(shape, precision),
        cache_bytes=cache_element_bytes(shape, precision), formats=formats, measured=measured,
    )  # fmt: skip


def _part_format(shape: ModelShape, part: Part, method: str | None) -> str | None:
    """The format of a part's weights; None is the plain type."""
    if method is None or part is Part.ROUTER or part in shape.plain_parts:
        return None
    if method in EXPERTS_ONLY and not shape.plain_parts and part is not Part.EXPERTS:
        return None
    return method


def model_pieces(shape: ModelShape, setting: Setting) -> Iterator[Piece]:
    """All pieces of a step but the host's."""
    for block in shape.blocks:
        for part in (block.mixer, block.feed_forward):
            if part is not None:
                for piece in layer_pieces(part, setting):
                    yield Piece(
                        kind=piece.kind, group=piece.group, basis=piece.basis, seconds=block.count * piece.seconds
                    )
    yield from head_pieces(shape.vocabulary_size, setting)
    if setting.parallelism.pipeline > 1:
        sent = TOKENS * setting.hidden * 2 / setting.gpu.link_bytes_per_s + SEND_S
        yield _over_tokens(KernelClass.COLLECTIVE, KernelGroup.COLLECTIVE, (setting.parallelism.pipeline - 1) * sent)


SEND_S = 10e-6  # of one message from a pipeline stage to the next


@lru_cache(maxsize=4096)
def layer_pieces(part: Mixer | FeedForward, setting: Setting) -> tuple[Piece, ...]:
    """The pieces of one layer's part, made once."""
    match part:
        case Attention():
            return tuple(_attention(part, setting))
        case LatentAttention():
            return tuple(_latent(part, setting))
        case Recurrence():
            return tuple(_recurrence(part, setting))
        case Mlp():
            return tuple(_mlp(part, setting))
        case Experts():
            return tuple(_experts(part, setting))
        case _:
            assert_never(part)


def _over_tokens(kind: KernelClass, group: KernelGroup, seconds: Floats) -> Piece:
    return Piece(kind=kind, group=group, basis=Basis.TOKENS, seconds=np.maximum.accumulate(seconds))


def _split(
    kind: KernelClass, seconds: Floats, *, knots: Floats, ridge: float, basis: Basis = Basis.TOKENS
) -> Iterator[Piece]:
    """A product's time up to the ridge of the roofline is memory's, what grows beyond is arithmetic's."""
    seconds = np.maximum.accumulate(seconds)
    reading = np.minimum(seconds, np.interp(ridge, knots, seconds))
    yield Piece(kind=kind, group=KernelGroup.MEMORY, basis=basis, seconds=reading)
    yield Piece(kind=kind, group=KernelGroup.COMPUTE, basis=basis, seconds=seconds - reading)


def _ridge(weights: WeightFormat, setting: Setting) -> float:
    """Rows at which a product's arithmetic takes as long as the reading of its weights."""
    gpu = setting.gpu
    kind = setting.kernels.multiplied_in(weights, None)
    return weights.element_bytes * peak(setting.kernels.sheet, kind) / (2 * gpu.bandwidth_bytes_per_s)


def _products(part: Part, shapes: list[tuple[float, float]], setting: Setting) -> Iterator[Piece]:
    """Products with weights of (columns, inner size), measured with the quantisation of what goes in."""
    weights, name = setting.format_of(part)
    kernels = setting.kernels
    seconds = sum((kernels.gemm_s(weights, name, TOKENS, n=n, k=k) for n, k in shapes), np.zeros_like(TOKENS))
    yield from _split(KernelClass.GEMM, seconds, knots=TOKENS, ridge=_ridge(weights, setting))


def _small(kernels: float, token_bytes: float, setting: Setting) -> Piece:
    """Small kernels: a launch each within the graph, and their traffic."""
    traffic = token_bytes * TOKENS / (SMALL_KERNEL_SHARE * setting.gpu.bandwidth_bytes_per_s)
    return _over_tokens(KernelClass.ELEMENTWISE, KernelGroup.MEMORY, kernels * SMALL_KERNEL_S + traffic)


SMALL_KERNEL_S = 1.5e-6   # of one within a CUDA graph, beside its traffic
SMALL_KERNEL_SHARE = 0.7  # of the bandwidth that element-wise kernels reach


def _all_reduce(setting: Setting) -> Iterator[Piece]:
    """The sum over tensor-parallel GPUs at the end of a part."""
    tensor = setting.parallelism.tensor
    if tensor > 1:
        seconds = setting.kernels.all_reduce_s(TOKENS * setting.hidden * setting.plain_bytes, tensor)
        yield _over_tokens(KernelClass.COLLECTIVE, KernelGroup.COLLECTIVE, seconds)


def _attention(mixer: Attention, setting: Setting) -> Iterator[Piece]:
    tensor, hidden = setting.parallelism.tensor, setting.hidden
    heads, kv_heads = mixer.heads / tensor, max(1, mixer.kv_heads / tensor)
    value_dim = mixer.value_dim or mixer.head_dim
    queries = heads * mixer.head_dim * (2 if mixer.gated else 1)
    cached = kv_heads * (mixer.head_dim + (0 if mixer.keys_are_values else value_dim)) if mixer.cached else 0
    yield from _products(Part.ATTENTION, [(queries + cached, hidden), (hidden, heads * value_dim)], setting)
    yield _small(3, 8 * hidden + 4 * (queries + cached), setting)  # norm, rotary positions, writing the cache
    yield from _all_reduce(setting)
    kernels = setting.kernels
    window = mixer.window_tokens or 0
    size = (mixer.head_dim + value_dim) // 2
    group = max(1.0, heads / kv_heads)
    decode = kernels.decode_s(
        group=group, streams=SEQUENCES[:, None] * kv_heads, context=_contexts(), head_dim=size,
        element_bytes=setting.cache_bytes, window=window,
    )  # fmt: skip
    yield _over_context(KernelClass.DECODE_ATTENTION, decode)
    length, prompts = _prompts()
    seconds = kernels.prefill_s(group=group, streams=prompts * kv_heads, length=length, head_dim=size, window=window)
    yield _over_pairs(KernelClass.PREFILL_ATTENTION, seconds)


def _contexts() -> Floats:
    """Context of one decoding sequence, on the grid of sequences and the context of all."""
    return np.asarray(np.maximum(CONTEXT[None, :] / SEQUENCES[:, None], 1.0))


def _prompts() -> tuple[Floats, Floats]:
    """Length of the prompts of a step, and how many of them its tokens make, on the grid of tokens and pairs."""
    length = 2 * np.maximum(PAIRS[None, :] / TOKENS[:, None], 1.0)
    return length, TOKENS[:, None] / length


def _over_pairs(kind: KernelClass, seconds: Floats) -> Piece:
    return Piece(kind=kind, group=KernelGroup.ATTENTION, basis=Basis.PROMPT_PAIRS, seconds=_growing(seconds))


def _over_context(kind: KernelClass, seconds: Floats) -> Piece:
    return Piece(kind=kind, group=KernelGroup.ATTENTION, basis=Basis.CONTEXT, seconds=_growing(seconds))


def _growing(seconds: Floats) -> Floats:
    """Made to grow along both axes: the same context in fewer sequences takes no longer than in more."""
    fewer = np.minimum.accumulate(seconds[::-1], axis=0)[::-1]
    return np.asarray(np.maximum.accumulate(fewer, axis=1))


def _latent(mixer: LatentAttention, setting: Setting) -> Iterator[Piece]:
    tensor, hidden = setting.parallelism.tensor, setting.hidden
    heads = max(1.0, mixer.heads / tensor)
    down = mixer.kv_rank + mixer.rope_dim
    queries = heads * (mixer.nope_dim + mixer.rope_dim)
    shapes: list[tuple[float, float]] = [
        (heads * mixer.nope_dim, mixer.kv_rank), (mixer.kv_rank, heads * mixer.value_dim),
        (hidden, heads * mixer.value_dim),
    ]  # fmt: skip
    if mixer.query_rank is None:
        shapes.append((queries + down, hidden))
    else:
        shapes += [(mixer.query_rank + down, hidden), (queries, mixer.query_rank)]
    if mixer.indexer_parameters:
        shapes.append((mixer.indexer_parameters / hidden, hidden))
    yield from _products(Part.ATTENTION, shapes, setting)
    yield _small(5, 8 * hidden + 6 * (queries + down), setting)
    yield from _all_reduce(setting)
    kernels = setting.kernels
    sequences, context = SEQUENCES[:, None], _contexts()
    seen = np.minimum(context, mixer.top_tokens or context)
    decode = kernels.latent_decode_s(
        heads=heads, sequences=sequences, context=seen, kv_rank=mixer.kv_rank, rope_dim=mixer.rope_dim,
        element_bytes=setting.cache_bytes,
    )  # fmt: skip
    indexed = sequences * context * mixer.indexer_cache_dim * setting.cache_bytes
    decode = decode + indexed / (SMALL_KERNEL_SHARE * setting.gpu.bandwidth_bytes_per_s)
    yield _over_context(KernelClass.LATENT_ATTENTION, decode)
    length, prompts = _prompts()
    seconds = kernels.latent_prefill_s(
        heads=heads, prompts=prompts, length=np.minimum(length, 2 * (mixer.top_tokens or np.inf)),
        key_dim=mixer.nope_dim + mixer.rope_dim, value_dim=mixer.value_dim,
    )  # fmt: skip
    yield _over_pairs(KernelClass.LATENT_ATTENTION, seconds)


def _recurrence(mixer: Recurrence, setting: Setting) -> Iterator[Piece]:
    tensor, hidden = setting.parallelism.tensor, setting.hidden
    inner = mixer.projection_parameters / (3 * hidden) / tensor  # a third leads out
    yield from _products(Part.RECURRENCE, [(2 * inner, hidden), (hidden, inner)], setting)
    yield _small(3, 8 * hidden + 8 * inner, setting)
    yield from _all_reduce(setting)
    kernels, heads = setting.kernels, max(1.0, mixer.heads / tensor)
    element = setting.plain_bytes if mixer.state_dtype == "auto" else ELEMENT_BYTES[mixer.state_dtype]
    state_bytes = mixer.key_dim * mixer.value_dim * element
    for knots, basis in ((SEQUENCES, Basis.SEQUENCES), (TOKENS, Basis.PROMPT_TOKENS)):
        seconds = kernels.recurrence_s(
            heads=heads, tokens=knots, state_bytes=state_bytes, decode=basis is Basis.SEQUENCES
        )
        seconds = np.maximum.accumulate(seconds)
        yield Piece(kind=KernelClass.RECURRENCE, group=KernelGroup.MEMORY, basis=basis, seconds=seconds)


def _mlp(layer: Mlp, setting: Setting) -> Iterator[Piece]:
    inner = layer.intermediate_size / setting.parallelism.tensor
    wide = (2 if layer.gated else 1) * inner
    yield from _products(Part.MLP, [(wide, setting.hidden), (setting.hidden, inner)], setting)
    yield _small(2, 8 * setting.hidden + 2 * (wide + inner), setting)
    yield from _all_reduce(setting)


def _experts(layer: Experts, setting: Setting) -> Iterator[Piece]:
    split, hidden = setting.parallelism, setting.hidden
    spread = split.tensor * split.data
    cut, spread = (1, min(spread, layer.experts)) if split.expert else (spread, 1)
    yield from _products(Part.ROUTER, [(layer.experts, hidden)], setting)
    if layer.shared_intermediate_size:
        inner = layer.shared_intermediate_size / split.tensor
        shapes = [((2 if layer.gated else 1) * inner, hidden), (hidden, inner)]
        yield from _products(Part.SHARED_EXPERTS, shapes, setting)
    if layer.latent_size:
        yield from _products(Part.SHARED_EXPERTS, [(layer.latent_size, hidden), (hidden, layer.latent_size)], setting)
    weights, name = setting.format_of(Part.EXPERTS)
    tokens = TOKENS * split.data  # those of all data-parallel ranks pass the same experts
    work = ExpertWork(
        hidden=layer.latent_size or hidden, intermediate=layer.intermediate_size, chosen=layer.experts_per_token,
        experts=layer.experts, cut=cut, spread=spread, matrices=3 if layer.gated else 2,
    )  # fmt: skip
    seconds = setting.kernels.experts_s(weights, name, tokens, work)
    rows = _ridge(weights, setting) * layer.experts / layer.experts_per_token / split.data
    kind = KernelClass.BLOCK_EXPERTS if name == BLOCK_SCALED else KernelClass.EXPERTS
    yield from _split(kind, seconds, knots=TOKENS, ridge=rows)
    yield _small(3, 8 * hidden, setting)  # norm, choice of experts, addition of the shared ones
    if split.data == 1:
        yield from _all_reduce(setting)
    else:
        kernels, message = setting.kernels, tokens * hidden * 2
        gpus = split.tensor * split.data
        moved = kernels.all_gather_s(message, gpus) + kernels.reduce_scatter_s(message, gpus)
        yield _over_tokens(KernelClass.COLLECTIVE, KernelGroup.COLLECTIVE, moved)


BLOCK_SCALED = "fp8_block"  # the format of weights


def head_pieces(vocabulary: int, setting: Setting) -> Iterator[Piece]:
    """The product with the head for those sequences that get a token, the gathering of logits, and sampling."""
    tensor = setting.parallelism.tensor
    kernels = setting.kernels
    seconds = kernels.gemm_s(setting.plain_format, None, SEQUENCES, n=vocabulary / tensor, k=setting.hidden)
    ridge = _ridge(setting.plain_format, setting)
    yield from _split(KernelClass.GEMM, seconds, knots=SEQUENCES, ridge=ridge, basis=Basis.SAMPLED)
    logits = SEQUENCES * vocabulary
    if tensor > 1:
        gathered = np.maximum.accumulate(kernels.all_gather_s(logits * 2, tensor))
        yield Piece(kind=KernelClass.COLLECTIVE, group=KernelGroup.COLLECTIVE, basis=Basis.SAMPLED, seconds=gathered)
    sampling = SAMPLING_PASSES * 4 * logits / setting.gpu.bandwidth_bytes_per_s
    yield Piece(kind=KernelClass.ELEMENTWISE, group=KernelGroup.MEMORY, basis=Basis.SAMPLED, seconds=sampling)


SAMPLING_PASSES = 6  # over the logits in 32 bits: conversion, temperature, softmax, choice
