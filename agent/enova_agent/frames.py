"""Frames: what the node measured in each interval, and the last hour of them for a leader that missed some."""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from enova_agent.core.canary import CanaryFilter
from enova_agent.core.local import HeldReplica, LengthSample, Summary
from enova_agent.core.model import ReplicaView
from enova_agent.core.telemetry import EngineScrape, Frame, GpuFacts, GpuSample, ReplicaSample

SUMMARIES_MAX = 2_000        # of one interval: a hundred deployments on all their replicas
LENGTHS_MAX = 256            # answers of one interval, of all ingresses of the node: 40 kB
BLOCK_FRAMES = 60            # frames that are compressed together: neighbours are nearly alike


class Gpus(Protocol):
    """Where the GPUs of this host are read."""

    def describe(self) -> tuple[GpuFacts, ...]:
        """The GPUs that this host has, as last seen."""
        ...

    def sample(self) -> tuple[GpuSample, ...]:
        """The newest reading of each GPU, with its age; never waits."""
        ...


class Engines(Protocol):
    """The engines of this node, as their supervision knows them."""

    def views(self) -> Iterable[ReplicaView]:
        """Every member that this node has."""
        ...

    def scrapes(self) -> Mapping[str, EngineScrape]:
        """The newest scrape of each replica."""
        ...


class FrameMaker:
    """Puts together one frame an interval from what GPUs, engines and ingress last said."""

    def __init__(
        self,
        *,
        node: str,
        boot: str,
        gpus: Gpus,
        engines: Engines,
        model_time_s: Callable[[], float],
        monotonic_s: Callable[[], float],
    ) -> None:
        self._node = node
        self._boot = boot
        self._gpus = gpus
        self._engines = engines
        self._model_time_s = model_time_s
        self._monotonic_s = monotonic_s
        self._sequence = 0
        self._end_s = model_time_s()
        self._filters: dict[str, CanaryFilter] = {}
        self._summaries: deque[Summary] = deque()
        self._summaries_from_s = math.inf
        self._lengths: deque[LengthSample] = deque()
        self._dropped = 0

    def add_summaries(self, summaries: Iterable[Summary], *, start_s: float = math.inf) -> None:
        """Request summaries since `start_s` for the next frame; over the bound, the oldest are dropped and counted.

        While no agent listened an ingress went on adding up: the frame covers all that time then.
        """
        self._summaries_from_s = min(self._summaries_from_s, start_s)
        for summary in summaries:
            if len(self._summaries) >= SUMMARIES_MAX:
                self._summaries.popleft()
                self._dropped += 1
            self._summaries.append(summary)

    def add_lengths(self, samples: Iterable[LengthSample]) -> None:
        """Lengths of answers for the next frame; over the bound, the oldest are dropped and counted."""
        for sample in samples:
            if len(self._lengths) >= LENGTHS_MAX:
                self._lengths.popleft()
                self._dropped += 1
            self._lengths.append(sample)

    def make(self, held: Mapping[str, HeldReplica] | None) -> Frame:
        """The frame of the interval that ends now. `held` is None while no ingress is connected."""
        self._sequence += 1
        start_s, self._end_s = min(self._end_s, self._summaries_from_s), max(self._end_s, self._model_time_s())
        self._summaries_from_s = math.inf
        requests, lengths, dropped = tuple(self._summaries), tuple(self._lengths), self._dropped
        self._summaries.clear()
        self._lengths.clear()
        self._dropped = 0
        return Frame(
            node=self._node,
            sequence=self._sequence,
            boot=self._boot,
            start_s=start_s,
            end_s=self._end_s,
            gpus=self._gpus.sample(),
            replicas=self._replica_samples(held),
            requests=requests,
            lengths=lengths,
            dropped_samples=dropped,
        )

    def _replica_samples(self, held: Mapping[str, HeldReplica] | None) -> tuple[ReplicaSample, ...]:
        scrapes = self._engines.scrapes()
        views = tuple(self._engines.views())
        for gone in self._filters.keys() - {view.replica for view in views}:
            del self._filters[gone]
        return tuple(self._replica_sample(view, scrapes.get(view.replica), held) for view in views)

    def _replica_sample(
        self, view: ReplicaView, scrape: EngineScrape | None, held: Mapping[str, HeldReplica] | None
    ) -> ReplicaSample:
        count = None if held is None else held.get(view.replica, HeldReplica())
        held_count = None if count is None else float(count.in_flight + count.queued)
        if scrape is None:
            return ReplicaSample(
                replica=view.replica, state=view.state, held=held_count, scrape_error="the engine was not scraped yet"
            )
        metrics = self._filters.setdefault(view.replica, CanaryFilter()).metrics(scrape)
        return ReplicaSample(
            replica=view.replica,
            state=view.state,
            metrics=metrics,
            age_s=max(0.0, self._monotonic_s() - scrape.taken_s),
            resident_memory_bytes=scrape.resident_memory_bytes,
            held=held_count,
            scrape_error=scrape.error or ("" if metrics is None else metrics.error),
            instance=scrape.instance,
        )


@dataclass(frozen=True, slots=True)
class BufferedFrame:
    """One encoded frame. `number` counts the frames of this process, without gaps."""

    number: int
    end_s: float
    data: bytes


@dataclass(frozen=True, slots=True)
class _Block:
    """Consecutive frames, compressed together."""

    first: int
    ends_s: tuple[float, ...]
    sizes: tuple[int, ...]
    data: bytes

    def frames(self) -> list[BufferedFrame]:
        plain = zlib.decompress(self.data)
        frames = []
        at = 0
        for offset, (end_s, size) in enumerate(zip(self.ends_s, self.sizes, strict=True)):
            frames.append(BufferedFrame(self.first + offset, end_s, plain[at : at + size]))
            at += size
        return frames


class FrameBuffer:
    """The last hour of encoded frames, the older ones compressed, bounded in number and in bytes.

    A reader keeps the number of the frame that it wants next: sending what is new and catching up on what was
    missed are the same walk, so that no frame is sent twice or out of order.
    """

    def __init__(self, *, frames_max: int = 3_600, bytes_max: int = 16 << 20) -> None:
        self._frames_max = frames_max
        self._bytes_max = bytes_max
        self._blocks: deque[_Block] = deque()
        self._tail: deque[BufferedFrame] = deque()
        self._bytes = 0
        self._next = 0
        self._open: tuple[int, list[BufferedFrame]] = (-1, [])  # the block that a reader is in, unpacked

    def __len__(self) -> int:
        return self._next - self.first

    @property
    def first(self) -> int:
        """The number of the oldest frame that is kept."""
        if self._blocks:
            return self._blocks[0].first
        return self._tail[0].number if self._tail else self._next

    @property
    def next(self) -> int:
        """The number that the next frame will have."""
        return self._next

    @property
    def size_bytes(self) -> int:
        """What the kept frames take."""
        return self._bytes

    def append(self, data: bytes, *, end_s: float) -> None:
        """Keeps a frame; the oldest go when a bound is reached."""
        self._tail.append(BufferedFrame(self._next, end_s, data))
        self._next += 1
        self._bytes += len(data)
        if len(self._tail) >= 2 * BLOCK_FRAMES:
            self._compress()
        while len(self) > self._frames_max or self._bytes > self._bytes_max:
            self._drop_oldest()

    def get(self, number: int) -> BufferedFrame | None:
        """The frame `number`, or the oldest kept after it; None when there is none yet."""
        number = max(number, self.first)
        if number >= self._next:
            return None
        if self._tail and number >= self._tail[0].number:
            return self._tail[number - self._tail[0].number]
        block = next(block for block in reversed(self._blocks) if block.first <= number)
        if self._open[0] != block.first:
            self._open = (block.first, block.frames())
        return self._open[1][number - block.first]

    def after(self, end_s: float) -> int:
        """The number of the first kept frame that ends after `end_s`."""
        return next((number for number, frame_end_s in self._ends() if frame_end_s > end_s), self._next)

    def _ends(self) -> Iterator[tuple[int, float]]:
        for block in self._blocks:
            yield from ((block.first + offset, end_s) for offset, end_s in enumerate(block.ends_s))
        yield from ((frame.number, frame.end_s) for frame in self._tail)

    def _compress(self) -> None:
        frames = [self._tail.popleft() for _ in range(BLOCK_FRAMES)]
        data = zlib.compress(b"".join(frame.data for frame in frames), level=1)
        block = _Block(
            first=frames[0].number,
            ends_s=tuple(frame.end_s for frame in frames),
            sizes=tuple(len(frame.data) for frame in frames),
            data=data,
        )
        self._blocks.append(block)
        self._bytes += len(data) - sum(block.sizes)

    def _drop_oldest(self) -> None:
        if self._blocks:
            self._bytes -= len(self._blocks.popleft().data)
        else:
            self._bytes -= len(self._tail.popleft().data)
        self._open = (-1, [])
