"""What one replica's owner lets into the engine, and what waits: bounded, by priority, then in order; pure.

Theory of operation. A `Gate` stands before one engine. At most `max_concurrency` tickets are in the engine; at
most `queue_limit` wait, ordered by priority (lower first), then by arrival. A ticket that finds the queue full
takes the place of the last waiting one of lower rank, if there is one, and is refused otherwise. While the gate
does not admit, nothing waits: what was not sent can be served elsewhere, so it is turned away at once. Each call
returns what follows from it; the shell tells the tickets' owners.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum

Ticket = Hashable


class Refusal(StrEnum):
    """Why a ticket is not taken."""

    FULL = "FULL"            # over queue_limit
    CLOSED = "CLOSED"        # not admitting
    DISPLACED = "DISPLACED"  # a ticket of higher rank took its place
    EXPIRED = "EXPIRED"      # waited until its deadline


@dataclass(frozen=True, slots=True)
class Admitted:
    """This ticket may be sent to the engine now."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Refused:
    """This ticket is not taken, for this reason."""

    ticket: Ticket
    refusal: Refusal


Outcome = Admitted | Refused


@dataclass(slots=True)
class _Waiting:
    ticket: Ticket
    priority: int
    deadline_s: float
    live: bool = True


class Gate:
    """The gate before one engine."""

    def __init__(self, *, max_concurrency: int, queue_limit: int, admitting: bool = True) -> None:
        self.max_concurrency = max(1, max_concurrency)
        self.queue_limit = max(0, queue_limit)
        self.admitting = admitting
        self._inside: set[Ticket] = set()
        self._waiting: dict[Ticket, _Waiting] = {}
        self._order: list[tuple[int, int, _Waiting]] = []
        self._arrivals = 0

    @property
    def in_flight(self) -> int:
        """Tickets in the engine."""
        return len(self._inside)

    @property
    def queued(self) -> int:
        """Tickets that wait."""
        return len(self._waiting)

    def offer(self, ticket: Ticket, *, priority: int, deadline_s: float) -> tuple[Outcome, ...]:
        """A new ticket: admitted, refused, or, if the answer does not name it, waiting."""
        assert ticket not in self._inside
        assert ticket not in self._waiting
        if not self.admitting:
            return (Refused(ticket, Refusal.CLOSED),)
        if len(self._inside) < self.max_concurrency:  # then nobody waits: who leaves lets the next one in
            self._inside.add(ticket)
            return (Admitted(ticket),)
        displaced: tuple[Outcome, ...] = ()
        if len(self._waiting) >= self.queue_limit:
            last = max(self._waiting.values(), key=lambda w: w.priority, default=None)
            if last is None or last.priority <= priority:
                return (Refused(ticket, Refusal.FULL),)
            last = [w for w in self._waiting.values() if w.priority == last.priority][-1]  # dicts keep arrival order
            self._drop(last.ticket)
            displaced = (Refused(last.ticket, Refusal.DISPLACED),)
        waiting = _Waiting(ticket, priority, deadline_s)
        self._arrivals += 1
        self._waiting[ticket] = waiting
        heapq.heappush(self._order, (priority, self._arrivals, waiting))
        return displaced

    def leave(self, ticket: Ticket) -> tuple[Outcome, ...]:
        """The ticket has ended, or its client went away while it waited; unknown tickets are those refused before."""
        self._inside.discard(ticket)
        self._drop(ticket)
        return self._admit()

    def expire(self, *, now_s: float) -> tuple[Outcome, ...]:
        """Refuse all that waited until their deadline."""
        late = [waiting.ticket for waiting in self._waiting.values() if waiting.deadline_s <= now_s]
        for ticket in late:
            self._drop(ticket)
        return tuple(Refused(ticket, Refusal.EXPIRED) for ticket in late)

    def change(self, *, max_concurrency: int, queue_limit: int, admitting: bool) -> tuple[Outcome, ...]:
        """New limits. What is in the engine stays; what waits is let in, or turned away if the gate closes."""
        self.max_concurrency = max(1, max_concurrency)
        self.queue_limit = max(0, queue_limit)
        self.admitting = admitting
        if admitting:
            return self._admit()
        turned_away = tuple(Refused(ticket, Refusal.CLOSED) for ticket in self._waiting)
        self._waiting.clear()
        self._order.clear()
        return turned_away

    def _admit(self) -> tuple[Outcome, ...]:
        admitted: list[Outcome] = []
        while self._order and len(self._inside) < self.max_concurrency:
            waiting = heapq.heappop(self._order)[2]
            if waiting.live:
                del self._waiting[waiting.ticket]
                self._inside.add(waiting.ticket)
                admitted.append(Admitted(waiting.ticket))
        return tuple(admitted)

    def _drop(self, ticket: Ticket) -> None:
        waiting = self._waiting.pop(ticket, None)
        if waiting is None:
            return
        waiting.live = False  # its place in the heap is skipped when it comes up
        if len(self._order) > 2 * len(self._waiting) + 64:  # or now, if the skipped ones are many
            self._order = [entry for entry in self._order if entry[2].live]
            heapq.heapify(self._order)
