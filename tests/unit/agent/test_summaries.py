"""The time end to end is that of requests which an engine answered: errors come back sooner, and would flatter it."""

from __future__ import annotations

import itertools

import pytest

from enova_agent.ingress.summaries import LENGTHS_MAX, Summaries
from enova_common.records import Outcome, RequestRecord


def record(outcome: Outcome, status: int, duration_s: float = 2.0) -> RequestRecord:
    return RequestRecord(
        arrival_s=1.0, outcome=outcome, deployment="d", replica="r", status=status, duration_s=duration_s, queue_s=0.5
    )


@pytest.mark.parametrize(
    ("outcome", "status", "counted"),
    [
        (Outcome.FINISHED, 200, True),
        (Outcome.FINISHED, 400, False),
        (Outcome.FAILED, 502, False),
        (Outcome.CUT, 200, False),
        (Outcome.CANCELLED, 200, False),
        (Outcome.REFUSED, 429, False),
    ],
)
def test_only_requests_that_were_answered_in_full_count_end_to_end(
    outcome: Outcome, status: int, counted: bool
) -> None:
    summaries = Summaries(start_s=0.0)
    summaries.ended(record(outcome, status))
    (summary,) = summaries.take(end_s=1.0).summaries
    assert (summary.e2e_s is not None) is counted
    assert summary.queue_s is not None
    if summary.e2e_s is not None:
        assert (sum(summary.e2e_s.counts), summary.e2e_s.sum) == (1, 2.0)


def _answer(prompt_tokens: int, output_tokens: int | None, outcome: Outcome = Outcome.FINISHED) -> RequestRecord:
    return RequestRecord(
        arrival_s=1.0, outcome=outcome, deployment="d", replica="r", status=200, duration_s=2.0,
        prompt_tokens=prompt_tokens, output_tokens=output_tokens,
    )  # fmt: skip


def test_lengths_are_of_requests_answered_in_full_prompt_and_answer_at_the_same_place() -> None:
    summaries = Summaries(start_s=0.0)
    for record_ in (_answer(10, 3), _answer(20, None), _answer(30, 9, Outcome.CUT), _answer(40, 8)):
        summaries.ended(record_)
    (summary,) = summaries.take(end_s=1.0).summaries
    assert (summary.prompt_lengths, summary.output_lengths) == ((10, 40), (3, 8))


@pytest.mark.parametrize("requests", [LENGTHS_MAX, LENGTHS_MAX + 1, 1000, 4096])
def test_lengths_are_bounded_and_spread_evenly_over_the_interval(requests: int) -> None:
    summaries = Summaries(start_s=0.0)
    for number in range(requests):
        summaries.ended(_answer(number + 1, 1))
    (summary,) = summaries.take(end_s=1.0).summaries
    kept = summary.prompt_lengths
    steps = {later - earlier for earlier, later in itertools.pairwise(kept)}
    assert min(requests, LENGTHS_MAX // 2) <= len(kept) <= LENGTHS_MAX
    assert len(steps) == 1
    assert kept[0] == 1
    assert requests - kept[-1] < steps.pop()
