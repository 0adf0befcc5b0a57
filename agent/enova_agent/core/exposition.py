"""Prometheus text of an engine -> the few figures that frames carry.

A general parser takes 8 ms for vLLM's 57 kB, which is most of a core's percent for one replica at 1 Hz. An
exposition repeats the same series in every scrape, so the parser remembers, for each series' text (name and
labels, as written), which figure it belongs to, if any: a scrape is then one dictionary look-up a line and one
float a wanted series. A series that is new, or gone, makes it learn the page again.

Several data-parallel cores are several values of the label `engine`: counts are added, the KV use is averaged.
Where an engine shows a figure under its new and its old name at once, the newer name is taken alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import pairwise
from typing import assert_never

from enova_agent.core.telemetry import EngineMetrics, Histogram
from enova_common import vllm

LINES_MAX = 20_000            # vLLM's own page has 700; over this the loop would stall for longer than a heartbeat
VALUE_MAX = float(2**63)      # counts become 64-bit integers on the wire

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

_LABEL = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
_SERIES = re.compile(r'([A-Za-z_:][A-Za-z0-9_:]*)(?:\{((?:[^"]|"(?:[^"\\]|\\.)*")*)\})?')


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


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the parser learnt of one page: where each line's value goes, and how figures are made of them."""

    places: dict[bytes, int | None]           # series text -> index of its value; None: not wanted
    size: int                                 # how many values are wanted
    scalars: list[tuple[str, list[int]]]      # figure -> values to combine
    finished: list[tuple[str, list[int]]]     # finished_reason -> values to add
    histograms: list[_HistogramPlan]


class ExpositionParser:
    """Parses the pages of one engine. It holds what it learnt of their layout, nothing of their values."""

    def __init__(self) -> None:
        self._layout: _Layout | None = None

    def parse(self, page: bytes) -> EngineMetrics:
        """The figures of one page. A value that cannot be one is left out and named in `error`."""
        lines = page.split(b"\n")
        if len(lines) > LINES_MAX:
            raise MalformedExposition(f"{len(lines)} lines, over the bound of {LINES_MAX}")
        values = None if self._layout is None else _values(self._layout, lines)
        if self._layout is None or values is None:
            self._layout = _learn(lines)
            values = _values(self._layout, lines)
            assert values is not None, "a layout fits the page that it was learnt from"
        return _figures(self._layout, values)


def _values(layout: _Layout, lines: Sequence[bytes]) -> list[bytes] | None:
    """The text of each wanted value, or None if this page has other series than the layout."""
    values: list[bytes | None] = [None] * layout.size
    places = layout.places
    for line in lines:
        key, _, value = line.rpartition(b" ")
        try:
            place = places[key]
        except KeyError:
            if not line.startswith(b"#"):
                return None
            continue
        if place is not None:
            values[place] = value
    found = [value for value in values if value is not None]
    return found if len(found) == len(values) else None


def _learn(lines: Sequence[bytes]) -> _Layout:
    """The layout of a page; raises MalformedExposition for a line of vLLM's that is not a sample."""
    places: dict[bytes, int | None] = {}
    slots: list[_Slot] = []
    for line in lines:
        key = line.rpartition(b" ")[0]
        slot = None if line.startswith(b"#") else _slot(line, key)
        if slot is None:
            places.setdefault(key, None)
        elif places.get(key) is None:
            places[key] = len(slots)
            slots.append(slot)
    if not slots:
        raise MalformedExposition("no metric of vLLM's is on this page")
    return _arranged(places, slots)


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


def _arranged(places: dict[bytes, int | None], slots: list[_Slot]) -> _Layout:
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
        places=places,
        size=len(slots),
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
    return _HistogramPlan(metric, rows, sums, complete=bool(sums) and bounds[-1] == _INFINITY)


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
    return EngineMetrics(**figures, finished_total=finished, histograms=tuple(histograms), error=error)


def _numbers(texts: Sequence[bytes]) -> tuple[list[float | None], str]:
    """The value of each text, None where it can be no count or gauge of an engine; and the first reason."""
    values: list[float | None] = []
    error = ""
    for text in texts:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if 0.0 <= value <= VALUE_MAX:  # false for NaN as well
            values.append(value)
        else:
            values.append(None)
            error = error or f"a metric has the value {text[:40].decode(errors='replace')}"
    return values, error


def _histogram(plan: _HistogramPlan, values: Sequence[float | None]) -> Histogram:
    if not plan.complete:
        raise MalformedExposition(f"{plan.metric} has no +Inf bucket or no sum")
    try:
        # The common case first: one core, one value a bucket.
        counts = [
            int(values[row[0]] if len(row) == 1 else sum(values[i] for i in row))  # type: ignore[arg-type,misc]
            for row in plan.rows
        ]
        total = float(sum(values[i] for i in plan.sums))  # type: ignore[misc]
    except TypeError as error:  # a None among the values: _numbers said why
        raise MalformedExposition(f"{plan.metric} has a value that is no count") from error
    if any(later < earlier for earlier, later in pairwise(counts)):
        raise MalformedExposition(f"the buckets of {plan.metric} decrease")
    return Histogram(metric=plan.metric, counts=tuple(counts), sum=total)
