"""The values that all of the recommender speaks in: models, GPUs, parallel sizes, batches."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of one element by vLLM's and torch's names of it.
ELEMENT_BYTES = {
    "float32": 4.0, "float": 4.0, "float16": 2.0, "half": 2.0, "bfloat16": 2.0,
    "fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "int8": 1.0,
}  # fmt: skip
# Bytes of one weight by quantisation method; 4-bit methods carry a 16-bit scale and zero point per 128 weights.
QUANTIZED_WEIGHT_BYTES = {
    "fp8": 1.0, "compressed-tensors": 1.0, "int8": 1.0, "bitsandbytes": 0.5,
    "awq": 0.5 + 4 / 128, "awq_marlin": 0.5 + 4 / 128, "gptq": 0.5 + 4 / 128, "gptq_marlin": 0.5 + 4 / 128,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A dense decoder-only transformer with grouped-query attention and a gated MLP, as its config.json says."""

    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    vocabulary_size: int
    context_tokens: int
    tied_embeddings: bool = False
    dtype: str = "bfloat16"
    quantization: str | None = None
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def attention_parameters(self) -> int:
        """Weights of the query, key, value and output projections of one layer."""
        queries = self.attention_heads * self.head_dim
        keys = self.kv_heads * self.head_dim
        return self.hidden_size * (2 * queries + 2 * keys)

    @property
    def mlp_parameters(self) -> int:
        """Weights of the gate, up and down projections of one layer."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def linear_parameters(self) -> int:
        """Weights that every token is multiplied with: all layers, without embedding and head."""
        return self.layers * (self.attention_parameters + self.mlp_parameters)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the input embedding, which are those of the head as well when they are tied."""
        return self.vocabulary_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All weights of the model."""
        norms = self.layers * (2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)) + self.hidden_size
        biases = self.layers * (self.attention_heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        embeddings = self.embedding_parameters * (1 if self.tied_embeddings else 2)
        return self.linear_parameters + embeddings + norms + biases


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuModel:
    """One type of GPU by its data sheet. Peak rates are dense, without structured sparsity."""

    name: str
    driver_names: tuple[str, ...]
    memory_bytes: int
    bandwidth_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float | None
    link_bytes_per_s: float  # to its peers, one direction
    power_limit_w: float
    idle_power_w: float
    sm_clock_mhz: float
    memory_clock_mhz: float
    price_per_hour: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """How one replica is split over GPUs."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def gpus(self) -> int:
        """GPUs that one replica takes."""
        return self.tensor * self.pipeline


SINGLE_GPU = Parallelism()


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Element types of a replica, by vLLM's names; `auto` and None follow the model's own."""

    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"


AS_PUBLISHED = Precision()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one engine step computes.

    `prefill_pairs` counts pairs of a prompt token and a token that it attends to; `context_tokens` is the sum, over
    the decoding sequences, of the tokens whose keys and values the step reads.
    """

    prefill_tokens: int = 0
    prefill_pairs: int = 0
    decode_sequences: int = 0
    context_tokens: int = 0
