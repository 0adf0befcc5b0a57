"""A coordinator reduced to its election and its writes, as a process that can stop itself where it hurts most.

Run with one JSON argument. While it leads it writes, again and again, one key under its guard and one without.
It reports what happens as JSON lines on stdout and takes orders as JSON lines on stdin:
`{"trial": 7, "point": "decided"}` makes it stop itself (SIGSTOP) between the decision and the write,
`"sending"` just after the write was begun. It ends when stdin does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys

from enova_common.errors import TimedOut
from enova_coordinator.election import Election, Leadership
from enova_coordinator.store import Compare, ModRevisionIs, Put
from enova_coordinator.store.etcd import EtcdSettings, EtcdStore

PERIOD_S = 0.05
LOOP_TURNS_INTO_A_WRITE = 8  # far enough for the request to be on its way, or nearly


class Candidate:
    """One candidate and its two keys, which nobody else writes: only the guard can stop its writes."""

    def __init__(self, store: EtcdStore, name: str, prefix: str, ttl_s: int) -> None:
        self.orders: asyncio.Queue[dict[str, object]] = asyncio.Queue()
        self._store = store
        self._fenced = f"{prefix}fenced/{name}"
        self._unfenced = f"{prefix}unfenced/{name}"
        self.election = Election(
            store, coordinator_id=name, api_address=f"{name}:1", key=f"{prefix}leader", ttl_s=ttl_s
        )

    async def serve(self, leadership: Leadership) -> None:
        """Write until the term ends."""
        report("leading", term=leadership.term)
        try:
            while True:
                order: dict[str, object] = {}
                with contextlib.suppress(TimeoutError):
                    order = await asyncio.wait_for(self.orders.get(), PERIOD_S)
                await self._act(leadership, order)
        finally:
            report("ended", term=leadership.term)

    async def _act(self, leadership: Leadership, order: dict[str, object]) -> None:
        compares = [await self._unchanged(self._fenced), await self._unchanged(self._unfenced)]
        if not leadership.is_leading():
            return
        if order.get("point") == "decided":
            stop_here(order)
        # What is on the wire is not called back when the leadership ends: the write outlives this task.
        write = asyncio.create_task(self._write(leadership, order, *compares))
        if order.get("point") == "sending":
            for _ in range(LOOP_TURNS_INTO_A_WRITE):
                await asyncio.sleep(0)
            stop_here(order)
        await asyncio.shield(write)

    async def _write(
        self, leadership: Leadership, order: dict[str, object], fenced: Compare, unfenced: Compare
    ) -> None:
        value = json.dumps({"term": leadership.term, "trial": order.get("trial")}).encode()
        fenced_landed = await self._landed([leadership.guard(), fenced], self._fenced, value)
        unfenced_landed = await self._landed([unfenced], self._unfenced, value)
        if order:
            report("wrote", **order, fenced=fenced_landed, unfenced=unfenced_landed)

    async def _landed(self, compares: list[Compare], key: str, value: bytes) -> bool | None:
        try:
            return (await self._store.transact(compares, [Put(key, value)])).succeeded
        except TimedOut:
            return None  # stopped after it was sent: the answer came when its time was over

    async def _unchanged(self, key: str) -> Compare:
        entry = await self._store.get(key)
        return ModRevisionIs(key, entry.mod_revision if entry else 0)


def stop_here(order: dict[str, object]) -> None:
    """Stop the whole process until somebody sends SIGCONT."""
    report("stopping", **order)
    os.kill(os.getpid(), signal.SIGSTOP)


def report(event: str, **values: object) -> None:
    """One JSON line for the test."""
    print(json.dumps({"event": event, **values}), flush=True)


async def main(name: str, prefix: str, endpoint: str, ttl_s: int) -> None:
    """Stand for election until stdin ends."""
    store = await EtcdStore.open(EtcdSettings(endpoints=(endpoint,)))
    candidate = Candidate(store, name, prefix, ttl_s)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    report("standing")
    running = asyncio.create_task(candidate.election.run(candidate.serve))
    while line := await reader.readline():
        candidate.orders.put_nowait(json.loads(line))
    running.cancel()
    await asyncio.wait([running])
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
