"""Requests of the agent's own never count as traffic."""

from __future__ import annotations

import random
from dataclasses import replace

from enova_agent.core.canary import CanaryFilter
from enova_agent.core.exposition import BUCKETS
from enova_agent.core.telemetry import CanaryCounts, EngineMetrics, EngineScrape, Histogram

E2E_BOUNDS = BUCKETS["e2e_request_latency_seconds"]


def metrics(*, finished: int, tokens: int, steps: int = 0, slow: int = 0) -> EngineMetrics:
    """An engine that finished so many requests, `slow` of them in the second bucket."""
    return EngineMetrics(
        running=0.0,
        prompt_tokens_total=10.0 * finished,
        generation_tokens_total=float(tokens),
        iterations_total=float(steps or tokens),
        finished_total={"length": float(finished)},
        histograms=(
            Histogram(metric="e2e_request_latency_seconds", counts=(finished - slow, finished), sum=1.0 * slow),
        ),
    )


def scrape(
    value: EngineMetrics | None,
    *,
    sent: int = 0,
    answered: int | None = None,
    instance: str = "i",
    lasted_s: float = 0.0,
) -> EngineScrape:
    done = sent if answered is None else answered
    counts = CanaryCounts(
        started=sent, finished=done, prompt_tokens=10 * done, output_tokens=done, lasted_s=lasted_s
    )
    return EngineScrape(
        replica="r", instance=instance, taken_s=0.0, metrics=value, canaries_before=counts, canaries=counts
    )


def test_an_idle_engine_with_canaries_alone_shows_nothing() -> None:
    canaries = CanaryFilter()
    for count in range(1, 6):
        seen = canaries.metrics(scrape(metrics(finished=count, tokens=count), sent=count))
        assert seen is not None
        assert seen.finished == 0
        assert seen.generation_tokens_total == 0.0
        assert seen.prompt_tokens_total == 0.0
        assert seen.iterations_total == 0.0
        assert seen.histograms[0].counts == (0, 0)


def test_a_canary_in_flight_that_the_engine_counts_already_shows_nothing_either() -> None:
    canaries = CanaryFilter()
    seen = canaries.metrics(scrape(metrics(finished=1, tokens=1), sent=1, answered=0))
    assert seen is not None
    assert seen.finished == 0


def test_the_same_page_twice_is_one_page() -> None:
    canaries = CanaryFilter()
    page = metrics(finished=1, tokens=1)
    assert canaries.metrics(scrape(page, sent=1)) == canaries.metrics(scrape(page, sent=2, answered=2))
    seen = canaries.metrics(scrape(metrics(finished=3, tokens=9), sent=2))
    assert seen is not None
    assert (seen.finished, seen.generation_tokens_total) == (1, 7.0)


def test_a_canary_open_while_the_page_was_made_is_settled_by_the_next_page() -> None:
    # One of others with 7 tokens is on the first page; the canary is on the first or on the second.
    before = CanaryCounts()
    after = CanaryCounts(started=1, finished=1, prompt_tokens=10, output_tokens=1)
    for on_first in (True, False):
        canaries = CanaryFilter()
        canaries.metrics(scrape(metrics(finished=0, tokens=0)))
        first = metrics(finished=2, tokens=8) if on_first else metrics(finished=1, tokens=7)
        shown = [canaries.metrics(replace(scrape(first), canaries_before=before, canaries=after))]
        shown.append(canaries.metrics(scrape(metrics(finished=2, tokens=8), sent=1)))
        values = [(seen.finished, seen.generation_tokens_total, seen.prompt_tokens_total) for seen in shown if seen]
        assert values[1] == (1, 7.0, 10.0)
        assert values[0] == ((1, 7.0, 10.0) if on_first else (0, 6.0, 0.0))  # too little for a second, never too much


def test_requests_of_others_stay_whole() -> None:
    canaries = CanaryFilter()
    canaries.metrics(scrape(metrics(finished=1, tokens=1), sent=1))
    seen = canaries.metrics(scrape(metrics(finished=4, tokens=91, slow=3), sent=1))
    assert seen is not None
    assert seen.finished == 3
    assert seen.generation_tokens_total == 90.0
    assert seen.histograms[0].counts == (0, 3)
    assert seen.histograms[0].sum == 3.0


def test_mixed_with_others_counts_and_tokens_are_still_right() -> None:
    canaries = CanaryFilter()
    canaries.metrics(scrape(metrics(finished=0, tokens=0)))
    seen = canaries.metrics(scrape(metrics(finished=3, tokens=41), sent=1))
    assert seen is not None
    assert (seen.finished, seen.generation_tokens_total, seen.prompt_tokens_total) == (2, 40.0, 20.0)


def test_mixed_with_others_a_canary_takes_its_entry_out_of_the_histograms() -> None:
    canaries = CanaryFilter()

    def page(*values_s: float) -> EngineMetrics:
        counts = tuple(sum(value <= bound for value in values_s) for bound in E2E_BOUNDS)
        histogram = Histogram(metric="e2e_request_latency_seconds", counts=counts, sum=sum(values_s))
        return replace(metrics(finished=len(values_s), tokens=40 * len(values_s)), histograms=(histogram,))

    alone = replace(page(0.02), generation_tokens_total=1.0)
    assert canaries.metrics(scrape(alone, sent=1)) is not None
    # The second canary ends in the same interval as a request of five seconds.
    seen = canaries.metrics(scrape(page(0.02, 5.0, 0.03), sent=2))
    assert seen is not None
    (histogram,) = seen.histograms
    assert histogram.counts[-1] == 1
    assert histogram.counts[E2E_BOUNDS.index(2.5)] == 0
    assert abs(histogram.sum - 5.0) < 0.02


def test_a_canary_that_waited_in_the_queue_of_a_busy_engine_takes_its_waiting_along() -> None:
    canaries = CanaryFilter()
    queue, decode = "request_queue_time_seconds", "request_decode_time_seconds"

    def page(queued_s: list[float], decoded_s: list[float]) -> EngineMetrics:
        histograms = tuple(
            Histogram(
                metric=metric, counts=tuple(sum(value <= bound for value in values) for bound in BUCKETS[metric]),
                sum=sum(values),
            )
            for metric, values in ((queue, queued_s), (decode, decoded_s))
        )  # fmt: skip
        return replace(metrics(finished=len(queued_s), tokens=40 * len(queued_s)), histograms=histograms)

    alone = replace(page([0.001], [0.0]), generation_tokens_total=1.0)
    assert canaries.metrics(scrape(alone, sent=1, lasted_s=0.02)) is not None
    # Three requests that began at once, and a canary behind them that had to wait until one of them ended.
    seen = canaries.metrics(
        scrape(page([0.001, 0.01, 0.01, 0.01, 4.0], [0.0, 4.0, 5.0, 5.0, 0.0]), sent=2, lasted_s=0.02 + 4.019)
    )
    assert seen is not None
    found = {histogram.metric: histogram for histogram in seen.histograms}
    assert [found[metric].counts[-1] for metric in (queue, decode)] == [3, 3]
    assert abs(found[queue].sum - 0.03) < 1e-9
    assert found[queue].counts[BUCKETS[queue].index(0.3)] == 3
    assert found[decode].sum == 14.0


def test_no_histogram_ever_goes_back_or_loses_its_order() -> None:
    draw = random.Random(4)
    canaries = CanaryFilter()
    counts, total, ended, sent, lasted_s = [0] * len(E2E_BOUNDS), 0.0, 0, 0, 0.0
    before = Histogram(metric="e2e_request_latency_seconds", counts=tuple(counts), sum=0.0)
    for _ in range(300):
        for own in [True] * draw.randint(0, 2) + [False] * draw.randint(0, 3):
            value = draw.uniform(0.01, 0.4) if own else draw.uniform(0.2, 30.0)
            counts = [count + (value <= bound) for count, bound in zip(counts, E2E_BOUNDS, strict=True)]
            total, ended, sent = total + value, ended + 1, sent + own
            lasted_s += value + draw.uniform(0.0, 9.0) if own else 0.0
        histogram = Histogram(metric="e2e_request_latency_seconds", counts=tuple(counts), sum=total)
        seen = canaries.metrics(
            scrape(
                replace(metrics(finished=ended, tokens=9 * ended), histograms=(histogram,)),
                sent=sent,
                lasted_s=lasted_s,
            )
        )
        assert seen is not None
        (now,) = seen.histograms
        assert list(now.counts) == sorted(now.counts)
        assert all(new >= old for new, old in zip(now.counts, before.counts, strict=True))
        assert now.sum >= before.sum - 1e-9
        assert now.counts[-1] == ended - sent
        before = now


def test_lost_canaries_never_eat_requests_of_others() -> None:
    canaries = CanaryFilter()
    for sent in range(50):  # broken off, or of a kind that this engine does not count
        canaries.metrics(scrape(metrics(finished=0, tokens=0), sent=sent, answered=sent - sent % 2))
    canaries.metrics(scrape(metrics(finished=0, tokens=0), sent=50))
    canaries.metrics(scrape(metrics(finished=0, tokens=0), sent=50))
    seen = canaries.metrics(scrape(metrics(finished=40, tokens=4_000), sent=50))
    assert seen is not None
    assert (seen.finished, seen.generation_tokens_total) == (40, 4_000.0)


def test_an_adopted_engine_counts_from_its_adoption() -> None:
    canaries = CanaryFilter()
    first = canaries.metrics(replace(scrape(metrics(finished=700, tokens=900, slow=5)), adopted=True))
    assert first is not None
    assert (first.finished, first.generation_tokens_total, first.histograms[0].counts) == (0, 0.0, (0, 0))
    later = canaries.metrics(replace(scrape(metrics(finished=703, tokens=990, slow=8)), adopted=True))
    assert later is not None
    assert (later.finished, later.generation_tokens_total, later.histograms[0].counts) == (3, 90.0, (0, 3))


def test_a_restarted_engine_starts_anew() -> None:
    canaries = CanaryFilter()
    canaries.metrics(scrape(metrics(finished=5, tokens=5), sent=5))
    seen = canaries.metrics(scrape(metrics(finished=2, tokens=20), sent=0, instance="j"))
    assert seen is not None
    assert (seen.finished, seen.generation_tokens_total) == (2, 20.0)


def test_missing_stays_missing() -> None:
    canaries = CanaryFilter()
    assert canaries.metrics(scrape(None, sent=3)) is None
    canaries.metrics(scrape(metrics(finished=1, tokens=1), sent=1))
    blank = replace(metrics(finished=1, tokens=1), iterations_total=None)
    seen = canaries.metrics(scrape(blank, sent=1))
    assert seen is not None
    assert seen.iterations_total is None
    assert seen.preemptions_total is None
