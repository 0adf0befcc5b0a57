"""Recordings for tests: a deployment that is looked at each 15 s while its load rises and falls, as a leader would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from enova_coordinator.core.recording import (
    KeptHistory,
    Recorded,
    history_for,
    history_line,
    situation_line,
    text_of,
)
from enova_recommender.scaling.enova import EnovaPolicy
from enova_recommender.scaling.situation import Memory
from enova_testing.situations import asked, situation

LOOK_S = 15.0
BEGAN_S = 10_000.0


def rise_and_fall(look: int) -> float:
    """Requests a second at a look: few, many from the 10th on, few again from the 40th on."""
    return 40.0 if 10 <= look < 40 else 5.0


def recording(
    looks: int = 120, *, rate: Callable[[int], float] = rise_and_fall, conservatism: float = 1.0, uid: str = "u"
) -> list[Recorded]:
    """What a leader records: each wish takes effect at once, and what starts is READY by the next look."""
    policy, target = EnovaPolicy(), 1
    memory: Memory = {}
    found: list[Recorded] = []
    for look in range(looks):
        now_s = BEGAN_S + LOOK_S * look
        seconds = tuple((600.0 - LOOK_S * past, rate(look - 40 + past)) for past in range(40))
        told = situation(
            now_s=now_s, ready=target, bounds=(1, 12), demand=asked(seconds, end_s=now_s), measures={},
            conservatism=conservatism,
        )  # fmt: skip
        decided = policy.decide(told, memory)
        found.append(Recorded(uid=uid, policy=policy.name, situation=told, memory=memory, wish=decided.wish))
        memory, target = decided.memory, sum(decided.wish.targets.values())
    return found


def lines_of(questions: Sequence[Recorded]) -> list[str]:
    """The lines of a recording, each history told once."""
    lines: list[str] = []
    kept: KeptHistory | None = None
    for number, each in enumerate(questions, start=1):
        found = history_for(kept, each.situation.history)
        if found is None:
            found = KeptHistory(id=number, demand=each.situation.history)
            lines.append(text_of(history_line(found)))
        kept = found
        lines.append(text_of(situation_line(each, kept)))
    return lines


def write_recording(path: Path, questions: Sequence[Recorded]) -> Path:
    """The recording as a file of lines."""
    path.write_text("".join(f"{line}\n" for line in lines_of(questions)), encoding="utf-8")
    return path
