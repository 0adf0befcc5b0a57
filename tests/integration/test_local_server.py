"""The agent's local socket: newest truth to every ingress, several at once, slow and lying peers, one agent each."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from enova_agent.core.local import (
    AgentHello,
    EnginesStopped,
    EnginesUpdate,
    HeldReplica,
    HeldUpdate,
    IngressHello,
    LengthSample,
    LengthsUpdate,
    Message,
    RoutesApplied,
    RoutesUpdate,
    StopEngines,
    SummariesUpdate,
    Summary,
    decode,
    encode,
)
from enova_agent.core.model import LocalEngine, Route, RouteTable
from enova_agent.local_server import CONNECTIONS_MAX, LocalServer
from enova_common.errors import Conflict
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network
REPLICA = "deployments/d/replicas/r"


@dataclass
class Heard:
    """What the server passed on."""

    held: list[HeldUpdate | None] = field(default_factory=list)
    summaries: list[SummariesUpdate] = field(default_factory=list)
    lengths: list[LengthsUpdate] = field(default_factory=list)
    changes: int = 0
    stops: list[float] = field(default_factory=list)

    def changed(self) -> None:
        self.changes += 1

    async def stop(self, drain_timeout_s: float) -> int:
        self.stops.append(drain_timeout_s)
        return 3


class Peer:
    """Somebody at the other end of the socket; the fixture `closed_peers` ends them all."""

    opened: ClassVar[list[Peer]] = []

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.opened.append(self)

    @classmethod
    async def connect(cls, path: Path, *, instance: str = "", pid: int = 1) -> Peer:
        peer = cls(*await asyncio.open_unix_connection(str(path), limit=8 << 20))
        if instance:
            peer.say(
                IngressHello(instance=instance, pid=pid, openai_address="127.0.0.1:80", hop_address="127.0.0.1:81")
            )
        return peer

    def say(self, message: Message) -> None:
        self.writer.write(encode(message))

    async def next(self) -> Message | None:
        async with asyncio.timeout(5):
            return decode(await self.reader.readline())

    async def until(self, kind: type[Message]) -> Message:
        while True:
            message = await self.next()
            if isinstance(message, kind):
                return message

    async def closed(self) -> bool:
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionError):
                await self.reader.read()
            return True


@pytest.fixture(autouse=True)
async def closed_peers() -> AsyncIterator[None]:
    yield
    for peer in Peer.opened:
        peer.writer.close()
        with contextlib.suppress(ConnectionError):
            await peer.writer.wait_closed()
    Peer.opened.clear()


@pytest.fixture
def heard() -> Heard:
    return Heard()


def server_at(path: Path, heard: Heard) -> LocalServer:
    return LocalServer(
        path,
        node="node-0",
        on_change=heard.changed,
        on_held=heard.held.append,
        on_summaries=heard.summaries.append,
        on_lengths=heard.lengths.append,
        stop_engines=heard.stop,
    )


@pytest.fixture
async def server(tmp_path: Path, heard: Heard) -> AsyncIterator[LocalServer]:
    server = server_at(tmp_path / "agent.sock", heard)
    await server.start()
    yield server
    await server.close()


def engine(admitting: bool = True) -> LocalEngine:
    return LocalEngine(
        replica=REPLICA, endpoint="http://127.0.0.1:9", max_concurrency=4, queue_limit=8, admitting=admitting
    )


def table(revision: int, size: int = 1) -> RouteTable:
    routes = {f"m{n}": Route(served_name=f"m{n}", deployment="deployments/d") for n in range(size)}
    return RouteTable(revision=revision, routes=routes)


async def test_the_socket_is_for_its_owner_alone(server: LocalServer, tmp_path: Path) -> None:
    assert stat.S_IMODE(os.stat(tmp_path / "agent.sock").st_mode) == 0o600


async def test_who_connects_is_greeted_and_told_engines_but_no_routes_that_nobody_gave(
    server: LocalServer, tmp_path: Path
) -> None:
    peer = await Peer.connect(tmp_path / "agent.sock", instance="a")
    assert await peer.next() == AgentHello(node="node-0")
    assert await peer.next() == EnginesUpdate()
    await until_async(lambda: server.ingress is not None)
    server.set_engines([engine()])
    assert await peer.next() == EnginesUpdate(engines=(engine(),))
    server.set_engines([engine()])  # nothing new: nothing is said
    server.set_routes(table(7))
    assert await peer.next() == RoutesUpdate(revision=7, routes=tuple(table(7).routes.values()))
    late = await Peer.connect(tmp_path / "agent.sock", instance="b")
    assert await late.until(RoutesUpdate) == RoutesUpdate(revision=7, routes=tuple(table(7).routes.values()))


async def test_the_revision_served_is_the_lowest_of_all_ingresses(server: LocalServer, tmp_path: Path) -> None:
    assert server.routes_revision == 0
    first = await Peer.connect(tmp_path / "agent.sock", instance="a")
    second = await Peer.connect(tmp_path / "agent.sock", instance="b")
    first.say(RoutesApplied(revision=9))
    second.say(RoutesApplied(revision=4))
    await until_async(lambda: server.routes_revision == 4)
    second.writer.close()
    await until_async(lambda: server.routes_revision == 9)


async def test_held_is_added_over_ingresses_and_unknown_without_any(
    server: LocalServer, heard: Heard, tmp_path: Path
) -> None:
    assert server.held is None
    first = await Peer.connect(tmp_path / "agent.sock", instance="a")
    second = await Peer.connect(tmp_path / "agent.sock", instance="b")
    first.say(HeldUpdate(replicas={REPLICA: HeldReplica(in_flight=2, queued=1, silent_s=9.0, finished=5)}))
    second.say(HeldUpdate(replicas={REPLICA: HeldReplica(in_flight=1, silent_s=0.5, errors=2)}))
    expected = HeldReplica(in_flight=3, queued=1, silent_s=0.5, finished=5, errors=2)
    await until_async(lambda: server.held == {REPLICA: expected})
    assert heard.held[-1] == HeldUpdate(replicas={REPLICA: expected})
    first.writer.close()
    second.writer.close()
    await until_async(lambda: server.held is None)
    assert heard.held[-1] is None


async def test_an_idle_ingress_does_not_shorten_anothers_silence(server: LocalServer, tmp_path: Path) -> None:
    first = await Peer.connect(tmp_path / "agent.sock", instance="a")
    second = await Peer.connect(tmp_path / "agent.sock", instance="b")
    first.say(HeldUpdate(replicas={REPLICA: HeldReplica(in_flight=2, silent_s=9.0)}))
    second.say(HeldUpdate(replicas={REPLICA: HeldReplica()}))
    await until_async(lambda: server.held == {REPLICA: HeldReplica(in_flight=2, silent_s=9.0)})


async def test_summaries_are_passed_on(server: LocalServer, heard: Heard, tmp_path: Path) -> None:
    peer = await Peer.connect(tmp_path / "agent.sock", instance="a")
    update = SummariesUpdate(start_s=1.0, end_s=2.0, summaries=(Summary(deployment="deployments/d", arrived=3),))
    peer.say(update)
    await until_async(lambda: heard.summaries == [update])


async def test_lengths_of_answers_are_passed_on(server: LocalServer, heard: Heard, tmp_path: Path) -> None:
    peer = await Peer.connect(tmp_path / "agent.sock", instance="a")
    sample = LengthSample(deployment="deployments/d", method=1, vector="AAEC", tokens=7, stopped=True)
    peer.say(LengthsUpdate(samples=(sample,)))
    await until_async(lambda: heard.lengths == [LengthsUpdate(samples=(sample,))])


async def test_stop_engines_is_answered_when_they_have_stopped(
    server: LocalServer, heard: Heard, tmp_path: Path
) -> None:
    peer = await Peer.connect(tmp_path / "agent.sock")
    peer.say(StopEngines(drain_timeout_s=4.5))
    assert await peer.until(EnginesStopped) == EnginesStopped(stopped=3)
    assert heard.stops == [4.5]
    assert server.ingress is None, "who only commands is no ingress"


@pytest.mark.parametrize("line", [b"not json\n", b"[]\n", b'{"type":"held","replicas":{"r":{"in_flight":"x"}}}\n'])
async def test_a_peer_that_talks_nonsense_is_cut_off_and_nobody_else(
    server: LocalServer, tmp_path: Path, line: bytes
) -> None:
    good = await Peer.connect(tmp_path / "agent.sock", instance="good")
    bad = await Peer.connect(tmp_path / "agent.sock", instance="bad")
    bad.writer.write(line)
    assert await bad.closed()
    server.set_routes(table(2))
    assert await good.until(RoutesUpdate)


async def test_a_line_without_end_is_cut_off(server: LocalServer, tmp_path: Path) -> None:
    peer = await Peer.connect(tmp_path / "agent.sock", instance="a")
    with contextlib.suppress(ConnectionError):
        for _ in range(20):
            peer.writer.write(b"x" * (1 << 20))
            await peer.writer.drain()
    assert await peer.closed()


async def test_another_major_version_is_refused(server: LocalServer, tmp_path: Path) -> None:
    peer = await Peer.connect(tmp_path / "agent.sock")
    peer.say(IngressHello(instance="new", pid=1, openai_address="a", hop_address="b", version=2))
    assert await peer.closed()
    assert server.ingress is None


async def test_a_peer_that_reads_slowly_gets_the_newest_of_each_kind(server: LocalServer, tmp_path: Path) -> None:
    peer = await Peer.connect(tmp_path / "agent.sock", instance="a")
    await until_async(lambda: server.ingress is not None)
    transport = peer.writer.transport
    assert isinstance(transport, asyncio.Transport)
    transport.pause_reading()
    for revision in range(1, 100):
        server.set_routes(table(revision, size=2_000))
        await asyncio.sleep(0)
    transport.resume_reading()
    revisions: list[int] = []
    while not revisions or revisions[-1] != 99:
        message = await peer.until(RoutesUpdate)
        assert isinstance(message, RoutesUpdate)
        revisions.append(message.revision)
    assert revisions == sorted(revisions)
    assert len(revisions) < 10


async def test_connections_are_bounded(server: LocalServer, tmp_path: Path) -> None:
    peers = [await Peer.connect(tmp_path / "agent.sock", instance=str(n)) for n in range(CONNECTIONS_MAX)]
    await until_async(lambda: server.routes_revision == 0 and server.ingress is not None)
    one_more = await Peer.connect(tmp_path / "agent.sock")
    assert await one_more.closed()
    peers[0].writer.close()
    await until_async(lambda: len(server._peers) < CONNECTIONS_MAX)
    assert await (await Peer.connect(tmp_path / "agent.sock")).next() == AgentHello(node="node-0")


async def test_a_dead_agents_socket_is_taken_over_and_a_living_ones_is_not(
    server: LocalServer, heard: Heard, tmp_path: Path
) -> None:
    with pytest.raises(Conflict, match="another process serves"):
        await server_at(tmp_path / "agent.sock", heard).start()
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "agent.sock"))
    assert await reader.readline()
    writer.close()
    with socket.socket(socket.AF_UNIX) as dead:  # as a server leaves it that had no time to tidy up
        dead.bind(str(tmp_path / "dead.sock"))
        dead.listen()
    assert (tmp_path / "dead.sock").exists()
    successor = server_at(tmp_path / "dead.sock", heard)
    await successor.start()
    assert await (await Peer.connect(tmp_path / "dead.sock")).next() == AgentHello(node="node-0")
    await successor.close()
    assert not (tmp_path / "dead.sock").exists()
