"""How requests reach engines in a simulated fleet: the production router and gates, and holding at the ingress.

One ingress takes in all requests of a deployment, so it knows of each replica exactly what it holds; each replica has
the gate of its owner before its engine. Requests that find no READY replica are held, bounded, until one is.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import cast

import numpy as np

from enova_agent.core.admission import Admitted, Gate, Outcome, Refusal, Refused
from enova_agent.core.model import RouteTarget
from enova_agent.core.routing import Router
from enova_simulator.cluster.crew import Member
from enova_simulator.cluster.engines import Engines
from enova_simulator.cluster.kernel import columns as at
from enova_simulator.cluster.kernel.state import Bytes, Floats, Ints, Longs
from enova_simulator.cluster.setup import Paces

TOKEN_BYTES = 4                    # of a prompt, as held
DRAWS = 65_536                     # made at a time


class Fate(IntEnum):
    """What became of a request."""

    OPEN = 0                       # not arrived, or not finished at the end
    SERVED = 1
    REFUSED = 2                    # told to come back: queues full, nothing READY for too long
    CUT = 3                        # broke off after its first token
    IMPOSSIBLE = 4                 # no engine of its deployment could ever hold it


@dataclass(slots=True)
class Draws:
    """Uniform draws of one seeded generator, made in bulk."""

    generator: np.random.Generator
    _left: list[float] = field(default_factory=list)

    def pair(self) -> tuple[float, float]:
        """Two draws."""
        if len(self._left) < 2:
            self._left = self.generator.random(DRAWS).tolist()
        return self._left.pop(), self._left.pop()


@dataclass(slots=True, kw_only=True, eq=False)
class Served:
    """A replica that takes requests."""

    member: Member
    gate: Gate
    target: RouteTarget


@dataclass(slots=True, kw_only=True, eq=False)
class Desk:
    """The ingress of one deployment."""

    draws: Draws
    paces: Paces
    engines: Engines
    fates: Bytes
    kinds: Ints                    # of the engine that took each request, -1 without
    prompts: Longs
    priorities: Longs
    queue_limit: int
    router: Router = field(default_factory=Router)
    replicas: dict[str, Served] = field(default_factory=dict)
    by_engine: dict[int, Served] = field(default_factory=dict)
    held: deque[tuple[float, int]] = field(default_factory=deque)
    held_tokens: int = 0
    arrived: int = 0
    _targets: tuple[RouteTarget, ...] = ()

    def open(self, member: Member) -> None:
        """A replica begins to take requests."""
        concurrency = member.variant.limits.max_num_seqs
        served = Served(
            member=member,
            gate=Gate(max_concurrency=concurrency, queue_limit=self.queue_limit),
            target=RouteTarget(
                replica=member.name, node=member.name, hop_address="", weight=member.variant.weight,
                max_concurrency=concurrency,
            ),
        )  # fmt: skip
        self.replicas[member.name] = self.by_engine[member.engine] = served
        self._retarget()

    def withdraw(self, member: Member) -> None:
        """No request is sent there any more; those that it has go on."""
        served = self.replicas.pop(member.name, None)
        if served is not None:
            self._retarget()

    def close(self, member: Member) -> None:
        """The replica's process has ended, and nothing of it is left."""
        self.withdraw(member)
        self.by_engine.pop(member.engine, None)
        self.router.retain(self.replicas)

    def arrive(self, request: int, at_s: float) -> None:
        """A client sends a request."""
        self.arrived += 1
        self.send(request, at_s)

    def send(self, request: int, at_s: float) -> None:
        """Find a place for a request, or hold or refuse it."""
        if not self._targets:
            self._hold(request, at_s)
            return
        tried: set[str] = set()
        while len(tried) < self.paces.tries:
            target = self.router.choose(self._targets, now_s=at_s, draws=self.draws.pair(), tried=tried)
            if target is None:
                break
            served = self.replicas[target.replica]
            outcomes = served.gate.offer(request, priority=int(self.priorities[request]), deadline_s=float("inf"))
            if self._taken(served, request, outcomes, at_s):
                return
            self.router.full(target.replica, now_s=at_s)
            tried.add(target.replica)
        self.fates[request] = Fate.REFUSED

    def ended(self, engine: int, request: int, at_s: float, fate: Fate) -> None:
        """A request has left the engine; who waits for its place goes in."""
        served = self.by_engine[engine]
        self.fates[request] = fate
        self.router.ended(served.member.name)
        if served.gate.queued:
            for outcome in served.gate.leave(request):
                if isinstance(outcome, Admitted):
                    self.engines.submit(engine, cast(int, outcome.ticket), at_s)
            self.engines.stop_at_finish(engine, stop=served.gate.queued > 0)
        else:
            served.gate.leave(request)

    def broken(self, member: Member, at_s: float) -> None:
        """The process is gone: what had no token yet is sent elsewhere, the rest is cut."""
        served = self.by_engine[member.engine]
        self.withdraw(member)
        times = self.engines.state.times
        inside = self.engines.inside(member.engine)
        waiting = [cast(int, each.ticket) for each in served.gate.change(
            max_concurrency=1, queue_limit=0, admitting=False
        ) if isinstance(each, Refused)]  # fmt: skip
        del self.by_engine[member.engine]
        for request in [*inside, *waiting]:
            self.router.ended(member.name)
            if has_token(times, request):
                self.fates[request] = Fate.CUT
        for request in [*inside, *waiting]:
            if self.fates[request] != Fate.CUT:
                self.engines.forget(request)
                self.send(request, at_s)

    def release(self, at_s: float) -> None:
        """Send what was held, now that a replica takes requests."""
        waiting, self.held = self.held, deque()
        self.held_tokens = 0
        for _, request in waiting:
            self.send(request, at_s)

    def expire(self, at_s: float) -> None:
        """Refuse what was held for too long."""
        while self.held and self.held[0][0] + self.paces.held_s <= at_s:
            _, request = self.held.popleft()
            self.held_tokens -= int(self.prompts[request])
            self.fates[request] = Fate.REFUSED

    def _taken(self, served: Served, request: int, outcomes: tuple[Outcome, ...], at_s: float) -> bool:
        """Act on what the gate said; False if it refused this request."""
        admitted = False
        for outcome in outcomes:
            if isinstance(outcome, Refused):
                if outcome.refusal is not Refusal.DISPLACED:
                    return False
                self.router.ended(served.member.name)
                self.fates[cast(int, outcome.ticket)] = Fate.REFUSED
            else:
                admitted = True
        self.router.sent(served.member.name)
        engine = served.member.engine
        self.kinds[request] = served.member.kind
        if not admitted:
            self.engines.stop_at_finish(engine, stop=True)
        else:
            self.engines.submit(engine, request, at_s)
        return True

    def _hold(self, request: int, at_s: float) -> None:
        tokens = int(self.prompts[request])
        over = (self.held_tokens + tokens) * TOKEN_BYTES > self.paces.held_bytes
        if over or len(self.held) >= self.paces.held_requests:
            self.fates[request] = Fate.REFUSED
            return
        self.held.append((at_s, request))
        self.held_tokens += tokens

    def _retarget(self) -> None:
        self._targets = tuple(served.target for served in self.replicas.values())


def has_token(times: Floats, request: int) -> bool:
    """Whether the request's first token was made."""
    return not math.isnan(times[request, at.FIRST])
