"""Step times as tables, which compiled code can read: any `StepTimes` asked once on a grid.

Theory of operation. A step is a sum of four parts: one that depends on its tokens, one on the sequences that decode
beside a prompt part (or alone), one on their context, one on the pairs of the prompt part. Tokens and sequences are
asked one by one; context and pairs on the knots that measured kernels have, linear between them. So `Affine`,
`Roofline` and decode steps of `KernelTimes` are exact; where kernels of prompts and of decoding share a step, the sum
is an approximation, whose error a test holds under 2 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from enova_recommender.performance import StepTimes
from enova_recommender.performance.layers import CONTEXT, PAIRS, TOKENS
from enova_recommender.types import Batch
from enova_simulator.cluster.kernel.state import Floats, Tables
from enova_simulator.cluster.kernel.times import run_seconds, step_seconds

MIXED_AT_TOKENS = 512              # of a prompt part, where what a sequence adds beside it is asked

_CONTEXT = np.concatenate([[0.0], np.floor(CONTEXT)])
_PAIRS = np.concatenate([[0.0], np.floor(PAIRS)])
_PROMPTS = np.concatenate([[0.0], np.floor(TOKENS)])


@dataclass(frozen=True, slots=True)
class Tabulated:
    """The step times that the compiled engines of one kind have."""

    tables: Tables

    def step_s(self, batch: Batch) -> float:
        """Duration of one step."""
        prefill = (batch.prefill_tokens, batch.prefill_pairs)
        return float(step_seconds(self.tables, 0, prefill, batch.decode_sequences, batch.context_tokens))

    def decode_run_s(self, *, sequences: int, context_tokens: int, steps: int) -> float:
        """Duration of a run of decode steps."""
        return float(run_seconds(self.tables, 0, sequences, context_tokens, steps))


def tabulated(times: StepTimes, *, max_num_seqs: int, max_num_batched_tokens: int) -> Tabulated:
    """These times for batches within these limits."""
    tokens = [_step_s(times, prompts, 0, 0, 0) for prompts in range(1, max_num_batched_tokens + 1)]
    alone = [_step_s(times, 0, 0, count, 0) for count in range(1, max_num_seqs + 1)]
    beside = min(MIXED_AT_TOKENS, max(1, max_num_batched_tokens - max_num_seqs))
    mixed = [
        _step_s(times, beside, 0, count, 0) - tokens[min(beside + count, max_num_batched_tokens) - 1]
        for count in range(1, max_num_seqs + 1)
    ]
    context = np.zeros((max_num_seqs + 1, len(_CONTEXT)))
    for count in range(1, max_num_seqs + 1):
        context[count] = [_step_s(times, 0, 0, count, int(read)) - alone[count - 1] for read in _CONTEXT]
    pairs = np.zeros((len(_PROMPTS), len(_PAIRS)))
    for row, prompts in enumerate(_PROMPTS[1:], start=1):
        without_s = _step_s(times, int(prompts), 0, 0, 0)
        pairs[row] = [_step_s(times, int(prompts), int(count), 0, 0) - without_s for count in _PAIRS]
    pairs[0] = pairs[1]            # less than the first knot of tokens: as there
    return Tabulated(Tables(
        tokens=np.array([[0.0, *tokens]]), mixed=np.array([[0.0, *mixed]]), decode=np.array([[0.0, *alone]]),
        context=context[np.newaxis], context_knots=_CONTEXT,
        pairs=pairs[np.newaxis], prompt_knots=_PROMPTS, pair_knots=_PAIRS,
    ))  # fmt: skip


def stacked(kinds: Sequence[Tabulated]) -> Tables:
    """The tables of several kinds as one; a kind's number is its place."""
    parts = [kind.tables for kind in kinds]
    return Tables(
        tokens=_stack([part.tokens for part in parts]), mixed=_stack([part.mixed for part in parts]),
        decode=_stack([part.decode for part in parts]), context=_stack([part.context for part in parts]),
        context_knots=_CONTEXT, pairs=_stack([part.pairs for part in parts]), prompt_knots=_PROMPTS,
        pair_knots=_PAIRS,
    )  # fmt: skip


def _step_s(times: StepTimes, prompts: int, pairs: int, decode: int, context: int) -> float:
    return times.step_s(Batch(
        prefill_tokens=prompts, prefill_pairs=pairs, decode_sequences=decode, context_tokens=context
    ))  # fmt: skip


def _stack(arrays: Sequence[Floats]) -> Floats:
    """One after another along the first axis, filled up: what is beyond a kind's limits is not read."""
    shape = tuple(np.max([array.shape[1:] for array in arrays], axis=0))
    filled = np.full((len(arrays), *shape), np.nan)
    for place, array in enumerate(arrays):
        filled[place][tuple(slice(0, length) for length in array.shape[1:])] = array[0]
    return filled
