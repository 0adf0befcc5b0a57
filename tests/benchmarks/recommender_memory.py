"""How well memory is predicted: KV tokens against vLLM's own counts, and what is said not to fit.

KV tokens. `vllm_runs`: metadata of recorded runs. `cpu_server`: a real vLLM on the CPU, if `.venv-vllm` is there,
started for a moment with two settings. `printed`: start-up lines that people published
(`tests/samples/vllm_kv_cache`, its README says what was used to set constants: rows called development are reported
apart and never counted in the headline). `cache_only`: tokens from the GiB that vLLM printed, so that the cut of the
cache is judged without the budget. The headline is the median over vllm_runs, cpu_server and held-out printed rows.

Does not fit. Every configuration of `rec_silicon_concurrency`, `rec_mlenergy`, `perf_llm_inference_bench` and
`perf_llm_pilot` was measured, so it must fit; each distinct one counts once. Its max_model_len is what its requests
need (where their lengths are not given, 4,096 tokens); the other settings are vLLM's defaults on that GPU.

Constructed negatives: catalogue models on catalogue GPUs whose weights alone, at their published precision, are 4 %
larger than all the memory, or whose weights and one sequence of the model's full context are.

Raw results: `tokens.csv.gz` (set, use, source, model, printed, predicted, ape), `weights.csv.gz` (source, model,
printed_gib, predicted_gib, ape), `measured.csv.gz` (set, model, gpu, gpus, parallel sizes, precision, max_model_len,
fits, missing_gib, largest), `negatives.csv.gz` (model, gpu, tensor, why, fits).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from enova_recommender import catalog
from enova_recommender.memory import MemoryFit, cache_layout, fit, fit_host, gpu_weight_bytes, overheads_of
from enova_recommender.shape import parse_shape
from enova_recommender.types import WEIGHT_FORMATS, GpuModel, ModelShape, Parallelism, Precision
from enova_testing.benchmark import SAMPLES, Benchmark, benchmark, read_rows, wilson

GIB = 1 << 30
ROOT = Path(__file__).parents[2]
PRINTED = SAMPLES / "vllm_kv_cache"
CONTEXT_TOKENS = 4096            # of a measured configuration whose lengths are unknown
CPU_SETTINGS: tuple[dict[str, str], ...] = ({}, {"max-model-len": "1024", "block-size": "32"})
CPU_START_S, CPU_STOP_S = 400.0, 60.0
CLEARLY = 1.04                   # times the memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One count of KV tokens and what was predicted: a row of the raw results."""

    set: str
    use: str
    source: str
    model: str
    printed: int
    predicted: int

    @property
    def ape(self) -> float:
        """Absolute error as a share of the printed count."""
        return abs(self.predicted - self.printed) / self.printed


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A configuration that somebody ran: a row of the raw results."""

    set: str
    model: str
    gpu: str
    gpus: int
    parallelism: Parallelism
    precision: Precision
    max_model_len: int
    backend: str = "vllm"


def shape_named(name: str, extra: Mapping[str, ModelShape]) -> ModelShape | None:
    """A model of the catalogue, whatever the case of its name or the account that published it."""
    known = {**catalog.models(), **extra}
    if name in known:
        return known[name]
    wanted = name.rsplit("/", 1)[-1].lower()
    return next((shape for other, shape in known.items() if other.rsplit("/", 1)[-1].lower() == wanted), None)


def extra_shapes() -> dict[str, ModelShape]:
    """Models of the printed rows that the catalogue has not."""
    configs = json.loads((PRINTED / "models.json").read_text(encoding="utf-8"))
    return {name: parse_shape(config, name=name) for name, config in configs.items()}


def version_of(text: str) -> tuple[int, int]:
    """Major and minor number."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


# KV tokens


def recorded(run: Benchmark) -> Iterator[Tokens]:
    """The counts in the metadata of recorded runs."""
    for path in run.files("vllm_runs", "*_meta.json"):
        meta = json.loads(path.read_text(encoding="utf-8"))
        printed = meta.get("kv_cache", {}).get("num_kv_tokens")
        if not printed:
            continue
        arguments, gpu = meta["engine_kwargs"], catalog.find_gpu(meta["hardware"]["device_name"])
        shape = shape_named(meta["model"], {})
        if gpu is None or shape is None:
            run.notes[path.name] = f"{meta['model']} on {meta['hardware']['device_name']} is not catalogued: left out"
            continue
        found = fit(
            shape, gpu,
            parallelism=Parallelism(tensor=arguments["tensor_parallel_size"]),
            precision=Precision(dtype=arguments["dtype"], kv_cache_dtype=arguments["kv_cache_dtype"]),
            gpu_memory_utilization=meta["kv_cache"]["gpu_memory_utilization"],
            max_num_batched_tokens=arguments["max_num_batched_tokens"], max_num_seqs=arguments["max_num_seqs"],
            max_model_len=arguments["max_model_len"], block_size=meta["kv_cache"]["block_size"],
            overheads=overheads_of(version_of(meta["vllm_version"])),
        )  # fmt: skip
        yield Tokens(set="vllm_runs", use="held_out", source=path.name, model=meta["model"], printed=printed,
                     predicted=found.kv_tokens)


def cpu_server(run: Benchmark) -> Iterator[Tokens]:
    """The counts of a real vLLM on this machine's CPU."""
    python, model = ROOT / ".venv-vllm/bin/python", ROOT / ".venv-vllm/tiny-model"
    if not python.exists():
        run.notes["cpu_server"] = "no .venv-vllm (make setup VLLM=1): left out"
        return
    shape = parse_shape(json.loads((model / "config.json").read_text(encoding="utf-8")), name="tiny")
    for settings in CPU_SETTINGS:
        printed = _cpu_tokens(python, model, settings)
        if printed is None:
            run.notes["cpu_server"] = f"no KV cache size within {CPU_START_S:.0f} s with {settings}: left out"
            continue
        length = int(settings.get("max-model-len", shape.context_tokens))
        found = fit_host(shape, kv_cache_bytes=GIB, max_model_len=length,
                         precision=Precision(dtype="float32"), block_size=int(settings.get("block-size", 128)))
        yield Tokens(set="cpu_server", use="held_out", source=str(settings), model="tiny", printed=printed,
                     predicted=found.kv_tokens)


def _cpu_tokens(python: Path, model: Path, settings: Mapping[str, str]) -> int | None:
    """The KV cache size of one start; None if it printed none."""
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    words = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32",
             "--enforce-eager", "--max-num-seqs", "16", "--port", "0",
             *(word for name, value in settings.items() for word in (f"--{name}", value))]
    with tempfile.TemporaryFile("w+") as log:
        engine = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + CPU_START_S
            while time.monotonic() < deadline:
                log.seek(0)
                if line := re.search(r"KV cache size: ([\d,]+) tokens", log.read()):
                    return int(line[1].replace(",", ""))
                if engine.poll() is not None:
                    return None
                time.sleep(1)
            return None
        finally:
            _end(engine)


def _end(engine: subprocess.Popen[bytes]) -> None:
    """Let the engine put away its shared memory, and kill it only if it does not."""
    engine.terminate()
    try:
        engine.wait(CPU_STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(engine.pid, signal.SIGKILL)
        engine.wait()


def printed_rows() -> list[dict[str, str]]:
    """The shipped table."""
    return list(read_rows(PRINTED / "printed.csv"))


def published(rows: Iterable[Mapping[str, str]], shapes: Mapping[str, ModelShape], run: Benchmark) -> Iterator[Tokens]:
    """The counts that people published, and tokens from the GiB that were printed with them."""
    for row in rows:
        if not row["available_gib"]:
            continue
        shape = shape_named(row["model"], shapes)
        if shape is None:
            run.notes[row["model"]] = "not catalogued: left out"
            continue
        length = int(row["max_model_len"] or shape.context_tokens)
        count = round(float(row["concurrency"]) * length) if not row["kv_tokens"] else int(row["kv_tokens"])
        whole = Tokens(set="printed", use="cache_only", source=row["source"], model=row["model"], printed=count,
                       predicted=0)
        layout = cache_layout(shape, precision_of(row), parallelism=parallelism_of(row),
                              enable_prefix_caching=row["prefix_caching"] == "1")
        blocks = int(float(row["available_gib"]) * GIB) // layout.block_bytes
        # One batch in flight, as releases had it before steps overlapped.
        tokens = layout.tokens(blocks, length, in_flight_tokens=int(row["max_num_batched_tokens"] or 8192))
        yield replace(whole, predicted=tokens)
        if row["use"] in {"development", "held_out"}:
            yield replace(whole, use=row["use"], predicted=fit_of(row, shape).kv_tokens)


def precision_of(row: Mapping[str, str]) -> Precision:
    """Element types of a printed row."""
    return Precision(
        dtype=row["dtype"], quantization=row["quantization"] or None, kv_cache_dtype=row["kv_cache_dtype"]
    )


def parallelism_of(row: Mapping[str, str]) -> Parallelism:
    """Parallel sizes of a printed row."""
    return Parallelism(tensor=int(row["tensor"]), expert=row["expert"] == "1")


def fit_of(row: Mapping[str, str], shape: ModelShape) -> MemoryFit:
    """What we say of a printed row."""
    return fit(
        shape, catalog.gpus()[row["gpu"]], parallelism=parallelism_of(row), precision=precision_of(row),
        gpu_memory_utilization=float(row["gpu_memory_utilization"]),
        max_num_batched_tokens=int(row["max_num_batched_tokens"]), max_num_seqs=int(row["max_num_seqs"]),
        max_model_len=int(row["max_model_len"]), enable_prefix_caching=row["prefix_caching"] == "1",
        enforce_eager=row["enforce_eager"] == "1", overheads=overheads_of(version_of(row["vllm"])),
    )  # fmt: skip


def weights_of(rows: Iterable[Mapping[str, str]], shapes: Mapping[str, ModelShape]) -> Iterator[dict[str, object]]:
    """Printed weights of a GPU against ours, one row for each model and layout."""
    seen = set()
    for row in rows:
        shape = shape_named(row["model"], shapes)
        key = (row["model"], row["tensor"], row["quantization"], row["weights_gib"][:5])
        if shape is None or not row["weights_gib"] or key in seen:
            continue
        seen.add(key)
        ours = gpu_weight_bytes(shape, parallelism=parallelism_of(row), precision=precision_of(row)) / GIB
        printed = float(row["weights_gib"])
        yield {"source": row["source"], "model": row["model"], "printed_gib": printed, "predicted_gib": ours,
               "ape": abs(ours - printed) / printed}


# Measured configurations


def measured(run: Benchmark) -> Iterator[Measured]:
    """All that were run, repeats included."""
    for path in run.files("rec_silicon_concurrency", "agg*.csv.gz"):
        yield from map(_silicon, read_rows(path))
    for path in run.files("rec_mlenergy", "configs*.csv.gz"):
        rows = (row for row in read_rows(path) if row["task"] in {"lm-arena-chat", "gpqa", "sourcegraph-fim"})
        yield from map(_mlenergy, rows)
    for path in run.files("perf_llm_inference_bench", "all_results*.csv.gz"):
        for row in read_rows(path):
            gpus = int(float(row["Num of Hardware"])) * DIES.get(gpu_word(row["Hardware"]), 1)
            yield Measured(set="perf_llm_inference_bench", model=row["Model"], gpu=row["Hardware"], gpus=gpus,
                           parallelism=Parallelism(tensor=gpus), precision=Precision(), backend=row["Framework"],
                           max_model_len=2 * int(float(row["Input Output Length"])))
    for path in run.files("perf_llm_pilot", "aggregated*.csv.gz"):
        for row in read_rows(path):
            gpus = int(row["n_gpus"])
            # The server loads in 16 bits whatever the checkpoint says, and Turing and older have no bfloat16.
            yield Measured(set="perf_llm_pilot", model=row["model"], gpu=row["gpu_type"], gpus=gpus,
                           parallelism=Parallelism(tensor=gpus), precision=Precision(dtype="float16"), backend="tgi",
                           max_model_len=2048)


def _silicon(row: Mapping[str, str]) -> Measured:
    sizes = {key: int(float(row[key] or 1)) for key in (
        "tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")}
    experts = sizes["moe_tp_size"] * sizes["moe_ep_size"]
    data = max(sizes["attention_dp_size"], experts // sizes["tp_size"] if experts > sizes["tp_size"] else 1)
    layout = Parallelism(tensor=sizes["tp_size"], pipeline=sizes["pp_size"], data=data, expert=sizes["moe_ep_size"] > 1)
    names = {"nvfp4": "nvfp4", "fp8": "fp8", "fp8_block": "fp8_block", "int4_wo": "int4", "": None}
    precision = Precision(quantization=names.get(row["moe_quant_mode"] or row["gemm_quant_mode"]))
    return Measured(
        set="rec_silicon_concurrency", model=row["model_path"], gpu=row["system"], gpus=layout.gpus,
        parallelism=layout, precision=precision, backend=row["backend"],
        max_model_len=int(float(row["isl"]) + float(row["osl"])),
    )  # fmt: skip


def _mlenergy(row: Mapping[str, str]) -> Measured:
    gpus, data = int(row["num_gpus"]), int(row["data_parallel"])
    layout = Parallelism(tensor=gpus // data, data=data, expert=int(row["expert_parallel"]) > 1)
    return Measured(set="rec_mlenergy", model=row["model_id"], gpu=row["gpu_model"], gpus=gpus, parallelism=layout,
                    precision=Precision(), max_model_len=CONTEXT_TOKENS)


GPU_WORDS = ("nvidia", "amd", "gpu", "_sxm", "sxm")
DIES = {"mi250": 2}              # GPUs that the driver sees of one board
ALIASES = {"a100": "A100-40G", "v100": "V100-16G", "a10": "A10"}


def gpu_word(name: str) -> str:
    """What is left of a set's name for a GPU without its maker."""
    plain = name.lower()
    for word in GPU_WORDS:
        plain = plain.replace(word, "")
    return plain.strip(" _")


def gpu_named(name: str) -> GpuModel | None:
    """A catalogue GPU by the words that a set has for it."""
    plain = gpu_word(name)
    return catalog.find_gpu(ALIASES.get(plain, plain)) or catalog.find_gpu(name)


def judge(rows: Iterable[Measured], shapes: Mapping[str, ModelShape], run: Benchmark) -> Iterator[dict[str, object]]:
    """Whether we say that each distinct configuration fits."""
    for row in dict.fromkeys(rows):
        shape, gpu = shape_named(row.model, shapes), gpu_named(row.gpu)
        if shape is None or gpu is None:
            run.notes[row.model if shape is None else row.gpu] = "not catalogued: left out"
            continue
        if row.precision.quantization not in {*WEIGHT_FORMATS, None}:
            run.notes[str(row.precision.quantization)] = "precision not known: left out"
            continue
        precision = row.precision
        if shape.quantization and precision.quantization and shape.quantization != precision.quantization:
            shape = replace(shape, quantization=None, plain_parts=())
        large = gpu.memory_bytes >= 70 * GIB and not gpu.name.startswith("A100")  # as vLLM sets its own defaults
        found = fit(
            shape, gpu, parallelism=row.parallelism, precision=precision, max_model_len=row.max_model_len,
            max_num_batched_tokens=8192 if large else 2048, max_num_seqs=1024 if large else 256,
        )  # fmt: skip
        item, size = found.items[0]
        yield {
            "set": row.set, "model": row.model, "gpu": gpu.name, "gpus": row.gpus, "backend": row.backend,
            **{f"{key}_parallel": value for key, value in asdict(row.parallelism).items()},
            "quantization": precision.quantization, "max_model_len": row.max_model_len, "fits": found.fits,
            "missing_gib": found.missing_bytes / GIB, "largest": item, "largest_gib": size / GIB,
        }  # fmt: skip


# Constructed negatives


def negatives() -> Iterator[dict[str, object]]:
    """Catalogue models on GPUs that cannot hold them, by arithmetic that uses nothing of the memory model."""
    for name, shape in catalog.models().items():
        published = checkpoint_bytes(shape)
        for gpu in catalog.gpus().values():
            for tensor in (1, 2, 4, 8):
                if shape.attention_heads % tensor:
                    continue
                memory = tensor * gpu.memory_bytes
                context = 2 * shape.kv_elements_per_token * shape.context_tokens if not _shrinks(shape) else 0
                if published > CLEARLY * memory:
                    why = "weights"
                elif published + context > CLEARLY * memory:
                    why = "context"
                else:
                    continue
                found = fit(shape, gpu, parallelism=Parallelism(tensor=tensor))
                yield {"model": name, "gpu": gpu.name, "tensor": tensor, "why": why, "fits": found.fits}


def checkpoint_bytes(shape: ModelShape) -> float:
    """Bytes of a checkpoint: what quantisation covers at its bits, the rest in 16."""
    if shape.quantization is None:
        return 2.0 * shape.parameters
    packed = WEIGHT_FORMATS[shape.quantization].element_bytes
    return packed * shape.quantized_parameters + 2.0 * (shape.parameters - shape.quantized_parameters)


def _shrinks(shape: ModelShape) -> bool:
    """Whether the cache of a long sequence is smaller than its tokens say."""
    windows = any(getattr(mixer, "window_tokens", None) for _, mixer in shape.attention_layers)
    return windows or shape.kv_cache_dtype is not None


def figures(tokens: Sequence[Tokens]) -> dict[str, object]:
    """Error of a set of counts."""
    errors = [row.ape for row in tokens]
    signed = [row.predicted / row.printed - 1 for row in tokens]
    return {
        "rows": len(errors),
        "ape_p50": float(np.median(errors)) if errors else None,
        "ape_p90": float(np.quantile(errors, 0.9)) if errors else None,
        "bias_p50": float(np.median(signed)) if signed else None,
    }


def main() -> None:
    """Run it."""
    run = benchmark("recommender_memory", __doc__)
    shapes, rows = extra_shapes(), printed_rows()
    tokens = [*recorded(run), *cpu_server(run), *published(rows, shapes, run)]
    run.write("tokens", [{**asdict(row), "ape": row.ape} for row in tokens])
    run.table("KV tokens", [
        {"set": row.set, "use": row.use, "model": row.model, "source": row.source[-30:], "printed": row.printed,
         "predicted": row.predicted, "error": row.predicted / row.printed - 1}
        for row in tokens
    ])
    weights = list(weights_of(rows, shapes))
    run.write("weights", weights)
    run.table("Weights of a GPU, GiB", weights)
    judged = list(judge(measured(run), shapes, run))
    run.write("measured", judged)
    by_set = {}
    for name in sorted({str(row["set"]) for row in judged}):
        of_set = [row for row in judged if row["set"] == name]
        wrong = [row for row in of_set if not row["fits"]]
        by_set[name] = {"rows": len(of_set), "said_not_to_fit": len(wrong), "interval": wilson(len(wrong), len(of_set))}
    run.table("Measured, but said not to fit", [row for row in judged if not row["fits"]][:40])
    caught = list(negatives())
    run.write("negatives", caught)
    headline = [row for row in tokens if row.use == "held_out"]
    refused = sum(not row["fits"] for row in judged)
    run.end({
        "kv_tokens_ape_p50": figures(headline)["ape_p50"],
        "kv_tokens_ape_p90": figures(headline)["ape_p90"],
        "kv_tokens_rows": len(headline),
        "by_set": {name: figures([row for row in headline if row.set == name])
                   for name in ("vllm_runs", "cpu_server", "printed")},
        "development": figures([row for row in tokens if row.use == "development"]),
        "cache_only": figures([row for row in tokens if row.use == "cache_only"]),
        "weights_ape_p50": float(np.median([float(str(row["ape"])) for row in weights])),
        "false_does_not_fit": refused / len(judged) if judged else None,
        "false_does_not_fit_interval": wilson(refused, len(judged)),
        "measured_configurations": len(judged), "measured_by_set": by_set,
        "constructed_negatives": len(caught),
        "constructed_negatives_caught": sum(not row["fits"] for row in caught) / len(caught),
    })


if __name__ == "__main__":
    main()
