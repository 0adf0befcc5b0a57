"""The real coordinator program, with a stop between decision and effect, and each write signed by who made it.

`python -m enova_testing.stoppable_coordinator --config FILE` is `enova-coordinator` with two seams taken: its store is
wrapped, and so are the streams to its agents. An order in the file $ENOVA_TEST_ORDER makes the process stop itself
(SIGSTOP) right before the next write that bears the leader's guard, or right before the next message that an agent
would obey is handed to gRPC: after every check, with nothing left but the effect. Every transaction also puts
`SIGNATURE_KEY`, so that etcd's own history says who wrote each revision, and in which term. With
$ENOVA_TEST_UNGUARDED the leader's guard is taken out of each write: that is how a test shows that it can fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import enova_coordinator.__main__ as program
from enova.v1 import agent_service_pb2
from enova_common.errors import EnovaError
from enova_coordinator.coordinator import open_store
from enova_coordinator.election import LEADER_KEY
from enova_coordinator.service import register
from enova_coordinator.service.agent import AgentService
from enova_coordinator.settings import CoordinatorSettings
from enova_coordinator.store import (
    Compare,
    CreateRevisionIs,
    Entry,
    Lease,
    Operation,
    Put,
    Revision,
    Store,
    TransactionResult,
    WatchBatch,
)

ORDER_VARIABLE = "ENOVA_TEST_ORDER"
UNGUARDED_VARIABLE = "ENOVA_TEST_UNGUARDED"
SIGNATURE_KEY = "/enova/test/signature"
OBEYED = ("assignment", "routes")  # what an agent acts on


class StopOrder:
    """The order file: read at each point, obeyed once, and answered in a file beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reports = path.with_suffix(".reports")

    def obey(self, point: str, subject: str) -> dict[str, Any] | None:
        """Stop here if that was ordered; the order, after somebody let the process go on."""
        try:
            order: dict[str, Any] = json.loads(self._path.read_text())
        except FileNotFoundError:
            return None
        if order["point"] != point or order["subject"] not in subject:
            return None
        if order["skip"]:
            self._path.write_text(json.dumps(order | {"skip": order["skip"] - 1}))
            return None
        self._path.unlink()
        self.report(order, event="stopping", what=subject)
        os.kill(os.getpid(), signal.SIGSTOP)
        return order

    def report(self, order: dict[str, Any], **values: object) -> None:
        """Say what became of an order."""
        with self._reports.open("a") as file:
            file.write(json.dumps(order | values) + "\n")


class SignedStore:
    """A Store that passes everything on to the real one."""

    def __init__(self, store: Store, order: StopOrder, *, name: str, guarded: bool) -> None:
        self._store = store
        self._order = order
        self._name = name
        self._guarded = guarded

    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        """Sign it; before one of the leader's, stop if that was ordered."""
        term = next((c.revision for c in compares if isinstance(c, CreateRevisionIs) and c.key == LEADER_KEY), 0)
        signature = json.dumps({"coordinator": self._name, "term": term}).encode()
        if not self._guarded and term:
            compares = [c for c in compares if c != CreateRevisionIs(LEADER_KEY, term)]
        order = self._order.obey("write", " ".join(operation.key for operation in operations)) if term else None
        try:
            result = await self._store.transact(compares, [*operations, Put(SIGNATURE_KEY, signature)])
        except (EnovaError, asyncio.CancelledError) as error:
            if order is not None:
                self._order.report(order, event="wrote", succeeded=False, error=repr(error))
            raise
        if order is not None:
            self._order.report(order, event="wrote", succeeded=result.succeeded, term=term)
        return result

    async def get(self, key: str) -> Entry | None:
        return await self._store.get(key)

    async def range(self, prefix: str, *, start_after: str = "", limit: int = 0) -> tuple[list[Entry], Revision]:
        return await self._store.range(prefix, start_after=start_after, limit=limit)

    def watch(self, prefix: str, *, after: Revision) -> AsyncGenerator[WatchBatch, None]:
        return self._store.watch(prefix, after=after)

    async def lease(self, ttl_s: int) -> Lease:
        return await self._store.lease(ttl_s)

    async def compact(self, revision: Revision) -> None:
        await self._store.compact(revision)

    async def close(self) -> None:
        await self._store.close()


def stoppable_service(order: StopOrder) -> type[AgentService]:
    """The AgentService, with a stop between what it yields and gRPC."""

    class StoppableAgentService(AgentService):
        async def Connect(  # noqa: N802  the name of the method in the proto
            self, request_iterator: AsyncIterator[agent_service_pb2.ConnectRequest], context: Any
        ) -> AsyncIterator[agent_service_pb2.ConnectResponse]:
            stream = super().Connect(request_iterator, context)
            assert isinstance(stream, AsyncGenerator)
            async with contextlib.aclosing(stream) as messages:
                async for message in messages:
                    kind = message.WhichOneof("message") or ""
                    if kind in OBEYED and (done := order.obey("send", kind)) is not None:
                        order.report(done, event="sent", term=message.term)
                    yield message

    return StoppableAgentService


def main() -> None:
    """`enova-coordinator`, stoppable."""
    order = StopOrder(Path(os.environ[ORDER_VARIABLE]))

    async def signed(settings: CoordinatorSettings) -> Store:
        guarded = UNGUARDED_VARIABLE not in os.environ
        return SignedStore(await open_store(settings), order, name=settings.name, guarded=guarded)

    vars(program)["open_store"] = signed
    vars(register)["AgentService"] = stoppable_service(order)
    program.main()


if __name__ == "__main__":
    main()
