"""The leader's small chores: minutes to the rollup file, old records out of the store, windows of what is gone."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable

from enova_common.errors import EnovaError
from enova_coordinator.core.model import Decision, RequestRecord, Snapshot
from enova_coordinator.core.series import MINUTE_S
from enova_coordinator.rollups import NodeMinute, Rollups
from enova_coordinator.store import Compare, Delete, ModRevisionIs, Operation, Store, codec
from enova_coordinator.telemetry import Telemetry

BEAT_S = 0.5
PRUNE_EVERY_S = 60.0
REQUEST_KEEP_S = 86_400.0
DECISIONS_KEPT = 200               # of one deployment; each holds what its policy saw
PRUNE_BATCH = 100                  # deletes in one transaction

log = logging.getLogger(__name__)


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
        self._store = store
        self._telemetry = telemetry
        self._rollups = rollups
        self._snapshot = snapshot
        self._guard = guard
        self._history_keep_s = history_keep_s
        self._minute = self._whole_minutes()
        self._revisions: deque[tuple[float, int]] = deque()

    async def run(self) -> None:
        """Keep house until cancelled; a chore that fails is tried again on the next beat."""
        next_prune_s = time.monotonic()
        while True:
            self._roll()
            if time.monotonic() >= next_prune_s:
                next_prune_s = time.monotonic() + PRUNE_EVERY_S
                try:
                    await self._prune()
                except EnovaError as error:
                    log.warning("the store was not tidied: %s", error)
            await asyncio.sleep(BEAT_S)

    def _whole_minutes(self) -> int:
        """Minutes of model time that are over, and whose last frames should have come."""
        return math.floor((self._telemetry.now_s - self._telemetry.limits.step_s) / MINUTE_S)

    def _roll(self) -> None:
        """Hand the last whole minute over. Under a fast clock some are passed over: the file is no store of record."""
        minute = self._whole_minutes()
        if minute <= self._minute:
            return
        self._minute = minute
        snapshot, telemetry = self._snapshot(), self._telemetry
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
        telemetry.forget(
            replicas=snapshot.replicas.__contains__,
            deployments=snapshot.deployments.__contains__,
        )

    async def _prune(self) -> None:
        await self._prune_requests()
        await self._prune_decisions()
        await self._compact()

    async def _prune_requests(self) -> None:
        entries, _ = await self._store.range(codec.prefix("requests"))
        oldest_s = time.time() - REQUEST_KEEP_S
        old = [
            (entry.key, entry.mod_revision)
            for entry in entries
            if codec.decode_as(RequestRecord, entry.value, key=entry.key).create_time_s < oldest_s
        ]
        await self._delete(old)

    async def _prune_decisions(self) -> None:
        entries, _ = await self._store.range(codec.prefix("decisions"))
        by_deployment: dict[str, list[tuple[str, int]]] = {}
        for entry in entries:
            deployment = codec.decode_as(Decision, entry.value, key=entry.key).deployment
            by_deployment.setdefault(deployment, []).append((entry.key, entry.mod_revision))
        living = self._snapshot().deployments
        for deployment, found in by_deployment.items():
            # Those of a deleted deployment stay for a while under the same bound: they tell why it was what it was.
            kept = DECISIONS_KEPT if deployment in living else DECISIONS_KEPT // 10
            await self._delete(found[:-kept])

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
