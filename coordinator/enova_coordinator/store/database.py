"""The SQLite file behind the embedded store: schema, transactions and history; synchronous, one thread at a time.

`entries` is the present. `history` is what happened to each key at each revision, kept for watchers and bounded
in revisions and bytes; `meta.compacted` is the oldest revision that it still tells in full. A SQLite
transaction is one revision, or nothing: with WAL and `synchronous=FULL` it is on the disk when it is acknowledged.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import TypeAlias, assert_never

from enova_common.errors import Corrupt, EnovaError, Exhausted, FatalError, InvalidField, Unavailable
from enova_coordinator.store import (
    NO_SPACE,
    Changed,
    Compacted,
    Compare,
    CreateRevisionIs,
    Delete,
    Deleted,
    Entry,
    Event,
    LeaseLost,
    ModRevisionIs,
    Operation,
    Put,
    Revision,
    TransactionResult,
    WatchBatch,
    prefix_end,
)

FORMAT_VERSION = 1
APPLICATION_ID = 0x656E6F76  # "enov": tells `file` and us that the file is ours
BATCH_REVISIONS = 64  # revisions that one read of history takes
TRIM_AFTER_REVISIONS = 500  # history is trimmed by this many at a time
TRIM_AFTER_BYTES = 8 << 20
RESERVE_BYTES = 4 << 20  # beyond the bound on puts, so that a full store still takes deletes and ends leases

SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE entries (
  key TEXT PRIMARY KEY, value BLOB NOT NULL,
  create_revision INTEGER NOT NULL, mod_revision INTEGER NOT NULL, lease INTEGER NOT NULL
);
CREATE INDEX entries_by_lease ON entries (lease) WHERE lease != 0;
CREATE TABLE history (
  revision INTEGER NOT NULL, key TEXT NOT NULL, value BLOB,
  create_revision INTEGER NOT NULL, lease INTEGER NOT NULL, PRIMARY KEY (revision, key)
);
CREATE TABLE leases (id INTEGER PRIMARY KEY, ttl_s INTEGER NOT NULL);
INSERT INTO meta VALUES ('revision', 1), ('compacted', 0), ('last_lease', 0);
"""

_Row: TypeAlias = tuple[str, bytes, int, int, int]
_ENTRY = "key, value, create_revision, mod_revision, lease"
_PRIMARY_CODE = 0xFF  # extended result codes carry the primary one in the low byte


class Database:
    """One open file (or `:memory:`); all methods but `close` raise errors of `enova_common.errors`."""

    def __init__(self, path: str, *, history_revisions: int, history_bytes: int, max_bytes: int) -> None:
        self._history_revisions = history_revisions
        self._history_bytes = history_bytes
        self._untrimmed_bytes = 0
        self._path = path
        with self._errors():
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            with self._errors():
                self._prepare(max_bytes)
        except EnovaError:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the file; what was acknowledged is on the disk already."""
        self._connection.close()

    def revision(self) -> Revision:
        """The newest revision."""
        with self._errors():
            return self._meta("revision")

    def leases(self) -> dict[int, int]:
        """The leases that exist, with their time to live in seconds."""
        with self._errors():
            return dict(self._connection.execute("SELECT id, ttl_s FROM leases"))

    def get(self, key: str) -> Entry | None:
        """The entry of the key."""
        with self._errors():
            row = self._connection.execute(f"SELECT {_ENTRY} FROM entries WHERE key = ?", (key,)).fetchone()  # noqa: S608 (a constant)
        return None if row is None else _entry(row)

    def range(self, prefix: str, start_after: str, limit: int) -> tuple[list[Entry], Revision]:
        """Entries under the prefix, and the revision: alone on the connection, so both are of one moment."""
        query = f"SELECT {_ENTRY} FROM entries WHERE key >= ? AND key < ? AND key > ? ORDER BY key LIMIT ?"  # noqa: S608
        with self._errors():
            rows = self._connection.execute(query, (prefix, prefix_end(prefix), start_after, limit or -1)).fetchall()
            return [_entry(row) for row in rows], self._meta("revision")

    def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        """All operations at one revision if all compares hold."""
        puts = any(isinstance(operation, Put) for operation in operations)
        if puts and self._is_full():
            self._give_up_history()
        with self._transaction():
            revision = self._meta("revision")
            if not all(self._holds(compare) for compare in compares):
                return TransactionResult(succeeded=False, revision=revision)
            if puts and self._is_full():
                raise self._no_space()
            changed = [self._apply(operation, revision + 1) for operation in operations]
            if any(changed):
                revision += 1
                self._set_meta("revision", revision)
                self._trim(revision)
            return TransactionResult(succeeded=True, revision=revision)

    def changes(self, prefix: str, after: Revision) -> tuple[list[WatchBatch], Revision]:
        """The next batches of history under the prefix, and the revision up to which that is all."""
        bounds = (after, prefix, prefix_end(prefix))
        with self._errors():
            newest, compacted = self._meta("revision"), self._meta("compacted")
            if after + 1 < compacted:
                raise Compacted(compacted)
            query = (
                "SELECT DISTINCT revision FROM history"
                " WHERE revision > ? AND key >= ? AND key < ? ORDER BY revision LIMIT ?"
            )
            revisions = [int(row[0]) for row in self._connection.execute(query, (*bounds, BATCH_REVISIONS))]
            if not revisions:
                return [], max(newest, after)
            query = (
                "SELECT key, value, create_revision, revision, lease FROM history"
                " WHERE revision > ? AND key >= ? AND key < ? AND revision <= ? ORDER BY revision, rowid"
            )
            rows = self._connection.execute(query, (*bounds, revisions[-1])).fetchall()
        batches = [
            WatchBatch(revision, tuple(_event(row) for row in group))
            for revision, group in groupby(rows, key=itemgetter(3))
        ]
        return batches, revisions[-1] if len(revisions) == BATCH_REVISIONS else max(newest, after)

    def grant(self, ttl_s: int) -> int:
        """A new lease's number."""
        with self._transaction():
            if self._is_full():
                raise self._no_space()
            lease = self._meta("last_lease") + 1
            self._set_meta("last_lease", lease)
            self._connection.execute("INSERT INTO leases VALUES (?, ?)", (lease, ttl_s))
            return lease

    def end_lease(self, lease: int) -> None:
        """Delete the lease and, at one revision, all entries under it."""
        with self._transaction():
            revision = self._meta("revision") + 1
            keys = self._connection.execute("SELECT key FROM entries WHERE lease = ?", (lease,)).fetchall()
            for (key,) in keys:
                self._apply(Delete(key), revision)
            if keys:
                self._set_meta("revision", revision)
            self._connection.execute("DELETE FROM leases WHERE id = ?", (lease,))

    def compact(self, revision: Revision) -> None:
        """Forget history before the revision."""
        with self._transaction():
            newest = self._meta("revision")
            if revision > newest:
                raise InvalidField(f"{revision} is in the future: the store is at {newest}", field="revision")
            self._forget_before(max(revision, self._meta("compacted")))

    # -- inside a transaction -----------------------------------------------------------------------------------

    def _holds(self, compare: Compare) -> bool:
        query = "SELECT create_revision, mod_revision FROM entries WHERE key = ?"
        created, modified = self._connection.execute(query, (compare.key,)).fetchone() or (0, 0)
        match compare:
            case ModRevisionIs(_, revision):
                return bool(modified == revision)
            case CreateRevisionIs(_, revision):
                return bool(created == revision)
            case _:
                assert_never(compare)

    def _apply(self, operation: Operation, revision: Revision) -> bool:
        query = "SELECT create_revision FROM entries WHERE key = ?"
        found = self._connection.execute(query, (operation.key,)).fetchone()
        match operation:
            case Put(key, value, lease):
                if lease and not self._lease_exists(lease):
                    raise LeaseLost(lease)
                created = revision if found is None else int(found[0])
                self._connection.execute(
                    "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?)", (key, value, created, revision, lease)
                )
                self._remember(revision, key, value, created, lease)
            case Delete(key):
                if found is None:
                    return False
                self._connection.execute("DELETE FROM entries WHERE key = ?", (key,))
                self._remember(revision, key, None, 0, 0)
            case _:
                assert_never(operation)
        return True

    def _lease_exists(self, lease: int) -> bool:
        return self._connection.execute("SELECT 1 FROM leases WHERE id = ?", (lease,)).fetchone() is not None

    def _is_full(self) -> bool:
        with self._errors():
            pages = int(self._connection.execute("PRAGMA page_count").fetchone()[0])
            free = int(self._connection.execute("PRAGMA freelist_count").fetchone()[0])
        return pages - free >= self._max_pages

    def _give_up_history(self) -> None:
        # Watchers that are behind list again; that is better than to refuse a write.
        with self._transaction():
            self._forget_before(self._meta("revision"))

    def _remember(self, revision: Revision, key: str, value: bytes | None, created: Revision, lease: int) -> None:
        self._connection.execute("INSERT INTO history VALUES (?, ?, ?, ?, ?)", (revision, key, value, created, lease))
        self._untrimmed_bytes += len(value or b"")

    def _trim(self, newest: Revision) -> None:
        oldest = newest - self._history_revisions
        if self._untrimmed_bytes >= TRIM_AFTER_BYTES:
            self._untrimmed_bytes = 0
            oldest = max(oldest, self._oldest_within_bytes())
        elif newest % TRIM_AFTER_REVISIONS:
            return
        if oldest > self._meta("compacted"):
            self._forget_before(oldest)

    def _oldest_within_bytes(self) -> Revision:
        left = self._history_bytes
        query = "SELECT revision, coalesce(length(value), 0) FROM history ORDER BY revision DESC"
        for revision, size_bytes in self._connection.execute(query):
            left -= size_bytes
            if left < 0:
                return int(revision) + 1
        return 0

    def _forget_before(self, revision: Revision) -> None:
        self._connection.execute("DELETE FROM history WHERE revision < ?", (revision,))
        self._set_meta("compacted", revision)

    def _meta(self, name: str) -> int:
        row = self._connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return int(row[0])

    def _set_meta(self, name: str, value: int) -> None:
        self._connection.execute("UPDATE meta SET value = ? WHERE name = ?", (value, name))

    # -- opening, and errors ------------------------------------------------------------------------------------

    def _prepare(self, max_bytes: int) -> None:
        connection = self._connection
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        page_bytes = int(connection.execute("PRAGMA page_size").fetchone()[0])
        self._max_pages = max(1, max_bytes // page_bytes)
        reserve_pages = max(RESERVE_BYTES // page_bytes, self._max_pages // 8)
        connection.execute(f"PRAGMA max_page_count = {self._max_pages + reserve_pages}")
        application = int(connection.execute("PRAGMA application_id").fetchone()[0])
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if (application, version) == (0, 0) and not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            connection.executescript(
                f"BEGIN IMMEDIATE; {SCHEMA}"
                f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT_VERSION}; COMMIT;"
            )
        elif application != APPLICATION_ID:
            text = f"{self._path} is a SQLite file of another program"
            raise InvalidField(text, field="path", remedy="choose another file")
        elif version != FORMAT_VERSION:
            text = f"{self._path} has format {version}, this program knows {FORMAT_VERSION}"
            raise FatalError(text, reason="STORE_FORMAT", remedy="run the version of enova that wrote it")
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise self._corrupt(str(verdict))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # A failed statement may have rolled back already (a full disk does).
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._translated(error) from error

    def _translated(self, error: sqlite3.Error) -> EnovaError:
        match getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & _PRIMARY_CODE:
            case sqlite3.SQLITE_FULL:
                return self._no_space()
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                return self._corrupt(str(error))
            case sqlite3.SQLITE_IOERR | sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
                return Unavailable(f"the store {self._path} cannot be used now: {error}", remedy="see its disk")
            case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH:
                remedy = "make the folder, and let the coordinator's user write there"
                return InvalidField(f"cannot open {self._path}: {error}", field="path", remedy=remedy)
            case _:
                return FatalError(f"the store {self._path}: {error}")

    def _no_space(self) -> Exhausted:
        remedy = "free space on the disk, or raise the store's max_bytes"
        return Exhausted(f"no space for the store {self._path}", reason=NO_SPACE, remedy=remedy)

    def _corrupt(self, detail: str) -> Corrupt:
        remedy = "restore a backup, or move the file away to start empty: agents keep their engines"
        return Corrupt(f"the store {self._path} is damaged: {detail}", reason="STORE_CORRUPT", remedy=remedy)


def _entry(row: _Row) -> Entry:
    key, value, created, modified, lease = row
    return Entry(key=key, value=value, create_revision=created, mod_revision=modified, lease=lease)


def _event(row: tuple[str, bytes | None, int, int, int]) -> Event:
    key, value, created, revision, lease = row
    if value is None:
        return Deleted(key, revision)
    return Changed(Entry(key=key, value=value, create_revision=created, mod_revision=revision, lease=lease))
