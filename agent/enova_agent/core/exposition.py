"""Prometheus text of an engine -> the few figures that frames carry.

A general parser takes 8 ms for vLLM's 57 kB: nearly a percent of a core for one replica at 1 Hz. An exposition has
the same series in the same order in every scrape, so the parser remembers on which line each wanted series stands: a
scrape is then one comparison and one float a wanted series, 0.1 ms in all. Where a line does not begin as remembered,
or the page has another length, it is learnt again.

Several data-parallel cores are several values of the label `engine`: counts are added, the KV use is averaged.
Where an engine shows a figure under its new and its old name at once, the newer name is taken alone.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import assert_never

from enova_agent.core.telemetry import EngineMetrics, Histogram
from enova_common import vllm

LINES_MAX = 20_000            # vLLM's own page has 700; over this the loop would stall for longer than a heartbeat
VALUE_MAX = float(2**53)      # beyond it a float cannot count; a thousand of them still fit into 64 bits
LAYOUT_USES_MAX = 300         # a line that changed its meaning in its place is found within so many pages

_INFINITY = float("inf")
_FINISHED = "finished_total"
_ITERATIONS = "iteration_tokens_total"  # a histogram over engine steps: its count is the number of steps

# vLLM's name, as exposed -> the figure of EngineMetrics.
_SCALARS: Mapping[str, str] = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_cache_usage",
    "vllm:prompt_tokens_total": "prompt_tokens_total",
    "vllm:generation_tokens_total": "generation_tokens_total",
    "vllm:num_preemptions_total": "preemptions_total",
    "vllm:prefix_cache_queries_total": "prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total": "prefix_cache_hits_total",
    "vllm:request_success_total": _FINISHED,
}
# The histograms that frames carry. Those of token counts have bounds that differ by context length and are not
# needed: counters give their means, request records their shape.
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "e2e_request_latency_seconds",
    _ITERATIONS,
)
BUCKETS: Mapping[str, tuple[float, ...]] = {
    metric.name: (*metric.buckets, _INFINITY) for metric in vllm.METRICS if metric.name in HISTOGRAMS
}


def _places(names: Mapping[str, str]) -> Mapping[str, tuple[str, int]]:
    """Every name by which a figure is exposed, with its rank: 0 for the newest."""
    older = {old: (names[new], 1) for old, new in vllm.METRIC_ALIASES.items() if new in names}
    return older | {name: (figure, 0) for name, figure in names.items()}


_SCALAR_PLACES = _places(_SCALARS)
_HISTOGRAM_PLACES = _places({vllm.METRIC_PREFIX + metric: metric for metric in HISTOGRAMS})

_CACHE_CONFIG = b"vllm:cache_config_info{"
_CACHE_TOKENS = re.compile(rb'kv_cache_size_tokens="(\d{1,15})"')
_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
_SERIES = re.compile(r'([A-Za-z_:][A-Za-z0-9_:]*)(?:\{((?:[A-Za-z_][A-Za-z0-9_]*="(?:[^"\\]|\\.)*",?)*)\})?')


class MalformedExposition(ValueError):
    """A page that holds nothing of an engine, or is over a bound."""


class _Part(Enum):
    VALUE = auto()
    BUCKET = auto()
    SUM = auto()


_HISTOGRAM_PARTS = {"bucket": _Part.BUCKET, "sum": _Part.SUM}


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where one series goes: a figure, under which of its names, and which bucket or label value of it."""

    figure: str
    rank: int                 # 0 is the newest name
    part: _Part
    key: str = ""
    bound: float = 0.0


@dataclass(frozen=True, slots=True)
class _HistogramPlan:
    """Which values make each bucket of vLLM's table, and which the sum."""

    metric: str
    rows: list[list[int]]
    sums: list[int]
    complete: bool
    run: slice | None         # the rows' values where they are one run in order, as in a page of one core


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the parser learnt of one page: where its values stand, and how figures are made of them."""

    lines: int                                # of the whole page
    places: list[tuple[int, bytes, int]]      # of each wanted value: its line, the text before it, that text's length
    scalars: list[tuple[str, list[int]]]      # figure -> values to combine
    finished: list[tuple[str, list[int]]]     # finished_reason -> values to add
    histograms: list[_HistogramPlan]
    kv_cache_tokens: float | None = None      # a label's value: it changes with the engine, hence with the page


class ExpositionParser:
    """Parses the pages of one engine. It holds what it learnt of their layout, nothing of their values."""

    def __init__(self) -> None:
        self._layout: _Layout | None = None
        self._uses = 0

    def parse(self, page: bytes) -> EngineMetrics:
        """The figures of one page. A value that cannot be one is left out and named in `error`."""
        lines = page.split(b"\n")
        if len(lines) > LINES_MAX:
            raise MalformedExposition(f"{len(lines)} lines, over the bound of {LINES_MAX}")
        layout, self._uses = self._layout, self._uses + 1
        values = None if layout is None or self._uses > LAYOUT_USES_MAX else _values(layout, lines)
        if layout is None or values is None:
            layout = self._layout = _learn(lines)
            self._uses = 0
            values = _values(layout, lines)
            assert values is not None, "a layout fits the page that it was learnt from"
        return _figures(layout, values)


def _values(layout: _Layout, lines: Sequence[bytes]) -> list[bytes] | None:
    """The text of each wanted value, or None if this page is laid out otherwise."""
    if len(lines) != layout.lines:
        return None
    values = []
    for index, before, size in layout.places:
        line = lines[index]
        if not line.startswith(before):
            return None
        values.append(line[size:])
    return values


def _learn(lines: Sequence[bytes]) -> _Layout:
    """The layout of a page; raises MalformedExposition for a line of vLLM's that is not a sample."""
    places: dict[bytes, int] = {}
    slots: list[_Slot] = []
    for index, line in enumerate(lines):
        key = line.rpartition(b" ")[0]
        slot = _slot(line, key)
        if slot is not None and key not in places:
            places[key] = index
            slots.append(slot)
    if not slots:
        raise MalformedExposition("no metric of vLLM's is on this page")
    befores = [(index, key + b" ") for key, index in places.items()]
    layout = _arranged(len(lines), [(index, before, len(before)) for index, before in befores], slots)
    return replace(layout, kv_cache_tokens=_kv_cache_tokens(lines))


def _kv_cache_tokens(lines: Sequence[bytes]) -> float | None:
    """Room of the KV cache, all data-parallel cores together; None where the engine does not say."""
    found = [_CACHE_TOKENS.search(line) for line in lines if line.startswith(_CACHE_CONFIG)]
    sizes = [float(match[1]) for match in found if match is not None]
    return sum(sizes) if sizes else None


def _slot(line: bytes, key: bytes) -> _Slot | None:
    if not line.startswith(vllm.METRIC_PREFIX.encode()):
        return None
    match = _SERIES.fullmatch(key.decode(errors="replace"))
    if match is None:
        raise MalformedExposition(f"not a sample: {line[:120].decode(errors='replace')}")
    name, labels = match[1], dict(_LABEL.findall(match[2] or ""))
    if name in _SCALAR_PLACES:
        figure, rank = _SCALAR_PLACES[name]
        return _Slot(figure, rank, _Part.VALUE, key=labels.get("finished_reason", ""))
    base, _, suffix = name.rpartition("_")
    if base not in _HISTOGRAM_PLACES or suffix not in _HISTOGRAM_PARTS:
        return None
    figure, rank = _HISTOGRAM_PLACES[base]
    try:
        bound = float(labels["le"]) if suffix == "bucket" else 0.0
    except (KeyError, ValueError) as error:
        raise MalformedExposition(f"a bucket without a bound: {line[:120].decode(errors='replace')}") from error
    return _Slot(figure, rank, _HISTOGRAM_PARTS[suffix], bound=bound)


def _arranged(lines: int, places: list[tuple[int, bytes, int]], slots: list[_Slot]) -> _Layout:
    """Gathers the slots of each figure, under the newest name that the page has."""
    newest: dict[str, int] = {}
    for slot in slots:
        newest[slot.figure] = min(slot.rank, newest.get(slot.figure, slot.rank))
    values: dict[str, list[int]] = {}
    finished: dict[str, list[int]] = {}
    buckets: dict[str, dict[float, list[int]]] = {}
    sums: dict[str, list[int]] = {}
    for place, slot in enumerate(slots):
        if slot.rank != newest[slot.figure]:
            continue
        match slot.part:
            case _Part.BUCKET:
                buckets.setdefault(slot.figure, {}).setdefault(slot.bound, []).append(place)
            case _Part.SUM:
                sums.setdefault(slot.figure, []).append(place)
            case _Part.VALUE if slot.figure == _FINISHED:
                finished.setdefault(slot.key, []).append(place)
            case _Part.VALUE:
                values.setdefault(slot.figure, []).append(place)
            case _:
                assert_never(slot.part)
    return _Layout(
        lines=lines,
        places=places,
        scalars=list(values.items()),
        finished=list(finished.items()),
        histograms=[_plan(metric, by_bound, sums.get(metric, [])) for metric, by_bound in sorted(buckets.items())],
    )


def _plan(metric: str, by_bound: Mapping[float, list[int]], sums: list[int]) -> _HistogramPlan:
    """How the counts of vLLM's table are read off the buckets that this engine has.

    Where its bounds differ from the table's, a count is that of the largest bound not above: never too high.
    """
    bounds = sorted(by_bound)
    rows = []
    for wanted in BUCKETS[metric]:
        below = [bound for bound in bounds if bound <= wanted]
        rows.append(by_bound[below[-1]] if below else [])
    flat = [place for row in rows for place in row]
    is_run = flat == list(range(flat[0], flat[0] + len(rows)))
    run = slice(flat[0], flat[0] + len(rows)) if is_run else None
    return _HistogramPlan(metric, rows, sums, complete=bool(sums) and bounds[-1] == _INFINITY, run=run)


def _figures(layout: _Layout, texts: Sequence[bytes]) -> EngineMetrics:
    values, error = _numbers(texts)
    figures: dict[str, float] = {}
    for figure, places in layout.scalars:
        parts = [values[place] for place in places]
        if None not in parts:
            total = sum(parts)  # type: ignore[arg-type]  # no None is left
            figures[figure] = total / len(parts) if figure == "kv_cache_usage" else total
    finished = {}
    for reason, places in layout.finished:
        parts = [values[place] for place in places]
        if None not in parts:
            finished[reason] = sum(parts)  # type: ignore[arg-type]
    histograms = []
    for plan in layout.histograms:
        try:
            histogram = _histogram(plan, values)
        except MalformedExposition as reason_:
            error = error or str(reason_)
            continue
        histograms.append(histogram)
        if plan.metric == _ITERATIONS:
            figures["iterations_total"] = float(histogram.counts[-1])
    return EngineMetrics(
        **figures,
        kv_cache_tokens=layout.kv_cache_tokens,
        finished_total=finished,
        histograms=tuple(histograms),
        error=error,
    )


def _numbers(texts: Sequence[bytes]) -> tuple[Sequence[float | None], str]:
    """The value of each text, None where it can be no count or gauge of an engine; and the first reason."""
    with contextlib.suppress(ValueError):  # it is found again below, by name
        numbers = list(map(float, texts))
        # NaN and infinity spoil the sum, so that this one look is enough for a page in order.
        if sum(numbers) <= VALUE_MAX and min(numbers) >= 0.0:
            return numbers, ""
    values: list[float | None] = []
    error = ""
    for text in texts:
        value = _number(text)
        values.append(value)
        if value is None:
            error = error or f"a metric has the value {text[:40].decode(errors='replace')}"
    return values, error


def _number(text: bytes) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0.0 <= value <= VALUE_MAX else None  # NaN compares false


def _histogram(plan: _HistogramPlan, values: Sequence[float | None]) -> Histogram:
    if not plan.complete:
        raise MalformedExposition(f"{plan.metric} has no +Inf bucket or no sum")
    try:
        if plan.run is not None:
            counts = list(map(int, values[plan.run]))  # type: ignore[arg-type]  # None: see below
        else:
            counts = [int(sum(values[i] for i in row)) for row in plan.rows]  # type: ignore[misc]
        total = float(sum(values[i] for i in plan.sums))  # type: ignore[misc]
    except TypeError as error:  # a None among the values: _numbers said why
        raise MalformedExposition(f"{plan.metric} has a value that is no count") from error
    if counts != sorted(counts):
        raise MalformedExposition(f"the buckets of {plan.metric} decrease")
    return Histogram(metric=plan.metric, counts=tuple(counts), sum=total)
