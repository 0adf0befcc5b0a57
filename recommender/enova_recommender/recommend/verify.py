"""A configuration measured instead of computed: the real scheduler in virtual time under seeded arrivals.

It takes the same step times as the closed form, and the same delay of first tokens beside steps, so what differs is
only queueing, batching and blocks. Arrivals of all rates are the same draws, stretched: figures at two rates differ by
their rates, not by luck.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from enova_recommender.engine import Event, Finished, FirstToken, Limits, Request, Scheduler, Stepped
from enova_recommender.memory import MemoryFit, block_demand
from enova_recommender.performance import StepTimes, first_token_delay
from enova_recommender.recommend.capacity import SATURATION, lanes_of
from enova_recommender.recommend.capacity_lengths import Floats, lengths_of
from enova_recommender.recommend.errors import RecommendError
from enova_recommender.recommend.types import EngineSettings, Objectives, Prediction, Workload
from enova_recommender.types import Batch, Interval

REQUESTS = 400             # that one run counts
WARM_UP = 2.0              # times the mean batch: requests before those that count
TRAIL = 1.0                # times the mean batch: requests after them, so that the last ones meet a full batch
AROUND_MAX = 3000          # requests before and after together
LONGER = 1.25              # times as long as thought may requests be held before a run is repeated
BISECTIONS = 6             # of the capacity's logarithm
BRACKET = 1.5              # the capacity is sought between the predicted one divided and multiplied by this
BACKLOG = 1 - SATURATION   # share of the requests that may wait when the last one comes, if the engine kept up
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one lane of a replica did at one rate."""

    requests_per_s: float
    ttft_s: float              # at the percentile
    tpot_s: float              # at the percentile; 0 if no request has a second token
    mean_ttft_s: float
    mean_tpot_s: float
    mean_sequences: float
    mean_held_s: float         # from arrival to the last token
    is_stable: bool            # the engine kept up with the arrivals

    def meets(self, objectives: Objectives) -> bool:
        """Whether the objectives hold."""
        first = objectives.ttft_s is None or self.ttft_s <= objectives.ttft_s
        return self.is_stable and first and (objectives.tpot_s is None or self.tpot_s <= objectives.tpot_s)


def measure(
    settings: EngineSettings,
    workload: Workload,
    times: StepTimes,
    *,
    memory: MemoryFit,
    requests_per_s: float,
    percentile: float,
    seed: int,
    requests: int = REQUESTS,
    held_s: float = 0.0,
) -> Measurement:
    """Run one lane of a replica at its share of the rate, warmed up until its batch is as full as it gets.

    `held_s` is about how long a request is held, if that is known: else a first run finds it.
    """
    while True:
        found = _run(
            settings, workload, times, memory=memory, requests_per_s=requests_per_s, percentile=percentile, seed=seed,
            requests=requests, held_s=held_s,
        )  # fmt: skip
        # A batch that is still filling holds requests for less time than it will: look again with a longer start.
        if found.mean_held_s <= LONGER * held_s or requests_per_s * held_s >= AROUND_MAX:
            return found
        held_s = found.mean_held_s


def _run(
    settings: EngineSettings, workload: Workload, times: StepTimes, *, memory: MemoryFit, requests_per_s: float,
    percentile: float, seed: int, requests: int, held_s: float,
) -> Measurement:  # fmt: skip
    """One run with a warm-up for requests that are held so long."""
    lanes = lanes_of(settings.parallelism)
    limits = _limits(settings, workload, memory)
    held = min(requests_per_s / lanes * held_s, AROUND_MAX / (WARM_UP + TRAIL))
    before, after = math.ceil(WARM_UP * held), math.ceil(TRAIL * held)
    count = before + requests + after
    arrivals = _arrivals(
        workload, settings, rate=requests_per_s / lanes, seed=seed, requests=count, block_size=limits.block_size
    )
    if max(item.prompt_tokens + item.output_tokens for _, item in arrivals) > limits.num_blocks * limits.block_size:
        raise RecommendError("workload.lengths", f"a request needs more than {memory.kv_tokens} KV tokens")
    scheduler = Scheduler(limits, times)
    for at_s, item in arrivals:
        scheduler.submit(item, at_s)
    counted = {item.id for _, item in arrivals[before : before + requests]}
    seen = _read(scheduler.advance(math.inf))
    window = arrivals[before][0], arrivals[before + requests - 1][0]
    found = _measurement(
        seen, arrivals, counted, window, requests_per_s=requests_per_s, percentile=percentile, lanes=lanes
    )
    delay = _delay_s(times, settings, workload, sequences=found.mean_sequences / lanes)
    return replace(found, ttft_s=found.ttft_s + delay, mean_ttft_s=found.mean_ttft_s + delay)


def _delay_s(times: StepTimes, settings: EngineSettings, workload: Workload, *, sequences: float) -> float:
    """What first tokens take beside steps, among as many sequences as a request meets, itself included."""
    lengths = lengths_of(workload, prefix_caching=settings.enable_prefix_caching)
    met = round(sequences) + 1
    decode = Batch(decode_sequences=met, context_tokens=round(met * lengths.context_tokens))
    return first_token_delay(times).after_s(times.step_s(decode))


def verify(
    settings: EngineSettings,
    workload: Workload,
    objectives: Objectives,
    times: StepTimes,
    *,
    predicted: Prediction,
    memory: MemoryFit,
    seed: int,
    requests: int = REQUESTS,
) -> Prediction:
    """The figures of a prediction, measured at its rate; intervals keep their relative width."""

    def at(rate: float) -> Measurement:
        return measure(
            settings, workload, times, memory=memory, requests_per_s=rate, percentile=objectives.percentile,
            seed=seed, requests=requests, held_s=predicted.mean_sequences / predicted.requests_per_s,
        )  # fmt: skip

    found = at(predicted.requests_per_s)
    capacity = _capacity(at, objectives, guess=predicted.capacity_rps.value)
    scale = capacity / predicted.capacity_rps.value if predicted.capacity_rps.value else 1.0
    return replace(
        predicted,
        ttft_s=_moved(predicted.ttft_s, found.ttft_s),
        tpot_s=_moved(predicted.tpot_s, found.tpot_s),
        capacity_rps=_moved(predicted.capacity_rps, capacity),
        prefill_tokens_per_s=predicted.prefill_tokens_per_s * scale,
        decode_tokens_per_s=predicted.decode_tokens_per_s * scale,
        mean_sequences=found.mean_sequences,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """Moments of each request, and the steps as arrays of start, end and decoding sequences."""

    first_s: dict[str, float]
    finished_s: dict[str, float]
    steps: Floats


def _limits(settings: EngineSettings, workload: Workload, memory: MemoryFit) -> Limits:
    """The limits of one lane. The scheduler knows one kind of blocks: others count as those of the mean request."""
    stages, layout, blocks, block_size = settings.parallelism.pipeline, memory.layout, memory.kv_blocks, BLOCK_SIZE
    if layout.is_plain:
        block_size = layout.groups[0].block_tokens
    elif layout.groups:
        lengths = lengths_of(workload, prefix_caching=settings.enable_prefix_caching)
        blocks = int(blocks / block_demand(layout, lengths.sample).mean * lengths.held_tokens / BLOCK_SIZE)
    else:  # a model that keeps nothing
        blocks = settings.max_num_seqs * -(-settings.max_model_len // BLOCK_SIZE)
    return Limits(
        num_blocks=max(1, blocks // stages),
        block_size=block_size,
        max_num_seqs=max(1, settings.max_num_seqs // stages),
        max_num_batched_tokens=max(settings.max_num_batched_tokens, settings.max_num_seqs),
        enable_prefix_caching=settings.enable_prefix_caching,
    )


def _arrivals(
    workload: Workload, settings: EngineSettings, *, rate: float, seed: int, requests: int, block_size: int
) -> list[tuple[float, Request]]:
    """Requests with their moments: each pair of lengths as often as any other, in an order drawn by the seed."""
    draw = np.random.default_rng(seed)
    picks = draw.permutation(np.resize(draw.permutation(len(workload.lengths)), requests))
    scv = workload.arrival_cv**2
    gaps = draw.gamma(1 / scv, scv, requests) if scv else np.ones(requests)
    moments = np.cumsum(gaps / rate).tolist()
    share = workload.cached_prefix_share if settings.enable_prefix_caching else 0.0
    found = []
    for index, pick in enumerate(picks.tolist()):
        prompt, output = workload.lengths[pick]
        cached = range(int(share * prompt) // block_size)  # the same beginning for all
        found.append((moments[index], Request(
            id=str(index), prompt_tokens=prompt, output_tokens=output, block_hashes=tuple(cached)
        )))  # fmt: skip
    return found


def _read(events: list[Event]) -> _Seen:
    """What the events tell."""
    first: dict[str, float] = {}
    finished: dict[str, float] = {}
    steps: list[tuple[float, float, float]] = []
    for event in events:
        match event:
            case FirstToken():
                first[event.request.id] = event.at_s
            case Finished():
                finished[event.request.id] = event.at_s
            case Stepped():
                steps.append((event.start_s, event.end_s, float(event.decode_sequences)))
            case _:
                continue  # admissions and preemptions show in the moments of the others
    return _Seen(first_s=first, finished_s=finished, steps=np.array(steps, dtype=np.float64))


def _measurement(
    seen: _Seen, arrivals: list[tuple[float, Request]], counted: set[str], window: tuple[float, float], *,
    requests_per_s: float, percentile: float, lanes: int,
) -> Measurement:  # fmt: skip
    """Percentiles over the counted requests, the batch over their window, and whether the engine kept up."""
    mine = [(at_s, item) for at_s, item in arrivals if item.id in counted]
    ttft = np.array([seen.first_s[item.id] - at_s for at_s, item in mine])
    several = [item for _, item in mine if item.output_tokens > 1]
    tpot = np.array([
        (seen.finished_s[item.id] - seen.first_s[item.id]) / (item.output_tokens - 1) for item in several
    ] or [0.0])
    start, end = window
    overlap = np.clip(np.minimum(seen.steps[:, 1], end) - np.maximum(seen.steps[:, 0], start), 0, None)
    held = float(overlap @ seen.steps[:, 2]) / max(end - start, 1e-9)
    late = sum(1 for at_s, item in arrivals if at_s <= end < seen.first_s[item.id])
    return Measurement(
        requests_per_s=requests_per_s,
        ttft_s=float(np.quantile(ttft, percentile)),
        tpot_s=float(np.quantile(tpot, percentile)),
        mean_ttft_s=float(ttft.mean()),
        mean_tpot_s=float(tpot.mean()),
        mean_sequences=lanes * held,
        mean_held_s=float(np.mean([seen.finished_s[item.id] - at_s for at_s, item in mine])),
        is_stable=late <= max(1.0, BACKLOG * sum(1 for at_s, _ in arrivals if at_s <= end)),
    )


def _capacity(at: Callable[[float], Measurement], objectives: Objectives, *, guess: float) -> float:
    """The highest rate at which the objectives hold; 0 if they do at none down to a fortieth of the guess."""
    if guess <= 0:
        return 0.0
    low, high = guess / BRACKET, guess * BRACKET
    while not at(low).meets(objectives):
        low, high = low / BRACKET**2, low
        if low < guess / 40:
            return 0.0
    while at(high).meets(objectives) and high < 40 * guess:
        low, high = high, high * BRACKET**2
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high)
        if at(middle).meets(objectives):
            low = middle
        else:
            high = middle
    return low


def _moved(interval: Interval, value: float) -> Interval:
    """Another value with bounds at the same relative distances."""
    if not interval.value or not math.isfinite(interval.value):
        return Interval(value=value, low=value, high=value)
    scale = value / interval.value
    return Interval(value=value, low=interval.low * scale, high=interval.high * scale)
