"""Frames off the wire: protobuf to the rows that telemetry keeps, and back again for those who ask.

This is the hot path of the coordinator, once a second and node: one pass over the fields that are set, by number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from enova.v1 import telemetry_pb2
from enova_common.vllm import METRICS
from enova_coordinator.core.series import (
    GPU_FEATURES,
    REPLICA_COUNTERS,
    REPLICA_GAUGES,
    REQUEST_COUNTS,
    REQUEST_SKETCHES,
    LengthFigures,
    NodeFrame,
    ObjectFigures,
    RequestFigures,
    SketchCounts,
)
from enova_coordinator.core.service_times import EngineCounters, HistogramCounts
from enova_coordinator.core.sketch import RELATIVE_ACCURACY, MergedSketch
from enova_coordinator.request_totals import RequestTotals

SAMPLE_AGE_S_MAX = 5.0     # real time: an older reading is no measurement of this interval
NAME_LENGTH_MAX = 256
LENGTHS_MAX = 1024         # answers of one frame: agents send a quarter of it
PAIRS_MAX = 64             # lengths of one summary: ingresses send half of it
TOKENS_MAX = 100_000_000   # beyond every context

HISTOGRAM_BOUNDS: Mapping[str, tuple[float, ...]] = {each.name: each.buckets for each in METRICS if each.buckets}

_REPLICA_COLUMNS = REPLICA_GAUGES + REPLICA_COUNTERS
# Figures whose field is called otherwise than their column; finished is summed over its reasons.
_REPLICA_FIELD_OF = {name: f"{name}_total" for name in REPLICA_COUNTERS} | {"engine_finished": "finished_total"}
_GPU_FIELD_OF = {"ecc_errors": "ecc_errors_total"}


def _columns(descriptor: object, names: tuple[str, ...], field_of: Mapping[str, str]) -> dict[int, int]:
    by_name = descriptor.fields_by_name  # type: ignore[attr-defined]  # of a generated message
    return {by_name[field_of.get(name, name)].number: column for column, name in enumerate(names)}


_REPLICA_COLUMN = _columns(telemetry_pb2.ReplicaSample.DESCRIPTOR, _REPLICA_COLUMNS, _REPLICA_FIELD_OF)
_GPU_COLUMN = _columns(telemetry_pb2.GpuSample.DESCRIPTOR, GPU_FEATURES, _GPU_FIELD_OF)
_FINISHED = telemetry_pb2.ReplicaSample.DESCRIPTOR.fields_by_name["finished_total"].number
_HELD = _REPLICA_COLUMNS.index("held")  # the ingress says it, whatever the engine's scrape is worth
_BLANK_REPLICA = [math.nan] * len(_REPLICA_COLUMNS)
_BLANK_GPU = [math.nan] * len(GPU_FEATURES)


def frame(message: telemetry_pb2.Frame) -> NodeFrame:
    """The frame as telemetry takes it. Figures that cannot be are left out, and counted in `rejected`."""
    rejected: dict[str, int] = {}
    return NodeFrame(
        node=message.node,
        boot=message.boot[:NAME_LENGTH_MAX],
        sequence=message.sequence,
        start_s=message.start_s,
        end_s=message.end_s,
        gpus=[_gpu(sample, rejected) for sample in message.gpus],
        replicas=[_replica(sample, rejected) for sample in message.replicas],
        requests=[_request(summary) for summary in message.requests],
        dropped_samples=message.dropped_samples,
        lengths=[_length(sample, rejected) for sample in message.lengths[:LENGTHS_MAX]],
        rejected=rejected,
    )


def _length(sample: telemetry_pb2.LengthSample, rejected: dict[str, int]) -> LengthFigures:
    if sample.tokens < 0:
        _refused(sample.tokens, rejected)
    return LengthFigures(
        sample.deployment[:NAME_LENGTH_MAX], sample.method, sample.vector, sample.tokens, sample.stopped
    )


def _gpu(sample: telemetry_pb2.GpuSample, rejected: dict[str, int]) -> ObjectFigures:
    row = _BLANK_GPU.copy()
    if _fresh(sample.age_s, rejected):
        for field, value in sample.ListFields():
            column = _GPU_COLUMN.get(field.number)
            if column is not None:
                row[column] = value if 0 <= value < math.inf else _cleared(sample, field.name, value, rejected)
    return ObjectFigures(sample.uuid, row, "", sample)


def _replica(sample: telemetry_pb2.ReplicaSample, rejected: dict[str, int]) -> ObjectFigures:
    row = _BLANK_REPLICA.copy()
    fresh = _fresh(sample.age_s, rejected)
    for field, value in sample.ListFields():
        number = field.number
        column = _REPLICA_COLUMN.get(number)
        if column is None or not (fresh or column == _HELD):
            continue
        if number == _FINISHED:
            value = sum(value.values())  # noqa: PLW2901  # a map in place of a number
        row[column] = value if 0 <= value < math.inf else _cleared(sample, field.name, value, rejected)
    return ObjectFigures(sample.replica, row, sample.instance, sample)


def _fresh(age_s: float, rejected: dict[str, int]) -> bool:
    if 0 <= age_s <= SAMPLE_AGE_S_MAX:
        return True
    rejected["stale"] = rejected.get("stale", 0) + 1
    return False


def _cleared(
    sample: telemetry_pb2.GpuSample | telemetry_pb2.ReplicaSample, name: str, value: float, rejected: dict[str, int]
) -> float:
    """Refuse a figure, and take it out of the sample too: whoever asks for the newest figures is given that."""
    sample.ClearField(name)  # type: ignore[arg-type]  # a name that came out of this very message
    return _refused(value, rejected)


def _refused(value: float, rejected: dict[str, int]) -> float:
    reason = "not_finite" if not math.isfinite(value) else "negative"
    rejected[reason] = rejected.get(reason, 0) + 1
    return math.nan


def _request(summary: telemetry_pb2.RequestSummary) -> RequestFigures:
    return RequestFigures(
        summary.deployment[:NAME_LENGTH_MAX],
        summary.replica[:NAME_LENGTH_MAX],
        summary.serving_class[:NAME_LENGTH_MAX],
        (summary.arrived, summary.finished, summary.failed, summary.cut, summary.refused, summary.cancelled),
        summary.prompt_tokens,
        summary.output_tokens,
        summary.held,
        (
            _sketch(summary.ttft_s) if summary.HasField("ttft_s") else None,
            _sketch(summary.tpot_s) if summary.HasField("tpot_s") else None,
            _sketch(summary.queue_s) if summary.HasField("queue_s") else None,
            _sketch(summary.e2e_s) if summary.HasField("e2e_s") else None,
        ),
        _pairs(summary) if summary.prompt_lengths else (),
    )


def _pairs(summary: telemetry_pb2.RequestSummary) -> tuple[tuple[int, int], ...]:
    """Lengths that can be, as many as one summary may bring."""
    pairs = zip(summary.prompt_lengths[:PAIRS_MAX], summary.output_lengths[:PAIRS_MAX], strict=False)
    return tuple((prompt, output) for prompt, output in pairs if 0 < prompt < TOKENS_MAX and 0 < output < TOKENS_MAX)


def _sketch(sketch: telemetry_pb2.Sketch) -> SketchCounts:
    return SketchCounts(
        sketch.relative_accuracy,
        sketch.offset,
        list(sketch.counts),
        sketch.zero_count,
        sketch.sum,
        sketch.min,
        sketch.max,
    )


def engine_counters(source: object) -> EngineCounters | None:
    """What an engine had counted when a replica was last sampled; None where that is no measurement."""
    if not isinstance(source, telemetry_pb2.ReplicaSample) or not source.histograms:
        return None
    if not 0 <= source.age_s <= SAMPLE_AGE_S_MAX:
        return None
    histograms = {
        each.metric: HistogramCounts(np.array(each.counts, dtype=np.int64), each.sum)
        for each in source.histograms
        if len(each.counts) == len(HISTOGRAM_BOUNDS.get(each.metric, ())) + 1 and 0 <= each.sum < math.inf
    }
    return EngineCounters(
        instance=source.instance,
        steps=_figure(source, "iterations_total"),
        prompt_tokens=_figure(source, "prompt_tokens_total"),
        cached_tokens=_figure(source, "prefix_cache_hits_total"),
        preemptions=_figure(source, "preemptions_total"),
        kv_cache_tokens=_figure(source, "kv_cache_tokens"),
        histograms=histograms,
    )


def _figure(source: telemetry_pb2.ReplicaSample, name: str) -> float | None:
    value = float(getattr(source, name)) if source.HasField(name) else math.nan  # type: ignore[arg-type]
    return value if 0 <= value < math.inf else None


def totals_message(
    deployment: str, replica: str, serving_class: str, totals: RequestTotals, *, held: int
) -> telemetry_pb2.RequestSummary:
    """The sum of a class's requests, for the wire."""
    message = telemetry_pb2.RequestSummary(
        deployment=deployment,
        replica=replica,
        serving_class=serving_class,
        prompt_tokens=totals.prompt_tokens,
        output_tokens=totals.output_tokens,
        held=held,
    )
    for name, count in zip(REQUEST_COUNTS, totals.counts, strict=True):
        setattr(message, name, count)
    for name, merged in zip(REQUEST_SKETCHES, totals.sketches(), strict=True):
        if merged.total:
            getattr(message, name).CopyFrom(sketch_message(merged))
    return message


def sketch_message(merged: MergedSketch) -> telemetry_pb2.Sketch:
    """A sum of sketches, for the wire."""
    return telemetry_pb2.Sketch(
        relative_accuracy=RELATIVE_ACCURACY,
        offset=merged.offset,
        counts=merged.counts.tolist(),
        zero_count=merged.zero_count,
        sum=merged.sum,
        min=merged.min,
        max=merged.max,
    )
