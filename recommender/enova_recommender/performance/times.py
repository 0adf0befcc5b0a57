"""Step times: what the scheduler asks for, and the simplest ways to answer.

`StepTimes` is given by the world. `Affine` is what fits and what files carry; `Slowed` makes other times longer. Times
of measured engines may also tell what passes between a request and its first token beside its prompt's steps
(`FirstTokenDelay`): others do not know it, and count none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, overload, runtime_checkable

import numpy as np
import numpy.typing as npt

from enova_recommender.types import Batch


class StepTimes(Protocol):
    """Durations of engine steps, in seconds; pure, and growing with each part of the batch."""

    def step_s(self, batch: Batch) -> float:
        """Duration of one step."""

    def decode_run_s(self, *, sequences: int, context_tokens: int, steps: int) -> float:
        """Duration of `steps` steps in a row that only decode the same sequences.

        `context_tokens` is that of the first step; each step adds one token a sequence.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTokenDelay:
    """What a first token takes beside its prompt's steps: tokenising, HTTP, and the decode steps meanwhile."""

    seconds: float = 0.0
    decode_steps: float = 0.0

    @overload
    def after_s(self, decode_s: float) -> float: ...

    @overload
    def after_s(self, decode_s: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]: ...

    def after_s(self, decode_s: float | npt.NDArray[np.float64]) -> float | npt.NDArray[np.float64]:
        """The delay where a step that only decodes takes so long."""
        return self.seconds + self.decode_steps * decode_s


NO_DELAY = FirstTokenDelay()


@runtime_checkable
class Delayed(Protocol):
    """Step times that know the delay of first tokens."""

    @property
    def first_token_delay(self) -> FirstTokenDelay:
        """Beside the steps of the prompt."""


def first_token_delay(times: StepTimes) -> FirstTokenDelay:
    """The delay of first tokens, none where the times know of none."""
    return times.first_token_delay if isinstance(times, Delayed) else NO_DELAY


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """Step times that are affine in each part of the batch: what fits and what files carry."""

    base_s: float
    prefill_token_s: float = 0.0
    prefill_pair_s: float = 0.0
    sequence_s: float = 0.0
    context_token_s: float = 0.0

    def step_s(self, batch: Batch) -> float:
        """Duration of one step."""
        return (
            self.base_s
            + self.prefill_token_s * batch.prefill_tokens
            + self.prefill_pair_s * batch.prefill_pairs
            + self.sequence_s * batch.decode_sequences
            + self.context_token_s * batch.context_tokens
        )

    def decode_run_s(self, *, sequences: int, context_tokens: int, steps: int) -> float:
        """Duration of a run of decode steps."""
        fixed = self.base_s + self.sequence_s * sequences
        return fixed * steps + self.context_token_s * read_tokens(sequences, context_tokens, steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slowed:
    """Other step times, each `factor` times as long."""

    times: StepTimes
    factor: float

    def step_s(self, batch: Batch) -> float:
        """Duration of one step."""
        return self.factor * self.times.step_s(batch)

    def decode_run_s(self, *, sequences: int, context_tokens: int, steps: int) -> float:
        """Duration of a run of decode steps."""
        return self.factor * self.times.decode_run_s(
            sequences=sequences, context_tokens=context_tokens, steps=steps
        )


def read_tokens(sequences: int, context_tokens: int, steps: int) -> int:
    """KV tokens that a run of decode steps reads in all."""
    return context_tokens * steps + sequences * (steps * (steps - 1) // 2)
