"""Frames for detection: packed where they arrive, read where the detector runs, which is another process."""

from __future__ import annotations

import math
from typing import NamedTuple

from google.protobuf.message import DecodeError, Message

from enova.v1 import telemetry_pb2
from enova_recommender.detection.observation import (
    BucketCounts,
    FrameReading,
    GpuReading,
    ReplicaReading,
    RequestReading,
    SketchCounts,
)

REPLICAS_MAX = 64                  # of one node, as telemetry has it
GPUS_MAX = 64
REQUESTS_MAX = 4_096

_GPU_FIGURES = (
    "utilization", "power_w", "power_limit_w", "temperature_c", "sm_clock_mhz", "memory_used_bytes",
    "memory_total_bytes", "throttle_reasons",
)  # fmt: skip
_REPLICA_FIGURES = {
    "running": "running",
    "waiting": "waiting",
    "held": "held",
    "kv_cache_usage": "kv_cache_usage",
    "resident_memory_bytes": "resident_memory_bytes",
    "prompt_tokens": "prompt_tokens_total",
    "generation_tokens": "generation_tokens_total",
    "preemptions": "preemptions_total",
    "iterations": "iterations_total",
    "prefix_cache_hits": "prefix_cache_hits_total",
}


class ReadFrame(NamedTuple):
    """A frame as the detector takes it, and the room in tokens that KV caches said they have, by replica."""

    frame: FrameReading
    kv_tokens: dict[str, float]


def packed(message: telemetry_pb2.Frame) -> bytes:
    """The bytes of a frame without what detection does not read. The message loses it, too."""
    message.ClearField("lengths")
    return message.SerializeToString()


def read_frame(node: str, data: bytes, *, scale: float = 1.0) -> ReadFrame | None:
    """The frame that a node sent, or None if these are not the bytes of one.

    Ages are of real time on the wire; `scale` of the model clock makes model time of them. What counts is who sent
    it, not which name it bears.
    """
    message = telemetry_pb2.Frame()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return None
    replicas = message.replicas[:REPLICAS_MAX]
    return ReadFrame(
        frame=FrameReading(
            node=node,
            boot=message.boot,
            sequence=message.sequence,
            start_s=message.start_s,
            end_s=message.end_s,
            gpus=tuple(_gpu(each, scale) for each in message.gpus[:GPUS_MAX]),
            replicas=tuple(_replica(each, scale) for each in replicas),
            requests=tuple(_request(each) for each in message.requests[:REQUESTS_MAX]),
        ),
        kv_tokens={
            each.replica: each.kv_cache_tokens for each in replicas if 0 < _figure(each, "kv_cache_tokens") < math.inf
        },
    )


def _gpu(sample: telemetry_pb2.GpuSample, scale: float) -> GpuReading:
    return GpuReading(
        uuid=sample.uuid, age_s=sample.age_s * scale, **{name: _figure(sample, name) for name in _GPU_FIGURES}
    )


def _replica(sample: telemetry_pb2.ReplicaSample, scale: float) -> ReplicaReading:
    return ReplicaReading(
        replica=sample.replica,
        instance=sample.instance,
        state=sample.state,
        age_s=sample.age_s * scale,
        **{name: _figure(sample, field) for name, field in _REPLICA_FIGURES.items()},
        finished=dict(sample.finished_total),
        histograms={each.metric: BucketCounts(list(each.counts), each.sum) for each in sample.histograms},
    )


def _request(summary: telemetry_pb2.RequestSummary) -> RequestReading:
    return RequestReading(
        deployment=summary.deployment,
        replica=summary.replica,
        serving_class=summary.serving_class,
        arrived=summary.arrived,
        finished=summary.finished,
        failed=summary.failed,
        cut=summary.cut,
        refused=summary.refused,
        held=summary.held,
        ttft_s=_sketch(summary.ttft_s) if summary.HasField("ttft_s") else None,
        tpot_s=_sketch(summary.tpot_s) if summary.HasField("tpot_s") else None,
    )


def _sketch(sketch: telemetry_pb2.Sketch) -> SketchCounts:
    return SketchCounts(sketch.relative_accuracy, sketch.offset, list(sketch.counts), sketch.zero_count)


def _figure(sample: Message, name: str) -> float:
    """A field that may be absent, as a figure."""
    return float(getattr(sample, name)) if sample.HasField(name) else math.nan
