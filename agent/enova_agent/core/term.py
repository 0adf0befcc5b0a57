"""Fencing on the agent's side: which leader may still be obeyed.

Each leader's term is higher than that of all before it. An agent that has heard a term never again obeys a lower
one, however late its message arrives, and whatever the network or a paused process did in between.
"""

from __future__ import annotations

from enum import Enum, auto


class TermVerdict(Enum):
    """What to do with a message of some term."""

    OBEY = auto()              # the term that is known
    REMEMBER_THEN_OBEY = auto()  # a new leader: the term must be on disk before anything is done
    REFUSE = auto()            # a leader of the past


def judge_term(term: int, *, highest: int) -> TermVerdict:
    """The verdict on a message that bears `term`, when `highest` is the highest ever obeyed."""
    if term < highest or term < 0:
        return TermVerdict.REFUSE
    return TermVerdict.OBEY if term == highest else TermVerdict.REMEMBER_THEN_OBEY
