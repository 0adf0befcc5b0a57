"""vLLM's interface as data: engine flags, metric names and buckets, exit codes; no decisions.

Checked against vLLM 0.32.0: its command-line parser and a captured `/metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

METRIC_PREFIX = "vllm:"


class FlagKind(StrEnum):
    """What a flag's value is."""

    INTEGER = "integer"
    NUMBER = "number"
    TEXT = "text"
    CHOICE = "choice"
    BOOLEAN = "boolean"  # --x or --no-x, without a value


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One engine flag that a configuration may set; `name` is in snake_case, as in configurations."""

    name: str
    kind: FlagKind
    minimum: float = -math.inf
    maximum: float = math.inf
    choices: tuple[str, ...] = ()

    @property
    def option(self) -> str:
        """The flag as vLLM's command line spells it: `--max-num-seqs`."""
        return "--" + self.name.replace("_", "-")

    @property
    def negative_option(self) -> str:
        """The flag that switches a boolean off: `--no-enforce-eager`."""
        return "--no-" + self.name.replace("_", "-")

    def problem(self, value: object) -> str | None:
        """What is wrong with a value, in words, or None."""
        match self.kind:
            case FlagKind.BOOLEAN:
                return None if isinstance(value, bool) else f"must be true or false, not {value!r}"
            case FlagKind.INTEGER | FlagKind.NUMBER:
                return self._number_problem(value)
            case FlagKind.TEXT:
                if isinstance(value, str) and value and not value.startswith("-"):
                    return None
                return f"must be a word that does not start with a dash, not {value!r}"
            case FlagKind.CHOICE:
                return None if value in self.choices else f"must be one of {', '.join(self.choices)}, not {value!r}"

    def _number_problem(self, value: object) -> str | None:
        kinds: tuple[type, ...] = (int,) if self.kind is FlagKind.INTEGER else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return f"must be a{' whole' if self.kind is FlagKind.INTEGER else ''} number, not {value!r}"
        if not self.minimum <= float(value) <= self.maximum:  # type: ignore[arg-type]
            form = ".0f" if self.kind is FlagKind.INTEGER else "g"
            return f"must lie between {self.minimum:{form}} and {self.maximum:{form}}, not {value!r}"
        return None


def _integer(name: str, minimum: int = 1, maximum: float = math.inf) -> Flag:
    return Flag(name=name, kind=FlagKind.INTEGER, minimum=minimum, maximum=maximum)


def _choice(name: str, *choices: str) -> Flag:
    return Flag(name=name, kind=FlagKind.CHOICE, choices=choices)


def _boolean(name: str) -> Flag:
    return Flag(name=name, kind=FlagKind.BOOLEAN)


# The allow-list: nothing else reaches an engine's command line from a deployment. What names files, addresses or
# code (plugins, templates, TLS, listening) is left out on purpose. The same names as the API's Configuration.
FLAGS: Mapping[str, Flag] = MappingProxyType({
    flag.name: flag
    for flag in (
        _integer("tensor_parallel_size", 1, 64),
        _integer("pipeline_parallel_size", 1, 64),
        _integer("data_parallel_size", 1, 1024),
        Flag(name="gpu_memory_utilization", kind=FlagKind.NUMBER, minimum=0.01, maximum=1.0),
        _integer("max_num_seqs", 1, 65536),
        _integer("max_num_batched_tokens", 1, 1 << 24),
        _integer("max_model_len", 1, 1 << 27),
        _choice("dtype", "auto", "bfloat16", "float", "float16", "float32", "half"),
        Flag(name="quantization", kind=FlagKind.TEXT),
        _choice("kv_cache_dtype", "auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"),
        _boolean("enable_prefix_caching"),
        _boolean("enable_chunked_prefill"),
        _boolean("enforce_eager"),
        _integer("block_size", 1, 4096),
        _integer("num_gpu_blocks_override", 1, 1 << 30),
        _choice("scheduling_policy", "fcfs", "priority"),
        _integer("max_num_queued_reqs", 1, 1 << 20),
        _integer("stream_interval", 1, 65536),
        _integer("seed", 0, (1 << 32) - 1),
        Flag(name="load_format", kind=FlagKind.TEXT),
        _boolean("enable_expert_parallel"),
    )
})

# What vLLM takes where a flag is absent. None: it depends on model or platform.
DEFAULTS: Mapping[str, int | float | str | bool | None] = MappingProxyType({
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "gpu_memory_utilization": 0.92,
    "max_num_seqs": None,
    "max_num_batched_tokens": None,
    "max_model_len": None,
    "dtype": "auto",
    "quantization": None,
    "kv_cache_dtype": "auto",
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "enforce_eager": False,
    "block_size": 16,
    "num_gpu_blocks_override": None,
    "scheduling_policy": "fcfs",
    "max_num_queued_reqs": None,
    "stream_interval": 1,
    "seed": 0,
    "load_format": "auto",
    "enable_expert_parallel": False,
})


class FinishReason(StrEnum):
    """Why a request ended: the `finished_reason` label of `request_success_total`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REPETITION = "repetition"


class ExitCode:
    """Exit codes of the API server. Zero says nothing: it ends so as well when its core process was killed."""

    CLEAN = 0
    FAILED_START = 1
    USAGE = 2
    INTERRUPTED_START = 130


class MetricKind(StrEnum):
    """The TYPE of a metric family."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric family, named without the prefix; counters without `_total`.

    `label` is the one label beside `model_name` and `engine`, with all its values; `buckets` are upper bounds without
    +Inf, empty for a histogram of tokens, whose bounds follow the context length (`token_buckets`).
    """

    name: str
    kind: MetricKind
    label: str = ""
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    per_engine: bool = True

    @property
    def series_name(self) -> str:
        """The full name of a sample; of a histogram, without `_bucket`, `_count`, `_sum`."""
        return METRIC_PREFIX + self.name + ("_total" if self.kind is MetricKind.COUNTER else "")


TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_LATENCY_BUCKETS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_LATENCY_BUCKETS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
ITERATION_TOKEN_BUCKETS = (
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
)  # fmt: skip


def token_buckets(max_model_len: int) -> tuple[float, ...]:
    """Bounds of the histograms of token counts: 1, 2, 5, 10, ... up to the context length."""
    bounds = []
    power = 1
    while power <= max_model_len:
        bounds += [float(power * step) for step in (1, 2, 5) if power * step <= max_model_len]
        power *= 10
    return tuple(bounds)


def _counter(name: str, label: str = "", *values: str, per_engine: bool = True) -> Metric:
    return Metric(name=name, kind=MetricKind.COUNTER, label=label, values=values, per_engine=per_engine)


def _gauge(name: str, label: str = "", *values: str) -> Metric:
    return Metric(name=name, kind=MetricKind.GAUGE, label=label, values=values)


def _histogram(name: str, buckets: tuple[float, ...] = ()) -> Metric:
    return Metric(name=name, kind=MetricKind.HISTOGRAM, buckets=buckets)


# Every family of the newest generation, in the order of the exposition. `cache_config_info` has labels of its own.
METRICS: tuple[Metric, ...] = (
    _counter("estimated_flops_per_gpu"),
    _counter("estimated_read_bytes_per_gpu"),
    _counter("estimated_write_bytes_per_gpu"),
    _gauge("num_requests_running"),
    _gauge("num_requests_waiting"),
    _gauge("num_requests_waiting_by_reason", "reason", "capacity", "deferred"),
    _gauge("engine_sleep_state", "sleep_state", "awake", "weights_offloaded", "discard_all"),
    _gauge("kv_cache_usage_perc"),
    _counter("prefix_cache_queries"),
    _counter("prefix_cache_hits"),
    _counter("external_prefix_cache_queries"),
    _counter("external_prefix_cache_hits"),
    _counter("mm_cache_queries"),
    _counter("mm_cache_hits"),
    _counter("num_preemptions"),
    _counter("prompt_tokens"),
    _counter("prompt_tokens_by_source", "source", "local_compute", "local_cache_hit", "external_kv_transfer"),
    _counter("prompt_tokens_cached"),
    _counter("prompt_tokens_cached_by_source", "source", "device", "host", "p2p", "disk", "external_unspecified"),
    _counter("generation_tokens"),
    _counter("request_success", "finished_reason", *FinishReason),
    _counter(
        "admission_rejections", "reason", "max_num_queued_reqs", "max_num_queued_tokens", per_engine=False
    ),
    _histogram("request_prompt_tokens"),
    _histogram("request_generation_tokens"),
    _histogram("iteration_tokens_total", ITERATION_TOKEN_BUCKETS),
    _histogram("request_max_num_generation_tokens"),
    _histogram("request_params_n", (1.0, 2.0, 5.0, 10.0, 20.0)),
    _histogram("request_params_max_tokens"),
    _histogram("time_to_first_token_seconds", TTFT_BUCKETS_S),
    _histogram("inter_token_latency_seconds", TOKEN_LATENCY_BUCKETS_S),
    _histogram("request_time_per_output_token_seconds", TOKEN_LATENCY_BUCKETS_S),
    _histogram("e2e_request_latency_seconds", REQUEST_LATENCY_BUCKETS_S),
    _histogram("request_queue_time_seconds", REQUEST_LATENCY_BUCKETS_S),
    _histogram("request_inference_time_seconds", REQUEST_LATENCY_BUCKETS_S),
    _histogram("request_prefill_time_seconds", REQUEST_LATENCY_BUCKETS_S),
    _histogram("request_decode_time_seconds", REQUEST_LATENCY_BUCKETS_S),
    _histogram("request_num_preemptions", (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)),
    _histogram("request_prefill_kv_computed_tokens"),
)

# Names that older generations used for the same thing, full as exposed: old -> new.
METRIC_ALIASES: Mapping[str, str] = MappingProxyType({
    "vllm:gpu_cache_usage_perc": "vllm:kv_cache_usage_perc",
    "vllm:gpu_prefix_cache_queries_total": "vllm:prefix_cache_queries_total",
    "vllm:gpu_prefix_cache_hits_total": "vllm:prefix_cache_hits_total",
    "vllm:time_per_output_token_seconds": "vllm:inter_token_latency_seconds",
})
