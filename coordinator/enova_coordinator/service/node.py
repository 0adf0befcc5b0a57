"""NodeService: hosts and what they hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from google.protobuf.empty_pb2 import Empty

from enova.v1 import cluster_pb2, node_service_pb2, node_service_pb2_grpc
from enova_common.errors import Conflict, NotFound
from enova_coordinator.core.model import Node, NodeState, NodeView
from enova_coordinator.service import convert, names, paging
from enova_coordinator.service.leading import Chair, Leading, actor
from enova_coordinator.service.watching import check_resume_revision
from enova_coordinator.service.writes import Writes, call

Context = Any  # grpc.aio.ServicerContext of whatever messages
WATCH_POLL_S = 0.25                # a node's state is in the leader's memory: watchers look at it on a beat


class NodeService(node_service_pb2_grpc.NodeServiceServicer):
    """See node_service.proto. The state of nodes is the leader's: a follower refers to it."""

    def __init__(self, chair: Chair, writes: Writes) -> None:
        self._chair = chair
        self._writes = writes

    async def GetNode(  # noqa: N802
        self, request: node_service_pb2.GetNodeRequest, context: Context
    ) -> cluster_pb2.Node:
        """One node."""
        actor(context)
        leading = self._chair.leading()
        return _message(leading, _view(leading, names.node_name(request.name)))

    async def ListNodes(  # noqa: N802
        self, request: node_service_pb2.ListNodesRequest, context: Context
    ) -> node_service_pb2.ListNodesResponse:
        """A page of all nodes."""
        actor(context)
        leading = self._chair.leading()
        views = sorted(leading.control.snapshot.nodes.values(), key=lambda view: view.node.name)
        taken, token = paging.page(
            views,
            collection="nodes",
            size=request.page_size,
            token=request.page_token,
            key=lambda view: view.node.name,
        )
        return node_service_pb2.ListNodesResponse(
            nodes=[_message(leading, view) for view in taken], next_page_token=token
        )

    async def WatchNodes(  # noqa: N802
        self, request: node_service_pb2.WatchNodesRequest, context: Context
    ) -> AsyncIterator[node_service_pb2.WatchNodesResponse]:
        """First every node as it is, whatever the revision, then every change but those of heartbeats alone.

        Most of a node is the leader's memory and has no history: who resumes is told everything and misses nothing.
        """
        actor(context)
        check_resume_revision(request.resume_revision, remedy="leave it out")
        shown: dict[str, cluster_pb2.Node] = {}
        first = True
        while True:
            leading = self._chair.leading()
            snapshot = leading.control.snapshot
            now = {name: _message(leading, view) for name, view in snapshot.nodes.items()}
            changed = [message for name, message in now.items() if not _alike(shown.get(name), message)]
            deleted = sorted(set(shown) - set(now))
            if changed or deleted or first:
                yield node_service_pb2.WatchNodesResponse(
                    revision=max(snapshot.revision, request.resume_revision), changed=changed, deleted=deleted
                )
            shown, first = now, False
            await asyncio.sleep(WATCH_POLL_S)

    async def DrainNode(  # noqa: N802
        self, request: node_service_pb2.DrainNodeRequest, context: Context
    ) -> cluster_pb2.Node:
        """No new replicas here; those that are here move away."""
        actor(context)
        return await self._set_draining(request.name, request, draining=True)

    async def UncordonNode(  # noqa: N802
        self, request: node_service_pb2.UncordonNodeRequest, context: Context
    ) -> cluster_pb2.Node:
        """Ends a drain."""
        actor(context)
        return await self._set_draining(request.name, request, draining=False)

    async def DeleteNode(  # noqa: N802
        self, request: node_service_pb2.DeleteNodeRequest, context: Context
    ) -> Empty:
        """Forgets a node that is LOST."""
        actor(context)
        leading = self._chair.leading()
        name = names.node_name(request.name)
        by = call("DeleteNode", request)
        if await self._writes.repeated(by) is not None:
            return Empty()
        view = _view(leading, name)
        if view.state is not NodeState.LOST:
            raise Conflict(
                f"{name} is {view.state}: only a LOST node is forgotten",
                reason="NODE_NOT_LOST",
                field="name",
                remedy="stop its agent first, and wait until it is LOST; enova drain moves its replicas away",
            )
        await self._writes.change(
            Node, name, lambda _: None, by=by, validate_only=request.validate_only, etag=request.etag
        )
        if request.validate_only:
            return Empty()
        leading.agents.forget(name)
        leading.telemetry.forget_node(name)
        return Empty()

    async def _set_draining(
        self,
        name: str,
        request: node_service_pb2.DrainNodeRequest | node_service_pb2.UncordonNodeRequest,
        *,
        draining: bool,
    ) -> cluster_pb2.Node:
        leading = self._chair.leading()
        names.node_name(name)
        by = call("DrainNode" if draining else "UncordonNode", request)

        def edit(before: Node | None) -> Node:
            if before is None:
                raise NotFound(f"there is no {name}", field="name", remedy="enova get nodes lists them")
            return replace(before, draining=draining, schedulable=not draining)

        if await self._writes.repeated(by) is None:
            await self._writes.change(
                Node, name, edit, by=by, validate_only=request.validate_only, etag=request.etag
            )
        view = _view(leading, name)
        return _message(leading, replace(view, node=await self._writes.read(Node, name)))


def _view(leading: Leading, name: str) -> NodeView:
    view = leading.control.snapshot.nodes.get(name)
    if view is None:
        raise NotFound(f"there is no {name}", field="name", remedy="enova get nodes lists them")
    return view


def _message(leading: Leading, view: NodeView) -> cluster_pb2.Node:
    session = leading.agents.session(view.node.name)
    return convert.node_message(
        view,
        etag=str(leading.control.snapshot.revisions.get(view.node.name, 0)),
        heartbeat_time_s=session.last_heard_unix_s if session is not None else 0.0,
    )


def _alike(before: cluster_pb2.Node | None, after: cluster_pb2.Node) -> bool:
    if before is None:
        return False
    left, right = cluster_pb2.Node(), cluster_pb2.Node()
    left.CopyFrom(before)
    right.CopyFrom(after)
    for message in (left, right):
        message.ClearField("last_heartbeat_time")
        for gpu in message.gpus:
            gpu.free_memory_bytes = 0
    return left == right
