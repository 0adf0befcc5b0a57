"""The store of a fleet: etcd, over stubs generated from `proto/enova/etcd`.

Theory of operation. Every write is one transaction with its compares. One that failed after it was sent may have
happened; it is sent again only if it cannot happen twice, that is, if it changes a key in a way that fails its
own compare (`_spends_its_compare`). When the second try succeeds, it happened exactly once. When it is refused,
either the first try took effect or somebody else came between: STORE_OUTCOME_UNKNOWN, and the caller reads.
What hangs in a member for longer than that still bears its compares, the leader's term among them.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Self, assert_never

from enova.etcd import rpc_pb2
from enova_common.errors import Exhausted, InvalidField, TimedOut, Unavailable
from enova_coordinator.store import (
    OUTCOME_UNKNOWN,
    Compacted,
    Compare,
    CreateRevisionIs,
    Delete,
    Entry,
    LeaseLost,
    ModRevisionIs,
    Operation,
    Put,
    Revision,
    TransactionResult,
    WatchBatch,
    check_key,
    check_transaction,
    prefix_end,
)
from enova_coordinator.store.etcd.connection import Connection, Member, Metadata
from enova_coordinator.store.etcd.failures import ANSWER_TOO_LARGE
from enova_coordinator.store.etcd.settings import EtcdSettings
from enova_coordinator.store.etcd.watch_stream import entry, watch

__all__ = ["EtcdSettings", "EtcdStore"]

PAGE_ENTRIES = 500
RANGE_ATTEMPTS = 3  # a compaction between two pages makes a range begin again


class EtcdStore:
    """A Store in etcd."""

    def __init__(self, settings: EtcdSettings) -> None:
        """Nothing is connected yet; raises InvalidField for settings that cannot work."""
        self._connection = Connection(settings)

    @classmethod
    async def open(cls, settings: EtcdSettings) -> Self:
        """A store whose etcd has answered once; Unavailable or Denied if it does not."""
        store = cls(settings)
        try:
            await store.get("/enova/v1/meta")
        except BaseException:
            await store.close()
            raise
        return store

    async def get(self, key: str) -> Entry | None:
        """See Store."""
        check_key(key)
        answer = await self._range(rpc_pb2.RangeRequest(key=key.encode()))
        return entry(answer.kvs[0]) if answer.kvs else None

    async def range(self, prefix: str, *, start_after: str = "", limit: int = 0) -> tuple[list[Entry], Revision]:
        """See Store."""
        check_key(prefix, "prefix")
        for attempt in range(RANGE_ATTEMPTS):
            try:
                return await self._pages(prefix, start_after, limit)
            except Compacted:
                if attempt == RANGE_ATTEMPTS - 1:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        """See Store."""
        check_transaction(compares, operations)
        request = rpc_pb2.TxnRequest(
            compare=[_compare(compare) for compare in compares], success=[_operation(op) for op in operations]
        )
        try:
            answer = await self._transact(request)
        except TimedOut:
            if not _spends_its_compare(compares, operations):
                raise
            answer = await self._transact(request)
            if not answer.succeeded:
                text = "etcd did not answer, and when asked again a compare did not hold"
                raise TimedOut(text, reason=OUTCOME_UNKNOWN, remedy="read again, then decide") from None
        except LeaseLost as error:
            raise LeaseLost(next((op.lease for op in operations if isinstance(op, Put) and op.lease), 0)) from error
        return TransactionResult(succeeded=answer.succeeded, revision=answer.header.revision)

    async def watch(self, prefix: str, *, after: Revision) -> AsyncGenerator[WatchBatch, None]:
        """See Store."""
        check_key(prefix, "prefix")
        async with contextlib.aclosing(watch(self._connection, prefix, after)) as batches:
            async for batch in batches:
                yield batch

    async def lease(self, ttl_s: int) -> EtcdLease:
        """See Store; one whose grant was not answered ends by itself."""
        if ttl_s < 1:
            raise InvalidField(f"{ttl_s} is less than a second", field="ttl_s")
        request = rpc_pb2.LeaseGrantRequest(TTL=ttl_s)
        answer = await self._connection.read(
            lambda member, metadata, timeout_s: member.lease.LeaseGrant(request, metadata=metadata, timeout=timeout_s)
        )
        return EtcdLease(self._connection, answer.ID, answer.TTL)

    async def compact(self, revision: Revision) -> None:
        """See Store."""
        request = rpc_pb2.CompactionRequest(revision=revision, physical=True)
        # One that is behind an earlier compaction has happened already.
        with contextlib.suppress(Compacted):
            await self._connection.read(
                lambda member, metadata, timeout_s: member.kv.Compact(request, metadata=metadata, timeout=timeout_s)
            )

    async def close(self) -> None:
        """See Store."""
        await self._connection.close()

    async def _pages(self, prefix: str, start_after: str, limit: int) -> tuple[list[Entry], Revision]:
        start = max(prefix.encode(), start_after.encode() + b"\0" if start_after else b"")
        request = rpc_pb2.RangeRequest(key=start, range_end=prefix_end(prefix).encode())
        entries: list[Entry] = []
        page = PAGE_ENTRIES
        while True:
            request.limit = min(page, limit - len(entries)) if limit else page
            try:
                answer = await self._range(request)
            except Exhausted as error:
                if error.reason != ANSWER_TOO_LARGE or page == 1:
                    raise
                page //= 2
                continue
            entries += [entry(kv) for kv in answer.kvs]
            # All further pages are of the moment of the first.
            request.revision = request.revision or answer.header.revision
            if not answer.more or len(entries) == limit:
                return entries, request.revision
            request.key = answer.kvs[-1].key + b"\0"

    async def _range(self, request: rpc_pb2.RangeRequest) -> rpc_pb2.RangeResponse:
        return await self._connection.read(
            lambda member, metadata, timeout_s: member.kv.Range(request, metadata=metadata, timeout=timeout_s)
        )

    async def _transact(self, request: rpc_pb2.TxnRequest) -> rpc_pb2.TxnResponse:
        return await self._connection.write(
            lambda member, metadata, timeout_s: member.kv.Txn(request, metadata=metadata, timeout=timeout_s)
        )


class EtcdLease:
    """A lease in etcd."""

    def __init__(self, connection: Connection, lease: int, ttl_s: float) -> None:
        self._connection = connection
        self._id = lease
        self._ttl_s = ttl_s

    @property
    def id(self) -> int:
        """See Lease."""
        return self._id

    @property
    def ttl_s(self) -> float:
        """See Lease."""
        return self._ttl_s

    async def keepalive(self) -> None:
        """See Lease; a member that hangs leaves time to ask others before the lease runs out."""
        answer = await self._connection.read(self._renew, attempt_timeout_s=self._ttl_s / 4)
        if answer.TTL <= 0:
            raise LeaseLost(self._id)

    async def revoke(self) -> None:
        """See Lease."""
        request = rpc_pb2.LeaseRevokeRequest(ID=self._id)
        # One that is gone already is what was wanted.
        with contextlib.suppress(LeaseLost):
            await self._connection.read(
                lambda member, metadata, timeout_s: member.lease.LeaseRevoke(
                    request, metadata=metadata, timeout=timeout_s
                )
            )

    async def _renew(self, member: Member, metadata: Metadata, timeout_s: float) -> rpc_pb2.LeaseKeepAliveResponse:
        call = member.lease.LeaseKeepAlive(metadata=metadata, timeout=timeout_s)
        try:
            await call.write(rpc_pb2.LeaseKeepAliveRequest(ID=self._id))
            answer = await call.read()
        finally:
            call.cancel()
        if not isinstance(answer, rpc_pb2.LeaseKeepAliveResponse):
            raise Unavailable(f"etcd at {member.address} ended the keepalive", reason="STORE_UNAVAILABLE")
        return answer


def _spends_its_compare(compares: Sequence[Compare], operations: Sequence[Operation]) -> bool:
    """Whether some operation makes a compare of the same transaction fail from then on."""
    puts = {operation.key for operation in operations if isinstance(operation, Put)}
    deletes = {operation.key for operation in operations if isinstance(operation, Delete)}
    for compare in compares:
        match compare:
            case ModRevisionIs(key, revision):
                spent = key in puts or (key in deletes and revision != 0)
            case CreateRevisionIs(key, revision):
                spent = (key in puts and revision == 0) or (key in deletes and revision != 0)
            case _:
                assert_never(compare)
        if spent:
            return True
    return False


def _compare(compare: Compare) -> rpc_pb2.Compare:
    key = compare.key.encode()
    match compare:
        case ModRevisionIs(_, revision):
            return rpc_pb2.Compare(target=rpc_pb2.Compare.MOD, key=key, mod_revision=revision)
        case CreateRevisionIs(_, revision):
            return rpc_pb2.Compare(target=rpc_pb2.Compare.CREATE, key=key, create_revision=revision)
        case _:
            assert_never(compare)


def _operation(operation: Operation) -> rpc_pb2.RequestOp:
    key = operation.key.encode()
    match operation:
        case Put(_, value, lease):
            return rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=key, value=value, lease=lease))
        case Delete():
            return rpc_pb2.RequestOp(request_delete_range=rpc_pb2.DeleteRangeRequest(key=key))
        case _:
            assert_never(operation)
