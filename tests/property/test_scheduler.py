"""The scheduler: runs in closed form equal single steps; no token, block or request is lost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enova_recommender.engine import (
    Admitted,
    Event,
    Finished,
    FirstToken,
    Limits,
    Policy,
    Preempted,
    Rejected,
    Request,
    Resumed,
    Scheduler,
    Stepped,
)
from enova_recommender.performance import Affine
from enova_testing.examples import examples

# Irrational ratios keep step boundaries and arrivals from meeting by chance, where rounding would decide.
TIMES = Affine(
    base_s=0.01 * math.pi,
    prefill_token_s=1e-4 * math.e,
    prefill_pair_s=1e-7 * math.sqrt(3),
    sequence_s=1e-4 * math.sqrt(2),
    context_token_s=1e-6 * math.sqrt(5),
)


ROUNDING_S = 1e-9


@dataclass(frozen=True)
class Scenario:
    """Limits, requests with their arrivals, cancellations, and where time is cut."""

    limits: Limits
    arrivals: tuple[tuple[float, Request], ...]
    cancels: tuple[tuple[float, str], ...]
    cuts: tuple[float, ...]


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    block_size = draw(st.sampled_from([1, 4, 16]))
    longest = draw(st.integers(2, 60))
    max_num_seqs = draw(st.integers(1, 6))
    needed = -(-2 * longest // block_size)
    limits = Limits(
        num_blocks=draw(st.integers(needed, 4 * needed)),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.integers(max(max_num_seqs, 2), 80)),
        enable_prefix_caching=draw(st.booleans()),
        scheduling_policy=draw(st.sampled_from(Policy)),
        max_num_queued_reqs=draw(st.none() | st.integers(1, 8)),
    )
    arrivals = []
    at_s = 0.001
    for index in range(draw(st.integers(1, 12))):
        at_s += draw(st.integers(0, 40)) * 0.0123456789 * math.sqrt(7)
        prompt = draw(st.integers(1, longest))
        family = draw(st.integers(0, 2))
        request = Request(
            id=f"r{index}",
            prompt_tokens=prompt,
            output_tokens=draw(st.integers(1, longest)),
            priority=draw(st.integers(0, 2)),
            block_hashes=tuple(1000 * family + block for block in range(prompt // block_size)),
        )
        arrivals.append((at_s, request))
    cancels = [
        (draw(st.integers(1, 200)) * 0.0098765 * math.sqrt(11), request.id)
        for _, request in arrivals
        if draw(st.integers(0, 5)) == 0
    ]
    cuts = sorted(draw(st.lists(st.integers(1, 400), max_size=6)))
    cuts_s = tuple(cut * 0.00712345 * math.sqrt(13) for cut in cuts)
    return Scenario(limits, tuple(arrivals), tuple(sorted(cancels)), cuts_s)


def play(scenario: Scenario, *, coalesce: bool, upfront: bool) -> tuple[list[Event], set[str]]:
    """All events of a scenario, and the ids that a cancellation reached."""
    scheduler = Scheduler(scenario.limits, TIMES, coalesce=coalesce)
    acts: list[tuple[float, int, Request | str | None]] = [(at_s, 2, None) for at_s in scenario.cuts]
    acts += [(at_s, 1, name) for at_s, name in scenario.cancels]
    if upfront:
        for at_s, request in scenario.arrivals:
            scheduler.submit(request, at_s)
    else:
        acts += [(at_s, 0, request) for at_s, request in scenario.arrivals]
    events: list[Event] = []
    cancelled = set()
    for at_s, _, act in sorted(acts, key=lambda one: one[:2]):
        # A request joins at the first boundary at or after its arrival, also when it is announced just then.
        events += scheduler.advance(math.nextafter(at_s, -math.inf) if isinstance(act, Request) else at_s)
        scheduler.check()
        if isinstance(act, Request):
            scheduler.submit(act, at_s)
        elif isinstance(act, str) and scheduler.cancel(act):
            cancelled.add(act)
            scheduler.check()
    events += scheduler.advance(math.inf)
    scheduler.check()
    assert scheduler.running == scheduler.waiting == 0
    assert scheduler.kv_usage == 0.0
    return events, cancelled


def observable(events: list[Event]) -> list[Rejected | Admitted | FirstToken | Preempted | Resumed | Finished]:
    return [event for event in events if not isinstance(event, Stepped)]


def merged(events: list[Event]) -> list[Stepped]:
    """Equal steps in a row as one."""
    runs: list[Stepped] = []
    for event in events:
        if not isinstance(event, Stepped):
            continue
        last = runs[-1] if runs else None
        kind = (event.prefill_tokens, event.decode_sequences, event.made_tokens)
        if (
            last is not None
            and not event.prefill_tokens
            and kind == (last.prefill_tokens, last.decode_sequences, last.made_tokens)
            and abs(last.end_s - event.start_s) < 1e-9
        ):
            runs[-1] = Stepped(last.start_s, event.end_s, last.count + event.count, *kind)
        else:
            runs.append(event)
    return runs


def assert_same(one: list[Event], other: list[Event]) -> None:
    seen, expected = observable(one), observable(other)
    assert [(type(event), event.request) for event in seen] == [(type(event), event.request) for event in expected]
    for left, right in zip(seen, expected, strict=True):
        assert left.at_s == pytest.approx(right.at_s, abs=1e-9)
        if isinstance(left, Admitted) and isinstance(right, Admitted):
            assert left.cached_tokens == right.cached_tokens
    for run, single in zip(merged(one), merged(other), strict=True):
        assert (run.count, run.made_tokens) == (single.count, single.made_tokens)
        assert run.end_s == pytest.approx(single.end_s, abs=1e-9)


@examples(300)
@given(scenarios())
def test_runs_in_closed_form_equal_single_steps(scenario: Scenario) -> None:
    runs, _ = play(scenario, coalesce=True, upfront=False)
    single, _ = play(scenario, coalesce=False, upfront=False)
    assert_same(runs, single)


@examples(150)
@given(scenarios())
def test_announced_arrivals_equal_arrivals_as_they_come(scenario: Scenario) -> None:
    announced, reached = play(scenario, coalesce=True, upfront=True)
    coming, reached_too = play(scenario, coalesce=True, upfront=False)
    if not reached and not reached_too:
        assert_same(announced, coming)


@examples(200)
@given(scenarios())
def test_every_token_is_made_once_and_nobody_starves(scenario: Scenario) -> None:
    events, cancelled = play(scenario, coalesce=True, upfront=False)
    rejected = {event.request.id for event in events if isinstance(event, Rejected)}
    finished = [event.request for event in events if isinstance(event, Finished)]
    ids = {request.id for _, request in scenario.arrivals}
    assert sorted(request.id for request in finished) == sorted(ids - rejected - cancelled)
    if not cancelled:
        made = sum(event.count * event.made_tokens for event in events if isinstance(event, Stepped))
        assert made == sum(request.output_tokens for request in finished)


@examples(200)
@given(scenarios())
def test_each_request_lives_its_events_in_order(scenario: Scenario) -> None:
    events, _ = play(scenario, coalesce=True, upfront=False)
    arrival_s = {request.id: at_s for at_s, request in scenario.arrivals}
    last_s = 0.0
    story: dict[str, list[str]] = {}
    for event in observable(events):
        if not isinstance(event, Rejected):
            assert event.at_s >= last_s
            last_s = event.at_s
        assert event.at_s >= arrival_s[event.request.id]
        story.setdefault(event.request.id, []).append(type(event).__name__)
    for names in story.values():
        first = names.index(FirstToken.__name__) if FirstToken.__name__ in names else len(names)
        assert names.count(FirstToken.__name__) <= 1
        assert Finished.__name__ not in names[:first]
        assert names[0] in (Admitted.__name__, Rejected.__name__)
        assert names.count(Resumed.__name__) <= names.count(Preempted.__name__)
        # Each preemption is followed by an admission, unless the request was cancelled.
        assert names.count(Admitted.__name__) - names.count(Preempted.__name__) in (0, 1)


@examples(100)
@given(scenarios())
def test_next_event_never_lies_behind_what_happens_next(scenario: Scenario) -> None:
    scheduler = Scheduler(scenario.limits, TIMES)
    for at_s, request in scenario.arrivals:
        scheduler.submit(request, at_s)
    while (next_s := scheduler.next_event()) < math.inf:
        before = scheduler.advance(next_s - ROUNDING_S)
        assert all(event.at_s < next_s for event in observable(before))
        assert not any(isinstance(event, Finished | FirstToken | Preempted) for event in before)
        scheduler.advance(next_s + ROUNDING_S)
