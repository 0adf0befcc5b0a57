"""How one group of replicas behaves as its load grows: rate, TTFT and TPOT over the sequences in the batch.

Theory of operation. All that a load does is a function of n, the mean number of decoding sequences. A sequence shares
its steps with those it meets, n + 1 in all (Poisson arrivals; the product form of processor sharing), so a step that
only decodes takes d(n + 1). Each prompt lengthens the steps that carry it by s in sum. Time is decode steps and what
prompts add, so a decode step takes on average d / (1 - r), r = rate E[s]. While a prompt's own steps o ran, others
came, r o of work, which is done right after its first token. So with L decode steps a request Little's law is
n = rate (L d + r o) / (1 - r): a quadratic equation for the rate, solved without iteration. Prompts that come during
one step share the next; s is then their fair part of that step, by a second pass.

TPOT of a request with k steps: the time that work w = k d + r o takes while prompts interrupt it is the delay busy
period of an M/G/1 queue (Takacs 1962), mean w / (1 - r) and variance w rate E[s^2] / (1 - r)^3; nothing interrupts it
with probability exp(-rate (k d + o)), else what prompts add is taken as gamma with matched moments. Besides, n itself
moves: by the linear noise approximation its variance is rate / (d rate / d n), averaged over the request's life.

TTFT: a prompt waits for the step in progress and for the prompts before it, then for its own steps. Prompts that
arrive during one step are computed together in the next: a gated M/G/1 queue, whose wait is corrected for the
variability of arrivals as by Allen and Cunneen (1990). A prompt's service x is s and its share of the decode steps
that its tokens fill. The queue's wait is 0 with probability 1 - rate E[x], else gamma with matched moments. What the
server takes beside (`FirstTokenDelay`: seconds, and some steps d) is added; it delays all tokens of an answer alike,
so TPOT knows nothing of it, and it holds no slot.

Quantiles are those of the mixture over the groups of lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from enova_recommender.performance import FirstTokenDelay, StepTimes, first_token_delay
from enova_recommender.recommend.capacity_lengths import Floats, Lengths
from enova_recommender.types import Batch

GRID_POINTS = 56
UNLOADED = 0.02           # share of the prompts' saturation that counts as no load
BISECTIONS = 11           # of a quantile, whose last bracket is then interpolated
UNSTABLE = 0.999          # utilisation from which a queue counts as without bound
SHAPE_MAX = 1e6           # of a gamma distribution: from there on it is normal
TINY = 1e-12


class VectorTimes(StepTimes, Protocol):
    """Step times that answer for whole arrays, and know their own error."""

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm of measured over predicted."""

    def steps_s(
        self,
        prefill_tokens: npt.ArrayLike,
        prefill_pairs: npt.ArrayLike,
        decode_sequences: npt.ArrayLike,
        context_tokens: npt.ArrayLike,
    ) -> Floats:
        """Durations of steps; the arguments are broadcast."""


@runtime_checkable
class Doubtful(Protocol):
    """Step times that know how their error depends on the batch."""

    def spreads(self, decode_sequences: npt.ArrayLike, context_tokens: npt.ArrayLike) -> Floats:
        """Standard deviations of the logarithm of measured over predicted, of steps that only decode."""


def spreads_of(times: VectorTimes, sequences: Floats, context_tokens: Floats) -> Floats:
    """The spreads of steps that decode so many sequences; that of the times where they know of nothing else."""
    if isinstance(times, Doubtful):
        return times.spreads(sequences, context_tokens)
    return np.full(len(sequences), times.spread)


@dataclass(frozen=True, slots=True, kw_only=True)
class Looped:
    """Any step times as `VectorTimes`, asked one by one."""

    times: StepTimes
    spread: float

    @property
    def first_token_delay(self) -> FirstTokenDelay:
        """That of the times."""
        return first_token_delay(self.times)

    def step_s(self, batch: Batch) -> float:
        """Duration of one step."""
        return self.times.step_s(batch)

    def decode_run_s(self, *, sequences: int, context_tokens: int, steps: int) -> float:
        """Duration of a run of decode steps."""
        return self.times.decode_run_s(sequences=sequences, context_tokens=context_tokens, steps=steps)

    def steps_s(
        self,
        prefill_tokens: npt.ArrayLike,
        prefill_pairs: npt.ArrayLike,
        decode_sequences: npt.ArrayLike,
        context_tokens: npt.ArrayLike,
    ) -> Floats:
        """Durations of steps; fractions of tokens are rounded."""
        parts = np.broadcast_arrays(prefill_tokens, prefill_pairs, decode_sequences, context_tokens)
        whole = [np.rint(part).astype(np.int64).ravel().tolist() for part in parts]
        spent = [
            self.times.step_s(Batch(prefill_tokens=a, prefill_pairs=b, decode_sequences=c, context_tokens=d))
            for a, b, c, d in zip(*whole, strict=True)
        ]
        return np.array(spent, dtype=np.float64).reshape(parts[0].shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One row a value of max_num_batched_tokens, one column a load; both quantiles without waiting for a slot."""

    sequences: Floats          # mean, decoding: the columns
    rate: Floats               # requests a second, never falling along a row
    ttft_s: Floats             # at the percentile; infinite where prompts come faster than they are computed
    tpot_s: Floats             # at the percentile
    mean_ttft_s: Floats
    mean_tpot_s: Floats
    resident: Floats           # sequences decoding or computing their prompts
    deviation: Floats          # of the number of decoding sequences
    prompt_load: Floats        # utilisation by prompts; 1 is saturation
    decode_s: Floats           # a step of n + 1 sequences that only decodes (columns only)
    prompt_s: Floats           # what a prompt adds to the steps that carry it
    spreads: Floats            # of the logarithm of the steps' error (columns only)


def load_grid(times: VectorTimes, lengths: Lengths, *, most_sequences: float) -> Floats:
    """Numbers of sequences from next to no load to the most, evenly apart in logarithm."""
    alone = float(times.steps_s(0, 0, 1, lengths.context_tokens))
    prompts = times.steps_s(lengths.prompt_tokens, lengths.prompt_pairs, 0, 0)
    prompt = float(lengths.prompt_weights @ prompts)
    least = min(UNLOADED, UNLOADED * lengths.mean_decode_steps * alone / max(prompt, TINY))
    return np.geomspace(least, max(most_sequences, 2.0), GRID_POINTS)


def curve(
    times: VectorTimes,
    lengths: Lengths,
    batched_tokens: Floats,
    grid: Floats,
    *,
    percentile: float,
    arrival_cv: float,
) -> Curve:
    """The behaviour of replicas with each of these values of max_num_batched_tokens."""
    met = grid + 1
    decode = times.steps_s(0, 0, met, met * lengths.context_tokens)
    prompts = _prompts(times, lengths, batched_tokens, grid, decode, shared=np.ones((1, 1)))
    rate = _rate(lengths, grid, decode, prompts)
    # Prompts that came during one step share the next: how many, of those that carry any.
    came = rate * decode / (1 - np.minimum(rate * prompts.mean_added, UNSTABLE))
    shared = came / np.maximum(1 - np.exp(-came), TINY)
    prompts = _prompts(times, lengths, batched_tokens, grid, decode, shared=np.maximum(shared, 1.0))
    rate = _rate(lengths, grid, decode, prompts)
    load = np.minimum(rate * prompts.mean_added, UNSTABLE)
    slope = np.gradient(rate, grid, axis=1)
    variance = np.minimum(rate / np.maximum(slope, TINY) * (1 + arrival_cv**2) / 2, (grid + 1) ** 2)
    noise = variance * (np.gradient(decode, grid) / (1 - load)) ** 2
    tpot, mean_tpot = _tpot(
        lengths, prompts, decode=decode, rate=rate, load=load, slope=slope, noise=noise, percentile=percentile
    )
    prefilling = rate * prompts.mean_own
    ttft, mean_ttft, queue = _ttft(
        lengths, prompts, decode=decode, rate=rate, load=load, shared=np.maximum(shared, 1.0),
        busy=1 - np.exp(-grid - prefilling), arrival_cv=arrival_cv, percentile=percentile,
    )  # fmt: skip
    delay = first_token_delay(times).after_s(decode)
    return Curve(
        sequences=grid, rate=rate, ttft_s=ttft + delay, tpot_s=tpot, mean_ttft_s=mean_ttft + delay,
        mean_tpot_s=mean_tpot,
        resident=grid + prefilling, deviation=np.sqrt(variance), prompt_load=queue, decode_s=decode,
        prompt_s=prompts.mean_added, spreads=spreads_of(times, met, met * lengths.context_tokens),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompts:
    """What computing a prompt takes, of each setting, load and group."""

    own: Floats                # its own steps
    added: Floats              # what it adds to steps that decode, divided fairly among those who share a step
    filled: Floats             # steps that its tokens fill
    mean_own: Floats           # and the means over the groups
    mean_added: Floats
    square_added: Floats


def _rate(lengths: Lengths, grid: Floats, decode: Floats, prompts: _Prompts) -> Floats:
    """Little's law, solved for the rate: n (1 - rate s) = rate (L d + rate s own)."""
    added = np.maximum(prompts.mean_added, TINY)
    square = added * prompts.mean_own
    linear = lengths.mean_decode_steps * decode + grid * added
    rate = 2 * grid / (linear + np.sqrt(linear**2 + 4 * square * grid))
    return np.maximum.accumulate(rate, axis=1)


def _prompts(
    times: VectorTimes, lengths: Lengths, batched_tokens: Floats, grid: Floats, decode: Floats, *, shared: Floats
) -> _Prompts:
    """What computing a prompt takes when `shared` prompts are in each step that carries any."""
    context, weights = lengths.context_tokens, lengths.prompt_weights
    budget = np.maximum(batched_tokens[:, None] - grid, 1.0)[..., None]
    filled = lengths.prompt_tokens / budget
    parts = np.maximum(filled, 1.0)
    alone = lengths.prompt_tokens / parts
    several = np.minimum(alone + (shared[..., None] - 1) * lengths.mean_prompt_tokens, budget) / alone
    tokens, pairs = several * alone, several * lengths.prompt_pairs / parts
    mixed = times.steps_s(tokens, pairs, (grid + 1)[:, None], ((grid + 1) * context)[:, None])
    added = parts * np.maximum(mixed - decode[:, None], 0.0) / several
    whole = np.ceil(parts - 1e-9)
    tokens, pairs = lengths.prompt_tokens / whole, lengths.prompt_pairs / whole
    own = whole * times.steps_s(tokens, pairs, grid[:, None], (grid * context)[:, None])
    return _Prompts(
        own=own, added=added, filled=filled, mean_own=own @ weights, mean_added=added @ weights,
        square_added=added**2 @ weights,
    )  # fmt: skip


def _tpot(
    lengths: Lengths, prompts: _Prompts, *, decode: Floats, rate: Floats, load: Floats, slope: Floats, noise: Floats,
    percentile: float,
) -> tuple[Floats, Floats]:  # fmt: skip
    """The percentile and the mean of the time per output token."""
    steps, floor = lengths.decode_steps, decode[:, None]
    square = rate * prompts.square_added
    # Those who came during a prompt's own steps are computed right after its first token.
    behind = load * prompts.mean_own
    untouched = np.exp(-(rate * decode)[..., None] * steps - (rate * prompts.mean_own)[..., None])
    touched = np.maximum(1 - untouched, TINY)
    extra = (load * decode / (1 - load))[..., None] + (behind / (1 - load))[..., None] / steps
    spread = (square / (1 - load) ** 3)[..., None] * (floor / steps + behind[..., None] / steps**2)
    spread += (square * prompts.mean_own / (1 - load) ** 2)[..., None] / steps**2
    life = np.maximum((slope * decode / (1 - load))[..., None] * steps, 1e-6)  # in times of n's own memory
    drift = noise[..., None] * 2 * (life - 1 + np.exp(-life)) / life**2
    extra_mean = extra / touched
    extra_variance = np.maximum((spread + extra**2) / touched - extra_mean**2, (1e-3 * extra_mean) ** 2)
    # What prompts add is skewed, the drift of n is not: their sum as a gamma with the same three moments, shifted. The
    # same arrivals that interrupt stay and slow, so deviations add up, not variances.
    both = extra_variance + drift + 2 * np.sqrt(spread * drift)
    shape = np.minimum(both**3 * extra_mean**2 / np.maximum(extra_variance, TINY**2) ** 4, SHAPE_MAX)
    middle = np.sqrt(shape * both)

    def share(value: Floats) -> Floats:
        over = value[..., None] - floor
        calm = ndtr(over / np.sqrt(np.maximum(drift, (1e-4 * floor) ** 2)))
        shares: Floats = untouched * calm + touched * gamma_share(over - extra_mean + middle, middle, both)
        return np.asarray(shares @ lengths.decode_weights)

    widest = np.sqrt(drift.max(axis=-1))
    tail = ((extra_mean + 6 * np.sqrt(both)) * (touched > 1e-3)).max(axis=-1)
    low = np.broadcast_to(decode * 0.5, rate.shape)
    found = _quantile(share, low, decode + 6 * widest + tail, percentile)
    return found, (decode * lengths.mean_decode_steps + behind) / (1 - load) / lengths.mean_decode_steps


def _ttft(
    lengths: Lengths, prompts: _Prompts, *, decode: Floats, rate: Floats, load: Floats, shared: Floats, busy: Floats,
    arrival_cv: float, percentile: float,
) -> tuple[Floats, Floats, Floats]:  # fmt: skip
    """The percentile and the mean of the time to the first token without waiting for a slot, and the prompts' load."""
    weights, own = lengths.prompt_weights, prompts.own
    service = prompts.added + decode[:, None] * prompts.filled
    first, second, third = (np.power(service, k) @ weights for k in (1, 2, 3))
    queue = rate * first
    used = np.minimum(queue, UNSTABLE)
    scv = np.maximum(second / np.maximum(first, TINY) ** 2 - 1, 0)
    bursts = (arrival_cv**2 + scv) / (1 + scv)
    wait = rate * second * (0.5 + used) / (1 - used**2) * bursts
    variance = wait**2 + rate * third / (3 * (1 - used)) * bursts
    # Who comes during a step with prompts waits for it and for those before him; others for the end of a short step.
    carrying = prompts.mean_added + decode * np.maximum(prompts.filled @ weights, 1 / shared)
    chance = np.clip(rate * carrying, TINY, 1.0)
    step, short = decode / (1 - load) * busy, decode * busy
    total = step * (0.5 + used) + wait
    late_mean = np.maximum(total - (1 - chance) * short / 2, TINY) / chance
    late_variance = np.maximum((variance + wait**2) / chance - (wait / chance) ** 2, 0) + (carrying * shared) ** 2 / 12

    def share(value: Floats) -> Floats:
        over = value[..., None] - own
        soon = np.clip(over / np.maximum(short, TINY)[..., None], 0, 1)
        late = gamma_share(over, late_mean[..., None], late_variance[..., None])
        return np.asarray(((1 - chance[..., None]) * soon + chance[..., None] * late) @ weights)

    high = own.max(axis=-1) + short + late_mean + 8 * np.sqrt(late_variance)
    found = _quantile(share, own.min(axis=-1), high, percentile)
    stable = queue < UNSTABLE
    return np.where(stable, found, np.inf), np.where(stable, own @ weights + total, np.inf), queue


def gamma_share(value: Floats, mean: Floats, variance: Floats) -> Floats:
    """Share of a gamma distribution below a value, by the cube root of Wilson and Hilferty (1931)."""
    ninth = np.maximum(variance, TINY**2) / (9 * np.maximum(mean, TINY) ** 2)
    root = np.cbrt(np.maximum(value, 0) / np.maximum(mean, TINY))
    return np.where(value > 0, ndtr((root - 1 + ninth) / np.sqrt(ninth)), 0.0)


def _quantile(share: Callable[[Floats], Floats], low: Floats, high: Floats, percentile: float) -> Floats:
    """Where a rising share reaches the percentile, between two bounds."""
    low, high = low.copy(), np.maximum(high, low * (1 + 1e-9))
    below, above = np.zeros_like(low), np.ones_like(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = share(middle)
        under = found < percentile
        low, below = np.where(under, middle, low), np.where(under, found, below)
        high, above = np.where(under, high, middle), np.where(under, above, found)
    part = (percentile - below) / np.maximum(above - below, TINY)
    return low + np.clip(part, 0, 1) * (high - low)
