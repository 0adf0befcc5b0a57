"""Measured latencies and throughputs of real servers as rows of one form: what `recommender_latency` predicts.

Names of models, GPUs and sets end here: predictions see shapes and data sheets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np

from enova_recommender.catalog import find_gpu, find_model
from enova_recommender.types import Experts, GpuModel, LatentAttention, ModelShape, Parallelism, Precision, Recurrence
from enova_testing.benchmark import read_rows

# NVIDIA's 8- and 4-bit checkpoints (ModelOpt) ask for an 8-bit cache; so do the recipes for gpt-oss.
EIGHT_BIT_CACHE = frozenset({"fp8", "nvfp4"})
WEIGHTS = {"fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "nvfp4", "int4_wo": "int4"}


class Load(StrEnum):
    """How a server was loaded while it was measured."""

    CLOSED = "CLOSED"  # so many clients, each sending its next request when the last one is answered
    BATCH = "BATCH"    # one batch of equal requests, all at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured configuration. What was not measured is None."""

    data_set: str
    engine: str
    shape: ModelShape
    gpu: GpuModel
    parallelism: Parallelism
    precision: Precision
    load: Load
    prompt_tokens: int
    output_tokens: int
    concurrency: float
    ttft_s: float | None = None
    tpot_s: float | None = None
    tokens_per_s: float | None = None
    label: str = ""            # for raw results only
    source: str = ""           # which dump of a set a row comes from, for raw results only
    silicon: tuple[str, ...] = ()  # what the baseline AIConfigurator is asked with: model, system, quantisations, sizes

    @property
    def family(self) -> tuple[int, int, int]:
        """Layers, hidden size and experts: models that agree in these are one family."""
        shape = self.shape
        experts = max((b.feed_forward.experts for b in shape.blocks if isinstance(b.feed_forward, Experts)), default=0)
        return shape.layers, shape.hidden_size, experts

    @property
    def operations(self) -> frozenset[str]:
        """Kinds of operations that not every GPU was measured with."""
        found = set()
        for block in self.shape.blocks:
            if isinstance(block.feed_forward, Experts):
                found.add("experts")
            if isinstance(block.mixer, LatentAttention):
                found.add("latent")
            if isinstance(block.mixer, Recurrence):
                found.add("recurrence")
        return frozenset(found)


def silicon_rows(paths: Iterable[Path], unknown: set[str]) -> list[Row]:
    """Closed loops of several engines; of repeats the median, of equal repeats one."""
    repeats: dict[tuple[str, ...], set[tuple[float, float]]] = defaultdict(set)
    sources: dict[tuple[str, ...], str] = {}
    for row in told_once(row for path in paths for row in read_rows(path)):
        key = tuple(row[name] for name in _SILICON_KEY)
        if not (row["concurrency"] or row["batch_size"]):
            continue
        repeats[key].add((float(row["silicon_ttft_ms"]) / 1e3, float(row["silicon_tpot_ms"]) / 1e3))
        sources.setdefault(key, row["source"])
    rows = []
    for key, times in repeats.items():
        row = dict(zip(_SILICON_KEY, key, strict=True))
        shape, gpu = find_model(row["model_path"]), find_gpu(row["system"].removesuffix("_sxm"))
        if shape is None or gpu is None:
            unknown.add(row["model_path"] if shape is None else row["system"])
            continue
        ttft, tpot = np.median(np.array(sorted(times)), axis=0)
        rows.append(replace(_silicon_row(row, shape, gpu, float(ttft), float(tpot)), source=sources[key]))
    return rows


def told_once(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Rows without those that tell a measurement of fewer GPUs again under another layout.

    Two dumps of one measurement agree to the last digit of both times, and one of them may count its GPUs twice.
    """
    found: dict[tuple[object, ...], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        times = (round(float(row[name]), 2) for name in ("silicon_ttft_ms", "silicon_tpot_ms"))
        found[*(row[name] for name in _SILICON_LOAD), *times].append(row)
    kept = []
    for alike in found.values():
        fewest = min(silicon_gpus(row) for row in alike)
        kept += [row for row in alike if silicon_gpus(row) == fewest]
    return kept


_SILICON_LOAD = ("backend", "model_path", "system", "gemm_quant_mode", "isl", "osl", "concurrency")


def silicon_gpus(row: dict[str, str]) -> int:
    """GPUs of the server of a row."""
    tensor, stages, ranks, cut, spread = (
        int(float(row[name] or 1)) for name in ("tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    )
    return stages * max(tensor * ranks, cut * spread)


_SILICON_KEY = (
    "backend", "model_path", "system", "gemm_quant_mode", "moe_quant_mode", "isl", "osl", "concurrency",
    "batch_size", "tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size",
)  # fmt: skip


def _silicon_row(row: dict[str, str], shape: ModelShape, gpu: GpuModel, ttft_s: float, tpot_s: float) -> Row:
    tensor, stages, ranks, cut, spread = (int(float(row[name] or 1)) for name in _SILICON_KEY[-5:])
    ranks = max(ranks, cut * spread // tensor)  # GPUs of the experts beyond those of attention hold it again
    return Row(
        data_set="rec_silicon_concurrency", engine=row["backend"], shape=shape, gpu=gpu,
        precision=silicon_precision(row, shape),
        parallelism=Parallelism(tensor=tensor, pipeline=stages, data=ranks, expert=spread > 1), load=Load.CLOSED,
        prompt_tokens=int(row["isl"]), output_tokens=int(row["osl"]),
        concurrency=float(row["concurrency"] or ranks * float(row["batch_size"])),
        ttft_s=ttft_s, tpot_s=tpot_s, label=f"{row['model_path']} {row['system']} {_weights(row)}",
        silicon=tuple(row[name] for name in _SILICON_KEY),
    )  # fmt: skip


def silicon_precision(row: Mapping[str, str], shape: ModelShape) -> Precision:
    """How the server of a row keeps weights and cache."""
    weights = _weights(row)
    # A shape that is published in few bits keeps its own format unless the row names another method for it.
    own = shape.quantization == "mxfp4" or (shape.quantization is not None and weights in {"", "fp8", "int4_wo"})
    cached = "fp8" if weights in EIGHT_BIT_CACHE and shape.quantization != "fp8_block" else "auto"
    return Precision(quantization=None if own else WEIGHTS.get(weights), kv_cache_dtype=cached)


def _weights(row: Mapping[str, str]) -> str:
    return row["gemm_quant_mode"] or row["moe_quant_mode"]


_SPLITWISE_MODELS = {"llama2-70b": "meta-llama/Llama-2-70b-hf", "bloom-176b": "bigscience/bloom",
                     "Llama-3.1-8B": "meta-llama/Llama-3.1-8B-Instruct",
                     "Llama-3.2-3B": "meta-llama/Llama-3.2-3B-Instruct"}
_SPLITWISE_GPUS = {"a100-80gb": "A100-80G", "h100-80gb": "H100"}


def splitwise_rows(paths: Iterable[Path], unknown: set[str]) -> list[Row]:
    """Prefill and decode times of fixed batches; power-capped runs are left out, of repeats the median is taken."""
    repeats: dict[tuple[str, ...], list[tuple[float, float]]] = defaultdict(list)
    for path in paths:
        seconds = "seconds" in path.name  # times in seconds, token_time of the whole decode
        for row in read_rows(path):
            key = (str(seconds), *(row[name] for name in _SPLITWISE_KEY))
            steps = max(1, int(row["token_size"]) - 1)
            scale = 1.0 if seconds else 1e-3
            repeats[key].append((
                scale * float(row["prompt_time"]), scale * float(row["token_time"]) / (steps if seconds else 1)
            ))  # fmt: skip
    rows = []
    for key, times in repeats.items():
        late, model, hardware, tensor, prompt, batch, output = key
        shape, gpu = find_model(_SPLITWISE_MODELS.get(model, model)), find_gpu(_SPLITWISE_GPUS.get(hardware, hardware))
        if shape is None or gpu is None:
            unknown.add(model if shape is None else hardware)
            continue
        ttft, tpot = np.median(np.array(times), axis=0)
        rows.append(Row(
            data_set="perf_splitwise", engine="sageserve" if late == "True" else "splitwise", shape=shape, gpu=gpu,
            parallelism=Parallelism(tensor=int(tensor)), precision=Precision(dtype="float16"), load=Load.BATCH,
            prompt_tokens=int(prompt), output_tokens=int(output), concurrency=float(batch), ttft_s=float(ttft),
            tpot_s=float(tpot), label=f"{model} {hardware}",
        ))  # fmt: skip
    return rows


_SPLITWISE_KEY = ("model", "hardware", "tensor_parallel", "prompt_size", "batch_size", "token_size")
_BENCH_GPUS = {"Nvidia H100 GPU": "H100", "Nvidia A100 GPU": "A100-40G", "Nvidia GH200 GPU": "GH200",
               "AMD MI300X GPU": "MI300X", "AMD MI250 GPU": "MI250"}
_BENCH_ENGINES = frozenset({"vLLM", "TensorRT-LLM"})


def inference_bench_rows(paths: Iterable[Path], unknown: set[str]) -> list[Row]:
    """Throughput of fixed batches, prompt and output tokens together; of repeats the median."""
    repeats: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in (row for path in paths for row in read_rows(path)):
        if row["Framework"] in _BENCH_ENGINES and row["Throughput"]:
            repeats[tuple(row[name] for name in _BENCH_KEY)].append(float(row["Throughput"]))
    rows = []
    for (hardware, gpus, engine, model, length, batch), found in repeats.items():
        shape, gpu = find_model(model), find_gpu(_BENCH_GPUS.get(hardware, hardware))
        if shape is None or gpu is None:
            unknown.add(model if shape is None else hardware)
            continue
        rows.append(Row(
            data_set="perf_llm_inference_bench", engine=f"{engine} of 2024", shape=shape, gpu=gpu,
            parallelism=Parallelism(tensor=int(gpus)), precision=Precision(dtype="float16"), load=Load.BATCH,
            prompt_tokens=int(length), output_tokens=int(length), concurrency=float(batch),
            tokens_per_s=float(np.median(found)), label=f"{model} {hardware}",
        ))  # fmt: skip
    return [row for row in rows if row.tokens_per_s]


_BENCH_KEY = ("Hardware", "Num of Hardware", "Framework", "Model", "Input Output Length", "Batch Size")


def by_layout(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows that differ in their parallel layout only."""
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        key = (row.engine, row.shape, row.gpu, row.precision, row.prompt_tokens, row.output_tokens, row.concurrency)
        groups[key].append(row)
    yield from groups.values()
