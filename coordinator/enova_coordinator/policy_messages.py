"""What the coordinator and its policy child say to each other over the pipe: a length, then the pickled message."""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass

from enova_recommender.scaling.types import Observation, Proposal

HEADER = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class PolicyRequest:
    """One observation for one policy."""

    number: int
    policy: str
    observation: Observation


@dataclass(frozen=True, slots=True)
class PolicyAnswer:
    """The proposal, or what the policy raised."""

    number: int
    proposal: Proposal | None = None
    error: str = ""


def encode(message: PolicyRequest | PolicyAnswer) -> bytes:
    """A message with its length in front."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body
