"""Traces: the three forms, told apart by their header, and what is refused."""

from __future__ import annotations

import random

import pytest

from enova_common.traces import Draws, Scenario, TraceError, TraceRequest, parse_trace

SCENARIO = Scenario(lengths=[(100, 20), (300, 60)], cv=1.0)


def draws(seed: int) -> Draws:
    source = random.Random(seed)
    return Draws(source.random, source.gammavariate)


def test_request_rows_are_read_and_counted_from_the_first_arrival() -> None:
    lines = ["arrival_s,prompt_tokens,output_tokens,class,prefix_hash_ids,ignored", "10,5,2,chat,1 2,x", "12.5,7,3,,,x"]
    assert list(parse_trace(lines)) == [
        TraceRequest(arrival_s=0.0, prompt_tokens=5, output_tokens=2, serving_class="chat", prefix_ids=("1", "2")),
        TraceRequest(arrival_s=2.5, prompt_tokens=7, output_tokens=3),
    ]


@pytest.mark.parametrize(
    ("rows", "line", "words"),
    [
        (["1,5,2", "0.5,5,2"], 3, "sort"),
        (["1,x,2"], 2, "not a number"),
        (["1,-5,2"], 2, "finite number"),
        (["1,nan,2"], 2, "finite number"),
        (["0,5,2", "99999999,5,2"], 3, "milliseconds"),
        (["0,99999999999,2"], 2, "another unit"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(rows: list[str], line: int, words: str) -> None:
    with pytest.raises(TraceError, match=words) as caught:
        list(parse_trace(["arrival_s,prompt_tokens,output_tokens", *rows]))
    assert caught.value.line == line


def test_an_unknown_header_is_refused() -> None:
    with pytest.raises(TraceError, match="unknown header"):
        parse_trace(["when,what", "1,2"])


def test_windows_of_counts_give_about_that_many_arrivals_in_each_window() -> None:
    lines = ["t_s,rate_rps,n_requests,recording_gap", "0,1,600,0", "600,1,0,0", "1200,1,900,1", "1800,1,1200,0"]
    requests = list(parse_trace(lines, scenario=SCENARIO, draws=draws(1)))
    counts = [sum(1 for r in requests if start <= r.arrival_s < start + 600) for start in (0, 600, 1200, 1800)]
    assert 500 < counts[0] < 700
    assert counts[1] == counts[2] == 0
    assert 1050 < counts[3] < 1350
    assert requests == sorted(requests, key=lambda r: r.arrival_s)
    assert {(r.prompt_tokens, r.output_tokens) for r in requests} == set(SCENARIO.lengths)


def test_windows_of_tokens_are_divided_by_the_mean_tokens_of_a_request() -> None:
    requests = list(parse_trace(["minute,tokens_per_s", "0,240", "1,2400"], scenario=SCENARIO, draws=draws(2)))
    first = sum(1 for r in requests if r.arrival_s < 60)
    assert 35 < first < 90  # 240 tokens/s * 60 s / 240 tokens a request
    assert 500 < len(requests) - first < 700


def test_windows_without_lengths_are_refused() -> None:
    with pytest.raises(TraceError, match="lengths"):
        parse_trace(["t_s,n_requests", "0,1"])
