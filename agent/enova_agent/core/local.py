"""The protocol between the agent and its ingress (and `enova up`): JSON lines on a Unix socket, versioned.

The agent listens; an ingress connects, says `IngressHello`, and then both send lines whenever they have news.
Everything the agent says is the whole truth of its kind (level-triggered), so a lost connection costs
nothing: on reconnecting, the agent sends routes and engines again. Each line is one object with a "type".
A line of a newer protocol has fields that are ignored; an unknown type is ignored; another major
`version` in a hello is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from enova_agent.core.model import LocalEngine, Route

VERSION = 1
LINE_BYTES_MAX = 8 << 20  # a thousand routes of a hundred targets take 4 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentHello:
    """The agent greets whoever connected."""

    node: str
    version: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressHello:
    """An ingress introduces itself with the addresses that it serves on."""

    instance: str
    pid: int
    openai_address: str
    hop_address: str
    version: int = VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutesUpdate:
    """All routes of the fleet as of `revision`."""

    revision: int
    routes: tuple[Route, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutesApplied:
    """The ingress routes by `revision` from now on."""

    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginesUpdate:
    """All engines of this node that the ingress may send to."""

    engines: tuple[LocalEngine, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldReplica:
    """What the owner's ingress holds for one local replica, counted exactly."""

    in_flight: int = 0             # sent to the engine, not ended
    queued: int = 0                # waiting here
    silent_s: float = 0.0          # real time since the engine sent any byte, while in_flight > 0
    finished: int = 0              # since the ingress started
    errors: int = 0                # engine refused, broke off or answered 5xx, since the ingress started


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldUpdate:
    """What is held for each local replica, sent on a beat and at once when a count leaves or reaches 0."""

    replicas: Mapping[str, HeldReplica] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchValue:
    """A mergeable quantile sketch: bucket `offset + i` holds (gamma^(b-1), gamma^b], gamma = (1+a)/(1-a)."""

    relative_accuracy: float
    offset: int = 0
    counts: tuple[int, ...] = ()
    zero_count: int = 0
    sum: float = 0.0
    min: float = 0.0
    max: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What an ingress saw of one deployment's requests of one class on one replica, in one interval."""

    deployment: str
    replica: str = ""
    serving_class: str = ""
    arrived: int = 0
    finished: int = 0
    failed: int = 0
    cut: int = 0
    refused: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    held: int = 0
    ttft_s: SketchValue | None = None
    tpot_s: SketchValue | None = None
    queue_s: SketchValue | None = None
    e2e_s: SketchValue | None = None       # arrival to end, of requests that were answered in full
    prompt_lengths: tuple[int, ...] = ()   # tokens of some of these, prompt and answer at the same place
    output_lengths: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SummariesUpdate:
    """Request summaries since the last update; times in model seconds (Unix)."""

    start_s: float
    end_s: float
    summaries: tuple[Summary, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSample:
    """How long the answer to one prompt became; the vector is base64 of a signed byte an entry."""

    deployment: str
    method: int
    vector: str
    tokens: int
    stopped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthsUpdate:
    """Answers that ended since the last update, as far as the bound on their number allows."""

    samples: tuple[LengthSample, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StopEngines:
    """`enova up` asks for the end of all engines: drained for at most `drain_timeout_s`, then stopped."""

    drain_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginesStopped:
    """No engine of this node is left; until a coordinator assigns anew, none will be started."""

    stopped: int


Message = (
    AgentHello
    | IngressHello
    | RoutesUpdate
    | RoutesApplied
    | EnginesUpdate
    | HeldUpdate
    | SummariesUpdate
    | LengthsUpdate
    | StopEngines
    | EnginesStopped
)

T = typing.TypeVar("T")

_TYPES: Mapping[str, type[Any]] = {
    "agent_hello": AgentHello,
    "ingress_hello": IngressHello,
    "routes": RoutesUpdate,
    "routes_applied": RoutesApplied,
    "engines": EnginesUpdate,
    "held": HeldUpdate,
    "summaries": SummariesUpdate,
    "lengths": LengthsUpdate,
    "stop_engines": StopEngines,
    "engines_stopped": EnginesStopped,
}
_NAMES = {cls: name for name, cls in _TYPES.items()}


class MalformedLine(ValueError):
    """A line that is not a message of this protocol; the connection is of no more use."""


def encode(message: Message) -> bytes:
    """One message as one line, newline included."""
    value = dataclasses.asdict(message)
    return json.dumps({"type": _NAMES[type(message)], **value}, separators=(",", ":"), default=dict).encode() + b"\n"


def decode(line: bytes) -> Message | None:
    """The message of a line; None for a type this version does not know. Raises MalformedLine."""
    try:
        value = json.loads(line)
        cls = _TYPES.get(value["type"])
        message: Message | None = None if cls is None else build(cls, value)
    except (ValueError, TypeError, KeyError) as error:
        raise MalformedLine(f"not a message of the local protocol: {error}") from error
    return message


def build(cls: type[T], value: Mapping[str, Any]) -> T:
    """A dataclass from plain JSON values, by its annotations; unknown keys are ignored, wrong ones raise TypeError."""
    hints = _hints(cls)  # type: ignore[arg-type]  # mypy doubts that a class can be hashed
    return cls(**{key: _convert(hints[key], item) for key, item in value.items() if key in hints})


@functools.cache
def _hints(cls: type[Any]) -> Mapping[str, Any]:
    """The types of a dataclass's fields; resolving the annotations costs more than a message."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _convert(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(arguments, value)
    if origin is tuple:
        return tuple(_convert(arguments[0], item) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        return {key: _convert(arguments[1], item) for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise TypeError(f"{value!r} is not {hint.__name__}")
    return value


def _convert_union(arguments: tuple[Any, ...], value: Any) -> Any:
    """A value of plain types as it is, else the one thing that may also be None."""
    if value is None and types.NoneType in arguments:
        return None
    return value if type(value) in arguments else _convert(arguments[0], value)
