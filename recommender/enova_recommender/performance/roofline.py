"""Step times of one replica from data sheets alone: each class of kernels takes the longer of arithmetic and traffic.

A stated share of the peak rates is reached. For a batch that only decodes, both are affine in the context, so that a
run of steps has a closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

from enova_recommender.memory import kv_bytes_per_token, layer_weight_bytes, plain_element_bytes
from enova_recommender.performance.times import read_tokens
from enova_recommender.types import (
    AS_PUBLISHED,
    SINGLE_GPU,
    Attention,
    Batch,
    GpuModel,
    LatentAttention,
    ModelShape,
    Parallelism,
    Precision,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of the data sheet's peaks that kernels reach, and costs that no data sheet has.

    These are priors, not fits: matrix products of large shapes reach about 0.7 of the dense peak and streaming reads
    about 0.8 of the bandwidth on current cards; attention reads scattered blocks, hence less.
    """

    matrix_compute: float = 0.70
    matrix_memory: float = 0.80
    attention_compute: float = 0.50
    attention_memory: float = 0.65
    link: float = 0.70
    collective_s: float = 10e-6  # start of one all-reduce among the GPUs of a node
    step_s: float = 1.2e-3  # scheduling, input preparation, sampling, kernel launches by graph
    sequence_s: float = 4e-6  # of each sequence in the batch: block tables, sampling, detokenising


PRIOR = Efficiency()


class Roofline:
    """Step times of one replica from the shape of its model and the data sheet of its GPUs."""

    def __init__(
        self,
        shape: ModelShape,
        gpu: GpuModel,
        *,
        parallelism: Parallelism = SINGLE_GPU,
        precision: Precision = AS_PUBLISHED,
        efficiency: Efficiency = PRIOR,
    ) -> None:
        tensor, part = parallelism.tensor, efficiency
        method = precision.quantization or shape.quantization
        element_s = 1 / (gpu.bandwidth_bytes_per_s * part.matrix_memory)
        eight_bit = method in {"fp8", "compressed-tensors"} and gpu.fp8_flops is not None
        peak = gpu.fp8_flops if eight_bit and gpu.fp8_flops else gpu.bf16_flops
        plain = plain_element_bytes(shape, precision)
        layer_bytes = layer_weight_bytes(shape, precision)
        # Stages of a pipeline run one after another for one batch, so only the tensor-parallel size divides.
        self._matrix_token_s = 2 * shape.active_linear_parameters / tensor / (peak * part.matrix_compute)
        self._matrix_read_s = layer_bytes / tensor * element_s
        self._head_sequence_s = 2 * shape.embedding_parameters / tensor / (gpu.bf16_flops * part.matrix_compute)
        self._head_read_s = shape.embedding_parameters * plain / tensor * element_s
        pair_flops = sum(4 * count * _pair_elements(mixer) for count, mixer in shape.attention_layers) / tensor
        self._pair_s = pair_flops / (gpu.bf16_flops * part.attention_compute)
        kv_bytes = kv_bytes_per_token(shape, precision, tensor_parallel=tensor)
        self._context_token_s = max(
            kv_bytes / (gpu.bandwidth_bytes_per_s * part.attention_memory), self._pair_s
        )
        # Two all-reduces a layer, each moving 2 (n - 1) / n of the activations over every GPU's link.
        self._collective_s = 2 * shape.layers * part.collective_s if tensor > 1 else 0.0
        moved = 2 * shape.layers * shape.hidden_size * plain * 2 * (tensor - 1) / tensor
        self._collective_token_s = moved / (gpu.link_bytes_per_s * part.link)
        self._step_s, self._sequence_s = part.step_s, part.sequence_s

    def step_s(self, batch: Batch) -> float:
        """Duration of one step."""
        sampled = batch.decode_sequences + (1 if batch.prefill_tokens else 0)
        return (
            self._fixed_s(batch.prefill_tokens + batch.decode_sequences, sampled)
            + self._pair_s * batch.prefill_pairs
            + self._context_token_s * batch.context_tokens
        )

    def decode_run_s(self, *, sequences: int, context_tokens: int, steps: int) -> float:
        """Duration of a run of decode steps."""
        read = read_tokens(sequences, context_tokens, steps)
        return self._fixed_s(sequences, sequences) * steps + self._context_token_s * read

    def _fixed_s(self, tokens: int, sampled: int) -> float:
        """The part of a step that does not depend on the context."""
        return (
            self._step_s
            + self._sequence_s * sampled
            + max(self._matrix_read_s, self._matrix_token_s * tokens)
            + max(self._head_read_s, self._head_sequence_s * sampled)
            + self._collective_s
            + self._collective_token_s * tokens
        )


def _pair_elements(mixer: Attention | LatentAttention) -> int:
    """Multiplications of one query token with one key, and of its weight with one value, halved, over all heads."""
    if isinstance(mixer, LatentAttention):
        return mixer.heads * (mixer.nope_dim + mixer.rope_dim + mixer.value_dim) // 2
    return mixer.heads * mixer.head_dim
