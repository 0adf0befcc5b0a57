"""Writes as one guarded transaction: the leader's guard and every assumed revision are compared."""

from __future__ import annotations

from collections.abc import Sequence

from enova_coordinator.core.plan import Delete as DeleteObject
from enova_coordinator.core.plan import Write
from enova_coordinator.store import Compare, Delete, ModRevisionIs, Operation, Put, Store, TransactionResult, codec


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
