"""A coordinator that does what a test tells it: the real AgentService on a real port, without anything behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from enova.v1 import agent_service_pb2 as wire
from enova.v1 import agent_service_pb2_grpc, telemetry_pb2
from enova_common.errors import Conflict
from enova_common.rpc import create_server, listen
from enova_common.settings import TlsSettings


@dataclass(slots=True)
class Stream:
    """One agent's stream, as the coordinator has it."""

    received: list[wire.ConnectRequest] = field(default_factory=list)
    outgoing: asyncio.Queue[wire.ConnectResponse | None] = field(default_factory=asyncio.Queue)
    ended: bool = False

    @property
    def hello(self) -> wire.Hello | None:
        return next((message.hello for message in self.received if message.HasField("hello")), None)

    @property
    def frames(self) -> list[telemetry_pb2.Frame]:
        return [message.frame for message in self.received if message.HasField("frame")]

    @property
    def status(self) -> wire.NodeStatus | None:
        return next((message.status for message in reversed(self.received) if message.HasField("status")), None)

    @property
    def heartbeats(self) -> list[wire.Heartbeat]:
        return [message.heartbeat for message in self.received if message.HasField("heartbeat")]

    def answers(self, kind: str) -> list[Any]:
        return [getattr(message, kind) for message in self.received if message.WhichOneof("message") == kind]


class ScriptedCoordinator(agent_service_pb2_grpc.AgentServiceServicer):
    """Welcomes agents in `term`, acknowledges heartbeats while `acknowledges`, and sends what it is given."""

    def __init__(self, *, term: int = 1, name: str = "coordinator-0") -> None:
        self.term = term
        self.name = name
        self.acknowledges = True
        self.reads = True
        self.leader_address = ""          # not empty: somebody else leads
        self.backfill_after_s: Callable[[], float] = lambda: 0.0
        self.frame_interval_s = 0.0
        self.streams: list[Stream] = []
        self.address = ""
        self._server: grpc.aio.Server | None = None

    @property
    def stream(self) -> Stream:
        return self.streams[-1]

    async def start(self, address: str = "127.0.0.1:0", tls: TlsSettings | None = None) -> str:
        self._server = create_server()
        agent_service_pb2_grpc.add_AgentServiceServicer_to_server(self, self._server)
        self.address = listen(self._server, address, tls)
        await self._server.start()
        return self.address

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None

    def send(self, message: wire.ConnectResponse) -> None:
        """Sends in the current term, unless the message bears one."""
        if not message.term:
            message.term = self.term
        self.stream.outgoing.put_nowait(message)

    async def Connect(  # noqa: N802  the name of the method in the proto
        self, request_iterator: AsyncIterator[wire.ConnectRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[wire.ConnectResponse]:
        if self.leader_address:
            raise Conflict(
                f"{self.name} does not lead", reason="NOT_LEADER", metadata={"leader_address": self.leader_address}
            )
        stream = Stream()
        self.streams.append(stream)
        reader = asyncio.create_task(self._read(request_iterator, stream))
        try:
            while (message := await stream.outgoing.get()) is not None:
                yield message
        finally:
            stream.ended = True
            reader.cancel()

    async def _read(self, requests: AsyncIterator[wire.ConnectRequest], stream: Stream) -> None:
        async for message in requests:
            stream.received.append(message)
            if message.HasField("hello"):
                welcome = wire.Welcome(
                    coordinator=self.name,
                    backfill_after_s=self.backfill_after_s(),
                    frame_interval_s=self.frame_interval_s,
                )
                stream.outgoing.put_nowait(wire.ConnectResponse(term=self.term, welcome=welcome))
            elif message.HasField("heartbeat") and self.acknowledges:
                ack = wire.HeartbeatAck(sequence=message.heartbeat.sequence)
                stream.outgoing.put_nowait(wire.ConnectResponse(term=self.term, heartbeat_ack=ack))
            while not self.reads:
                await asyncio.sleep(0.01)
        stream.outgoing.put_nowait(None)
