"""What is read off an engine's metrics page, and what is not believed."""

from __future__ import annotations

import pytest

from enova_agent.core.exposition import BUCKETS, LINES_MAX, ExpositionParser, MalformedExposition
from enova_agent.core.telemetry import EngineMetrics

LABELS = 'engine="0",model_name="m"'


def page(*lines: str) -> bytes:
    return "\n".join(["# HELP vllm:num_requests_running Number of requests.", *lines, ""]).encode()


def parse(*lines: str) -> EngineMetrics:
    return ExpositionParser().parse(page(*lines))


def histogram(metric: str, counts: dict[str, float], total: float = 1.0, labels: str = LABELS) -> list[str]:
    buckets = [f'vllm:{metric}_bucket{{{labels},le="{bound}"}} {count}' for bound, count in counts.items()]
    return [*buckets, f"vllm:{metric}_sum{{{labels}}} {total}", f"vllm:{metric}_count{{{labels}}} {counts['+Inf']}"]


def full(metric: str) -> dict[str, float]:
    """A count for each bucket of vLLM's table: 1, 2, 3, ..."""
    bounds = BUCKETS[metric]
    return {("+Inf" if bound == float("inf") else str(bound)): index + 1.0 for index, bound in enumerate(bounds)}


def test_gauges_and_counters_are_read_and_what_is_not_there_is_none() -> None:
    metrics = parse(
        f"vllm:num_requests_running{{{LABELS}}} 3.0",
        f"vllm:generation_tokens_total{{{LABELS}}} 1.5e+03",
        f'vllm:request_success_total{{finished_reason="stop",{LABELS}}} 2',
        f'vllm:request_success_total{{finished_reason="length",{LABELS}}} 4',
    )
    assert (metrics.running, metrics.generation_tokens_total) == (3.0, 1500.0)
    assert metrics.finished_total == {"stop": 2.0, "length": 4.0}
    assert metrics.finished == 6.0
    assert (metrics.waiting, metrics.kv_cache_usage, metrics.iterations_total) == (None, None, None)
    assert metrics.error == ""


def test_data_parallel_cores_are_added_but_their_kv_use_is_averaged() -> None:
    metrics = parse(
        'vllm:num_requests_running{engine="0"} 3',
        'vllm:num_requests_running{engine="1"} 4',
        'vllm:kv_cache_usage_perc{engine="0"} 0.5',
        'vllm:kv_cache_usage_perc{engine="1"} 0.1',
        *histogram("iteration_tokens_total", full("iteration_tokens_total"), labels='engine="0"'),
        *histogram("iteration_tokens_total", full("iteration_tokens_total"), labels='engine="1"'),
    )
    assert metrics.running == 7.0
    assert metrics.kv_cache_usage == pytest.approx(0.3)
    assert metrics.histograms[0].counts == tuple(2 * (index + 1) for index in range(14))
    assert metrics.histograms[0].sum == 2.0
    assert metrics.iterations_total == 28.0


@pytest.mark.parametrize(
    ("old", "figure"),
    [
        ("vllm:gpu_cache_usage_perc", "kv_cache_usage"),
        ("vllm:gpu_prefix_cache_hits_total", "prefix_cache_hits_total"),
        ("vllm:gpu_prefix_cache_queries_total", "prefix_cache_queries_total"),
    ],
)
def test_the_older_names_are_understood(old: str, figure: str) -> None:
    assert getattr(parse(f"{old}{{{LABELS}}} 0.25"), figure) == 0.25


def test_where_both_names_are_shown_the_newer_counts_alone() -> None:
    metrics = parse(f"vllm:gpu_cache_usage_perc{{{LABELS}}} 0.9", f"vllm:kv_cache_usage_perc{{{LABELS}}} 0.2")
    assert metrics.kv_cache_usage == 0.2


def test_the_old_token_latency_histogram_goes_by_its_new_name() -> None:
    metrics = parse(*histogram("time_per_output_token_seconds", full("inter_token_latency_seconds")))
    assert metrics.histograms[0].metric == "inter_token_latency_seconds"


@pytest.mark.parametrize("value", ["NaN", "-1", "+Inf", "1e308", "", "garbage", "0x10"])
def test_a_value_that_can_be_no_count_is_missing_and_named(value: str) -> None:
    metrics = parse(f"vllm:num_requests_running{{{LABELS}}} {value}", f"vllm:num_requests_waiting{{{LABELS}}} 2")
    assert metrics.running is None
    assert metrics.waiting == 2.0
    assert metrics.error == f"a metric has the value {value}"


def test_one_bad_bucket_costs_its_histogram_only() -> None:
    counts = full("iteration_tokens_total")
    decreasing = {**counts, "8.0": 99.0}
    metrics = parse(
        *histogram("iteration_tokens_total", decreasing),
        *histogram("time_to_first_token_seconds", full("time_to_first_token_seconds")),
    )
    assert [each.metric for each in metrics.histograms] == ["time_to_first_token_seconds"]
    assert metrics.error == "the buckets of iteration_tokens_total decrease"
    assert metrics.iterations_total is None


def test_a_histogram_without_its_last_bucket_is_not_believed() -> None:
    lines = [line for line in histogram("iteration_tokens_total", full("iteration_tokens_total")) if "+Inf" not in line]
    assert parse(*lines).error == "iteration_tokens_total has no +Inf bucket or no sum"


def test_other_bounds_than_vllms_never_count_too_much() -> None:
    counts = {"10.0": 5.0, "100.0": 7.0, "+Inf": 9.0}
    (read,) = parse(*histogram("iteration_tokens_total", counts)).histograms
    by_bound = dict(zip(BUCKETS["iteration_tokens_total"], read.counts, strict=True))
    assert [by_bound[bound] for bound in (1.0, 8.0, 16.0, 64.0, 128.0, 16384.0)] == [0, 0, 5, 5, 7, 7]
    assert read.counts[-1] == 9


def test_a_page_that_changes_its_layout_is_learnt_again() -> None:
    parser = ExpositionParser()
    first = page('vllm:num_requests_running{model_name="a"} 1', "other_total 4")
    assert parser.parse(first).running == 1.0
    moved = page("other_total 4", 'vllm:num_requests_running{model_name="a"} 2')
    assert parser.parse(moved).running == 2.0
    renamed = page("other_total 4", 'vllm:num_requests_running{model_name="b"} 3')
    assert parser.parse(renamed).running == 3.0
    grown = page("other_total 4", *(f'vllm:num_requests_running{{engine="{n}"}} 1' for n in range(3)))
    assert parser.parse(grown).running == 3.0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>not found</html>",
        b"process_open_fds 5\n",
        b"\xff\xfe\x00",
        b'vllm:num_requests_running{engine="0" 3\n',
        b"vllm:num_requests_running{engine=\xff} 3\n",
        b'vllm:iteration_tokens_total_bucket{le="many"} 3\n',
        b'vllm:num_requests_running{engine="0"} 3 1700000000\n',
    ],
)
def test_a_page_of_something_else_is_an_error_not_a_figure(body: bytes) -> None:
    with pytest.raises(MalformedExposition):
        ExpositionParser().parse(body)


def test_a_page_with_too_many_lines_is_not_read() -> None:
    with pytest.raises(MalformedExposition, match="over the bound"):
        ExpositionParser().parse(b"vllm:num_requests_running 1\n" * (LINES_MAX + 1))


def test_the_room_of_the_kv_cache_is_read_off_its_label_and_added_over_cores() -> None:
    assert parse(f"vllm:num_requests_running{{{LABELS}}} 3").kv_cache_tokens is None
    info = 'vllm:cache_config_info{{engine="{0}",block_size="16",kv_cache_size_tokens="{1}"}} 1.0'
    metrics = parse(info.format(0, 4096), info.format(1, 2048), f"vllm:num_requests_running{{{LABELS}}} 3")
    assert metrics.kv_cache_tokens == 6144.0
    unknown = parse(info.format(0, "None"), f"vllm:num_requests_running{{{LABELS}}} 3")
    assert unknown.kv_cache_tokens is None
