"""Why a configuration does not fit, and the smallest changes that would make it fit, each tried before it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from enova_recommender.memory.division import Item, MemoryFit, fit
from enova_recommender.memory.overheads import MEASURED, Overheads
from enova_recommender.memory.weights import plain_element_bytes
from enova_recommender.types import (
    AS_PUBLISHED,
    SINGLE_GPU,
    WEIGHT_FORMATS,
    Arithmetic,
    GpuModel,
    ModelShape,
    Parallelism,
    Precision,
)

GIB = 1 << 30
GPU_MEMORY_UTILIZATION_MAX = 0.97      # beyond it the engine's own context has no room
CONTEXT_TOKENS_MIN = 1024              # a shorter max_model_len is no help; longer ones are multiples of it
BATCHED_TOKENS_MIN = 512
SEQUENCES_MIN = 8
TENSOR_SIZES = (2, 4, 8)
PIPELINE_SIZES = (2, 4)


class Lever(StrEnum):
    """A setting, or the hardware, that a change turns."""

    GPU_MEMORY_UTILIZATION = "gpu_memory_utilization"
    MAX_NUM_BATCHED_TOKENS = "max_num_batched_tokens"
    MAX_NUM_SEQS = "max_num_seqs"
    MAX_MODEL_LEN = "max_model_len"
    KV_CACHE_DTYPE = "kv_cache_dtype"
    TENSOR_PARALLEL_SIZE = "tensor_parallel_size"
    QUANTIZATION = "quantization"
    GPU = "gpu"
    PIPELINE_PARALLEL_SIZE = "pipeline_parallel_size"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySettings:
    """All that memory depends on; what `fit` takes."""

    gpu: GpuModel
    parallelism: Parallelism = SINGLE_GPU
    precision: Precision = AS_PUBLISHED
    gpu_memory_utilization: float = 0.92
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    max_model_len: int | None = None
    enable_prefix_caching: bool = True
    enforce_eager: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change after which the configuration fits."""

    lever: Lever
    value: str
    settings: MemorySettings
    fit: MemoryFit


@dataclass(frozen=True, slots=True, kw_only=True)
class WhyNot:
    """What is too large, by how much, and what would help: the change that gives up least comes first."""

    fit: MemoryFit
    largest: Item
    largest_bytes: int
    missing_bytes: int
    changes: tuple[Change, ...]
    reason: str


def fit_settings(shape: ModelShape, settings: MemorySettings, *, overheads: Overheads = MEASURED) -> MemoryFit:
    """`fit` of settings as a whole."""
    return fit(
        shape,
        settings.gpu,
        parallelism=settings.parallelism,
        precision=settings.precision,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        enable_prefix_caching=settings.enable_prefix_caching,
        enforce_eager=settings.enforce_eager,
        overheads=overheads,
    )


def why_not(
    shape: ModelShape,
    settings: MemorySettings,
    *,
    gpus: Sequence[GpuModel] = (),
    gpu_count: int = 8,
    overheads: Overheads = MEASURED,
) -> WhyNot | None:
    """Why the model does not fit; None if it does.

    `gpus` are other types that could be had, `gpu_count` the most of one node. Of each lever the smallest turn that
    suffices alone is given; where none does, there are no changes.
    """
    found = fit_settings(shape, settings, overheads=overheads)
    if found.fits:
        return None
    changes = []
    for lever, tries in _levers(shape, settings, gpus, gpu_count, overheads):
        for value, changed in tries:
            after = fit_settings(shape, changed, overheads=overheads)
            if after.fits:
                changes.append(Change(lever=lever, value=value, settings=changed, fit=after))
                break
    item, size = found.items[0]
    return WhyNot(
        fit=found,
        largest=item,
        largest_bytes=size,
        missing_bytes=found.missing_bytes,
        changes=tuple(changes),
        reason=_reason(found, item, size, changes),
    )


Tries = Iterable[tuple[str, MemorySettings]]


def _levers(
    shape: ModelShape, settings: MemorySettings, gpus: Sequence[GpuModel], gpu_count: int, overheads: Overheads
) -> Iterator[tuple[Lever, Tries]]:
    """Levers from the one that gives up least, each with its turns from the smallest on."""
    yield Lever.GPU_MEMORY_UTILIZATION, _utilizations(settings)
    yield Lever.MAX_NUM_BATCHED_TOKENS, _halvings(
        settings.max_num_batched_tokens, max(BATCHED_TOKENS_MIN, settings.max_num_seqs),
        lambda value: replace(settings, max_num_batched_tokens=value),
    )
    yield Lever.MAX_NUM_SEQS, _halvings(
        settings.max_num_seqs, SEQUENCES_MIN, lambda value: replace(settings, max_num_seqs=value)
    )
    yield Lever.MAX_MODEL_LEN, _longest_context(shape, settings, overheads)
    yield Lever.KV_CACHE_DTYPE, _cache_types(settings)
    yield Lever.TENSOR_PARALLEL_SIZE, _tensor_sizes(shape, settings, gpu_count)
    yield Lever.QUANTIZATION, _quantizations(shape, settings)
    yield Lever.GPU, ((gpu.name, replace(settings, gpu=gpu)) for gpu in sorted(gpus, key=lambda one: one.memory_bytes)
                      if gpu.memory_bytes > settings.gpu.memory_bytes)
    yield Lever.PIPELINE_PARALLEL_SIZE, _pipeline_sizes(shape, settings, gpu_count)


def _utilizations(settings: MemorySettings) -> Tries:
    percent = round(settings.gpu_memory_utilization * 100)
    for share in range(percent + 1, round(GPU_MEMORY_UTILIZATION_MAX * 100) + 1):
        yield f"{share / 100:.2f}", replace(settings, gpu_memory_utilization=share / 100)


def _halvings(value: int, least: int, changed: Callable[[int], MemorySettings]) -> Tries:
    """Smaller values: the powers of two below, down to `least`."""
    power = 1 << (value - 1).bit_length() >> 1 if value > 1 else 0
    while power >= least:
        yield str(power), changed(power)
        power //= 2


def _longest_context(shape: ModelShape, settings: MemorySettings, overheads: Overheads) -> Tries:
    """The longest max_model_len that fits, in whole CONTEXT_TOKENS_MIN."""

    def carries(thousands: int) -> bool:
        shorter = replace(settings, max_model_len=thousands * CONTEXT_TOKENS_MIN)
        return fit_settings(shape, shorter, overheads=overheads).fits

    context = settings.max_model_len or shape.context_tokens
    low, high = 0, (context - 1) // CONTEXT_TOKENS_MIN
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if carries(middle) else (low, middle - 1)
    if low:
        yield str(low * CONTEXT_TOKENS_MIN), replace(settings, max_model_len=low * CONTEXT_TOKENS_MIN)


def _cache_types(settings: MemorySettings) -> Tries:
    if settings.gpu.compute_capability >= 8.9 and not settings.precision.kv_cache_dtype.startswith("fp8"):
        yield "fp8", replace(settings, precision=replace(settings.precision, kv_cache_dtype="fp8"))


def _tensor_sizes(shape: ModelShape, settings: MemorySettings, gpu_count: int) -> Tries:
    layout = settings.parallelism
    for size in TENSOR_SIZES:
        larger = replace(layout, tensor=size)
        if size > layout.tensor and larger.gpus <= gpu_count and shape.attention_heads % size == 0:
            yield str(size), replace(settings, parallelism=larger)


def _pipeline_sizes(shape: ModelShape, settings: MemorySettings, gpu_count: int) -> Tries:
    for size in PIPELINE_SIZES:
        larger = replace(settings.parallelism, pipeline=size)
        if size > settings.parallelism.pipeline and larger.gpus <= gpu_count and size <= shape.layers:
            yield str(size), replace(settings, parallelism=larger)


def _quantizations(shape: ModelShape, settings: MemorySettings) -> Tries:
    """Smaller weights: those that vLLM makes of the plain ones while it loads, then published 4-bit ones."""
    if (settings.precision.quantization or shape.quantization) is not None:
        return
    plain = plain_element_bytes(shape, settings.precision)
    for method in ("fp8", "awq"):
        form = WEIGHT_FORMATS[method]
        runs = form.arithmetic is not Arithmetic.FP8 or settings.gpu.compute_capability >= 8.9
        if runs and form.element_bytes < plain:
            yield method, replace(settings, precision=replace(settings.precision, quantization=method))


_WORDS = {
    Item.WEIGHTS: "the weights",
    Item.ACTIVATIONS: "the activations of a full batch",
    Item.CUDA_GRAPHS: "the CUDA graphs",
    Item.RUNTIME: "the libraries",
    Item.ONE_SEQUENCE: "the KV cache of one sequence of max_model_len",
}


def _reason(found: MemoryFit, item: Item, size: int, changes: Sequence[Change]) -> str:
    """The same in words."""
    text = (
        f"{_WORDS[item]} take {size / GIB:.1f} GiB of {found.budget_bytes / GIB:.1f} GiB a GPU; "
        f"{found.missing_bytes / GIB:.1f} GiB are missing for one sequence of {found.max_model_len} tokens"
    )
    if not changes:
        return f"{text}; no single change makes it fit"
    return f"{text}; it fits with " + " or ".join(f"{change.lever} {change.value}" for change in changes)
