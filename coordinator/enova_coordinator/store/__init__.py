"""The store: a small ordered map with revisions, guarded transactions, watches and leases.

Theory of operation. Every change of the store raises one counter, the *revision*. An entry remembers the
revision that created it and the one that changed it last, so "nobody touched it since I read it" is one
number to compare. The only way to write is `transact`: all compares hold and all operations happen, at one
revision, or nothing does. There is no unguarded put: a leader that was paused and a write that was sent twice
are both stopped by a compare. `range` answers from one revision and says which; `watch` goes on from there
without a gap. What a watcher can no longer be told (its revision was compacted away) is an error that says so,
never silence: list again and watch from there.

`enova_coordinator.store.sqlite` and `enova_coordinator.store.etcd` implement it; tests/contract/test_store.py
is what both promise.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from enova_common.errors import Conflict, InvalidField, TooLarge

Revision: TypeAlias = int
"""A point in the store's history; 0 is before everything."""

MAX_OPERATIONS = 128  # etcd's --max-txn-ops, which holds for compares and for operations each
MAX_TRANSACTION_BYTES = 1 << 20  # etcd refuses a request over 1.5 MiB: the rest is room for keys and framing
MAX_KEY_BYTES = 1024

NO_SPACE = "STORE_NO_SPACE"
"""The reason of `Exhausted` when the store takes no more puts and grants no leases.

Reads go on, and leases are kept alive, revoked and expire; etcd 3.5.1 refuses transactions that only delete, too.
"""

OUTCOME_UNKNOWN = "STORE_OUTCOME_UNKNOWN"
"""The reason of `TimedOut` when a transaction may or may not have happened: read again, then decide."""


class Compacted(Conflict):
    """The history that was asked for is gone: list again and watch from the revision of that list."""

    reason = "STORE_COMPACTED"

    def __init__(self, revision: Revision) -> None:
        text = f"the store's history before revision {revision} is gone"
        super().__init__(text, remedy="list again and watch from that revision")
        self.revision = revision


class LeaseLost(Conflict):
    """The lease expired or was revoked, and the entries under it are deleted or about to be."""

    reason = "STORE_LEASE_LOST"

    def __init__(self, lease: int) -> None:
        super().__init__(f"lease {lease:x} does not exist (any more)")
        self.lease = lease


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A key with its value, as it was at some revision."""

    key: str
    value: bytes
    create_revision: Revision
    mod_revision: Revision
    lease: int = 0


@dataclass(frozen=True, slots=True)
class ModRevisionIs:
    """The key was last changed at `revision`; 0: it does not exist."""

    key: str
    revision: Revision


@dataclass(frozen=True, slots=True)
class CreateRevisionIs:
    """The key was created at `revision`, and not deleted since; 0: it does not exist."""

    key: str
    revision: Revision


Compare: TypeAlias = ModRevisionIs | CreateRevisionIs


@dataclass(frozen=True, slots=True)
class Put:
    """Set the key to the value; with a lease the entry ends when the lease does."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete the key; one that does not exist is no error."""

    key: str


Operation: TypeAlias = Put | Delete


@dataclass(frozen=True, slots=True)
class TransactionResult:
    """Whether all compares held (and so all operations happened), and the store's revision afterwards.

    The entries that a successful transaction put have this revision as their `mod_revision`.
    """

    succeeded: bool
    revision: Revision


@dataclass(frozen=True, slots=True)
class Changed:
    """A key was put; the entry as it is now."""

    entry: Entry

    @property
    def key(self) -> str:
        """The key that was put."""
        return self.entry.key


@dataclass(frozen=True, slots=True)
class Deleted:
    """A key was deleted, by a transaction or because its lease ended."""

    key: str
    mod_revision: Revision


Event: TypeAlias = Changed | Deleted


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """All events of one revision under the watched prefix: never empty, never split."""

    revision: Revision
    events: tuple[Event, ...]


class Lease(Protocol):
    """A promise to be alive: unless renewed within `ttl_s`, the entries under it are deleted."""

    @property
    def id(self) -> int:
        """What `Put.lease` takes; never 0."""
        ...

    @property
    def ttl_s(self) -> float:
        """What was granted, which may be more than what was asked for."""
        ...

    async def keepalive(self) -> None:
        """Start the time anew; raises LeaseLost if it ran out, RetryableError if nobody answered."""
        ...

    async def revoke(self) -> None:
        """End it now and delete its entries; one that is gone already is no error."""
        ...


class Store(Protocol):
    """The only door to what the coordinators remember together.

    All calls may raise `Unavailable` or `TimedOut` (the store is away: nothing is wrong with the call),
    `Exhausted` with reason STORE_NO_SPACE, `Denied`, and `Corrupt`.
    """

    async def get(self, key: str) -> Entry | None:
        """The entry as it is now: no older than any write that was acknowledged before the call."""
        ...

    async def range(self, prefix: str, *, start_after: str = "", limit: int = 0) -> tuple[list[Entry], Revision]:
        """Entries under the prefix in the order of keys, all as of the one revision that is returned with them.

        `limit` (0: all) with `start_after` (a key) makes pages; each page then has its own revision.
        """
        ...

    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        """If all compares hold do all operations at one new revision, else nothing.

        At least one compare, at most 128 of each, no key twice among the operations. A lease that is gone
        raises LeaseLost. `TimedOut` with reason STORE_OUTCOME_UNKNOWN means it may have happened.
        """
        ...

    def watch(self, prefix: str, *, after: Revision) -> AsyncGenerator[WatchBatch, None]:
        """Every change under the prefix with a revision greater than `after`, in order, until it is closed.

        While the store is away it waits and resumes by itself. Raises `Compacted` when history is missing.
        Close it with `contextlib.aclosing`.
        """
        ...

    async def lease(self, ttl_s: int) -> Lease:
        """A new lease."""
        ...

    async def compact(self, revision: Revision) -> None:
        """Forget history before `revision`: the present stays, watches from earlier get `Compacted`."""
        ...

    async def close(self) -> None:
        """Let go of the file or the connections; watches end."""
        ...


def check_key(key: str, field: str = "key") -> None:
    """Refuse a key (or prefix) that is empty, over 1 KiB, or not printable ASCII without spaces."""
    if not key or len(key) > MAX_KEY_BYTES or not all("!" <= character <= "~" for character in key):
        raise InvalidField(f"not a key of 1 to {MAX_KEY_BYTES} printable ASCII characters: {key[:80]!r}", field=field)


def check_transaction(compares: Sequence[Compare], operations: Sequence[Operation]) -> None:
    """Refuse what no store may take: unguarded writes, doubled keys, anything over a bound."""
    if not compares:
        raise InvalidField("a transaction without a compare is an unguarded write", field="compares")
    if not operations:
        raise InvalidField("a transaction without an operation", field="operations")
    for name, parts in (("compares", compares), ("operations", operations)):
        if len(parts) > MAX_OPERATIONS:
            raise TooLarge(f"{len(parts)} in one transaction, at most {MAX_OPERATIONS}", field=name)
    keys = [operation.key for operation in operations]
    for key in (*keys, *(compare.key for compare in compares)):
        check_key(key)
    if len(set(keys)) < len(keys):
        raise InvalidField("a key twice in one transaction", field="operations")
    size_bytes = _size_bytes(operations)
    if size_bytes > MAX_TRANSACTION_BYTES:
        raise TooLarge(f"{size_bytes} bytes in one transaction, at most {MAX_TRANSACTION_BYTES}", field="operations")


def prefix_end(prefix: str) -> str:
    """The first key after all that begin with the prefix (keys are ASCII, so the next character exists)."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


def _size_bytes(operations: Iterable[Operation]) -> int:
    return sum(len(op.key) + (len(op.value) if isinstance(op, Put) else 0) for op in operations)
