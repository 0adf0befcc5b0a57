"""The command line's way to the coordinators: finds the leader, follows it, gives errors as enova's own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from enova.v1 import (
    breakdown_service_pb2_grpc,
    cluster_pb2,
    decision_service_pb2,
    decision_service_pb2_grpc,
    deployment_service_pb2,
    deployment_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
    replica_service_pb2,
    replica_service_pb2_grpc,
    verdict_service_pb2,
    verdict_service_pb2_grpc,
)
from enova_common import rpc
from enova_common.errors import EnovaError, NotFound, Unavailable
from enova_common.settings import TlsSettings

T = TypeVar("T")

CALL_TIMEOUT_S = 10.0
HOPS_MAX = 4  # a leader that changes more often than that within one call is an outage
PAGE_SIZE = 500
FOLLOW_TIMEOUT_S = 60.0  # a coordinator that is away longer does not come back by itself
FOLLOW_POLL_S = 0.5
FOLLOW_STEADY_S = 5.0  # a stream that lasted so long was well: what follows is another outage


@dataclass(frozen=True, slots=True)
class Stubs:
    """One stub a service, over one channel."""

    deployments: deployment_service_pb2_grpc.DeploymentServiceAsyncStub
    replicas: replica_service_pb2_grpc.ReplicaServiceAsyncStub
    nodes: node_service_pb2_grpc.NodeServiceAsyncStub
    decisions: decision_service_pb2_grpc.DecisionServiceAsyncStub
    verdicts: verdict_service_pb2_grpc.VerdictServiceAsyncStub
    breakdowns: breakdown_service_pb2_grpc.BreakdownServiceAsyncStub


def _stubs(channel: grpc.aio.Channel) -> Stubs:
    return Stubs(
        deployments=deployment_service_pb2_grpc.DeploymentServiceStub(channel),
        replicas=replica_service_pb2_grpc.ReplicaServiceStub(channel),
        nodes=node_service_pb2_grpc.NodeServiceStub(channel),
        decisions=decision_service_pb2_grpc.DecisionServiceStub(channel),
        verdicts=verdict_service_pb2_grpc.VerdictServiceStub(channel),
        breakdowns=breakdown_service_pb2_grpc.BreakdownServiceStub(channel),
    )


def _passes(error: EnovaError, *, again: bool) -> bool:
    """Whether this is an outage that ends by itself.

    A new leader says LOG_UNREACHABLE until the agents find it, and knows nothing of its predecessor's events.
    """
    away = isinstance(error, Unavailable) or error.reason in {
        "NOT_LEADER", "RESUME_REVISION_COMPACTED", "RESUME_REVISION_FUTURE"
    }
    return away or (again and error.reason == "LOG_UNREACHABLE")


class Client:
    """Calls on whichever of `endpoints` leads. An async context manager."""

    def __init__(self, endpoints: list[str], tls: TlsSettings | None) -> None:
        self._endpoints = endpoints
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._leader = endpoints[0]

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for channel in self._channels.values():
            await channel.close()

    @property
    def endpoint(self) -> str:
        """The coordinator that answered last."""
        return self._leader

    async def call(self, method: Callable[[Stubs], Awaitable[T]]) -> T:
        """One unary call; follows NOT_LEADER and tries the other endpoints while nobody can be reached."""
        candidates = [self._leader, *(e for e in self._endpoints if e != self._leader)]
        last: EnovaError | None = None
        for _ in range(HOPS_MAX + len(candidates)):
            if not candidates:
                break
            endpoint = candidates.pop(0)
            try:
                result = await method(self._at(endpoint))
            except grpc.RpcError as error:
                last = rpc.error_from_rpc(error)
                if last.reason == "NOT_LEADER":
                    # Without an address an election is in progress: the others may know more.
                    candidates[:0] = [address] if (address := last.metadata.get("leader_address")) else []
                elif not isinstance(last, Unavailable):
                    raise last from error
                continue
            self._leader = endpoint
            return result
        raise self._unreachable(last)

    async def stream(self, method: Callable[[Stubs], AsyncIterable[T]]) -> AsyncIterator[T]:
        """A server stream from the coordinator that answers now."""
        await self.list_nodes()  # settles which endpoint leads
        try:
            async for message in method(self._at(self._leader)):
                yield message
        except grpc.RpcError as error:
            raise rpc.error_from_rpc(error) from error

    async def follow(
        self, method: Callable[[Stubs, bool], AsyncIterable[T]], *, endless: bool
    ) -> AsyncIterator[T | None]:
        """A server stream, taken up again when its coordinator goes away; None says that it has just been.

        `method` is told whether it is called again. An `endless` stream is taken up even where it ended in order.
        """
        await self.list_nodes()  # a coordinator that never answered is not waited for
        again, opened_at, failing_since = False, 0.0, 0.0
        while True:
            try:
                await self.list_nodes()
                opened_at = time.monotonic()
                if again:
                    yield None
                async for message in self.stream(lambda stubs: method(stubs, again)):  # noqa: B023 - used within the turn
                    yield message
                if not endless:
                    return
            except EnovaError as error:
                now = time.monotonic()
                if not _passes(error, again=again):
                    raise
                if not failing_since or (opened_at and now - opened_at > FOLLOW_STEADY_S):
                    failing_since = now
                if now - failing_since > FOLLOW_TIMEOUT_S:
                    error.remedy = error.remedy or "enova get nodes shows what is away; then ask again"
                    raise
                opened_at = 0.0
            again = True
            await asyncio.sleep(FOLLOW_POLL_S)

    async def list_deployments(self) -> list[cluster_pb2.Deployment]:
        """All deployments."""
        request = deployment_service_pb2.ListDeploymentsRequest()
        return await self._list(lambda stubs: stubs.deployments.ListDeployments, request, "deployments")

    async def list_replicas(self, parent: str = "") -> list[cluster_pb2.Replica]:
        """All replicas, of one deployment if `parent` names one."""
        request = replica_service_pb2.ListReplicasRequest(parent=parent)
        return await self._list(lambda stubs: stubs.replicas.ListReplicas, request, "replicas")

    async def list_variants(self, parent: str = "") -> list[cluster_pb2.Variant]:
        """All variants, of one deployment if `parent` names one."""
        request = deployment_service_pb2.ListVariantsRequest(parent=parent)
        return await self._list(lambda stubs: stubs.deployments.ListVariants, request, "variants")

    async def list_nodes(self) -> list[cluster_pb2.Node]:
        """All nodes."""
        return await self._list(lambda stubs: stubs.nodes.ListNodes, node_service_pb2.ListNodesRequest(), "nodes")

    async def list_decisions(self, deployment: str = "") -> list[decision_service_pb2.Decision]:
        """All recorded decisions, newest first."""
        request = decision_service_pb2.ListDecisionsRequest(deployment=deployment)
        return await self._list(lambda stubs: stubs.decisions.ListDecisions, request, "decisions")

    async def list_events(self, obj: str = "") -> list[decision_service_pb2.Event]:
        """What the coordinator remembers that happened, newest first."""
        request = decision_service_pb2.ListEventsRequest(object=obj)
        return await self._list(lambda stubs: stubs.decisions.ListEvents, request, "events")

    async def list_events_to(self, obj: str = "") -> tuple[list[decision_service_pb2.Event], int]:
        """As `list_events`, and the revision to watch on from."""
        request = decision_service_pb2.ListEventsRequest(object=obj)
        pages = [page async for page in self._pages(lambda stubs: stubs.decisions.ListEvents, request)]
        # The first page's: what happens while the others are asked for is told twice rather than never.
        return [event for page in pages for event in page.events], pages[0].revision

    async def list_verdicts(self, obj: str = "") -> list[verdict_service_pb2.Verdict]:
        """The current verdicts."""
        request = verdict_service_pb2.ListVerdictsRequest(object=obj)
        return await self._list(lambda stubs: stubs.verdicts.ListVerdicts, request, "verdicts")

    async def list_episodes(
        self, wanted: verdict_service_pb2.ListEpisodesRequest | None = None
    ) -> list[verdict_service_pb2.Episode]:
        """Episodes, newest first or as they are wanted."""
        request = wanted or verdict_service_pb2.ListEpisodesRequest()
        return await self._list(lambda stubs: stubs.verdicts.ListEpisodes, request, "episodes")

    async def get_deployment(self, name: str) -> cluster_pb2.Deployment:
        """One deployment by its full name."""
        request = deployment_service_pb2.GetDeploymentRequest(name=name)
        return await self.call(lambda s: s.deployments.GetDeployment(request, timeout=CALL_TIMEOUT_S))

    async def get_telemetry(self, parent: str, window_s: float = 0.0) -> replica_service_pb2.GetTelemetryResponse:
        """The newest figures of a deployment, replica or node, and a window of them."""
        request = replica_service_pb2.GetTelemetryRequest(parent=parent, window_s=window_s)
        return await self.call(lambda s: s.replicas.GetTelemetry(request, timeout=CALL_TIMEOUT_S))

    async def find_replica(self, name: str) -> cluster_pb2.Replica:
        """A replica by full name, by deployment/replica, or by its last part where that is unique."""
        replicas = await self.list_replicas()
        wanted = name.removeprefix("deployments/").replace("/replicas/", "/")
        found = [r for r in replicas if r.name.removeprefix("deployments/").replace("/replicas/", "/") == wanted]
        found = found or [r for r in replicas if r.name.rsplit("/", 1)[1] == wanted]
        if len(found) == 1:
            return found[0]
        problem = f"{len(found)} replicas are called {name!r}" if found else f"no replica {name!r}"
        raise NotFound(problem, remedy="enova get replicas lists them; use DEPLOYMENT/REPLICA")

    async def _list(
        self, method: Callable[[Stubs], Callable[..., Awaitable[Any]]], request: Any, field: str
    ) -> list[Any]:
        """All items of a List method."""
        return [item async for page in self._pages(method, request) for item in getattr(page, field)]

    async def _pages(
        self, method: Callable[[Stubs], Callable[..., Awaitable[Any]]], request: Any
    ) -> AsyncIterator[Any]:
        """The answers of a List method, page by page: at least one."""
        request.page_size = PAGE_SIZE
        while True:
            page = await self.call(lambda stubs: method(stubs)(request, timeout=CALL_TIMEOUT_S))
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def _at(self, endpoint: str) -> Stubs:
        if endpoint not in self._channels:
            self._channels[endpoint] = rpc.open_channel(endpoint, self._tls)
        return _stubs(self._channels[endpoint])

    def _unreachable(self, last: EnovaError | None) -> Unavailable:
        if last is not None and last.reason == "NOT_LEADER":
            remedy = "try again in a few seconds; if it lasts, see that the store runs (docs/store-operations.md)"
            return Unavailable("no coordinator leads at the moment", reason="UNREACHABLE", remedy=remedy)
        message = f"no coordinator answers at {', '.join(self._endpoints)}"
        detail = f": {last.message}" if last is not None else ""
        remedy = "start one (enova up), or name it by --api or ENOVA_API"
        return Unavailable(message + detail, reason="UNREACHABLE", remedy=remedy)
