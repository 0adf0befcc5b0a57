"""The KV cache as counted blocks, with a prefix cache by block hash.

Blocks are interchangeable, so only their numbers are kept. A block is blank (holds nothing), private (held by one
request), shared (held by one or more requests, found by hash) or idle (held by none, still found by hash; the least
recently used is blanked first). The four always add up to the pool.
"""

from __future__ import annotations

from collections import OrderedDict


class BlockPool:
    """A fixed number of KV blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._blank = num_blocks
        self._private = 0
        self._shared: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Blocks that can be taken now."""
        return self._blank + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that requests hold."""
        return self._private + len(self._shared)

    def check(self) -> None:
        """Assert that no block is lost or counted twice."""
        assert self._blank + self._private + len(self._shared) + len(self._idle) == self.num_blocks
        assert self._blank >= 0
        assert self._private >= 0
        assert all(holders > 0 for holders in self._shared.values())
        assert not self._shared.keys() & self._idle.keys()

    def cached_prefix(self, hashes: tuple[int, ...], limit: int) -> int:
        """How many of the first `limit` blocks are cached, without a gap."""
        count = 0
        for block_hash in hashes[:limit]:
            if block_hash not in self._shared and block_hash not in self._idle:
                break
            count += 1
        return count

    def idle_among(self, hashes: tuple[int, ...]) -> int:
        """How many of these cached blocks nobody holds: taking them lowers `free`."""
        return sum(1 for block_hash in hashes if block_hash in self._idle)

    def take(self, count: int) -> None:
        """Give `count` private blocks to a request; the caller has looked at `free`."""
        assert count <= self.free, "more blocks taken than are free"
        evicted = max(0, count - self._blank)
        for _ in range(evicted):
            self._idle.popitem(last=False)
        self._blank += evicted - count
        self._private += count

    def hold(self, hashes: tuple[int, ...]) -> None:
        """Let one more request hold these cached blocks."""
        for block_hash in hashes:
            if block_hash in self._idle:
                del self._idle[block_hash]
            self._shared[block_hash] = self._shared.get(block_hash, 0) + 1

    def publish(self, block_hash: int) -> bool:
        """Make a private block findable; False if another block already is under that hash, and it stays private."""
        if block_hash in self._shared or block_hash in self._idle:
            return False
        self._private -= 1
        self._shared[block_hash] = 1
        return True

    def give_back(self, private: int, hashes: tuple[int, ...]) -> None:
        """Take back a request's private blocks and its hold on shared ones."""
        self._private -= private
        self._blank += private
        # The end of a prompt is the least likely to be asked for again, so it becomes the first to go.
        for block_hash in reversed(hashes):
            holders = self._shared[block_hash] - 1
            if holders:
                self._shared[block_hash] = holders
            else:
                del self._shared[block_hash]
                self._idle[block_hash] = None

    def withhold(self, count: int) -> int:
        """Take up to `count` free blocks out of the pool for good, as a leak does; returns how many."""
        count = min(count, self.free)
        self.take(count)
        self._private -= count
        self.num_blocks -= count
        return count

    def clear(self) -> None:
        """Forget all idle cached blocks."""
        self._blank += len(self._idle)
        self._idle.clear()
