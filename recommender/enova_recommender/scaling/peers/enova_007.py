"""ENOVA 0.0.7's rules as a policy of this interface: faithful and mended (P1). The formula is in `scaling.enova_007`.

Looked at each 30 s. Knob: the queue that counts as overload, 50 / knob requests (the queue is given to the rule times
the knob, which is the same). Missing: while no minute is known, the target stays; the rest as each of the two does.
Where the release divides by zero, its step failed and the target stayed. A new tensor-parallel size is not applied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from enova_recommender.scaling.enova_007 import FAITHFUL, MENDED, Enova007
from enova_recommender.scaling.peers.answers import answer, keep
from enova_recommender.scaling.situation import Decided, Memory, Situation
from enova_recommender.scaling.types import Feature, Observation, ReplicaSeries


@dataclass(frozen=True, slots=True, kw_only=True)
class Enova007Policy:
    """The reimplemented policy."""

    rule: Enova007
    knob: float = 1.0
    interval_s: float = 30.0

    @property
    def name(self) -> str:
        """The rule's own name."""
        return self.rule.name

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """What the rule proposes for the minutes observed."""
        if situation.minutes is None:
            return keep(situation, reason="no minute has been measured", memory=memory, missing=True)
        try:
            proposal = self.rule.decide(_with_queue(situation.minutes, self.knob))
        except (ArithmeticError, ValueError) as error:
            return keep(situation, reason=f"the release fails here: {error}", memory=memory, missing=True)
        return answer(situation, proposal.replicas, reason=proposal.reason, memory=memory)


def faithful(knob: float) -> Enova007Policy:
    """As released, defects included."""
    return Enova007Policy(rule=FAITHFUL, knob=knob)


def mended(knob: float) -> Enova007Policy:
    """With the defects mended that `scaling.enova_007` names."""
    return Enova007Policy(rule=MENDED, knob=knob)


def _with_queue(observation: Observation, knob: float) -> Observation:
    if knob == 1.0:
        return observation
    return replace(observation, series=tuple(_scaled(one, knob) for one in observation.series))


def _scaled(replica: ReplicaSeries, knob: float) -> ReplicaSeries:
    pending = replica.series.get(Feature.PENDING)
    if pending is None:
        return replica
    queue = replace(pending, values=tuple(value * knob for value in pending.values))
    return replace(replica, series={**replica.series, Feature.PENDING: queue})
