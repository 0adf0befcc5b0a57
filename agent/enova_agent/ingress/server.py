"""The ingress put together: listeners, the link to the agent, and the beat that reports and cleans up."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import random
import secrets
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from aiohttp import web

from enova_agent.core.local import EnginesUpdate, HeldReplica, HeldUpdate, IngressHello, RoutesUpdate
from enova_agent.core.model import RouteTable, RouteTarget
from enova_agent.core.openai_errors import (
    ingress_full,
    internal_error,
    shutting_down,
    unknown_model,
    unknown_path,
    wrong_method,
)
from enova_agent.core.routing import Router
from enova_agent.ingress import tls
from enova_agent.ingress.calls import Rejected
from enova_agent.ingress.embedding import Embedder
from enova_agent.ingress.entry import MODEL_PATHS, Entry, EntryLimits
from enova_agent.ingress.exchange import Hashes
from enova_agent.ingress.hop import PEER_PREFIX, SERVER, HopClient, HopServer, error_response
from enova_agent.ingress.lengths import Lengths
from enova_agent.ingress.link import AgentLink
from enova_agent.ingress.listener import Handler, Listener
from enova_agent.ingress.metrics import Metrics
from enova_agent.ingress.owner import Owner
from enova_agent.ingress.records import RecordFiles
from enova_agent.ingress.settings import IngressSettings, host_and_port, is_loopback
from enova_agent.ingress.state import State, load_state, save_state
from enova_agent.ingress.summaries import Summaries
from enova_agent.ingress.upstream import Endpoint, Limits, Unreachable, Upstream, endpoint_of_url
from enova_agent.ingress.waiting_room import WaitingLimits, WaitingRoom
from enova_common.address import Address
from enova_common.clock import ModelClock
from enova_common.ports import check_listenable

_log = logging.getLogger(__name__)


class Ingress:
    """One ingress: `await start()`, serve, `await stop()`."""

    def __init__(self, settings: IngressSettings, *, clock: ModelClock) -> None:
        self._settings = settings
        self._clock = clock
        self.instance = uuid.uuid4().hex[:12]
        self._state_path = settings.data_dir / "ingress-state.json"
        self._state = load_state(self._state_path)
        self._state_dirty = False
        self._saving: asyncio.Task[None] | None = None
        self._table = RouteTable()
        self._open = 0
        self._body_bytes = 0
        self._draining = False
        self._drained = asyncio.Event()
        self._last_held: Mapping[str, HeldReplica] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._build()
        self._apply_state(self._state)

    def _build(self) -> None:
        settings = self._settings
        self._upstream = Upstream(Limits(
            connect_s=settings.connect_timeout_s, first_byte_s=settings.first_byte_timeout_s,
            idle_s=settings.idle_timeout_s,
        ))
        self._router = Router()
        self._owner = Owner(self._upstream, edge=self._send_held)
        self._summaries = Summaries(start_s=self._clock.now())
        self._lengths = Lengths(monotonic_s=time.monotonic, draw=random.random, embedder=self._embedder())
        self._records = RecordFiles(
            settings.data_dir / "records", file_bytes_max=settings.record_file_bytes_max,
            files_max=settings.record_files_max,
        )
        self._metrics = Metrics(held=self._owner.held, gauges=self._gauges)
        self._hop_tls = tls.hop_client_context(settings.hop_tls) if settings.hop_tls else None
        self._waiting = WaitingRoom(
            WaitingLimits(
                requests_max=settings.waiting_requests_max,
                bytes_max=settings.waiting_bytes_max,
                wait_s=settings.waiting_s,
            ),
            table=lambda: self._table,
        )
        self._entry = Entry(
            limits=EntryLimits(
                body_bytes_max=settings.body_bytes_max, body_timeout_s=settings.body_timeout_s,
                queue_timeout_s=settings.queue_timeout_s,
            ),
            table=lambda: self._table,
            router=self._router,
            owner=self._owner,
            hop=HopClient(self._upstream, self._router, endpoint=self._hop_endpoint),
            hashes=Hashes(_hash_key(settings.data_dir / "hash_key")),
            lengths=self._lengths,
            summaries=self._summaries,
            ledgers=(self._records, self._metrics),
            now=self._clock.now,
            time_scale=self._clock.scale,
            node=lambda: self._state.node,
            always_hop=settings.always_hop,
            waiting=self._waiting,
        )
        self._hop_server = HopServer(
            self._owner, body_bytes_max=settings.body_bytes_max, body_timeout_s=settings.body_timeout_s,
            check_peer=settings.hop_tls is not None,
        )
        self._openai_listener = self._listener(guarded(self._openai))
        self._hop_listener = self._listener(guarded(self._hop))
        self._metrics_listener = self._listener(self._serve_metrics)
        self._link = AgentLink(settings.socket, hello=self._hello, events=self)

    def _embedder(self) -> Embedder | None:
        settings = self._settings
        if not settings.embeddings_address:
            return None
        endpoint = endpoint_of_url(f"http://{settings.embeddings_address}")
        return Embedder(self._upstream, endpoint=endpoint, model=settings.embeddings_model)

    def _listener(self, handler: Handler) -> Listener:
        settings = self._settings
        return Listener(
            handler, connections_max=settings.connections_max, body_bytes_max=settings.body_bytes_max,
            keepalive_s=settings.keepalive_s,
        )

    # Life

    async def start(self) -> None:
        """Listen and connect. Raises OSError for a port that is taken, InvalidField for unusable files."""
        settings = self._settings
        if settings.tls is None and not is_loopback(settings.listen):
            _log.warning("insecure_http: applications' requests and keys travel unencrypted to %s", settings.listen)
        for name in ("listen", "hop_listen", "metrics_listen"):
            host, port = host_and_port(getattr(settings, name), field=name)
            check_listenable(Address(host, port), field=name)
        await self._openai_listener.start(
            *host_and_port(settings.listen, field="listen"),
            tls=tls.openai_context(settings.tls) if settings.tls else None,
        )
        await self._hop_listener.start(
            *host_and_port(settings.hop_listen, field="hop_listen"),
            tls=tls.hop_server_context(settings.hop_tls) if settings.hop_tls else None,
        )
        await self._metrics_listener.start(*host_and_port(settings.metrics_listen, field="metrics_listen"))
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._link.run()), loop.create_task(self._beat())]
        _log.info("serving: %s", json.dumps(self.addresses()))

    def addresses(self) -> dict[str, str]:
        """Where it listens."""
        return {
            "openai_address": self._openai_listener.address,
            "hop_address": self._settings.hop_advertise or self._hop_listener.address,
            "metrics_address": self._metrics_listener.address,
        }

    async def stop(self) -> None:
        """Accept nothing more, let requests finish for `drain_timeout_s`, then end."""
        self._draining = True
        await self._openai_listener.refuse()
        await self._hop_listener.refuse()
        if self._open:
            try:
                async with asyncio.timeout(self._settings.drain_timeout_s):
                    await self._drained.wait()
            except TimeoutError:
                _log.warning("%d requests did not end in the drain time and are cut", self._open)
        for listener in (self._openai_listener, self._hop_listener, self._metrics_listener):
            await listener.close()
        self._report()
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):  # it was told to end
                await task
        self._upstream.close()
        self._records.flush()
        if self._saving is not None:
            await self._saving
        if self._state_dirty:
            save_state(self._state_path, self._state)

    # What the agent says (LinkEvents)

    def connected(self, node: str) -> None:
        """The agent of this node greeted us."""
        self._remember(node=node)
        self._last_held = {}
        self._send_held()

    def routes(self, update: RoutesUpdate) -> None:
        """All routes."""
        self._remember(revision=update.revision, routes=update.routes)
        self._apply_routes()

    def engines(self, update: EnginesUpdate) -> None:
        """All engines of this node."""
        self._remember(engines=update.engines)
        self._owner.apply(update.engines)

    def _remember(self, **changes: object) -> None:
        state = dataclasses.replace(self._state, **changes)  # type: ignore[arg-type]
        self._state_dirty = self._state_dirty or state != self._state
        self._state = state

    def _apply_state(self, state: State) -> None:
        if self._settings.node and not state.node:
            self._state = dataclasses.replace(state, node=self._settings.node)
        self._apply_routes()
        self._owner.apply(state.engines)

    def _apply_routes(self) -> None:
        routes = self._state.routes
        self._table = RouteTable(revision=self._state.revision, routes={route.served_name: route for route in routes})
        self._router.retain(target.replica for route in routes for target in route.targets)
        self._waiting.changed()

    # The beat

    async def _beat(self) -> None:
        settings = self._settings
        loop = asyncio.get_running_loop()
        frame_due_s = loop.time() + settings.frame_interval_s
        while True:
            await asyncio.sleep(settings.held_interval_s)
            self._owner.expire()
            self._upstream.sweep()
            self._send_held_if_changed()
            if loop.time() >= frame_due_s:
                frame_due_s = loop.time() + settings.frame_interval_s
                self._report()
            self._records.flush()
            if self._state_dirty:
                self._saving = asyncio.create_task(self._save())
                await asyncio.shield(self._saving)  # the end waits for it: two must not write at once

    async def _save(self) -> None:
        state = self._state
        await asyncio.to_thread(save_state, self._state_path, state)
        self._state_dirty = self._state != state

    def _report(self) -> None:
        self._metrics.retain(route.deployment for route in self._state.routes)
        self._lengths.retain({route.deployment for route in self._state.routes if route.lengths is not None})
        if self._link.listening:
            self._link.send(self._summaries.take(end_s=self._clock.now()))
            lengths = self._lengths.take()
            if lengths is not None:
                self._link.send(lengths)

    def _send_held(self) -> None:
        held = self._owner.held()
        if self._link.send(HeldUpdate(replicas=held)):
            self._last_held = held

    def _send_held_if_changed(self) -> None:
        if self._owner.held() != self._last_held:
            self._send_held()

    def _hello(self) -> IngressHello:
        addresses = self.addresses()
        openai_address = self._settings.advertise or addresses["openai_address"]
        if self._settings.tls is not None:
            openai_address = f"https://{openai_address}"  # whoever is told must not try in plaintext
        return IngressHello(
            instance=self.instance, pid=os.getpid(),
            openai_address=openai_address, hop_address=addresses["hop_address"],
        )

    def _gauges(self) -> Mapping[str, float]:
        return {
            "open_requests": self._open,
            "open_connections": self._openai_listener.connections + self._hop_listener.connections,
            "routes_revision": self._state.revision,
            "agent_connected": float(self._link.listening),
            "ejected_replicas": len(self._router.ejected(now_s=asyncio.get_running_loop().time())),
            "dropped_records": self._records.dropped,
            "skipped_prompts": self._lengths.skipped.total(),
        }

    # The listeners

    async def _openai(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        try:
            if path in MODEL_PATHS:
                if request.method != "POST":
                    return error_response(wrong_method(request.method, "POST"))
                return await self._bounded(request, self._entry.handle)
            if request.method not in {"GET", "HEAD"}:
                return error_response(unknown_path(path))
            if path == "/health":
                return error_response(shutting_down()) if self._draining else _json({"status": "ok"})
            if path == "/v1/models":
                models = [_model(name) for name in sorted(self._table.routes)]
                return _json({"object": "list", "data": models})
            if path.startswith("/v1/models/"):
                name = path.removeprefix("/v1/models/")
                known = name in self._table.routes
                return _json(_model(name)) if known else error_response(unknown_model(name))
            return error_response(unknown_path(path))
        except Rejected as rejected:
            return error_response(rejected.error)

    async def _hop(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._bounded(request, self._hop_server.handle)
        except Rejected as rejected:
            return error_response(rejected.error)

    async def _bounded(self, request: web.BaseRequest, handler: Handler) -> web.StreamResponse:
        """Serve if this ingress may hold one more request of this size."""
        settings = self._settings
        # A body of unannounced length may become as long as any.
        size = request.content_length or (settings.body_bytes_max if request.can_read_body else 0)
        if self._open >= settings.requests_max or self._body_bytes + size > settings.bodies_bytes_max:
            return error_response(ingress_full())
        self._open += 1
        self._body_bytes += size
        try:
            response = await handler(request)
        finally:
            self._open -= 1
            if self._draining and not self._open:
                self._drained.set()
            self._body_bytes -= size
        if self._draining:
            response.force_close()
        return response

    async def _serve_metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path != "/metrics":
            return web.Response(status=404)
        return web.Response(
            body=self._metrics.exposition(), headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    def _hop_endpoint(self, target: RouteTarget) -> Endpoint:
        try:
            if self._hop_tls is not None:
                peer = PEER_PREFIX + target.node.removeprefix("nodes/")
                return endpoint_of_url(target.hop_address, tls=self._hop_tls, peer=peer)
            if not is_loopback(target.hop_address):
                raise Unreachable(f"{target.hop_address} is another host and no hop_tls is set")
            return endpoint_of_url(target.hop_address)
        except ValueError as error:
            raise Unreachable(str(error)) from error


def guarded(handler: Handler) -> Handler:
    """The handler, answering a defect of its own in the shape that clients parse."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await handler(request)
        except (web.HTTPException, ConnectionError):
            raise  # what aiohttp means to answer, or nobody is left to answer to
        except Exception:
            if request.writer.output_size:
                raise  # its head is gone already: only the end of the connection can say more
            _log.exception("%s %s failed", request.method, request.path[:200])
            response = error_response(internal_error())
            response.force_close()  # nobody knows how much of the request was read
            return response

    return answer


def _json(value: dict[str, object]) -> web.Response:
    return web.json_response(value, headers=SERVER)


def _model(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "enova"}


def _hash_key(path: Path) -> bytes:
    """The key of this node's hashes, made at the first start."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        key = secrets.token_bytes(32)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
        return key
