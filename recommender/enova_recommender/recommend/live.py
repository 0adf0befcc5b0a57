"""What a running replica carries at most, read from its own telemetry: the way that ENOVA's paper describes.

Theory of operation. Of each interval we have the requests that finished, those running and those waiting. While the
engine keeps up, finished follows the load (running + waiting); once it is saturated, more load only waits. Two kinds
of evidence count. QUEUE: requests waited without a break for a while, and not just for the next step; then what
finished meanwhile is what the engine can do. PLATEAU: over windows longer than a request lives, finished hardly grows
with the load any more; the upper bound of the elasticity of a regression must be small, so that mere noise, or a load
that did not vary, proves nothing. `n_limit` is the rate in saturated intervals, `t_limit` the time that a request
takes in the engine just before; by Little's law their product is the batch that makes this rate, hence max_num_seqs.
Without either evidence the answer is that the engine is not saturated yet, with the rate that it has carried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from enova_recommender.memory import CacheLayout, Moment, block_demand
from enova_recommender.types import Interval

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

FRAMES_MIN = 20              # measured intervals below which nothing is said
FINISHED_MIN = 30            # requests below which a rate is a guess
QUEUE_S_MIN = 10.0           # a shorter queue may be a burst
QUEUE_SERVICE_TIMES_MIN = 0.5  # the same in times that a request takes
# Within so many times what finishes still comes from the load before the queue. Then the rate by Little's law, of a
# full batch and the time that requests took just before, is an estimate as good: the interval holds both.
SETTLED_SERVICE_TIMES = 2.0
# Below capacity queues come and go as well. Their length and what is served in them have exponential tails, of some 5
# requests and some 100 requests at 80 % of the capacity (M/G/1 with lengths as they are met), so these many prove it.
QUEUE_REQUESTS_MIN = 30      # waiting at the peak
QUEUE_FINISHED_MIN = 300     # or served without a break, where a bound keeps the queue short
GAP_INTERVALS_MAX = 2        # missing intervals that do not break a queue
WINDOWS_MIN = 12             # of the plateau
WINDOW_SERVICE_TIMES = 3.0   # how long they are: shorter ones see the load before its effect
WINDOW_FINISHED_MIN = 50     # in one on average: what fewer requests are like hides what the engine is like
PLATEAU_WINDOWS_MIN = 5      # of them on it
PLATEAU_SHARES = (0.5, 0.65, 0.8)  # of the windows below the loads among which it is looked for
LOAD_SPREAD_MIN = 2.0        # of the larger loads among these over the least, without which it cannot be seen
ELASTICITY_MAX = 0.3         # per cent of rate for a per cent of load; 0 on a plateau, 1 below saturation
CONFIDENCE = 0.95            # of the one-sided bound of the elasticity
RESAMPLES = 400
BLOCK_SERVICE_TIMES = 2.0    # that a block of the bootstrap lasts: requests that were together end within it
BLOCKS_MIN = 5               # of the bootstrap; fewer say nothing of the spread
# What even long observation leaves open, as a share: lengths drift, and a queue is met more often when they are long.
DRIFT_SHARE = 0.015
INTERVAL_SHARE = 0.80        # that the bounds of an Interval hold


class Evidence(StrEnum):
    """What shows that a replica was saturated."""

    QUEUE = "QUEUE"
    PLATEAU = "PLATEAU"


class Doubt(StrEnum):
    """Why there is no answer."""

    TOO_FEW_FRAMES = "TOO_FEW_FRAMES"
    TOO_FEW_REQUESTS = "TOO_FEW_REQUESTS"
    NOT_SATURATED_YET = "NOT_SATURATED_YET"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFrames:
    """Intervals of equal length of one replica, oldest first; NaN where nothing was measured.

    `running` and `waiting` are those at an interval's end, `latency_s` the mean from arrival to end of the requests
    that finished in it (NaN if none did). `waiting` includes what an ingress holds back for the replica.
    """

    interval_s: float
    finished: Floats
    running: Floats
    waiting: Floats
    latency_s: Floats

    def __post_init__(self) -> None:
        if not self.interval_s > 0:
            raise ValueError(f"interval_s: must be positive, not {self.interval_s}")
        for name in ("running", "waiting", "latency_s"):
            if len(getattr(self, name)) != len(self.finished):
                raise ValueError(f"{name}: {len(getattr(self, name))} intervals, but finished has {len(self.finished)}")
        for name in ("finished", "running", "waiting", "latency_s"):
            if np.any(getattr(self, name) < 0):
                raise ValueError(f"{name}: must not be negative")

    @property
    def measured(self) -> Flags:
        """Intervals of which finished, running and waiting are known."""
        return np.isfinite(self.finished) & np.isfinite(self.running) & np.isfinite(self.waiting)


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveCapacity:
    """What one replica carries at most, with intervals that hold it in 80 of 100 cases."""

    n_limit_rps: Interval
    t_limit_s: Interval
    saturation_load: Interval  # requests in the batch from which on the rate does not grow
    max_num_seqs: int          # by Little's law
    evidence: Evidence
    frames: int                # measured, of all replicas
    saturated_frames: int
    finished: int              # in saturated frames


@dataclass(frozen=True, slots=True, kw_only=True)
class NotYet:
    """No answer, and why; `at_least_rps` is a rate that a replica has carried (0 if unknown)."""

    doubt: Doubt
    reason: str
    at_least_rps: float
    frames: int


def live_capacity(replicas: Sequence[ReplicaFrames], *, seed: int = 0) -> LiveCapacity | NotYet:
    """The capacity of one of several replicas of equal configuration, or why it cannot be told."""
    frames = sum(int(one.measured.sum()) for one in replicas)
    finished = sum(float(one.finished[one.measured].sum()) for one in replicas)
    if frames < FRAMES_MIN:
        return NotYet(
            doubt=Doubt.TOO_FEW_FRAMES,
            reason=f"{frames} measured intervals, {FRAMES_MIN} are needed",
            at_least_rps=0.0, frames=frames,
        )
    if finished < FINISHED_MIN:
        return NotYet(
            doubt=Doubt.TOO_FEW_REQUESTS,
            reason=f"{finished:.0f} requests finished, {FINISHED_MIN} are needed",
            at_least_rps=0.0, frames=frames,
        )
    for evidence, find in ((Evidence.QUEUE, _queued), (Evidence.PLATEAU, _on_plateau)):
        saturated = find(replicas)
        done = sum(float(one.finished[flags].sum()) for one, flags in zip(replicas, saturated, strict=True))
        if done >= FINISHED_MIN:
            return _capacity(replicas, saturated, evidence, frames=frames, seed=seed)
    carried = max(_carried_rps(one) for one in replicas)
    return NotYet(
        doubt=Doubt.NOT_SATURATED_YET,
        reason=f"finished still follows the load; {carried:.3g} requests/s were carried by one replica",
        at_least_rps=carried, frames=frames,
    )


def cache_bytes(
    layout: CacheLayout, lengths: Sequence[tuple[int, int]], *, sequences: int, quantile: float = 0.99
) -> int:
    """KV cache on a GPU that `sequences` at once need with this probability: N mean + z sd sqrt(N) blocks."""
    demand = block_demand(layout, lengths, moment=Moment.IN_FLIGHT)
    spread = NormalDist().inv_cdf(quantile) * demand.deviation * math.sqrt(sequences)
    return math.ceil(sequences * demand.mean + spread) * layout.block_bytes


# Evidence.


def _service_s(frames: ReplicaFrames, flags: Flags) -> float:
    """How long a request is in the batch on average, by Little's law; 0 if nothing finished."""
    finished = float(frames.finished[flags].sum())
    return float(frames.running[flags].sum()) * frames.interval_s / finished if finished else 0.0


def _queued(replicas: Sequence[ReplicaFrames]) -> list[Flags]:
    """Intervals of queues that lasted, without their first part, in which the batch is still filling."""
    return [_queued_intervals(one) for one in replicas]


def _queued_intervals(frames: ReplicaFrames) -> Flags:
    measured = frames.measured
    queued = measured & (frames.waiting >= 1)
    service_s = _service_s(frames, measured)
    found = np.zeros(len(queued), dtype=np.bool_)
    for first, last in _runs(queued, ~measured):
        inside = np.zeros(len(queued), dtype=np.bool_)
        inside[first : last + 1] = measured[first : last + 1]
        length_s = (last - first + 1) * frames.interval_s
        if length_s < max(QUEUE_S_MIN, QUEUE_SERVICE_TIMES_MIN * service_s):
            continue
        if frames.waiting[inside].max() < QUEUE_REQUESTS_MIN and frames.finished[inside].sum() < QUEUE_FINISHED_MIN:
            continue
        settled = round(_service_s(frames, inside) / frames.interval_s)
        if 2 * settled <= last - first + 1:
            inside[first : first + settled] = False
        found |= inside
    return found


def _runs(flags: Flags, missing: Flags) -> list[tuple[int, int]]:
    """First and last index of each run of flags; a few missing intervals do not end one."""
    runs: list[tuple[int, int]] = []
    first = last = -1
    gap = 0
    for index, (on, unknown) in enumerate(zip(flags.tolist(), missing.tolist(), strict=True)):
        if on:
            first, last, gap = (index if first < 0 else first), index, 0
        elif first >= 0:
            gap += 1
            if not unknown or gap > GAP_INTERVALS_MAX:
                runs.append((first, last))
                first = -1
    if first >= 0:
        runs.append((first, last))
    return runs


@dataclass(frozen=True, slots=True)
class _Windows:
    """Means over windows that are longer than requests live."""

    loads: Floats
    rates: Floats
    members: list[npt.NDArray[np.intp]]


def _windows(frames: ReplicaFrames) -> _Windows:
    """Whole windows with at most half of their intervals missing."""
    measured = frames.measured
    done = float(frames.finished[measured].sum())
    if not done:
        return _Windows(np.array([]), np.array([]), [])
    filled_s = WINDOW_FINISHED_MIN / done * float(measured.sum()) * frames.interval_s
    length_s = max(QUEUE_S_MIN, WINDOW_SERVICE_TIMES * _service_s(frames, measured), filled_s)
    size = max(1, math.ceil(length_s / frames.interval_s))
    loads, rates, members = [], [], []
    for first in range(0, len(measured) - size + 1, size):
        inside = first + np.flatnonzero(measured[first : first + size])
        if 2 * len(inside) < size:
            continue
        loads.append(float((frames.running[inside] + frames.waiting[inside]).mean()))
        rates.append(float(frames.finished[inside].mean() / frames.interval_s))
        members.append(inside)
    return _Windows(np.array(loads), np.array(rates), members)


def _on_plateau(replicas: Sequence[ReplicaFrames]) -> list[Flags]:
    """Intervals of the windows among which the rate does not grow with the load."""
    windows = [_windows(one) for one in replicas]
    loads = np.concatenate([one.loads for one in windows])
    rates = np.concatenate([one.rates for one in windows])
    level = _plateau_load(loads, rates)
    found = [np.zeros(len(one.finished), dtype=np.bool_) for one in replicas]
    for flags, one in zip(found, windows, strict=True):
        for load, members in zip(one.loads, one.members, strict=True):
            if load >= level:
                flags[members] = True
    return found


def _plateau_load(loads: Floats, rates: Floats) -> float:
    """The load from which on the rate does not grow; infinite if it does, or if that cannot be seen."""
    if len(loads) < WINDOWS_MIN or loads.max() <= 0:
        return math.inf
    for share in PLATEAU_SHARES:
        level = float(np.quantile(loads, share))
        if level > 0 and _is_flat_above(level, loads, rates):
            return level
    return math.inf


def _is_flat_above(level: float, loads: Floats, rates: Floats) -> bool:
    """Whether the rate hardly grows with loads of at least `level`, and is higher there than below."""
    upper = (loads >= level) & (rates > 0)
    lower = loads < level
    if upper.sum() < PLATEAU_WINDOWS_MIN or not lower.any():
        return False
    if np.quantile(loads[upper], 0.8) < LOAD_SPREAD_MIN * level:
        return False
    bound = _elasticity_bound(np.log(loads[upper]), np.log(rates[upper]))
    return bound < ELASTICITY_MAX and float(np.median(rates[upper])) > float(np.median(rates[lower]))


def _growth_left(replicas: Sequence[ReplicaFrames], saturated: list[Flags]) -> float:
    """By what factor the rate may still grow between the middle of a plateau and the largest load on it."""
    loads, rates = [], []
    for one, flags in zip(replicas, saturated, strict=True):
        found = _windows(one)
        for load, rate, members in zip(found.loads, found.rates, found.members, strict=True):
            if rate > 0 and flags[members].all():
                loads.append(load)
                rates.append(rate)
    if len(loads) < PLATEAU_WINDOWS_MIN:
        return 1.0
    slope = max(0.0, _elasticity_bound(np.log(loads), np.log(rates)))
    return float((max(loads) / np.median(loads)) ** slope)


def _elasticity_bound(loads: Floats, rates: Floats) -> float:
    """The upper bound of the slope of a line through logarithms, by Student's t."""
    freedom = len(loads) - 2
    spread = float(((loads - loads.mean()) ** 2).sum())
    if freedom < 1 or spread <= 0:
        return math.inf
    slope = float((loads - loads.mean()) @ (rates - rates.mean())) / spread
    left = rates - rates.mean() - slope * (loads - loads.mean())
    error = math.sqrt(float(left @ left) / freedom / spread)
    return slope + float(stdtrit(freedom, CONFIDENCE)) * error


def _carried_rps(frames: ReplicaFrames) -> float:
    """The highest rate of a window."""
    rates = _windows(frames).rates
    return float(rates.max()) if len(rates) else 0.0


# Figures.


def _capacity(
    replicas: Sequence[ReplicaFrames], saturated: list[Flags], evidence: Evidence, *, frames: int, seed: int
) -> LiveCapacity:
    pairs = list(zip(replicas, saturated, strict=True))
    spans = np.concatenate([np.full(int(flags.sum()), one.interval_s) for one, flags in pairs])
    finished = np.concatenate([one.finished[flags] for one, flags in pairs])
    running = np.concatenate([one.running[flags] for one, flags in pairs])
    done = float(finished.sum())
    service_s = float(running @ spans) / done
    block = max(1, round(BLOCK_SERVICE_TIMES * service_s / float(spans.mean())))
    block = min(block, max(1, len(spans) // BLOCKS_MIN))  # of a short span shorter ones are better than none
    draws = _block_draws(len(spans), block, seed)
    if draws is None:  # too short a span: finishing is taken for a Poisson process
        half = NormalDist().inv_cdf((1 + INTERVAL_SHARE) / 2) / math.sqrt(done)
        limits = _Bounds(1 - half, 1 + half)
        rate = _interval(done / float(spans.sum()), limits)
        load = _interval(float(np.median(running)), limits)
    else:
        wider = _few_blocks(len(spans) // block)
        rates = finished[draws].sum(axis=1) / spans[draws].sum(axis=1)
        rate = _quantiles(done / float(spans.sum()), rates, wider)
        load = _quantiles(float(np.median(running)), np.median(running[draws], axis=1), wider)
    rate = _drifting(rate)
    if evidence is Evidence.PLATEAU:
        rate = _including(rate, rate.value * _growth_left(replicas, saturated))
    before = _before_s(pairs, float(np.median(running))) or service_s
    if float(spans.sum()) < SETTLED_SERVICE_TIMES * service_s * len(pairs):
        rate = _including(rate, load.value / before)
    width = math.hypot(_half_width(rate), _half_width(load))
    time = Interval(value=before, low=before * max(0.0, 1 - width), high=before * (1 + width))
    return LiveCapacity(
        n_limit_rps=rate,
        t_limit_s=time,
        saturation_load=load,
        max_num_seqs=max(1, math.ceil(rate.value * before - 1e-9)),
        evidence=evidence,
        frames=frames,
        saturated_frames=len(spans),
        finished=round(done),
    )


def _before_s(pairs: Sequence[tuple[ReplicaFrames, Flags]], running: float) -> float | None:
    """Mean time of requests that finished when the batch was nearly full and nobody waited; None if too few did."""
    total = weight = 0.0
    for frames, flags in pairs:
        near = frames.measured & ~flags & (frames.waiting == 0) & (frames.running >= 0.8 * running)
        near &= np.isfinite(frames.latency_s)
        total += float((frames.latency_s * frames.finished)[near].sum())
        weight += float(frames.finished[near].sum())
    return total / weight if weight >= FINISHED_MIN else None


@dataclass(frozen=True, slots=True)
class _Bounds:
    low: float
    high: float


def _including(interval: Interval, other: float) -> Interval:
    """The interval, wide enough to hold another estimate too."""
    return Interval(value=interval.value, low=min(interval.low, other), high=max(interval.high, other))


def _interval(value: float, factors: _Bounds) -> Interval:
    return Interval(value=value, low=value * max(0.0, factors.low), high=value * factors.high)


def _half_width(interval: Interval) -> float:
    """Half of an interval's width as a share of its value."""
    return (interval.high - interval.low) / 2 / interval.value if interval.value else 0.0


def _quantiles(value: float, draws: Floats, wider: float) -> Interval:
    tail = (1 - INTERVAL_SHARE) / 2
    low, high = (float(bound) for bound in np.quantile(draws, (tail, 1 - tail)))
    below, above = max(value - low, 0.0), max(high - value, 0.0)
    return Interval(value=value, low=max(0.0, value - wider * below), high=value + wider * above)


def _few_blocks(count: int) -> float:
    """How much wider an interval of `count` blocks is than the spread of its resamples: Student's t, and the mean
    that the blocks themselves gave."""
    share = (1 + INTERVAL_SHARE) / 2
    quantile = float(stdtrit(count - 1, share)) / NormalDist().inv_cdf(share)
    return quantile * math.sqrt(count / (count - 1))


def _drifting(interval: Interval) -> Interval:
    """The interval with what no length of observation tells, in quadrature."""
    value, drift = interval.value, DRIFT_SHARE * interval.value
    return Interval(
        value=value, low=value - math.hypot(value - interval.low, drift),
        high=value + math.hypot(interval.high - value, drift),
    )  # fmt: skip


def _block_draws(length: int, block: int, seed: int) -> npt.NDArray[np.intp] | None:
    """Indices of resamples made of blocks of neighbours, which keep what hangs together; None if there are too few."""
    count = length // block
    if count < BLOCKS_MIN:
        return None
    starts = np.random.default_rng(seed).integers(0, length - block + 1, size=(RESAMPLES, count))
    return (starts[:, :, None] + np.arange(block)).reshape(RESAMPLES, -1)
