"""The minutes of each deployment's demand: in memory while this coordinator leads, in the rollups' file across terms.

What the file holds is read once, when a deployment is first asked for; minutes that ended since are added as they
come. A deployment that nobody asks for costs nothing here.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable

import numpy as np

from enova_coordinator.core.series import MINUTE_S, Figures
from enova_coordinator.core.situation import history_of
from enova_coordinator.rollups import KEEP_S, Rollups
from enova_coordinator.telemetry import Telemetry
from enova_recommender.scaling.situation import Demand

DEMAND_NODE = ""                   # under which the rollups keep what is of no node
MINUTES_MAX = round(KEEP_S / MINUTE_S)
CATCH_UP_MINUTES = 9               # of the telemetry window that are looked at for minutes not taken yet
READ_WAIT_S = 2.0                  # real time for the file; without its answer the history starts anew


class DemandHistory:
    """Fourteen days of minutes, of those deployments that were asked for."""

    def __init__(self, telemetry: Telemetry, rollups: Rollups) -> None:
        self._telemetry = telemetry
        self._rollups = rollups
        self._minutes: dict[str, deque[tuple[float, Figures]]] = {}
        self._read_to_s: dict[str, float] = {}     # the newest minute of each that came from the file

    async def of(self, deployment: str) -> Demand:
        """The deployment's whole minutes up to now."""
        kept = self._minutes.get(deployment)
        if kept is None:
            kept = self._minutes[deployment] = deque(await self._read(deployment), maxlen=MINUTES_MAX)
            self._read_to_s[deployment] = kept[-1][0] if kept else -math.inf
        fresh = self._telemetry.demand_minutes(deployment, count=CATCH_UP_MINUTES)
        # A minute that was taken may have been told more of since, by an agent that was away.
        from_s = max(fresh.first_end_s, self._read_to_s[deployment] + 1.0)
        told: dict[float, Figures] = {}
        while kept and kept[-1][0] >= from_s:
            end_s, row = kept.pop()
            told[end_s] = row
        for place, minute in enumerate(fresh.values):
            end_s = fresh.first_end_s + place * MINUTE_S
            if end_s >= from_s and not np.isnan(minute).any():
                told[end_s] = minute.astype(np.float32)
        kept.extend(sorted(told.items(), key=lambda each: each[0]))
        return history_of([end_s for end_s, _ in kept], [row for _, row in kept])

    def forget(self, living: Callable[[str], bool]) -> None:
        """Drop the deployments that are gone."""
        for name in [name for name in self._minutes if not living(name)]:
            del self._minutes[name]
            self._read_to_s.pop(name, None)

    async def _read(self, deployment: str) -> list[tuple[float, Figures]]:
        now_s = self._telemetry.now_s
        answer = asyncio.wrap_future(
            self._rollups.read(deployment, nodes=(DEMAND_NODE,), start_s=now_s - KEEP_S)
        )
        # Not wait_for: Python 3.11's forgets that it was cancelled if the answer comes at the same moment.
        done, _ = await asyncio.wait([answer], timeout=READ_WAIT_S)
        if not done:
            answer.cancel()
            return []
        found = answer.result()
        # A model clock that was set back must not put tomorrow's minutes before today's.
        rows = zip(found.ends_s, found.rows, strict=True)
        return [(end_s, row) for end_s, row in rows if end_s <= now_s and len(row) == 4]
