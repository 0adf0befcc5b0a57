"""Whatever makes the leader write, the write compares its term; whatever it tells an agent bears it. Of every method.

A whole coordinator runs on a store that records each transaction. The methods come from the descriptors of the API:
a new one that this test does not know fails it.
"""

from __future__ import annotations

import ast
import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.field_mask_pb2 import FieldMask

import enova_coordinator
from enova.v1 import (
    agent_service_pb2,
    agent_service_pb2_grpc,
    breakdown_service_pb2_grpc,
    cluster_pb2,
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
from enova_common.clock import ModelClock
from enova_coordinator import coordinator as coordinator_module
from enova_coordinator.coordinator import Coordinator
from enova_coordinator.core import plan
from enova_coordinator.core.calibration import StoredCalibration
from enova_coordinator.core.episode import Episode
from enova_coordinator.core.liveness import LivenessLimits
from enova_coordinator.core.model import Decision, DecisionAction, Deployment, DeploymentAdvice, RequestRecord
from enova_coordinator.election import LEADER_KEY
from enova_coordinator.service.leading import Leading
from enova_coordinator.service.register import SERVICES
from enova_coordinator.settings import CoordinatorSettings
from enova_coordinator.store import Compare, CreateRevisionIs, ModRevisionIs, Operation, Put, TransactionResult, codec
from enova_coordinator.store.changes import commit
from enova_coordinator.store.sqlite import MEMORY, SqliteStore
from enova_recommender.types import VerdictKind
from enova_testing.scripted_agent import MODEL, ScriptedAgent
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network

DEPLOYMENT = "deployments/chat"
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Recorded:
    """One transaction that somebody asked of the store."""

    compares: tuple[Compare, ...]
    keys: tuple[str, ...]
    succeeded: bool

    @property
    def term(self) -> int:
        """The term that it compared; 0: none."""
        return next((c.revision for c in self.compares if isinstance(c, CreateRevisionIs) and c.key == LEADER_KEY), 0)


class RecordingStore(SqliteStore):
    """The embedded store; keeps what it was asked."""

    recorded: list[Recorded]

    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        result = await super().transact(compares, operations)
        keys = tuple(operation.key for operation in operations)
        self.recorded.append(Recorded(tuple(compares), keys, result.succeeded))
        return result


class HearingAgent(ScriptedAgent):
    """An agent that notes which kinds of messages it got, with their terms."""

    def _obey(self, message: agent_service_pb2.ConnectResponse) -> None:
        HEARD.append((message.WhichOneof("message") or "", message.term))
        super()._obey(message)


HEARD: list[tuple[str, int]] = []


@dataclass
class World:
    """A coordinator that leads, two agents, and stubs of all services."""

    coordinator: Coordinator
    store: RecordingStore
    channel: grpc.aio.Channel
    agents: list[ScriptedAgent] = field(default_factory=list)

    @property
    def leading(self) -> Leading:
        leading = self.coordinator.chair.current
        assert leading is not None
        return leading

    def stub(self, service: str) -> Any:
        return STUBS[service](self.channel)

    async def call(self, method: str, request: Any) -> Any:
        service, _, name = method.partition(".")
        return await getattr(self.stub(service), name)(request, timeout=TIMEOUT_S)

    async def writes(self, key: str, act: Awaitable[object]) -> None:
        """What `act` does must write a key that begins so."""
        before = len(self.store.recorded)
        await act

        def written() -> bool:
            return any(k.startswith(key) for each in self.store.recorded[before:] if each.succeeded for k in each.keys)

        await until_async(written, what=f"a write of {key}")


STUBS: dict[str, Callable[[grpc.aio.Channel], Any]] = {
    "AgentService": agent_service_pb2_grpc.AgentServiceStub,
    "BreakdownService": breakdown_service_pb2_grpc.BreakdownServiceStub,
    "DecisionService": decision_service_pb2_grpc.DecisionServiceStub,
    "DeploymentService": deployment_service_pb2_grpc.DeploymentServiceStub,
    "NodeService": node_service_pb2_grpc.NodeServiceStub,
    "ReplicaService": replica_service_pb2_grpc.ReplicaServiceStub,
    "VerdictService": verdict_service_pb2_grpc.VerdictServiceStub,
}
READS = {
    *(f"BreakdownService.{name}" for name in ("GetBreakdown", "ListCalibrations")),
    *(f"DecisionService.{name}" for name in ("GetDecision", "ListDecisions", "WatchDecisions", "ListEvents")),
    *(f"DecisionService.{name}" for name in ("WatchEvents", "Explain", "ExportSituations")),
    *(f"DeploymentService.{name}" for name in ("GetDeployment", "ListDeployments", "WatchDeployments")),
    *(f"DeploymentService.{name}" for name in ("ListVariants", "InspectModel")),
    *(f"DeploymentService.{name}" for name in ("RecommendConfiguration", "RecommendAllocation", "GetLiveCapacity")),
    *(f"NodeService.{name}" for name in ("GetNode", "ListNodes", "WatchNodes")),
    *(f"ReplicaService.{name}" for name in ("GetReplica", "ListReplicas", "WatchReplicas", "StreamLogs")),
    "ReplicaService.GetTelemetry",
    *(f"VerdictService.{name}" for name in ("ListVerdicts", "WatchVerdicts", "GetEpisode", "ListEpisodes")),
    "VerdictService.WatchEpisodes",
}


def wanted(**fields: Any) -> cluster_pb2.Deployment:
    deployment = cluster_pb2.Deployment(**fields)
    deployment.model, deployment.replicas = MODEL, 1
    return deployment


async def create(world: World) -> None:
    request = deployment_service_pb2.CreateDeploymentRequest(
        deployment_id="chat", deployment=wanted(), request_id="create-1"
    )
    await world.writes("/enova/v1/requests/create-1", world.call("DeploymentService.CreateDeployment", request))
    await until_async(lambda: world.agents[0].running or world.agents[1].running, what="a replica is assigned")


async def scale(world: World) -> None:
    request = deployment_service_pb2.ScaleDeploymentRequest(name=DEPLOYMENT, replicas=2, request_id="scale-1")
    await world.writes("/enova/v1/decisions/chat/", world.call("DeploymentService.ScaleDeployment", request))
    await until_async(lambda: len(ready(world)) == 2, timeout_s=TIMEOUT_S, what="two replicas are READY")


async def update(world: World) -> None:
    request = deployment_service_pb2.UpdateDeploymentRequest(
        deployment=wanted(name=DEPLOYMENT, priority=7), update_mask=FieldMask(paths=["priority"])
    )
    await world.writes("/enova/v1/deployments/chat", world.call("DeploymentService.UpdateDeployment", request))


async def restart(world: World) -> None:
    name = ready(world)[0]
    request = replica_service_pb2.RestartReplicaRequest(name=name)
    await world.writes(codec.key(name), world.call("ReplicaService.RestartReplica", request))


async def drain(world: World) -> None:
    request = node_service_pb2.DrainNodeRequest(name="nodes/node-1")
    await world.writes("/enova/v1/nodes/node-1", world.call("NodeService.DrainNode", request))


async def uncordon(world: World) -> None:
    request = node_service_pb2.UncordonNodeRequest(name="nodes/node-1")
    await world.writes("/enova/v1/nodes/node-1", world.call("NodeService.UncordonNode", request))


async def label(world: World) -> None:
    episode = Episode(name="episodes/0000000000000001-00000000", object="fleet", verdict=VerdictKind.UNKNOWN)
    assert world.leading.detection is not None
    await world.writes(codec.key(episode.name), world.leading.detection.keep(episode))
    request = verdict_service_pb2.LabelEpisodeRequest(name=episode.name, label=verdict_service_pb2.Episode.LABEL_TRUE)
    await world.writes(codec.key(episode.name), world.call("VerdictService.LabelEpisode", request))


async def accept(world: World) -> None:
    key = codec.key(DEPLOYMENT)
    entry = await world.store.get(key)
    assert entry is not None
    before = codec.decode_as(Deployment, entry.value, key=key)
    better = DeploymentAdvice(gpu_type="H100", configuration={"max_num_seqs": 64}, reason="it is better")
    put = plan.Put(value=replace(before, proposal=better), revision=entry.mod_revision)
    await world.writes(key, commit(world.store, world.leading.fence.guard(), [put]))
    request = deployment_service_pb2.AcceptProposalRequest(name=DEPLOYMENT)
    await world.writes(key, world.call("DeploymentService.AcceptProposal", request))


async def delete_deployment(world: World) -> None:
    request = deployment_service_pb2.DeleteDeploymentRequest(name=DEPLOYMENT)
    await world.writes("/enova/v1/deployments/chat", world.call("DeploymentService.DeleteDeployment", request))
    await until_async(lambda: not world.leading.control.snapshot.deployments, timeout_s=TIMEOUT_S, what="it is gone")


async def delete_node(world: World) -> None:
    await world.agents[1].stop()
    views = world.leading.control
    await until_async(lambda: views.snapshot.nodes["nodes/node-1"].state == "LOST", timeout_s=TIMEOUT_S, what="LOST")
    request = node_service_pb2.DeleteNodeRequest(name="nodes/node-1")
    await world.writes("/enova/v1/nodes/node-1", world.call("NodeService.DeleteNode", request))


# In an order in which each finds what it needs.
WRITES: dict[str, Callable[[World], Awaitable[None]]] = {
    "DeploymentService.CreateDeployment": create,
    "DeploymentService.ScaleDeployment": scale,
    "DeploymentService.UpdateDeployment": update,
    "ReplicaService.RestartReplica": restart,
    "NodeService.DrainNode": drain,
    "NodeService.UncordonNode": uncordon,
    "VerdictService.LabelEpisode": label,
    "DeploymentService.AcceptProposal": accept,
    "DeploymentService.DeleteDeployment": delete_deployment,
    "NodeService.DeleteNode": delete_node,
}


def ready(world: World) -> list[str]:
    return [name for name, each in world.leading.control.snapshot.replicas.items() if each.status.state == "READY"]


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[World]:
    """The whole coordinator in this process, leading, with what housekeeping will find too old."""
    store = await RecordingStore.open(MEMORY)
    store.recorded = []
    old = RequestRecord(name="requests/old", method="m", object="o", fingerprint="f", create_time_s=1.0)
    key = codec.key(old.name)
    await SqliteStore.transact(store, [ModRevisionIs(key, 0)], [Put(key, codec.encode(old))])
    settings = CoordinatorSettings(
        name="alone",
        listen="127.0.0.1:0",
        metrics_listen="",
        data_dir=directory,
        suspect_after_s=0.5,
        lost_after_s=1.0,
    )
    coordinator = Coordinator(settings, store, ModelClock())
    stop, listening = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(coordinator.run(stop, listening=listening))
    try:
        await until_async(lambda: coordinator.chair.current, what="it leads")
        async with grpc.aio.insecure_channel(coordinator.address) as channel:
            yield World(coordinator, store, channel)
    finally:
        stop.set()
        await task


async def test_every_write_compares_the_term_and_every_message_bears_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        coordinator_module, "LivenessLimits", functools.partial(LivenessLimits, takeover_grace_s=0.0)
    )  # nobody but these agents will ever connect
    HEARD.clear()
    async with running(tmp_path) as world:
        agents = [HearingAgent(world.coordinator.address, name=f"node-{index}") for index in range(2)]
        world.agents += agents
        term = world.leading.fence.term
        async with agents[0].connected():
            await world.writes("/enova/v1/nodes/node-1", connected(agents[1]))
            for act in WRITES.values():
                await act(world)
                if act is scale:
                    await ask_for_logs(world)
            await world.writes("/enova/v1/decisions/chat/", world.leading.control.record_decision(held()))
            assert world.leading.calibration is not None
            await world.writes("/enova/v1/calibrations/H100.x", world.leading.calibration.keep(learnt()))
        recorded = list(world.store.recorded)

    assert "/enova/v1/requests/old" in {key for each in recorded for key in each.keys}, "housekeeping has been at work"
    unguarded = [each for each in recorded if each.term != term and set(each.keys) != {LEADER_KEY}]
    assert unguarded == []
    # Everything of the map of keys was written by somebody in here.
    collections = {key.split("/")[3] for each in recorded for key in each.keys}
    assert collections >= {"deployments", "variants", "replicas", "nodes", "assignments", "decisions", "requests"}
    assert {heard for _, heard in HEARD} == {term}
    messages = agent_service_pb2.ConnectResponse.DESCRIPTOR.oneofs_by_name["message"].fields
    assert {kind for kind, _ in HEARD} == {message.name for message in messages}


async def connected(agent: ScriptedAgent) -> None:
    agent.start()
    await until_async(lambda: agent.welcome is not None, what="the welcome")


async def ask_for_logs(world: World) -> None:
    """Follow a log and go away: the agent is asked, and told that nobody waits any more."""
    request = replica_service_pb2.StreamLogsRequest(name=ready(world)[0], follow=True, tail_lines=1)
    call = world.stub("ReplicaService").StreamLogs(request, timeout=TIMEOUT_S)
    await call.read()
    call.cancel()
    await until_async(lambda: "cancel" in {kind for kind, _ in HEARD}, what="the agent is told")


def held() -> Decision:
    return Decision(name="", deployment=DEPLOYMENT, action=DecisionAction.HOLD, actor="policy/test", reason="to see")


def learnt() -> StoredCalibration:
    return StoredCalibration(
        name="calibrations/H100.x", gpu_type="H100", model=MODEL, configuration="", groups=(), factors=(),
        covariance=(), noise=0.1, prior_spread=0.3,
    )  # fmt: skip


def test_every_method_of_the_api_is_known_as_a_read_or_a_write() -> None:
    pool = descriptor_pool.Default()
    services = [pool.FindServiceByName(name) for name in SERVICES]
    methods = {f"{service.name}.{method.name}" for service in services for method in service.methods}
    assert methods == {"AgentService.Connect"} | READS | set(WRITES)


def test_the_store_is_written_from_where_this_test_looked_and_from_nowhere_else() -> None:
    root = Path(enova_coordinator.__file__).parent
    writers = {str(path.relative_to(root)) for path in root.rglob("*.py") if writes(path)}
    inside = {writer for writer in writers if writer.startswith("store/")}
    loops = {"advice_loop.py", "calibration_loop.py", "controller.py", "detection_loop.py", "housekeeping.py"}
    assert writers - inside == {"election.py", "service/writes.py"} | loops


def writes(path: Path) -> bool:
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    names = {func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "") for func in calls}
    return bool(names & {"transact", "commit"})
