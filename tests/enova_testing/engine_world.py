"""An engine in virtual time whose counters are read as a coordinator reads them, frame by frame."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from enova_recommender.engine import (
    Admitted,
    Event,
    FirstToken,
    Limits,
    Preempted,
    Request,
    Resumed,
    Scheduler,
    Stepped,
)
from enova_recommender.performance import StepTimes
from enova_recommender.performance.live_steps import EngineChange
from enova_recommender.types import Batch

BLOCK_SIZE = 16


@dataclass(slots=True)
class Recorded:
    """Step times of the world that note every batch they were asked for and its duration."""

    times: StepTimes
    steps: list[tuple[Batch, float]] = field(default_factory=list)

    def step_s(self, batch: Batch) -> float:
        """Duration of one step, noted."""
        seconds = self.times.step_s(batch)
        self.steps.append((batch, seconds))
        return seconds

    def decode_run_s(self, *, sequences: int, context_tokens: int, steps: int) -> float:
        """Duration of a run of decode steps; the scheduler is asked for single ones here."""
        return sum(
            self.times.step_s(Batch(decode_sequences=sequences, context_tokens=context_tokens + sequences * step))
            for step in range(steps)
        )


def frames(
    times: StepTimes, *, rate: float, frame_s: float, count: int, seed: int, num_blocks: int = 20_000,
    prompt: tuple[int, int] = (50, 1200), output: tuple[int, int] = (20, 300),
) -> Iterator[EngineChange]:  # fmt: skip
    """What the counters of one engine under a Poisson load moved by in each frame, as vLLM counts."""
    draw = random.Random(seed)
    scheduler = Scheduler(Limits(num_blocks=num_blocks, block_size=BLOCK_SIZE), times, coalesce=False)
    at_s, index = 0.0, 0
    for frame in range(count):
        end_s = (frame + 1) * frame_s
        while at_s < end_s:
            request = Request(
                id=str(index), prompt_tokens=draw.randint(*prompt), output_tokens=draw.randint(*output)
            )
            scheduler.submit(request, at_s)
            at_s, index = at_s + draw.expovariate(rate), index + 1
        gauges: list[tuple[int, float]] = []
        events: list[Event] = []
        for tick in range(10):
            events += scheduler.advance(end_s - frame_s + (tick + 1) * frame_s / 10)
            if scheduler.running:
                gauges.append((scheduler.running, scheduler.kv_usage))
        yield _change(events, gauges, num_blocks * BLOCK_SIZE)


def _change(events: Sequence[Event], gauges: list[tuple[int, float]], room: int) -> EngineChange:
    steps = [event for event in events if isinstance(event, Stepped)]
    first = [event for event in events if isinstance(event, FirstToken)]
    gaps = [(event.decode_sequences * event.count, event) for event in steps if event.decode_sequences]
    running = sum(count for count, _ in gauges) / len(gauges) if gauges else 0.0
    usage = sum(share for _, share in gauges) / len(gauges) if gauges else 0.0
    cached = sum(event.cached_tokens for event in events if isinstance(event, Admitted))
    return EngineChange(
        steps=float(sum(event.count for event in steps if event.made_tokens)),
        prompt_tokens=float(sum(event.request.prompt_tokens for event in first) - cached),
        first_tokens=float(len(first)),
        decode_tokens=float(sum(count for count, _ in gaps)),
        decode_s=math.fsum(count * (event.end_s - event.start_s) / event.count for count, event in gaps),
        context_tokens=usage * room / running if running else 0.0,
        preemptions=float(sum(isinstance(event, Preempted | Resumed) for event in events)),
    )
