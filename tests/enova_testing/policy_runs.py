"""Runs a scaling policy over a row of situations, its memory through JSON each time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from enova_recommender.scaling.policies import PEERS
from enova_recommender.scaling.situation import Decided, Memory, Policy, Situation


@dataclass(frozen=True, slots=True, kw_only=True)
class Vector:
    """One vector worked by hand: what a policy must answer to a row of situations."""

    policy: str
    rule: str                          # the rule that the vector shows
    seen: tuple[Situation, ...]
    totals: tuple[int, ...]
    knob: float = 1.0

    def __str__(self) -> str:
        return f"{self.policy}: {self.rule}"


def vector(policy: str, rule: str, *seen: Situation, totals: tuple[int, ...], knob: float = 1.0) -> Vector:
    """A vector of one or more calls."""
    return Vector(policy=policy, rule=rule, seen=seen, totals=totals, knob=knob)


def decisions(policy: Policy, seen: Iterable[Situation]) -> list[Decided]:
    """What the policy says to each, as it would across restarts of its host."""
    memory: Memory = {}
    said = []
    for situation in seen:
        decided = policy.decide(situation, memory)
        said.append(decided)
        memory = json.loads(json.dumps(dict(decided.memory), allow_nan=False))
    return said


def totals(policy: Policy, seen: Iterable[Situation]) -> tuple[int, ...]:
    """The replicas that it wishes at each call, over all variants."""
    return tuple(sum(decided.wish.targets.values()) for decided in decisions(policy, seen))


def answered(one: Vector) -> tuple[int, ...]:
    """What the vector's policy answers."""
    return totals(PEERS[one.policy](one.knob), one.seen)
