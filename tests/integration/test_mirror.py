"""The mirror is always some consistent past of the store, whatever happened to the watch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from enova_common.errors import Unavailable
from enova_coordinator.core.liveness import Liveness
from enova_coordinator.core.model import Deployment, DeploymentSpec, Node, NodeState
from enova_coordinator.snapshot import Mirror
from enova_coordinator.store import Compacted, Delete, ModRevisionIs, Put, WatchBatch, codec
from enova_coordinator.store.sqlite import SqliteStore
from enova_testing.waiting import until_async


class InterruptedStore(SqliteStore):
    """A store whose watches break when they are told to."""

    broken_by: Exception | None = None

    async def watch(self, prefix: str, *, after: int) -> AsyncGenerator[WatchBatch, None]:
        async for batch in super().watch(prefix, after=after):
            if self.broken_by is not None:
                broken_by, self.broken_by = self.broken_by, None
                raise broken_by
            yield batch


@pytest.fixture
async def store() -> AsyncIterator[InterruptedStore]:
    made = await InterruptedStore.open(":memory:")
    yield made
    await made.close()


@pytest.fixture
async def mirror(store: InterruptedStore) -> AsyncIterator[Mirror]:
    await put(store, node("first"))
    made = Mirror(store)
    task = asyncio.create_task(made.run())
    await until_async(lambda: "nodes/first" in made.nodes)
    yield made
    task.cancel()
    await asyncio.wait([task])


def node(name: str, cluster: str = "") -> Node:
    return Node(name=f"nodes/{name}", uid=name, cluster=cluster)


async def put(store: InterruptedStore, value: Node | Deployment) -> int:
    key = codec.key(value.name)
    entry = await store.get(key)
    result = await store.transact(
        [ModRevisionIs(key, entry.mod_revision if entry is not None else 0)], [Put(key, codec.encode(value))]
    )
    assert result.succeeded
    return result.revision


async def delete(store: InterruptedStore, name: str) -> int:
    key = codec.key(name)
    entry = await store.get(key)
    assert entry is not None
    return (await store.transact([ModRevisionIs(key, entry.mod_revision)], [Delete(key)])).revision


async def test_it_has_what_was_written_once_it_reached_the_revision(store: InterruptedStore, mirror: Mirror) -> None:
    await mirror.reached(await put(store, node("second")))
    assert sorted(mirror.nodes) == ["nodes/first", "nodes/second"]
    await mirror.reached(await put(store, node("second", "oslo")))
    assert mirror.nodes["nodes/second"].cluster == "oslo"
    await mirror.reached(await delete(store, "nodes/second"))
    assert sorted(mirror.nodes) == ["nodes/first"]
    assert sorted(mirror.revisions) == ["nodes/first"]


@pytest.mark.parametrize("broken_by", [Compacted(1), Unavailable("the store is away")])
async def test_after_a_gap_it_has_everything_and_nothing_that_is_gone(
    store: InterruptedStore, mirror: Mirror, broken_by: Exception
) -> None:
    store.broken_by = broken_by
    await delete(store, "nodes/first")
    revision = await put(store, node("second"))
    async with asyncio.timeout(5.0):
        await mirror.reached(revision)
    assert sorted(mirror.nodes) == ["nodes/second"]


async def test_what_cannot_be_read_is_named_until_it_can(store: InterruptedStore, mirror: Mirror) -> None:
    key = codec.key("deployments/d")
    result = await store.transact([ModRevisionIs(key, 0)], [Put(key, b"garbage")])
    await mirror.reached(result.revision)
    assert list(mirror.unreadable) == ["deployments/d"]
    await mirror.reached(await put(store, Deployment(name="deployments/d", uid="u", spec=DeploymentSpec(model="m"))))
    assert mirror.unreadable == {}
    assert list(mirror.deployments) == ["deployments/d"]


async def test_a_key_that_is_nobody_s_stops_nothing(store: InterruptedStore, mirror: Mirror) -> None:
    key = codec.PREFIX + "nodes/a/b"
    result = await store.transact([ModRevisionIs(key, 0)], [Put(key, b"{}")])
    await mirror.reached(result.revision)
    await mirror.reached(await put(store, node("second")))
    assert sorted(mirror.nodes) == ["nodes/first", "nodes/second"]


async def test_a_node_that_was_just_registered_is_suspect_until_the_next_look(mirror: Mirror) -> None:
    snapshot = mirror.snapshot(Liveness(started_s=0.0), {}, now_s=1.0)
    assert snapshot.nodes["nodes/first"].state is NodeState.SUSPECT
    assert snapshot.revision == mirror.revision
