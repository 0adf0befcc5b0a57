"""The sequences that decode together: every step gives each of them one token.

Nothing is updated per sequence and step. One counter of decode steps tells how far each has come since it joined;
the steps at which a sequence needs its next KV block are those congruent to its phase modulo the block size, so a
table of phases tells what any run of steps needs; a heap tells who finishes first.
"""

from __future__ import annotations

import heapq

from enova_recommender.engine.events import Request


class Sequence:
    """A request on its way through the scheduler."""

    __slots__ = (
        "arrival_s",
        "computed",
        "epoch",
        "generated",
        "joined",
        "order",
        "preemptions",
        "private",
        "published",
        "request",
        "shared",
    )  # fmt: skip

    def __init__(self, request: Request, arrival_s: float, order: int) -> None:
        self.request = request
        self.arrival_s = arrival_s
        self.order = order
        self.epoch = 0  # counts admissions and the end: what was noted under an older one is void
        self.computed = 0  # tokens whose keys and values are in the cache
        self.generated = 0
        self.joined = -1  # the cohort's counter when it joined, or -1 outside the cohort
        self.private = 0
        self.shared: list[int] = []
        self.published = 0  # leading full prompt blocks that were offered to the prefix cache
        self.preemptions = 0

    @property
    def target(self) -> int:
        """Tokens to compute before the next one can be made, when it is not in the cohort."""
        return self.request.prompt_tokens + self.generated


class Cohort:
    """All sequences whose prompt is computed."""

    def __init__(self, block_size: int) -> None:
        self.size = 0
        self.steps = 0  # decode steps since the beginning
        self._kv_tokens = 0  # in the cache, of all members
        self._block_size = block_size
        self._phases = [0] * block_size
        self._finishes: list[tuple[int, int, int, Sequence]] = []

    @property
    def context_tokens(self) -> int:
        """KV tokens that the next step reads, the new ones included."""
        return self._kv_tokens + self.size

    def join(self, sequence: Sequence) -> None:
        """Take in a sequence whose first or next token has just been made."""
        sequence.joined = self.steps
        self.size += 1
        self._kv_tokens += sequence.computed
        self._phases[self._phase(sequence)] += 1
        remaining = sequence.request.output_tokens - sequence.generated
        heapq.heappush(self._finishes, (self.steps + remaining, sequence.order, sequence.epoch, sequence))

    def leave(self, sequence: Sequence, *, in_step: bool) -> None:
        """Let a sequence go; `in_step` if the block for the step in progress is already its own."""
        self._phases[self._phase(sequence)] -= 1
        steps = self.steps - sequence.joined
        sequence.computed += steps
        sequence.generated += steps
        sequence.joined = -1
        self._kv_tokens -= sequence.computed
        self.size -= 1
        sequence.private = -(-(sequence.computed + in_step) // self._block_size) - len(sequence.shared)

    def generated(self, sequence: Sequence) -> int:
        """Tokens made so far by any sequence."""
        return sequence.generated + (self.steps - sequence.joined if sequence.joined >= 0 else 0)

    def needs_block_now(self, sequence: Sequence) -> bool:
        """Whether the next step of this member begins a block."""
        return self._phase(sequence) == self.steps % self._block_size

    def blocks_now(self) -> int:
        """Blocks that the next step begins."""
        return self._phases[self.steps % self._block_size]

    def steps_within(self, blocks: int, limit: int) -> int:
        """How many steps, at most `limit`, begin no more than `blocks` blocks after those of the first step."""
        cycles, left = divmod(blocks, self.size)
        steps = 1 + cycles * self._block_size
        while steps < limit:
            left -= self._phases[(self.steps + steps) % self._block_size]
            if left < 0:
                break
            steps += 1
        return min(steps, limit)

    def blocks_after_first(self, steps: int) -> int:
        """Blocks that a run of `steps` steps begins, those of its first step left out."""
        cycles, rest = divmod(steps - 1, self._block_size)
        first = self.steps + 1
        return cycles * self.size + sum(self._phases[(first + i) % self._block_size] for i in range(rest))

    def advance(self, steps: int) -> None:
        """Every member made `steps` tokens."""
        self.steps += steps
        self._kv_tokens += steps * self.size

    def steps_to_finish(self) -> int:
        """Steps until the first member has all its tokens."""
        while self._finishes[0][2] != self._finishes[0][3].epoch:
            heapq.heappop(self._finishes)
        return self._finishes[0][0] - self.steps

    def finished(self) -> list[Sequence]:
        """Members that have all their tokens; the caller lets them leave."""
        done = []
        while self._finishes and self._finishes[0][0] <= self.steps:
            _, _, epoch, sequence = heapq.heappop(self._finishes)
            if epoch == sequence.epoch:
                done.append(sequence)
        return done

    def _phase(self, sequence: Sequence) -> int:
        return (sequence.joined - sequence.computed) % self._block_size
