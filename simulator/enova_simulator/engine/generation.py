"""Drives the scheduler on the model clock and tells each request what it has got.

Theory of operation. Between wake-ups nothing runs: a timer is set for the scheduler's next observable change, or for
the next tick while somebody streams, so an idle engine costs nothing. Engine time is model time less the time during
which the core was stopped or hung: a frozen engine resumes where it was, it does not catch up.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

from enova_common.vllm import FinishReason
from enova_recommender.engine import (
    Admitted,
    Event,
    Finished,
    FirstToken,
    Preempted,
    Rejected,
    Request,
    Resumed,
    Scheduler,
    Stepped,
)
from enova_simulator.engine.clock import ModelClock
from enova_simulator.engine.metrics import EngineMetrics
from enova_simulator.engine.model import Served

# Real seconds. A tick carries all tokens made since the last one, so that two cores carry many engines; a scaled
# clock makes more tokens a tick, not more ticks.
TICK_S = 0.015
SCALED_TICK_S = 0.04
TICK_PER_STREAM_S = 0.0005
TICK_MAX_S = 0.25
WAKE_MIN_S = 0.002
WAKE_MAX_S = 0.1  # how late a stopped core is noticed


@dataclass(slots=True, kw_only=True)
class Timeline:
    """When things happened to a request, in model time."""

    arrived_s: float = math.nan
    admitted_s: float = math.nan
    first_token_s: float = math.nan
    interrupted_s: float = math.nan  # when it was preempted, which is when its last token was made
    cached_tokens: int = 0


class Generation:
    """One request in the engine, as its HTTP handler sees it."""

    def __init__(self, request: Request, *, reason: FinishReason, max_tokens: int, interval: int) -> None:
        self.request = request
        self.reason = reason  # why it will end, if it is left to
        self.max_tokens = max_tokens
        self.timeline = Timeline()
        self.made = 0
        self.is_done = False
        self.failure = ""
        self._interval = interval
        self._seen = 0
        self._wake = asyncio.Event()

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache held."""
        return self.timeline.cached_tokens

    def update(self, made: int) -> None:
        """The engine has made so many tokens of it."""
        self.made = made
        if made - self._seen >= (self._interval if self._seen else 1):
            self._wake.set()

    def finish(self, failure: str = "") -> None:
        """Nothing more will come."""
        self.failure = failure
        self.is_done = True
        self._wake.set()

    async def more(self) -> int:
        """Wait until there are tokens that were not seen, or the end; returns all made so far."""
        while self.made == self._seen and not self.is_done:
            self._wake.clear()
            await self._wake.wait()
        self._wake.clear()
        self._seen = self.made
        return self.made

    async def end(self) -> None:
        """Wait for the end only."""
        self._interval = self.request.output_tokens + 1
        while not self.is_done:
            self._wake.clear()
            await self._wake.wait()


class Generator:
    """The engine behind the API: scheduler, clock, metrics and all unfinished requests."""

    def __init__(self, served: Served, clock: ModelClock, metrics: EngineMetrics) -> None:
        self.served = served
        self.metrics = metrics
        self.scheduler = Scheduler(served.limits, served.times)
        self.is_hung = False
        self._lost_blocks = 0
        self.core_stopped: Callable[[], bool] = lambda: False
        self.on_request: Callable[[], None] = lambda: None
        self.busy_s = 0.0  # model seconds during which a step ran
        self._clock = clock
        self._synced_s = clock.now_s()
        self._engine_s = 0.0
        self._frozen_s = self._synced_s  # model time less engine time
        self._generations: dict[str, Generation] = {}
        self._streams = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        self._is_frozen = False
        self._last_accepted_s = -math.inf

    @property
    def outstanding(self) -> int:
        """Requests that wait or run."""
        return len(self._generations)

    @property
    def is_busy(self) -> bool:
        """Whether a step is being computed."""
        return self.scheduler.step_started_s is not None

    @property
    def accepted_ago_s(self) -> float:
        """Model seconds since the last request was taken."""
        return self._clock.now_s() - self._last_accepted_s

    def submit(self, generation: Generation, *, streams: bool) -> None:
        """Hand a request to the scheduler."""
        self.settle()
        self.scheduler.submit(generation.request, self._engine_s)
        self._generations[generation.request.id] = generation
        generation.timeline.arrived_s = self._last_accepted_s = self._synced_s
        self._streams += streams
        self.settle()
        self.on_request()

    def leave(self, generation: Generation, *, streams: bool) -> None:
        """The handler is done with a request, whether it ended or its client went away."""
        self._streams -= streams
        self.settle()
        if self._generations.pop(generation.request.id, None) is not None and not self._stopped:
            self.scheduler.cancel(generation.request.id)
            self.settle()

    def stop(self) -> None:
        """No more progress, ever; requests keep hanging."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def fail(self, message: str) -> None:
        """The core died: every request ends with an error."""
        self.stop()
        for generation in list(self._generations.values()):
            generation.finish(failure=message)
        self._generations.clear()

    def now_s(self) -> float:
        """Model time."""
        return self._clock.now_s()

    def busy_until_now_s(self) -> float:
        """Model seconds in which a step ran, the part of the one in flight included."""
        started_s = self.scheduler.step_started_s
        return self.busy_s + (0.0 if started_s is None else max(0.0, self._engine_s - started_s))

    def settle(self) -> None:
        """Bring the engine up to now, tell the requests, and set the next wake-up."""
        if self._stopped:
            return
        self._pass_time()
        self._record(self.scheduler.advance(self._engine_s))
        for name, made in self.scheduler.progress():
            self._generations[name].update(made)
        self._arm()

    def _pass_time(self) -> None:
        now_s = self._clock.now_s()
        span_s = max(0.0, now_s - self._synced_s)
        self._synced_s = now_s
        self._is_frozen = self.is_hung or (bool(self._generations) and self.core_stopped())
        if self._is_frozen:
            self._frozen_s += span_s
        else:
            self._engine_s += span_s

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        next_s = self.scheduler.next_event()
        if next_s == math.inf:
            return
        delay_s = WAKE_MAX_S
        if not self._is_frozen:
            delay_s = min(delay_s, self._clock.real_span_s(next_s - self._engine_s))
        if self._streams and not self._is_frozen:
            tick_s = TICK_S if self._clock.scale <= 1 else SCALED_TICK_S
            delay_s = min(delay_s, max(tick_s, min(TICK_MAX_S, self._streams * TICK_PER_STREAM_S)))
        # A whisker later than the change itself, so that rounding does not wake us just before it.
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(WAKE_MIN_S, delay_s + 1e-4), self.settle)

    # -- events to metrics

    def _record(self, events: list[Event]) -> None:
        metrics = self.metrics
        for index, event in enumerate(events):
            match event:
                case Stepped():
                    self._record_step(event, events, index)
                case Admitted():
                    self._record_admission(event)
                case FirstToken():
                    self._record_first_token(event)
                case Finished():
                    self._record_finish(event)
                case Preempted():
                    metrics.add("num_preemptions", 1)
                    self._record_interruption(event)
                case Resumed():
                    self._record_resumption(event)
                case Rejected():
                    self._generations.pop(event.request.id).finish(failure="rejected")
        capacity = self.scheduler.waiting
        metrics.set("num_requests_running", float(self.scheduler.running))
        metrics.set("num_requests_waiting", float(capacity))
        metrics.set("num_requests_waiting_by_reason", float(capacity), "capacity")
        # A block that is lost is not free: an engine that leaks counts it as used.
        lost = self._lost_blocks / self.served.limits.num_blocks if self.served.limits.num_blocks else 0.0
        metrics.set("kv_cache_usage_perc", lost + (1.0 - lost) * self.scheduler.kv_usage)

    def lose_blocks(self, count: int) -> None:
        """Lose up to `count` free blocks of the KV cache for good."""
        self._lost_blocks += self.scheduler.withhold_blocks(count)

    def _record_step(self, event: Stepped, events: list[Event], index: int) -> None:
        """vLLM counts an iteration by what it put out: the tokens it made, and prompts that it completed."""
        metrics = self.metrics
        span_s = (event.end_s - event.start_s) / event.count
        self.busy_s += event.end_s - event.start_s
        tokens = event.made_tokens
        for later in events[index + 1 :]:
            if isinstance(later, Stepped | Admitted):
                break
            if isinstance(later, FirstToken):
                tokens += later.request.prompt_tokens
        if tokens:
            metrics.observe("iteration_tokens_total", tokens, event.count)
        if event.decode_sequences:
            metrics.observe("inter_token_latency_seconds", span_s, event.decode_sequences * event.count)
        metrics.add("generation_tokens", event.made_tokens * event.count)

    def _record_interruption(self, event: Preempted) -> None:
        generation = self._generations.get(event.request.id)
        # Preempted again while it is being computed again, its last token is still the one before the first time.
        if generation is not None and event.generated_tokens and math.isnan(generation.timeline.interrupted_s):
            generation.timeline.interrupted_s = event.at_s + self._frozen_s

    def _record_resumption(self, event: Resumed) -> None:
        generation = self._generations.get(event.request.id)
        if generation is not None:
            gap_s = event.at_s + self._frozen_s - generation.timeline.interrupted_s
            self.metrics.observe("inter_token_latency_seconds", gap_s)
            generation.timeline.interrupted_s = math.nan

    def _record_admission(self, event: Admitted) -> None:
        generation = self._generations.get(event.request.id)
        if generation is None or event.again:
            return
        prompt, cached = event.request.prompt_tokens, event.cached_tokens
        generation.timeline.admitted_s = event.at_s + self._frozen_s
        generation.timeline.cached_tokens = cached
        if self.served.limits.enable_prefix_caching:
            self.metrics.add("prefix_cache_queries", prompt)
            self.metrics.add("prefix_cache_hits", cached)

    def _record_first_token(self, event: FirstToken) -> None:
        generation = self._generations.get(event.request.id)
        if generation is None:
            return
        timeline, metrics = generation.timeline, self.metrics
        timeline.first_token_s = event.at_s + self._frozen_s
        metrics.observe("time_to_first_token_seconds", timeline.first_token_s - timeline.arrived_s)
        prompt, cached = event.request.prompt_tokens, timeline.cached_tokens
        metrics.add("prompt_tokens", prompt)
        metrics.add("prompt_tokens_by_source", prompt - cached, "local_compute")
        metrics.add("prompt_tokens_by_source", cached, "local_cache_hit")
        metrics.add("prompt_tokens_cached", cached)
        metrics.add("prompt_tokens_cached_by_source", cached, "device")

    def _record_finish(self, event: Finished) -> None:
        generation = self._generations.pop(event.request.id, None)
        if generation is None:
            return
        timeline, metrics, request = generation.timeline, self.metrics, event.request
        end_s = event.at_s + self._frozen_s
        decode_s = end_s - timeline.first_token_s
        metrics.add("request_success", 1, generation.reason)
        metrics.observe("request_prompt_tokens", request.prompt_tokens)
        metrics.observe("request_generation_tokens", request.output_tokens)
        metrics.observe("request_max_num_generation_tokens", request.output_tokens)
        metrics.observe("request_params_n", 1)
        metrics.observe("request_params_max_tokens", generation.max_tokens)
        per_token_s = decode_s / (request.output_tokens - 1) if request.output_tokens > 1 else 0.0
        metrics.observe("request_time_per_output_token_seconds", per_token_s)
        metrics.observe("e2e_request_latency_seconds", end_s - timeline.arrived_s)
        metrics.observe("request_queue_time_seconds", timeline.admitted_s - timeline.arrived_s)
        metrics.observe("request_inference_time_seconds", end_s - timeline.admitted_s)
        metrics.observe("request_prefill_time_seconds", timeline.first_token_s - timeline.admitted_s)
        metrics.observe("request_decode_time_seconds", decode_s)
        metrics.observe("request_num_preemptions", event.preemptions)
        metrics.observe("request_prefill_kv_computed_tokens", request.prompt_tokens - timeline.cached_tokens)
        generation.made = request.output_tokens
        generation.finish()
