"""How vLLM divides one GPU's memory: weights, activations, CUDA graphs, and the KV blocks that are left.

Theory of operation. vLLM takes `gpu_memory_utilization` of the memory that CUDA reports, which is a little less than
the driver's, loads the weights, runs one full batch to see the peak, captures (and by now counts) its CUDA graphs
and gives the rest to the cache. Here the peak is estimated from the shape: the widest layer of a full batch, or the
sampler's copies of the logits, whichever is larger. All figures are bytes of one GPU; of a pipeline, that of the stage
that has the least left.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from enova_recommender.memory.cache import BLOCK_SIZE, CacheLayout, cache_layout
from enova_recommender.memory.overheads import (
    MEASURED,
    Overheads,
    activation_bytes,
    graph_bytes,
    runtime_bytes,
    usable_bytes,
)
from enova_recommender.memory.weights import Stage, gpu_weight_bytes, stages
from enova_recommender.types import AS_PUBLISHED, SINGLE_GPU, GpuModel, ModelShape, Parallelism, Precision

GPU_MEMORY_UTILIZATION = 0.92  # vLLM's default


class Item(StrEnum):
    """What memory goes to."""

    WEIGHTS = "WEIGHTS"
    ACTIVATIONS = "ACTIVATIONS"
    CUDA_GRAPHS = "CUDA_GRAPHS"
    RUNTIME = "RUNTIME"
    ONE_SEQUENCE = "ONE_SEQUENCE"  # the KV cache of one sequence of max_model_len, below which vLLM does not start


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFit:
    """How one GPU's memory is divided. `kv_blocks` may be zero or less: then not even the weights fit."""

    budget_bytes: int
    weight_bytes: int
    activation_bytes: int
    graph_bytes: int
    runtime_bytes: int
    kv_block_bytes: int
    kv_blocks: int
    kv_tokens: int          # as vLLM prints them; of one data-parallel rank
    sequence_blocks: int    # that one sequence of max_model_len takes
    max_model_len: int
    layout: CacheLayout
    block_size: int         # that was asked for; hybrid caches have their own

    @property
    def plain_blocks(self) -> int:
        """Blocks of `block_size` tokens in an undivided cache that carries as much as this one."""
        return self.kv_blocks if self.layout.is_plain else self.kv_tokens // self.block_size

    @property
    def plain_block_bytes(self) -> int:
        """Bytes of one of these."""
        if self.layout.is_plain or self.plain_blocks < 1:
            return self.kv_block_bytes
        return self.kv_blocks * self.kv_block_bytes // self.plain_blocks

    @property
    def fixed_bytes(self) -> int:
        """What is in use before the cache."""
        return self.weight_bytes + self.activation_bytes + self.graph_bytes + self.runtime_bytes

    @property
    def used_bytes(self) -> int:
        """What the engine has in use once the KV cache is allocated."""
        return self.fixed_bytes + max(0, self.kv_blocks) * self.kv_block_bytes

    @property
    def fits(self) -> bool:
        """Whether vLLM would start: the cache holds at least one sequence of max_model_len."""
        return self.kv_blocks >= max(1, self.sequence_blocks)

    @property
    def missing_bytes(self) -> int:
        """What is missing for one sequence of max_model_len; 0 if it fits."""
        return max(0, self.fixed_bytes + max(1, self.sequence_blocks) * self.kv_block_bytes - self.budget_bytes)

    @property
    def items(self) -> tuple[tuple[Item, int], ...]:
        """What needs how much, the largest first."""
        needs = (
            (Item.WEIGHTS, self.weight_bytes),
            (Item.ACTIVATIONS, self.activation_bytes),
            (Item.CUDA_GRAPHS, self.graph_bytes),
            (Item.RUNTIME, self.runtime_bytes),
            (Item.ONE_SEQUENCE, self.sequence_blocks * self.kv_block_bytes),
        )
        return tuple(sorted(needs, key=lambda need: need[1], reverse=True))


def fit(
    shape: ModelShape,
    gpu: GpuModel,
    *,
    parallelism: Parallelism = SINGLE_GPU,
    precision: Precision = AS_PUBLISHED,
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
    max_num_batched_tokens: int = 8192,
    max_num_seqs: int = 256,
    max_model_len: int | None = None,
    block_size: int = BLOCK_SIZE,
    enable_prefix_caching: bool = True,
    enforce_eager: bool = False,
    overheads: Overheads = MEASURED,
) -> MemoryFit:
    """Divide one GPU's memory; `fits` of the result says whether, `kv_blocks` how well.

    `max_model_len` is the model's own if None. `overheads` are the newest known; `overheads_of` has older releases'.
    """
    context = max_model_len or shape.context_tokens
    layout = cache_layout(
        shape, precision, parallelism=parallelism, block_size=block_size, enable_prefix_caching=enable_prefix_caching
    )
    activation = activation_bytes(
        shape,
        precision=precision,
        parallelism=parallelism,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        overheads=overheads,
    )
    graphs = 0
    if not enforce_eager:
        graphs = graph_bytes(shape, parallelism=parallelism, max_num_seqs=max_num_seqs, overheads=overheads)
    runtime = runtime_bytes(gpu, parallelism, overheads=overheads)
    budget = int(usable_bytes(gpu, overheads=overheads) * gpu_memory_utilization)

    def left(stage: Stage) -> tuple[int, int]:
        weights = gpu_weight_bytes(shape, parallelism=parallelism, precision=precision, stage=stage)
        return (budget - weights - activation - graphs - runtime) // layout.block_bytes, weights

    blocks, weights = min(left(stage) for stage in stages(shape, parallelism.pipeline))
    # Steps overlap: of a window, blocks of two batches may be in flight (one more for each pipeline stage).
    in_flight = (parallelism.pipeline + 1) * max_num_batched_tokens
    return MemoryFit(
        budget_bytes=budget,
        weight_bytes=weights,
        activation_bytes=activation,
        graph_bytes=graphs,
        runtime_bytes=runtime,
        kv_block_bytes=layout.block_bytes,
        kv_blocks=blocks,
        kv_tokens=layout.tokens(blocks, context, in_flight_tokens=in_flight),
        sequence_blocks=layout.blocks(context, in_flight_tokens=in_flight),
        max_model_len=context,
        layout=layout,
        block_size=block_size,
    )


def fit_host(
    shape: ModelShape,
    *,
    kv_cache_bytes: int,
    parallelism: Parallelism = SINGLE_GPU,
    precision: Precision = AS_PUBLISHED,
    max_model_len: int | None = None,
    max_num_batched_tokens: int = 2048,
    block_size: int = 128,
    enable_prefix_caching: bool = True,
) -> MemoryFit:
    """The same for vLLM on CPUs, which is told the size of the cache (VLLM_CPU_KVCACHE_SPACE) and takes it beside."""
    context = max_model_len or shape.context_tokens
    layout = cache_layout(
        shape, precision, parallelism=parallelism, block_size=block_size, enable_prefix_caching=enable_prefix_caching
    )
    weights = gpu_weight_bytes(shape, parallelism=parallelism, precision=precision)
    blocks = kv_cache_bytes // layout.block_bytes
    in_flight = (parallelism.pipeline + 1) * max_num_batched_tokens
    return MemoryFit(
        budget_bytes=weights + kv_cache_bytes,
        weight_bytes=weights,
        activation_bytes=0,
        graph_bytes=0,
        runtime_bytes=0,
        kv_block_bytes=layout.block_bytes,
        kv_blocks=blocks,
        kv_tokens=layout.tokens(blocks, context, in_flight_tokens=in_flight),
        sequence_blocks=layout.blocks(context, in_flight_tokens=in_flight),
        max_model_len=context,
        layout=layout,
        block_size=block_size,
    )
