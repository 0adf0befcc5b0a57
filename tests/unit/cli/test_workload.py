"""A workload is what its trace shows at its busiest, or what its words say; gaps and wrong words are refused."""

from __future__ import annotations

from typing import Any

import pytest

from enova_cli.workload import LENGTHS_MAX, busiest, cached_share, of_requests, read_workload
from enova_common.errors import InvalidField
from enova_common.traces import TraceRequest


def request(arrival_s: float, prompt: int = 100, output: int = 10, prefixes: tuple[str, ...] = ()) -> TraceRequest:
    return TraceRequest(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output, prefix_ids=prefixes)


def test_words_become_percentiles() -> None:
    found = read_workload("rate=5, prompt=512,output=128,prompt_p95=2048,cv=1.5,cached=0.3")
    assert found == {
        "requests_per_s": 5.0, "prompt_tokens": {"p50": 512.0, "p95": 2048.0}, "output_tokens": {"p50": 128.0},
        "arrival_cv": 1.5, "cached_prefix_share": 0.3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rate=5", "prompt is missing"),
        ("prompt=1,output=1", "rate is missing"),
        ("rate=0,prompt=1,output=1", "more than 0"),
        ("rate=-1,prompt=1,output=1", "more than 0"),
        ("rate=nan,prompt=1,output=1", "more than 0"),
        ("rate=five,prompt=1,output=1", "not a number"),
        ("rate=5,rate=6,prompt=1,output=1", "given twice"),
        ("rate=5,speed=6,prompt=1,output=1", "'speed=6'"),
    ],
)
def test_wrong_words_are_refused(text: str, says: str) -> None:
    with pytest.raises(InvalidField) as caught:
        read_workload(text)
    assert caught.value.field == "--workload"
    assert says in caught.value.message


def test_the_busiest_stretch_counts() -> None:
    quiet = [float(second) for second in range(0, 3000, 10)]
    busy = [3000 + index * 0.5 for index in range(600)]
    start, end, rate = busiest(quiet + busy)
    assert rate == pytest.approx(2.0, rel=0.02)
    assert start >= 2995
    assert end == start + 300


def test_a_short_trace_counts_as_a_whole() -> None:
    assert busiest([0.0, 1.0, 2.0, 3.0, 4.0])[2] == pytest.approx(1.0)


def test_requests_that_come_at_once_have_no_rate() -> None:
    with pytest.raises(InvalidField, match="at once"):
        of_requests([request(0.0), request(0.0)])


def test_a_silence_out_of_proportion_is_a_gap_unless_it_is_said_to_be_none() -> None:
    trace = [request(float(second)) for second in (*range(100), *range(5000, 5100))]
    with pytest.raises(InvalidField) as caught:
        of_requests(trace)
    assert caught.value.reason == "TRACE_GAP"
    assert "from 99 s to 5000 s" in caught.value.message
    assert of_requests(trace, allow_gaps=True)["requests_per_s"] == pytest.approx(100 / 300)


def test_a_sparse_trace_has_no_gaps_by_its_own_measure() -> None:
    assert of_requests([request(900.0 * index) for index in range(20)])["requests_per_s"]


def test_many_requests_are_thinned_evenly() -> None:
    found = of_requests([request(0.1 * index, prompt=index + 1) for index in range(3 * LENGTHS_MAX)])
    lengths: Any = found["lengths"]
    assert len(lengths) == LENGTHS_MAX
    assert [each["prompt_tokens"] for each in lengths[:3]] == [1, 4, 7]


def test_burstiness_is_that_of_the_busiest_stretch() -> None:
    even = of_requests([request(0.5 * index) for index in range(200)])
    bursts = of_requests([request(10.0 * (index // 20) + 0.01 * (index % 20)) for index in range(200)])
    assert even["arrival_cv"] == pytest.approx(0.0, abs=1e-6)
    bursty = bursts["arrival_cv"]
    assert isinstance(bursty, float)
    assert bursty > 3


def test_a_prefix_that_came_before_is_cached() -> None:
    trace = [request(0.0, 1024, prefixes=("a", "b")), request(1.0, 1024, prefixes=("a", "c"))]
    assert cached_share(trace) == pytest.approx(512 / 2048)
