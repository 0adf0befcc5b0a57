"""Decides recorded situations again, by the policy that decided them or by another: plain values in and out.

Each situation stands as it was: what another policy would have changed about the ones after it is not made up. So the
answer says what a policy would have wished for at each look, given what really ran; what would have come of it is
`enova simulate`'s to answer. By the recorded policy and knob each situation is decided with the memory that was
recorded with it, and must give the recorded wish again. Another one carries its own memory from look to look; it starts
with an empty one where the recorded policy did, and another knob of the same policy with what that one remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from enova_coordinator.core.recording import Recorded
from enova_recommender.scaling.enova import EnovaPolicy
from enova_recommender.scaling.policies import PEERS
from enova_recommender.scaling.situation import Decided, Memory, Policy, Situation, Wish

ENOVA = "enova"
LEFT_OUT = frozenset({"cron", "static-peak", "static-mean"})   # told of a whole trace beforehand
LOOK_S_MAX = 60.0                  # that a wish counts for; a longer silence is not made up


class ReplayError(ValueError):
    """Something that cannot be replayed; `field` names what is wrong."""

    def __init__(self, field: str, message: str, remedy: str = "") -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
        self.remedy = remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One situation, what was wished in it, and what is wished now."""

    now_s: float
    deployment: str
    policy: str                # that was recorded, with its knob
    conservatism: float
    target: int
    recorded: Wish
    replayed: Wish

    @property
    def differs(self) -> bool:
        """Whether other targets or replacements are wished for."""
        one, other = self.recorded, self.replayed
        return (dict(one.targets), one.replace) != (dict(other.targets), other.replace)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Which policy ("": the recorded one), and which knob (None: the recorded one) decides again."""

    policy: str = ""
    conservatism: float | None = None

    def __post_init__(self) -> None:
        known = sorted({ENOVA, *PEERS} - LEFT_OUT)
        if self.policy and self.policy not in known:
            raise ReplayError("policy", f"{self.policy} is not known", f"one of {', '.join(known)}")
        if self.conservatism is not None and not 0.01 <= self.conservatism <= 100.0:
            raise ReplayError("conservatism", f"{self.conservatism:g} does not lie between 0.01 and 100")


def replayed(questions: Iterable[Recorded], asked: Asked) -> Iterator[Look]:
    """Every situation decided again, in the order of recording; none is held for longer than it takes."""
    memory: Memory = {}
    uid = ""
    for question in questions:
        situation = question.situation
        same = asked.policy in {"", question.policy}
        if same and asked.conservatism in {None, situation.conservatism}:
            memory = question.memory
        elif question.uid != uid or not question.memory:
            memory = question.memory if same else {}
        decided = _decided(question, asked, memory)
        memory, uid = decided.memory, question.uid
        yield Look(
            now_s=situation.now_s, deployment=situation.deployment, policy=question.policy,
            conservatism=situation.conservatism, target=situation.target, recorded=question.wish,
            replayed=decided.wish,
        )  # fmt: skip


def replay(questions: Iterable[Recorded], asked: Asked) -> dict[str, object]:
    """The answer. Raises ReplayError where nothing was recorded."""
    looks = list(replayed(questions, asked))
    if not looks:
        remedy = "situations are recorded from the first look of a policy that looks ahead (enova) on"
        raise ReplayError("situations", "none was recorded", remedy)
    return {
        "deployment": looks[0].deployment,
        "recorded": {
            "policies": sorted({look.policy for look in looks}),
            "conservatism": sorted({look.conservatism for look in looks}),
            **_figures(looks, [look.recorded for look in looks]),
        },
        "replayed": {
            "policy": asked.policy or None,
            "conservatism": asked.conservatism,
            **_figures(looks, [look.replayed for look in looks]),
        },
        "situations": len(looks),
        "first_s": looks[0].now_s,
        "last_s": looks[-1].now_s,
        "differences": sum(look.differs for look in looks),
        "looks": [_told(look) for look in looks],
    }


def _decided(question: Recorded, asked: Asked, memory: Memory) -> Decided:
    situation, knob = question.situation, asked.conservatism
    if (asked.policy or question.policy) == ENOVA:
        return EnovaPolicy().decide(_with_knob(situation, knob), memory)
    return _peer(asked.policy or question.policy, knob).decide(situation, memory)


def _with_knob(situation: Situation, knob: float | None) -> Situation:
    return situation if knob is None else replace(situation, conservatism=knob)


def _peer(name: str, knob: float | None) -> Policy:
    factory = PEERS.get(name)
    if factory is None or name in LEFT_OUT:
        raise ReplayError("situations", f"were decided by {name}, which this release does not know")
    return factory(1.0 if knob is None else knob)


def _figures(looks: Sequence[Look], wishes: Sequence[Wish]) -> dict[str, object]:
    """Replica-hours of the targets that were wished for, each until the next look, and how often others than ran."""
    waits_s = [min(max(end.now_s - begin.now_s, 0.0), LOOK_S_MAX) for begin, end in pairwise(looks)]
    seconds = sum(total(wish.targets) * wait_s for wish, wait_s in zip(wishes, waits_s, strict=False))
    changes = sum(total(wish.targets) != look.target for look, wish in zip(looks, wishes, strict=True))
    return {"replica_hours": seconds / 3600.0, "changes": changes}


def total(targets: Mapping[str, int]) -> int:
    """Replicas over all variants."""
    return sum(targets.values())


def _told(look: Look) -> dict[str, object]:
    return {
        "now_s": look.now_s,
        "target": look.target,
        "differs": look.differs,
        "recorded": _wish(look.recorded),
        "replayed": _wish(look.replayed),
    }


def _wish(wish: Wish) -> dict[str, object]:
    return {
        "action": str(wish.action), "replicas": total(wish.targets), "targets": dict(wish.targets),
        "replace": list(wish.replace), "reason": wish.reason,
    }  # fmt: skip
