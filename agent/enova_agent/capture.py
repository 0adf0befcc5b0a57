"""The logs of engines: bounded on disk, read in pieces by the supervisor, shown to people without their tricks.

The engine writes to a file that is opened for appending, so it needs nobody to read and outlives the agent. Over
its bound the file is copied to `.1` and truncated: the engine's descriptor stays good. What it writes between
copy and truncation is lost; the alternative, a pipe, would stop the engine whenever the agent does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

READ_BYTES_MAX = 256 << 10         # a tick: an engine that floods its log must not stall the agent
LINE_LENGTH_MAX = 8192
_TAIL_BLOCK_BYTES = 64 << 10
_FOLLOW_INTERVAL_S = 0.2
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(line: bytes) -> str:
    """A line of a log as text that can do nothing to a terminal or to another log."""
    text = line[:LINE_LENGTH_MAX].decode(errors="replace").rstrip("\r")
    cut = "..." if len(line) > LINE_LENGTH_MAX else ""
    return _UNPRINTABLE.sub(_escaped, _COLOUR.sub("", text)) + cut


def _escaped(match: re.Match[str]) -> str:
    number = ord(match.group())
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def rotate(path: Path, bytes_max: int) -> bool:
    """Copy the newest `bytes_max` of the log to `.1` and empty it, if it is over the bound."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return False
    if size <= bytes_max:
        return False
    previous = path.with_name(path.name + ".1")
    with path.open("rb") as source, previous.open("wb") as target:
        offset = max(0, size - bytes_max)
        while offset < size:
            sent = os.sendfile(target.fileno(), source.fileno(), offset, min(size - offset, 1 << 20))
            if sent == 0:
                break
            offset += sent
    os.truncate(path, 0)
    return True


def tail(path: Path, count: int) -> list[str]:
    """The last `count` lines, from the file before the last rotation if it takes that."""
    lines = _last_lines(path, count)
    missing = count - len(lines)
    if missing > 0:
        lines = _last_lines(path.with_name(path.name + ".1"), missing) + lines
    return [printable(line) for line in lines]


def _last_lines(path: Path, count: int) -> list[bytes]:
    if count <= 0:
        return []
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        text = b""
        while position > 0 and text.count(b"\n") <= count and len(text) < count * LINE_LENGTH_MAX:
            position = max(0, position - _TAIL_BLOCK_BYTES)
            file.seek(position)
            text = file.read(_TAIL_BLOCK_BYTES if text else -1) + text
        lines = text.split(b"\n")
        return (lines[:-1] if not lines[-1] else lines)[-count:]
    return []


class LogReader:
    """Reads what was appended since the last time, over truncations, never more than a bound at once."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self.path = path
        self._rest = b""
        self._offset = _size(path) if from_end else 0

    def read(self) -> list[str]:
        """The whole lines that are new. Of a flood only the newest part is returned."""
        size = _size(self.path)
        if size < self._offset:
            self._offset, self._rest = 0, b""
        if size == self._offset:
            return []
        if size - self._offset > READ_BYTES_MAX:
            self._offset, self._rest = size - READ_BYTES_MAX, b""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                text = self._rest + file.read(READ_BYTES_MAX)
                self._offset = file.tell()
        except FileNotFoundError:
            return []
        *lines, rest = text.split(b"\n")
        # A bar of progress overwrites itself by carriage returns: each state of it is a line, not all of them one.
        *bars, rest = rest.split(b"\r")
        self._rest = rest[-LINE_LENGTH_MAX:]
        return [printable(part) for line in lines for part in _parts(line)] + [printable(bar) for bar in bars if bar]


async def follow(path: Path, *, tail_lines: int) -> AsyncIterator[list[str]]:
    """First the last lines, then whatever is appended, until the consumer stops."""
    reader = LogReader(path, from_end=True)
    lines = await asyncio.to_thread(tail, path, tail_lines)
    while True:
        if lines:
            yield lines
        else:
            await asyncio.sleep(_FOLLOW_INTERVAL_S)
        lines = await asyncio.to_thread(reader.read)


def _parts(line: bytes) -> list[bytes]:
    return [part for part in line.split(b"\r") if part] or [b""]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
