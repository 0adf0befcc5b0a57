"""A fleet in a few lines, driven by a policy: fluid requests, replicas that start, hang or never start.

For rules of policies that need a loop to show. Figures of policies come from the fleet simulator, not from here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from enova_recommender.scaling.bounds import Bounds
from enova_recommender.scaling.situation import (
    Decided,
    Demand,
    Memory,
    Objective,
    Phase,
    Policy,
    Recent,
    ReplicaSight,
    Signal,
    Situation,
    VariantSight,
)
from enova_recommender.types import VerdictKind
from enova_testing.situations import variant

STEP_S = 5.0
WINDOW = 180               # steps that a policy is shown
QUEUE_LIMIT = 256.0        # requests of a replica; more are refused, as its ingress does
PROMPT, OUTPUT = 500.0, 100.0


@dataclass(slots=True, kw_only=True)
class Member:
    """One replica; `starts_s` is how long its start takes (infinite: it never ends)."""

    name: str
    phase: Phase
    since_s: float
    starts_s: float
    cause: str = ""
    waiting: float = 0.0
    rows: dict[Signal, list[float]] = field(default_factory=lambda: {signal: [] for signal in Signal})

    @property
    def sight(self) -> ReplicaSight:
        verdict = VerdictKind.DEGRADED if self.cause else VerdictKind.NORMAL
        return ReplicaSight(
            name=self.name, variant="v", phase=self.phase, since_s=self.since_s, verdict=verdict, cause=self.cause
        )


@dataclass(slots=True, kw_only=True)
class SmallFleet:
    """A deployment of one variant under a policy, stepped five seconds at a time."""

    policy: Policy
    rate: Callable[[float], float]              # requests/s at a time
    ready: int = 1
    bounds: tuple[int, int] = (1, 50)
    start_s: float = 120.0
    one: VariantSight = field(default_factory=variant)
    starts: Callable[[int], float] | None = None  # seconds of the n-th start; by default start_s each
    now_s: float = 0.0
    memory: Memory = field(default_factory=dict)
    members: list[Member] = field(default_factory=list)
    decided: list[tuple[float, int, Decided]] = field(default_factory=list)   # (time, target before, what was said)
    edits: dict[float, int] = field(default_factory=dict)                     # targets that somebody else sets
    arrived: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)
    target: int = -1
    started: int = 0
    last_act_s: float = float("-inf")

    def __post_init__(self) -> None:
        self.target = self.ready
        for _ in range(self.ready):
            self._start(Phase.READY, since_s=-600.0)
        for _ in range(WINDOW):                 # it has served like this for a while
            self._serve(self.rate(0.0))

    def run(self, until_s: float) -> SmallFleet:
        """Steps on; the policy is asked at its own pace."""
        while self.now_s < until_s - 1e-9:
            self.now_s += STEP_S
            for member in self.members:
                if member.phase is Phase.STARTING and self.now_s - member.since_s >= member.starts_s:
                    member.phase, member.since_s = Phase.READY, self.now_s
            self._serve(self.rate(self.now_s))
            if self.now_s in self.edits:
                self._scale(self.edits[self.now_s], ())
            pace_s = max(self.policy.interval_s, STEP_S)
            if self.now_s % pace_s < STEP_S - 1e-9:
                self._decide()
        return self

    @property
    def targets(self) -> list[int]:
        """What was wished at each call."""
        return [sum(decided.wish.targets.values()) for _, _, decided in self.decided]

    def wished_at(self, time_s: float) -> int:
        """The wish in force at a time."""
        return next(sum(one.wish.targets.values()) for at_s, _, one in reversed(self.decided) if at_s <= time_s)

    def situation(self) -> Situation:
        """What the policy is shown now."""
        serving = [member for member in self.members if member.phase is Phase.READY]
        values = {
            signal: np.array([_row(member.rows[signal]) for member in serving]).reshape(len(serving), WINDOW)
            for signal in Signal
        }
        names = tuple(member.name for member in serving)
        demand = Demand(
            end_s=self.now_s, step_s=STEP_S, arrived=_row(self.arrived), finished=_row(self.served),
            prompt_tokens=_row(self.served) * PROMPT, output_tokens=_row(self.served) * OUTPUT,
        )
        none = np.empty(0)
        return Situation(
            now_s=self.now_s, deployment="chat",
            bounds=Bounds(min_replicas=self.bounds[0], max_replicas=self.bounds[1]),
            objective=Objective(ttft_s=1.0, tpot_s=0.05),
            variants=(replace(self.one, target=self.target),),
            replicas=tuple(member.sight for member in self.members),
            recent=Recent(end_s=self.now_s, step_s=STEP_S, replicas=names, values=values),
            demand=demand,
            history=Demand(
                end_s=self.now_s, step_s=60.0, arrived=none, finished=none, prompt_tokens=none, output_tokens=none
            ),
            minutes=None,
            last_act_s=self.last_act_s,
            verdict=VerdictKind.NORMAL,
        )

    def _decide(self) -> None:
        decided = self.policy.decide(self.situation(), self.memory)
        self.memory = json.loads(json.dumps(dict(decided.memory), allow_nan=False))
        self.decided.append((self.now_s, self.target, decided))
        self._scale(sum(decided.wish.targets.values()), decided.wish.remove_first)

    def _scale(self, target: int, remove_first: tuple[str, ...]) -> None:
        if target == self.target:
            return
        self.target, self.last_act_s = target, self.now_s
        while len(self.members) < target:
            self._start(Phase.STARTING, since_s=self.now_s)
        order = {name: place for place, name in enumerate(remove_first)}
        self.members.sort(key=lambda each: (each.phase is Phase.READY, order.get(each.name, len(order))))
        del self.members[: max(len(self.members) - target, 0)]
        self.members.sort(key=lambda each: each.name)

    def _start(self, phase: Phase, *, since_s: float) -> None:
        takes_s = self.starts(self.started) if self.starts is not None else self.start_s
        self.members.append(Member(name=f"r{self.started:03}", phase=phase, since_s=since_s, starts_s=takes_s))
        self.started += 1

    def _serve(self, rate: float) -> None:
        """Arrivals go where the fewest wait, but not to a hung one; what is there is served at the told capacity."""
        able = [member for member in self.members if member.sight.carries]
        work = rate * STEP_S
        room = self.one.capacity.requests_per_s.value * STEP_S
        total = 0.0
        waiting = sum(member.waiting for member in able) + work
        for member in able:
            member.waiting = min(waiting / len(able), QUEUE_LIMIT + room)
            done = min(member.waiting, room)
            member.waiting -= done
            total += done
            self._measure(member, used=done / room, done=done)
        for member in self.members:
            if member.phase is Phase.READY and member not in able:
                self._measure(member, used=0.0, done=0.0)
        self.arrived.append(work)
        self.served.append(total)

    def _measure(self, member: Member, *, used: float, done: float) -> None:
        capacity = self.one.capacity
        figures = {
            Signal.RUNNING: used * capacity.max_num_seqs, Signal.WAITING: member.waiting,
            Signal.KV_CACHE_USAGE: 0.9 * used, Signal.GPU_UTILIZATION: min(1.0, 1.2 * used), Signal.FINISHED: done,
            Signal.PROMPT_TOKENS: done * PROMPT, Signal.GENERATION_TOKENS: done * OUTPUT, Signal.PREEMPTIONS: 0.0,
            Signal.TTFT_S: 0.1 + member.waiting / capacity.requests_per_s.value, Signal.TPOT_S: 0.01 + 0.03 * used,
        }
        for signal, value in figures.items():
            member.rows[signal].append(value)


def _row(values: list[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The last steps; what was before the replica's time is missing."""
    row = np.full(WINDOW, np.nan)
    known = values[-WINDOW:]
    if known:
        row[-len(known) :] = known
    return row
