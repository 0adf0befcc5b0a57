"""Detectors are told what the bytes of an agent's frames carry, and nothing else."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from pathlib import Path

from enova_recommender.detection.causes import Cause
from enova_recommender.detection.folding import FoldSettings
from enova_recommender.detection.observation import (
    INTER_TOKEN,
    BucketCounts,
    FrameReading,
    GpuReading,
    Placement,
    ReplicaReading,
    RequestReading,
    SketchCounts,
)
from enova_recommender.detection.watch import FleetWatch, Watched
from enova_testing.frame_bytes import received, sent
from enova_testing.serving_world import BOUNDS, HOT, Watching, cluster, kinds, watching

# Frames of two engines, of which the second throttles after 150 s, as their agents sent them: four bytes of length,
# big end first, before each.
RECORDED = Path(__file__).parent.parent / "golden" / "detection" / "throttled.frames.gz"
NODES = ("node-0", "node-1")
WHOLE = FrameReading(
    node="node-0", boot="boot", sequence=7, start_s=1.0, end_s=2.0,
    gpus=(GpuReading("gpu", 0.5, 300.0, 700.0, 60.0, 1980.0, 7e10, 8e10, 64.0, 0.25),),
    replicas=(ReplicaReading(
        replica="r", instance="i", state="READY", age_s=0.5, running=1.0, waiting=2.0, held=3.0, kv_cache_usage=0.25,
        resident_memory_bytes=4.0, prompt_tokens=5.0, generation_tokens=6.0, preemptions=7.0, iterations=8.0,
        prefix_cache_hits=9.0, finished={"stop": 10.0}, histograms={INTER_TOKEN: BucketCounts([1, 2], 0.5)},
    ),),
    requests=(RequestReading(
        "d", "r", "class", 1, 2, 3, 4, 5, 6, SketchCounts(0.01, -3, [1, 2], 4), SketchCounts(0.01, 2, [5], 6)
    ),),
)  # fmt: skip


def frames() -> Iterator[tuple[str, bytes]]:
    data = gzip.decompress(RECORDED.read_bytes())
    at = number = 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield NODES[number % len(NODES)], data[at + 4 : at + 4 + size]
        at, number = at + 4 + size, number + 1


def test_recorded_bytes_tell_of_a_fault() -> None:
    watch = FleetWatch(FoldSettings(bounds=BOUNDS))
    watch.place([
        Placement(replica=f"replica-{index}", deployment="chat", variant="chat-1", nodes=(node,),
                  gpus=(f"gpu-replica-{index}",)) for index, node in enumerate(NODES)
    ])  # fmt: skip
    told: list[Watched] = []
    for node, data in frames():
        frame = received(node, data)
        watch.add(frame, now_s=frame.end_s)
        told += watch.close(frame.end_s)
    assert kinds(told, "replica-0") == ["NORMAL"]
    assert kinds(told, "replica-1") == ["NORMAL", "DEGRADED"]
    assert told[-1].judgement.verdicts["replica-1"].cause is Cause.THROTTLED


def test_every_figure_that_a_detector_can_read_is_one_that_a_frame_carries() -> None:
    assert received("node-0", sent(WHOLE)) == WHOLE
    nothing = FrameReading(node="node-0", boot="b", sequence=1, start_s=0.0, end_s=1.0, replicas=(ReplicaReading("r"),))
    (replica,) = received("node-0", sent(nothing)).replicas
    assert all(math.isnan(value) for value in replica if isinstance(value, float) and value != 0.0)


def test_a_frame_counts_for_the_node_that_sent_it_whatever_it_says() -> None:
    assert received("node-1", sent(WHOLE)).node == "node-1"


def through_bytes(detector: Watching, until_s: float) -> list[Watched]:
    told: list[Watched] = []
    while detector.world.now_s < until_s:
        for frame in detector.world.frames(detector.world.now_s + 1.0):
            detector.watch.add(received(frame.node, sent(frame)), now_s=detector.world.now_s)
        told += detector.watch.close(detector.world.now_s)
    return told


def test_a_world_tells_no_more_than_its_bytes() -> None:
    direct, bytes_alone = watching(cluster(replicas=2)), watching(cluster(replicas=2))
    told = [direct.until(150.0), through_bytes(bytes_alone, 150.0)]
    for each in (direct, bytes_alone):
        each.world.engines[1].slow(1.5)
        each.world.engines[1].throttle_reasons = HOT
    told[0] += direct.until(200.0)
    told[1] += through_bytes(bytes_alone, 200.0)
    said = [[{name: (v.cause, round(v.score, 6)) for name, v in each.judgement.verdicts.items()} for each in steps]
            for steps in told]  # fmt: skip
    assert said[0] == said[1]
    assert said[0][-1]["replica-1"][0] is Cause.THROTTLED
