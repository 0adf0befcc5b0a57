"""The Unix socket on which ingresses, and whoever runs this host, talk with the agent: `core/local.py` both ways.

Whoever may open the socket (mode 0600) may command the agent, so there is no other check. All that the agent says
is the whole truth of its kind: a connection that reads slowly gets the newest of each kind, not a queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path

from enova_agent.core.local import (
    LINE_BYTES_MAX,
    VERSION,
    AgentHello,
    EnginesStopped,
    EnginesUpdate,
    HeldReplica,
    HeldUpdate,
    IngressHello,
    LengthsUpdate,
    MalformedLine,
    Message,
    RoutesApplied,
    RoutesUpdate,
    StopEngines,
    SummariesUpdate,
    decode,
    encode,
)
from enova_agent.core.model import LocalEngine, RouteTable
from enova_common.errors import Conflict

CONNECTIONS_MAX = 16          # one ingress, its successor, and a few commands
WRITE_TIMEOUT_S = 10.0        # a peer that reads nothing for so long is cut off

log = logging.getLogger(__name__)


class LocalServer:
    """Serves the socket; tells ingresses what is true and keeps what they say."""

    def __init__(
        self,
        path: Path,
        *,
        node: str,
        on_change: Callable[[], None],
        on_held: Callable[[HeldUpdate | None], None],
        on_summaries: Callable[[SummariesUpdate], None],
        on_lengths: Callable[[LengthsUpdate], None],
        stop_engines: Callable[[float], Awaitable[int]],
    ) -> None:
        self._path = path
        self._node = node
        self._on_change = on_change
        self._on_held = on_held
        self._on_summaries = on_summaries
        self._on_lengths = on_lengths
        self._stop_engines = stop_engines
        self._routes: RoutesUpdate | None = None
        self._engines = EnginesUpdate()
        self._peers: list[_Peer] = []  # in the order of connecting
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listens. A socket that another process serves is left alone: raises Conflict."""
        await asyncio.to_thread(_make_way, self._path)
        previous = os.umask(0o177)  # the socket is never open to others, not even between bind and chmod
        try:
            self._server = await asyncio.start_unix_server(self._accept, str(self._path), limit=LINE_BYTES_MAX)
        finally:
            os.umask(previous)

    async def close(self) -> None:
        """Ends all connections and removes the socket."""
        if self._server is not None:
            self._server.close()
        for peer in tuple(self._peers):
            peer.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):  # somebody tidied up before us
            self._path.unlink()

    @property
    def ingress(self) -> IngressHello | None:
        """The ingress that connected last, if one is connected."""
        hellos = [peer.hello for peer in self._peers if peer.hello is not None]
        return hellos[-1] if hellos else None

    @property
    def routes_revision(self) -> int:
        """The revision that every connected ingress serves; 0 while none is connected."""
        return min((peer.routes_revision for peer in self._peers if peer.hello is not None), default=0)

    @property
    def held(self) -> Mapping[str, HeldReplica] | None:
        """What all connected ingresses hold for each replica; None while none is connected."""
        updates = [peer.held for peer in self._peers if peer.hello is not None]
        return _added(updates) if updates else None

    def set_routes(self, table: RouteTable) -> None:
        """Tells every ingress the routes."""
        self._routes = RoutesUpdate(revision=table.revision, routes=tuple(table.routes.values()))
        for peer in self._peers:
            peer.tell(self._routes)

    def set_engines(self, engines: Iterable[LocalEngine]) -> None:
        """Tells every ingress the engines of this node, if they changed."""
        update = EnginesUpdate(engines=tuple(engines))
        if update == self._engines:
            return
        self._engines = update
        for peer in self._peers:
            peer.tell(update)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._peers) >= CONNECTIONS_MAX:
            log.warning("a connection to %s is refused: %d are open", self._path, len(self._peers))
            writer.close()
            return
        peer = _Peer(writer)
        self._peers.append(peer)
        sender = asyncio.create_task(peer.send())
        peer.tell(AgentHello(node=self._node))
        if self._routes is not None:
            # Never routes that no coordinator gave: an ingress has better ones on its disk.
            peer.tell(self._routes)
        peer.tell(self._engines)
        try:
            while line := await reader.readline():
                await self._receive(peer, line)
        except (MalformedLine, ValueError, OSError) as error:  # ValueError: the line is over the limit
            log.warning("a connection to %s is closed: %s", self._path, error)
        finally:
            sender.cancel()
            self._peers.remove(peer)
            peer.close()
            if peer.hello is not None:
                log.info("ingress %s disconnected", peer.hello.instance)
                self._tell_held()
                self._on_change()

    def _tell_held(self) -> None:
        held = self.held
        self._on_held(None if held is None else HeldUpdate(replicas=held))

    async def _receive(self, peer: _Peer, line: bytes) -> None:
        match decode(line):
            case IngressHello() as hello:
                if hello.version != VERSION:
                    raise MalformedLine(f"ingress {hello.instance} speaks version {hello.version}, not {VERSION}")
                log.info("ingress %s connected, serving %s", hello.instance, hello.openai_address)
                peer.hello = hello
                self._on_change()
            case HeldUpdate() as update:
                peer.held = update.replicas
                self._tell_held()
            case SummariesUpdate() as summaries:
                self._on_summaries(summaries)
            case LengthsUpdate() as lengths:
                self._on_lengths(lengths)
            case RoutesApplied(revision=revision):
                peer.routes_revision = revision
                self._on_change()
            case StopEngines(drain_timeout_s=drain_timeout_s):
                peer.tell(EnginesStopped(stopped=await self._stop_engines(drain_timeout_s)))
            case AgentHello() | RoutesUpdate() | EnginesUpdate() | EnginesStopped() | None:
                pass  # what agents say, or a type of a newer version


class _Peer:
    """One connection: what it said, and what it has still to be told."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.hello: IngressHello | None = None
        self.held: Mapping[str, HeldReplica] = {}
        self.routes_revision = 0
        self._writer = writer
        self._news: dict[type[Message], Message] = {}  # the newest of each kind
        self._wake = asyncio.Event()

    def tell(self, message: Message) -> None:
        self._news[type(message)] = message
        self._wake.set()

    async def send(self) -> None:
        """Writes news as they come; a peer that does not read is cut off."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                news, self._news = self._news, {}
                for message in news.values():
                    self._writer.write(encode(message))
                    async with asyncio.timeout(WRITE_TIMEOUT_S):
                        await self._writer.drain()
        except (OSError, TimeoutError) as error:
            log.warning("a peer of the local socket is cut off: %s", error or "it reads nothing")
            self.close()

    def close(self) -> None:
        self._writer.transport.abort()


def _added(updates: Iterable[Mapping[str, HeldReplica]]) -> dict[str, HeldReplica]:
    total: dict[str, HeldReplica] = {}
    for update in updates:
        for replica, held in update.items():
            before = total.get(replica)
            total[replica] = held if before is None else _sum(before, held)
    return total


def _sum(one: HeldReplica, other: HeldReplica) -> HeldReplica:
    # Any byte to either ingress is progress, so the shorter silence counts, of those that wait for bytes at all.
    silences = [held.silent_s for held in (one, other) if held.in_flight]
    return HeldReplica(
        in_flight=one.in_flight + other.in_flight,
        queued=one.queued + other.queued,
        silent_s=min(silences, default=0.0),
        finished=one.finished + other.finished,
        errors=one.errors + other.errors,
    )


def _make_way(path: Path) -> None:
    """Removes the socket of an agent that is gone; one that answers is somebody's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = socket.socket(socket.AF_UNIX)
    with contextlib.closing(probe):
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            return
        except OSError:  # refused: nobody serves it any more
            path.unlink()
            return
    raise Conflict(
        f"another process serves {path}", field="socket", remedy="stop it, or give this agent another socket"
    )
