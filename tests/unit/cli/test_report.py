"""The report of a load: counts, percentiles, throughput."""

from __future__ import annotations

from enova_cli.load.generator import prompt_ids
from enova_cli.load.report import percentiles, summarise
from enova_common.records import Outcome, RequestRecord
from enova_common.traces import TraceRequest


def result(arrival_s: float, outcome: Outcome, ttft_s: float | None = None, tokens: int | None = None) -> RequestRecord:
    return RequestRecord(
        arrival_s=arrival_s, prompt_tokens=1, output_tokens=tokens, outcome=outcome, ttft_s=ttft_s, duration_s=10.0
    )


def test_percentiles_are_nearest_rank_of_what_is_known() -> None:
    assert percentiles([None, *map(float, range(1, 101))]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None}


def test_the_report_counts_outcomes_and_takes_latencies_of_served_requests_alone() -> None:
    results = [
        result(0.0, Outcome.FINISHED, 0.5, tokens=100),
        result(5.0, Outcome.CUT, 9.0, tokens=10),
        result(10.0, Outcome.FAILED),
        result(10.0, Outcome.REFUSED),
    ]
    report = summarise(results, gpu_seconds=7.0)
    plain = report.to_plain()
    assert (plain["sent"], plain["served"], plain["failed"], plain["cut"]) == (4, 1, 2, 1)
    assert plain["ttft_s"]["p99"] == 0.5
    assert plain["tokens_per_s"] == 5.5
    assert plain["gpu_seconds"] == 7.0


def test_prompts_have_the_wanted_length_and_share_equal_prefixes() -> None:
    first = TraceRequest(arrival_s=0, prompt_tokens=1100, output_tokens=1, prefix_ids=("a", "b"))
    other = TraceRequest(arrival_s=0, prompt_tokens=700, output_tokens=1, prefix_ids=("a", "c"))
    one, two = prompt_ids(first, 0), prompt_ids(other, 1)
    assert (len(one), len(two)) == (1100, 700)
    assert one[:512] == two[:512]
    assert one[512:700] != two[512:]
