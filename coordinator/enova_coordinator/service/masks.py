"""Update masks: the fields that a request changes, copied over what is stored; absent ones are cleared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import Message

from enova_common.errors import InvalidField

M = TypeVar("M", bound=Message)


def merged(before: M, request: M, paths: Iterable[str], *, allowed: Iterable[str]) -> M:
    """`before` with the fields of `paths` as the request has them. Raises InvalidField for a path that may not be."""
    result = type(before)()
    result.CopyFrom(before)
    known = set(allowed)
    for path in paths:
        parts = path.split(".")
        if parts[0] not in known:
            raise _unknown(path, known)
        _copy(request, result, parts, path)
    return result


def _copy(source: Message, target: Message, parts: list[str], path: str) -> None:
    field = source.DESCRIPTOR.fields_by_name.get(parts[0])
    if field is None:
        raise _unknown(path, source.DESCRIPTOR.fields_by_name)
    if len(parts) > 1:
        inner = getattr(target, field.name)
        if not isinstance(inner, Message):
            raise InvalidField(f"{path!r} goes into a field without parts", field="update_mask")
        _copy(getattr(source, field.name), inner, parts[1:], path)
        return
    target.ClearField(field.name)
    only = type(source)()
    only.CopyFrom(source)
    for other, _ in source.ListFields():
        if other.name != field.name:
            only.ClearField(other.name)
    target.MergeFrom(only)


def _unknown(path: str, known: Iterable[str]) -> InvalidField:
    return InvalidField(
        f"{path!r} is not a field that can be changed", field="update_mask", remedy=f"use {', '.join(sorted(known))}"
    )
