"""Watching a collection in the store: first everything, or what changed since a revision, then every change."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from enova_common.errors import InvalidField, TooLarge
from enova_coordinator.core.episode import Episode
from enova_coordinator.core.model import Decision, Deployment, Replica
from enova_coordinator.store import Changed, Compacted, Store, codec

V = TypeVar("V", Deployment, Replica, Decision, Episode)


@dataclass(frozen=True, slots=True)
class Batch(Generic[V]):
    """What changed at one revision."""

    revision: int
    changed: tuple[V, ...] = ()
    deleted: tuple[str, ...] = ()


def check_resume_revision(revision: int, *, remedy: str) -> None:
    """Raises InvalidField for one that no answer can have borne."""
    if revision < 0:
        raise InvalidField(f"{revision} is negative", field="resume_revision", remedy=remedy)


async def watch(store: Store, kind: type[V], prefix: str, *, resume_revision: int) -> AsyncIterator[Batch[V]]:
    """Changes of the objects under a prefix. Raises TooLarge (OUT_OF_RANGE) outside of the history."""
    after = resume_revision
    check_resume_revision(after, remedy="leave it out to get everything")
    entries, newest = await store.range(prefix, limit=1 if after else 0)
    if after > newest:
        raise TooLarge(
            f"revision {after} is still to come; the store is at {newest}",
            reason="RESUME_REVISION_FUTURE",
            field="resume_revision",
            remedy="watch again without it: the first message then holds everything",
            metadata={"newest_revision": str(newest)},
        )
    if not after:
        after = newest
        values = tuple(codec.decode_as(kind, entry.value, key=entry.key) for entry in entries)
        yield Batch(after, values)
    try:
        async with contextlib.aclosing(store.watch(prefix, after=after)) as batches:
            async for batch in batches:
                entries = [event.entry for event in batch.events if isinstance(event, Changed)]
                yield Batch(
                    batch.revision,
                    tuple(codec.decode_as(kind, entry.value, key=entry.key) for entry in entries),
                    tuple(codec.name(event.key) for event in batch.events if not isinstance(event, Changed)),
                )
    except Compacted as error:
        raise TooLarge(
            f"what changed since revision {after} is forgotten (kept from {error.revision} on)",
            reason="RESUME_REVISION_COMPACTED",
            field="resume_revision",
            remedy="watch again without it: the first message then holds everything",
            metadata={"oldest_revision": str(error.revision)},
        ) from error
