"""What a replica needs of each GPU's memory: weights, activations, and the KV blocks that are left.

vLLM measures its peak by a profiling run and gives the rest of `gpu_memory_utilization` to the KV cache; here the
peak is estimated from the shape. All figures are bytes of one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from enova_recommender.types import (
    AS_PUBLISHED,
    ELEMENT_BYTES,
    QUANTIZED_WEIGHT_BYTES,
    SINGLE_GPU,
    Block,
    Experts,
    GpuModel,
    Mlp,
    ModelShape,
    Parallelism,
    Precision,
)

# CUDA context, NCCL buffers and the allocator's slack, which vLLM's profiling counts as "non-torch" memory.
RUNTIME_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFit:
    """How one GPU's memory is divided. `kv_blocks` may be zero or less: then the model does not fit."""

    budget_bytes: int
    weight_bytes: int
    activation_bytes: int
    runtime_bytes: int
    kv_block_bytes: int
    kv_blocks: int

    @property
    def used_bytes(self) -> int:
        """What the driver would report in use once the KV cache is allocated."""
        fixed = self.weight_bytes + self.activation_bytes + self.runtime_bytes
        return fixed + max(0, self.kv_blocks) * self.kv_block_bytes


def plain_element_bytes(shape: ModelShape, precision: Precision = AS_PUBLISHED) -> float:
    """Bytes of one element of what is not quantised: embedding, head, activations."""
    return ELEMENT_BYTES[shape.dtype if precision.dtype == "auto" else precision.dtype]


def layer_weight_bytes(shape: ModelShape, precision: Precision = AS_PUBLISHED) -> float:
    """Bytes of the weights of all layers, which quantisation covers."""
    method = precision.quantization or shape.quantization
    element = QUANTIZED_WEIGHT_BYTES[method] if method else plain_element_bytes(shape, precision)
    return shape.linear_parameters * element


def weight_bytes(shape: ModelShape, precision: Precision = AS_PUBLISHED) -> int:
    """Bytes of all weights."""
    plain = plain_element_bytes(shape, precision) * (shape.parameters - shape.linear_parameters)
    return round(plain + layer_weight_bytes(shape, precision))


def kv_bytes_per_token(shape: ModelShape, precision: Precision = AS_PUBLISHED, *, tensor_parallel: int = 1) -> int:
    """Bytes of keys and values of one token in all layers, on one GPU; heads are replicated beyond their number."""
    cached = precision.kv_cache_dtype
    element = plain_element_bytes(shape, precision) if cached == "auto" else ELEMENT_BYTES[cached]
    layers = shape.attention_layers
    return round(element * sum(n * mixer.cache_elements(tensor_parallel=tensor_parallel) for n, mixer in layers))


def activation_bytes(
    shape: ModelShape, *, max_num_batched_tokens: int, max_num_seqs: int, tensor_parallel: int = 1
) -> int:
    """Peak of what a step holds beside weights and cache: the widest layer's tensors, or the logits of a full batch."""
    widest = max(map(_intermediate_elements, shape.blocks))
    per_token = 4 * shape.hidden_size + 3 * widest // tensor_parallel
    layer = 2 * max_num_batched_tokens * per_token
    logits = max_num_seqs * shape.vocabulary_size * (2 + 4)  # gathered in 16 bits, sampled in 32
    return layer + logits


def _intermediate_elements(block: Block) -> int:
    """Elements that the feed-forward layer of a block makes of one token."""
    match block.feed_forward:
        case Mlp() as mlp:
            return mlp.intermediate_size
        case Experts() as moe:
            return moe.experts_per_token * moe.intermediate_size + moe.shared_intermediate_size
    return 0


def fit(
    shape: ModelShape,
    gpu: GpuModel,
    *,
    parallelism: Parallelism = SINGLE_GPU,
    precision: Precision = AS_PUBLISHED,
    gpu_memory_utilization: float = 0.92,
    max_num_batched_tokens: int = 8192,
    max_num_seqs: int = 256,
    block_size: int = 16,
) -> MemoryFit:
    """Divide one GPU's memory; `kv_blocks` of the result says whether, and how well, the model fits."""
    tensor = parallelism.tensor
    weights = -(-weight_bytes(shape, precision) // parallelism.gpus)
    activation = activation_bytes(
        shape, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs, tensor_parallel=tensor
    )
    token = kv_bytes_per_token(shape, precision, tensor_parallel=tensor)
    block = max(1, -(-token * block_size // parallelism.pipeline))
    budget = int(gpu.memory_bytes * gpu_memory_utilization)
    left = budget - weights - activation - RUNTIME_BYTES
    return MemoryFit(
        budget_bytes=budget,
        weight_bytes=weights,
        activation_bytes=activation,
        runtime_bytes=RUNTIME_BYTES,
        kv_block_bytes=block,
        kv_blocks=left // block,
    )
