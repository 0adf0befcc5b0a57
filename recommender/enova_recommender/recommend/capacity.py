"""What one replica does at a rate, and the highest rate at which the objectives hold, in closed form.

Theory of operation. `capacity_curve` says how a replica behaves as its load grows while nothing limits the batch. A
setting ends the curve at its slots: max_num_seqs, or as many sequences as the KV blocks hold with room for their
spread. Close to that end requests wait for a slot: the chance is Erlang's C, scaled to the deviation of the sequences
in the batch (as Halfin and Whitt's limit of 1981 suggests); the wait then is exponential, as in Allen and Cunneen
(1990).

The step model errs by a common factor g for all steps of a replica, lognormal with the curve's `spreads`: what the host
takes for each sequence is known less than what kernels take, so large batches are known less than small ones. Steps
that are g times as long make a replica behave at rate r as the curve does at rate g r, all times multiplied by g: so
each figure at the 10th and the 90th percentile of g is read from the same curve, column by column.

`sequence_limits` tells how many sequences a batch may hold at all times without breaking the objective between tokens:
the max_num_seqs that keeps it when more requests come than are carried.

Pipeline stages and data-parallel ranks are lanes: each takes an equal share of the rate with a scheduler of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.special import gammaincc, gammaln, ndtri

from enova_recommender.memory import CacheLayout, MemoryFit, block_demand
from enova_recommender.recommend.capacity_curve import TINY, UNSTABLE, Curve, VectorTimes, curve, load_grid
from enova_recommender.recommend.capacity_lengths import (
    Floats,
    Lengths,
    check_objectives,
    check_workload,
    lengths_of,
)
from enova_recommender.recommend.errors import RecommendError
from enova_recommender.recommend.types import Constraint, EngineSettings, Objectives, Prediction, Workload
from enova_recommender.types import Interval, Parallelism

SATURATION = 0.95         # of the rate at which a queue grows without bound; beyond it no percentile is worth the name
KV_ROOM_DEVIATIONS = 1.645  # all sequences of a full batch fit with a chance of 95 %
INTERVAL_SHARE = 0.8
BINDINGS = (Constraint.TPOT, Constraint.TTFT, Constraint.KV_CACHE, Constraint.MAX_NUM_SEQS, Constraint.COMPUTE)

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """What several settings of one group do. Second axis of the intervals: value, low, high. Rates are of a replica."""

    capacity_rps: Floats
    assured_rps: Floats       # capacity that holds with the wanted assurance; objectives are met up to it
    binding: Integers         # index into BINDINGS
    replicas: Integers        # that carry the workload; 0 where an objective cannot be met at any rate
    requests_per_s: Floats    # of one replica; next to none where replicas is 0
    ttft_s: Floats
    tpot_s: Floats
    least_ttft_s: Floats      # without load
    least_tpot_s: Floats
    sequences: Floats         # decoding, in all lanes
    max_num_seqs: Floats      # under which all this holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """How many sequences a lane of each setting decodes at once, and whether KV blocks are what limits them."""

    sequences: Floats
    by_kv: npt.NDArray[np.bool_]
    max_num_seqs: Floats      # of a data-parallel rank, as given


def slots_of(lengths: Lengths, layout: CacheLayout, *, kv_blocks: Floats, max_num_seqs: Floats, pipeline: int) -> Slots:
    """The slots of settings with these KV blocks and limits on a data-parallel rank."""
    by_limit = max_num_seqs / pipeline
    if not layout.groups:  # a model that keeps nothing
        return Slots(
            sequences=np.maximum(by_limit, 1.0), by_kv=np.zeros(len(by_limit), dtype=np.bool_),
            max_num_seqs=max_num_seqs,
        )  # fmt: skip
    demand = block_demand(layout, lengths.sample)
    mean, deviation = demand.mean, KV_ROOM_DEVIATIONS * demand.deviation
    room = np.maximum(kv_blocks - (layout.blocks(lengths.shared_tokens) if lengths.shared_tokens else 0), 0)
    # n mean + z sqrt(n) deviation = room, a quadratic in sqrt(n)
    root = (-deviation + np.sqrt(deviation**2 + 4 * mean * room)) / (2 * mean)
    by_kv = root**2 / pipeline
    return Slots(
        sequences=np.maximum(np.minimum(by_kv, by_limit), 1.0), by_kv=by_kv < by_limit, max_num_seqs=max_num_seqs
    )


def lanes_of(parallelism: Parallelism) -> int:
    """Batches that a replica computes at the same time."""
    return parallelism.pipeline * parallelism.data


def factor_of(spread: float, share: float) -> float:
    """The factor on step times that is not exceeded in this share of cases."""
    return math.exp(float(ndtri(share)) * spread)


def assess(
    behaviour: Curve,
    rows: Integers,
    slots: Slots,
    *,
    workload: Workload,
    objectives: Objectives,
    lanes: int,
    decode_steps: float,
    decode_scv: float,
    assurance: float,
    rate: float | None = None,
) -> Assessment:
    """Judge settings, each with its row of the curve and its slots; `rate` of a replica, or as many as are needed."""
    limited = _limit(
        behaviour, rows, slots, workload=workload, percentile=objectives.percentile, decode_steps=decode_steps,
        decode_scv=decode_scv,
    )  # fmt: skip
    outer = (1 + INTERVAL_SHARE) / 2
    # Slower steps: lower capacity.
    cases = [limited, *(limited.slowed(share) for share in (outer, 1 - outer))]
    found = [_capacity(one, slots, objectives) for one in cases]
    capacity = np.stack([lanes * one for one, _ in found], axis=1)
    assured = lanes * (found[1] if assurance == outer else _capacity(limited.slowed(assurance), slots, objectives))[0]
    possible = assured > 0
    if rate is None:
        replicas = np.where(possible, np.ceil(workload.requests_per_s / np.maximum(assured, TINY) - 1e-9), 0)
        each = np.where(possible, workload.requests_per_s / np.maximum(replicas, 1), 0.0)
    else:
        replicas, each = possible.astype(np.float64), np.full(len(rows), rate)
    states = [_at(cases[place], each / lanes, objectives.percentile) for place in (0, 2, 1)]
    return Assessment(
        capacity_rps=capacity, assured_rps=assured, binding=found[0][1], replicas=replicas.astype(np.int64),
        requests_per_s=each, ttft_s=np.stack([one[0] for one in states], axis=1),
        tpot_s=np.stack([one[1] for one in states], axis=1), sequences=lanes * states[0][2],
        least_ttft_s=limited.ttft_s[:, 0], least_tpot_s=limited.tpot_s[:, 0], max_num_seqs=slots.max_num_seqs,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limited:
    """Curves of settings, a row each, with the wait for slots; what lies beyond the slots is infinite."""

    sequences: Floats
    rate: Floats
    ttft_s: Floats
    free_ttft_s: Floats       # without the wait for slots
    tpot_s: Floats
    prompt_load: Floats
    resident: Floats
    deviation: Floats
    slots: Floats
    most_rps: Floats          # that the slots carry
    variability: float        # of arrivals and of times in a slot, 1 for Poisson and exponential
    spreads: Floats           # of the steps' error
    slot_spread: Floats       # with all slots taken

    def slowed(self, share: float) -> _Limited:
        """The same if steps are as long as they are not exceeded with this chance."""
        deviations = float(ndtri(share))
        factor, full = np.exp(deviations * self.spreads), np.exp(deviations * self.slot_spread)
        return replace(
            self, rate=np.maximum.accumulate(self.rate / factor, axis=1), ttft_s=self.ttft_s * factor,
            free_ttft_s=self.free_ttft_s * factor, tpot_s=self.tpot_s * factor, most_rps=self.most_rps / full,
        )  # fmt: skip

    def wait_s(self, rate: Floats, resident: Floats, deviation: Floats, percentile: float) -> Floats:
        """The percentile of the wait for a slot, of settings along the last axis."""
        chance = _waiting_chance(self.slots, resident, deviation)
        mean = self.variability / np.maximum(self.most_rps - rate, TINY)
        wait = mean * np.maximum(np.log(np.maximum(chance, 1e-300) / (1 - percentile)), 0)
        return np.where((rate < UNSTABLE * self.most_rps) & (resident < self.slots), wait, np.inf)


def _limit(
    behaviour: Curve, rows: Integers, slots: Slots, *, workload: Workload, percentile: float,
    decode_steps: float, decode_scv: float,
) -> _Limited:  # fmt: skip
    """End each curve at its slots."""
    grid, most = behaviour.sequences, slots.sequences
    step = np.interp(most, grid + 1, behaviour.decode_s)
    place, part = _place(np.broadcast_to(grid, (len(rows), len(grid))), np.maximum(most - 1, 0))
    prompt = _between(behaviour.prompt_s[rows], place, part)
    most_rps = most / (decode_steps * step + most * prompt)
    rate = behaviour.rate[rows]
    # A batch that is full to its slots decodes as one that meets so many; more load only queues.
    full = _between(behaviour.tpot_s[rows], place, part)
    free = np.maximum.accumulate(behaviour.ttft_s[rows], axis=1)
    held = np.minimum(grid, np.maximum(most - 1, 0)[:, None])
    limited = _Limited(
        spreads=np.interp(held, grid, behaviour.spreads), slot_spread=np.interp(most - 1, grid, behaviour.spreads),
        sequences=np.minimum(np.broadcast_to(grid, rate.shape), most[:, None]), rate=rate, ttft_s=free,
        free_ttft_s=free, tpot_s=np.minimum(np.maximum.accumulate(behaviour.tpot_s[rows], axis=1), full[:, None]),
        prompt_load=behaviour.prompt_load[rows], resident=behaviour.resident[rows],
        deviation=behaviour.deviation[rows], slots=most, most_rps=most_rps,
        variability=(workload.arrival_cv**2 + decode_scv) / 2,
    )  # fmt: skip
    wait = limited.wait_s(rate.T, limited.resident.T, limited.deviation.T, percentile).T
    return replace(limited, ttft_s=free + np.maximum.accumulate(wait, axis=1))


def _waiting_chance(slots: Floats, resident: Floats, deviation: Floats) -> Floats:
    """The chance that all slots are taken: Erlang's C for a real number of servers, scaled to the deviation.

    A batch whose deviation is sqrt(z) times Poisson's is one of as many sequences divided by z.
    """
    scale = np.maximum(deviation**2 / resident, TINY)
    servers, load = slots / scale, np.minimum(resident, slots * UNSTABLE) / scale
    density = np.exp(servers * np.log(load) - load - gammaln(servers + 1))
    blocked = density / np.maximum(gammaincc(servers + 1, load), 1e-300)
    return np.asarray(blocked / (1 - load / servers * (1 - blocked)))


def _capacity(limited: _Limited, slots: Slots, objectives: Objectives) -> tuple[Floats, Integers]:
    """The highest rates of a lane at which the objectives hold, and what ends them."""
    endless = np.full(len(limited.rate), np.inf)
    tpot = endless if objectives.tpot_s is None else _crossing(limited.rate, limited.tpot_s, objectives.tpot_s)
    ttft = free = endless
    if objectives.ttft_s is not None:
        free = _crossing(limited.rate, limited.free_ttft_s, objectives.ttft_s)
        ttft = _crossing(limited.rate, limited.ttft_s, objectives.ttft_s)
    by_slots = np.minimum(ttft, SATURATION * limited.most_rps)
    prompts = SATURATION * _crossing(limited.rate, limited.prompt_load, UNSTABLE)
    kv = np.where(slots.by_kv, by_slots, np.inf)
    seqs = np.where(slots.by_kv, np.inf, by_slots)
    limits = np.stack([tpot, free, kv, seqs, prompts], axis=1)
    binding = np.argmin(limits, axis=1)
    return limits[np.arange(len(limits)), binding], binding


def _at(limited: _Limited, rate: Floats, percentile: float) -> tuple[Floats, Floats, Floats]:
    """TTFT, TPOT and sequences of a lane at these rates."""
    place, part = _place(limited.rate, rate)
    over = rate >= limited.most_rps * UNSTABLE
    resident, deviation = _between(limited.resident, place, part), _between(limited.deviation, place, part)
    ttft = _between(limited.free_ttft_s, place, part) + limited.wait_s(rate, resident, deviation, percentile)
    tpot = np.where(over, limited.tpot_s[:, -1], _between(limited.tpot_s, place, part))
    sequences = _between(limited.sequences, place, part) * np.minimum(rate / limited.rate[:, 0], 1)
    return ttft, tpot, np.where(over, limited.sequences[:, -1], sequences)


def sequence_limits(behaviour: Curve, tpot_s: float, assurance: float) -> Floats:
    """The most sequences that a lane may decode at all times within this mean time between tokens, by row.

    With the wanted assurance; below one where not even one sequence keeps it.
    """
    slow = behaviour.mean_tpot_s * np.exp(float(ndtri(assurance)) * behaviour.spreads)
    full = np.broadcast_to(behaviour.sequences + 1, slow.shape)
    return _crossing(full, np.maximum.accumulate(slow, axis=1), tpot_s)


def _crossing(rate: Floats, values: Floats, limit: float) -> Floats:
    """The highest rate of each row up to which rising values stay within the limit; infinite if all of them do."""
    inside = np.logical_and.accumulate(values <= limit, axis=1).sum(axis=1)
    last = values.shape[1] - 1
    each = np.arange(len(values))
    left = np.clip(inside - 1, 0, last)
    right = np.clip(inside, 0, last)
    # Queues grow as 1 / (1 - load): what is linear in between is one over the value, and infinity is its end.
    start, end = 1 / values[each, left], 1 / values[each, right]
    part = np.where(inside > last, 0.0, np.clip((start - 1 / limit) / np.maximum(start - end, TINY), 0, 1))
    crossed = rate[each, left] + part * (rate[each, right] - rate[each, left])
    return np.where(inside == 0, 0.0, np.where(inside > last, np.inf, crossed))


def _place(rising: Floats, wanted: Floats) -> tuple[Integers, Floats]:
    """Where in each rising row a value lies: the column to its left, and how far to the next."""
    left = np.clip((rising <= wanted[:, None]).sum(axis=1) - 1, 0, rising.shape[1] - 2)
    each = np.arange(len(rising))
    start, end = rising[each, left], rising[each, left + 1]
    return left, np.clip((wanted - start) / np.maximum(end - start, TINY), 0, 1)


def _between(values: Floats, left: Integers, part: Floats) -> Floats:
    """Values between two columns of each row, linear in one over the value."""
    each = np.arange(len(values))
    start = 1 / np.maximum(values[each, left], TINY)
    end = 1 / np.maximum(values[each, left + 1], TINY)
    mixed = start + part * (end - start)
    return np.divide(1.0, mixed, out=np.full_like(mixed, np.inf), where=mixed > 0)


def predict(
    settings: EngineSettings,
    workload: Workload,
    objectives: Objectives,
    times: VectorTimes,
    *,
    memory: MemoryFit,
    requests_per_s: float | None = None,
) -> Prediction:
    """One replica whose memory is divided so, by default at the workload's rate."""
    check_workload(workload)
    check_objectives(objectives)
    rate = workload.requests_per_s if requests_per_s is None else requests_per_s
    if not (math.isfinite(rate) and rate > 0):
        raise RecommendError("requests_per_s", f"must be a positive number, is {rate}")
    lengths = lengths_of(workload, prefix_caching=settings.enable_prefix_caching)
    parallelism = settings.parallelism
    slots = slots_of(
        lengths, memory.layout, kv_blocks=np.array([float(memory.kv_blocks)]),
        max_num_seqs=np.array([float(settings.max_num_seqs)]), pipeline=parallelism.pipeline,
    )  # fmt: skip
    grid = load_grid(times, lengths, most_sequences=settings.max_num_seqs)
    behaviour = curve(
        times, lengths, np.array([float(settings.max_num_batched_tokens)]), grid,
        percentile=objectives.percentile, arrival_cv=workload.arrival_cv,
    )  # fmt: skip
    found = assess(
        behaviour, np.zeros(1, dtype=np.int64), slots, workload=workload, objectives=objectives,
        lanes=lanes_of(parallelism), decode_steps=lengths.mean_decode_steps, decode_scv=lengths.decode_scv,
        assurance=0.5, rate=rate,
    )  # fmt: skip
    return prediction_of(found, 0, lengths=lengths, kv_tokens=memory.kv_tokens * parallelism.data)


def prediction_of(found: Assessment, index: int, *, lengths: Lengths, kv_tokens: int) -> Prediction:
    """One setting's part of an assessment as a value."""
    capacity = _interval(found.capacity_rps[index])
    return Prediction(
        requests_per_s=float(found.requests_per_s[index]),
        ttft_s=_interval(found.ttft_s[index]),
        tpot_s=_interval(found.tpot_s[index]),
        capacity_rps=capacity,
        prefill_tokens_per_s=capacity.value * lengths.mean_prompt_tokens,
        decode_tokens_per_s=capacity.value * lengths.mean_output_tokens,
        mean_sequences=float(found.sequences[index]),
        kv_tokens=kv_tokens,
        binding=BINDINGS[int(found.binding[index])],
    )


def _interval(row: Floats) -> Interval:
    value, low, high = (float(item) for item in row)
    return Interval(value=value, low=low, high=high)
