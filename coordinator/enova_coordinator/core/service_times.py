"""Where the time of requests goes: sums of what ingresses and engines counted, and their differences. Pure.

Theory of operation. Ingresses send sketches of each interval, engines expose histograms that grow since their start;
both are added up here per deployment, so that two such sums of the same deployment, one older, differ by what
happened in between. Means are sums over counts, hence exact; percentiles are as fine as the buckets that they fall in,
and say so: a sketch's are 2 % wide, those of vLLM's request histograms begin at 0.3 s.

A mean request spends its time in the ingress's queue, then in the engine's, in its prefill and in its decode.
What is left of the time end to end is not lost but named: the remainder holds HTTP on both hops, tokenising before
the engine's queue, and detokenising and streaming after the last token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from enova_coordinator.core.model import Replica
from enova_coordinator.core.sketch import GAMMA, MergedSketch

E2E, TTFT, TPOT, QUEUE = "e2e_s", "ttft_s", "tpot_s", "queue_s"
ENGINE_PARTS: Mapping[str, str] = {
    "engine_queue": "request_queue_time_seconds",
    "prefill": "request_prefill_time_seconds",
    "decode": "request_decode_time_seconds",
}
INTER_TOKEN = "inter_token_latency_seconds"  # noqa: S105  # a metric's name
FIRST_TOKEN = "time_to_first_token_seconds"  # noqa: S105
PART_NAMES = ("ingress_queue", *ENGINE_PARTS, "remainder")


@dataclass(frozen=True, slots=True)
class HistogramCounts:
    """Counts up to each bound of vLLM's table, the last for all, and the sum of the values."""

    counts: NDArray[np.int64]
    sum: float

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts[-1])

    def plus(self, other: HistogramCounts) -> HistogramCounts:
        """Both together."""
        return HistogramCounts(self.counts + other.counts, self.sum + other.sum)

    def minus(self, older: HistogramCounts) -> HistogramCounts:
        """What came since `older`; a histogram that shrank began anew."""
        counts = self.counts - older.counts
        if counts.min() < 0:
            return self
        return HistogramCounts(counts, max(0.0, self.sum - older.sum))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCounters:
    """What one engine had counted since its start when it was looked at; None: it did not say."""

    instance: str
    steps: float | None = None
    prompt_tokens: float | None = None
    cached_tokens: float | None = None
    preemptions: float | None = None
    kv_cache_tokens: float | None = None   # room, no counter
    histograms: Mapping[str, HistogramCounts] = field(default_factory=dict)


def change(new: EngineCounters, old: EngineCounters | None) -> EngineCounters | None:
    """What an engine counted since it was last looked at; None at the first look, which is nobody's past."""
    if old is None:
        return None
    if new.instance != old.instance:  # a new engine: all that it has counted is new
        return new
    return EngineCounters(
        instance=new.instance,
        steps=_grown(new.steps, old.steps),
        prompt_tokens=_grown(new.prompt_tokens, old.prompt_tokens),
        cached_tokens=_grown(new.cached_tokens, old.cached_tokens),
        preemptions=_grown(new.preemptions, old.preemptions),
        kv_cache_tokens=new.kv_cache_tokens,
        histograms={
            metric: counts.minus(old.histograms[metric]) if metric in old.histograms else counts
            for metric, counts in new.histograms.items()
        },
    )


def _grown(new: float | None, old: float | None) -> float | None:
    if new is None or old is None:
        return None
    return new - old if new >= old else new


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLook:
    """What one engine did between two looks: its counters' change, and its gauges on mean while it ran anything."""

    replica: Replica
    time_s: float
    change: EngineCounters
    running: float                 # NaN: it ran nothing, or nobody measured
    kv_cache_usage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSums:
    """All that was counted of a deployment's requests up to `time_s` (model time)."""

    time_s: float
    sketches: Mapping[str, MergedSketch] = field(default_factory=dict)
    histograms: Mapping[str, HistogramCounts] = field(default_factory=dict)

    def minus(self, older: ServiceSums) -> ServiceSums:
        """What came since `older`."""
        return ServiceSums(
            time_s=self.time_s,
            sketches={
                name: sketch.minus(older.sketches[name]) if name in older.sketches else sketch
                for name, sketch in self.sketches.items()
            },
            histograms={
                metric: counts.minus(older.histograms[metric]) if metric in older.histograms else counts
                for metric, counts in self.histograms.items()
            },
        )


@dataclass(frozen=True, slots=True)
class Quantile:
    """A percentile and the bucket that it fell into."""

    value_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePart:
    """One part of the time of requests; None where nothing was measured."""

    name: str
    count: int = 0
    sum_s: float = 0.0
    mean_s: float | None = None
    share: float | None = None
    p50: Quantile | None = None
    p95: Quantile | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceTimes:
    """The deconstruction: the means of `parts` add up to that of `end_to_end`, where all of them were measured."""

    end_to_end: TimePart
    parts: tuple[TimePart, ...]
    ttft: TimePart
    tpot: TimePart
    notes: tuple[str, ...] = ()


def service_times(sums: ServiceSums, *, bounds: Mapping[str, Sequence[float]]) -> ServiceTimes:
    """The parts of the time of a mean request. `bounds` are those of each histogram, without +Inf."""
    whole = _of_sketch("end_to_end", sums.sketches.get(E2E), None)
    parts = [_of_sketch("ingress_queue", sums.sketches.get(QUEUE), whole.mean_s)]
    parts += [
        _of_histogram(name, sums.histograms.get(metric), bounds[metric], whole.mean_s)
        for name, metric in ENGINE_PARTS.items()
    ]
    parts.append(_remainder(whole, parts))
    return ServiceTimes(
        end_to_end=whole,
        parts=tuple(parts),
        ttft=_of_sketch("ttft", sums.sketches.get(TTFT), None),
        tpot=_of_sketch("tpot", sums.sketches.get(TPOT), None),
        notes=tuple(_notes(whole, parts)),
    )


def _remainder(whole: TimePart, parts: Sequence[TimePart]) -> TimePart:
    means = [part.mean_s for part in parts if part.mean_s is not None]
    if whole.mean_s is None or len(means) < len(parts):
        return TimePart(name="remainder")
    mean_s = whole.mean_s - sum(means)
    return TimePart(
        name="remainder",
        count=whole.count,
        sum_s=mean_s * whole.count,
        mean_s=mean_s,
        share=mean_s / whole.mean_s if whole.mean_s else None,
    )


def _notes(whole: TimePart, parts: Sequence[TimePart]) -> list[str]:
    if whole.count == 0:
        return ["no request was answered in full in this window"]
    found = [
        f"{part.name}: nothing was measured, so that the parts do not add up"
        for part in parts[:-1]
        if part.mean_s is None
    ]
    counts = {part.count for part in parts[:-1] if part.count}
    if counts and max(counts) - min({*counts, whole.count}) > max(1, 0.02 * whole.count):
        found.append(
            f"of {whole.count} answered requests the parts saw {min(counts)} to {max(counts)}: means of different"
            " requests are compared (broken off, several answers to one request, or counted across a restart)"
        )
    remainder = parts[-1].mean_s
    if remainder is not None and whole.mean_s is not None and remainder < -0.01 * whole.mean_s:
        found.append("the remainder is negative: ingresses and engines did not see the same requests")
    return found


def _of_sketch(name: str, sketch: MergedSketch | None, whole_s: float | None) -> TimePart:
    if sketch is None or not sketch.total:
        return TimePart(name=name)
    mean_s = sketch.sum / sketch.total
    return TimePart(
        name=name,
        count=sketch.total,
        sum_s=sketch.sum,
        mean_s=mean_s,
        share=mean_s / whole_s if whole_s else None,
        p50=_sketch_quantile(sketch, 0.50),
        p95=_sketch_quantile(sketch, 0.95),
    )


def _sketch_quantile(sketch: MergedSketch, share: float) -> Quantile:
    value_s = sketch.quantile(share)
    half = (GAMMA + 1) / 2  # the value stands in the middle of its bucket
    return Quantile(value_s, value_s * half / GAMMA, value_s * half)


def _of_histogram(
    name: str, histogram: HistogramCounts | None, bounds: Sequence[float], whole_s: float | None
) -> TimePart:
    if histogram is None or not histogram.total:
        return TimePart(name=name)
    mean_s = histogram.sum / histogram.total
    return TimePart(
        name=name,
        count=histogram.total,
        sum_s=histogram.sum,
        mean_s=mean_s,
        share=mean_s / whole_s if whole_s else None,
        p50=histogram_quantile(histogram, bounds, 0.50),
        p95=histogram_quantile(histogram, bounds, 0.95),
    )


def histogram_quantile(histogram: HistogramCounts, bounds: Sequence[float], share: float) -> Quantile:
    """A percentile by linear interpolation within its bucket; beyond the last bound only that is known."""
    rank = share * histogram.total
    index = min(int(np.searchsorted(histogram.counts, rank, side="left")), len(histogram.counts) - 1)
    low_s = bounds[index - 1] if index else 0.0
    if index >= len(bounds):
        return Quantile(low_s, low_s, math.inf)
    below = int(histogram.counts[index - 1]) if index else 0
    inside = int(histogram.counts[index]) - below
    high_s = bounds[index]
    return Quantile(low_s + (high_s - low_s) * (rank - below) / inside, low_s, high_s)
