"""Whatever agents send, detection goes on: no exception, and no verdict that the data do not bear."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enova_recommender.detection.burn import BurnRate
from enova_recommender.detection.episodes import EpisodeBook
from enova_recommender.detection.features import COLUMN, Feature, FeatureStep, clean
from enova_recommender.detection.folding import FeatureFold, FoldSettings, Rejection
from enova_recommender.detection.observation import (
    INTER_TOKEN,
    QUEUE,
    TTFT,
    BucketCounts,
    FrameReading,
    GpuReading,
    Placement,
    ReplicaReading,
    RequestReading,
    SketchCounts,
)
from enova_recommender.detection.percentiles import bucket_quantile, sketch_quantile
from enova_recommender.detection.watch import FleetWatch
from enova_recommender.performance import Affine
from enova_recommender.types import VerdictKind
from enova_testing.examples import examples

NAMES = tuple(f"replica-{index}" for index in range(4))
BOUNDS = {TTFT: (0.1, 1.0, 10.0), INTER_TOKEN: (0.01, 0.1, 1.0), QUEUE: (0.3, 3.0)}
TIMES = Affine(base_s=0.01, sequence_s=1e-4)
PLACEMENTS = tuple(
    Placement(
        replica=name, deployment="chat", variant="chat-1", nodes=(f"node-{index // 2}",), gpus=(f"gpu-{index}",),
        max_num_seqs=16.0, max_num_batched_tokens=512.0, max_model_len=1024.0, kv_tokens=4800.0, capacity_rps=5.0,
        ttft_p95_s=0.5, tpot_p95_s=0.05 if index else math.nan,
    )
    for index, name in enumerate(NAMES)
)  # fmt: skip

odd = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 1.0, 7.5, 1e17, 1e300])
counts = st.lists(odd, max_size=5)
histograms = st.dictionaries(
    st.sampled_from([TTFT, INTER_TOKEN, QUEUE, "other"]), st.builds(BucketCounts, counts, odd), max_size=3
)
sketches = st.none() | st.builds(
    SketchCounts, st.sampled_from([0.01, 0.0, math.nan, 2.0]), st.integers(-10_000, 10_000),
    st.lists(st.integers(-2, 5), max_size=4), st.integers(-1, 3),
)  # fmt: skip
readings = st.builds(
    ReplicaReading, replica=st.sampled_from([*NAMES, "stranger"]), instance=st.sampled_from(["", "1", "2"]),
    state=st.sampled_from(["", "READY", "STARTING", "FAILED"]), age_s=odd, running=odd, waiting=odd, held=odd,
    kv_cache_usage=odd, resident_memory_bytes=odd, prompt_tokens=odd, generation_tokens=odd, preemptions=odd,
    iterations=odd, prefix_cache_hits=odd, finished=st.dictionaries(st.sampled_from(["stop", "length"]), odd),
    histograms=histograms,
)  # fmt: skip
gpus = st.builds(
    GpuReading, st.sampled_from(["gpu-0", "gpu-1", "gpu-9"]), odd, odd, odd, odd, odd, odd, odd, odd, odd
)
requests = st.builds(
    RequestReading, st.just("chat"), st.sampled_from([*NAMES, ""]), st.just(""), odd, odd, odd, odd, odd, odd,
    sketches, sketches,
)  # fmt: skip
frames = st.builds(
    FrameReading, node=st.sampled_from(["node-0", "node-1"]), boot=st.sampled_from(["a", "b"]),
    sequence=st.integers(0, 6), start_s=st.just(0.0),
    end_s=st.sampled_from([math.nan, math.inf, -5.0, 0.0, 3.0, 9.0, 14.0, 21.0, 33.0, 1e9]),
    gpus=st.lists(gpus, max_size=2), replicas=st.lists(readings, max_size=3), requests=st.lists(requests, max_size=2),
)  # fmt: skip


def fleet() -> FleetWatch:
    watch = FleetWatch(FoldSettings(window_s=60.0, bounds=BOUNDS))
    watch.place(PLACEMENTS)
    watch.expect(dict.fromkeys(NAMES[:2], TIMES))
    return watch


clocks = st.sampled_from([0.0, 6.0, 12.0, 19.0, 24.0, 36.0, -50.0, 1e9, math.nan])


@examples(40)
@given(st.lists(st.tuples(frames, clocks), max_size=25))
def test_nothing_that_a_frame_can_hold_stops_detection(stream: list[tuple[FrameReading, float]]) -> None:
    watch = fleet()
    for frame, now_s in stream:
        watch.add(frame, now_s=now_s)
        for told in watch.close(now_s):
            assert told.step.replicas == NAMES
            figures = told.step.values[np.isfinite(told.step.values)]
            assert (figures >= 0).all()
            assert not np.isinf(told.step.values).any()
            for verdict in told.judgement.verdicts.values():
                assert 0.0 <= verdict.score <= 1.0
                assert 0.0 <= verdict.confidence <= 1.0


@examples(20)
@given(st.lists(st.tuples(frames, clocks), max_size=15), st.lists(st.tuples(frames, clocks), max_size=10))
def test_detection_goes_on_from_whatever_was_saved(
    before: list[tuple[FrameReading, float]], after: list[tuple[FrameReading, float]]
) -> None:
    watch = fleet()
    for frame, now_s in before:
        watch.add(frame, now_s=now_s)
        watch.close(now_s)
    again = fleet()
    again.restore(watch.save())
    assert {each.id for each in again.book.open} == {each.id for each in watch.book.open}
    for frame, now_s in after:
        again.add(frame, now_s=now_s)
        again.close(now_s)


def steady(now_s: float, *, boot: str = "a", restarted_s: float = 0.0, stamp_s: float | None = None) -> FrameReading:
    """A frame of two replicas that work evenly; counters since `restarted_s`."""
    on_s = now_s - restarted_s
    replicas = tuple(
        ReplicaReading(
            replica=name, instance=f"i{restarted_s}", state="READY", running=4.0, waiting=0.0, held=4.0,
            kv_cache_usage=0.3, prompt_tokens=100 * on_s, generation_tokens=200 * on_s, preemptions=0.0,
            iterations=50 * on_s, prefix_cache_hits=0.0, finished={"stop": 2 * on_s},
            histograms={
                INTER_TOKEN: BucketCounts((0.0, 198 * on_s, 198 * on_s, 198 * on_s), 198 * on_s * 0.0104),
                TTFT: BucketCounts((2 * on_s,) * 4, 2 * on_s * 0.05),
            },
        )
        for name in NAMES[:2]
    )  # fmt: skip
    end_s = now_s if stamp_s is None else stamp_s
    return FrameReading(
        node="node-0", boot=boot, sequence=round(now_s), start_s=end_s - 1, end_s=end_s, replicas=replicas
    )


def verdicts_of(watch: FleetWatch, stream: list[tuple[FrameReading, float]]) -> set[VerdictKind]:
    found = set()
    for frame, now_s in stream:
        watch.add(frame, now_s=now_s)
        for told in watch.close(now_s):
            found |= {told.judgement.kind(name) for name in NAMES[:2]}
    return found


@given(st.integers(40, 150))
@examples(20)
def test_a_counter_reset_is_no_fault(at_s: int) -> None:
    stream = [
        (steady(now_s, restarted_s=0.0 if now_s < at_s else float(at_s)), float(now_s)) for now_s in range(1, 200)
    ]
    assert verdicts_of(fleet(), stream) == {VerdictKind.NORMAL}


@given(st.sets(st.integers(1, 150), max_size=40), st.sets(st.integers(1, 150), max_size=40))
@examples(20)
def test_frames_that_come_twice_or_out_of_order_change_nothing(twice: set[int], swapped: set[int]) -> None:
    stream: list[tuple[FrameReading, float]] = []
    for now_s in range(1, 151):
        if now_s in swapped and stream:
            stream[-1:] = [(steady(now_s), float(now_s)), (stream[-1][0], float(now_s))]
        else:
            stream.append((steady(now_s), float(now_s)))
        if now_s in twice:
            stream.append((steady(now_s), float(now_s)))
    assert verdicts_of(fleet(), stream) == {VerdictKind.NORMAL}


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0, 12.0, -12.0, 86_400.0 * 365])
def test_a_clock_that_jumps_yields_unknowns_at_most(jump_s: float) -> None:
    stream = [
        (steady(now_s, stamp_s=now_s + (jump_s if now_s > 100 else 0.0)), now_s + (jump_s if now_s > 100 else 0.0))
        for now_s in range(1, 200)
    ]
    assert verdicts_of(fleet(), stream) <= {VerdictKind.NORMAL, VerdictKind.UNKNOWN}


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_a_nodes_own_clock_that_jumps_makes_it_unknown(jump_s: float) -> None:
    watch = fleet()
    stream = [
        (steady(now_s, stamp_s=now_s + (jump_s if now_s > 100 else 0.0)), float(now_s)) for now_s in range(1, 160)
    ]
    assert verdicts_of(watch, stream) == {VerdictKind.NORMAL, VerdictKind.UNKNOWN}
    assert watch.fold.rejected[Rejection.SKEWED] > 50


def test_a_constant_series_is_normal_and_a_silent_one_unknown() -> None:
    watch = fleet()
    stream = [(steady(now_s), float(now_s)) for now_s in range(1, 300)]
    assert verdicts_of(watch, stream) == {VerdictKind.NORMAL}
    told = [each for now_s in range(300, 340) for each in watch.close(float(now_s))]
    assert {told[-1].judgement.kind(name) for name in NAMES} == {VerdictKind.UNKNOWN}
    assert not told[-1].judgement.dead


def test_a_frame_that_repeats_an_old_reading_is_no_standstill() -> None:
    watch = fleet()
    stream = [(steady(now_s), float(now_s)) for now_s in range(1, 61)]
    old = steady(60)
    for now_s in range(61, 72):  # the scrape is late: the same reading, older with every frame
        stale = tuple(each._replace(age_s=float(now_s - 60)) for each in old.replicas)
        stream.append((old._replace(sequence=now_s, end_s=float(now_s), replicas=stale), float(now_s)))
    stream += [(steady(now_s), float(now_s)) for now_s in range(72, 100)]
    assert verdicts_of(watch, stream) == {VerdictKind.NORMAL}


def test_rates_are_what_counters_moved_by() -> None:
    fold = FeatureFold(FoldSettings(bounds=BOUNDS))
    fold.place(PLACEMENTS)
    steps: list[FeatureStep] = []
    for now_s in range(1, 31):
        fold.add(steady(now_s), now_s=float(now_s))
        steps += fold.close(float(now_s))
    last = steps[-1].of_row(NAMES[0])
    assert last["generation_tokens"] == pytest.approx(200.0)
    assert last["iterations"] == pytest.approx(50.0)
    assert last["step_s"] == pytest.approx(0.0104)
    assert last["ttft_s"] == pytest.approx(0.05)
    assert not steps[-1].known[2].any()
    history = fold.history(NAMES[0], steps=4)
    assert history.shape == (4, len(COLUMN))
    assert history[-1, COLUMN[Feature.RUNNING]] == 4.0


@given(st.lists(st.lists(st.floats(0, 50), min_size=4, max_size=4), min_size=1, max_size=5), st.floats(0.01, 0.99))
def test_a_bucket_quantile_lies_within_the_bounds(counted: list[list[float]], share: float) -> None:
    cumulative = np.cumsum(np.array(counted), axis=1)
    found = bucket_quantile(cumulative, (0.1, 1.0, 10.0), share)
    some = cumulative[:, -1] > 0
    assert np.isnan(found[~some]).all()
    assert ((found[some] >= 0) & (found[some] <= 10.0)).all()


def test_a_sketch_quantile_is_as_exact_as_the_sketch() -> None:
    gamma = 1.01 / 0.99
    values = np.linspace(0.05, 3.0, 500)
    index = np.ceil(np.log(values) / math.log(gamma)).astype(int)
    first = int(index.min())
    whole = SketchCounts(0.01, first, np.bincount(index - first).tolist())
    for share in (0.1, 0.5, 0.95):
        assert sketch_quantile([whole, whole], share) == pytest.approx(float(np.quantile(values, share)), rel=0.03)
    assert math.isnan(sketch_quantile([], 0.5))


@given(st.lists(st.tuples(odd, odd, st.sampled_from([0.0, 60.0, 61.0, 1e7, -9.0, math.nan])), max_size=20))
def test_burn_rates_bear_any_counts_and_clocks(stream: list[tuple[float, float, float]]) -> None:
    burn = BurnRate(series=1, objective=0.99)
    for good, bad, now_s in stream:
        result = burn.update(now_s=now_s, good=np.array([good]), bad=np.array([bad]))
        assert not (result.rates < 0).any()


def test_a_fast_burn_fires_and_a_slow_one_waits() -> None:
    burn = BurnRate(series=2, objective=0.99)
    fired = []
    for step in range(2 * 720):
        bad = np.array([0.5, 0.015]) * 10 if step >= 720 else np.zeros(2)
        result = burn.update(now_s=5.0 * step, good=10.0 - bad, bad=bad)
        fired.append(result.alarm)
    first = [int(np.argmax(np.array(fired)[:, series])) for series in (0, 1)]
    assert 720 < first[0] < 720 + 720 * 14.4 / 50 * 1.5
    assert not np.array(fired)[:720].any()
    assert not np.array(fired)[:, 1].any()
    assert not result.complete[2]


@given(st.lists(odd, min_size=1, max_size=8))
def test_clean_figures_are_finite_and_not_negative(values: list[float]) -> None:
    found = clean(np.array(values))
    assert (found[~np.isnan(found)] >= 0).all()
    assert not np.isinf(found).any()


def test_replicas_come_and_go_without_leaving_a_trace() -> None:
    watch = fleet()
    verdicts_of(watch, [(steady(now_s), float(now_s)) for now_s in range(1, 60)])
    watch.place(PLACEMENTS[2:])
    many = [
        Placement(replica=f"new-{index}", deployment="other", variant="o", nodes=("node-7",)) for index in range(100)
    ]
    watch.place([*PLACEMENTS[2:], *many])
    told = [each for now_s in range(60, 90) for each in watch.close(float(now_s))]
    assert NAMES[0] not in told[-1].step.replicas
    assert told[-1].judgement.kind("new-42") is VerdictKind.UNKNOWN
    assert np.isnan(watch.fold.history("new-0", steps=10)).all()
    assert EpisodeBook().open == ()
