"""Writes as one guarded transaction: the leader's guard and every assumed revision are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

from enova_common.errors import EnovaError
from enova_coordinator.core.plan import Delete as DeleteObject
from enova_coordinator.core.plan import Write
from enova_coordinator.store import (
    OUTCOME_UNKNOWN,
    Compare,
    Delete,
    ModRevisionIs,
    Operation,
    Put,
    Store,
    TransactionResult,
    codec,
)


class Term(Protocol):
    """One term of a leader."""

    def end(self, reason: str) -> None:
        """End it here and now."""
        ...


@contextlib.contextmanager
def unknown_ends(term: Term) -> Iterator[None]:
    """A write of unknown outcome ends the term: it may still land, and a new term first reads what is there."""
    try:
        yield
    except EnovaError as error:
        if error.reason == OUTCOME_UNKNOWN:
            term.end(f"the outcome of a write is unknown: {error}")
        raise


async def commit(store: Store, guard: Compare, writes: Sequence[Write]) -> TransactionResult:
    """Do all the writes if the guard and all their revisions hold, else nothing."""
    compares: list[Compare] = [guard]
    operations: list[Operation] = []
    for write in writes:
        key = codec.key(write.name)
        compares.append(ModRevisionIs(key, write.revision))
        if isinstance(write, DeleteObject):
            operations.append(Delete(key))
        else:
            operations.append(Put(key, codec.encode(write.value)))
    return await store.transact(compares, operations)
