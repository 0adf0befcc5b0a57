"""What the engine serves on: the model's shape, its memory, its limits and step times; or why it cannot start."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from enova_recommender import catalog
from enova_recommender.engine import Limits, Policy
from enova_recommender.memory import MemoryFit, fit, weight_bytes
from enova_recommender.performance import Affine, Roofline, StepTimes
from enova_recommender.shape import ShapeError, parse_shape
from enova_recommender.types import QUANTIZED_WEIGHT_BYTES, GpuModel, ModelShape, Parallelism, Precision
from enova_simulator.engine.command_line import Options

STEP_TIMES_FORMAT = "enova.step_times/v1"
GIB = 1 << 30


class StartRefused(Exception):
    """The engine cannot start; the text is what vLLM would end its log with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model that fits its GPUs."""

    shape: ModelShape
    gpu: GpuModel
    parallelism: Parallelism
    memory: MemoryFit
    limits: Limits
    times: StepTimes
    max_model_len: int
    weight_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """The settings that vLLM chooses by itself where none are given."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int


def load(options: Options, environment: Mapping[str, str] = os.environ) -> Served:
    """Everything that follows from the options; StartRefused says why there is nothing."""
    shape = _shape(options.model)
    gpu = catalog.find_gpu(options.gpu)
    if gpu is None:
        raise StartRefused(f"RuntimeError: Failed to infer device type: no GPU is called {options.gpu!r}")
    parallelism = _parallelism(options, shape, environment)
    precision = _precision(options)
    sizes = _sizes(options, shape, gpu)
    memory = fit(
        shape,
        gpu,
        parallelism=parallelism,
        precision=precision,
        gpu_memory_utilization=float(options.configuration["gpu_memory_utilization"] or 0.92),
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_num_seqs=sizes.max_num_seqs,
        max_model_len=sizes.max_model_len,
        block_size=sizes.block_size,
    )
    if options.step_times is None:
        times: StepTimes = Roofline(shape, gpu, parallelism=parallelism, precision=precision)
    else:
        times = read_step_times(options.step_times)
    return Served(
        shape=shape,
        gpu=gpu,
        parallelism=parallelism,
        memory=memory,
        limits=_limits(options, sizes, _blocks(options, gpu, memory, sizes)),
        times=times,
        max_model_len=sizes.max_model_len,
        weight_bytes=weight_bytes(shape, precision),
    )


def _precision(options: Options) -> Precision:
    quantization = options.configuration["quantization"]
    if quantization is not None and quantization not in QUANTIZED_WEIGHT_BYTES:
        raise StartRefused(
            f"ValueError: Unknown quantization method: {quantization}. Must be one of {list(QUANTIZED_WEIGHT_BYTES)}."
        )
    return Precision(
        dtype=options.text("dtype"),
        quantization=None if quantization is None else str(quantization),
        kv_cache_dtype=options.text("kv_cache_dtype"),
    )


def _shape(model: str) -> ModelShape:
    known = catalog.models().get(model)
    if known is not None:
        return known
    folder = Path(model)
    if not folder.is_dir():
        if model.startswith(("/", ".")) or model.count("/") > 1:
            raise StartRefused(
                "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or "
                f"'namespace/repo_name': '{model}'. Use `repo_type` argument if needed."
            )
        raise StartRefused(
            f"OSError: {model} is not a local folder and is not a model of the simulated engine's catalogue "
            f"({', '.join(catalog.models())})"
        )
    config = folder / "config.json"
    if not config.is_file():
        raise StartRefused(f"ValueError: {model} does not appear to have a file named config.json.")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise StartRefused(f"OSError: It looks like the config file at '{config}' is not a valid JSON object.")
        return parse_shape(content, name=model)
    except json.JSONDecodeError as error:
        raise StartRefused(f"OSError: It looks like the config file at '{config}' is not a valid JSON file.") from error
    except ShapeError as error:
        raise StartRefused(f"pydantic_core._pydantic_core.ValidationError: {config}: {error}") from error


def visible_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, by UUID or index."""
    words = environment.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(word.strip() for word in words.split(",") if word.strip())


def _parallelism(options: Options, shape: ModelShape, environment: Mapping[str, str]) -> Parallelism:
    parallelism = Parallelism(
        tensor=options.integer("tensor_parallel_size") or 1, pipeline=options.integer("pipeline_parallel_size") or 1
    )
    count = options.gpu_count or len(visible_gpus(environment)) or parallelism.gpus
    if parallelism.gpus > count:
        raise _invalid(
            "ParallelConfig",
            f"World size ({parallelism.gpus}) is larger than the number of available GPUs ({count}) "
            "in this node."
        )
    if shape.attention_heads % parallelism.tensor:
        raise _invalid(
            "VllmConfig",
            f"Total number of attention heads ({shape.attention_heads}) must be divisible by tensor "
            f"parallel size ({parallelism.tensor})."
        )
    return parallelism


def _invalid(config: str, text: str) -> StartRefused:
    """A value that vLLM's own check of one of its configurations refuses, as pydantic words that."""
    error = f"pydantic_core._pydantic_core.ValidationError: 1 validation error for {config}"
    return StartRefused(f"{error}\n  Value error, {text}")


def _sizes(options: Options, shape: ModelShape, gpu: GpuModel) -> _Sizes:
    asked = options.integer("max_model_len")
    if asked is not None and asked > shape.context_tokens:
        raise _invalid(
            "ModelConfig",
            f"User-specified max_model_len ({asked}) is greater than the derived max_model_len "
            f"(max_position_embeddings={shape.context_tokens} or model_max_length=None in model's config.json)."
        )
    # vLLM takes larger batches on cards of the H100's class and above.
    large = gpu.memory_bytes >= 70 * GIB and not gpu.name.startswith("A100")
    max_num_seqs = options.integer("max_num_seqs") or (1024 if large else 256)
    max_num_batched_tokens = options.integer("max_num_batched_tokens") or max(max_num_seqs, 8192 if large else 2048)
    max_model_len = asked or shape.context_tokens
    if max_num_batched_tokens < max_num_seqs:
        raise _invalid(
            "SchedulerConfig",
            f"max_num_batched_tokens ({max_num_batched_tokens}) must be greater than or equal to "
            f"max_num_seqs ({max_num_seqs})."
        )
    if not options.configuration["enable_chunked_prefill"] and max_num_batched_tokens < max_model_len:
        raise _invalid(
            "SchedulerConfig",
            f"max_num_batched_tokens ({max_num_batched_tokens}) is smaller than max_model_len "
            f"({max_model_len})."
        )
    return _Sizes(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        block_size=options.integer("block_size") or 16,
    )


def _blocks(options: Options, gpu: GpuModel, memory: MemoryFit, sizes: _Sizes) -> int:
    """KV blocks to serve with; refuses when there are too few."""
    if memory.weight_bytes + memory.runtime_bytes > gpu.memory_bytes:
        raise StartRefused(
            f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {memory.weight_bytes / GIB:.2f} GiB. "
            f"GPU 0 has a total capacity of {gpu.memory_bytes / GIB:.2f} GiB."
        )
    if memory.kv_blocks < 1:
        raise StartRefused(
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
            "initializing the engine."
        )
    blocks = options.integer("num_gpu_blocks_override") or memory.plain_blocks
    if blocks * sizes.block_size < sizes.max_model_len:
        needed = sizes.max_model_len / sizes.block_size * memory.plain_block_bytes
        raise StartRefused(
            f"ValueError: To serve at least one request with the model's max seq len ({sizes.max_model_len}), "
            f"{needed / GIB:.2f} GiB KV cache is needed, which is larger than the available KV cache memory "
            f"({blocks * memory.plain_block_bytes / GIB:.2f} GiB). Try increasing `gpu_memory_utilization` or "
            "decreasing `max_model_len` when initializing the engine."
        )
    return blocks


def _limits(options: Options, sizes: _Sizes, blocks: int) -> Limits:
    return Limits(
        num_blocks=blocks,
        block_size=sizes.block_size,
        max_num_seqs=sizes.max_num_seqs,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        enable_chunked_prefill=bool(options.configuration["enable_chunked_prefill"]),
        enable_prefix_caching=bool(options.configuration["enable_prefix_caching"]),
        scheduling_policy=Policy(options.text("scheduling_policy")),
        max_num_queued_reqs=options.integer("max_num_queued_reqs"),
    )


def read_step_times(path: Path) -> Affine:
    """Step times from a file: `{"format": "enova.step_times/v1", "base_s": ..., "sequence_s": ..., ...}`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartRefused(f"ValueError: --simulated-step-times {path}: {error}") from error
    if not isinstance(content, dict) or content.pop("format", None) != STEP_TIMES_FORMAT:
        raise StartRefused(f"ValueError: --simulated-step-times {path}: format must be {STEP_TIMES_FORMAT}")
    known = {field.name for field in fields(Affine)}
    wrong = [key for key, value in content.items() if key not in known or not _is_duration(value)]
    if wrong or content.get("base_s", 0) <= 0:
        raise StartRefused(
            f"ValueError: --simulated-step-times {path}: {', '.join(wrong) or 'base_s'}: seconds of at least 0 are "
            f"wanted for {', '.join(sorted(known))}, base_s above 0"
        )
    return Affine(**content)


def _is_duration(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
