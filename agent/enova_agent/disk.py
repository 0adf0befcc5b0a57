"""The little that an agent keeps on disk beside its engines' journal: who it is, the highest term, the last assignment.

Every file is replaced as a whole and survives a crash at any instant. One that cannot be read is set aside, never a
reason not to start: engines are adopted from their own journal, and the coordinator says the rest again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from enova_agent.core.local import build
from enova_agent.core.model import Assignment
from enova_common.errors import Conflict

VERSION = 1
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Keeps other agents off this directory for as long as the process lives; raises Conflict."""
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (data_dir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(
                f"another agent uses {data_dir}", field="data_dir", remedy="stop it, or give this one another data_dir"
            ) from error
        yield


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, and returns when it is on the disk; raises OSError."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class TermFile:
    """The highest term that was ever obeyed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        value = _load(path).get("term", 0)
        self._highest = value if isinstance(value, int) and value >= 0 else 0

    @property
    def highest(self) -> int:
        """The highest term that was ever obeyed."""
        return self._highest

    def remember(self, term: int) -> None:
        """Puts a higher term on disk before it returns; raises OSError."""
        replace_file(self._path, json.dumps({"version": VERSION, "term": term}).encode())
        self._highest = term


class AssignmentFile:
    """The last assignment, to go on with while no coordinator can be reached."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> Assignment | None:
        """The assignment, if there is one that can be read."""
        value = _load(self._path).get("assignment")
        if value is None:
            return None
        try:
            return build(Assignment, value)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            _set_aside(self._path, error)
            return None

    def save(self, assignment: Assignment) -> None:
        """Keeps an assignment; raises OSError."""
        value = {"version": VERSION, "assignment": assignment}
        replace_file(self._path, json.dumps(value, default=_plain).encode())


def node_uid(path: Path) -> str:
    """This node's uid: drawn once, then kept."""
    value = _load(path).get("uid")
    if isinstance(value, str) and value:
        return value
    uid = uuid.uuid4().hex
    replace_file(path, json.dumps({"version": VERSION, "uid": uid}).encode())
    return uid


def boot_id() -> str:
    """The kernel's name for this boot of the host."""
    return BOOT_ID.read_text().strip()


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass or a mapping as JSON has it."""
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return dict(value)


def _load(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _set_aside(path, error)
        return {}
    if not isinstance(value, dict):
        _set_aside(path, ValueError("not a JSON object"))
        return {}
    return value


def _set_aside(path: Path, error: Exception) -> None:
    """Moves an unreadable file out of the way, for somebody to look at."""
    aside = path.with_name(f"{path.name}.corrupt")
    log.warning("%s cannot be read (%s); it is kept as %s", path, error, aside.name)
    with contextlib.suppress(OSError):  # a disk that takes no rename takes the next write neither, which is reported
        path.replace(aside)
