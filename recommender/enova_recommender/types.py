"""The values that all of the recommender speaks in: models, GPUs, parallel sizes, batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

# Bytes of one element by vLLM's and torch's names of it.
ELEMENT_BYTES = {
    "float32": 4.0, "float": 4.0, "float16": 2.0, "half": 2.0, "bfloat16": 2.0,
    "fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "int8": 1.0,
}  # fmt: skip


class VerdictKind(StrEnum):
    """What the detector says of a deployment or replica over a window."""

    NORMAL = "NORMAL"
    OVERLOADED = "OVERLOADED"
    UNDERUSED = "UNDERUSED"
    DEGRADED = "DEGRADED"
    MISCONFIGURED = "MISCONFIGURED"
    UNKNOWN = "UNKNOWN"


class Arithmetic(StrEnum):
    """What the matrix products of a quantised model multiply in, where the GPU can."""

    PLAIN = "PLAIN"  # 16 bits: the weights are widened first
    INT8 = "INT8"
    FP8 = "FP8"
    FP4 = "FP4"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """One way to keep weights: bytes of a weight, its share of the scales included, and what it is multiplied in."""

    element_bytes: float
    arithmetic: Arithmetic


def _integers(bits: int, *, group: int, zero_points: bool) -> WeightFormat:
    """Weights alone in few bits, with a 16-bit scale (and a zero point) per group."""
    overhead = (2 + (bits / 8 if zero_points else 0)) / group
    return WeightFormat(element_bytes=bits / 8 + overhead, arithmetic=Arithmetic.PLAIN)


_FP8 = WeightFormat(element_bytes=1.0, arithmetic=Arithmetic.FP8)
_NVFP4 = WeightFormat(element_bytes=0.5 + 1 / 16, arithmetic=Arithmetic.FP4)  # an 8-bit scale per 16
_GROUPED = _integers(4, group=128, zero_points=True)
# By the names of vLLM's --quantization, and those that `parse_shape` gives a checkpoint whose method leaves the bits
# open (compressed-tensors, gptq, modelopt).
WEIGHT_FORMATS: Mapping[str, WeightFormat] = MappingProxyType({
    "fp8": _FP8, "fbgemm_fp8": _FP8, "compressed-tensors": _FP8, "modelopt": _FP8,
    "fp8_block": WeightFormat(element_bytes=1 + 4 / 128**2, arithmetic=Arithmetic.FP8),  # a scale per 128 x 128
    "fp8_weights": WeightFormat(element_bytes=1.0, arithmetic=Arithmetic.PLAIN),
    "int8": WeightFormat(element_bytes=1.0, arithmetic=Arithmetic.INT8),
    "int8_weights": _integers(8, group=128, zero_points=False),
    "awq": _GROUPED, "awq_marlin": _GROUPED, "gptq": _GROUPED, "gptq_marlin": _GROUPED,
    "int4": _integers(4, group=128, zero_points=False), "int4_group32": _integers(4, group=32, zero_points=False),
    "bitsandbytes": WeightFormat(element_bytes=0.5 + 4 / 64, arithmetic=Arithmetic.PLAIN),
    "mxfp4": WeightFormat(element_bytes=0.5 + 1 / 32, arithmetic=Arithmetic.PLAIN),  # an 8-bit scale per 32
    "nvfp4": _NVFP4, "modelopt_fp4": _NVFP4,
    "nvfp4_weights": WeightFormat(element_bytes=0.5 + 1 / 16, arithmetic=Arithmetic.PLAIN),
})  # fmt: skip
QUANTIZED_WEIGHT_BYTES = {name: form.element_bytes for name, form in WEIGHT_FORMATS.items()}


class Part(StrEnum):
    """A group of matrices that a quantised checkpoint may leave in its plain type. Embedding and head always are."""

    ATTENTION = "ATTENTION"    # projections of attention, latent attention included
    RECURRENCE = "RECURRENCE"
    MLP = "MLP"
    SHARED_EXPERTS = "SHARED_EXPERTS"
    EXPERTS = "EXPERTS"        # the routed ones
    ROUTER = "ROUTER"          # always plain


# Methods that leave all but the experts in 16 bits, where the checkpoint does not say itself.
EXPERTS_ONLY = frozenset({"mxfp4"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Attention that keeps keys and values of each token: multi-head, grouped or multi-query; it may slide."""

    heads: int
    kv_heads: int
    head_dim: int
    window_tokens: int | None = None  # the last so many tokens, or the chunk of so many that the token lies in
    gated: bool = False        # the query projection also makes a gate of its own size
    value_dim: int | None = None      # of a head, where it is not head_dim
    cached: bool = True        # False: takes keys and values from an earlier layer, and keeps none
    keys_are_values: bool = False     # one projection for both; the cache holds both
    extra_parameters: int = 0  # biases, norms of queries and keys, sinks

    def matrix_parameters(self, hidden_size: int) -> int:
        """Weights of the query, key, value and output projections."""
        value = self.value_dim or self.head_dim
        queries = self.heads * (self.head_dim * (2 if self.gated else 1) + value)
        pair = self.head_dim + (0 if self.keys_are_values else value)
        return hidden_size * (queries + (self.kv_heads * pair if self.cached else 0))

    def cache_elements(self, *, tensor_parallel: int = 1) -> int:
        """Elements kept of one token on one GPU; heads are replicated beyond their number."""
        pair = self.head_dim + (self.value_dim or self.head_dim)
        return -(-self.kv_heads // tensor_parallel) * pair if self.cached else 0


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
    state_dtype: str = "auto"       # of the state's elements; `auto` is the model's own
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
    latent_size: int | None = None        # routed experts work on a projection of the token to so many elements
    expert_extra_parameters: int = 0      # biases of one routed expert
    extra_parameters: int = 0  # biases of router and shared experts, gate of the shared expert

    def expert_parameters(self, hidden_size: int) -> int:
        """Weights of one routed expert."""
        return (3 if self.gated else 2) * (self.latent_size or hidden_size) * self.intermediate_size

    def shared_parameters(self, hidden_size: int) -> int:
        """Weights that every token passes: shared experts, projections to the latent size and back, the router."""
        shared = (3 if self.gated else 2) * self.shared_intermediate_size
        return hidden_size * (shared + 2 * (self.latent_size or 0) + self.experts)

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
    quantization: str | None = None         # a name of WEIGHT_FORMATS
    plain_parts: tuple[Part, ...] = ()      # that quantisation leaves in dtype
    kv_cache_dtype: str | None = None       # that the checkpoint asks for where the engine's setting is `auto`
    extra_parameters: int = 0               # final norm, learnt positions, bias of the head
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
    def part_parameters(self) -> Mapping[Part, int]:
        """Weights of the layers' matrices by part; their sum is `linear_parameters`."""
        found: dict[Part, int] = {}
        for block in self.blocks:
            for part, weights in _parts(block, self.hidden_size):
                found[part] = found.get(part, 0) + block.count * weights
        return found

    @property
    def quantized_parameters(self) -> int:
        """Weights that the checkpoint's quantisation covers, if it has one; `plain_parts` and routers are not."""
        plain = {*self.plain_parts, Part.ROUTER}
        return sum(weights for part, weights in self.part_parameters.items() if part not in plain)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the input embedding, which are those of the head as well when they are tied."""
        return self.vocabulary_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All weights of the model, without what `not_modelled` names."""
        parts = ((b.count, part) for b in self.blocks for part in (b.mixer, b.feed_forward) if part is not None)
        small = sum(b.count * b.norm_parameters for b in self.blocks) + sum(n * _extra(p) for n, p in parts)
        embeddings = self.embedding_parameters * (1 if self.tied_embeddings else 2)
        return self.linear_parameters + embeddings + small + self.extra_parameters

    @property
    def active_parameters(self) -> int:
        """Weights that one token is multiplied with, embeddings included."""
        moe = ((b.count, b.feed_forward) for b in self.blocks if isinstance(b.feed_forward, Experts))
        idle = sum(n * (ff.experts - ff.experts_per_token) * ff.expert_extra_parameters for n, ff in moe)
        return self.parameters - self.linear_parameters + self.active_linear_parameters - idle


def _extra(part: Mixer | FeedForward) -> int:
    """Biases and norms of one layer's part."""
    experts = part.experts * part.expert_extra_parameters if isinstance(part, Experts) else 0
    return part.extra_parameters + experts


def _parts(block: Block, hidden_size: int) -> Iterator[tuple[Part, int]]:
    """The parts of one layer and the weights of their matrices."""
    if block.mixer is not None:
        part = Part.RECURRENCE if isinstance(block.mixer, Recurrence) else Part.ATTENTION
        yield part, block.mixer.matrix_parameters(hidden_size)
    match block.feed_forward:
        case Mlp() as mlp:
            yield Part.MLP, mlp.matrix_parameters(hidden_size)
        case Experts() as moe:
            router = hidden_size * moe.experts
            yield Part.EXPERTS, moe.experts * moe.expert_parameters(hidden_size)
            yield Part.SHARED_EXPERTS, moe.shared_parameters(hidden_size) - router
            yield Part.ROUTER, router


class PriceMissing(ValueError):
    """A cost was asked for of GPUs without a price; `field` names what the operator should give."""

    field = "price_per_hour"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuModel:
    """One type of GPU by its data sheet. Peak rates are dense, without structured sparsity."""

    name: str
    driver_names: tuple[str, ...]
    memory_bytes: int
    bandwidth_bytes_per_s: float
    bf16_flops: float        # of 16-bit elements; of float16 where there is no bfloat16
    fp8_flops: float | None
    link_bytes_per_s: float  # to its peers, one direction
    power_limit_w: float
    idle_power_w: float
    sm_clock_mhz: float
    memory_clock_mhz: float
    price_per_hour: float | None     # USD; None: nobody said
    source: str
    fp4_flops: float | None = None
    int8_ops: float | None = None
    compute_capability: float = 8.0  # CUDA's; below 8.0 there is no bfloat16, below 8.9 no fp8
    island_gpus: int = 8             # GPUs of a node that are joined by the link; others talk over PCIe
    pcie_bytes_per_s: float = 32e9   # to the host, and to peers beyond the island; one direction
    unknown: tuple[str, ...] = ()    # fields that nobody stated: estimates stand there

    def cost_per_hour(self, gpus: int) -> float:
        """USD of so many for an hour. Raises PriceMissing."""
        if self.price_per_hour is None:
            raise PriceMissing(f"{self.name} has no price_per_hour")
        return gpus * self.price_per_hour


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
