"""One-minute rollups of the last fourteen days in one local, bounded file, written beside the loop.

One row holds one node's minute: the features of all its objects as a compressed matrix. A thread of its own writes and
reads; whoever hands over a minute never waits, and what the thread cannot keep up with, or the disk does not take, is
counted and dropped. The file is no store of record: it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import sqlite3
import threading
import time
import zlib
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from enova_coordinator.bounded_file import BoundedFile, KeepingFigures, close_broken, write_with_room
from enova_coordinator.core.series import MINUTE_S

KEEP_S = 14 * 86_400.0
FILE_BYTES_MAX = 4 << 30
QUEUE_MAX = 4_096                  # minutes of nodes that wait for the disk
BATCH_MAX = 512
INSERT_MAX = 64                    # minutes in one transaction: small beside the tenth that is dropped for room
PRUNE_EVERY_S = 60.0               # real time

SCHEMA = (
    "CREATE TABLE IF NOT EXISTS minutes "
    "(end_s REAL NOT NULL, node TEXT NOT NULL, figures BLOB NOT NULL, PRIMARY KEY (node, end_s)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS minutes_by_age ON minutes (end_s)",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeMinute:
    """What one node's objects were in the minute that ended at `end_s` (model time)."""

    end_s: float
    node: str
    objects: dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledSeries:
    """The minutes of one object that the file holds: their ends and their rows."""

    ends_s: tuple[float, ...]
    rows: tuple[NDArray[np.float32], ...]

    def on_grid(self) -> tuple[float, NDArray[np.float32]]:
        """The start of the first minute and a row a minute from there; NaN where the file holds none."""
        first, last = self.ends_s[0], self.ends_s[-1]
        grid = np.full((round((last - first) / MINUTE_S) + 1, len(self.rows[0])), np.nan, dtype=np.float32)
        for end_s, row in zip(self.ends_s, self.rows, strict=True):
            grid[round((end_s - first) / MINUTE_S)] = row
        return first - MINUTE_S, grid


@dataclass(frozen=True, slots=True)
class _Read:
    object: str
    nodes: tuple[str, ...]
    start_s: float
    answer: Future[RolledSeries]


class Rollups:
    """The file, with the thread that it belongs to."""

    def __init__(
        self,
        path: Path,
        *,
        keep_s: float = KEEP_S,
        file_bytes_max: int = FILE_BYTES_MAX,
        prune_every_s: float = PRUNE_EVERY_S,
    ) -> None:
        self.figures = KeepingFigures()
        self._file = BoundedFile(path=path, bytes_max=file_bytes_max, schema=SCHEMA)
        self._keep_s = keep_s
        self._prune_every_s = prune_every_s
        self._queue: queue.Queue[NodeMinute | _Read | None] = queue.Queue(QUEUE_MAX)
        self._thread = threading.Thread(target=self._run, name="rollups", daemon=True)
        self._thread.start()

    def write(self, minute: NodeMinute) -> None:
        """Hand a minute over; it is dropped (and counted) when too many wait."""
        try:
            self._queue.put_nowait(minute)
        except queue.Full:
            self.figures.drop("queue_full")

    def read(self, object_name: str, *, nodes: tuple[str, ...], start_s: float) -> Future[RolledSeries]:
        """The minutes of one object on these nodes since `start_s`, oldest first."""
        answer: Future[RolledSeries] = Future()
        try:
            self._queue.put_nowait(_Read(object_name, nodes, start_s, answer))
        except queue.Full:
            answer.set_result(RolledSeries(ends_s=(), rows=()))
        return answer

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what waits, then end; a disk that hangs is left behind after `timeout_s`."""
        with contextlib.suppress(queue.Full):  # the daemon thread ends with the process all the same
            self._queue.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        connection: sqlite3.Connection | None = None
        pruned_s = time.monotonic()
        going_on = True
        while going_on:
            batch = [self._queue.get()]
            while len(batch) < BATCH_MAX and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            going_on = None not in batch
            try:
                connection = connection or self._file.open()
                self._carry_out(connection, [item for item in batch if item is not None])
                if time.monotonic() - pruned_s > self._prune_every_s:
                    self._prune(connection)
                    pruned_s = time.monotonic()
            except (sqlite3.Error, OSError) as error:
                log.warning("rollups are not kept for now: %s", error)
                self.figures.drop("disk", sum(isinstance(item, NodeMinute) for item in batch))
                _give_up_reads(batch)
                close_broken(connection)
                connection = None
        if connection is not None:
            connection.close()

    def _carry_out(self, connection: sqlite3.Connection, batch: list[NodeMinute | _Read]) -> None:
        rows = [(item.end_s, item.node, pack(item)) for item in batch if isinstance(item, NodeMinute)]
        for start in range(0, len(rows), INSERT_MAX):
            part = rows[start : start + INSERT_MAX]
            self._insert(connection, part)
            self.figures.written += len(part)
        for item in batch:
            # Who asked may have given up meanwhile: that must not end the thread.
            if isinstance(item, _Read) and item.answer.set_running_or_notify_cancel():
                item.answer.set_result(self._read(connection, item))

    def _insert(self, connection: sqlite3.Connection, rows: list[tuple[float, str, bytes]]) -> None:
        write_with_room(
            connection,
            lambda: connection.executemany("INSERT OR REPLACE INTO minutes VALUES (?, ?, ?)", rows),
            make_room=lambda: self._drop_oldest(connection),
        )

    @staticmethod
    def _read(connection: sqlite3.Connection, wanted: _Read) -> RolledSeries:
        ends_s: list[float] = []
        rows: list[NDArray[np.float32]] = []
        marks = ",".join("?" * len(wanted.nodes))
        query = f"SELECT end_s, figures FROM minutes WHERE node IN ({marks}) AND end_s >= ? ORDER BY end_s"  # noqa: S608
        for end_s, figures in connection.execute(query, (*wanted.nodes, wanted.start_s)):
            row = unpack(figures).get(wanted.object)
            if row is not None:
                ends_s.append(end_s)
                rows.append(row)
        return RolledSeries(ends_s=tuple(ends_s), rows=tuple(rows))

    def _prune(self, connection: sqlite3.Connection) -> None:
        newest = connection.execute("SELECT max(end_s) FROM minutes").fetchone()[0]
        if newest is not None:
            connection.execute("DELETE FROM minutes WHERE end_s < ?", (newest - self._keep_s,))

    def _drop_oldest(self, connection: sqlite3.Connection) -> None:
        """Make room by the oldest tenth."""
        oldest, newest = connection.execute("SELECT min(end_s), max(end_s) FROM minutes").fetchone()
        if oldest is not None:
            edge = oldest + max(60.0, (newest - oldest) / 10)
            cursor = connection.execute("DELETE FROM minutes WHERE end_s < ?", (edge,))
            self.figures.drop("file_full", cursor.rowcount)


def pack(minute: NodeMinute) -> bytes:
    """The bytes of a node's minute: a line of JSON with names and widths, then the matrix."""
    names = {name: len(row) for name, row in minute.objects.items()}
    body = b"".join(np.asarray(row, dtype="<f4").tobytes() for row in minute.objects.values())
    return zlib.compress(json.dumps(names, separators=(",", ":")).encode() + b"\n" + body, level=1)


def unpack(data: bytes) -> dict[str, NDArray[np.float32]]:
    """The objects' rows of a packed minute."""
    head, _, body = zlib.decompress(data).partition(b"\n")
    rows: dict[str, NDArray[np.float32]] = {}
    at = 0
    for name, width in json.loads(head).items():
        rows[name] = np.frombuffer(body, dtype="<f4", count=width, offset=at)
        at += 4 * width
    return rows


def _give_up_reads(batch: list[NodeMinute | _Read | None]) -> None:
    for item in batch:
        if not isinstance(item, _Read) or item.answer.done():
            continue
        if item.answer.running() or item.answer.set_running_or_notify_cancel():
            item.answer.set_result(RolledSeries(ends_s=(), rows=()))
