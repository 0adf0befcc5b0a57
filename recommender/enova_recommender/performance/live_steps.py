"""How long the steps of a running engine took, and what they computed, from the counters that vLLM exposes.

Theory of operation. Between two looks at an engine its counters moved by: S steps, P computed prompt tokens, R first
tokens, and D tokens after a first one with the time since the token before (`inter_token_latency_seconds`), I seconds
in all. A step is seen by each sequence that decodes in it as one such gap, so I / D is the mean duration of a step
weighted by its decoding sequences; it holds no idle time. The batch is weighted likewise. Of the S steps

    K = min(S, max(R / n, P / max_num_batched_tokens))       hold a prompt (n = 1: prompts rarely share a step),
    n = (D + R) / S                                          sequences run in each on mean, so that
    n in a step without a prompt, max(0, n - R / K) in one with it, decode.

Steps with a prompt in which nobody decodes have no weight: nobody waited for a next token meanwhile. Context is the KV
tokens held, shared out evenly over the running sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from enova_recommender.types import Batch

TOKENS_MIN = 8.0           # gaps below which a frame says nothing
PART_MIN = 1e-3            # shares of steps that are left out
FULL_STEPS = 8.0           # a mean over fewer steps is noisier in proportion


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChange:
    """What an engine's counters moved by between two looks, and its gauges on mean."""

    steps: float
    prompt_tokens: float           # computed: what the prefix cache held is left out
    first_tokens: float
    decode_tokens: float           # gaps between tokens of one sequence
    decode_s: float                # their sum
    context_tokens: float          # KV tokens of one running sequence
    preemptions: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedStep:
    """The mean duration of some steps, and what they computed: batches with their shares, which add up to 1."""

    parts: tuple[tuple[float, Batch], ...]
    step_s: float
    steps: float = FULL_STEPS

    @classmethod
    def of(cls, batch: Batch, step_s: float) -> ObservedStep:
        """A measurement of one batch, as benchmarks make them."""
        return cls(parts=((1.0, batch),), step_s=step_s)


def observed_step(change: EngineChange, *, batched_tokens_max: float) -> ObservedStep | None:
    """What a change tells of steps; None if too little was decoded, or sequences were interrupted meanwhile."""
    figures = (change.steps, change.prompt_tokens, change.first_tokens, change.decode_tokens, change.decode_s)
    if not all(math.isfinite(figure) and figure >= 0 for figure in (*figures, change.context_tokens)):
        return None
    # A preempted sequence waits: its gap is no step.
    if change.preemptions or change.steps < 1 or change.decode_tokens < TOKENS_MIN or change.decode_s <= 0:
        return None
    steps, first = change.steps, change.first_tokens
    with_prompt = min(steps, max(first, change.prompt_tokens / batched_tokens_max))
    running = (change.decode_tokens + first) / steps
    beside = max(0.0, running - first / with_prompt) if with_prompt else 0.0
    weights = with_prompt * beside, (steps - with_prompt) * running
    parts: list[tuple[float, Batch]] = []
    if weights[0]:
        chunk = change.prompt_tokens / with_prompt
        parts += _parts(weights[0], beside, change.context_tokens, chunk, _pairs(change, with_prompt))
    if weights[1]:
        parts += _parts(weights[1], running, change.context_tokens, 0.0, 0.0)
    total = sum(weight for weight, _ in parts)
    if not total:
        return None
    return ObservedStep(
        parts=tuple((weight / total, batch) for weight, batch in parts if weight > PART_MIN * total),
        step_s=change.decode_s / change.decode_tokens,
        steps=steps,
    )


def _pairs(change: EngineChange, with_prompt: float) -> float:
    """Pairs of a prompt's token and one before it, in a step with a prompt: half the square of its length."""
    if not change.first_tokens:
        return change.prompt_tokens / with_prompt * change.context_tokens  # pieces of long prompts
    return change.prompt_tokens / with_prompt * (change.prompt_tokens / change.first_tokens) / 2


def _parts(weight: float, sequences: float, context: float, prompt: float, pairs: float) -> list[tuple[float, Batch]]:
    """A batch of a mean number of sequences as the two whole numbers around it."""
    low = math.floor(sequences)
    share = sequences - low
    found = []
    for count, part in ((low, 1 - share), (low + 1, share)):
        # The step is seen by the sequences that decode in it.
        if count and part:
            batch = Batch(
                prefill_tokens=round(prompt),
                prefill_pairs=round(pairs),
                decode_sequences=count,
                context_tokens=round(count * context),
            )
            found.append((weight * part * count / sequences, batch))
    return found
