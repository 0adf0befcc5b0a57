"""The continuous-batching scheduler in virtual time.

Theory of operation. The engine computes one step after another. At each boundary between steps the scheduler makes
the next batch as vLLM does: every decoding sequence gets one token, a prompt that is half computed goes on, then
waiting requests are admitted while tokens, sequences and KV blocks last. When blocks run out the newest (or least
urgent) request is preempted and computed again later. A batch that only decodes repeats unchanged until a sequence
finishes, blocks run out or a request arrives, so such a run is added up in closed form. At most one prompt is half
computed, and it is the last admitted, because admission ends with the tokens of a step.

Only the step in flight has a fate of its own: `advance(until)` leaves it open when it ends later than `until`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from enova_recommender.engine.blocks import BlockPool
from enova_recommender.engine.cohort import Cohort, Sequence
from enova_recommender.engine.events import (
    Admitted,
    Event,
    Finished,
    FirstToken,
    Limits,
    Policy,
    Preempted,
    Rejected,
    Request,
    Resumed,
    Stepped,
)
from enova_recommender.performance import StepTimes
from enova_recommender.types import Batch


@dataclass(slots=True)
class _Step:
    """The step in flight."""

    start_s: float
    end_s: float
    batch: Batch
    prefills: list[tuple[Sequence, int, int]]  # sequence, its epoch, tokens
    may_admit_after: bool  # nobody was let in before it, or room was made during it: who waits may get in at its end


class Scheduler:
    """One engine: submit requests, advance time, read what happened.

    `coalesce=False` computes every step by itself; it exists to be compared with.
    """

    def __init__(self, limits: Limits, times: StepTimes, *, start_s: float = 0.0, coalesce: bool = True) -> None:
        self.limits = limits
        self.times = times  # may be replaced: holds from the next step on
        self._coalesce = coalesce
        self._now_s = start_s  # the last boundary between steps, or the moment of going idle
        self._seen_s = start_s
        self._pool = BlockPool(limits.num_blocks)
        self._cohort = Cohort(limits.block_size)
        self._running: dict[str, Sequence] = {}  # in the order of admission
        self._prefilling: Sequence | None = None
        self._waiting: list[tuple[int, float, int, int, Sequence]] = []
        self._waiting_ids: dict[str, Sequence] = {}
        self._arrivals: list[tuple[float, int, Sequence]] = []
        self._arrival_ids: dict[str, Sequence] = {}
        self._step: _Step | None = None
        self._order = 0

    # -- what is seen from outside

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that arrived and are not in the batch."""
        return len(self._waiting_ids)

    @property
    def is_full(self) -> bool:
        """Whether the bound on queued requests refuses one more."""
        bound = self.limits.max_num_queued_reqs
        return bound is not None and self.running + self.waiting + len(self._arrivals) >= bound

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that requests hold."""
        return self._pool.used / self._pool.num_blocks if self._pool.num_blocks else 1.0

    @property
    def step_started_s(self) -> float | None:
        """When the step in flight began; None when the engine is idle."""
        return self._step.start_s if self._step else None

    def generated_tokens(self, request_id: str) -> int | None:
        """Tokens that an unfinished request has made; None if there is no such request."""
        sequence = (
            self._running.get(request_id) or self._waiting_ids.get(request_id) or self._arrival_ids.get(request_id)
        )
        return self._cohort.generated(sequence) if sequence else None

    def progress(self) -> Iterator[tuple[str, int]]:
        """Each running request with the tokens that it has made."""
        return ((name, self._cohort.generated(sequence)) for name, sequence in self._running.items())

    def withhold_blocks(self, count: int) -> int:
        """Lose up to `count` free blocks for good, as a leak does; returns how many."""
        return self._pool.withhold(count)

    def reset_prefix_cache(self) -> None:
        """Forget what no request holds."""
        self._pool.clear()

    def check(self) -> None:
        """Assert the invariants: every block counted once, every running sequence in its place."""
        self._pool.check()
        members = [sequence for sequence in self._running.values() if sequence.joined >= 0]
        assert len(members) == self._cohort.size
        assert len(self._running) <= self.limits.max_num_seqs
        if self._step is None:
            assert self._prefilling is None or self._prefilling.request.id in self._running

    # -- what comes in

    def submit(self, request: Request, at_s: float) -> None:
        """Let a request arrive at `at_s`, now or later. ValueError if it could never be computed."""
        limits = self.limits
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise ValueError(f"{request.id}: prompt and output must have at least one token")
        if self._blocks(request.prompt_tokens + request.output_tokens - 1) > limits.num_blocks:
            raise ValueError(f"{request.id}: needs more KV blocks than there are")
        if not limits.enable_chunked_prefill and request.prompt_tokens > limits.max_num_batched_tokens:
            raise ValueError(f"{request.id}: the prompt exceeds max_num_batched_tokens and may not be split")
        if self.generated_tokens(request.id) is not None:
            raise ValueError(f"{request.id}: this id is in use")
        if at_s < self._seen_s:
            raise ValueError(f"{request.id}: arrives at {at_s}, but time has advanced to {self._seen_s}")
        if not limits.enable_prefix_caching:
            request = replace(request, block_hashes=())
        self._order += 1
        sequence = Sequence(request, at_s, self._order)
        heapq.heappush(self._arrivals, (at_s, self._order, sequence))
        self._arrival_ids[request.id] = sequence

    def cancel(self, request_id: str) -> bool:
        """Forget a request at once; False if there is none. The step in flight keeps its length."""
        if self._step is not None:
            self._step.may_admit_after = True
        if sequence := self._running.get(request_id):
            self._release(sequence, in_step=self._step is not None)
            return True
        if sequence := self._waiting_ids.pop(request_id, None):
            sequence.epoch += 1
            return True
        if sequence := self._arrival_ids.pop(request_id, None):
            self._arrivals = [entry for entry in self._arrivals if entry[2] is not sequence]
            heapq.heapify(self._arrivals)
            return True
        return False

    # -- time

    def next_event(self) -> float:
        """When the next observable change comes if nothing else is submitted; infinity when nothing can change."""
        arrival_s = self._arrivals[0][0] if self._arrivals else math.inf
        step = self._step
        if step is None:
            return max(arrival_s, self._now_s)
        if step.prefills or not self._cohort.size or (step.may_admit_after and self._waiting_ids):
            return step.end_s
        run = self._run_length(self._cohort.steps_to_finish())
        return min(max(arrival_s, step.end_s), step.start_s + self._run_s(step.batch, run))

    def advance(self, until_s: float) -> list[Event]:
        """Let time pass until `until_s` (inclusive) and tell what happened, in order."""
        if until_s < self._seen_s:
            raise ValueError(f"time cannot go back from {self._seen_s} to {until_s}")
        events: list[Event] = []
        while True:
            if self._step is not None:
                if self._step.end_s > until_s:
                    break
                self._complete(self._step, events)
            if not self._begin(until_s, events):
                break
        self._seen_s = until_s if until_s < math.inf else max(self._seen_s, self._now_s)
        return events

    # -- a boundary between two steps

    def _begin(self, until_s: float, events: list[Event]) -> bool:
        """Start the next step, or pass a whole run of steps; False when there is nothing to compute by `until_s`."""
        self._arrive(events)
        if not self._running and not self._waiting_ids:
            return self._skip_idle(until_s)
        prefills: list[tuple[Sequence, int, int]] = []
        pairs = 0
        preempted = self._take_decode_blocks(events)
        budget = self.limits.max_num_batched_tokens - self._cohort.size
        if (sequence := self._prefilling) is not None:
            chunk = min(sequence.target - sequence.computed, budget)
            preempted = self._take_chunk_blocks(sequence, chunk, events) or preempted
            if self._prefilling is not None:
                prefills.append((sequence, sequence.epoch, chunk))
                pairs += _pairs(sequence.computed, chunk)
                budget -= chunk
        if not preempted:
            for sequence, chunk in self._admit(budget, events):
                prefills.append((sequence, sequence.epoch, chunk))
                pairs += _pairs(sequence.computed, chunk)
        if not prefills and not self._cohort.size:
            return self._skip_idle(until_s)
        batch = Batch(
            prefill_tokens=sum(chunk for _, _, chunk in prefills),
            prefill_pairs=pairs,
            decode_sequences=self._cohort.size,
            context_tokens=self._cohort.context_tokens if self._cohort.size else 0,
        )
        if self._coalesce and not prefills and not preempted and self._pass_run(batch, until_s, events):
            return True
        end_s = self._now_s + self.times.step_s(batch)
        self._step = _Step(self._now_s, end_s, batch, prefills, may_admit_after=preempted)
        return True

    def _arrive(self, events: list[Event]) -> None:
        """Move what has arrived by now into the queue."""
        bound = self.limits.max_num_queued_reqs
        while self._arrivals and self._arrivals[0][0] <= self._now_s:
            at_s, _, sequence = heapq.heappop(self._arrivals)
            del self._arrival_ids[sequence.request.id]
            if bound is not None and self.running + self.waiting >= bound:
                events.append(Rejected(at_s, sequence.request))
            else:
                self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        priority = sequence.request.priority if self.limits.scheduling_policy is Policy.PRIORITY else 0
        entry = (priority, sequence.arrival_s, sequence.order, sequence.epoch, sequence)
        heapq.heappush(self._waiting, entry)
        self._waiting_ids[sequence.request.id] = sequence

    def _skip_idle(self, until_s: float) -> bool:
        if self._arrivals and self._arrivals[0][0] <= until_s:
            self._now_s = max(self._now_s, self._arrivals[0][0])
            return True
        return False

    def _pass_run(self, batch: Batch, until_s: float, events: list[Event]) -> bool:
        """Compute all whole steps of a decoding run that end by `until_s` at once; False when not even one does."""
        start_s = self._now_s
        steps = self._run_length(self._cohort.steps_to_finish())
        if self._arrivals:
            # The first boundary at or after an arrival may admit it.
            before = self._steps_by(batch, math.nextafter(self._arrivals[0][0], -math.inf), steps)
            steps = min(steps, before + 1)
        steps = self._steps_by(batch, until_s, steps)
        if steps < 1:
            return False
        self._pool.take(self._cohort.blocks_after_first(steps))
        self._now_s = start_s + self._run_s(batch, steps)
        self._cohort.advance(steps)
        size = self._cohort.size
        events.append(Stepped(start_s, self._now_s, steps, 0, size, size))
        self._finish_decoded(events)
        return True

    def _run_length(self, steps: int) -> int:
        """How many of `steps` decode steps the free blocks carry, the first step's being taken already."""
        return self._cohort.steps_within(self._pool.free, steps)

    def _run_s(self, batch: Batch, steps: int) -> float:
        return self.times.decode_run_s(
            sequences=batch.decode_sequences, context_tokens=batch.context_tokens, steps=steps
        )

    def _steps_by(self, batch: Batch, limit_s: float, most: int) -> int:
        """The largest number of steps, at most `most`, that end by `limit_s`."""
        span_s = limit_s - self._now_s
        if self._run_s(batch, most) <= span_s:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            if self._run_s(batch, middle) <= span_s:
                low = middle
            else:
                high = middle
        return low

    def _complete(self, step: _Step, events: list[Event]) -> None:
        """Give out what the step in flight has computed."""
        self._now_s = step.end_s
        self._step = None
        size = self._cohort.size
        if size:
            self._cohort.advance(1)
        done = [entry for entry in step.prefills if entry[0].epoch == entry[1]]
        whole = [sequence for sequence, _, chunk in done if sequence.computed + chunk == sequence.target]
        events.append(
            Stepped(step.start_s, step.end_s, 1, step.batch.prefill_tokens, size, size + len(whole))
        )
        if size:
            self._finish_decoded(events)
        for sequence, _, chunk in done:
            sequence.computed += chunk
            self._publish(sequence)
        self._prefilling = next((entry[0] for entry in done if entry[0] not in whole), None)
        for sequence in whole:
            self._make_first(sequence, events)

    def _make_first(self, sequence: Sequence, events: list[Event]) -> None:
        sequence.generated += 1
        first = sequence.generated == 1
        events.append((FirstToken if first else Resumed)(self._now_s, sequence.request))
        if sequence.generated == sequence.request.output_tokens:
            self._finish(sequence, events)
        else:
            self._cohort.join(sequence)

    def _finish_decoded(self, events: list[Event]) -> None:
        for sequence in self._cohort.finished():
            self._finish(sequence, events)

    def _finish(self, sequence: Sequence, events: list[Event]) -> None:
        self._release(sequence, in_step=False)
        events.append(Finished(self._now_s, sequence.request, sequence.preemptions))

    # -- blocks

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_size)

    def _take_decode_blocks(self, events: list[Event]) -> bool:
        """Take the blocks that decoding needs for the next step; True if somebody was preempted for them."""
        needed = self._cohort.blocks_now() if self._cohort.size else 0
        if needed <= self._pool.free:
            self._pool.take(needed)
            return False
        taken: set[str] = set()
        for sequence in list(self._running.values()):
            if sequence.joined < 0 or not self._cohort.needs_block_now(sequence):
                continue
            while self._pool.free < 1 and sequence.joined >= 0:
                victim = self._victim()
                self._preempt(victim, events, in_step=victim.request.id in taken)
            if sequence.joined >= 0:
                self._pool.take(1)
                taken.add(sequence.request.id)
        return True

    def _take_chunk_blocks(self, sequence: Sequence, chunk: int, events: list[Event]) -> bool:
        """Take the blocks of the next part of a half-computed prompt; True if somebody was preempted for them."""
        preempted = False
        needed = self._blocks(sequence.computed + chunk) - sequence.private - len(sequence.shared)
        while self._pool.free < needed:
            preempted = True
            victim = self._victim()
            self._preempt(victim, events, in_step=True)
            if victim is sequence:
                return True
        self._pool.take(needed)
        sequence.private += needed
        return preempted

    def _admit(self, budget: int, events: list[Event]) -> Iterator[tuple[Sequence, int]]:
        """Admit waiting requests in order while tokens, sequences and blocks last."""
        limits, pool = self.limits, self._pool
        while budget > 0 and len(self._running) < limits.max_num_seqs:
            sequence = self._head()
            if sequence is None:
                return
            target = sequence.target
            hashes = sequence.request.block_hashes
            # The last token is always computed: its logits make the next one.
            cached = pool.cached_prefix(hashes, (target - 1) // limits.block_size)
            held = hashes[:cached]
            computed = cached * limits.block_size
            if not limits.enable_chunked_prefill and target - computed > budget:
                return
            # Room for the whole sequence must be there, though only the first part is taken.
            kept = int(limits.watermark * limits.num_blocks) if self._running else 0
            if self._blocks(target) - cached + kept > pool.free - pool.idle_among(held):
                return
            chunk = min(target - computed, budget)
            heapq.heappop(self._waiting)
            del self._waiting_ids[sequence.request.id]
            pool.hold(held)
            sequence.shared = list(held)
            sequence.private = self._blocks(computed + chunk) - cached
            pool.take(sequence.private)
            sequence.computed, sequence.published = computed, cached
            sequence.epoch += 1
            self._running[sequence.request.id] = sequence
            events.append(Admitted(self._now_s, sequence.request, computed, sequence.preemptions > 0))
            budget -= chunk
            yield sequence, chunk

    def _head(self) -> Sequence | None:
        """The request to admit next."""
        while self._waiting:
            *_, epoch, sequence = self._waiting[0]
            if epoch == sequence.epoch:
                return sequence
            heapq.heappop(self._waiting)
        return None

    def _victim(self) -> Sequence:
        if self.limits.scheduling_policy is Policy.FCFS:
            return next(reversed(self._running.values()))
        return max(self._running.values(), key=lambda one: (one.request.priority, one.arrival_s, one.order))

    def _preempt(self, sequence: Sequence, events: list[Event], *, in_step: bool) -> None:
        self._release(sequence, in_step=in_step)
        sequence.preemptions += 1
        events.append(Preempted(self._now_s, sequence.request, sequence.generated))
        self._enqueue(sequence)

    def _release(self, sequence: Sequence, *, in_step: bool) -> None:
        """Take a running sequence out of the batch and its blocks back."""
        del self._running[sequence.request.id]
        if sequence.joined >= 0:
            self._cohort.leave(sequence, in_step=in_step)
        if self._prefilling is sequence:
            self._prefilling = None
        self._pool.give_back(sequence.private, tuple(sequence.shared))
        sequence.private, sequence.shared, sequence.computed, sequence.published = 0, [], 0, 0
        sequence.epoch += 1

    def _publish(self, sequence: Sequence) -> None:
        """Offer the prompt blocks that are full now to the prefix cache."""
        hashes = sequence.request.block_hashes
        full = min(len(hashes), sequence.computed // self.limits.block_size)
        for block_hash in hashes[sequence.published : full]:
            if self._pool.publish(block_hash):
                sequence.private -= 1
                sequence.shared.append(block_hash)
        sequence.published = max(sequence.published, full)


def _pairs(computed: int, chunk: int) -> int:
    """Pairs of a new token and a token that it attends to, when `computed` tokens are there already."""
    return chunk * computed + chunk * (chunk + 1) // 2
