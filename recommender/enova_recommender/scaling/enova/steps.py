"""What a replica carries, read off how its steps slow down with what is in them, long before anything is late. Pure.

Theory of operation. A step takes `s = base + each x B + prompt x P`: B sequences that decode, P prompt tokens that are
computed in it. All three are measured (s = B / tokens a second), so least squares over the last quarter of an hour of
all replicas, cut into `BLOCK_S`, tells `base`, `each` and `prompt`; none of them is negative. At r requests a second
of p prompt and o answer tokens, B = r o s and P = r p s, so that

    s(r) = base / (1 - r (each o + prompt p))

Three things bound r: s may be `TPOT_SHARE` of the objective (the mean; the tail takes the rest), and the sequences may
take `FULL_SHARE` of the KV cache and of the seats, of which each was seen to take so much. The fit is trusted to
`BEYOND` times what a replica has carried: further out it says what was never seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from enova_recommender.scaling.enova.demand import last
from enova_recommender.scaling.situation import Floats, Signal, Situation, VariantSight

BLOCK_S = 20.0
BLOCKS_MIN = 12
MIX_S = 300.0                 # of which a request's tokens are taken
FINISHED_MIN = 20             # requests that they rest on
TPOT_SHARE = 0.72
FULL_SHARE = 0.7
BEYOND = 2.0
RUNNING_MIN = 0.5             # sequences, below which a block says nothing of steps
_NEEDED = (Signal.RUNNING, Signal.GENERATION_TOKENS, Signal.PROMPT_TOKENS, Signal.FINISHED)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Blocks:
    """Means by block: sequences, prompt and answer tokens a second, requests a second, share of the KV cache."""

    running: Floats
    prompt: Floats
    answer: Floats
    finished: Floats
    kv_usage: Floats


def rate_by_steps(situation: Situation, variant: VariantSight, rows: list[int]) -> float | None:
    """Requests a second, of the mix of now, that a replica carries by its steps; None where they tell too little."""
    values = situation.recent.values
    if not rows or any(signal not in values or not values[signal].size for signal in _NEEDED):
        return None
    tokens = _tokens(situation, rows)
    blocks = _blocks(situation, rows)
    if tokens is None or len(blocks.running) < BLOCKS_MIN:
        return None
    prompt, answer = tokens
    base, each, by_prompt = _fitted(blocks)
    slope = each * answer + by_prompt * prompt
    step_s = TPOT_SHARE * situation.objective.tpot_s
    if base <= 0 or slope <= 0 or base >= step_s:
        return None
    by_tpot = (1 - base / step_s) / slope
    taken = max(float(blocks.kv_usage.sum() / blocks.running.sum()), 1 / max(variant.capacity.max_num_seqs, 1))
    by_room = FULL_SHARE / (taken * answer * base + FULL_SHARE * slope)
    return min(by_tpot, by_room, BEYOND * float(np.quantile(blocks.finished, 0.9)))


def _fitted(blocks: _Blocks) -> tuple[float, float, float]:
    """Seconds of a step: at no load, of each sequence, of each prompt token; errors count as shares."""
    step_s = blocks.running / blocks.answer
    columns = np.stack([np.ones_like(step_s), blocks.running, blocks.prompt * step_s], axis=1)
    scale = columns.max(axis=0)
    scale[scale <= 0] = 1.0
    found, _ = nnls(columns / scale / step_s[:, None], np.ones_like(step_s))
    base, each, by_prompt = (found / scale).tolist()
    return base, each, by_prompt


def _blocks(situation: Situation, rows: list[int]) -> _Blocks:
    recent = situation.recent
    size = max(1, round(BLOCK_S / recent.step_s))

    def cut(signal: Signal) -> Floats:
        found = recent.values.get(signal)
        if found is None or not found.size:
            return np.zeros(len(rows) * (recent.values[Signal.RUNNING].shape[1] // size))
        count = found.shape[1] // size
        return np.asarray(found[rows, found.shape[1] - count * size :].reshape(len(rows) * count, size).mean(axis=1))

    running, answer = cut(Signal.RUNNING), cut(Signal.GENERATION_TOKENS) / recent.step_s
    prompt, finished = cut(Signal.PROMPT_TOKENS) / recent.step_s, cut(Signal.FINISHED) / recent.step_s
    known = ~np.isnan(running + answer + prompt + finished)
    known &= (np.nan_to_num(running) >= RUNNING_MIN) & (np.nan_to_num(answer) > 0)
    return _Blocks(
        running=running[known], prompt=prompt[known], answer=answer[known], finished=finished[known],
        kv_usage=np.nan_to_num(cut(Signal.KV_CACHE_USAGE)[known]),
    )


def _tokens(situation: Situation, rows: list[int]) -> tuple[float, float] | None:
    """Prompt tokens that are computed and answer tokens of a request of now."""
    recent = situation.recent
    finished, prompt, answer = (
        float(np.nansum(last(recent.values[signal][rows], recent.step_s, MIX_S)))
        for signal in (Signal.FINISHED, Signal.PROMPT_TOKENS, Signal.GENERATION_TOKENS)
    )
    return (prompt / finished, answer / finished) if finished >= FINISHED_MIN else None
