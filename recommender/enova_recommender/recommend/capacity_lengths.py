"""A workload's lengths, boiled down to what the closed form of a replica's behaviour needs of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from enova_recommender.recommend.errors import RecommendError
from enova_recommender.recommend.types import LENGTHS_MAX, Objectives, Workload

Floats = npt.NDArray[np.float64]

# Bounds of the groups of equally ranked lengths. Long prompts make the percentiles of TTFT, short outputs (few steps
# to average over) those of TPOT: there the groups are finer.
PROMPT_RANKS = (0, 0.15, 0.3, 0.45, 0.6, 0.7, 0.8, 0.88, 0.93, 0.96, 0.98, 0.99, 1)
OUTPUT_RANKS = (0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1)
# Decode steps that a request without any counts as, so that rates stay a function of the sequences in the batch.
STEPS_MIN = 0.01
SAMPLE_MAX = 64  # requests whose KV blocks are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Moments and groups of the lengths of a workload; weights of groups add up to 1."""

    prompt_tokens: Floats     # of each group of prompts: tokens that must be computed, cached ones left out
    prompt_pairs: Floats      # pairs of a computed token and a token that it attends to
    prompt_weights: Floats
    decode_steps: Floats      # of each group of outputs: tokens after the first
    decode_weights: Floats
    mean_prompt_tokens: float
    mean_output_tokens: float
    mean_decode_steps: float
    decode_scv: float         # squared coefficient of variation of the decode steps
    context_tokens: float     # that a decoding sequence attends to, over its steps
    held_tokens: float        # KV tokens of its own that a decoding sequence holds, over its steps
    sample: tuple[tuple[int, int], ...]  # computed prompt and output tokens of some requests, evenly by size
    shared_tokens: int        # KV tokens that all sequences share
    longest_tokens: int       # prompt and output of the longest request


def check_workload(workload: Workload) -> None:
    """RecommendError if no advice can be given for such requests."""
    rate = workload.requests_per_s
    if not (math.isfinite(rate) and rate > 0):
        raise RecommendError("workload.requests_per_s", f"must be a positive number, is {rate}")
    if not workload.lengths:
        raise RecommendError("workload.lengths", "must hold at least one pair of prompt and output tokens")
    if len(workload.lengths) > LENGTHS_MAX:
        raise RecommendError(
            "workload.lengths", f"holds {len(workload.lengths)} pairs, at most {LENGTHS_MAX} are taken: thin them"
        )
    for index, (prompt, output) in enumerate(workload.lengths):
        if prompt < 1 or output < 1:
            raise RecommendError(
                f"workload.lengths[{index}]", f"prompt and output need at least 1 token, have {prompt} and {output}"
            )
    if not (math.isfinite(workload.arrival_cv) and workload.arrival_cv >= 0):
        raise RecommendError("workload.arrival_cv", f"must be 0 or more, is {workload.arrival_cv}")
    if not 0 <= workload.cached_prefix_share < 1:
        raise RecommendError("workload.cached_prefix_share", f"must be in [0, 1), is {workload.cached_prefix_share}")


def check_objectives(objectives: Objectives) -> None:
    """RecommendError if the objectives cannot be meant."""
    for name in ("ttft_s", "tpot_s"):
        value = getattr(objectives, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise RecommendError(f"objectives.{name}", f"must be a positive number of seconds, is {value}")
    if not 0 < objectives.percentile < 1:
        raise RecommendError("objectives.percentile", f"must lie between 0 and 1, is {objectives.percentile}")


def lengths_of(workload: Workload, *, prefix_caching: bool) -> Lengths:
    """The moments and groups of a workload's lengths."""
    prompt, output = np.asarray(workload.lengths, dtype=np.float64).T
    share = workload.cached_prefix_share if prefix_caching else 0.0
    cached = np.minimum(np.floor(share * prompt), prompt - 1)  # the last token is always computed
    computed = prompt - cached
    pairs = computed * cached + computed * (computed + 1) / 2
    steps = output - 1
    mean_steps = max(float(steps.mean()), STEPS_MIN)
    # A sequence is met in the batch as often as it makes steps, so what it holds is weighted with them.
    weights = steps / steps.sum() if steps.any() else np.full(len(steps), 1 / len(steps))
    order = np.argsort(computed + output, kind="stable")
    thinned = order[:: max(1, -(-len(order) // SAMPLE_MAX))]
    sample = tuple((int(computed[one]), int(output[one])) for one in thinned)
    tokens_, weights_, pairs_ = _groups(computed, pairs, PROMPT_RANKS)
    several = steps[steps > 0] if steps.any() else np.ones(1)
    steps_, step_weights, _ = _groups(several, several, OUTPUT_RANKS)
    return Lengths(
        prompt_tokens=tokens_, prompt_pairs=pairs_, prompt_weights=weights_,
        decode_steps=steps_, decode_weights=step_weights,
        mean_prompt_tokens=float(computed.mean()), mean_output_tokens=float(output.mean()),
        mean_decode_steps=mean_steps, decode_scv=float(steps.var()) / mean_steps**2,
        context_tokens=float(weights @ (prompt + output / 2)),
        held_tokens=float(weights @ (computed + output / 2)), sample=sample,
        shared_tokens=int(cached.max()), longest_tokens=int((prompt + output).max()),
    )  # fmt: skip


def _groups(values: Floats, companion: Floats, ranks: tuple[float, ...]) -> tuple[Floats, Floats, Floats]:
    """Means of equally ranked groups of values, their weights, and the companion's means in the same groups."""
    order = np.argsort(values, kind="stable")
    beside, ranked = companion[order], values[order]
    bounds = np.unique(np.round(np.array(ranks) * len(ranked)).astype(int))
    counts = np.diff(bounds)
    means = np.add.reduceat(ranked, bounds[:-1]) / counts
    companions = np.add.reduceat(beside, bounds[:-1]) / counts
    # Groups of one value become one: a workload of fixed lengths costs no more than it must.
    first = np.concatenate(([True], means[1:] != means[:-1]))
    starts = np.flatnonzero(first)
    weights = np.add.reduceat(counts, starts) / counts.sum()
    return means[starts], weights, np.add.reduceat(companions * counts, starts) / np.add.reduceat(counts, starts)
