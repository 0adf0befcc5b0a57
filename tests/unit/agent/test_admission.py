"""The rules of the gate before an engine."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from enova_agent.core.admission import Admitted, Gate, Outcome, Refusal, Refused, Ticket


def offer(gate: Gate, *tickets: str, priority: int = 0, deadline_s: float = 100.0) -> list[Outcome]:
    return [out for ticket in tickets for out in gate.offer(ticket, priority=priority, deadline_s=deadline_s)]


def test_no_more_than_the_limit_are_inside_and_the_rest_waits_in_order() -> None:
    gate = Gate(max_concurrency=2, queue_limit=8)
    assert offer(gate, "a", "b", "c", "d") == [Admitted("a"), Admitted("b")]
    assert (gate.in_flight, gate.queued) == (2, 2)
    assert gate.leave("a") == (Admitted("c"),)
    assert gate.leave("b") == (Admitted("d"),)
    assert gate.leave("c") == ()
    assert (gate.in_flight, gate.queued) == (1, 0)


def test_priority_goes_before_order() -> None:
    gate = Gate(max_concurrency=1, queue_limit=8)
    offer(gate, "inside")
    offer(gate, "late", "later", priority=5)
    offer(gate, "first", "second", priority=1)
    order = ["inside"]
    while outcomes := gate.leave(order[-1]):
        order.extend(str(outcome.ticket) for outcome in outcomes)
    assert order == ["inside", "first", "second", "late", "later"]


def test_over_the_limit_is_refused() -> None:
    gate = Gate(max_concurrency=1, queue_limit=1)
    assert offer(gate, "a", "b", "c") == [Admitted("a"), Refused("c", Refusal.FULL)]
    assert offer(Gate(max_concurrency=1, queue_limit=0), "a", "b")[1] == Refused("b", Refusal.FULL)


def test_a_higher_rank_takes_the_place_of_the_last_of_the_lowest() -> None:
    gate = Gate(max_concurrency=1, queue_limit=3)
    offer(gate, "inside")
    offer(gate, "low1", "low2", priority=9)
    offer(gate, "mid", priority=5)
    assert offer(gate, "high", priority=1) == [Refused("low2", Refusal.DISPLACED)]
    assert offer(gate, "equal", priority=9) == [Refused("equal", Refusal.FULL)]
    assert gate.leave("inside") == (Admitted("high"),)


def test_waiting_ends_at_the_deadline_and_being_inside_does_not() -> None:
    gate = Gate(max_concurrency=1, queue_limit=8)
    offer(gate, "inside", "soon", deadline_s=10.0)
    offer(gate, "later", deadline_s=20.0)
    assert gate.expire(now_s=9.9) == ()
    assert gate.expire(now_s=10.0) == (Refused("soon", Refusal.EXPIRED),)
    assert gate.leave("inside") == (Admitted("later"),)


def test_a_gate_that_closes_turns_away_who_waits_and_keeps_who_is_inside() -> None:
    gate = Gate(max_concurrency=1, queue_limit=8)
    offer(gate, "inside", "waiting")
    assert gate.change(max_concurrency=1, queue_limit=8, admitting=False) == (Refused("waiting", Refusal.CLOSED),)
    assert offer(gate, "new") == [Refused("new", Refusal.CLOSED)]
    assert gate.in_flight == 1
    assert gate.change(max_concurrency=1, queue_limit=8, admitting=True) == ()
    assert gate.leave("inside") == ()
    assert offer(gate, "again") == [Admitted("again")]


def test_a_higher_limit_lets_in_who_waits() -> None:
    gate = Gate(max_concurrency=1, queue_limit=8)
    offer(gate, "a", "b", "c", "d")
    assert gate.change(max_concurrency=3, queue_limit=8, admitting=True) == (Admitted("b"), Admitted("c"))


def test_who_gives_up_while_waiting_leaves_no_trace() -> None:
    gate = Gate(max_concurrency=1, queue_limit=1000)
    offer(gate, "inside", *(f"w{i}" for i in range(500)))
    for i in range(500):
        assert gate.leave(f"w{i}") == ()
    assert (gate.in_flight, gate.queued) == (1, 0)
    assert len(gate._order) <= 64  # memory is the point
    assert gate.leave("inside") == ()


class GateMachine(RuleBasedStateMachine):
    """Any order of calls keeps the bounds, loses nobody, and tells everybody once."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate(max_concurrency=2, queue_limit=3)
        self.waiting: dict[Ticket, int] = {}
        self.inside: set[Ticket] = set()
        self.count = 0

    def note(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            priority = self.waiting.pop(outcome.ticket)
            if isinstance(outcome, Admitted):
                assert all(priority <= other for other in self.waiting.values())
                self.inside.add(outcome.ticket)

    @rule(priority=st.integers(0, 2), patience_s=st.integers(1, 5))
    def offer(self, priority: int, patience_s: int) -> None:
        self.count += 1
        self.waiting[self.count] = priority
        outcomes = self.gate.offer(self.count, priority=priority, deadline_s=patience_s)
        if outcomes and isinstance(outcomes[0], Admitted):
            self.waiting.pop(self.count)
            self.inside.add(self.count)
        else:
            self.note(outcomes)

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.inside, key=str)))
        self.inside.discard(ticket)
        self.note(self.gate.leave(ticket))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.waiting, key=str)))
        del self.waiting[ticket]
        self.note(self.gate.leave(ticket))

    @rule(now_s=st.integers(0, 5))
    def expire(self, now_s: int) -> None:
        self.note(self.gate.expire(now_s=now_s))

    @rule(limit=st.integers(1, 4), queue=st.integers(0, 4), admitting=st.booleans())
    def change(self, limit: int, queue: int, admitting: bool) -> None:
        self.note(self.gate.change(max_concurrency=limit, queue_limit=queue, admitting=admitting))

    @invariant()
    def counts_are_exact(self) -> None:
        assert self.gate.in_flight == len(self.inside)
        assert self.gate.queued == len(self.waiting)

    @invariant()
    def nobody_waits_for_a_free_place(self) -> None:
        assert not (self.waiting and len(self.inside) < self.gate.max_concurrency)


TestGateMachine = GateMachine.TestCase


@given(st.integers(-5, 0))
def test_a_gate_without_places_would_never_serve(limit: int) -> None:
    assert offer(Gate(max_concurrency=limit, queue_limit=0), "a") == [Admitted("a")]
