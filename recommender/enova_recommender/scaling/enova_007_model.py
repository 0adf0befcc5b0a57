"""ENOVA 0.0.7's model table and cold-start rule, rebuilt as a baseline.

The rule looks at the number of parameters and at the memory of one full-length sequence; GPU type, workload and
max_num_seqs play no role in each other. It is kept as released, weaknesses included: later work must beat it.
"""

from __future__ import annotations

from dataclasses import dataclass

from enova_recommender.scaling.types import GpuFacts, ModelFacts

GIB = 1024**3
DTYPE_BYTES = 2
MEMORY_SHARE = 0.9                  # of a GPU's memory that the rule counts on
TENSOR_PARALLEL_SLACK = 0.9         # of that, when the tensor-parallel size is chosen
UTILIZATIONS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MAX_NUM_SEQS_CHOICES = (8, 16, 32, 64, 128, 256, 512, 1024)
ACTIVATION_GIB = 3
MISTRAL_ACTIVATION_GIB = 5
RECOVER_ACTIVATION_GIB = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One model as 0.0.7 knows it. `token_size` counts K and V elements of one token over all layers."""

    parameters: float
    token_size: int
    heads: int
    context_tokens: int


def _row(parameters: float, token_size: int, heads: int, context_tokens: int) -> TableRow:
    return TableRow(parameters=parameters, token_size=token_size, heads=heads, context_tokens=context_tokens)


# By framework and size in billions. chatglm's token_size is wrong (14336 would be right); it is what was released.
TABLE = {
    ("baichuan", 7): _row(7.506e9, 262144, 32, 4096),
    ("baichuan", 13): _row(13.896e9, 409600, 40, 8192),
    ("chatglm", 6): _row(6.243e9, 86016, 32, 8192),
    ("gemma", 2): _row(2.506e9, 9216, 8, 8192),
    ("gemma", 7): _row(8.538e9, 262144, 16, 8192),
    ("llama", 7): _row(6.607e9, 262144, 32, 4096),
    ("llama", 13): _row(12.852e9, 409600, 40, 4096),
    ("mistral", 7): _row(7.110e9, 65536, 32, 32768),
    ("qwen", 7): _row(7.721e9, 262144, 32, 8192),
    ("qwen", 14): _row(14.166e9, 409600, 40, 8192),
}
_FALLBACK_TOKEN_SIZES = {7: 262144, 13: 409600, 70: 1310720}
_FALLBACK_HEADS = 8
_FALLBACK_CONTEXT_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a replica lies on GPUs: tensor-parallel size and gpu_memory_utilization."""

    tensor_parallel_size: int
    gpu_memory_utilization: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """The cold-start recommendation; `layout` is None where the model does not fit (as released)."""

    max_num_seqs: int
    layout: Layout | None
    replicas: int = 1


def released_row(framework: str, size_billion: float) -> TableRow:
    """The table's row, or the released fallback for a model that is not in it."""
    known = TABLE.get((framework, int(size_billion))) if size_billion == int(size_billion) else None
    if known is not None:
        return known
    nearest = min(_FALLBACK_TOKEN_SIZES, key=lambda size: abs(size - size_billion))
    return TableRow(
        parameters=size_billion * GIB,
        token_size=_FALLBACK_TOKEN_SIZES[nearest],
        heads=_FALLBACK_HEADS,
        context_tokens=_FALLBACK_CONTEXT_TOKENS,
    )


def mended_row(model: ModelFacts) -> TableRow:
    """The released row with the one mended figure: KV elements = 2 x layers x kv_heads x head_dim."""
    row = released_row(model.framework, model.size_billion)
    return _row(row.parameters, model.kv_elements_per_token, row.heads, row.context_tokens)


def max_num_seqs(row: TableRow) -> int:
    """The choice nearest to 256 x 7 Gi / parameters."""
    wanted = 256 * 7 * GIB / row.parameters
    return min(MAX_NUM_SEQS_CHOICES, key=lambda choice: abs(choice - wanted))


def one_sequence_bytes(row: TableRow, *, activation_gib: int) -> float:
    """Weights, the KV of exactly one full-length sequence, and a constant for activations."""
    return (row.parameters + row.token_size * row.context_tokens) * DTYPE_BYTES + activation_gib * GIB


def head_divisors(row: TableRow, gpu_count: int) -> tuple[int, ...]:
    """Divisors of the number of heads that are no more than the GPUs, rising."""
    return tuple(size for size in range(1, min(row.heads, gpu_count) + 1) if row.heads % size == 0)


def lay_out(total_bytes: float, row: TableRow, gpu: GpuFacts) -> Layout | None:
    """The smallest tensor-parallel size, then the smallest utilization, that hold `total_bytes`; None if none does."""
    usable = MEMORY_SHARE * gpu.memory_bytes
    for size in head_divisors(row, gpu.count):
        if size * usable * TENSOR_PARALLEL_SLACK > total_bytes:
            utilization = next(share for share in UTILIZATIONS if size * usable * share > total_bytes)
            return Layout(tensor_parallel_size=size, gpu_memory_utilization=utilization)
    return None


def cold_start(row: TableRow, gpu: GpuFacts, *, framework: str) -> ColdStart:
    """What 0.0.7 recommends before anything has run."""
    activation = MISTRAL_ACTIVATION_GIB if framework == "mistral" else ACTIVATION_GIB
    total = one_sequence_bytes(row, activation_gib=activation)
    return ColdStart(max_num_seqs=max_num_seqs(row), layout=lay_out(total, row, gpu))
