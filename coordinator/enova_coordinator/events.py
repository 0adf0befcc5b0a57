"""What happened lately, for people: a bounded ring in the leader's memory, newest first when asked."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from enova_common.errors import TooLarge
from enova_coordinator.core.model import Event, Severity
from enova_coordinator.core.plan import Note

CAPACITY = 10_000                  # about 4 MB; an hour of a busy fleet
QUEUE_MAX = 1000                   # events that wait for one slow reader; over it the oldest are dropped
REVISIONS_PER_S = 1_000_000        # a revision is the event's time in microseconds, or one more than the last
REPEAT_S = 60.0                    # the same words about the same object within this are one event


class EventLog:
    """The events that this coordinator knows of."""

    def __init__(self, *, now_s: Callable[[], float] = time.time, capacity: int = CAPACITY) -> None:
        self._now_s = now_s
        self._ring: deque[Event] = deque(maxlen=capacity)
        self._last: dict[str, Event] = {}
        self._forgotten = int(now_s() * REVISIONS_PER_S)  # all up to here is not known, or not any more
        self._newest = self._forgotten
        self._readers: set[asyncio.Queue[Event]] = set()

    def record(
        self, obj: str, reason: str, message: str, severity: Severity = Severity.NORMAL
    ) -> None:
        """Keep what happened to an object; the same again within a minute is not kept twice."""
        now_s = self._now_s()
        last = self._last.get(obj)
        same = last is not None and (last.reason, last.message) == (reason, message)
        if last is not None and same and now_s < last.create_time_s + REPEAT_S:
            return
        self._newest = max(self._newest + 1, int(now_s * REVISIONS_PER_S))
        event = Event(
            name=f"events/{self._newest}",
            object=obj,
            reason=reason,
            message=message,
            create_time_s=now_s,
            severity=severity,
        )
        if len(self._ring) == self._ring.maxlen:
            self._forgotten = self._ring[0].revision
            if self._last.get(self._ring[0].object) is self._ring[0]:
                del self._last[self._ring[0].object]
        self._ring.append(event)
        self._last[obj] = event
        for queue in self._readers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)

    def record_note(self, note: Note) -> None:
        """Keep what a change of the plan means."""
        self.record(note.object, note.reason, note.message, note.severity)

    def list(self, obj: str = "") -> Sequence[Event]:
        """Newest first; of one object and all that it owns, or of everything."""
        return [event for event in reversed(self._ring) if _about(event, obj)]

    @property
    def revision(self) -> int:
        """Of the newest event: to watch on from. It grows from one leader to the next, as their clocks do."""
        return self._newest

    async def watch(self, obj: str = "", *, after: int = 0) -> AsyncIterator[Sequence[Event]]:
        """Events after a revision, or from now on, as they happen. Raises TooLarge for a forgotten one."""
        if after:
            self._check_known(after)
        queue: asyncio.Queue[Event] = asyncio.Queue(QUEUE_MAX)
        self._readers.add(queue)
        try:
            past = [event for event in self._ring if event.revision > after and _about(event, obj)] if after else []
            if past:
                yield past
            while True:
                events = [await queue.get()]
                while not queue.empty():
                    events.append(queue.get_nowait())
                if matching := [event for event in events if _about(event, obj)]:
                    yield matching
        finally:
            self._readers.discard(queue)


    def _check_known(self, after: int) -> None:
        if self._forgotten <= after <= self._newest:
            return
        future = after > self._newest
        raise TooLarge(
            f"revision {after} is {'still to come' if future else 'of a time that this coordinator does not remember'}",
            reason="RESUME_REVISION_FUTURE" if future else "RESUME_REVISION_COMPACTED",
            field="resume_revision",
            remedy="list the events, then watch on from the revision that came with the list",
            metadata={"oldest_revision": str(self._forgotten), "newest_revision": str(self._newest)},
        )


def _about(event: Event, obj: str) -> bool:
    return not obj or event.object == obj or event.object.startswith(obj + "/")
