"""A local SQLite file of bounded size that is no store of record: one that is damaged is started anew."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

ROOM_ATTEMPTS = 10

Written = TypeVar("Written")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundedFile:
    """Where it is, how large it may become, and the statements that make its tables."""

    path: Path
    bytes_max: int
    schema: tuple[str, ...]

    def open(self) -> sqlite3.Connection:
        """The file, made or made anew where need be; without transactions of its own."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            log.warning("%s is damaged and is started anew: %s", self.path.name, error)
            for suffix in ("", "-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, timeout=5.0)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        page_bytes = int(connection.execute("PRAGMA page_size").fetchone()[0])
        connection.execute(f"PRAGMA max_page_count = {self.bytes_max // page_bytes}")
        for statement in self.schema:
            connection.execute(statement)
        return connection


@dataclass(slots=True)
class KeepingFigures:
    """What became of what was handed over, for the coordinator's own metrics."""

    written: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, count: int = 1) -> None:
        """Count what was not kept."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count


def write_with_room(
    connection: sqlite3.Connection, write: Callable[[], Written], *, make_room: Callable[[], None]
) -> Written:
    """What `write` returns, in one transaction; as long as the file is full, room is made and it is tried again."""
    attempt = 0
    while True:
        connection.execute("BEGIN")
        try:
            written = write()
            connection.execute("COMMIT")
        except BaseException as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            full = isinstance(error, sqlite3.OperationalError) and "full" in str(error)
            if not full or attempt == ROOM_ATTEMPTS:
                raise              # a disk that is full whatever is dropped: its error tells
            make_room()
            attempt += 1
        else:
            return written


def close_broken(connection: sqlite3.Connection | None) -> None:
    """Let go of a connection after an error; it may refuse to close as well."""
    if connection is not None:
        with contextlib.suppress(sqlite3.Error):
            connection.close()
