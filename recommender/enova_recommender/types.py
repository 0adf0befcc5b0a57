"""The values that all of the recommender speaks in: models, GPUs, parallel sizes, batches."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of one element by vLLM's and torch's names of it.
ELEMENT_BYTES = {
    "float32": 4.0, "float": 4.0, "float16": 2.0, "half": 2.0, "bfloat16": 2.0,
    "fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "int8": 1.0,
}  # fmt: skip
# Bytes of one weight by quantisation method, scales included: 4-bit integers carry a 16-bit scale and a zero point per
# 128 weights, mxfp4 an 8-bit scale per 32, nvfp4 an 8-bit scale per 16.
QUANTIZED_WEIGHT_BYTES = {
    "fp8": 1.0, "compressed-tensors": 1.0, "int8": 1.0, "bitsandbytes": 0.5,
    "awq": 0.5 + 4 / 128, "awq_marlin": 0.5 + 4 / 128, "gptq": 0.5 + 4 / 128, "gptq_marlin": 0.5 + 4 / 128,
    "mxfp4": 0.5 + 1 / 32, "nvfp4": 0.5 + 1 / 16,
}  # fmt: skip
# Methods that leave all but the experts in 16 bits.
EXPERTS_ONLY = frozenset({"mxfp4"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Attention that keeps keys and values of each token: multi-head, grouped or multi-query; it may slide."""

    heads: int
    kv_heads: int
    head_dim: int
    window_tokens: int | None = None
    gated: bool = False        # the query projection also makes a gate of its own size
    extra_parameters: int = 0  # biases, norms of queries and keys, sinks

    def matrix_parameters(self, hidden_size: int) -> int:
        """Weights of the query, key, value and output projections."""
        queries = self.heads * self.head_dim
        return hidden_size * (queries * (3 if self.gated else 2) + 2 * self.kv_heads * self.head_dim)

    def cache_elements(self, *, tensor_parallel: int = 1) -> int:
        """Elements kept of one token on one GPU; heads are replicated beyond their number."""
        return 2 * -(-self.kv_heads // tensor_parallel) * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one compressed vector a token serves all heads."""

    heads: int
    query_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    top_tokens: int | None = None  # attends to at most so many tokens, chosen by an indexer (sparse attention)
    indexer_parameters: int = 0    # matrices of that indexer
    indexer_cache_dim: int = 0     # elements a token that it keeps beside the latent vector
    extra_parameters: int = 0      # norms, biases

    def matrix_parameters(self, hidden_size: int) -> int:
        """Weights of all projections."""
        queries = self.heads * (self.nope_dim + self.rope_dim)
        query = hidden_size * queries if self.query_rank is None else self.query_rank * (hidden_size + queries)
        down = hidden_size * (self.kv_rank + self.rope_dim)
        up = self.kv_rank * self.heads * (self.nope_dim + self.value_dim)
        return query + down + up + self.heads * self.value_dim * hidden_size + self.indexer_parameters

    def cache_elements(self, *, tensor_parallel: int = 1) -> int:
        """Elements kept of one token on one GPU, which holds them whole whatever the tensor-parallel size."""
        del tensor_parallel
        return self.kv_rank + self.rope_dim + self.indexer_cache_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence:
    """A linear-attention or state-space layer: a state of fixed size a sequence, nothing kept a token."""

    heads: int
    key_dim: int
    value_dim: int
    projection_parameters: int      # its matrices
    convolution_elements: int = 0   # elements that the short convolution keeps a sequence
    extra_parameters: int = 0       # convolution weights, decays, norms

    @property
    def state_elements(self) -> int:
        """Elements of the state of one sequence, without those of the convolution."""
        return self.heads * self.key_dim * self.value_dim

    def matrix_parameters(self, hidden_size: int) -> int:
        """Weights of its projections."""
        del hidden_size  # given as a count, since families cut their projections differently
        return self.projection_parameters


Mixer = Attention | LatentAttention | Recurrence


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """A dense feed-forward layer."""

    intermediate_size: int
    gated: bool = True
    extra_parameters: int = 0

    def matrix_parameters(self, hidden_size: int) -> int:
        """Weights of the up, down and (if there is one) gate projections."""
        return (3 if self.gated else 2) * hidden_size * self.intermediate_size

    def active_parameters(self, hidden_size: int) -> int:
        """Weights that one token is multiplied with: all."""
        return self.matrix_parameters(hidden_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts with a router, and shared experts that every token passes (summed up into one)."""

    experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    gated: bool = True
    extra_parameters: int = 0  # biases of router and experts, gate of the shared expert

    def expert_parameters(self, hidden_size: int) -> int:
        """Weights of one routed expert."""
        return (3 if self.gated else 2) * hidden_size * self.intermediate_size

    def shared_parameters(self, hidden_size: int) -> int:
        """Weights that every token passes: the shared experts and the router."""
        return hidden_size * ((3 if self.gated else 2) * self.shared_intermediate_size + self.experts)

    def matrix_parameters(self, hidden_size: int) -> int:
        """Weights of all experts, shared ones and the router."""
        return self.experts * self.expert_parameters(hidden_size) + self.shared_parameters(hidden_size)

    def active_parameters(self, hidden_size: int) -> int:
        """Weights that one token is multiplied with."""
        return self.experts_per_token * self.expert_parameters(hidden_size) + self.shared_parameters(hidden_size)


FeedForward = Mlp | Experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """`count` equal layers; either part may be absent (hybrid models have layers of one part only)."""

    count: int
    mixer: Mixer | None = None
    feed_forward: FeedForward | None = None
    norm_parameters: int = 0  # of one layer


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer or hybrid, as its config.json says: equal layers are gathered in blocks."""

    name: str
    hidden_size: int
    vocabulary_size: int
    context_tokens: int
    blocks: tuple[Block, ...]
    tied_embeddings: bool = False
    dtype: str = "bfloat16"
    quantization: str | None = None
    extra_parameters: int = 0               # final norm, learnt positions
    not_modelled: tuple[str, ...] = ()      # parts that the figures leave out, such as "vision tower"

    @property
    def layers(self) -> int:
        """Layers of all blocks."""
        return sum(block.count for block in self.blocks)

    @property
    def attention_layers(self) -> tuple[tuple[int, Attention | LatentAttention], ...]:
        """Counts and kinds of the layers that keep something of each token."""
        return tuple((b.count, b.mixer) for b in self.blocks if isinstance(b.mixer, Attention | LatentAttention))

    @property
    def attention_heads(self) -> int:
        """Query heads of a layer; tensor parallelism must divide them."""
        return max((mixer.heads for _, mixer in self.attention_layers), default=1)

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that all layers keep of one token."""
        return sum(count * mixer.cache_elements() for count, mixer in self.attention_layers)

    @property
    def expert_parameters(self) -> int:
        """Weights of all routed experts."""
        size = self.hidden_size
        kinds = ((b.count, b.feed_forward) for b in self.blocks)
        return sum(n * ff.experts * ff.expert_parameters(size) for n, ff in kinds if isinstance(ff, Experts))

    @property
    def linear_parameters(self) -> int:
        """Weights of all matrices of all layers, without embedding and head."""
        parts = ((b.count, part) for b in self.blocks for part in (b.mixer, b.feed_forward) if part is not None)
        return sum(count * part.matrix_parameters(self.hidden_size) for count, part in parts)

    @property
    def active_linear_parameters(self) -> int:
        """Weights of the layers' matrices that one token is multiplied with."""
        size = self.hidden_size
        mixers = sum(b.count * b.mixer.matrix_parameters(size) for b in self.blocks if b.mixer)
        return mixers + sum(b.count * b.feed_forward.active_parameters(size) for b in self.blocks if b.feed_forward)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the input embedding, which are those of the head as well when they are tied."""
        return self.vocabulary_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All weights of the model, without what `not_modelled` names."""
        parts = ((b.count, part) for b in self.blocks for part in (b.mixer, b.feed_forward) if part is not None)
        small = sum(b.count * b.norm_parameters for b in self.blocks) + sum(n * p.extra_parameters for n, p in parts)
        embeddings = self.embedding_parameters * (1 if self.tied_embeddings else 2)
        return self.linear_parameters + embeddings + small + self.extra_parameters

    @property
    def active_parameters(self) -> int:
        """Weights that one token is multiplied with, embeddings included."""
        return self.parameters - self.linear_parameters + self.active_linear_parameters


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
    fp4_flops: float | None = None
    compute_capability: float = 8.0  # CUDA's; below 8.0 there is no bfloat16, below 8.9 no fp8
    island_gpus: int = 8             # GPUs of a node that are joined by the link; others talk over PCIe


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """How one replica is split over GPUs, by vLLM's sizes.

    With `expert` the experts lie on all tensor x data GPUs, each whole; without it each expert is cut into so many.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1         # ranks that hold the attention each on their own and share the experts
    expert: bool = False  # --enable-expert-parallel

    @property
    def gpus(self) -> int:
        """GPUs that one replica takes."""
        return self.tensor * self.pipeline * self.data


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A predicted figure and the bounds that hold it in 80 of 100 cases."""

    value: float
    low: float
    high: float
