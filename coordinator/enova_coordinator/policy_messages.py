"""What the coordinator and its policy child say to each other over the pipe: a length, then the pickled message."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, slots=True)
class WorkRequest:
    """A function of the recommender, which travels by its name, and what it is called with."""

    number: int
    function: Callable[[Any], object]  # Any: of whatever argument; `PolicyProcess.run` knows the pair's types
    argument: object


@dataclass(frozen=True, slots=True)
class WorkAnswer:
    """What the function returned, or what it raised."""

    number: int
    result: object = None
    error: str = ""


Request = PolicyRequest | WorkRequest
Answer = PolicyAnswer | WorkAnswer


def encode(message: Request | Answer) -> bytes:
    """A message with its length in front."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body
