"""What an engine takes of a GPU beside weights and cache: activations, CUDA graphs, libraries, the driver's part.

No data sheet has these figures. They follow from vLLM's code where it says them (copies of the logits), and else
from what vLLM printed at its start on the development rows of `tests/samples/vllm_kv_cache`, whose README has the
arithmetic; `recommender_memory` judges them on other models. Releases differ: until 0.16 the sampler sorted all
logits, until 0.18 CUDA graphs came on top of gpu_memory_utilization, and the buffers of collectives have grown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import assert_never

from enova_recommender.memory.weights import plain_element_bytes
from enova_recommender.types import (
    AS_PUBLISHED,
    Attention,
    Block,
    Experts,
    FeedForward,
    GpuModel,
    LatentAttention,
    Mixer,
    Mlp,
    ModelShape,
    Parallelism,
    Precision,
    Recurrence,
)

MIB = 1 << 20
FUSED_CAPABILITY = 9.0  # Hopper's
GRAPH_BATCH_MAX = 512  # tokens of the largest batch that vLLM captures


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Coefficients of the estimates below."""

    driver_bytes: int          # of a GPU's memory that CUDA does not offer
    driver_share: float        # the same in proportion to the memory
    runtime_bytes: int         # kernels, workspaces, the allocator's slack
    parallel_bytes: int        # buffers of collectives, where there are several GPUs
    fused_parallel_bytes: int  # more of them from Hopper on, where all-reduce and norm are one kernel
    logit_bytes: float         # of each logit at the peak of sampling
    graph_layer_bytes: int     # of one layer in one captured graph
    graphs_counted: bool       # whether gpu_memory_utilization covers them


# The logits in 16 bits and in 32, their probabilities and the noise that picks one: 2 + 4 + 4 + 4.
MEASURED = Overheads(
    driver_bytes=420 * MIB,
    driver_share=0.0015,
    runtime_bytes=350 * MIB,
    parallel_bytes=500 * MIB,
    fused_parallel_bytes=1370 * MIB,
    logit_bytes=14.0,
    graph_layer_bytes=125_000,
    graphs_counted=True,
)
# Sorting took values, places in 64 bits, and both once more while it ran.
_BEFORE_0_17 = replace(MEASURED, fused_parallel_bytes=0, logit_bytes=36.0, graphs_counted=False)


def overheads_of(version: tuple[int, int]) -> Overheads:
    """Those of a release of vLLM, by its major and minor number."""
    if version < (0, 17):
        return _BEFORE_0_17
    return replace(MEASURED, graphs_counted=version >= (0, 19))


def usable_bytes(gpu: GpuModel, *, overheads: Overheads = MEASURED) -> int:
    """Memory that CUDA offers of what the driver reports."""
    return int(gpu.memory_bytes * (1 - overheads.driver_share)) - overheads.driver_bytes


def runtime_bytes(gpu: GpuModel, parallelism: Parallelism, *, overheads: Overheads = MEASURED) -> int:
    """What libraries hold on one GPU."""
    if parallelism.gpus == 1:
        return overheads.runtime_bytes
    fused = overheads.fused_parallel_bytes if gpu.compute_capability >= FUSED_CAPABILITY else 0
    return overheads.runtime_bytes + overheads.parallel_bytes + fused


def activation_bytes(
    shape: ModelShape,
    *,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    parallelism: Parallelism,
    precision: Precision = AS_PUBLISHED,
    overheads: Overheads = MEASURED,
) -> int:
    """Peak of a full batch: the widest layer's tensors, or the sampler's copies of the logits."""
    element = plain_element_bytes(shape, precision)
    size = shape.hidden_size
    widest = max(_widest_elements(block, parallelism=parallelism, hidden_size=size) for block in shape.blocks)
    stream = element * max_num_batched_tokens * 2 * size
    layer = element * max_num_batched_tokens * widest
    sampled = min(max_num_seqs, max_num_batched_tokens)
    return round(stream + max(layer, overheads.logit_bytes * sampled * shape.vocabulary_size))


def _widest_elements(block: Block, *, parallelism: Parallelism, hidden_size: int) -> float:
    """Elements that a layer's widest part makes of one token on one GPU, beside the residual stream."""
    return max(
        _mixer_elements(block.mixer, parallelism.tensor),
        _feed_forward_elements(block.feed_forward, parallelism, hidden_size),
    )


def _mixer_elements(mixer: Mixer | None, tensor: int) -> float:
    """Queries, keys, values and their weighted sum."""
    match mixer:
        case None:
            return 0.0
        case Attention():
            queries = mixer.heads * mixer.head_dim
            return (queries * (3 if mixer.gated else 2) + mixer.cache_elements()) / tensor
        case LatentAttention():
            head = 2 * (mixer.nope_dim + mixer.rope_dim) + 2 * mixer.value_dim + mixer.nope_dim
            return (mixer.query_rank or 0) + mixer.kv_rank + mixer.rope_dim + mixer.heads * head / tensor
        case Recurrence():
            return 4 * mixer.heads * (mixer.key_dim + mixer.value_dim) / tensor
        case _:
            assert_never(mixer)


def _feed_forward_elements(layer: FeedForward | None, parallelism: Parallelism, hidden_size: int) -> float:
    """Gate, up and their product; of experts for each that a token visits, and what each gives back."""
    match layer:
        case None:
            return 0.0
        case Mlp():
            return (3 if layer.gated else 2) * layer.intermediate_size / parallelism.tensor
        case Experts():
            ways, spread = 2 if layer.gated else 1, parallelism.tensor * parallelism.data
            inner = layer.intermediate_size / (1 if parallelism.expert else spread)
            # Two workspaces, each as wide as what an expert takes in or makes.
            routed = 2 * layer.experts_per_token * max(ways * inner, layer.latent_size or hidden_size)
            return routed + (ways + 1) * layer.shared_intermediate_size / parallelism.tensor
        case _:
            assert_never(layer)


def captured_graphs(max_num_seqs: int) -> int:
    """Batch sizes that vLLM captures: 1, 2, 4, each 8th below 256, each 16th from there; decoding once more by itself.

    The largest is twice max_num_seqs and at most 512; those of decoding alone end at max_num_seqs.
    """
    return _sizes(min(2 * max_num_seqs, GRAPH_BATCH_MAX)) + _sizes(min(max_num_seqs, GRAPH_BATCH_MAX))


def _sizes(largest: int) -> int:
    small = sum(1 for size in (1, 2, 4) if size <= largest)
    return small + len(range(8, min(largest + 1, 256), 8)) + len(range(256, largest + 1, 16))


def graph_bytes(
    shape: ModelShape, *, parallelism: Parallelism, max_num_seqs: int, overheads: Overheads = MEASURED
) -> int:
    """What captured CUDA graphs hold on one GPU of what gpu_memory_utilization covers."""
    layers = -(-shape.layers // parallelism.pipeline)
    return captured_graphs(max_num_seqs) * layers * overheads.graph_layer_bytes if overheads.graphs_counted else 0
