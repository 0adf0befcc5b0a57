"""Looks at one run of an engine: its figures, its canaries, its processes' activity, and what they mean."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from enova_agent.core import progress
from enova_agent.core.exposition import ExpositionParser, MalformedExposition
from enova_agent.core.local import HeldReplica
from enova_agent.core.telemetry import CanaryCounts, EngineMetrics
from enova_agent.engine import NotListening, ProbeFailed, ProbeImpossible
from enova_agent.host import Host, Scrape
from enova_agent.process import EngineProcess

_HEALTH_TIMEOUT_S = 2.0
_FIRST_TOKEN_TIMEOUT_S = 60.0      # the first request may compile kernels
_CANARY_TIMEOUT_S = 10.0           # unanswered for so long it is given up; the next one asks again
_SCRAPE_BELIEVED_S = 3.0


class EngineWatch:
    """One engine from its start to its end. `problem` is what it last did not answer as it should."""

    def __init__(
        self, host: Host, process: EngineProcess, *, port: int, endpoint: str, model: str, gpu_uuids: tuple[str, ...]
    ) -> None:
        self.scraped = Scrape()
        self.canaries = CanaryCounts()
        self.problem = ""
        self._host = host
        self._process = process
        self._port = port
        self._endpoint = endpoint
        self._model = model
        self._gpu_uuids = gpu_uuids
        self._parser = ExpositionParser()
        self._state = progress.Watch.begin(host.monotonic())
        self._activity: progress.Activity | None = None
        self._canary_since_s: float | None = None
        self._canary_ok_s: float | None = None

    def begin(self) -> None:
        """It serves from now on: progress is due."""
        self._state = progress.Watch.begin(self._host.monotonic())

    async def is_healthy(self) -> bool:
        """True if /health says 200, and says it from this engine."""
        try:
            await self._host.probe.health(self._endpoint, timeout_s=_HEALTH_TIMEOUT_S)
        except NotListening:
            return False
        except (ProbeFailed, ProbeImpossible) as error:
            self.problem = str(error)
            return False
        if await asyncio.to_thread(self._host.processes.owns_port, self._process, self._port):
            return True
        self.problem = f"port {self._port} is answered by a process that is not this engine"
        return False

    async def generates(self, timeout_s: float = _FIRST_TOKEN_TIMEOUT_S) -> bool | None:
        """One token: True if it came, False if not, None if this host could not even ask."""
        self.canaries = replace(self.canaries, started=self.canaries.started + 1)
        began_s = self._host.monotonic()
        try:
            answer = await self._host.probe.generate(self._endpoint, self._model, timeout_s=timeout_s)
        except (ProbeFailed, ProbeImpossible) as error:
            self.problem = str(error)
            # Engines do not count what was broken off (vLLM: not in request_success).
            self.canaries = replace(self.canaries, started=self.canaries.started - 1)
            return False if isinstance(error, ProbeFailed) else None
        count = self.canaries
        self.canaries = replace(
            count,
            finished=count.finished + 1,
            prompt_tokens=count.prompt_tokens + answer.prompt_tokens,
            output_tokens=count.output_tokens + answer.output_tokens,
            lasted_s=count.lasted_s + self._host.monotonic() - began_s,
        )
        return True

    async def canary(self) -> None:
        """See whether it still generates. Asked in vain it stays asked; a host that cannot ask proves nothing."""
        if self._canary_since_s is None:
            self._canary_since_s = self._host.monotonic()
        answered = await self.generates(_CANARY_TIMEOUT_S)
        if answered:
            self._canary_ok_s = self._host.monotonic()
        if answered is not False:
            self._canary_since_s = None

    async def scrape(self) -> None:
        """Read its figures."""
        timeout_s = self._host.settings.scrape_interval_s
        before = self.canaries
        try:
            page = await self._host.probe.metrics(self._endpoint, timeout_s=timeout_s)
            metrics = self._parser.parse(page)
        except (ProbeFailed, ProbeImpossible, MalformedExposition) as error:
            self.scraped = Scrape(time_s=self._host.monotonic(), error=str(error))
        else:
            self.scraped = Scrape(
                time_s=self._host.monotonic(), page=page, metrics=metrics, error="",
                canaries_before=before, canaries=self.canaries,
            )

    async def measure_activity(self) -> None:
        """See what its processes and GPUs do."""
        activity = await asyncio.to_thread(self._host.processes.activity, self._process, self._host.monotonic())
        self._activity = replace(activity, gpu_utilization=self._host.gpu_utilization(self._gpu_uuids))

    def judge(self, now_s: float, held: HeldReplica | None) -> progress.Judgement:
        """What all that means now."""
        self._state, judgement = progress.judge(
            self._state, self._observation(now_s, held), self._host.hang_limits
        )
        self._activity = None
        return judgement

    def runs_nothing(self, held: HeldReplica | None) -> bool:
        """True if neither the ingress nor the engine has any request of it; False where nobody knows."""
        metrics = self._fresh(self._host.monotonic())
        if held is None and metrics is None:
            return False
        waits = held is not None and held.in_flight + held.queued > 0
        runs = metrics is not None and (metrics.running or 0.0) + (metrics.waiting or 0.0) > 0
        return not waits and not runs

    def _fresh(self, now_s: float) -> EngineMetrics | None:
        return self.scraped.metrics if now_s - self.scraped.time_s < _SCRAPE_BELIEVED_S else None

    def _observation(self, now_s: float, held: HeldReplica | None) -> progress.Observation:
        metrics = self._fresh(now_s)
        running = None
        if metrics is not None and metrics.running is not None:
            running = metrics.running + (metrics.waiting or 0.0)
        return progress.Observation(
            now_s=now_s,
            marks=None if metrics is None else _marks(metrics),
            running=running,
            held=None if held is None else held.in_flight,
            silent_s=0.0 if held is None else held.silent_s,
            canary_since_s=self._canary_since_s,
            canary_ok_s=self._canary_ok_s,
            activity=self._activity,
        )


def _marks(metrics: EngineMetrics) -> tuple[float | None, ...]:
    """What moves whenever the engine's core works; KV use moves even while one long prompt is read."""
    return (
        metrics.iterations_total,
        metrics.generation_tokens_total,
        metrics.prompt_tokens_total,
        metrics.kv_cache_usage,
        metrics.preemptions_total,
        metrics.finished,
    )
