"""Recorded situations as lines of JSON, and back without a bit lost: what a policy was told, and what it wished. Pure.

Two kinds of lines. A `Situation` holds everything but most of the deployment's minutes of demand, which hardly differ
from one look to the next: those are a line of their own, a `History`, that many situations name. Arrays are the bytes
of their float64 in base64; a float that JSON has no number for is a word. The order of lines is that of recording, and
a History stands before what names it.
"""

from __future__ import annotations

import base64
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from typing import Any, cast

import numpy as np

from enova_common.errors import Corrupt
from enova_recommender.scaling.situation import Demand, Floats, Memory, Situation, Wish

VERSION = 1
TAIL_MINUTES = 60                  # that a situation bears itself, before its history is written anew

Line = dict[str, Any]              # Any: JSON

_T = typing.TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recorded:
    """One question to a policy, and its answer. `uid` is the deployment's: another one has another memory."""

    uid: str
    policy: str
    situation: Situation
    memory: Memory
    wish: Wish


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeptHistory:
    """The minutes that situations name by `id`."""

    id: int
    demand: Demand


def history_for(kept: KeptHistory | None, history: Demand) -> KeptHistory | None:
    """What the next situation's history is to be told by: what is kept where that will do; None: write it anew."""
    if kept is None or history.step_s != kept.demand.step_s:
        return None
    place, length = _overlap(kept.demand, history)
    if place < 0 or len(history.arrived) - length > TAIL_MINUTES:
        return None
    same = all(
        np.array_equal(before[place : place + length], now[:length], equal_nan=True)
        for before, now in zip(_series(kept.demand), _series(history), strict=True)
    )
    return kept if same else None


def history_line(kept: KeptHistory) -> Line:
    """The line of a history."""
    return {"kind": "History", "version": VERSION, "id": kept.id, "demand": _plain(kept.demand)}


def situation_line(recorded: Recorded, kept: KeptHistory) -> Line:
    """The line of a situation whose history begins within `kept` and goes on in its own tail."""
    history = recorded.situation.history
    place, length = _overlap(kept.demand, history)
    tail = _with(history, (series[length:] for series in _series(history)))
    told = replace(recorded.situation, history=tail)
    return {
        "kind": "Situation", "version": VERSION, "uid": recorded.uid, "policy": recorded.policy,
        "history": {"id": kept.id, "start": place, "count": length},
        "situation": _plain(told), "memory": _plain(recorded.memory), "wish": _plain(recorded.wish),
    }  # fmt: skip


def text_of(line: Line) -> str:
    """The line as text, without its end."""
    return json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def read_lines(lines: Iterable[str]) -> Iterator[Recorded]:
    """The situations of a recording, oldest first. Raises Corrupt with the number of the line that cannot be read."""
    histories: dict[int, Demand] = {}
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            found = _taken(json.loads(text), histories)
        except (KeyError, TypeError, ValueError) as error:
            raise Corrupt(
                f"line {number} of the recording cannot be read: {error}",
                reason="RECORDING_UNREADABLE",
                remedy="record it anew with this release, or read it with the release that wrote it",
            ) from error
        if found is not None:
            yield found


def _taken(line: Line, histories: dict[int, Demand]) -> Recorded | None:
    """The situation of a line; None for a history, which is added to those that are known."""
    kind, version = line["kind"], line["version"]
    if version != VERSION:
        raise ValueError(f"version {version!r} is not known here; this release reads {VERSION}")
    if kind == "Situation":
        return _recorded(line, histories)
    if kind != "History":
        raise ValueError(f"unknown kind {kind!r}")
    histories[int(line["id"])] = _read(Demand, line["demand"])
    return None


def _recorded(line: Line, histories: Mapping[int, Demand]) -> Recorded:
    named = line["history"]
    begun = histories[int(named["id"])]
    start, end = int(named["start"]), int(named["start"]) + int(named["count"])
    situation = _read(Situation, line["situation"])
    tail = situation.history
    pairs = zip(_series(begun), _series(tail), strict=True)
    whole = _with(tail, (np.concatenate([first[start:end], last]) for first, last in pairs))
    memory = {
        str(key): tuple(_float(each) for each in value) if isinstance(value, list) else value
        for key, value in line["memory"].items()
    }
    return Recorded(
        uid=str(line["uid"]),
        policy=str(line["policy"]),
        situation=replace(situation, history=whole),
        memory=memory,
        wish=_read(Wish, line["wish"]),
    )


def _overlap(kept: Demand, history: Demand) -> tuple[int, int]:
    """Where in `kept` the history begins (-1: nowhere), and how many of its steps are there."""
    if not len(history.arrived) or not len(kept.arrived):
        return 0, 0
    first_s = history.end_s - (len(history.arrived) - 1) * history.step_s
    kept_first_s = kept.end_s - (len(kept.arrived) - 1) * kept.step_s
    place = round((first_s - kept_first_s) / kept.step_s)
    if not 0 <= place < len(kept.arrived):
        return -1, 0
    return place, min(len(kept.arrived) - place, len(history.arrived))


def _series(demand: Demand) -> tuple[Floats, ...]:
    return demand.arrived, demand.finished, demand.prompt_tokens, demand.output_tokens


def _with(demand: Demand, series: Iterable[Floats]) -> Demand:
    arrived, finished, prompt_tokens, output_tokens = series
    return replace(
        demand, arrived=arrived, finished=finished, prompt_tokens=prompt_tokens, output_tokens=output_tokens
    )


def _plain(value: object) -> Any:  # Any: JSON
    if isinstance(value, np.ndarray):
        whole = np.ascontiguousarray(value, dtype="<f8")
        return {"shape": list(whole.shape), "f8": base64.b64encode(whole.tobytes()).decode()}
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.integer):
        return int(value)
    return value


def _float(plain: Any) -> float:
    return float(_checked(plain, int, float, str))


def _array(plain: Any) -> Floats:
    shape = tuple(int(each) for each in plain["shape"])
    return np.frombuffer(base64.b64decode(plain["f8"], validate=True), dtype="<f8").reshape(shape).astype(np.float64)


def _read(kind: type[_T], plain: Any) -> _T:
    return cast("_T", _reader(cast("Hashable", kind))(plain))


@functools.cache
def _reader(kind: Any) -> Callable[[Any], Any]:  # Any: a type expression
    """A function that makes a value of the type from plain JSON, and refuses everything else."""
    if is_dataclass(kind):
        return _dataclass_reader(cast("type", kind))
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    # From Python 3.12 on numpy's NDArray is a `type` statement: what it stands for is its value.
    origin = typing.get_origin(getattr(origin, "__value__", None)) or origin
    if origin is np.ndarray:
        return _array
    if origin is tuple:
        inner = _reader(arguments[0])
        return lambda plain: tuple(inner(item) for item in _checked(plain, list))
    if origin in {types.UnionType, typing.Union}:
        (present,) = (argument for argument in arguments if argument is not types.NoneType)
        inner = _reader(present)
        return lambda plain: None if plain is None else inner(plain)
    if origin is not None and issubclass(origin, Mapping):
        name, inner = _reader(arguments[0]), _reader(arguments[1])
        return lambda plain: {name(key): inner(item) for key, item in _checked(plain, dict).items()}
    if kind is float:
        return _float
    if issubclass(kind, StrEnum):
        return cast("Callable[[Any], Any]", kind)
    return lambda plain: _checked(plain, kind)


def _dataclass_reader(kind: type) -> Callable[[Any], Any]:
    hints = typing.get_type_hints(kind)
    readers = {item.name: _reader(hints[item.name]) for item in fields(kind)}

    def read(plain: Any) -> Any:
        unknown = set(_checked(plain, dict)) - set(readers)
        if unknown:
            raise ValueError(f"unknown field {min(unknown)!r}")
        return kind(**{name: readers[name](inner) for name, inner in plain.items()})

    return read


def _checked(plain: Any, *kinds: type) -> Any:
    if not isinstance(plain, kinds) or (isinstance(plain, bool) and bool not in kinds):
        raise TypeError(f"{plain!r:.60} is not {' or '.join(kind.__name__ for kind in kinds)}")
    return plain
