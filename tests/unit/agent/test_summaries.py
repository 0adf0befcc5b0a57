"""The time end to end is that of requests which an engine answered: errors come back sooner, and would flatter it."""

from __future__ import annotations

import pytest

from enova_agent.ingress.summaries import Summaries
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
