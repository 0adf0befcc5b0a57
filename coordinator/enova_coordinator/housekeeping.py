"""The leader's small chores: minutes to the rollup file, old records out of the store, windows of what is gone."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from enova_common.errors import Corrupt, EnovaError
from enova_coordinator.core.episode import Episode, EpisodeState
from enova_coordinator.core.model import Decision, RequestRecord, Snapshot
from enova_coordinator.core.series import MINUTE_S
from enova_coordinator.demand_history import DEMAND_NODE
from enova_coordinator.rollups import NodeMinute, Rollups
from enova_coordinator.service_log import in_turns
from enova_coordinator.store import Compare, Delete, ModRevisionIs, Operation, Store, codec
from enova_coordinator.telemetry import Telemetry

BEAT_S = 0.5
PRUNE_EVERY_S = 60.0
REQUEST_KEEP_S = 86_400.0
DECISIONS_KEPT = 200               # of one deployment; each holds what its policy saw
ORPHANS_KEPT = 20                  # of a deployment that is no more, and only for ORPHAN_KEEP_S
ORPHAN_KEEP_S = 7 * 86_400.0
EPISODES_KEPT = 1_000              # that are over; 7 MB
EPISODE_KEEP_S = 90 * 86_400.0     # of those that are over
AT_ONCE = 50                       # that are read before all else has its turn: 12 ms of episodes
PRUNE_BATCH = 100                  # deletes in one transaction

V = TypeVar("V", RequestRecord, Decision, Episode)

log = logging.getLogger(__name__)


@dataclass(slots=True)
class HousekeepingFigures:
    """What went wrong, for the coordinator's own metrics and for people."""

    failures: dict[str, int] = field(default_factory=dict)
    """By chore."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a chore failed when it was last done; absent where it went well."""


class Housekeeping:
    """Runs while this coordinator leads. `snapshot` is the leader's, `guard` its compare for every write."""

    def __init__(
        self,
        store: Store,
        telemetry: Telemetry,
        rollups: Rollups,
        *,
        snapshot: Callable[[], Snapshot],
        guard: Callable[[], Compare],
        history_keep_s: float,
    ) -> None:
        self.figures = HousekeepingFigures()
        self._store = store
        self._telemetry = telemetry
        self._rollups = rollups
        self._snapshot = snapshot
        self._guard = guard
        self._history_keep_s = history_keep_s
        self._minute = self._whole_minutes()
        self._revisions: deque[tuple[float, int]] = deque()

    async def run(self) -> None:
        """Keep house until cancelled; a chore that fails is tried again when its turn comes, and costs no other one."""
        next_prune_s = time.monotonic()
        while True:
            if self._minute_is_over():
                await self._do("roll", self._roll)
                await self._do("forget", self._forget)
            if time.monotonic() >= next_prune_s:
                next_prune_s = time.monotonic() + PRUNE_EVERY_S
                await self._do("prune_requests", self._prune_requests)
                await self._do("prune_decisions", self._prune_decisions)
                await self._do("prune_episodes", self._prune_episodes)
                await self._do("compact", self._compact)
            await asyncio.sleep(BEAT_S)

    async def _do(self, name: str, chore: Callable[[], Awaitable[None]]) -> None:
        try:
            await chore()
        except EnovaError as error:
            log.warning("%s was not done: %s", name, error)
            reason = str(error)
        except Exception as error:
            # A defect here must cost one chore, not the leader its term.
            log.exception("%s was not done", name)
            reason = f"internal error: {type(error).__name__}: {error}"
        else:
            self.figures.reasons.pop(name, None)
            return
        self.figures.failures[name] = self.figures.failures.get(name, 0) + 1
        self.figures.reasons[name] = reason

    def _whole_minutes(self) -> int:
        """Minutes of model time that are over, and whose last frames should have come."""
        return math.floor((self._telemetry.now_s - self._telemetry.limits.step_s) / MINUTE_S)

    def _minute_is_over(self) -> bool:
        """Whether one ended since. Under a fast clock some are passed over: the file is no store of record."""
        minute, before = self._whole_minutes(), self._minute
        self._minute = max(minute, before)
        return minute > before

    async def _roll(self) -> None:
        """Hand the last whole minute over."""
        minute, snapshot, telemetry = self._minute, self._snapshot(), self._telemetry
        for node in snapshot.nodes:
            objects = {}
            for replica in snapshot.replicas.values():
                if replica.node == node and (found := telemetry.replica_minutes(replica.name, count=1)) is not None:
                    objects[replica.name] = found.values[-1].astype("f4")
            for gpu in telemetry.gpus_of(node):
                if (found := telemetry.gpu_minutes(node, gpu, count=1)) is not None:
                    objects[f"{node}/gpus/{gpu}"] = found.values[-1].astype("f4")
            if objects:
                self._rollups.write(NodeMinute(end_s=minute * MINUTE_S, node=node, objects=objects))
        demand = {
            deployment: telemetry.demand_minutes(deployment, count=1).values[-1].astype("f4")
            for deployment in telemetry.demanded()
        }
        if demand:
            self._rollups.write(NodeMinute(end_s=minute * MINUTE_S, node=DEMAND_NODE, objects=demand))

    async def _forget(self) -> None:
        snapshot = self._snapshot()
        self._telemetry.forget(
            replicas=snapshot.replicas.__contains__, deployments=snapshot.deployments.__contains__
        )

    async def _prune_requests(self) -> None:
        oldest_s = time.time() - REQUEST_KEEP_S
        records = await self._readable("requests", RequestRecord)
        await self._delete([(key, revision) for key, revision, record in records if record.create_time_s < oldest_s])

    async def _prune_decisions(self) -> None:
        by_deployment: dict[str, list[tuple[str, int, Decision]]] = {}
        for each in await self._readable("decisions", Decision):
            by_deployment.setdefault(each[2].deployment, []).append(each)
        living = self._snapshot().deployments
        oldest_s = time.time() - ORPHAN_KEEP_S
        for deployment, found in by_deployment.items():
            if deployment in living:
                old = found[:-DECISIONS_KEPT]
            else:  # some stay for a while: they tell why it was what it was
                old = [each for each in found[-ORPHANS_KEPT:] if each[2].create_time_s < oldest_s]
                old += found[:-ORPHANS_KEPT]
            await self._delete([(key, revision) for key, revision, _ in old])

    async def _prune_episodes(self) -> None:
        found = await self._readable("episodes", Episode)
        over = [each for each in found if each[2].state is EpisodeState.CLOSED]
        oldest_s = time.time() - EPISODE_KEEP_S
        old = over[:-EPISODES_KEPT] + [each for each in over[-EPISODES_KEPT:] if each[2].close_time_s < oldest_s]
        await self._delete([(key, revision) for key, revision, _ in old])

    async def _readable(self, collection: str, kind: type[V]) -> list[tuple[str, int, V]]:
        """Keys, revisions and values; one that cannot be read stays, is named, and keeps no other from going."""
        found: list[tuple[str, int, V]] = []
        entries, _ = await self._store.range(codec.prefix(collection))
        async for entry in in_turns(entries, at_once=AT_ONCE):
            try:
                value = codec.decode_as(kind, entry.value, key=entry.key)
            except Corrupt as error:
                log.warning("left in the store: %s", error)
            else:
                found.append((entry.key, entry.mod_revision, value))
        return found

    async def _delete(self, found: list[tuple[str, int]]) -> None:
        for start in range(0, len(found), PRUNE_BATCH):
            part = found[start : start + PRUNE_BATCH]
            compares: list[Compare] = [self._guard(), *(ModRevisionIs(key, revision) for key, revision in part)]
            operations: list[Operation] = [Delete(key) for key, _ in part]
            await self._store.transact(compares, operations)

    async def _compact(self) -> None:
        """Forget the store's history from before `history_keep_s`, as far as it was seen from here."""
        now_s = time.monotonic()
        self._revisions.append((now_s, self._snapshot().revision))
        oldest = 0
        while self._revisions and now_s - self._revisions[0][0] > self._history_keep_s:
            oldest = self._revisions.popleft()[1]
        if oldest:
            await self._store.compact(oldest)
