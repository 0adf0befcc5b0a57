"""Frames of simulated and recorded engines as the bytes that an agent sends, and as a coordinator decodes them.

Detectors that are measured see nothing else: whatever a world knows besides is lost on the way.
"""

from __future__ import annotations

import math

from enova_agent import convert
from enova_agent.core.local import SketchValue, Summary
from enova_agent.core.telemetry import EngineMetrics, Frame, GpuSample, Histogram, ReplicaSample
from enova_coordinator.service.detection_frames import read_frame
from enova_recommender.detection.observation import (
    FrameReading,
    GpuReading,
    ReplicaReading,
    RequestReading,
    SketchCounts,
)


def sent(frame: FrameReading) -> bytes:
    """What the agent of the node sends."""
    return convert.frame(Frame(
        node=frame.node, sequence=frame.sequence, boot=frame.boot, start_s=frame.start_s, end_s=frame.end_s,
        gpus=tuple(_gpu(each) for each in frame.gpus),
        replicas=tuple(_replica(each) for each in frame.replicas),
        requests=tuple(_requests(each) for each in frame.requests),
    )).SerializeToString()  # fmt: skip


def received(node: str, data: bytes) -> FrameReading:
    """What the coordinator's detector is given of these bytes."""
    found = read_frame(node, data)
    assert found is not None
    return found.frame


def _gpu(gpu: GpuReading) -> GpuSample:
    return GpuSample(
        uuid=gpu.uuid, utilization=_known(gpu.utilization), power_w=_known(gpu.power_w),
        power_limit_w=_known(gpu.power_limit_w), temperature_c=_known(gpu.temperature_c),
        sm_clock_mhz=_known(gpu.sm_clock_mhz), memory_used_bytes=_whole(gpu.memory_used_bytes),
        memory_total_bytes=_whole(gpu.memory_total_bytes), throttle_reasons=_whole(gpu.throttle_reasons),
        age_s=gpu.age_s,
    )  # fmt: skip


def _replica(replica: ReplicaReading) -> ReplicaSample:
    metrics = EngineMetrics(
        running=_known(replica.running), waiting=_known(replica.waiting),
        kv_cache_usage=_known(replica.kv_cache_usage), prompt_tokens_total=_known(replica.prompt_tokens),
        generation_tokens_total=_known(replica.generation_tokens), preemptions_total=_known(replica.preemptions),
        iterations_total=_known(replica.iterations), prefix_cache_hits_total=_known(replica.prefix_cache_hits),
        finished_total={reason: count for reason, count in replica.finished.items() if math.isfinite(count)},
        histograms=tuple(
            Histogram(metric=metric, counts=tuple(round(count) for count in each.counts), sum=each.sum)
            for metric, each in replica.histograms.items() if all(map(math.isfinite, each.counts))
        ),
    )  # fmt: skip
    return ReplicaSample(
        replica=replica.replica, state=replica.state, metrics=metrics, age_s=replica.age_s,
        resident_memory_bytes=_known(replica.resident_memory_bytes), held=_known(replica.held),
        instance=replica.instance,
    )  # fmt: skip


def _requests(requests: RequestReading) -> Summary:
    return Summary(
        deployment=requests.deployment, replica=requests.replica, serving_class=requests.serving_class,
        arrived=round(requests.arrived), finished=round(requests.finished), failed=round(requests.failed),
        cut=round(requests.cut), refused=round(requests.refused), held=round(requests.held),
        ttft_s=_sketch(requests.ttft_s), tpot_s=_sketch(requests.tpot_s),
    )  # fmt: skip


def _sketch(sketch: SketchCounts | None) -> SketchValue | None:
    if sketch is None:
        return None
    return SketchValue(
        relative_accuracy=sketch.relative_accuracy, offset=sketch.offset, counts=tuple(sketch.counts),
        zero_count=sketch.zero_count, sum=0.0, min=0.0, max=0.0,
    )  # fmt: skip


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _whole(value: float) -> int | None:
    return round(value) if math.isfinite(value) else None
