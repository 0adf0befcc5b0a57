"""An agent that does what a test tells it: the real protocol on a real stream, and no engines behind it.

It converges on what it is assigned by saying so: a member that shall run is READY at once, a member that drains or is
left out is gone. Frames are sent when a test makes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from enova.v1 import agent_service_pb2 as wire
from enova.v1 import agent_service_pb2_grpc, cluster_pb2, telemetry_pb2
from enova_testing.waiting import until_async

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
GPU_BYTES = 85_520_809_984
HEARTBEAT_S = 0.2


@dataclass(slots=True)
class ScriptedAgent:
    """One node's agent."""

    address: str
    name: str = "node-0"
    uid: str = ""
    gpus: int = 8
    gpu_type: str = "H100"
    gpu_facts: cluster_pb2.GpuFacts | None = None  # what a driver tells of each
    models: dict[str, str] = field(default_factory=lambda: {MODEL: "{}"})
    starts: bool = True                # whether members that shall run become READY
    hung: set[str] = field(default_factory=set)  # replicas that are READY and out of routing
    log_lines: list[str] = field(default_factory=lambda: ["first", "second"])
    instance: str = field(default_factory=lambda: uuid.uuid4().hex)
    terms: list[int] = field(default_factory=list)
    welcome: wire.Welcome | None = None
    assignment: wire.Assignment = field(default_factory=wire.Assignment)
    routes: list[wire.Routes] = field(default_factory=list)
    acks: int = 0
    error: grpc.aio.AioRpcError | None = None
    _sequence: int = 0
    _outgoing: asyncio.Queue[wire.ConnectRequest] = field(default_factory=asyncio.Queue)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _channel: grpc.aio.Channel | None = None

    @property
    def node(self) -> str:
        """The node's full name."""
        return f"nodes/{self.name}"

    @property
    def running(self) -> list[str]:
        """The replicas that this node runs."""
        return [each.replica for each in self.assignment.members if each.desired == each.DESIRED_RUN]

    @property
    def waiting(self) -> int:
        """Messages that are not sent yet."""
        return self._outgoing.qsize()

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[ScriptedAgent]:
        """The agent, welcomed; its stream ends with the block."""
        self.start()
        try:
            await until_async(lambda: self.welcome is not None or self.error is not None, what="the welcome")
            yield self
        finally:
            await self.stop()

    def start(self) -> None:
        """Open the stream and say Hello."""
        self._channel = grpc.aio.insecure_channel(self.address)
        stub: Any = agent_service_pb2_grpc.AgentServiceStub(self._channel)
        call = stub.Connect()
        self._outgoing.put_nowait(wire.ConnectRequest(hello=self.hello()))
        self._tasks = [asyncio.create_task(step) for step in (self._write(call), self._read(call), self._beat())]

    async def stop(self) -> None:
        """Break the stream off."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    def hello(self) -> wire.Hello:
        """Who this is."""
        gpus = [
            cluster_pb2.Gpu(
                uuid=f"GPU-{self.name}-{index}",
                index=index,
                type=self.gpu_type,
                memory_bytes=GPU_BYTES,
                free_memory_bytes=GPU_BYTES,
                simulated=True,
                facts=self.gpu_facts,
            )
            for index in range(self.gpus)
        ]
        node = cluster_pb2.Node(
            name=self.node,
            uid=self.uid or f"uid-{self.name}",
            cluster="default",
            gpus=gpus,
            engine="simulated",
            openai_address=f"127.0.0.1:1{self.name[-1:]}",
            hop_address=f"127.0.0.1:2{self.name[-1:]}",
        )
        return wire.Hello(node=node, instance=self.instance)

    def say(self, **message: Any) -> None:
        """Send one message."""
        self._outgoing.put_nowait(wire.ConnectRequest(**message))

    def frame(self, end_s: float, *, length_s: float = 1.0, **parts: Any) -> telemetry_pb2.Frame:
        """The next frame of this node."""
        self._sequence += 1
        return telemetry_pb2.Frame(
            node=self.node,
            boot=self.instance,
            sequence=self._sequence,
            start_s=end_s - length_s,
            end_s=end_s,
            **parts,
        )

    def say_status(self) -> None:
        """Say that everything is as it was assigned."""
        running = [
            wire.ReplicaStatus(
                replica=member.replica,
                uid=member.uid,
                state=self._state(member),
                pid=4000 + index,
                endpoint=f"http://127.0.0.1:{30000 + index}",
                in_routing=self.starts and member.replica not in self.hung,
            )
            for index, member in enumerate(self.assignment.members)
        ]
        revision = self.routes[-1].revision if self.routes else 0
        self.say(
            status=wire.NodeStatus(
                assignment_revision=self.assignment.revision,
                routes_revision=revision,
                ingress_connected=True,
                replicas=running,
            )
        )

    def _state(self, member: wire.AssignedMember) -> cluster_pb2.Replica.State.ValueType:
        if member.desired != member.DESIRED_RUN:
            return cluster_pb2.Replica.STATE_STOPPED
        return cluster_pb2.Replica.STATE_READY if self.starts else cluster_pb2.Replica.STATE_STARTING

    async def _write(self, call: Any) -> None:
        while True:
            await call.write(await self._outgoing.get())

    async def _beat(self) -> None:
        sequence = 0
        while True:
            sequence += 1
            self.say(heartbeat=wire.Heartbeat(sequence=sequence))
            await asyncio.sleep(HEARTBEAT_S)

    async def _read(self, call: Any) -> None:
        try:
            async for message in call:
                self.terms.append(message.term)
                self._obey(message)
        except grpc.aio.AioRpcError as error:
            self.error = error

    def _obey(self, message: wire.ConnectResponse) -> None:
        match message.WhichOneof("message"):
            case "welcome":
                self.welcome = message.welcome
                self.say_status()
            case "assignment":
                self.assignment = message.assignment
                self.say_status()
            case "routes":
                self.routes.append(message.routes)
                self.say_status()
            case "inspect_model":
                self.say(inspect_model_result=self._inspected(message.inspect_model))
            case "logs":
                self._send_logs(message.logs)
            case "heartbeat_ack":
                self.acks += 1

    def _inspected(self, question: wire.InspectModelRequest) -> wire.InspectModelResult:
        config = self.models.get(question.model)
        if config is None:
            return wire.InspectModelResult(
                request=question.request,
                error_reason="MODEL_NOT_FOUND",
                error_message=f"{question.model} is not on this host",
                error_remedy="check the path",
            )
        json.loads(config)
        return wire.InspectModelResult(request=question.request, config_json=config, weight_bytes=16 << 30, digest="d")

    def _send_logs(self, question: wire.LogRequest) -> None:
        tail = self.log_lines[-question.tail_lines :] if question.tail_lines else self.log_lines
        self.say(log_chunk=wire.LogChunk(request=question.request, lines=tail, end=not question.follow))
