"""Takes the agent's own requests out of an engine's counters, so that they never count as somebody's traffic.

An engine counts canaries and readiness tokens like any request. They are sent while nothing else runs, so nearly
always all that changed between two scrapes is theirs: then the whole change is taken out, histograms included.
Where real requests were served in between as well, counts and tokens are corrected exactly, and each canary takes
one entry out of each histogram of requests: as long as canaries lasted when they were alone, in the nearest bucket that
grew. Means over few requests would else be those of canaries. What an answer took beyond that the canary waited: one
that is asked while an engine is busy stands in its queue, behind all that run.

A canary answered before a page was asked for is on that page or never will be. One that was open meanwhile may be:
it is taken for counted, so that no counter ever goes back; if it was not, it is let through with the next page.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Mapping

from enova_agent.core.exposition import BUCKETS
from enova_agent.core.telemetry import CanaryCounts, EngineMetrics, EngineScrape, Histogram
from enova_common.vllm import FinishReason

_COUNTERS = (
    "prompt_tokens_total",
    "generation_tokens_total",
    "preemptions_total",
    "iterations_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
)
# One entry a request each; a canary has one token, hence none between tokens.
_OF_REQUESTS = frozenset({
    "time_to_first_token_seconds",
    "request_time_per_output_token_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "e2e_request_latency_seconds",
})
_WITH_WAITING = frozenset({
    "time_to_first_token_seconds",
    "request_queue_time_seconds",
    "e2e_request_latency_seconds",
})
_NOTHING = EngineMetrics()


class CanaryFilter:
    """The counters of one replica without canaries. One instance a replica, fed with each scrape in order.

    What an adopted engine counted before holds canaries of an agent that is gone, nobody knows how many: its
    counters begin at zero with the adoption.
    """

    def __init__(self) -> None:
        self._instance = ""
        self._before = _NOTHING       # the last raw metrics
        self._taken_out = _NOTHING    # what is not ours to report, since the engine started
        self._shown = _NOTHING        # those without canaries
        self._alone = _NOTHING        # of what was taken out, what canaries counted that were alone
        self._attributed = 0          # canaries that are accounted for
        self._counted = CanaryCounts()  # those of the last page
        self._lone = CanaryCounts()   # answered between pages on which canaries were alone

    def metrics(self, scrape: EngineScrape) -> EngineMetrics | None:
        """The metrics of a scrape without canaries; None where it has none."""
        if scrape.instance != self._instance:
            self._instance = scrape.instance
            self._before = self._taken_out = _NOTHING
            self._attributed = 0
            self._counted = CanaryCounts()
        now = scrape.metrics
        if now is None:
            return None
        if now is self._before:
            return self._shown     # the same page once more
        if scrape.adopted and self._before is _NOTHING:
            self._taken_out, self._attributed = now, scrape.canaries.finished
        else:
            self._attribute(now, scrape.canaries_before, scrape.canaries)
        self._before, self._counted = now, scrape.canaries
        self._shown = _minus(now, self._taken_out) if self._taken_out is not _NOTHING else now
        return self._shown

    def _attribute(self, now: EngineMetrics, asked: CanaryCounts, came: CanaryCounts) -> None:
        """Decides how much of the change since the last page is the canaries' that were not yet accounted for."""
        known = max(self._attributed, asked.finished)
        most = max(known, came.started) - self._attributed
        ended = now.finished - self._before.finished
        seen = min(most, round(max(0.0, ended)))
        generated = (now.generation_tokens_total or 0.0) - (self._before.generation_tokens_total or 0.0)
        if 0 < ended <= most and generated <= ended:  # each canary asks for one token
            change = _minus(now, self._before)
            self._taken_out = _plus(self._taken_out, change)
            self._alone = _plus(self._alone, change)
            self._lone = CanaryCounts(
                finished=self._lone.finished + came.finished - self._counted.finished,
                lasted_s=self._lone.lasted_s + came.lasted_s - self._counted.lasted_s,
            )
        elif seen > 0:
            prompt_tokens = came.prompt_tokens / came.finished if came.finished else 1.0
            change = EngineMetrics(
                prompt_tokens_total=seen * prompt_tokens,
                generation_tokens_total=float(seen),
                finished_total={FinishReason.LENGTH: float(seen)},
                histograms=_entries(
                    seen, _minus(now, self._before), alone=self._alone, waited_s=self._waited_s(came)
                ),
            )
            self._taken_out = _plus(self._taken_out, change)
        self._attributed = max(known, self._attributed + seen)


    def _waited_s(self, came: CanaryCounts) -> float:
        """How much longer canaries lasted since the last page, each, than those that were alone."""
        fresh = came.finished - self._counted.finished
        if fresh <= 0 or self._lone.finished <= 0:
            return 0.0
        lasted_s = (came.lasted_s - self._counted.lasted_s) / fresh
        return max(0.0, lasted_s - self._lone.lasted_s / self._lone.finished)


def _entries(
    count: int, change: EngineMetrics, *, alone: EngineMetrics, waited_s: float
) -> tuple[Histogram, ...]:
    """What `count` canaries put into the histograms of requests, among what these grew by."""
    typical = {
        each.metric: each.sum / each.counts[-1] for each in alone.histograms if each.counts and each.counts[-1]
    }
    return tuple(
        _taken(count, each, typical.get(each.metric, 0.0) + (waited_s if each.metric in _WITH_WAITING else 0.0))
        for each in change.histograms
        if each.metric in _OF_REQUESTS and each.counts
    )


def _taken(count: int, grown: Histogram, value: float) -> Histogram:
    """`count` entries of about this value out of what a histogram grew by: fewer where it has not so many."""
    rows = [one - below for one, below in zip(grown.counts, (0, *grown.counts), strict=False)]
    bounds = BUCKETS.get(grown.metric, ())[: len(rows)]
    wanted = next((index for index, bound in enumerate(bounds) if value <= bound), 0)
    taken = [0] * len(rows)
    for index in sorted(range(len(rows)), key=lambda index: abs(index - wanted)):
        taken[index] = max(0, min(rows[index], count - sum(taken)))
    total = sum(taken)
    counts = tuple(itertools.accumulate(taken))
    return Histogram(metric=grown.metric, counts=counts, sum=min(grown.sum, value * total))


def _plus(one: EngineMetrics, other: EngineMetrics) -> EngineMetrics:
    return _combined(one, other, 1.0)


def _minus(one: EngineMetrics, other: EngineMetrics) -> EngineMetrics:
    return _combined(one, other, -1.0)


def _combined(one: EngineMetrics, other: EngineMetrics, sign: float) -> EngineMetrics:
    """Counters and histograms combined, never below zero; gauges are those of `one`."""
    counters = {name: _sum(getattr(one, name), getattr(other, name), sign) for name in _COUNTERS}
    reasons = dict.fromkeys((*one.finished_total, *other.finished_total))
    finished: Mapping[str, float] = {
        reason: max(0.0, one.finished_total.get(reason, 0.0) + sign * other.finished_total.get(reason, 0.0))
        for reason in reasons
    }
    mine = {histogram.metric: histogram for histogram in one.histograms}
    theirs = {histogram.metric: histogram for histogram in other.histograms}
    histograms = tuple(
        _histogram(metric, mine.get(metric), theirs.get(metric), sign) for metric in dict.fromkeys((*mine, *theirs))
    )
    # mypy takes the names in `counters` for any field's.
    return dataclasses.replace(one, **counters, finished_total=finished, histograms=histograms)  # type: ignore[arg-type]


def _sum(one: float | None, other: float | None, sign: float) -> float | None:
    if one is None and sign < 0:
        return None
    return max(0.0, (one or 0.0) + sign * (other or 0.0))


def _histogram(metric: str, one: Histogram | None, other: Histogram | None, sign: float) -> Histogram:
    if other is None:
        assert one is not None, "one of the two has it"
        return one
    one = one or Histogram(metric=metric, counts=(0,) * len(other.counts), sum=0.0)
    combine = operator.add if sign > 0 else operator.sub
    counts = tuple(map(combine, one.counts, other.counts))
    if min(counts) < 0:
        counts = tuple(max(0, count) for count in counts)
    return Histogram(metric=metric, counts=counts, sum=max(0.0, one.sum + sign * other.sum))
