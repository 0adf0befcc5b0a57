"""Keeps, for a while, what was counted of each deployment's requests, so that any recent window can be told apart.

`look` is called on a beat: it takes what each engine counted since the last look out of the newest message of each
replica, adds it to its deployment, and now and then remembers the sums as they were. It gives way to the rest of the
event loop after each deployment and every few replicas. Nothing of it is stored: a new leader begins anew.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from enova_coordinator.core.model import Replica, ReplicaState, Snapshot
from enova_coordinator.core.series import COLUMN, REQUEST_SKETCHES
from enova_coordinator.core.service_times import EngineCounters, EngineLook, HistogramCounts, ServiceSums, change
from enova_coordinator.core.sketch import MergedSketch
from enova_coordinator.telemetry import Telemetry

REMEMBER_EVERY_S = 30.0            # model time
REMEMBERED_MAX = 31                # of one deployment: a quarter of an hour
AT_ONCE = 100                      # replicas that are looked at before all else has its turn: 10 ms

T = TypeVar("T")


@dataclass(slots=True)
class _Service:
    """One deployment."""

    first: ServiceSums
    latest: ServiceSums            # of the last look: ingresses and engines as of one moment
    histograms: dict[str, HistogramCounts] = field(default_factory=dict)
    remembered: deque[ServiceSums] = field(default_factory=lambda: deque(maxlen=REMEMBERED_MAX))


class ServiceLog:
    """The sums of all deployments. `read` makes counters of a replica's newest message, None where it has none."""

    def __init__(self, telemetry: Telemetry, *, read: Callable[[object], EngineCounters | None]) -> None:
        self._telemetry = telemetry
        self._read = read
        self._services: dict[str, _Service] = {}
        self._engines: dict[str, tuple[float, EngineCounters]] = {}
        self._older: frozenset[str] | None = None  # uids of the replicas that served before the first look

    async def look(self, snapshot: Snapshot) -> list[EngineLook]:
        """What engines did since the last look. The first look at an engine tells nothing. One look at a time."""
        now_s = self._telemetry.now_s
        if self._older is None:
            if not snapshot.revision:
                return []
            serving = (each for each in snapshot.replicas.values() if each.status.state is ReplicaState.READY)
            self._older = frozenset(each.uid for each in serving)
        async for name in in_turns(snapshot.deployments, at_once=1):
            if name not in self._services:
                sums = await self._sums(name, {}, now_s)
                self._services[name] = _Service(sums, sums)
        replicas = in_turns(snapshot.replicas.values())
        looks = [look async for replica in replicas if (look := self._look_at(replica, now_s)) is not None]
        async for name, service in in_turns(self._services.items(), at_once=1):
            service.latest = await self._sums(name, service.histograms, now_s)
            past = service.remembered
            if now_s - (past[-1] if past else service.first).time_s >= REMEMBER_EVERY_S:
                past.append(service.latest)
        self._forget(snapshot)
        return looks

    def since(self, deployment: str, *, window_s: float) -> tuple[float, ServiceSums] | None:
        """When a window of at least `window_s` (0: all) began, and what came since; None before the first look."""
        service = self._services.get(deployment)
        if service is None:
            return None
        start_s = service.latest.time_s - window_s
        past = [each for each in service.remembered if window_s and each.time_s <= start_s]
        older = past[-1] if past else service.remembered[0] if window_s and _is_full(service) else service.first
        return older.time_s, service.latest.minus(older)

    def _look_at(self, replica: Replica, now_s: float) -> EngineLook | None:
        source = self._telemetry.replica_source(replica.name)
        counters = self._read(source) if source is not None else None
        if counters is None:
            return None
        then_s, old = self._engines.get(replica.name, (now_s, None))
        self._engines[replica.name] = (now_s, counters)
        assert self._older is not None, "set by the first look"
        # All that an engine counted which began to serve under our eyes is new.
        changed = counters if old is None and replica.uid not in self._older else change(counters, old)
        service = self._services.get(replica.deployment)
        if changed is None or service is None:
            return None
        for metric, counts in changed.histograms.items():
            known = service.histograms.get(metric)
            service.histograms[metric] = counts if known is None else known.plus(counts)
        running, usage = self._gauges(replica.name, now_s - then_s)
        return EngineLook(replica=replica, time_s=now_s, change=changed, running=running, kv_cache_usage=usage)

    def _gauges(self, replica: str, span_s: float) -> tuple[float, float]:
        """Running sequences and use of the KV cache, on mean over the steps in which something ran."""
        steps = max(1, math.ceil(span_s / self._telemetry.limits.step_s))
        found = self._telemetry.replica_window(replica, steps=steps)
        if found is None:
            return math.nan, math.nan
        rows = found[1][:, [COLUMN["running"], COLUMN["kv_cache_usage"]]].astype(np.float64)
        rows = rows[(rows[:, 0] > 0) & ~np.isnan(rows[:, 1])]
        return (float(rows[:, 0].mean()), float(rows[:, 1].mean())) if len(rows) else (math.nan, math.nan)

    async def _sums(self, deployment: str, histograms: Mapping[str, HistogramCounts], now_s: float) -> ServiceSums:
        sketches: Mapping[str, MergedSketch] = {name: MergedSketch() for name in REQUEST_SKETCHES}
        async for totals in in_turns(self._telemetry.totals(deployment).values()):
            for name, sketch in zip(REQUEST_SKETCHES, totals.sketches(), strict=True):
                sketches[name].merge_merged(sketch)
        return ServiceSums(time_s=now_s, sketches=sketches, histograms=dict(histograms))

    def _forget(self, snapshot: Snapshot) -> None:
        for name in [name for name in self._engines if name not in snapshot.replicas]:
            del self._engines[name]
        for name in [name for name in self._services if name not in snapshot.deployments]:
            del self._services[name]


async def in_turns(values: Iterable[T], *, at_once: int = AT_ONCE) -> AsyncIterator[T]:
    """The values; whatever else waits for the event loop has its turn after every `at_once` of them."""
    for place, value in enumerate(values):
        if place and not place % at_once:
            await asyncio.sleep(0)
        yield value


def _is_full(service: _Service) -> bool:
    return len(service.remembered) == REMEMBERED_MAX
