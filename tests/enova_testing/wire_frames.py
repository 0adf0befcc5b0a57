"""Readings as the bytes that an agent would have sent, for tests of what reads them."""

from __future__ import annotations

import math

from enova.v1 import telemetry_pb2
from enova_recommender.detection.observation import FrameReading, GpuReading, ReplicaReading, RequestReading

_REPLICA = {
    "running": "running",
    "waiting": "waiting",
    "held": "held",
    "kv_cache_usage": "kv_cache_usage",
    "resident_memory_bytes": "resident_memory_bytes",
    "prompt_tokens_total": "prompt_tokens",
    "generation_tokens_total": "generation_tokens",
    "preemptions_total": "preemptions",
    "iterations_total": "iterations",
    "prefix_cache_hits_total": "prefix_cache_hits",
}
_GPU_REAL = ("utilization", "power_w", "power_limit_w", "temperature_c", "sm_clock_mhz")
_GPU_WHOLE = ("memory_used_bytes", "memory_total_bytes", "throttle_reasons")


def frame_message(frame: FrameReading) -> telemetry_pb2.Frame:
    """A frame, for the wire; what is NaN is left out."""
    return telemetry_pb2.Frame(
        node=frame.node,
        boot=frame.boot,
        sequence=frame.sequence,
        start_s=frame.start_s,
        end_s=frame.end_s,
        gpus=[_gpu(each) for each in frame.gpus],
        replicas=[_replica(each) for each in frame.replicas],
        requests=[_request(each) for each in frame.requests],
    )


def frame_bytes(frame: FrameReading) -> bytes:
    """The bytes of a frame."""
    return frame_message(frame).SerializeToString()


def _gpu(reading: GpuReading) -> telemetry_pb2.GpuSample:
    sample = telemetry_pb2.GpuSample(uuid=reading.uuid, age_s=reading.age_s)
    for name in (*_GPU_REAL, *_GPU_WHOLE):
        value = getattr(reading, name)
        if not math.isnan(value):
            setattr(sample, name, int(value) if name in _GPU_WHOLE else value)
    return sample


def _replica(reading: ReplicaReading) -> telemetry_pb2.ReplicaSample:
    sample = telemetry_pb2.ReplicaSample(
        replica=reading.replica, instance=reading.instance, state=reading.state, age_s=reading.age_s
    )
    for field, name in _REPLICA.items():
        value = getattr(reading, name)
        if not math.isnan(value):
            setattr(sample, field, value)
    sample.finished_total.update(reading.finished)
    for metric, counts in reading.histograms.items():
        sample.histograms.add(metric=metric, counts=[int(each) for each in counts.counts], sum=counts.sum)
    return sample


def _request(reading: RequestReading) -> telemetry_pb2.RequestSummary:
    summary = telemetry_pb2.RequestSummary(
        deployment=reading.deployment, replica=reading.replica, serving_class=reading.serving_class
    )
    for name in ("arrived", "finished", "failed", "cut", "refused", "held"):
        setattr(summary, name, int(getattr(reading, name)))
    return summary
