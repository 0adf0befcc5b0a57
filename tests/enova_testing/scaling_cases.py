"""Twelve generated cases that tell scaling policies apart, and what passing one means.

Load is told in replicas' worth: 1 is what a replica of the first variant carries within the objective, among four that
share the load. A case passes at 99 % attainment outside one start-up time (its 90th percentile) after its change, at a
cost of at most 1.5 x the lower bound, with at most two changes of direction and no destructive act on a healthy
replica. The first ten minutes do not count, nor do requests of the last three, which may still run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from enova_recommender.scaling.peers.answers import keep
from enova_recommender.scaling.situation import Decided, Memory, Policy, Signal, Situation
from enova_recommender.types import VerdictKind
from enova_simulator.cluster.setup import Fault, Gap, Ill

WARM_UP_S, CHANGE_S, END_S = 600.0, 900.0, 2160.0
TAIL_S = 180.0             # at the end, in which requests that were sent before may still finish
START_S, START_P90_S = 120.0, 188.0
ATTAINMENT, COST_RATIO, DIRECTION_CHANGES = 0.99, 1.5, 2
WIDTH_S = 10.0
LENGTHS = 512              # pairs that a mix is drawn from
LENGTH_CV = 0.6
FROZEN_S = 300.0
LEADERLESS_S = 20.0        # from a leader's loss until another one decides

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Mean tokens of a request."""

    prompt: int = 1500
    output: int = 800

    def pairs(self, *, seed: int) -> list[tuple[int, int]]:
        """Pairs around the means, lognormal."""
        generator = np.random.default_rng([seed, self.prompt, self.output])
        sigma = math.sqrt(math.log(1 + LENGTH_CV**2))
        spread = np.exp(sigma * generator.standard_normal((LENGTHS, 2)) - sigma**2 / 2)
        drawn = np.maximum(1, spread * (self.prompt, self.output)).astype(int)
        return [(int(prompt), int(output)) for prompt, output in drawn]


USUAL = Mix()
LONG_PROMPTS = Mix(prompt=5000, output=200)
LONG_ANSWERS = Mix(prompt=1500, output=1600)


class Seen:
    """A policy in a case: the case distorts what it sees, or takes its leader away; what it replaces is kept."""

    def __init__(self, policy: Policy, case: Case) -> None:
        self._policy, self._case = policy, case
        self.wrong_acts: list[str] = []

    @property
    def name(self) -> str:
        """The policy's own."""
        return self._policy.name

    @property
    def interval_s(self) -> float:
        """The policy's own."""
        return self._policy.interval_s

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """What the policy says to what it sees."""
        case = self._case
        if case.frozen and CHANGE_S <= situation.now_s < CHANGE_S + FROZEN_S:
            situation = frozen(situation, since_s=CHANGE_S)
        if case.leaderless and CHANGE_S + 30 <= situation.now_s < CHANGE_S + 30 + LEADERLESS_S:
            return nobody(situation)
        decided = self._policy.decide(situation, memory)
        healthy = {each.name for each in situation.replicas if each.verdict is not VerdictKind.DEGRADED}
        self.wrong_acts += [name for name in decided.wish.replace if name in healthy]
        return decided


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One case. `load` is in replicas' worth of the mix of its time, of the seconds since the beginning."""

    name: str
    load: Callable[[float], float]
    changes_s: tuple[float, ...] = (CHANGE_S,)   # after each, one start-up time does not count
    after: Mix = USUAL                 # from the change on
    end_s: float = END_S
    faults: tuple[Fault, ...] = ()
    gaps: tuple[Gap, ...] = ()
    never: frozenset[int] = frozenset()          # starts that never become READY
    two_types: bool = False
    frozen: bool = False               # gauges of running, waiting and KV read 0
    leaderless: bool = False           # nobody decides, and what was remembered is lost
    same_rate: bool = False            # the mix changes at the same requests/s: `load` is told in the usual mix
    restart_s: float = 30.0            # from a hang until the agent starts the replica again
    failing: float = 0.0               # share of starts that fail once
    draw: int = 0                      # tells the requests of cases with one seed apart

    def judged(self, arrival_s: Floats) -> npt.NDArray[np.bool_]:
        """Which requests count."""
        counted = (arrival_s >= WARM_UP_S) & (arrival_s < self.end_s - TAIL_S)
        for change_s in self.changes_s:
            counted &= (arrival_s < change_s) | (arrival_s >= change_s + START_P90_S)
        return counted

    def counts(self, carried: float, carried_after: float) -> tuple[Floats, Floats]:
        """Requests expected in each ten seconds, of the mix before and of that after the change."""
        at_s = np.arange(0.0, self.end_s, WIDTH_S)
        load = np.array([self.load(one) for one in at_s])
        later = (at_s >= CHANGE_S) & (self.after != USUAL)
        rate = load * np.where(later & (not self.same_rate), carried_after, carried)
        return np.where(later, 0.0, rate) * WIDTH_S, np.where(later, rate, 0.0) * WIDTH_S


def frozen(situation: Situation, *, since_s: float) -> Situation:
    """The situation with gauges that read 0 since then."""
    recent = situation.recent
    values = dict(recent.values)
    for signal in (Signal.RUNNING, Signal.WAITING, Signal.KV_CACHE_USAGE):
        if signal in values:
            steps = values[signal].shape[1]
            ends_s = recent.end_s - recent.step_s * np.arange(steps - 1, -1, -1)
            values[signal] = np.where((ends_s > since_s) & ~np.isnan(values[signal]), 0.0, values[signal])
    return replace(situation, recent=replace(recent, values=values))


def nobody(situation: Situation) -> Decided:
    """No leader: nothing is wished, and nothing remembered."""
    return keep(situation, reason="no leader", memory={}, missing=True)


def _constant(load: float) -> Callable[[float], float]:
    return lambda _: load


def _step(before: float, after: float, *, until_s: float = END_S) -> Callable[[float], float]:
    return lambda now_s: after if CHANGE_S <= now_s < until_s else before


def _sawtooth(now_s: float) -> float:
    return 2.7 if now_s % 300 < 150 else 3.3


_GENERATED = (
    Case(name="1 step to five times", load=_step(1.0, 5.0)),
    Case(name="2 spike shorter than a start", load=_step(3.0, 5.5, until_s=CHANGE_S + 60)),
    Case(
        name="3 diurnal", load=lambda now_s: 3.5 - 2.0 * math.cos(2 * math.pi * (now_s - WARM_UP_S) / 2400),
        changes_s=(), end_s=WARM_UP_S + 2400,
    ),
    Case(
        name="4 one replica hung with its queue", load=_constant(3.0), restart_s=600.0,
        faults=(Fault(at_s=CHANGE_S, ill=Ill.HUNG, share=0.5),),
    ),
    Case(name="5 frozen gauges", load=_constant(3.0), frozen=True),
    Case(name="6 a replica that never starts", load=_step(1.7, 3.4), never=frozenset({0})),
    Case(name="7 long prompts, not overload", load=_constant(3.0), after=LONG_PROMPTS),
    Case(
        name="8 two minutes without metrics", load=_constant(3.0),
        gaps=(Gap(start_s=CHANGE_S, end_s=CHANGE_S + 120),),
    ),
    Case(name="9 longer answers at the same rate", load=_constant(2.0), after=LONG_ANSWERS, same_rate=True),
    Case(name="10 two GPU types", load=_step(1.5, 4.5), two_types=True),
    Case(name="11 leader lost in a scale-up", load=_step(1.5, 4.5), leaderless=True),
    Case(name="12 sawtooth around a threshold", load=_sawtooth, changes_s=()),
)
CASES = tuple(replace(one, draw=place) for place, one in enumerate(_GENERATED))

# One load, with one kind of fault each; `share` is of the READY replicas by age.
_DIURNAL = CASES[2]
FAULTLESS = replace(_DIURNAL, name="none")
FAULTY = (
    replace(_DIURNAL, name="replica losses", faults=tuple(
        Fault(at_s=at_s, ill=ill, share=share, until_s=at_s + 900.0)
        for at_s, ill, share in ((900.0, Ill.LOST, 0.3), (1500.0, Ill.CRASHED, 0.7), (2100.0, Ill.LOST, 0.6))
    )),
    replace(_DIURNAL, name="stragglers", faults=tuple(
        Fault(at_s=at_s, ill=Ill.SLOW, share=0.5, until_s=at_s + 900.0, factor=1.5) for at_s in (900.0, 1800.0)
    )),
    replace(_DIURNAL, name="hangs", faults=tuple(
        Fault(at_s=at_s, ill=Ill.HUNG, share=0.4) for at_s in (1000.0, 1900.0)
    )),
    replace(_DIURNAL, name="lost telemetry", gaps=(
        Gap(start_s=1000.0, end_s=1120.0), Gap(start_s=1500.0, end_s=1800.0), Gap(start_s=2300.0, end_s=2330.0),
    )),
    replace(_DIURNAL, name="start-up failures", failing=0.3, never=frozenset({1})),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of one policy in one case."""

    policy: str
    case: str
    attainment: float
    cost_ratio: float                  # of the lower bound
    direction_changes: int
    wrong_acts: int
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.problems

    @property
    def reason(self) -> str:
        """What speaks against it, or the figures that it passed with."""
        if self.problems:
            return "; ".join(self.problems)
        return f"{self.attainment:.2%}, {self.cost_ratio:.2f} x LB, {self.direction_changes} changes of direction"


def judged(
    policy: str, case: str, *, attainment: float, cost_ratio: float, direction_changes: int, wrong_acts: int
) -> Result:
    """Pass or fail, and why."""
    problems = []
    if not attainment >= ATTAINMENT:
        problems.append(f"attainment {attainment:.2%}")
    if not cost_ratio <= COST_RATIO:
        problems.append(f"{cost_ratio:.2f} x LB")
    if direction_changes > DIRECTION_CHANGES:
        problems.append(f"{direction_changes} changes of direction")
    if wrong_acts:
        problems.append(f"{wrong_acts} healthy replicas replaced")
    return Result(
        policy=policy, case=case, attainment=attainment, cost_ratio=cost_ratio,
        direction_changes=direction_changes, wrong_acts=wrong_acts, problems=tuple(problems),
    )
