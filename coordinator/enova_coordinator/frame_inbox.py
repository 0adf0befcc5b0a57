"""Frames that wait for detection: the newest of each node as bytes, bounded in number and in bytes.

Nothing in here waits. What detection does not take in time goes, the oldest of its node first, and is counted.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from enova_coordinator.detection_messages import ReceivedFrame

FRAMES_PER_NODE_MAX = 32           # half a minute at one a second: a child that is replaced takes less
BYTES_MAX = 128 << 20
TAKE_BYTES_MAX = 48 << 20          # at once: a thousand nodes' frames of some seconds


class FrameInbox:
    """What came since it was last asked. `now_s` is model time; frames that end `old_s` before it are not for it."""

    def __init__(self, *, now_s: Callable[[], float], old_s: float) -> None:
        self.dropped: Counter[str] = Counter()
        """By reason."""
        self._now_s = now_s
        self._old_s = old_s
        self._nodes: dict[str, deque[ReceivedFrame]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._nodes.values())

    def put(self, node: str, end_s: float, data: bytes) -> None:
        """Keep a frame of a node."""
        now_s = self._now_s()
        if end_s < now_s - self._old_s:
            self.dropped["old"] += 1           # a backfill: detection is of now
            return
        waiting = self._nodes.setdefault(node, deque())
        while waiting and (len(waiting) >= FRAMES_PER_NODE_MAX or self._bytes + len(data) > BYTES_MAX):
            self._bytes -= len(waiting.popleft().data)
            self.dropped["full"] += 1
        if self._bytes + len(data) > BYTES_MAX:
            self.dropped["full"] += 1
            return
        waiting.append(ReceivedFrame(node, now_s, data))
        self._bytes += len(data)

    def take(self) -> tuple[ReceivedFrame, ...]:
        """What waits, each node's in order, up to TAKE_BYTES_MAX."""
        taken: list[ReceivedFrame] = []
        size = 0
        for waiting in self._nodes.values():
            while waiting and size < TAKE_BYTES_MAX:
                each = waiting.popleft()
                size += len(each.data)
                taken.append(each)
        self._bytes -= size
        self._nodes = {node: waiting for node, waiting in self._nodes.items() if waiting}
        return tuple(taken)
