"""ReplicaService: what runs, its logs, its telemetry."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Any

from enova.v1 import cluster_pb2, replica_service_pb2, replica_service_pb2_grpc, telemetry_pb2
from enova_common.errors import Conflict, InvalidField, NotFound
from enova_coordinator.core.model import Intent, NodeReport, Replica
from enova_coordinator.core.routes import routed_everywhere
from enova_coordinator.core.series import GPU_FEATURES, MINUTE_S, REPLICA_FEATURES, Figures
from enova_coordinator.service import convert, frames, names, paging
from enova_coordinator.service.leading import Chair, Leading, actor
from enova_coordinator.service.watching import Batch, watch
from enova_coordinator.service.writes import Writes, call, check_etag
from enova_coordinator.store import Store, codec

Context = Any  # grpc.aio.ServicerContext of whatever messages
LOG_LINES_MAX = 10_000
SERIES_VALUES_MAX = 300_000        # of one answer: under the bound of a message
ROUTED_POLL_S = 0.5                # `routed` is no store value: watchers look at it on a beat


class ReplicaService(replica_service_pb2_grpc.ReplicaServiceServicer):
    """See replica_service.proto."""

    def __init__(self, store: Store, chair: Chair, writes: Writes) -> None:
        self._store = store
        self._chair = chair
        self._writes = writes

    async def GetReplica(  # noqa: N802
        self, request: replica_service_pb2.GetReplicaRequest, context: Context
    ) -> cluster_pb2.Replica:
        """One replica."""
        actor(context)
        leading = self._chair.leading()
        replica = await self._writes.read(Replica, names.replica_name(request.name))
        return convert.replica_message(replica, routed=_routed(leading, replica))

    async def ListReplicas(  # noqa: N802
        self, request: replica_service_pb2.ListReplicasRequest, context: Context
    ) -> replica_service_pb2.ListReplicasResponse:
        """A page of the replicas of one deployment, or of all."""
        actor(context)
        leading = self._chair.leading()
        prefix = codec.prefix("replicas", names.parent_deployment(request.parent))
        size = paging.page_size(request.page_size)
        after = paging.decode_token("replicas", request.page_token)
        entries, _ = await self._store.range(prefix, start_after=after, limit=size + 1)
        replicas = [codec.decode_as(Replica, entry.value, key=entry.key) for entry in entries[:size]]
        token = paging.encode_token("replicas", entries[size - 1].key) if len(entries) > size else ""
        return replica_service_pb2.ListReplicasResponse(
            replicas=[convert.replica_message(each, routed=_routed(leading, each)) for each in replicas],
            next_page_token=token,
        )

    async def WatchReplicas(  # noqa: N802
        self, request: replica_service_pb2.WatchReplicasRequest, context: Context
    ) -> AsyncIterator[replica_service_pb2.WatchReplicasResponse]:
        """First everything as it is (or what changed after resume_revision), then every change, of routing too."""
        actor(context)
        self._chair.leading()
        prefix = codec.prefix("replicas", names.parent_deployment(request.parent))
        batches: asyncio.Queue[Batch[Replica] | BaseException] = asyncio.Queue(maxsize=64)
        pump = asyncio.create_task(self._pump(prefix, request.resume_revision, batches))
        known: dict[str, tuple[Replica, bool]] = {}
        revision = request.resume_revision
        try:
            while True:
                try:
                    batch = await asyncio.wait_for(batches.get(), ROUTED_POLL_S)
                except TimeoutError:
                    batch = Batch(revision, tuple(self._rerouted(known)))
                    if not batch.changed:
                        continue
                if isinstance(batch, BaseException):
                    raise batch
                revision = batch.revision
                yield self._watched(batch, known)
        finally:
            pump.cancel()

    async def RestartReplica(  # noqa: N802
        self, request: replica_service_pb2.RestartReplicaRequest, context: Context
    ) -> cluster_pb2.Replica:
        """Writes the wish for a restart; the agent carries it out."""
        actor(context)
        leading = self._chair.leading()
        name = names.replica_name(request.name)
        by = call("RestartReplica", request)
        if await self._writes.repeated(by) is None:

            def edit(before: Replica | None) -> Replica:
                if before is None:
                    raise NotFound(f"there is no {name}", field="name", remedy="enova get replicas lists them")
                if before.intent is not Intent.RUN or not before.members:
                    raise Conflict(
                        f"{name} is {before.status.state}: nothing runs that could be restarted",
                        reason="NOT_RUNNING",
                        field="name",
                        remedy="enova get replicas shows those that run",
                    )
                check_etag(request.etag, before.etag, name)
                return replace(before, restart_nonce=before.restart_nonce + 1)

            await self._writes.change(Replica, name, edit, by=by, validate_only=request.validate_only)
        replica = await self._writes.read(Replica, name)
        return convert.replica_message(replica, routed=_routed(leading, replica))

    async def StreamLogs(  # noqa: N802
        self, request: replica_service_pb2.StreamLogsRequest, context: Context
    ) -> AsyncIterator[replica_service_pb2.StreamLogsResponse]:
        """Lines of the engine's log, from its node."""
        actor(context)
        leading = self._chair.leading()
        if not 0 <= request.tail_lines <= LOG_LINES_MAX:
            raise InvalidField(
                f"must lie between 0 and {LOG_LINES_MAX}, not {request.tail_lines}",
                field="tail_lines",
                remedy="leave it out for all that is kept",
            )
        replica = await self._writes.read(Replica, names.replica_name(request.name))
        lines = leading.agents.logs(
            replica.name, node=replica.node, tail_lines=request.tail_lines, follow=request.follow
        )
        async for part in lines:
            yield replica_service_pb2.StreamLogsResponse(lines=part)

    async def GetTelemetry(  # noqa: N802
        self, request: replica_service_pb2.GetTelemetryRequest, context: Context
    ) -> replica_service_pb2.GetTelemetryResponse:
        """The newest figures, and a window of them: of the last minutes by step, of the past by minute."""
        actor(context)
        leading = self._chair.leading()
        window_s = request.window_s
        if not (math.isfinite(window_s) and window_s >= 0):
            raise InvalidField(f"{window_s} is no span of time", field="window_s", remedy="give seconds of model time")
        replicas, nodes = self._objects(leading, request.parent)
        answer = replica_service_pb2.GetTelemetryResponse(
            now_s=leading.telemetry.now_s, step_s=leading.telemetry.limits.step_s
        )
        _add_latest(answer, leading, replicas, nodes)
        for deployment in sorted({replica.deployment for replica in replicas} | _named(request.parent)):
            answer.totals.extend(_totals(leading, deployment, request.parent))
        if window_s > leading.telemetry.limits.window_s:
            answer.step_s = MINUTE_S
            await _add_rolled(answer, leading, replicas, nodes, window_s)
        elif window_s > 0:
            _add_windows(answer, leading, replicas, nodes, window_s)
        return answer

    async def _pump(
        self, prefix: str, resume_revision: int, batches: asyncio.Queue[Batch[Replica] | BaseException]
    ) -> None:
        try:
            async for batch in watch(self._store, Replica, prefix, resume_revision=resume_revision):
                await batches.put(batch)
        except Exception as error:  # noqa: BLE001  # it is raised again where the answer is made
            await batches.put(error)

    def _watched(
        self, batch: Batch[Replica], known: dict[str, tuple[Replica, bool]]
    ) -> replica_service_pb2.WatchReplicasResponse:
        leading = self._chair.leading()
        for replica in batch.changed:
            known[replica.name] = (replica, _routed(leading, replica))
        for name in batch.deleted:
            known.pop(name, None)
        return replica_service_pb2.WatchReplicasResponse(
            revision=batch.revision,
            changed=[convert.replica_message(each, routed=known[each.name][1]) for each in batch.changed],
            deleted=batch.deleted,
        )

    def _rerouted(self, known: dict[str, tuple[Replica, bool]]) -> list[Replica]:
        leading = self._chair.leading()
        return [replica for replica, routed in known.values() if _routed(leading, replica) is not routed]

    @staticmethod
    def _objects(leading: Leading, parent: str) -> tuple[list[Replica], list[str]]:
        """The replicas and nodes that a parent stands for. Raises NotFound."""
        snapshot = leading.control.snapshot
        if parent.startswith("nodes/"):
            name = names.node_name(parent, "parent")
            if name not in snapshot.nodes:
                raise NotFound(f"there is no {name}", field="parent", remedy="enova get nodes lists them")
            return [each for each in snapshot.replicas.values() if each.node == name], [name]
        if "/replicas/" in parent:
            replica = snapshot.replicas.get(names.replica_name(parent, "parent"))
            if replica is None:
                raise NotFound(f"there is no {parent}", field="parent", remedy="enova get replicas lists them")
            return [replica], [replica.node] if replica.node else []
        name = names.deployment_name(parent, "parent")
        if name not in snapshot.deployments:
            raise NotFound(f"there is no {name}", field="parent", remedy="enova get deployments lists them")
        replicas = list(snapshot.replicas_of(name))
        return replicas, sorted({replica.node for replica in replicas if replica.node})


def _routed(leading: Leading, replica: Replica) -> bool:
    return routed_everywhere(leading.control.table, replica.name, _reports(leading))


def _reports(leading: Leading) -> list[NodeReport]:
    return [
        session.report for session in leading.agents.sessions().values() if session.report is not None
    ]


def _named(parent: str) -> set[str]:
    return {parent} if parent.count("/") == 1 and parent.startswith("deployments/") else set()


def _totals(leading: Leading, deployment: str, parent: str) -> Iterable[telemetry_pb2.RequestSummary]:
    for (replica, serving_class), totals in sorted(leading.telemetry.totals(deployment).items()):
        if "/replicas/" not in parent or replica == parent:
            held = leading.telemetry.held_by(totals)
            yield frames.totals_message(deployment, replica, serving_class, totals, held=held)


def _add_latest(
    answer: replica_service_pb2.GetTelemetryResponse, leading: Leading, replicas: list[Replica], nodes: list[str]
) -> None:
    for replica in replicas:
        source = leading.telemetry.replica_source(replica.name)
        if isinstance(source, telemetry_pb2.ReplicaSample):
            answer.latest.append(source)
    for node in nodes:
        for gpu in _gpus(leading, node, replicas):
            source = leading.telemetry.gpu_source(node, gpu)
            if isinstance(source, telemetry_pb2.GpuSample):
                answer.latest_gpus.append(source)


def _gpus(leading: Leading, node: str, replicas: list[Replica]) -> list[str]:
    """The GPUs of the node that matter: all of it, unless only some replicas of it were asked for."""
    held = {gpu for replica in replicas for gpu in replica.gpus}
    known = leading.telemetry.gpus_of(node)
    return [gpu for gpu in known if gpu in held] if held else list(known)


def _add_windows(
    answer: replica_service_pb2.GetTelemetryResponse,
    leading: Leading,
    replicas: list[Replica],
    nodes: list[str],
    window_s: float,
) -> None:
    telemetry = leading.telemetry
    steps = max(1, math.ceil(window_s / telemetry.limits.step_s))
    for replica in replicas:
        if (found := telemetry.replica_window(replica.name, steps=steps)) is not None:
            _add_series(answer, replica.name, REPLICA_FEATURES, found)
    for node in nodes:
        for gpu in _gpus(leading, node, replicas):
            if (found := telemetry.gpu_window(node, gpu, steps=steps)) is not None:
                _add_series(answer, f"{node}/gpus/{gpu}", GPU_FEATURES, found)


def _add_series(
    answer: replica_service_pb2.GetTelemetryResponse,
    name: str,
    features: tuple[str, ...],
    found: tuple[float, Figures],
) -> None:
    start_s, rows = found
    if sum(len(each.values) for each in answer.series) + rows.size > SERIES_VALUES_MAX:
        raise InvalidField(
            f"more than {SERIES_VALUES_MAX} values were asked for",
            field="window_s",
            remedy="ask for a shorter window, or for one replica at a time",
        )
    for column, feature in enumerate(features):
        values = rows[:, column]
        if not bool((values != values).all()):  # noqa: PLR0124  # NaN alone differs from itself
            answer.series.add(object=name, feature=feature, start_s=start_s, values=values.tolist())


async def _add_rolled(
    answer: replica_service_pb2.GetTelemetryResponse,
    leading: Leading,
    replicas: list[Replica],
    nodes: list[str],
    window_s: float,
) -> None:
    start_s = leading.telemetry.now_s - window_s
    wanted: list[tuple[str, tuple[str, ...]]] = [(replica.name, REPLICA_FEATURES) for replica in replicas]
    wanted += [
        (f"{node}/gpus/{gpu}", GPU_FEATURES) for node in nodes for gpu in _gpus(leading, node, replicas)
    ]
    for name, features in wanted:
        rolled = await asyncio.wrap_future(leading.rollups.read(name, nodes=tuple(nodes), start_s=start_s))
        if rolled.rows:
            _add_series(answer, name, features, rolled.on_grid())
