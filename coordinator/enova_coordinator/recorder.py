"""What policies were told and what they wished, in one local, bounded file, written and read beside the loop.

A thread of its own encodes, writes and reads; whoever hands over a situation never waits, and what the thread cannot
keep up with, or the disk does not take, is counted and dropped. The file is no store of record: it may be deleted at
any time. Over `file_bytes_max` the oldest tenth goes; what is older than `keep_s` of real time goes as well.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from enova_common.errors import Unavailable
from enova_coordinator.bounded_file import BoundedFile, KeepingFigures, close_broken, write_with_room
from enova_coordinator.core.recording import (
    KeptHistory,
    Recorded,
    history_for,
    history_line,
    situation_line,
    text_of,
)

KEEP_S = 7 * 86_400.0              # real time
FILE_BYTES_MAX = 1 << 30
LINE_BYTES_MAX = 3 << 20           # as text: one must fit into a message of the API
QUEUE_MAX = 256                    # situations that wait for the disk
PRUNE_EVERY_S = 60.0               # real time
PAGE_LINES = 32
PAGE_BYTES_MAX = 512 << 10         # after which a page ends, where it holds a line at all

SCHEMA = (
    "CREATE TABLE IF NOT EXISTS histories (id INTEGER PRIMARY KEY AUTOINCREMENT, line BLOB)",
    "CREATE TABLE IF NOT EXISTS situations (number INTEGER PRIMARY KEY AUTOINCREMENT, deployment TEXT NOT NULL,"
    " at_s REAL NOT NULL, kept_s REAL NOT NULL, history INTEGER NOT NULL, line BLOB NOT NULL)",
    "CREATE INDEX IF NOT EXISTS situations_of ON situations (deployment, number)",
    "CREATE INDEX IF NOT EXISTS situations_by_age ON situations (kept_s)",
    "CREATE INDEX IF NOT EXISTS situations_by_history ON situations (history)",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """How far a recording has been read: the last situation's number, and the newest history that was told."""

    number: int = 0
    history: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some lines of a recording, and where to go on; nowhere (None) where they are the last."""

    lines: tuple[str, ...]
    rest: Place | None


NOTHING = Page(lines=(), rest=None)


class _TooLargeError(Exception):
    """A situation whose text would not fit into a message."""


@dataclass(frozen=True, slots=True)
class _Put:
    deployment: str
    recorded: Recorded


@dataclass(frozen=True, slots=True)
class _Read:
    deployment: str
    last_s: float
    place: Place
    answer: Future[Page]


class Recorder:
    """The file, with the thread that it belongs to. `wall_s` is the real clock."""

    def __init__(
        self,
        path: Path,
        *,
        file_bytes_max: int = FILE_BYTES_MAX,
        keep_s: float = KEEP_S,
        prune_every_s: float = PRUNE_EVERY_S,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.figures = KeepingFigures()
        self._file = BoundedFile(path=path, bytes_max=file_bytes_max, schema=SCHEMA)
        self._keep_s = keep_s
        self._prune_every_s = prune_every_s
        self._wall_s = wall_s
        self._pruned_s = time.monotonic()
        self._kept: dict[str, KeptHistory] = {}
        self._queue: queue.Queue[_Put | _Read | None] = queue.Queue(QUEUE_MAX)
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def put(self, deployment: str, recorded: Recorded) -> None:
        """Hand a situation over; it is dropped (and counted) when too many wait."""
        try:
            self._queue.put_nowait(_Put(deployment, recorded))
        except queue.Full:
            self.figures.drop("queue_full")

    def read(self, deployment: str, *, last_s: float, place: Place) -> Future[Page]:
        """The next lines of a deployment's recording, of its newest `last_s` of model time.

        Unavailable, where the disk does not answer: a part of a recording must not pass for the whole.
        """
        answer: Future[Page] = Future()
        try:
            self._queue.put_nowait(_Read(deployment, last_s, place, answer))
        except queue.Full:
            answer.set_exception(_unreadable("too much waits for the disk"))
        return answer

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what waits, then end; a disk that hangs is left behind after `timeout_s`."""
        with contextlib.suppress(queue.Full):  # the daemon thread ends with the process all the same
            self._queue.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        connection: sqlite3.Connection | None = None
        while (work := self._queue.get()) is not None:
            try:
                connection = connection or self._file.open()
                self._carry_out(connection, work)
            except (sqlite3.Error, OSError, TypeError, ValueError) as error:
                # A value that cannot be told costs its own line, a disk that does not write costs what it loses.
                log.warning("a situation is not kept: %s", error)
                self._give_up(work, error)
                close_broken(connection)
                connection = None
        if connection is not None:
            connection.close()

    def _give_up(self, work: _Put | _Read, error: Exception) -> None:
        self._kept.clear()
        if isinstance(work, _Put):
            self.figures.drop("disk")
        elif not work.answer.done() and (work.answer.running() or work.answer.set_running_or_notify_cancel()):
            work.answer.set_exception(_unreadable(str(error)))

    def _carry_out(self, connection: sqlite3.Connection, work: _Put | _Read) -> None:
        if isinstance(work, _Put):
            self._put(connection, work)
            if time.monotonic() - self._pruned_s > self._prune_every_s:
                self._pruned_s = time.monotonic()
                self._forget(connection, self._wall_s() - self._keep_s)
        # Who asked may have given up meanwhile: that must not end the thread.
        elif work.answer.set_running_or_notify_cancel():
            work.answer.set_result(_page(connection, work))

    def _put(self, connection: sqlite3.Connection, work: _Put) -> None:
        try:
            kept = write_with_room(
                connection, lambda: self._insert(connection, work), make_room=lambda: self._make_room(connection)
            )
        except _TooLargeError:
            self.figures.drop("too_large")
        else:
            self.figures.written += 1
            self._kept[work.deployment] = kept

    def _insert(self, connection: sqlite3.Connection, work: _Put) -> KeptHistory:
        """What its history is told by. Raises _TooLargeError for a situation that cannot be kept."""
        history = work.recorded.situation.history
        kept = history_for(self._kept.get(work.deployment), history)
        fresh = kept is None
        if kept is None:
            number = connection.execute("INSERT INTO histories (line) VALUES (x'')").lastrowid
            assert number is not None
            kept = KeptHistory(id=number, demand=history)
        line = text_of(situation_line(work.recorded, kept)).encode()
        told = text_of(history_line(kept)).encode() if fresh else b""
        if max(len(line), len(told)) > LINE_BYTES_MAX:
            raise _TooLargeError
        if fresh:
            connection.execute("UPDATE histories SET line = ? WHERE id = ?", (zlib.compress(told, 1), kept.id))
        connection.execute(
            "INSERT INTO situations (deployment, at_s, kept_s, history, line) VALUES (?, ?, ?, ?, ?)",
            (work.deployment, work.recorded.situation.now_s, self._wall_s(), kept.id, zlib.compress(line, 1)),
        )
        return kept

    def _make_room(self, connection: sqlite3.Connection) -> None:
        """By the oldest tenth."""
        oldest, newest = connection.execute("SELECT min(number), max(number) FROM situations").fetchone()
        if oldest is None:
            return
        edge = oldest + max(1, (newest - oldest) // 10)
        cursor = connection.execute("DELETE FROM situations WHERE number < ?", (edge,))
        self.figures.drop("file_full", cursor.rowcount)
        self._drop_histories(connection)

    def _forget(self, connection: sqlite3.Connection, before_s: float) -> None:
        if connection.execute("DELETE FROM situations WHERE kept_s < ?", (before_s,)).rowcount:
            self._drop_histories(connection)

    def _drop_histories(self, connection: sqlite3.Connection) -> None:
        """Those that no situation names any more: in the file, and of those that the next one might name."""
        connection.execute("DELETE FROM histories WHERE id NOT IN (SELECT history FROM situations)")
        left = {number for (number,) in connection.execute("SELECT id FROM histories")}
        self._kept = {name: kept for name, kept in self._kept.items() if kept.id in left}


def _unreadable(why: str) -> Unavailable:
    return Unavailable(
        f"what was recorded cannot be read at the moment: {why}",
        reason="RECORDING_UNREADABLE",
        remedy="see that the disk of the coordinator's data_dir has room and answers, then ask again",
    )


def _page(connection: sqlite3.Connection, wanted: _Read) -> Page:
    newest = connection.execute(
        "SELECT at_s FROM situations WHERE deployment = ? ORDER BY number DESC LIMIT 1", (wanted.deployment,)
    ).fetchone()
    if newest is None:
        return NOTHING
    rows = connection.execute(
        "SELECT number, history, line FROM situations WHERE deployment = ? AND number > ? AND at_s >= ? "
        "ORDER BY number LIMIT ?",
        (wanted.deployment, wanted.place.number, newest[0] - wanted.last_s, PAGE_LINES),
    )
    lines, place = _lines(connection, rows, wanted.place)
    return Page(lines=tuple(lines), rest=place if lines else None)


def _lines(
    connection: sqlite3.Connection, rows: Iterable[tuple[int, int, bytes]], place: Place
) -> tuple[list[str], Place]:
    """The rows as text, each history before the first that names it, until they are many bytes."""
    lines: list[str] = []
    size = 0
    for number, history, line in rows:
        if history > place.history:
            found = connection.execute("SELECT line FROM histories WHERE id = ?", (history,)).fetchone()
            lines.append(zlib.decompress(found[0]).decode())
            size += len(lines[-1])
        place = Place(number=number, history=max(history, place.history))
        lines.append(zlib.decompress(line).decode())
        size += len(lines[-1])
        if size > PAGE_BYTES_MAX:
            break
    return lines, place
