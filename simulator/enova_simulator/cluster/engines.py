"""All engines of a simulated fleet: the compiled kernel with its arrays laid out, and requests to give to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from enova_recommender.engine import Limits, Policy
from enova_simulator.cluster.kernel import columns as at
from enova_simulator.cluster.kernel import engines as kernel
from enova_simulator.cluster.kernel.state import Floats, Ints, Longs, State
from enova_simulator.cluster.tables import Tabulated, stacked

LOG_ENTRIES = 65_536


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Requests:
    """Requests in the order of their arrival. `hashes` are the block hashes of all prompts, one after another;
    those of request i are `hashes[hash_ends[i - 1]:hash_ends[i]]`.
    """

    arrival_s: Floats
    prompt_tokens: Longs
    output_tokens: Longs
    priority: Longs
    hashes: Longs
    hash_ends: Longs

    def __len__(self) -> int:
        return len(self.arrival_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Engines of one configuration on one GPU type, in one world."""

    limits: Limits
    times: Tabulated


Happened = tuple[int, int, int, float]     # kind (columns.LOG_*), replica, request, when


class Engines:
    """So many engines, addressed by number; each begins empty and is of the kind that `begin` gives it.

    `telling` says which happenings are logged (`columns.LOG_*`).
    """

    def __init__(
        self, kinds: Sequence[Kind], requests: Requests, *, count: int, telling: int = at.LOG_FINISHED
    ) -> None:
        self.kinds = tuple(kinds)
        self.count = count
        self._requests = requests
        self.state = _state(self.kinds, requests, count)
        self.state.control[at.LOG_MASK] = telling
        for number in range(count):
            self.state.clocks[number, at.SLOW] = 1.0
            kernel.clear(self.state, number, 0, 0.0)

    def begin(self, number: int, kind: int, at_s: float) -> None:
        """An empty engine begins; what was in it before is forgotten."""
        self.state.clocks[number, at.SLOW] = 1.0
        self.state.engines[number, at.HUNG] = 0
        self.state.engines[number, at.STOP] = 0
        kernel.clear(self.state, number, kind, at_s)

    def fits(self, kind: int, prompt_tokens: int, output_tokens: int) -> bool:
        """Whether an engine of this kind can hold such a request at all."""
        limits = self.kinds[kind].limits
        if -(-(prompt_tokens + output_tokens - 1) // limits.block_size) > limits.num_blocks:
            return False
        return limits.enable_chunked_prefill or prompt_tokens <= limits.max_num_batched_tokens

    def submit(self, number: int, request: int, at_s: float) -> None:
        """Give a request to an engine, of which nothing that is due before has been left out by `advance`."""
        kernel.drive(self.state, at.SUBMIT, number, request, at_s)

    def advance(self, until_s: float) -> int:
        """Let time pass where something visible happens by then; the number of things to read by `happened`."""
        return kernel.drive(self.state, at.ADVANCE, 0, 0, until_s)

    @property
    def stopped(self) -> bool:
        """Whether some engine stopped early in the last `advance`: act on what happened, and advance again."""
        return bool(self.state.control[at.STOPPED])

    def stop_at_finish(self, number: int, *, stop: bool) -> None:
        """Whether this engine stops when a request finishes, because others wait for its place."""
        self.state.engines[number, at.STOP] = stop

    def settle(self, until_s: float) -> None:
        """Bring every engine's figures up to this moment; nothing visible may be due before it."""
        kernel.drive(self.state, at.SETTLE, 0, 0, until_s)

    def happened(self) -> list[Happened]:
        """What was logged since the last call, replica by replica."""
        count = int(self.state.control[at.LOGGED])
        if not count:
            return []
        self.state.control[at.LOGGED] = 0
        entries, times = self.state.log[:count].tolist(), self.state.log_times[:count].tolist()
        return [(*entry, at_s) for entry, at_s in zip(entries, times, strict=True)]

    def slow(self, number: int, factor: float) -> None:
        """Steps that begin from now on take so many times as long."""
        self.state.clocks[number, at.SLOW] = factor

    def hang(self, number: int) -> None:
        """Nothing is computed any more."""
        self.state.engines[number, at.HUNG] = 1
        self.state.clocks[number, at.NEXT] = np.inf

    def resume(self, number: int, at_s: float) -> None:
        """It computes again; the step that hung ends now."""
        clock = self.state.clocks[number]
        self.state.engines[number, at.HUNG] = 0
        clock[at.STEP_END] = max(clock[at.STEP_END], at_s)
        clock[at.NOW] = clock[at.NOW] if self.state.engines[number, at.IN_STEP] else max(clock[at.NOW], at_s)
        clock[at.NEXT] = at_s

    def inside(self, number: int) -> list[int]:
        """The requests that the engine runs or lets wait."""
        engine = self.state.engines[number]
        found: list[int] = self.state.running[number, : engine[at.RUNNING]].tolist()
        request = int(engine[at.HEAD])
        while request >= 0:
            found.append(request)
            request = int(self.state.requests[request, at.NEXT_WAITING])
        return found

    def forget(self, request: int) -> None:
        """Make a request as if it had never been computed, so that it can be submitted elsewhere."""
        kernel.forget(self.state, request)


def _state(kinds: Sequence[Kind], requests: Requests, count: int) -> State:
    places = max(kind.limits.max_num_seqs for kind in kinds)
    blocks = max(kind.limits.num_blocks for kind in kinds) if len(requests.hashes) else 1
    limits = np.array([_limits(kind.limits) for kind in kinds], dtype=np.int64)
    times = np.full((len(requests), at.TIME_COLUMNS), np.nan)
    times[:, at.ARRIVAL] = requests.arrival_s
    return State(
        engines=np.zeros((count, at.ENGINE_COLUMNS), dtype=np.int64),
        clocks=np.zeros((count, at.CLOCK_COLUMNS)),
        running=np.zeros((count, places), dtype=np.int32),
        prefills=np.zeros((count, places, 2), dtype=np.int32),
        phases=np.zeros((count, max(kind.limits.block_size for kind in kinds)), dtype=np.int32),
        requests=_rows(requests),
        times=times,
        hashes=requests.hashes,
        is_shared=np.zeros(len(requests.hashes), dtype=np.uint8),
        buckets=np.full((count, 1 << (blocks - 1).bit_length()), -1, dtype=np.int32),
        node_hashes=np.zeros((count, blocks), dtype=np.int64),
        nodes=np.zeros((count, blocks, at.NODE_COLUMNS), dtype=np.int32),
        limits=limits,
        log=np.zeros((LOG_ENTRIES + 3 * places, 3), dtype=np.int32),
        log_times=np.zeros(LOG_ENTRIES + 3 * places),
        control=np.zeros(at.CONTROL_CELLS, dtype=np.int64),
        tables=stacked([kind.times for kind in kinds]),
    )


def _rows(requests: Requests) -> Ints:
    rows = np.zeros((len(requests), at.REQUEST_COLUMNS), dtype=np.int32)
    starts = np.concatenate([[0], requests.hash_ends[:-1]])
    rows[:, at.PROMPT], rows[:, at.OUTPUT] = requests.prompt_tokens, requests.output_tokens
    rows[:, at.PRIORITY], rows[:, at.HASH_AT] = requests.priority, starts
    rows[:, at.HASHES] = requests.hash_ends - starts
    rows[:, at.JOINED] = -1
    return rows


def _limits(limits: Limits) -> list[int]:
    return [
        limits.num_blocks, limits.block_size, limits.max_num_seqs, limits.max_num_batched_tokens,
        int(limits.enable_chunked_prefill), int(limits.scheduling_policy is Policy.PRIORITY),
        int(limits.watermark * limits.num_blocks),
    ]  # fmt: skip
