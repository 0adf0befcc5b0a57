"""The time of requests is taken apart without losing any: means add up, percentiles say how fine they are."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enova_common.vllm import METRICS
from enova_coordinator.core.series import SketchCounts
from enova_coordinator.core.service_times import (
    E2E,
    ENGINE_PARTS,
    PART_NAMES,
    QUEUE,
    EngineCounters,
    HistogramCounts,
    ServiceSums,
    change,
    histogram_quantile,
    service_times,
)
from enova_coordinator.core.sketch import RELATIVE_ACCURACY, MergedSketch

BOUNDS = {metric.name: metric.buckets for metric in METRICS if metric.buckets}
LATENCY = BOUNDS["request_queue_time_seconds"]
GAMMA = (1 + RELATIVE_ACCURACY) / (1 - RELATIVE_ACCURACY)


def sketch(*values_s: float) -> MergedSketch:
    merged = MergedSketch()
    for value in values_s:
        bucket = math.ceil(math.log(value) / math.log(GAMMA)) if value else 0
        counts, zeros = ([1], 0) if value else ([], 1)
        merged.merge(SketchCounts(RELATIVE_ACCURACY, bucket, counts, zeros, value, value, value))
    return merged


def histogram(*values_s: float, bounds: tuple[float, ...] = LATENCY) -> HistogramCounts:
    counts = [sum(value <= bound for value in values_s) for bound in (*bounds, math.inf)]
    return HistogramCounts(np.array(counts, dtype=np.int64), math.fsum(values_s))


def sums(whole: list[float], parts: dict[str, list[float]], *, time_s: float = 0.0) -> ServiceSums:
    return ServiceSums(
        time_s=time_s,
        sketches={E2E: sketch(*whole), QUEUE: sketch(*parts["ingress_queue"])},
        histograms={metric: histogram(*parts[name]) for name, metric in ENGINE_PARTS.items()},
    )


KNOWN = {"ingress_queue": [0.0, 0.2], "engine_queue": [0.1, 0.3], "prefill": [0.2, 0.4], "decode": [2.0, 6.0]}


def test_a_known_pair_of_requests_is_taken_apart() -> None:
    times = service_times(sums([2.4, 7.0], KNOWN), bounds=BOUNDS)
    means = {part.name: part.mean_s for part in times.parts}
    assert tuple(means) == PART_NAMES
    assert means == pytest.approx(
        {"ingress_queue": 0.1, "engine_queue": 0.2, "prefill": 0.3, "decode": 4.0, "remainder": 0.1}
    )
    assert times.end_to_end.mean_s == pytest.approx(4.7)
    assert times.notes == ()


SECONDS = st.lists(st.floats(1e-5, 1e4), min_size=1, max_size=20)


@given(whole=SECONDS, parts=st.fixed_dictionaries(dict.fromkeys(("ingress_queue", *ENGINE_PARTS), SECONDS)))
def test_the_means_of_the_parts_always_add_up(whole: list[float], parts: dict[str, list[float]]) -> None:
    times = service_times(sums(whole, parts), bounds=BOUNDS)
    total = math.fsum(part.mean_s for part in times.parts if part.mean_s is not None)
    assert times.end_to_end.mean_s is not None
    scale = max(times.end_to_end.mean_s, *(part.mean_s or 0.0 for part in times.parts))
    assert total == pytest.approx(times.end_to_end.mean_s, abs=1e-9 * scale)


def test_two_moments_of_a_service_differ_by_what_came_between() -> None:
    old = sums([2.4], {name: values[:1] for name, values in KNOWN.items()})
    new = sums([2.4, 7.0], KNOWN)
    only = {name: values[1:] for name, values in KNOWN.items()}
    between = service_times(new.minus(old), bounds=BOUNDS)
    alone = service_times(sums([7.0], only), bounds=BOUNDS)
    for one, other in zip((*between.parts, between.end_to_end), (*alone.parts, alone.end_to_end), strict=True):
        assert one.count == other.count
        assert one.mean_s == pytest.approx(other.mean_s)
        assert (one.p50 is None) == (other.p50 is None)
        if one.p50 is not None and other.p50 is not None:
            assert one.p50.value_s == pytest.approx(other.p50.value_s)


def test_what_was_not_measured_is_missing_and_named() -> None:
    nothing = service_times(ServiceSums(time_s=0.0), bounds=BOUNDS)
    assert all(part.mean_s is None and part.p50 is None for part in nothing.parts)
    assert nothing.notes == ("no request was answered in full in this window",)
    half = sums([2.4], {name: values[:1] for name, values in KNOWN.items()})
    without = ServiceSums(time_s=0.0, sketches=half.sketches, histograms={})
    times = service_times(without, bounds=BOUNDS)
    assert times.parts[-1].mean_s is None
    assert [note.partition(":")[0] for note in times.notes] == list(ENGINE_PARTS)


def test_parts_of_other_requests_are_named() -> None:
    more = {name: values * 3 for name, values in KNOWN.items()}
    (note,) = service_times(sums([2.4, 7.0], more), bounds=BOUNDS).notes
    assert "of 2 answered requests the parts saw 6 to 6" in note


@given(values=SECONDS, share=st.floats(0.01, 1))
def test_a_percentile_lies_in_the_bucket_that_it_names(values: list[float], share: float) -> None:
    found = histogram_quantile(histogram(*values), LATENCY, share)
    exact = sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]
    assert found.low_s <= found.value_s <= found.high_s
    assert found.low_s <= exact <= found.high_s
    assert (found.low_s, found.high_s) in [(0.0, LATENCY[0]), *pairwise(LATENCY), (LATENCY[-1], math.inf)]


def counters(instance: str, *values_s: float, steps: float = 0.0) -> EngineCounters:
    queue = histogram(*values_s)
    return EngineCounters(instance=instance, steps=steps, histograms={"request_queue_time_seconds": queue})


def test_an_engine_that_restarted_is_counted_anew_and_the_first_look_is_nobodys_past() -> None:
    assert change(counters("a", 1.0, 2.0, steps=9), None) is None
    grown = change(counters("a", 1.0, 2.0, steps=9), counters("a", 1.0, steps=4))
    assert grown is not None
    assert (grown.steps, grown.histograms["request_queue_time_seconds"].sum) == (5, 2.0)
    anew = change(counters("b", 3.0, steps=2), counters("a", 1.0, 2.0, steps=9))
    assert anew is not None
    assert (anew.steps, anew.histograms["request_queue_time_seconds"].total) == (2, 1)
