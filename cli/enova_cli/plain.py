"""Messages as plain JSON values and back, by the rules of the command line.

Field names as in the proto; enums as bare words (`READY`); integers as numbers; times RFC 3339 in UTC.
`json_format` is not used: it prints 64-bit integers as strings and cannot say where an unknown field stands.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from enova_common.errors import InvalidField

M = TypeVar("M", bound=Message)

_INTEGERS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}


def to_plain(message: Message) -> dict[str, Any]:
    """The message as JSON values. Unset `optional` fields are left out, unset messages are null, NaN is null."""
    plain: dict[str, Any] = {}
    for field in _fields(message):
        value = getattr(message, field.name)
        if _is_map(field):
            plain[field.name] = dict(value)
        elif field.is_repeated:
            plain[field.name] = [_item_to_plain(field, item) for item in value]
        elif field.message_type is not None:
            plain[field.name] = _item_to_plain(field, value) if message.HasField(field.name) else None
        elif field.has_presence and not message.HasField(field.name):
            continue
        else:
            plain[field.name] = _item_to_plain(field, value)
    return plain


def from_plain(cls: type[M], value: object, path: str = "", known: Collection[str] | None = None) -> M:
    """The message of JSON values. Raises InvalidField with the path of what is unknown or of the wrong type.

    `known`: the fields of the outermost message that may be given, where not all may.
    """
    message = cls()
    _fill(message, value, path, known)
    return message


def enum_word(field: FieldDescriptor, number: int) -> str:
    """The bare word of an enum's number: STATE_READY of Replica.State is READY."""
    enum = field.enum_type
    assert enum is not None
    known = enum.values_by_number.get(number)
    return known.name.removeprefix(_enum_prefix(enum.name)) if known else str(number)


def enum_words(field: FieldDescriptor) -> list[str]:
    """The bare words that an enum's field takes; the unspecified one is what leaving it out means."""
    assert field.enum_type is not None
    return [enum_word(field, value.number) for value in field.enum_type.values if value.number]


def rfc3339(seconds: float) -> str:
    """A Unix time as RFC 3339 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(message: Message) -> Sequence[FieldDescriptor]:
    # The stubs know two descriptor classes (of the pure and of the compiled runtime) as one another's strangers.
    return cast(Sequence[FieldDescriptor], message.DESCRIPTOR.fields)


def _enum_prefix(name: str) -> str:
    words = "".join(f"_{letter}" if letter.isupper() else letter.upper() for letter in name)
    return words.lstrip("_") + "_"


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _item_to_plain(field: FieldDescriptor, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return rfc3339(value.seconds + value.nanos / 1e9)
    if isinstance(value, Message):
        return to_plain(value)
    if field.enum_type is not None:
        return enum_word(field, value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _fill(message: Message, value: object, path: str, known: Collection[str] | None = None) -> None:
    if not isinstance(value, Mapping):
        raise InvalidField(f"expected a mapping, found {_kind(value)}", field=path or message.DESCRIPTOR.name)
    fields = {field.name: field for field in _fields(message) if known is None or field.name in known}
    for key, item in value.items():
        here = f"{path}.{key}" if path else str(key)
        field = fields.get(str(key))
        if field is None:
            near = difflib.get_close_matches(str(key), fields, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"known fields: {', '.join(sorted(fields))}"
            raise InvalidField("unknown field", field=here, reason="UNKNOWN_FIELD", remedy=remedy)
        if item is not None:
            _set(message, field, item, here)


def _set(message: Message, field: FieldDescriptor, item: object, path: str) -> None:
    if _is_map(field):
        if not isinstance(item, Mapping):
            raise InvalidField(f"expected a mapping, found {_kind(item)}", field=path)
        getattr(message, field.name).update({str(key): str(value) for key, value in item.items()})
    elif field.is_repeated:
        if not isinstance(item, list):
            raise InvalidField(f"expected a list, found {_kind(item)}", field=path)
        for index, element in enumerate(item):
            target = getattr(message, field.name)
            if field.message_type is not None:
                _fill(target.add(), element, f"{path}[{index}]")
            else:
                target.append(_scalar(field, element, f"{path}[{index}]"))
    elif field.message_type is not None:
        child = getattr(message, field.name)
        child.SetInParent()
        _fill(child, item, path)
    else:
        setattr(message, field.name, _scalar(field, item, path))


def _scalar(field: FieldDescriptor, value: object, path: str) -> Any:
    bounds = _INTEGERS.get(field.type)
    if bounds is not None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidField(f"expected a whole number, found {_kind(value)}", field=path)
        if not bounds[0] <= value <= bounds[1]:
            raise InvalidField(f"{value} is out of range", field=path)
        return value
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidField(f"expected a finite number, found {_kind(value)}", field=path)
        return float(value)
    if field.type == FieldDescriptor.TYPE_BOOL:
        if not isinstance(value, bool):
            raise InvalidField(f"expected true or false, found {_kind(value)}", field=path)
        return value
    if field.enum_type is not None:
        return _enum_number(field, value, path)
    if not isinstance(value, str):
        raise InvalidField(f"expected text, found {_kind(value)}", field=path, remedy="put it in quotes")
    return value


def _enum_number(field: FieldDescriptor, value: object, path: str) -> int:
    assert field.enum_type is not None
    words = {v.name.removeprefix(_enum_prefix(field.enum_type.name)): v.number for v in field.enum_type.values}
    if value is False and "OFF" in words:
        value = "OFF"                  # YAML 1.1 reads the word as false
    if value not in words:
        raise InvalidField(f"unknown word {value!r}", field=path, remedy=f"one of {', '.join(words)}")
    return words[str(value)]


def _kind(value: object) -> str:
    match value:
        case bool():
            return f"{value}".lower()
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {value!r}"
        case list():
            return "a list"
        case Mapping():
            return "a mapping"
        case _:
            return "nothing" if value is None else type(value).__name__
