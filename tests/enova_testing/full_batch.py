"""A replica whose batch is always full: how fast tokens follow each other, and how many come.

Theory of operation. With n sequences decoding at all times, n / L prompts end up in each step on average (L decode
steps a request), and how many come into one step is Poisson. A step lasts d, or d plus what its prompts add; prompts
beyond `max_num_batched_tokens` go on in the next. This is what clients see who send the next request as soon as one is
answered. The product's own limit on full batches (`capacity.sequence_limits`) has the mean alone, from its curve of
open arrivals: this is reckoned in another way, and a test holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from enova_recommender.recommend.capacity import INTERVAL_SHARE, factor_of
from enova_recommender.recommend.capacity_curve import TINY, VectorTimes, gamma_share
from enova_recommender.recommend.capacity_lengths import Lengths
from enova_recommender.types import Interval

BISECTIONS = 30
REACH = 12.0              # standard deviations beyond the mean within which a quantile is sought


@dataclass(frozen=True, slots=True, kw_only=True)
class FullBatch:
    """What one replica does with all its slots in use."""

    sequences: float
    step_s: Interval          # between two tokens of a sequence, at the percentile asked for
    mean_step_s: float        # time per output token
    decode_s: float           # of a step without prompts
    requests_per_s: float
    tokens_per_s: float       # decoded
    spread: float             # standard deviation of the logarithm of the error of the times


def full_batch(
    times: VectorTimes,
    lengths: Lengths,
    *,
    sequences: float,
    max_num_batched_tokens: int,
    lanes: int = 1,
    percentile: float = 0.5,
) -> FullBatch:
    """One replica whose lanes each decode `sequences` at all times."""
    context, weights = sequences * lengths.context_tokens, lengths.prompt_weights
    decode = float(times.steps_s(0, 0, sequences, context))
    arrivals = sequences / lengths.mean_decode_steps
    shared = arrivals / max(1 - np.exp(-arrivals), TINY)  # prompts of a step that holds any
    budget = max(max_num_batched_tokens - sequences, 1.0)
    tokens = np.minimum(lengths.prompt_tokens + (shared - 1) * lengths.mean_prompt_tokens, budget)
    share = tokens / lengths.prompt_tokens
    mixed = times.steps_s(tokens, share * lengths.prompt_pairs, sequences, context)
    added = np.maximum(mixed - decode, 0.0) / share
    mean_added, square = float(weights @ added), float(weights @ added**2)
    # Beyond the budget the prompts set the pace: so many steps must be full of them.
    filled = arrivals * lengths.mean_prompt_tokens / budget
    mean = max(1.0, filled) * decode + arrivals * mean_added
    quantile = _step_quantile(
        decode=decode, arrivals=arrivals / max(1.0, filled), mean=mean_added, square=square, percentile=percentile,
        crowded=max(filled, 1 - float(np.exp(-arrivals))),
    )  # fmt: skip
    requests = sequences / (lengths.mean_decode_steps * mean)
    outer = factor_of(times.spread, (1 + INTERVAL_SHARE) / 2)
    return FullBatch(
        sequences=lanes * sequences,
        step_s=Interval(value=quantile, low=quantile / outer, high=quantile * outer),
        mean_step_s=mean,
        decode_s=decode,
        requests_per_s=lanes * requests,
        tokens_per_s=lanes * requests * lengths.mean_output_tokens,
        spread=times.spread,
    )


def _step_quantile(
    *, decode: float, arrivals: float, mean: float, square: float, percentile: float, crowded: float
) -> float:
    """The percentile of the time between tokens; `crowded` of the steps hold prompts, a compound Poisson sum."""
    if percentile <= 1 - crowded or mean <= TINY:
        return decode
    holding = 1 - np.exp(-arrivals)
    each_mean = arrivals * mean / holding
    variance = max(arrivals * square / holding + (arrivals * mean) ** 2 / holding - each_mean**2, TINY**2)
    wanted = (percentile - (1 - crowded)) / crowded
    low, high = 0.0, each_mean + REACH * float(np.sqrt(variance))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = float(gamma_share(np.array(middle), np.array(each_mean), np.array(variance)))
        low, high = (middle, high) if found < wanted else (low, middle)
    return float(decode + (low + high) / 2)
