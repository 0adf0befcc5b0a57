"""A watch on etcd that outlives its connections.

Theory of operation. A stream begins at the revision after the last one delivered. What arrives at or before that
revision is dropped: a member that lags, or a version of etcd that goes back in time (etcd-io/etcd#15271), cannot
make a watcher see the same change twice. Parts of a response that was too large are put together first, then its
events are told apart by revision. An empty response of a watch in step says that nothing happened up to its
revision, so a quiet watch can be resumed after a compaction. When the stream ends the next member is asked.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from itertools import groupby

from enova.etcd import rpc_pb2
from enova_common.backoff import Backoff
from enova_common.errors import EnovaError, RetryableError, TimedOut, Unavailable
from enova_coordinator.store import Changed, Compacted, Deleted, Entry, Event, Revision, WatchBatch, prefix_end
from enova_coordinator.store.etcd.connection import Connection
from enova_coordinator.store.etcd.failures import GRANT_REMEDY, TokenRefused, mentions_token

RESUME = Backoff(initial_s=0.1, maximum_s=2.0, jitter=0.5)
# A member cut off from its majority ends the stream in place of going quiet.
NEEDS_LEADER = (("hasleader", "true"),)

_log = logging.getLogger(__name__)


async def watch(connection: Connection, prefix: str, after: Revision) -> AsyncGenerator[WatchBatch, None]:
    """Every change under the prefix after the revision; see Store."""
    failures = 0
    renewed = False
    while not connection.closed:
        try:
            async with aclosing(_stream(connection, prefix, after)) as responses:
                async for response in responses:
                    failures, renewed = 0, False
                    for batch in _batches(response, after):
                        yield batch
                    after = max(after, _delivered(response))
        except TokenRefused:
            if renewed:
                raise
            renewed = True
        except RetryableError as error:
            _log.info("the watch on %s resumes after revision %d: %s", prefix, after, error)
        if not connection.closed:
            await asyncio.sleep(RESUME.delay_s(failures, random.random()))  # noqa: S311 (jitter is no secret)
            failures += 1


def entry(kv: rpc_pb2.KeyValue) -> Entry:
    """An entry from etcd's message."""
    return Entry(
        key=kv.key.decode(),
        value=kv.value,
        create_revision=kv.create_revision,
        mod_revision=kv.mod_revision,
        lease=kv.lease,
    )


async def _stream(connection: Connection, prefix: str, after: Revision) -> AsyncGenerator[rpc_pb2.WatchResponse, None]:
    """Whole responses of one stream, until it breaks."""
    member = await connection.connected_member()
    token = await connection.metadata(member)
    call = member.watch.Watch(metadata=(*token, *NEEDS_LEADER))
    parts: list[rpc_pb2.WatchResponse] = []
    try:
        with connection.errors(member):
            # A member confirms a watch at once. Later, pings notice a member that hangs, and etcd one without a leader.
            async with asyncio.timeout(connection.settings.attempt_timeout_s):
                await call.write(_create(prefix, after))
                response = await call.read()
            while isinstance(response, rpc_pb2.WatchResponse):
                connection.check_cluster(response.header)
                if response.canceled:
                    raise _canceled(response)
                parts.append(response)
                if not response.fragment:
                    yield _joined(parts)
                    parts = []
                response = await call.read()
        raise Unavailable(f"etcd at {member.address} ended the watch", reason="STORE_UNAVAILABLE")
    except TokenRefused:
        connection.forget_token(token)
        raise
    except TimeoutError as error:
        connection.avoid(member)
        raise TimedOut(f"etcd at {member.address} did not confirm the watch", reason="STORE_TIMED_OUT") from error
    except RetryableError:
        connection.avoid(member)
        raise
    finally:
        call.cancel()


def _create(prefix: str, after: Revision) -> rpc_pb2.WatchRequest:
    return rpc_pb2.WatchRequest(
        create_request=rpc_pb2.WatchCreateRequest(
            key=prefix.encode(),
            range_end=prefix_end(prefix).encode(),
            start_revision=after + 1,
            progress_notify=True,
            fragment=True,
        )
    )


def _canceled(response: rpc_pb2.WatchResponse) -> EnovaError:
    reason = response.cancel_reason
    if response.compact_revision:
        return Compacted(response.compact_revision)
    if "permission denied" in reason or mentions_token(reason):
        # A token that is not known (any more) is called "permission denied" as well: a new one will tell.
        return TokenRefused(f"etcd refused the watch: {reason}", remedy=GRANT_REMEDY)
    return Unavailable(f"etcd ended the watch: {reason}", reason="STORE_UNAVAILABLE")


def _joined(parts: list[rpc_pb2.WatchResponse]) -> rpc_pb2.WatchResponse:
    for part in parts[1:]:
        parts[0].events.extend(part.events)
    return parts[0]


def _batches(response: rpc_pb2.WatchResponse, after: Revision) -> Iterator[WatchBatch]:
    for revision, events in groupby(response.events, key=lambda event: event.kv.mod_revision):
        if revision > after:
            yield WatchBatch(revision, tuple(_event(event) for event in events))


def _delivered(response: rpc_pb2.WatchResponse) -> Revision:
    if response.created:
        return 0  # its revision says where the store is, not what this watch was told
    if response.events:
        return max(event.kv.mod_revision for event in response.events)
    return response.header.revision


def _event(event: rpc_pb2.Event) -> Event:
    if event.type == rpc_pb2.Event.DELETE:
        return Deleted(event.kv.key.decode(), event.kv.mod_revision)
    return Changed(entry(event.kv))
