"""A node for tests of the ingress: the real ingress, and in place of the agent a twin that speaks its protocol."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Self

from enova_agent.core.local import (
    LINE_BYTES_MAX,
    AgentHello,
    EnginesUpdate,
    HeldReplica,
    HeldUpdate,
    Message,
    RoutesApplied,
    RoutesUpdate,
    SummariesUpdate,
    decode,
    encode,
)
from enova_agent.core.model import LengthRules, LocalEngine, Route, RouteTarget, ServingClass
from enova_agent.ingress.server import Ingress
from enova_agent.ingress.settings import IngressSettings
from enova_common.clock import ModelClock
from enova_common.records import RequestRecord, records_of_bytes
from enova_testing.waiting import until_async

DEPLOYMENT = "deployments/d"
MODEL = "m"


class TwinAgent:
    """Listens where an agent would, says what it is told, remembers what it hears."""

    def __init__(self, path: Path, *, node: str) -> None:
        self.path = path
        self.node = node
        self.heard: list[Message] = []
        self.lines: list[bytes] = []   # the same as they came
        self.routes = RoutesUpdate(revision=0)
        self.engines = EnginesUpdate()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_unix_server(self._serve, path=str(self.path), limit=LINE_BYTES_MAX)

    async def stop(self) -> None:
        """End as a killed process does."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for writer in tuple(self._writers):
            writer.transport.abort()
        await until_async(lambda: not self._writers, what="the twin's connections are closed")
        self.path.unlink(missing_ok=True)

    def say(self, *, routes: RoutesUpdate | None = None, engines: EnginesUpdate | None = None) -> None:
        """Tell every connected ingress, and those that come."""
        self.routes, self.engines = routes or self.routes, engines or self.engines
        for writer in self._writers:
            writer.write(encode(self.engines) + encode(self.routes))

    def say_raw(self, line: bytes) -> None:
        """Send bytes that need not be a message."""
        for writer in self._writers:
            writer.write(line)

    def held(self) -> HeldUpdate | None:
        """What the ingress last said that it holds."""
        return next((message for message in reversed(self.heard) if isinstance(message, HeldUpdate)), None)

    def summaries(self) -> list[Any]:
        """All summaries so far."""
        return [s for message in self.heard if isinstance(message, SummariesUpdate) for s in message.summaries]

    def applied(self) -> int:
        """The revision that the ingress last acknowledged."""
        return next((m.revision for m in reversed(self.heard) if isinstance(m, RoutesApplied)), -1)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            writer.write(encode(AgentHello(node=self.node)) + encode(self.engines) + encode(self.routes))
            while line := await reader.readline():
                self.lines.append(line)
                message = decode(line)
                assert message is not None
                self.heard.append(message)
        except ConnectionError:
            self.heard.append(AgentHello(node=self.node))  # keep the order of events visible in a failure
        finally:
            writer.close()
            self._writers.discard(writer)


class IngressNode:
    """One node: twin agent and real ingress in this process."""

    def __init__(self, folder: Path, *, node: str, **settings: Any) -> None:
        self.node = node
        self.folder = folder / node
        self.folder.mkdir(exist_ok=True)
        self.agent = TwinAgent(self.folder / "agent.sock", node=node)
        defaults = {"listen": "127.0.0.1:0", "hop_listen": "127.0.0.1:0", "held_interval_s": 0.05,
                    "frame_interval_s": 0.2, "drain_timeout_s": 2.0, "connect_timeout_s": 0.3}
        self.settings = IngressSettings(
            socket=self.agent.path, data_dir=self.folder / "data", **{**defaults, **settings}
        )
        self.ingress: Ingress | None = None

    async def __aenter__(self) -> Self:
        await self.agent.start()
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        await self.agent.stop()

    def held(self, number: int) -> HeldReplica:
        """What it last said that it holds for a replica; zeros if it said nothing."""
        update = self.agent.held()
        return (update.replicas.get(replica(number)) if update else None) or HeldReplica()

    def flushed(self) -> list[RequestRecord]:
        """The request records on disk."""
        files = sorted((self.settings.data_dir / "records").glob("*.jsonl"))
        return [record for file in files for record in records_of_bytes(file.read_bytes())]

    async def start(self) -> None:
        """Start the ingress."""
        self.ingress = Ingress(self.settings, clock=ModelClock())
        await self.ingress.start()

    async def stop(self) -> None:
        """Stop the ingress."""
        if self.ingress is not None:
            await self.ingress.stop()
            self.ingress = None

    @property
    def address(self) -> str:
        """Where applications connect."""
        assert self.ingress is not None
        return self.ingress.addresses()["openai_address"]

    @property
    def url(self) -> str:
        """The base of OpenAI's paths."""
        return f"http://{self.address}/v1"

    @property
    def metrics_url(self) -> str:
        """Where Prometheus reads."""
        assert self.ingress is not None
        return f"http://{self.ingress.addresses()['metrics_address']}/metrics"

    @property
    def hop_address(self) -> str:
        """Where other ingresses connect."""
        assert self.ingress is not None
        return self.ingress.addresses()["hop_address"]


def engine(number: int, url: str, *, max_concurrency: int = 64, queue_limit: int = 64, admitting: bool = True
           ) -> LocalEngine:
    """Replica `number` at a URL."""
    return LocalEngine(
        replica=replica(number), endpoint=url, max_concurrency=max_concurrency, queue_limit=queue_limit,
        admitting=admitting, served_names=(MODEL,),
    )


def replica(number: int) -> str:
    """The name of replica `number`."""
    return f"{DEPLOYMENT}/replicas/r{number}"


def route(
    nodes: Sequence[tuple[int, IngressNode]], *, classes: tuple[ServingClass, ...] = (), model: str = MODEL,
    lengths: LengthRules | None = None,
) -> Route:
    """A route to these replicas."""
    return Route(
        served_name=model, deployment=DEPLOYMENT, classes=classes, lengths=lengths,
        targets=tuple(
            RouteTarget(replica=replica(number), node=node.node, hop_address=node.hop_address)
            for number, node in nodes
        ),
    )


async def settle(*nodes: IngressNode, revision: int) -> None:
    """Wait until every ingress routes by this revision."""
    for node in nodes:
        agent = node.agent
        await until_async(lambda agent=agent: agent.applied() == revision, what=f"{node.node} applied {revision}")  # type: ignore[misc]


async def serve(
    nodes: Sequence[IngressNode], engines: Sequence[tuple[int, IngressNode, str]], *, revision: int = 1,
    classes: tuple[ServingClass, ...] = (), lengths: LengthRules | None = None, **limits: int
) -> None:
    """Tell the nodes of these engines and route the model to all of them."""
    table = RoutesUpdate(
        revision=revision,
        routes=(route([(number, node) for number, node, _ in engines], classes=classes, lengths=lengths),),
    )
    for node in nodes:
        mine = tuple(engine(number, url, **limits) for number, owner, url in engines if owner is node)  # type: ignore[arg-type]
        node.agent.say(routes=table, engines=EnginesUpdate(engines=mine))
    await settle(*nodes, revision=revision)


@contextlib.asynccontextmanager
async def started(*nodes: IngressNode) -> AsyncIterator[None]:
    """All of these nodes, started and stopped together."""
    async with contextlib.AsyncExitStack() as stack:
        for node in nodes:
            await stack.enter_async_context(node)
        yield
