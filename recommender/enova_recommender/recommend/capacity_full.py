"""A replica whose batch is always full: how fast tokens follow each other, how many come, and which limit to choose.

Theory of operation. With n sequences decoding at all times, n / L prompts end up in each step on average (L decode
steps a request), and how many come into one step is Poisson. A step lasts d, or d plus what its prompts add; prompts
beyond `max_num_batched_tokens` go on in the next. This is what clients see who send the next request as soon as one is
answered, and what max_num_seqs means for the time between tokens when load is high. Advice itself counts open arrivals
(`capacity`); so far only the benchmark of choices, `recommender_choice`, asks this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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

    def bound_s(self, assurance: float) -> float:
        """The time between tokens that is not exceeded with this chance, given the model's own error."""
        return self.step_s.value * factor_of(self.spread, assurance)

    def of_mean(self) -> FullBatch:
        """The same with the mean time between tokens in place of the percentile."""
        scale = self.mean_step_s / self.step_s.value
        low, high = self.step_s.low * scale, self.step_s.high * scale
        return replace(self, step_s=Interval(value=self.mean_step_s, low=low, high=high))

    def corrected(self, *, step_s: float, spread: float) -> FullBatch:
        """The same with another time between tokens and its error; all other times in proportion."""
        scale, outer = step_s / self.step_s.value, factor_of(spread, (1 + INTERVAL_SHARE) / 2)
        return replace(
            self, step_s=Interval(value=step_s, low=step_s / outer, high=step_s * outer), spread=spread,
            mean_step_s=self.mean_step_s * scale, decode_s=self.decode_s * scale,
            requests_per_s=self.requests_per_s / scale, tokens_per_s=self.tokens_per_s / scale,
        )  # fmt: skip

    def measured(self, *, step_s: float, tokens_per_s: float) -> FullBatch:
        """The same as it was measured: no error is left."""
        return replace(
            self, step_s=Interval(value=step_s, low=step_s, high=step_s), tokens_per_s=tokens_per_s, spread=0.0
        )


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


def choose(options: Sequence[tuple[FullBatch, float]], *, target_s: float, assurance: float) -> int:
    """Of replicas and their prices, the place of the one with the most tokens a second and price within the target.

    A replica is within it if its time between tokens is with the wanted chance. Where none is, the one that comes
    closest is chosen: a wrong guess costs more there than anywhere.
    """
    bounds = np.array([option.bound_s(assurance) for option, _ in options])
    worth = np.array([option.tokens_per_s / price for option, price in options])
    inside = bounds <= target_s
    return int(np.argmax(np.where(inside, worth, -np.inf)) if inside.any() else np.argmin(bounds))


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
