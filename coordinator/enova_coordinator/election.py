"""Leadership by election on the store, with the term that fences all that a leader does.

Theory of operation. The leader is who created the leader key, under a lease that it keeps alive. The *term* is the
revision that created the key: it only ever grows, and `Leadership.guard()` compares it in every write, so a leader
that was paused, cut off or replaced changes nothing, whatever it still believes. Besides that a leader ends itself:
it leads until a deadline, the time to live less a margin after the *start* of the last keepalive that was
answered, on a clock that goes on while the machine sleeps. So it has stopped before its lease can run out.
An election is not mutual exclusion; the guard is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from enova_common.backoff import Backoff
from enova_common.errors import EnovaError, InvalidField
from enova_coordinator.store import (
    Changed,
    Compacted,
    Compare,
    CreateRevisionIs,
    Entry,
    Event,
    Lease,
    LeaseLost,
    ModRevisionIs,
    Put,
    Revision,
    Store,
)

LEADER_KEY = "/enova/v1/leader"
TTL_S = 3  # with the keepalives below a leader's death is noticed in 3 to 3.5 s: etcd looks every half second
MARGIN_S = 0.5  # a leader ends itself this long before its lease can
RESIGN_TIMEOUT_S = 2.0
RETRY = Backoff(initial_s=0.1, maximum_s=1.0, jitter=0.5)

_log = logging.getLogger(__name__)


def boot_clock() -> float:
    """Seconds since boot, those asleep included: a suspended machine's lease runs out meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """Who leads, as the store says it."""

    coordinator_id: str
    api_address: str
    term: Revision


class Leadership:
    """One term of one leader: ends once and for ever."""

    def __init__(self, key: str, term: Revision, lease: Lease, deadline: float, now: Callable[[], float]) -> None:
        self.term = term
        self.lease = lease
        self.deadline = deadline
        self.reason = ""
        """Why it ended; empty while it lasts."""
        self._key = key
        self._now = now
        self._ended = asyncio.Event()

    def guard(self) -> Compare:
        """The compare that every write of this leader includes."""
        return CreateRevisionIs(self._key, self.term)

    def is_leading(self, now: float | None = None) -> bool:
        """Whether it may still act, at `now` on the election's clock: ask before each effect."""
        return not self._ended.is_set() and (self._now() if now is None else now) < self.deadline

    def end(self, reason: str) -> None:
        """End it here and now, whatever the store says."""
        if not self._ended.is_set():
            self.reason = reason
            self._ended.set()

    async def ended(self) -> str:
        """Wait for the end; the reason."""
        await self._ended.wait()
        return self.reason


class Election:
    """One coordinator's part in the election of the leader."""

    def __init__(
        self,
        store: Store,
        *,
        coordinator_id: str,
        api_address: str,
        key: str = LEADER_KEY,
        ttl_s: int = TTL_S,
        now: Callable[[], float] = boot_clock,
    ) -> None:
        if ttl_s < 2:
            raise InvalidField(f"{ttl_s} s is too short to keep alive", field="ttl_s", remedy="at least 2")
        self._store = store
        self._key = key
        self._ttl_s = ttl_s
        self._now = now
        record = {"kind": "leader", "version": 1, "coordinator_id": coordinator_id, "api_address": api_address}
        self._value = json.dumps(record).encode()
        self._seen: Leader | None = None
        self._vacant = asyncio.Event()
        self._leadership: Leadership | None = None
        self._last_term: Revision = 0

    @property
    def leadership(self) -> Leadership | None:
        """Our own, while it lasts."""
        leadership = self._leadership
        return leadership if leadership is not None and leadership.is_leading() else None

    @property
    def leader(self) -> Leader | None:
        """Who leads, as far as is known here; never this coordinator after its own term has ended."""
        if self._seen is not None and self._seen.term == self._last_term and self.leadership is None:
            return None
        return self._seen

    async def run(self, serve: Callable[[Leadership], Coroutine[object, object, None]]) -> None:
        """Campaign until cancelled; while leading run `serve`, which is cancelled when the term ends.

        A store that is away ends the term, not this. An error of `serve` is raised, after resigning.
        When cancelled, `serve` ends first, then the key is deleted, so that another leads at once.
        """
        observer = asyncio.create_task(self._observe(), name="election-observer")
        try:
            attempt = 0
            while True:
                await self._vacancy(observer)
                leadership = await self._acquire()
                if leadership is not None:
                    attempt = 0
                    await self._lead(leadership, serve)
                await asyncio.sleep(RETRY.delay_s(attempt, random.random()))  # noqa: S311 (jitter is no secret)
                attempt += 1
        finally:
            await _cancelled(observer)

    async def _vacancy(self, observer: asyncio.Task[None]) -> None:
        waiting = asyncio.create_task(self._vacant.wait())
        try:
            await asyncio.wait({waiting, observer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if observer.done():
            observer.result()  # it goes on for ever: only a defect ends it

    async def _acquire(self) -> Leadership | None:
        """Our leadership if the key was ours to create."""
        started = self._now()
        lease: Lease | None = None
        try:
            lease = await self._store.lease(self._ttl_s)
            created = await self._store.transact([ModRevisionIs(self._key, 0)], [Put(self._key, self._value, lease.id)])
        except EnovaError as error:
            # If the key was created after all, it goes with the lease that nobody keeps alive.
            _log.warning("could not stand for election: %s", error)
        else:
            if created.succeeded:
                deadline = started + lease.ttl_s - MARGIN_S
                return Leadership(self._key, created.revision, lease, deadline, self._now)
        if lease is not None:
            await self._revoke(lease)
        return None

    async def _lead(
        self, leadership: Leadership, serve: Callable[[Leadership], Coroutine[object, object, None]]
    ) -> None:
        _log.info("leading, term %d", leadership.term)
        self._leadership, self._last_term = leadership, leadership.term
        serving = asyncio.create_task(serve(leadership), name="leader")
        renewal = asyncio.create_task(self._renew(leadership), name="leader-keepalive")
        try:
            await asyncio.wait({serving, renewal}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                leadership.end("resigned")
                serving.result()
        finally:
            leadership.end("resigned")
            await _cancelled(serving)
            await _cancelled(renewal)
            _log.warning("no longer leading, term %d: %s", leadership.term, leadership.reason)
            await self._revoke(leadership.lease)

    async def _renew(self, leadership: Leadership) -> None:
        """Keep the lease alive until the leadership ends, for whatever reason."""
        lease = leadership.lease
        interval_s = lease.ttl_s / 5
        while leadership.is_leading():
            started = self._now()
            try:
                async with asyncio.timeout(leadership.deadline - started):
                    await lease.keepalive()
                leadership.deadline = started + lease.ttl_s - MARGIN_S
            except LeaseLost as error:
                leadership.end(str(error))
            except TimeoutError:
                leadership.end("the store did not renew the lease in time")
            except EnovaError as error:
                _log.warning("the lease was not renewed: %s", error)
            with contextlib.suppress(TimeoutError):  # nothing ended it meanwhile: renew again
                left_s = leadership.deadline - self._now()
                await asyncio.wait_for(leadership.ended(), max(0.0, min(interval_s, left_s)))
        leadership.end("the store did not renew the lease in time")

    async def _observe(self) -> None:
        """Keep what is known of the leader up to date, for ever."""
        attempt = 0
        while True:
            try:
                entries, revision = await self._store.range(self._key)
                found = next((entry for entry in entries if entry.key == self._key), None)
                self._see(found, revision)
                attempt = 0
                async with contextlib.aclosing(self._store.watch(self._key, after=revision)) as batches:
                    async for batch in batches:
                        for event in batch.events:
                            self._see_event(event)
            except Compacted:
                continue
            except EnovaError as error:
                _log.warning("cannot see who leads: %s", error)
            await asyncio.sleep(RETRY.delay_s(attempt, random.random()))  # noqa: S311 (jitter is no secret)
            attempt += 1

    def _see_event(self, event: Event) -> None:
        if event.key == self._key:
            if isinstance(event, Changed):
                self._see(event.entry, event.entry.mod_revision)
            else:
                self._see(None, event.mod_revision)

    def _see(self, entry: Entry | None, revision: Revision) -> None:
        self._seen = None if entry is None else _leader(entry)
        if entry is None:
            self._vacant.set()
        else:
            self._vacant.clear()
        ours = self._leadership
        if ours is not None and revision > ours.term and (entry is None or entry.create_revision != ours.term):
            ours.end("the leader key is no longer ours")

    async def _revoke(self, lease: Lease) -> None:
        try:
            async with asyncio.timeout(RESIGN_TIMEOUT_S):
                await lease.revoke()
        except (TimeoutError, EnovaError) as error:
            _log.info("the lease ends by itself: %s", error or "no answer")


def _leader(entry: Entry) -> Leader | None:
    try:
        record = json.loads(entry.value)
        return Leader(
            coordinator_id=str(record["coordinator_id"]),
            api_address=str(record["api_address"]),
            term=entry.create_revision,
        )
    except (ValueError, KeyError, TypeError):
        # Somebody else's bytes under the key: it is taken all the same, by nobody that can be reached.
        _log.warning("cannot read the leader record at revision %d", entry.mod_revision)
        return None


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Cancel the task and wait for its end; an error on its way out is heard, and changes nothing any more."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("%s ended with an error", task.get_name(), exc_info=error)
