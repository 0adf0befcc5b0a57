"""The store's objects in memory, kept current by a watch: what snapshots are made of.

Theory of operation. The mirror lists the collections that reconciling needs, all as of one revision, and follows
from there; after a gap (compaction, a store that was away too long) it lists anew. It is always some consistent past.
Who wrote something waits for `reached` before deciding again, so nothing is decided on a world without one's own
writes; who has just become leader waits for its term, so that it has all that earlier leaders wrote.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Mapping
from typing import assert_never

from enova_common.backoff import Backoff
from enova_common.errors import EnovaError, Unavailable
from enova_coordinator.core.calibration import StoredCalibration
from enova_coordinator.core.episode import Episode
from enova_coordinator.core.liveness import Liveness
from enova_coordinator.core.model import (
    Assignment,
    Decision,
    Deployment,
    Node,
    NodeObservation,
    NodeState,
    NodeView,
    Replica,
    RequestRecord,
    Snapshot,
    Stored,
    Variant,
)
from enova_coordinator.store import Changed, Compacted, Entry, Event, Store, codec

COLLECTIONS = ("deployments", "variants", "replicas", "nodes", "assignments")
LIST_ATTEMPTS = 50                 # listings until no write fell between two collections
RETRY = Backoff(initial_s=0.1, maximum_s=2.0, jitter=0.5)

_log = logging.getLogger(__name__)


class Mirror:
    """The objects of `COLLECTIONS` as of `revision`."""

    def __init__(self, store: Store, *, changed: Callable[[], None] = lambda: None) -> None:
        self.revision = 0
        self.deployments: dict[str, Deployment] = {}
        self.variants: dict[str, Variant] = {}
        self.replicas: dict[str, Replica] = {}
        self.nodes: dict[str, Node] = {}
        self.assignments: dict[str, Assignment] = {}
        self.revisions: dict[str, int] = {}
        self.unreadable: dict[str, str] = {}
        """Names of objects that cannot be decoded, with the reason: they and what they own are left alone."""
        self.changed = changed
        """Called after each change."""
        self._store = store
        self._moved = asyncio.Condition()

    async def run(self) -> None:
        """Follow the store until cancelled."""
        attempt = 0
        while True:
            try:
                await self._list()
                attempt = 0
                await self._follow()
            except Compacted:
                continue
            except EnovaError as error:
                _log.warning("cannot follow the store: %s", error)
            await asyncio.sleep(RETRY.delay_s(attempt, random.random()))  # noqa: S311 (jitter is no secret)
            attempt += 1

    async def reached(self, revision: int) -> None:
        """Wait until the mirror is at least as new as a revision that changed a key under the prefix."""
        async with self._moved:
            await self._moved.wait_for(lambda: self.revision >= revision)

    def snapshot(self, liveness: Liveness, observations: Mapping[str, NodeObservation], *, now_s: float) -> Snapshot:
        """Everything as of the mirror's revision, joined with the nodes as they are now (monotonic `now_s`)."""
        views = {
            name: _view(node, liveness, observations.get(name), now_s=now_s)
            for name, node in self.nodes.items()
        }
        return Snapshot(
            revision=self.revision,
            deployments=dict(self.deployments),
            variants=dict(self.variants),
            replicas=dict(self.replicas),
            assignments=dict(self.assignments),
            nodes=views,
            revisions=dict(self.revisions),
            replacement_held=liveness.replacement_held,
            unreadable=frozenset(self.unreadable),
        )

    async def _list(self) -> None:
        for _ in range(LIST_ATTEMPTS):
            listings = [await self._store.range(codec.prefix(collection)) for collection in COLLECTIONS]
            revisions = {revision for _, revision in listings}
            if len(revisions) == 1:
                break
        else:
            raise Unavailable("the store changes too fast to be listed at one revision", reason="STORE_BUSY")
        entries = [entry for found, _ in listings for entry in found]
        listed = {_name(entry.key) for entry in entries}
        for name in {*self.revisions, *self.unreadable} - listed:
            self._drop(name)
        for entry in entries:
            self._keep(entry)
        await self._move(revisions.pop())

    async def _follow(self) -> None:
        async with contextlib.aclosing(self._store.watch(codec.PREFIX, after=self.revision)) as batches:
            async for batch in batches:
                for event in batch.events:
                    self._see(event)
                await self._move(batch.revision)

    async def _move(self, revision: int) -> None:
        self.revision = revision
        async with self._moved:
            self._moved.notify_all()
        self.changed()

    def _see(self, event: Event) -> None:
        if not event.key.startswith(_PREFIXES):
            return
        if isinstance(event, Changed):
            self._keep(event.entry)
        else:
            self._drop(_name(event.key))

    def _keep(self, entry: Entry) -> None:
        name = _name(entry.key)
        try:
            value = codec.decode(entry.value, key=entry.key)
        except EnovaError as error:
            # One object that cannot be read must not blind the leader for all others: it is left alone, and named.
            self.unreadable[name] = str(error)
            _log.error("left alone: %s", error)
            return
        self.unreadable.pop(name, None)
        self.revisions[name] = entry.mod_revision
        self._place(name, value)

    def _drop(self, name: str) -> None:
        self.revisions.pop(name, None)
        self.unreadable.pop(name, None)
        for values in (self.deployments, self.variants, self.replicas, self.nodes, self.assignments):
            values.pop(name, None)

    def _place(self, name: str, value: Stored) -> None:
        match value:
            case Deployment():
                self.deployments[name] = value
            case Variant():
                self.variants[name] = value
            case Replica():
                self.replicas[name] = value
            case Node():
                self.nodes[name] = value
            case Assignment():
                self.assignments[name] = value
            case Decision() | RequestRecord() | StoredCalibration() | Episode():
                _log.error("left alone: a %s lies where %s belongs", type(value).__name__, name)
            case _:
                assert_never(value)


_PREFIXES = tuple(codec.prefix(collection) for collection in COLLECTIONS)


def _name(key: str) -> str:
    try:
        return codec.name(key)
    except ValueError:
        return key                 # nobody's object: it is listed as unreadable under its key


def _view(node: Node, liveness: Liveness, observation: NodeObservation | None, *, now_s: float) -> NodeView:
    known = liveness.nodes.get(node.name)
    report = observation.report if observation is not None and observation.connected else None
    if known is None:
        # Registered since the last look at all nodes: nothing is decided about it before the next.
        return NodeView(node=node, state=NodeState.SUSPECT, reason="it has just been registered", report=report)
    age_s = now_s - known.since_s
    return NodeView(node=node, state=known.state, state_age_s=age_s, reason=known.reason, report=report)
