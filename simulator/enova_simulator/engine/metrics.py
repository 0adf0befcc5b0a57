"""vLLM's `/metrics`, written fast: every series that the real server exposes, from the scheduler's own counts."""

from __future__ import annotations

import gc
import os
import platform
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path

from enova_common.vllm import METRICS, Metric, MetricKind, token_buckets

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"
HTTP_FINE_BUCKETS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0, 60.0,
)  # fmt: skip
HTTP_COARSE_BUCKETS_S = (0.1, 0.5, 1.0)
# Handlers that the real server leaves out of its HTTP metrics.
HTTP_EXCLUDED = frozenset({"/metrics", "/health", "/load", "/ping", "/version", "/server_info"})


class Histogram:
    """Counts by upper bound."""

    __slots__ = ("_counts", "bounds", "count", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.count = 0
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, so many times."""
        self._counts[bisect_left(self.bounds, value)] += times
        self.count += times
        self.sum += value * times

    def cumulative(self) -> Iterator[int]:
        """Counts up to each bound, +Inf last."""
        total = 0
        for count in self._counts:
            total += count
            yield total


class EngineMetrics:
    """The families of `enova_common.vllm.METRICS` for one engine."""

    def __init__(self, *, model_name: str, max_model_len: int, created_s: float, cache_config: dict[str, str]) -> None:
        self._created_s = created_s
        self._labels = f'engine="0",model_name="{_escaped(model_name)}"'
        self._plain_labels = f'model_name="{_escaped(model_name)}"'
        self._cache_config = ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(cache_config.items()))
        self._values: dict[tuple[str, str], float] = {}
        self._histograms: dict[str, Histogram] = {}
        for metric in METRICS:
            if metric.kind is MetricKind.HISTOGRAM:
                self._histograms[metric.name] = Histogram(metric.buckets or token_buckets(max_model_len))
            else:
                self._values.update({(metric.name, value): 0.0 for value in metric.values or ("",)})
        self.set("engine_sleep_state", 1.0, "awake")

    def add(self, name: str, amount: float, label: str = "") -> None:
        """Let a counter grow."""
        self._values[name, label] += amount

    def set(self, name: str, value: float, label: str = "") -> None:
        """Set a gauge."""
        self._values[name, label] = value

    def value(self, name: str, label: str = "") -> float:
        """A counter or gauge as it stands."""
        return self._values[name, label]

    def observe(self, name: str, value: float, times: int = 1) -> None:
        """Count a value in a histogram, so many times."""
        self._histograms[name].observe(value, times)

    def lines(self) -> Iterator[str]:
        """The exposition of all families."""
        for metric in METRICS:
            if metric.kind is MetricKind.HISTOGRAM:
                yield from self._histogram_lines(metric)
            else:
                yield from self._value_lines(metric)
        yield from _head("vllm:cache_config_info", "gauge")
        yield f"vllm:cache_config_info{{{self._cache_config}}} 1.0"

    def _value_lines(self, metric: Metric) -> Iterator[str]:
        yield from _head(metric.series_name, metric.kind)
        values = metric.values or ("",)
        series = [(self._label_text(metric, value), self._values[metric.name, value]) for value in values]
        for labels, number in series:
            yield f"{metric.series_name}{{{labels}}} {number!r}"
        if metric.kind is MetricKind.COUNTER:
            created = f"vllm:{metric.name}_created"
            yield from _head(created, "gauge")
            for labels, _ in series:
                yield f"{created}{{{labels}}} {self._created_s!r}"

    def _histogram_lines(self, metric: Metric) -> Iterator[str]:
        name, histogram = metric.series_name, self._histograms[metric.name]
        yield from _head(name, "histogram")
        engine, _, model = self._labels.partition(",")
        bounds = [*(repr(bound) for bound in histogram.bounds), "+Inf"]
        for bound, count in zip(bounds, histogram.cumulative(), strict=True):
            yield f'{name}_bucket{{{engine},le="{bound}",{model}}} {count}.0'
        yield f"{name}_count{{{self._labels}}} {histogram.count}.0"
        yield f"{name}_sum{{{self._labels}}} {float(histogram.sum)!r}"
        yield from _head(f"{name}_created", "gauge")
        yield f"{name}_created{{{self._labels}}} {self._created_s!r}"

    def _label_text(self, metric: Metric, value: str) -> str:
        if not metric.label:
            return self._labels
        common = self._labels if metric.per_engine else self._plain_labels
        pairs = [f'{metric.label}="{value}"', *common.split(",", 1)]
        return ",".join(sorted(pairs))


class HttpMetrics:
    """Requests by handler, method and status, as the real server's middleware counts them."""

    def __init__(self, created_s: float) -> None:
        self._created_s = created_s
        self._requests: dict[tuple[str, str, str], int] = {}
        self._sizes: dict[str, tuple[int, int, int]] = {}  # handler -> requests, request bytes, response bytes
        self._fine = Histogram(HTTP_FINE_BUCKETS_S)
        self._coarse: dict[tuple[str, str], Histogram] = {}

    def count(
        self, *, handler: str, method: str, status: int, request_bytes: int, response_bytes: int, duration_s: float
    ) -> None:
        """Count one answered request."""
        if handler in HTTP_EXCLUDED:
            return
        key = (handler, method, f"{status // 100}xx")
        self._requests[key] = self._requests.get(key, 0) + 1
        requests, received, sent = self._sizes.get(handler, (0, 0, 0))
        self._sizes[handler] = (requests + 1, received + request_bytes, sent + response_bytes)
        self._fine.observe(duration_s)
        self._coarse.setdefault((handler, method), Histogram(HTTP_COARSE_BUCKETS_S)).observe(duration_s)

    def lines(self) -> Iterator[str]:
        """The exposition."""
        total = {
            f'handler="{handler}",method="{method}",status="{status}"': count
            for (handler, method, status), count in self._requests.items()
        }
        yield from _head("http_requests_total", "counter")
        yield from (f"http_requests_total{{{labels}}} {count}.0" for labels, count in total.items())
        yield from self._created("http_requests", list(total))
        handlers = [f'handler="{handler}"' for handler in self._sizes]
        for index, name in ((1, "http_request_size_bytes"), (2, "http_response_size_bytes")):
            yield from _head(name, "summary")
            for labels, row in zip(handlers, self._sizes.values(), strict=True):
                yield f"{name}_count{{{labels}}} {row[0]}.0"
                yield f"{name}_sum{{{labels}}} {row[index]}.0"
            yield from self._created(name, handlers)
        yield from self._durations()

    def _durations(self) -> Iterator[str]:
        name = "http_request_duration_highr_seconds"
        yield from _head(name, "histogram")
        for bound, count in zip([*map(repr, HTTP_FINE_BUCKETS_S), "+Inf"], self._fine.cumulative(), strict=True):
            yield f'{name}_bucket{{le="{bound}"}} {count}.0'
        yield f"{name}_count {self._fine.count}.0"
        yield f"{name}_sum {float(self._fine.sum)!r}"
        yield from _head(f"{name}_created", "gauge")
        yield f"{name}_created {self._created_s!r}"
        name = "http_request_duration_seconds"
        yield from _head(name, "histogram")
        for (handler, method), histogram in self._coarse.items():
            bounds = [*map(repr, HTTP_COARSE_BUCKETS_S), "+Inf"]
            for bound, count in zip(bounds, histogram.cumulative(), strict=True):
                yield f'{name}_bucket{{handler="{handler}",le="{bound}",method="{method}"}} {count}.0'
            yield f'{name}_count{{handler="{handler}",method="{method}"}} {histogram.count}.0'
            yield f'{name}_sum{{handler="{handler}",method="{method}"}} {float(histogram.sum)!r}'
        yield from self._created(name, [f'handler="{handler}",method="{method}"' for handler, method in self._coarse])

    def _created(self, name: str, series: list[str]) -> Iterator[str]:
        yield from _head(f"{name}_created", "gauge")
        yield from (f"{name}_created{{{labels}}} {self._created_s!r}" for labels in series)


class ProcessMetrics:
    """What the Prometheus client tells of any Python process."""

    def __init__(self) -> None:
        self._start_s = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + _started_after_boot_s()

    def lines(self) -> Iterator[str]:
        """The exposition."""
        for name in ("collected", "uncollectable"):
            yield from _head(f"python_gc_objects_{name}_total", "counter")
            for generation, row in enumerate(gc.get_stats()):
                yield f'python_gc_objects_{name}_total{{generation="{generation}"}} {row[name]}.0'
        yield from _head("python_gc_collections_total", "counter")
        for generation, row in enumerate(gc.get_stats()):
            yield f'python_gc_collections_total{{generation="{generation}"}} {row["collections"]}.0'
        major, minor, patch = platform.python_version_tuple()
        yield from _head("python_info", "gauge")
        yield (
            f'python_info{{implementation="{platform.python_implementation()}",major="{major}",minor="{minor}",'
            f'patchlevel="{patch}",version="{platform.python_version()}"}} 1.0'
        )
        pages = Path("/proc/self/statm").read_text().split()
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        gauges = {
            "process_virtual_memory_bytes": int(pages[0]) * page_bytes,
            "process_resident_memory_bytes": int(pages[1]) * page_bytes,
            "process_start_time_seconds": self._start_s,
        }
        for name, value in gauges.items():
            yield from _head(name, "gauge")
            yield f"{name} {float(value)!r}"
        yield from _head("process_cpu_seconds_total", "counter")
        yield f"process_cpu_seconds_total {time.process_time()!r}"
        limits = {"process_open_fds": len(os.listdir("/proc/self/fd")), "process_max_fds": os.sysconf("SC_OPEN_MAX")}
        for name, value in limits.items():
            yield from _head(name, "gauge")
            yield f"{name} {float(value)!r}"


def _started_after_boot_s() -> float:
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    return int(ticks) / os.sysconf("SC_CLK_TCK")


def _head(name: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} Simulated: {name.partition(':')[2] or name}."
    yield f"# TYPE {name} {kind}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
