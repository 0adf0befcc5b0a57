"""What is asked of the recommender: from plain JSON values to a checked request, each problem with its field.

The field names are those of `RecommendConfigurationRequest`; the API, `enova recommend` and `enova_simulator.plan`
all pass through here, so that each refuses the same, in the same words.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any

from enova_recommender import catalog
from enova_recommender.performance import Correction
from enova_recommender.recommend.errors import RecommendError
from enova_recommender.recommend.types import LENGTHS_MAX, EngineSettings, InventoryNode, Objectives, Workload
from enova_recommender.shape import ShapeError, parse_shape
from enova_recommender.types import GpuModel, ModelShape, Parallelism, Precision

SAMPLE_PAIRS = 256        # of lengths that are given by percentiles
SAMPLE_STRIDE = 97        # coprime to it: pairs prompt and output lengths as if they were independent
TOKENS_MAX = 1e9           # of a length; far beyond every context
Z95 = NormalDist().inv_cdf(0.95)
GPUS_MAX = 100_000        # of one entry: more is a mistake
RATE_MAX = 1e6

LARGE_BYTES = 70 << 30    # of a GPU's memory, from which on vLLM's default batches are larger
KV_CACHE_DTYPES = ("auto", "fp8")

_FIELDS = (
    "model", "config_json", "gpus", "workload", "objectives", "max_gpus", "kv_cache_dtypes", "deployable", "current",
    "corrections",
)  # fmt: skip

Plain = Mapping[str, object]


class RequestError(RecommendError):
    """A request that cannot be answered, with what to do about it."""

    def __init__(self, field: str, message: str, remedy: str = "") -> None:
        super().__init__(field, message)
        self.remedy = remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class AdviceRequest:
    """A model, the GPUs to choose from, the workload and what it is promised."""

    shape: ModelShape
    nodes: tuple[InventoryNode, ...]
    workload: Workload
    objectives: Objectives
    max_gpus: int | None = None    # of all replicas together
    kv_cache_dtypes: tuple[str, ...] = ("auto",)
    deployable: bool = False       # only what a deployment can be given: one data-parallel rank
    current: EngineSettings | None = None  # that runs now, to be judged beside
    corrections: Mapping[str, Correction] = field(default_factory=dict)  # of step times, as live engines taught


def request_from_plain(plain: Plain) -> AdviceRequest:
    """The request of plain JSON values. Raises RequestError for the first thing that is wrong with it."""
    fields = _Fields(plain, "", _FIELDS)
    shape = _shape(fields)
    workload = _workload(fields.mapping("workload"), shape)
    max_gpus = fields.number("max_gpus", least=1) if fields.has("max_gpus") else None
    return AdviceRequest(
        shape=shape,
        nodes=_nodes(fields.items("gpus")),
        workload=workload,
        objectives=_objectives(fields.mapping("objectives")),
        max_gpus=None if max_gpus is None else int(max_gpus),
        kv_cache_dtypes=_kv_cache_dtypes(fields),
        current=_current(fields, shape) if fields.has("current") else None,
        corrections=_corrections(plain.get("corrections")),
        deployable=bool(plain.get("deployable", False)),
    )


class _Fields:
    """One mapping of a request with its path; everything that is read is checked."""

    def __init__(self, plain: object, path: str, known: Sequence[str]) -> None:
        if not isinstance(plain, Mapping):
            raise RequestError(path or "request", "must be a mapping")
        self._plain = plain
        self._path = path
        for name in plain:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                remedy = f"did you mean {close[0]}?" if close else f"known fields: {', '.join(known)}"
                raise RequestError(self.path(str(name)), "unknown field", remedy)

    def path(self, name: str) -> str:
        """The full path of a field."""
        return f"{self._path}.{name}" if self._path else name

    def has(self, name: str) -> bool:
        """Whether a field is given."""
        return self._plain.get(name) is not None

    def text(self, name: str) -> str:
        """A text, empty if absent."""
        value = self._plain.get(name) or ""
        if not isinstance(value, str):
            raise RequestError(self.path(name), f"must be a text, not {value!r}")
        return value

    def number(self, name: str, *, least: float, most: float = math.inf, default: float | None = None) -> float:
        """A finite number within bounds; absent without a default is an error."""
        value = self._plain.get(name)
        if value is None:
            if default is None:
                raise RequestError(self.path(name), "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RequestError(self.path(name), f"must be a finite number, not {value!r}")
        if not least <= value <= most:
            bound = f"at least {least:g}" if value < least else f"at most {most:g}"
            raise RequestError(self.path(name), f"must be {bound}, not {value:g}")
        return float(value)

    def positive(self, name: str, *, most: float = math.inf) -> float:
        """A number above zero."""
        value = self.number(name, least=-math.inf, most=most)
        if value <= 0:
            raise RequestError(self.path(name), f"must be more than 0, not {value:g}")
        return value

    def mapping(self, name: str) -> Plain:
        """A mapping, empty if absent."""
        value = self._plain.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise RequestError(self.path(name), "must be a mapping")
        return value

    def items(self, name: str) -> Sequence[object]:
        """A list, empty if absent."""
        value = self._plain.get(name)
        if value is None:
            return ()
        if not isinstance(value, list | tuple):
            raise RequestError(self.path(name), "must be a list")
        return value


def _shape(fields: _Fields) -> ModelShape:
    name, text = fields.text("model"), fields.text("config_json")
    if text:
        try:
            config = json.loads(text)
        except ValueError as error:
            raise RequestError("config_json", f"is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise RequestError("config_json", "must be a JSON object", "give the config.json that lies by the weights")
        try:
            return parse_shape(config, name=name or str(config.get("_name_or_path") or "model"))
        except ShapeError as error:
            message = str(error).removeprefix(f"{error.field}: ")
            raise RequestError(f"config_json.{error.field}", message) from error
    if not name:
        raise RequestError("model", "is missing", "give a model of the catalogue, or its config.json")
    shape = catalog.models().get(name)
    if shape is None:
        close = difflib.get_close_matches(name, catalog.models(), n=1)
        also = f", or did you mean {close[0]}?" if close else ""
        raise RequestError("model", f"{name[:120]!r} is not in the catalogue", f"give its config.json{also}")
    return shape


_DESCRIBED = ("memory_bytes", "bandwidth_bytes_per_s", "bf16_flops", "link_bytes_per_s")
_SUPPLY = ("type", "count", "gpus_per_node", "price_per_hour", *_DESCRIBED, "fp8_flops", "compute_capability")


def _nodes(items: Sequence[object]) -> tuple[InventoryNode, ...]:
    if not items:
        raise RequestError("gpus", "there is no GPU to choose", "give at least one type with its count, H100:8")
    nodes: list[InventoryNode] = []
    for index, item in enumerate(items):
        nodes += _supply(_Fields(item, f"gpus[{index}]", _SUPPLY), index)
    return tuple(nodes)


def _supply(fields: _Fields, index: int) -> list[InventoryNode]:
    gpu = _gpu(fields)
    count = int(fields.number("count", least=1, most=GPUS_MAX))
    per_node = int(fields.number("gpus_per_node", least=0, most=GPUS_MAX, default=0)) or max(1, gpu.island_gpus)
    sizes = [per_node] * (count // per_node) + ([count % per_node] if count % per_node else [])
    return [
        InventoryNode(
            name=f"{gpu.name.lower()}-{index}-{number}",
            gpu=gpu,
            gpus=size,
            island_gpus=min(size, max(1, gpu.island_gpus)),
        )
        for number, size in enumerate(sizes)
    ]


def _gpu(fields: _Fields) -> GpuModel:
    name = fields.text("type")
    if not name:
        raise RequestError(fields.path("type"), "is missing", "give a type of the catalogue, such as H100")
    known = catalog.find_gpu(name)
    if known is None:
        return _described(name, fields)
    price = fields.number("price_per_hour", least=0) if fields.has("price_per_hour") else known.price_per_hour
    if price is None or price <= 0:
        raise _priceless(fields, name)
    return replace(known, price_per_hour=price, **_stated(fields))


def _stated(fields: _Fields) -> dict[str, Any]:
    """What is said of a type that the catalogue knows too: it holds instead of the catalogue's."""
    given: dict[str, Any] = {
        field: fields.positive(field) for field in (*_DESCRIBED, "fp8_flops") if fields.has(field)
    }
    if "memory_bytes" in given:
        given["memory_bytes"] = int(given["memory_bytes"])
    if fields.has("compute_capability"):
        given["compute_capability"] = fields.number("compute_capability", least=1)
    return given


def described_gpus(rows: object) -> tuple[GpuModel, ...]:
    """The GPU types of an operator's file: rows as `gpus` of a request has them (counts are ignored), or as
    `catalog.parse_gpu` reads them. Raises RequestError."""
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise RequestError("gpus", "must be a list of GPU types", '[{"type": "H20", "price_per_hour": 1.5}]')
    return tuple(_described_gpu(row, f"gpus[{index}]") for index, row in enumerate(rows))


def _described_gpu(row: object, path: str) -> GpuModel:
    if not isinstance(row, Mapping) or "type" in row:
        return _gpu(_Fields(row, path, _SUPPLY))
    try:
        return catalog.parse_gpu(row, known=catalog.gpus())
    except catalog.GpuError as error:
        raise RequestError(f"{path}.{error.field}", str(error).removeprefix(f"{error.field}: ")) from error


def supply_row(gpu: GpuModel) -> dict[str, object]:
    """A type as `gpus` of a request takes it, without a count: what the catalogue does not say of it is stated."""
    known = catalog.find_gpu(gpu.name)
    row: dict[str, object] = {"type": gpu.name}
    if known is None or known.price_per_hour != gpu.price_per_hour:
        row["price_per_hour"] = gpu.price_per_hour
    for name in (*_DESCRIBED, "fp8_flops", "compute_capability"):
        value = getattr(gpu, name)
        if value is not None and (known is None or getattr(known, name) != value):
            row[name] = value
    return row


def _described(name: str, fields: _Fields) -> GpuModel:
    """A type that the catalogue does not know, by its own data sheet."""
    given = [field for field in _DESCRIBED if fields.has(field)]
    if not given:
        close = difflib.get_close_matches(name, catalog.gpus(), n=1)
        likely = f"did you mean {close[0]}? " if close else ""
        remedy = f"{likely}known are {', '.join(catalog.gpus())}; describe any other by {', '.join(_DESCRIBED)}"
        raise RequestError(fields.path("type"), f"{name[:80]!r} is not in the catalogue", remedy)
    if not fields.has("price_per_hour"):
        raise _priceless(fields, name)
    return GpuModel(
        name=name,
        driver_names=(),
        memory_bytes=int(fields.positive("memory_bytes")),
        bandwidth_bytes_per_s=fields.positive("bandwidth_bytes_per_s"),
        bf16_flops=fields.positive("bf16_flops"),
        fp8_flops=fields.positive("fp8_flops") if fields.has("fp8_flops") else None,
        link_bytes_per_s=fields.positive("link_bytes_per_s"),
        power_limit_w=0.0,
        idle_power_w=0.0,
        sm_clock_mhz=0.0,
        memory_clock_mhz=0.0,
        price_per_hour=fields.positive("price_per_hour"),
        source="the request",
        compute_capability=fields.number("compute_capability", least=1, default=8.0),
        island_gpus=int(fields.number("gpus_per_node", least=0, default=0)) or 8,
    )


def _priceless(fields: _Fields, name: str) -> RequestError:
    message = f"{name} has no price, so nothing can be called cheapest"
    remedy = "give what one costs an hour; any unit does, if all types have the same"
    return RequestError(fields.path("price_per_hour"), message, remedy)


def _kv_cache_dtypes(fields: _Fields) -> tuple[str, ...]:
    given = fields.items("kv_cache_dtypes") or ("auto",)
    for index, each in enumerate(given):
        if each not in KV_CACHE_DTYPES:
            raise RequestError(f"kv_cache_dtypes[{index}]", f"{each!r} is not one of {', '.join(KV_CACHE_DTYPES)}")
    return tuple(str(each) for each in given)


def _corrections(given: object) -> Mapping[str, Correction]:
    """Values that only our own processes hand over; no JSON says them."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(each, Correction) for each in given.values()):
        raise RequestError("corrections", "are learnt, not given", "leave them out")
    return given


def _current(fields: _Fields, shape: ModelShape) -> EngineSettings:
    """The configuration that runs now, by vLLM's flags and, where they say nothing, vLLM's defaults."""
    inner = _Fields(fields.mapping("current"), "current", ("gpu_type", "configuration", "gpu"))
    if inner.has("gpu"):  # one that the catalogue need not know
        stated = _gpu(_Fields(inner.mapping("gpu"), "current.gpu", _SUPPLY))
        return settings_of_flags(stated, inner.mapping("configuration"), shape)
    gpu = catalog.find_gpu(inner.text("gpu_type"))
    if gpu is None:
        raise RequestError("current.gpu_type", f"{inner.text('gpu_type')!r} is not in the catalogue")
    return settings_of_flags(gpu, inner.mapping("configuration"), shape)


def settings_of_flags(gpu: GpuModel, flags: Plain, shape: ModelShape) -> EngineSettings:
    """The settings that vLLM's flags stand for, with vLLM's own defaults."""
    # vLLM takes larger batches on cards of the H100's class and above.
    large = gpu.memory_bytes >= LARGE_BYTES and not gpu.name.startswith("A100")
    size = _Fields(flags, "current.configuration", tuple(flags))
    seqs = int(size.number("max_num_seqs", least=1, default=1024 if large else 256))
    tokens = int(size.number("max_num_batched_tokens", least=1, default=max(seqs, 8192 if large else 2048)))
    return EngineSettings(
        gpu=gpu,
        parallelism=Parallelism(
            tensor=int(size.number("tensor_parallel_size", least=1, default=1)),
            pipeline=int(size.number("pipeline_parallel_size", least=1, default=1)),
            data=int(size.number("data_parallel_size", least=1, default=1)),
            expert=bool(flags.get("enable_expert_parallel", False)),
        ),
        precision=Precision(
            dtype=size.text("dtype") or "auto",
            quantization=size.text("quantization") or None,
            kv_cache_dtype=size.text("kv_cache_dtype") or "auto",
        ),
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        gpu_memory_utilization=size.number("gpu_memory_utilization", least=0.01, most=1.0, default=0.92),
        max_model_len=int(size.number("max_model_len", least=1, default=shape.context_tokens)),
        enable_prefix_caching=bool(flags.get("enable_prefix_caching", True)),
    )


def _workload(plain: Plain, shape: ModelShape) -> Workload:
    names = ("requests_per_s", "lengths", "prompt_tokens", "output_tokens", "arrival_cv", "cached_prefix_share")
    fields = _Fields(plain, "workload", names)
    return Workload(
        requests_per_s=fields.positive("requests_per_s", most=RATE_MAX),
        lengths=_lengths(fields, shape),
        arrival_cv=fields.number("arrival_cv", least=0, most=100, default=1.0),
        cached_prefix_share=fields.number("cached_prefix_share", least=0, most=0.99, default=0.0),
    )


def _lengths(fields: _Fields, shape: ModelShape) -> tuple[tuple[int, int], ...]:
    given = fields.items("lengths")
    by_percentiles = fields.has("prompt_tokens") or fields.has("output_tokens")
    if bool(given) == by_percentiles:
        remedy = "prompt_tokens: {p50: 512, p95: 2048}, output_tokens: {p50: 128}"
        raise RequestError("workload.lengths", "give either lengths or prompt_tokens and output_tokens", remedy)
    context = shape.context_tokens
    if by_percentiles:
        prompt, output = _percentiles(fields, "prompt_tokens"), _percentiles(fields, "output_tokens")
        if prompt[0] + output[0] > context:
            raise _too_long("workload.prompt_tokens.p50", round(prompt[0] + output[0]), context)
        return tuple(_cut(pair, context) for pair in percentile_lengths(prompt, output))
    pairs = [_pair(item, f"workload.lengths[{index}]") for index, item in enumerate(given)]
    for index, pair in enumerate(pairs):
        if sum(pair) > context:
            raise _too_long(f"workload.lengths[{index}]", sum(pair), context)
    return thinned(pairs)


def _too_long(field: str, tokens: int, context: int) -> RequestError:
    message = f"a request of {tokens} tokens is more than the model's context of {context}"
    return RequestError(field, message, "leave such requests out, or choose another model")


def _cut(pair: tuple[int, int], context: int) -> tuple[int, int]:
    """A pair of the tail of a distribution, cut to what the engine would take."""
    prompt = min(pair[0], context - 1)
    return prompt, min(pair[1], context - prompt)


def _pair(item: object, path: str) -> tuple[int, int]:
    fields = _Fields(item, path, ("prompt_tokens", "output_tokens"))
    return int(fields.number("prompt_tokens", least=1)), int(fields.number("output_tokens", least=1))


def _percentiles(fields: _Fields, name: str) -> tuple[float, float]:
    """Median and 95th percentile; both beyond what any model reads are a slip of the pen."""
    inner = _Fields(fields.mapping(name), fields.path(name), ("p50", "p95"))
    p50 = inner.number("p50", least=1, most=TOKENS_MAX)
    p95 = inner.number("p95", least=0, most=TOKENS_MAX, default=0.0) or p50
    if p95 < p50:
        raise RequestError(inner.path("p95"), f"{p95:g} is less than p50, {p50:g}")
    return p50, p95


def thinned(pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """At most LENGTHS_MAX of the pairs, taken evenly over them."""
    if len(pairs) <= LENGTHS_MAX:
        return tuple(pairs)
    return tuple(pairs[index * len(pairs) // LENGTHS_MAX] for index in range(LENGTHS_MAX))


def percentile_lengths(prompt: tuple[float, float], output: tuple[float, float]) -> tuple[tuple[int, int], ...]:
    """A joint sample of log-normal lengths with these medians and 95th percentiles, independent of each other."""
    prompts, outputs = _log_normal(prompt), _log_normal(output)
    if prompt[0] == prompt[1] and output[0] == output[1]:
        return ((prompts[0], outputs[0]),)
    return tuple(
        (prompts[index], outputs[index * SAMPLE_STRIDE % SAMPLE_PAIRS]) for index in range(SAMPLE_PAIRS)
    )


def _log_normal(percentiles: tuple[float, float]) -> list[int]:
    p50, p95 = percentiles
    sigma = math.log(p95 / p50) / Z95
    normal = NormalDist()
    draws = (normal.inv_cdf((index + 0.5) / SAMPLE_PAIRS) for index in range(SAMPLE_PAIRS))
    return [max(1, round(p50 * math.exp(sigma * z))) for z in draws]


def _objectives(plain: Plain) -> Objectives:
    fields = _Fields(plain, "objectives", ("ttft_s", "tpot_s", "percentile"))
    return Objectives(
        ttft_s=fields.positive("ttft_s") if fields.has("ttft_s") else None,
        tpot_s=fields.positive("tpot_s") if fields.has("tpot_s") else None,
        percentile=fields.number("percentile", least=0.5, most=0.999, default=0.95),
    )
