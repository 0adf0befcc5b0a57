"""Frames hold what was measured and how old it is; the buffer keeps the newest within its bounds, in order."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from enova_agent.core.local import HeldReplica, Summary
from enova_agent.core.model import ReplicaState, ReplicaView
from enova_agent.core.telemetry import EngineMetrics, EngineScrape, GpuFacts, GpuSample
from enova_agent.frames import BLOCK_FRAMES, SUMMARIES_MAX, FrameBuffer, FrameMaker

REPLICA = "deployments/d/replicas/r"


class OneGpu:
    def describe(self) -> tuple[GpuFacts, ...]:
        return ()

    def sample(self) -> tuple[GpuSample, ...]:
        return (GpuSample(uuid="GPU-0", utilization=0.5, age_s=0.25),)


class OneEngine:
    def __init__(self) -> None:
        self.scraped: dict[str, EngineScrape] = {}
        self.view = ReplicaView(replica=REPLICA, uid="u", state=ReplicaState.READY)

    def views(self) -> tuple[ReplicaView, ...]:
        return (self.view,)

    def scrapes(self) -> Mapping[str, EngineScrape]:
        return self.scraped


class Clocks:
    """Model and monotonic time, set by the test."""

    def __init__(self) -> None:
        self.model_s = 1000.0
        self.monotonic_s = 50.0


def maker(engine: OneEngine, clocks: Clocks) -> FrameMaker:
    return FrameMaker(
        node="nodes/n",
        boot="b",
        gpus=OneGpu(),
        engines=engine,
        model_time_s=lambda: clocks.model_s,
        monotonic_s=lambda: clocks.monotonic_s,
    )


def test_frames_follow_each_other_without_gap_in_number_and_time() -> None:
    clocks = Clocks()
    frames = maker(OneEngine(), clocks)
    clocks.model_s = 1001.0
    first = frames.make(None)
    clocks.model_s = 1003.5
    second = frames.make(None)
    assert (first.sequence, first.start_s, first.end_s) == (1, 1000.0, 1001.0)
    assert (second.sequence, second.start_s, second.end_s) == (2, 1001.0, 1003.5)


def test_a_clock_that_is_set_back_makes_an_empty_interval_never_a_negative_one() -> None:
    clocks = Clocks()
    frames = maker(OneEngine(), clocks)
    clocks.model_s = 900.0
    frame = frames.make(None)
    assert (frame.start_s, frame.end_s) == (1000.0, 1000.0)


def test_what_was_not_measured_is_absent_and_says_why() -> None:
    engine = OneEngine()
    (sample,) = maker(engine, Clocks()).make(None).replicas
    assert sample.metrics is None
    assert sample.held is None
    assert sample.scrape_error == "the engine was not scraped yet"


def test_a_scrape_bears_its_age_and_its_error() -> None:
    engine, clocks = OneEngine(), Clocks()
    engine.scraped[REPLICA] = EngineScrape(replica=REPLICA, instance="i", taken_s=48.0, error="no answer in time")
    (sample,) = maker(engine, clocks).make(None).replicas
    assert (sample.age_s, sample.scrape_error, sample.metrics, sample.instance) == (2.0, "no answer in time", None, "i")
    bad = EngineMetrics(running=1.0, error="a metric has the value NaN")
    engine.scraped[REPLICA] = EngineScrape(replica=REPLICA, instance="i", taken_s=50.0, metrics=bad)
    (sample,) = maker(engine, clocks).make(None).replicas
    assert sample.scrape_error == "a metric has the value NaN"


@pytest.mark.parametrize(
    ("held", "count"), [(None, None), ({}, 0.0), ({REPLICA: HeldReplica(in_flight=2, queued=3)}, 5.0)]
)
def test_held_is_unknown_without_an_ingress_and_zero_with_an_idle_one(
    held: Mapping[str, HeldReplica] | None, count: float | None
) -> None:
    (sample,) = maker(OneEngine(), Clocks()).make(held).replicas
    assert sample.held == count


def test_summaries_go_into_one_frame_and_over_the_bound_the_oldest_are_counted() -> None:
    frames = maker(OneEngine(), Clocks())
    frames.add_summaries(Summary(deployment=f"d{number}") for number in range(SUMMARIES_MAX + 3))
    frame = frames.make(None)
    assert (len(frame.requests), frame.dropped_samples) == (SUMMARIES_MAX, 3)
    assert frame.requests[0].deployment == "d3"
    after = frames.make(None)
    assert (after.requests, after.dropped_samples) == ((), 0)


def test_a_frame_covers_the_time_in_which_its_summaries_could_not_be_told() -> None:
    clocks = Clocks()
    frames = maker(OneEngine(), clocks)          # an agent that has just started, at 1000
    frames.add_summaries([Summary(deployment="d", arrived=70)], start_s=930.0)
    frames.add_summaries([Summary(deployment="d", arrived=1)], start_s=1000.0)
    clocks.model_s = 1001.0
    late = frames.make(None)
    clocks.model_s = 1002.0
    frames.add_summaries([Summary(deployment="d", arrived=1)], start_s=1001.0)
    usual = frames.make(None)
    assert (late.start_s, late.end_s) == (930.0, 1001.0)
    assert (usual.start_s, usual.end_s) == (1001.0, 1002.0)


def filled(count: int, **bounds: int) -> FrameBuffer:
    buffer = FrameBuffer(**bounds)
    for number in range(count):
        buffer.append(b"frame %06d" % number, end_s=float(number))
    return buffer


def test_every_kept_frame_comes_back_as_it_was_compressed_or_not() -> None:
    count = 5 * BLOCK_FRAMES + 7
    buffer = filled(count)
    assert [buffer.get(number) for number in range(count)] == [buffer.get(number) for number in range(count)]
    for number in (0, 1, BLOCK_FRAMES - 1, BLOCK_FRAMES, count - 1):
        frame = buffer.get(number)
        assert frame is not None
        assert (frame.number, frame.end_s, frame.data) == (number, float(number), b"frame %06d" % number)
    assert buffer.get(count) is None


def test_the_buffer_is_bounded_in_frames_and_skips_to_the_oldest_that_is_left() -> None:
    buffer = filled(1_000, frames_max=300)
    assert len(buffer) <= 300
    assert buffer.next == 1_000
    oldest = buffer.get(0)
    assert oldest is not None
    assert oldest.number == buffer.first >= 700


def test_the_buffer_is_bounded_in_bytes() -> None:
    buffer = FrameBuffer(bytes_max=10_000)
    for number in range(2_000):
        buffer.append(bytes((number * 7 + offset * offset) % 251 for offset in range(400)), end_s=float(number))
        assert buffer.size_bytes <= 10_000
    newest = buffer.get(1_999)
    assert newest is not None
    assert newest.number == 1_999


def test_like_frames_take_little_room() -> None:
    buffer = FrameBuffer()
    for number in range(1_200):
        buffer.append(b"%d" % number + bytes(range(256)) * 20, end_s=float(number))
    assert buffer.size_bytes < 0.15 * 1_200 * 5_120


def test_catching_up_begins_after_what_the_leader_has() -> None:
    buffer = filled(400)
    assert buffer.after(-1.0) == 0
    assert buffer.after(0.0) == 1
    assert buffer.after(250.5) == 251
    assert buffer.after(399.0) == buffer.next
    assert FrameBuffer().after(0.0) == 0
