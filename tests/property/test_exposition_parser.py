"""The fast parser says what the general one says, on vLLM's own page and on pages that were tampered with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from enova_agent.core.exposition import BUCKETS, HISTOGRAMS, ExpositionParser, MalformedExposition
from enova_testing.examples import examples

PAGE = (Path(__file__).parents[1] / "fixtures" / "vllm_metrics.txt").read_bytes()
LINES = PAGE.split(b"\n")
SAMPLES = [index for index, line in enumerate(LINES) if line.startswith(b"vllm:")]


def by_general_parser(page: bytes) -> Mapping[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def total(samples: Mapping[tuple[str, tuple[tuple[str, str], ...]], float], name: str, **labels: str) -> float:
    return sum(
        value
        for (sample, has), value in samples.items()
        if sample == name and all(dict(has).get(key) == wanted for key, wanted in labels.items())
    )


def check(page: bytes, parser: ExpositionParser) -> None:
    metrics, samples = parser.parse(page), by_general_parser(page)
    figures = {
        "vllm:num_requests_running": metrics.running,
        "vllm:num_requests_waiting": metrics.waiting,
        "vllm:kv_cache_usage_perc": metrics.kv_cache_usage,
        "vllm:prompt_tokens_total": metrics.prompt_tokens_total,
        "vllm:generation_tokens_total": metrics.generation_tokens_total,
        "vllm:num_preemptions_total": metrics.preemptions_total,
        "vllm:prefix_cache_queries_total": metrics.prefix_cache_queries_total,
        "vllm:prefix_cache_hits_total": metrics.prefix_cache_hits_total,
        "vllm:iteration_tokens_total_count": metrics.iterations_total,
    }
    assert figures == {name: total(samples, name) for name in figures}
    for reason, count in metrics.finished_total.items():
        assert count == total(samples, "vllm:request_success_total", finished_reason=reason)
    assert {histogram.metric for histogram in metrics.histograms} == set(HISTOGRAMS)
    for histogram in metrics.histograms:
        name = f"vllm:{histogram.metric}"
        assert histogram.sum == total(samples, f"{name}_sum")
        for bound, count in zip(BUCKETS[histogram.metric], histogram.counts, strict=True):
            le = "+Inf" if math.isinf(bound) else str(bound)
            assert count == total(samples, f"{name}_bucket", le=le)


def test_the_captured_page_is_read_as_by_the_general_parser() -> None:
    check(PAGE, ExpositionParser())


@examples(10)
@given(st.lists(st.floats(min_value=1.0, max_value=1e6), min_size=1, max_size=3))
def test_pages_of_one_engine_over_time_are_read_alike(factors: list[float]) -> None:
    parser = ExpositionParser()
    for factor in factors:
        lines = list(LINES)
        for index in SAMPLES:
            before, _, value = lines[index].rpartition(b" ")
            # Floored, as counts are, and so that buckets stay in order.
            scaled = math.floor(float(value) * factor) if float(value) < 1e15 else float(value)
            lines[index] = b"%s %r" % (before, float(scaled)) if b"_sum" not in before else lines[index]
        check(b"\n".join(lines), parser)


@pytest.mark.parametrize("seed", range(3))
@examples(60)
@given(
    edits=st.lists(
        st.tuples(
            st.sampled_from(SAMPLES),
            st.one_of(
                st.sampled_from([b"NaN", b"-1", b"+Inf", b"-Inf", b"1e308", b"5e-324", b"", b"1_0", b"\xff", b"x y"]),
                st.binary(max_size=12),
            ),
        ),
        min_size=1,
        max_size=6,
    ),
    drop=st.lists(st.sampled_from(SAMPLES), max_size=4),
    cut=st.integers(min_value=0, max_value=len(PAGE)),
)
def test_whatever_an_engine_writes_figures_are_sound_or_missing(
    seed: int, edits: list[tuple[int, bytes]], drop: list[int], cut: int
) -> None:
    lines: list[bytes] = list(LINES)
    for index, value in edits:
        lines[index] = lines[index].rpartition(b" ")[0] + b" " + value
    page = b"\n".join(line for index, line in enumerate(lines) if index not in drop)
    parser = ExpositionParser()
    pages = [page, page[:cut], page] if seed else [PAGE, page, PAGE]
    for each in pages:
        try:
            metrics = parser.parse(each)
        except MalformedExposition:
            continue
        figures = [metrics.running, metrics.kv_cache_usage, metrics.generation_tokens_total, metrics.iterations_total]
        assert all(figure is None or 0.0 <= figure < 2**63 for figure in figures)
        for histogram in metrics.histograms:
            assert list(histogram.counts) == sorted(histogram.counts)
            assert len(histogram.counts) == len(BUCKETS[histogram.metric])
            assert 0 <= histogram.counts[-1] < 2**63
    if not seed:
        check(PAGE, parser)
