"""The request record `enova.request/v1`: one JSON row a request, written by ingress, load generator and simulator.

Records hold figures and hashes, never text. A figure that is not known is absent from the row and None here:
missing is never zero. Readers ignore keys that they do not know, and refuse another version of the format.
Everything here works on plain values, lines and bytes; opening files is the caller's part.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

FORMAT = "enova.request/v1"
PREFIX_TOKENS = 512      # what one prefix hash stands for
PREFIX_HASHES_MAX = 64   # of one record: prompts of up to 32,768 tokens are told apart by prefix


class Outcome(StrEnum):
    """How a request ended."""

    FINISHED = "FINISHED"    # answered in full, errors of the caller's making included
    FAILED = "FAILED"        # an error of ours or of the engine, before any byte of an answer
    CUT = "CUT"              # broken off after the first byte
    REFUSED = "REFUSED"      # turned away by a full queue, or nothing serves the model
    CANCELLED = "CANCELLED"  # the client went away


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request. Times are model seconds: `arrival_s` since the Unix epoch (or a trace's start), the rest lasting."""

    arrival_s: float
    outcome: Outcome
    deployment: str = ""
    served_name: str = ""
    serving_class: str = ""
    tenant_hash: str = ""                # a keyed hash: the same tenant, and nobody knows who
    request_id: str = ""
    replica: str = ""                    # empty: never reached one
    node: str = ""                       # whose ingress wrote the row
    stream: bool = False
    status: int = 0                      # HTTP status of the answer; 0: none was given
    reason: str = ""                     # why the outcome is not FINISHED
    attempts: int = 0                    # replicas that were tried
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    max_tokens: int | None = None        # as asked
    finish_reason: str = ""              # the engine's: stop, length, ...
    prefix_hashes: tuple[str, ...] = ()  # of the prompt's full blocks of PREFIX_TOKENS, each with all before it
    queue_s: float | None = None         # in the owner's queue
    ttft_s: float | None = None          # arrival to the first token, at the entry; streams only
    tpot_s: float | None = None          # mean time between tokens after the first; streams of two or more
    duration_s: float | None = None      # arrival to the end


class MalformedRecord(ValueError):
    """A row that is not a request record."""


_FIELDS = {field.name: field for field in dataclasses.fields(RequestRecord)}
_COUNTS = frozenset({"prompt_tokens", "output_tokens", "max_tokens", "status", "attempts"})
_SECONDS = frozenset({"queue_s", "ttft_s", "tpot_s", "duration_s"})


def row_of_record(record: RequestRecord) -> str:
    """The record as one line without its newline; defaults are left out."""
    value: dict[str, Any] = {"format": FORMAT}
    for name, field in _FIELDS.items():
        item = getattr(record, name)
        if item != field.default:
            value[name] = round(item, 6) if isinstance(item, float) else item
    return json.dumps(value, separators=(",", ":"))


def record_of_row(row: str | bytes) -> RequestRecord:
    """The record of a line. Raises MalformedRecord, naming the field."""
    try:
        value = json.loads(row)
    except ValueError as error:
        raise MalformedRecord(f"not JSON: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise MalformedRecord(f"format: not {FORMAT}")
    known = {name: _checked(name, item) for name, item in value.items() if name in _FIELDS}
    if missing := {"arrival_s", "outcome"} - known.keys():
        raise MalformedRecord(f"{', '.join(sorted(missing))}: missing")
    return RequestRecord(**known)


def records_of_lines(lines: Iterable[str]) -> Iterator[RequestRecord]:
    """The records of many lines; blank ones are skipped. Raises MalformedRecord with the line's number."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield record_of_row(line)
            except MalformedRecord as error:
                raise MalformedRecord(f"line {number}: {error}") from error


def records_of_bytes(data: bytes) -> Iterator[RequestRecord]:
    """The records of a file's bytes, gzipped or not; a last row without its newline, cut by a crash, is left out."""
    if data[:2] == b"\x1f\x8b":
        try:
            data = zlib.decompress(data, wbits=zlib.MAX_WBITS | 16)
        except zlib.error as error:
            raise MalformedRecord(f"not a gzip file: {error}") from error
    whole, newline, _ = data.rpartition(b"\n")
    return records_of_lines((whole + newline).decode("utf-8", "replace").splitlines())


def _checked(name: str, item: Any) -> Any:
    match name:
        case "arrival_s":
            return _seconds(name, item, negative=True)
        case "outcome":
            if item not in Outcome.__members__:
                raise MalformedRecord(f"outcome: {item!r} is not one of {', '.join(Outcome)}")
            return Outcome(item)
        case "prefix_hashes":
            if not isinstance(item, list) or not all(isinstance(entry, str) for entry in item):
                raise MalformedRecord("prefix_hashes: not a list of strings")
            return tuple(item[:PREFIX_HASHES_MAX])
        case "stream":
            if not isinstance(item, bool):
                raise MalformedRecord(f"stream: {item!r} is not true or false")
            return item
    if name in _COUNTS:
        if not isinstance(item, int) or isinstance(item, bool) or item < 0:
            raise MalformedRecord(f"{name}: {item!r} is not a count")
        return item
    if name in _SECONDS:
        return _seconds(name, item, negative=False)
    if not isinstance(item, str):
        raise MalformedRecord(f"{name}: {item!r} is not a string")
    return item


def _seconds(name: str, item: Any, *, negative: bool) -> float:
    if not isinstance(item, int | float) or isinstance(item, bool) or not math.isfinite(item):
        raise MalformedRecord(f"{name}: {item!r} is not a number of seconds")
    if item < 0 and not negative:
        raise MalformedRecord(f"{name}: {item!r} is negative")
    return float(item)
