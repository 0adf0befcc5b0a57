"""What checks of a store are made of: writes whatever was there, errors that are expected, watches that collect."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from enova_coordinator.store import Changed, Delete, ModRevisionIs, Put, Revision, Store, WatchBatch

_E = TypeVar("_E", bound=Exception)


async def put(store: Store, key: str, value: bytes = b"", lease: int = 0) -> Revision:
    """Put whatever was there before; the revision."""
    entry = await store.get(key)
    result = await store.transact([ModRevisionIs(key, entry.mod_revision if entry else 0)], [Put(key, value, lease)])
    assert result.succeeded, "nobody else writes this key"
    return result.revision


async def delete(store: Store, key: str) -> Revision:
    """Delete what is there; the revision."""
    entry = await store.get(key)
    assert entry is not None
    result = await store.transact([ModRevisionIs(key, entry.mod_revision)], [Delete(key)])
    assert result.succeeded, "nobody else writes this key"
    return result.revision


async def refused(call: Awaitable[object], kind: type[_E]) -> _E:
    """The error of the kind that the call must raise."""
    try:
        answer = await call
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}: {answer!r}")


@dataclass
class Watched:
    """What a watch has told so far, and the error that ended it."""

    batches: list[WatchBatch] = field(default_factory=list)
    error: Exception | None = None

    def told(self) -> list[tuple[Revision, str, bytes | None]]:
        """(revision, key, value or None for deleted), in the order told."""
        return [
            (batch.revision, event.key, event.entry.value if isinstance(event, Changed) else None)
            for batch in self.batches
            for event in batch.events
        ]

    async def until(self, condition: Callable[[], object], patience_s: float, what: str) -> None:
        """Wait until it holds; fail with what was told."""
        try:
            async with asyncio.timeout(patience_s):
                while not condition():
                    if self.error is not None:
                        raise AssertionError(f"the watch ended: {self.error!r}") from self.error
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"never told: {what}; told at last: {self.told()[-10:]}") from None

    async def until_error(self, patience_s: float) -> None:
        """Wait until the watch ended with an error."""
        try:
            async with asyncio.timeout(patience_s):
                while self.error is None:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"the watch goes on; told: {self.told()}") from None

    async def until_key(self, key: str, patience_s: float) -> None:
        """Wait until the key was mentioned."""
        await self.until(lambda: key in {told[1] for told in self.told()}, patience_s, key)


@contextlib.asynccontextmanager
async def watched(store: Store, prefix: str, after: Revision) -> AsyncIterator[Watched]:
    """A watch that collects in the background."""
    result = Watched()

    async def collect() -> None:
        try:
            async with contextlib.aclosing(store.watch(prefix, after=after)) as batches:
                async for batch in batches:
                    result.batches.append(batch)
        except Exception as error:  # noqa: BLE001 (whatever it is, the check wants to see it)
            result.error = error

    task = asyncio.create_task(collect())
    try:
        yield result
    finally:
        task.cancel()
        await asyncio.wait([task])


async def gone(store: Store, key: str, patience_s: float) -> None:
    """Wait until the key does not exist."""
    try:
        async with asyncio.timeout(patience_s):
            while await store.get(key) is not None:
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"still there: {key}") from None
