"""Values <-> the JSON bytes in the store, and the keys under which they lie.

Every value is one JSON object that begins with its `kind` and the `version` of its format, so that `etcdctl get`
shows what it is. Fields follow under the names of `core.model`; a field that has its default is written all the same.
A missing field takes its default (written by an older release); an unknown field, kind or newer version is refused,
because writing the object back would lose what this release does not know. NaN is written as null.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from enum import StrEnum
from typing import Any, TypeVar, cast

from enova_common.errors import Corrupt
from enova_coordinator.core.calibration import StoredCalibration
from enova_coordinator.core.episode import Episode
from enova_coordinator.core.model import (
    Assignment,
    Decision,
    Deployment,
    Node,
    Replica,
    RequestRecord,
    Stored,
    Variant,
)

PREFIX = "/enova/v1/"
LEADER_KEY = PREFIX + "leader"
META_KEY = PREFIX + "meta"
VERSION = 1

_KINDS: Mapping[str, type[Stored]] = types.MappingProxyType({
    kind.__name__: kind
    for kind in (
        Deployment, Variant, Replica, Node, Assignment, Decision, RequestRecord, StoredCalibration, Episode,
    )
})

T = TypeVar("T", bound=Stored)


def encode(value: Stored) -> bytes:
    """The bytes of a value."""
    body = {"kind": type(value).__name__, "version": VERSION} | _plain(value)
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def decode(data: bytes, *, key: str = "") -> Stored:
    """The value of some bytes; `key` is for the error's text."""
    try:
        body = _checked(json.loads(data), dict)
        kind, version = body.pop("kind"), body.pop("version")
    except (ValueError, KeyError, TypeError) as error:
        raise _corrupt(key, f"not a JSON object with kind and version: {error}") from error
    if kind not in _KINDS:
        raise _corrupt(key, f"unknown kind {kind!r}")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise _corrupt(key, f"version {version!r} of {kind} is not known here; this release reads up to {VERSION}")
    try:
        return cast("Stored", _reader(cast("Hashable", _KINDS[kind]))(body))
    except (ValueError, KeyError, TypeError) as error:
        raise _corrupt(key, f"{kind}: {error}") from error


def decode_as(kind: type[T], data: bytes, *, key: str = "") -> T:
    """The value of some bytes, which must be of one kind."""
    value = decode(data, key=key)
    if not isinstance(value, kind):
        raise _corrupt(key, f"holds {type(value).__name__} where {kind.__name__} belongs")
    return value


def key(name: str) -> str:
    """The key of a full resource name: deployments/d/replicas/r lies under replicas/d/r.

    decisions/d.number lies under decisions/d/number; every other name lies under itself.
    """
    match name.split("/"):
        case ["deployments", deployment, ("variants" | "replicas") as collection, last]:
            return f"{PREFIX}{collection}/{deployment}/{last}"
        case ["decisions", last]:
            deployment, _, number = last.rpartition(".")
            return f"{PREFIX}decisions/{deployment}/{number}"
        case ["deployments" | "nodes" | "assignments" | "requests" | "calibrations" | "episodes", _]:
            return PREFIX + name
        case _:
            raise ValueError(f"not a name of a stored object: {name!r}")


def name(key: str) -> str:
    """The full resource name of a key: the inverse of `key`."""
    match key.removeprefix(PREFIX).split("/"):
        case [("variants" | "replicas") as collection, deployment, last]:
            return f"deployments/{deployment}/{collection}/{last}"
        case ["decisions", deployment, number]:
            return f"decisions/{deployment}.{number}"
        case ["deployments" | "nodes" | "assignments" | "requests" | "calibrations" | "episodes", _]:
            return key.removeprefix(PREFIX)
        case _:
            raise ValueError(f"not a key of a stored object: {key!r}")


def prefix(collection: str, parent: str = "") -> str:
    """The prefix of a collection's keys ("replicas"), or of those of one deployment (parent deployments/d)."""
    inner = parent.removeprefix("deployments/")
    return f"{PREFIX}{collection}/{inner}/" if inner else f"{PREFIX}{collection}/"


def decision_name(deployment: str, create_time_s: float) -> str:
    """A decision's name: its deployment and its time in milliseconds, padded so that keys sort by age."""
    return f"decisions/{deployment.removeprefix('deployments/')}.{round(create_time_s * 1000):016d}"


def _corrupt(key: str, message: str) -> Corrupt:
    return Corrupt(
        f"store value {key}: {message}",
        reason="STORE_VALUE_UNREADABLE",
        remedy="run the release that wrote it, or restore the store from a backup",
        metadata={"key": key},
    )


def _plain(value: object) -> Any:  # Any: JSON
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, StrEnum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value


Reader = Callable[[Any], Any]


@functools.cache
def _reader(kind: Any) -> Reader:  # Any: a type expression
    """A function that makes a value of the type from plain JSON, and refuses everything else."""
    if dataclasses.is_dataclass(kind):
        return _dataclass_reader(cast("type", kind))
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        inner = _reader(arguments[0])
        return lambda plain: tuple(inner(item) for item in _checked(plain, list))
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        inner = _reader(arguments[1])
        return lambda plain: {name: inner(item) for name, item in _checked(plain, dict).items()}
    if origin in {types.UnionType, typing.Union}:
        return _union_reader(arguments)
    if issubclass(kind, StrEnum):
        return cast("Reader", kind)
    if kind is float:
        return lambda plain: math.nan if plain is None else float(_checked(plain, int, float))
    return lambda plain: _checked(plain, kind)


def _union_reader(arguments: tuple[Any, ...]) -> Reader:
    present = tuple(argument for argument in arguments if argument is not types.NoneType)
    if len(present) < len(arguments):
        inner = _reader(present[0])
        return lambda plain: None if plain is None else inner(plain)
    return lambda plain: _checked(plain, *present)


def _checked(plain: Any, *kinds: type) -> Any:
    if not isinstance(plain, kinds) or (isinstance(plain, bool) and bool not in kinds):
        raise TypeError(f"{plain!r} is not {' or '.join(kind.__name__ for kind in kinds)}")
    return plain


def _dataclass_reader(kind: type) -> Reader:
    readers = {name: _reader(hint) for name, hint in typing.get_type_hints(kind).items()}

    def read(plain: Any) -> Any:
        unknown = set(_checked(plain, dict)) - set(readers)
        if unknown:
            raise ValueError(f"unknown field {min(unknown)!r}")
        return kind(**{name: readers[name](inner) for name, inner in plain.items()})

    return read
