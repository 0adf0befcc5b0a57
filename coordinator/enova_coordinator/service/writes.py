"""Users' changes: read, edit, write under the revision that was read, the leader's guard, and a request's id.

A request that carries a `request_id` is done once: its record is written in the same transaction as its change, is
kept for a day, and answers a repetition with what the first one made.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from enova_common.errors import Conflict, InvalidField, NotFound
from enova_coordinator.core.episode import Episode
from enova_coordinator.core.model import Deployment, Node, Replica, RequestRecord
from enova_coordinator.service.leading import Chair, Leading
from enova_coordinator.store import Compare, Delete, ModRevisionIs, Operation, Put, Store, codec
from enova_coordinator.store.changes import unknown_ends

ATTEMPTS_MAX = 10                  # the leader writes beside users; each attempt reads anew
SEEN_POLL_S = 0.005
SEEN_POLLS_MAX = 200               # a second
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

V = TypeVar("V", Deployment, Node, Replica, Episode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request as it may be repeated. An empty id is never a repetition."""

    id: str
    method: str
    fingerprint: str

    @property
    def record_name(self) -> str:
        """The name of its record."""
        return f"requests/{self.id}"


def call(method: str, request: Message) -> Call:
    """The call that a request is. Raises InvalidField for an id that cannot be one."""
    request_id: str = getattr(request, "request_id", "")
    if request_id and not _REQUEST_ID.fullmatch(request_id):
        raise InvalidField(f"{request_id[:80]!r} is not an id", field="request_id", remedy="give a UUID")
    digest = hashlib.sha256(request.SerializeToString(deterministic=True)).hexdigest()
    return Call(id=request_id, method=method, fingerprint=digest)


class Writes:
    """The door through which users' changes reach the store. `now_s` is the wall clock."""

    def __init__(self, store: Store, chair: Chair, *, now_s: Callable[[], float]) -> None:
        self._store = store
        self._chair = chair
        self._now_s = now_s

    async def read(self, kind: type[V], name: str, *, field: str = "name") -> V:
        """The stored object. Raises NotFound."""
        value, _ = await self._read(kind, name)
        if value is None:
            remedy = f"enova get {kind.__name__.lower()}s lists what there is"
            raise NotFound(f"there is no {name}", field=field, remedy=remedy, metadata={"name": name})
        return value

    async def repeated(self, done: Call) -> str | None:
        """The name of what this very call made before; None if it is new. Raises Conflict for a reused id."""
        if not done.id:
            return None
        entry = await self._store.get(codec.key(done.record_name))
        if entry is None:
            return None
        record = codec.decode_as(RequestRecord, entry.value, key=entry.key)
        if (record.method, record.fingerprint) != (done.method, done.fingerprint):
            raise Conflict(
                "this request_id was used for another request",
                reason="REQUEST_ID_REUSED",
                field="request_id",
                remedy="draw a new UUID for each request",
            )
        return record.object

    async def change(
        self,
        kind: type[V],
        name: str,
        edit: Callable[[V | None], V | None],
        *,
        by: Call,
        validate_only: bool = False,
        etag: str = "",
    ) -> V | None:
        """Replace the object by what `edit` makes of it (None: delete); what was written.

        An `etag` is that of an object whose etag is its revision (a node): Conflict if it was changed since.
        `edit` is called again with newer values while others write in between; what it raises is raised.
        """
        leading = self._chair.leading()
        for _ in range(ATTEMPTS_MAX):
            before, revision = await self._read(kind, name)
            check_etag(etag, str(revision), name)
            after = edit(before)
            if validate_only:
                return after
            compares: list[Compare] = [leading.fence.guard(), ModRevisionIs(codec.key(name), revision)]
            operations: list[Operation] = [
                Delete(codec.key(name)) if after is None else Put(codec.key(name), codec.encode(after))
            ]
            if (record := self.record(by, name)) is not None:
                compares.append(ModRevisionIs(codec.key(record.name), 0))
                operations.append(Put(codec.key(record.name), codec.encode(record)))
            with unknown_ends(leading.fence):
                result = await self._store.transact(compares, operations)
            if result.succeeded:
                await self._seen(leading, result.revision)
                return after
            if not leading.fence.is_leading():
                raise self._chair.refusal()
            if await self.repeated(by) is not None:  # the same request came twice at once; the other one won
                return (await self._read(kind, name))[0]
        raise Conflict(f"{name} is being changed by others all the time", reason="CONTENDED", remedy="try again")

    def record(self, by: Call, name: str) -> RequestRecord | None:
        """What is to be written with the change, so that the call is not done again; None for one without an id."""
        if not by.id:
            return None
        return RequestRecord(
            name=by.record_name,
            method=by.method,
            object=name,
            fingerprint=by.fingerprint,
            create_time_s=self._now_s(),
        )

    @staticmethod
    async def _seen(leading: Leading, revision: int) -> None:
        """Wait a moment until the leader looks at a state that has the write: callers read what they wrote."""
        leading.control.wake()
        for _ in range(SEEN_POLLS_MAX):  # a busy leader sees it later; the write stands
            if leading.control.snapshot.revision >= revision:
                return
            await asyncio.sleep(SEEN_POLL_S)

    async def _read(self, kind: type[V], name: str) -> tuple[V | None, int]:
        entry = await self._store.get(codec.key(name))
        if entry is None:
            return None, 0
        return codec.decode_as(kind, entry.value, key=entry.key), entry.mod_revision


def check_etag(wanted: str, etag: str, name: str) -> None:
    """Raises Conflict if the caller saw an older state than this."""
    if wanted and wanted != etag:
        raise Conflict(
            f"{name} was changed since it was read",
            reason="ETAG_MISMATCH",
            field="etag",
            remedy="read it again, then decide",
            metadata={"etag": etag},
        )
