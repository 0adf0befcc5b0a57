"""Structured logs on stderr: JSON lines for machines, plain lines on a terminal, never a forged line.

Messages carry text that others wrote (a model's path, an engine's output, a client's header). Control characters in it
are escaped, so that one record stays one line and no escape sequence reaches a terminal.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TextIO

from enova_common.errors import InvalidField

MESSAGE_CHARS_MAX = 8192  # a line longer than this is cut: journald splits at 48 kB, people read less

_context: ContextVar[Mapping[str, str]] = ContextVar("enova_log_context", default={})  # noqa: B039 - never mutated
_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | {"message", "asctime", "taskName"}
# C0 and C1 controls, DEL, the two Unicode line ends, and the marks that reorder text (a log that reads as another).
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_ESCAPES |= {code: f"\\u{code:04x}" for code in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_ESCAPES |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}


class LogForm(StrEnum):
    """How records are written."""

    AUTO = "auto"
    JSON = "json"
    TEXT = "text"


def configure(
    program: str, *, level: str = "INFO", form: LogForm = LogForm.AUTO, stream: TextIO | None = None
) -> None:
    """Sends the records of all loggers to `stream` (stderr); AUTO means text on a terminal and JSON elsewhere."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise InvalidField(f"{level!r} is not a level", field="log_level", remedy="use DEBUG, INFO, WARNING or ERROR")
    target = stream or sys.stderr
    text = form is LogForm.TEXT or (form is LogForm.AUTO and target.isatty())
    handler = logging.StreamHandler(target)
    handler.setFormatter(TextFormatter() if text else JsonFormatter(program))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    # A log that cannot be written (disk full, reader gone) must not write about that, and never stops the program.
    logging.raiseExceptions = False


@contextlib.contextmanager
def log_context(**fields: str) -> Iterator[None]:
    """Adds fields (node, replica, ...) to every record of this task and of those that it starts inside."""
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def escaped(text: str) -> str:
    """The text with its control characters made visible."""
    return text.translate(_ESCAPES)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, program, logger, message, then context and extra fields."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        value: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "program": self._program,
            "logger": record.name,
            "message": _message(record),
            **_fields(record),
        }
        if record.exc_info:
            value["exception"] = self.formatException(record.exc_info)
        # ensure_ascii: what is not ASCII is written as \\uXXXX, which covers every control character as well.
        return json.dumps(value, default=str)


class TextFormatter(logging.Formatter):
    """`12:00:00.000 INFO    message (key=value, ...)` for a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, with the lines of a stack below it."""
        fields = ", ".join(f"{key}={escaped(str(value))}" for key, value in _fields(record).items())
        line = f"{_time(record)[11:23]} {record.levelname:<7} {escaped(_message(record))}"
        if fields:
            line += f" ({fields})"
        if record.exc_info:
            stack = self.formatException(record.exc_info).splitlines()
            line = "\n".join([line, *(f"    {escaped(text)}" for text in stack)])
        return line


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    try:
        message = record.getMessage()
    except (TypeError, ValueError) as error:
        # A wrong format string is a defect at the caller; the record is still worth more than an exception here.
        message = f"{record.msg!r} with {record.args!r} ({error})"
    if len(message) <= MESSAGE_CHARS_MAX:
        return message
    return f"{message[:MESSAGE_CHARS_MAX]}... ({len(message)} characters)"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    return {key: _plain(value) for key, value in {**_context.get(), **extra}.items()}


def _plain(value: object) -> object:
    """JSON has no NaN and no infinity; a reader of the log must not stumble over them."""
    match value:
        case float():
            return value if math.isfinite(value) else str(value)
        case str() | int() | None:
            return value
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return str(value)
