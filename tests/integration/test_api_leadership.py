"""A coordinator that does not lead refers to the one that does; identities come from certificates; history ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from enova.v1 import (
    agent_service_pb2,
    agent_service_pb2_grpc,
    cluster_pb2,
    deployment_service_pb2,
    deployment_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
)
from enova_common import rpc
from enova_common.certs import init_authority, issue
from enova_common.clock import ModelClock
from enova_common.errors import EnovaError
from enova_common.identity import Role
from enova_common.settings import TlsSettings
from enova_coordinator.coordinator import Coordinator
from enova_coordinator.settings import CoordinatorSettings
from enova_coordinator.store.sqlite import SqliteStore
from enova_testing.scripted_agent import MODEL, ScriptedAgent
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network
CALL_TIMEOUT_S = 10.0


class Pair:
    """Two coordinators of one process on one store: one leads, the other follows."""

    def __init__(self, directory: Path, store: SqliteStore) -> None:
        self.store = store
        self.both = [
            Coordinator(
                CoordinatorSettings(name=f"coordinator-{index}", listen="127.0.0.1:0", metrics_listen="",
                                    data_dir=directory / str(index)),
                store,
                ModelClock(),
            )
            for index in range(2)
        ]  # fmt: skip

    @property
    def leader(self) -> Coordinator | None:
        return next((each for each in self.both if each.election.leadership is not None), None)

    @property
    def follower(self) -> Coordinator:
        return next(each for each in self.both if each is not self.leader)


@pytest_asyncio.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    made = Pair(tmp_path, await SqliteStore.open(":memory:"))
    stop = asyncio.Event()
    running = [asyncio.create_task(each.run(stop, listening=asyncio.Event())) for each in made.both]
    await until_async(lambda: made.leader is not None and made.follower.election.leader is not None)
    yield made
    stop.set()
    await asyncio.gather(*running)


async def refused(call: Any) -> EnovaError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return rpc.error_from_rpc(caught.value)


async def test_a_follower_refers_writes_and_agents_to_the_leader_and_serves_reads(pair: Pair) -> None:
    assert pair.leader is not None
    leader_address = pair.leader.address
    async with grpc.aio.insecure_channel(pair.follower.address) as channel:
        deployments: Any = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
        nodes: Any = node_service_pb2_grpc.NodeServiceStub(channel)
        creation = deployment_service_pb2.CreateDeploymentRequest(
            deployment_id="d", deployment=cluster_pb2.Deployment(model=MODEL, replicas=1)
        )
        for call in (deployments.CreateDeployment(creation), nodes.ListNodes(node_service_pb2.ListNodesRequest())):
            error = await refused(call)
            assert (error.reason, error.metadata["leader_address"]) == ("NOT_LEADER", leader_address)
        listed = await deployments.ListDeployments(deployment_service_pb2.ListDeploymentsRequest())
        assert not listed.deployments
    async with ScriptedAgent(pair.follower.address).connected() as agent:
        assert agent.error is not None
        assert rpc.error_from_rpc(agent.error).metadata["leader_address"] == leader_address
    async with ScriptedAgent(leader_address).connected() as agent:
        assert agent.welcome is not None


async def test_a_leader_that_resigns_ends_its_agents_streams_and_the_next_term_is_higher(pair: Pair) -> None:
    first = pair.leader
    assert first is not None
    leadership = first.election.leadership
    assert leadership is not None
    async with ScriptedAgent(first.address).connected() as agent:
        leadership.end("the test asks for it")
        await until_async(lambda: agent.error is not None, what="the stream ends")
        assert agent.error is not None
        assert rpc.error_from_rpc(agent.error).reason == "NOT_LEADER"

    def later_term() -> bool:
        leading = pair.leader
        now = leading.election.leadership if leading is not None else None
        return now is not None and now.term > leadership.term

    await until_async(later_term, timeout_s=15)


async def test_a_watch_from_forgotten_history_says_so(pair: Pair) -> None:
    assert pair.leader is not None
    async with grpc.aio.insecure_channel(pair.leader.address) as channel:
        stub: Any = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
        for number in (1, 2):
            await stub.CreateDeployment(
                deployment_service_pb2.CreateDeploymentRequest(
                    deployment_id=f"d{number}", deployment=cluster_pb2.Deployment(model=MODEL, replicas=1)
                )
            )
        _, revision = await pair.store.range("/enova/v1/")
        await pair.store.compact(revision)
        watch = stub.WatchDeployments(deployment_service_pb2.WatchDeploymentsRequest(resume_revision=1))
        error = await refused(watch.read())
        assert (error.reason, error.field) == ("RESUME_REVISION_COMPACTED", "resume_revision")
        anew = stub.WatchDeployments(deployment_service_pb2.WatchDeploymentsRequest())
        first = await asyncio.wait_for(anew.read(), CALL_TIMEOUT_S)
        assert len(first.changed) == 2
        anew.cancel()


@pytest_asyncio.fixture
async def secured(tmp_path: Path) -> AsyncIterator[tuple[Coordinator, dict[str, TlsSettings]]]:
    """A coordinator with mutual TLS, and certificates of several identities."""
    folder = tmp_path / "certs"
    authority = init_authority(folder)
    files = {}
    for role, name in ((Role.COORDINATOR, "c"), (Role.AGENT, "node-0"), (Role.USER, "ada")):
        issued = issue(folder, role, name, hosts=("127.0.0.1", "localhost"))
        files[f"{role}/{name}"] = TlsSettings(
            ca=authority.certificate_path, cert=issued.certificate_path, key=issued.key_path
        )
    settings = CoordinatorSettings(
        name="c", listen="127.0.0.1:0", metrics_listen="", data_dir=tmp_path / "data", tls=files["coordinator/c"]
    )
    coordinator = Coordinator(settings, await SqliteStore.open(":memory:"), ModelClock())
    stop = asyncio.Event()
    running = asyncio.create_task(coordinator.run(stop, listening=asyncio.Event()))
    await until_async(lambda: coordinator.chair.current is not None)
    yield coordinator, files
    stop.set()
    await running


async def test_a_node_is_who_its_certificate_says(secured: tuple[Coordinator, dict[str, TlsSettings]]) -> None:
    coordinator, files = secured
    for name, reason in (("node-0", ""), ("node-1", "WRONG_IDENTITY")):
        channel = rpc.open_channel(coordinator.address, files["agent/node-0"])
        stub: Any = agent_service_pb2_grpc.AgentServiceStub(channel)
        call = stub.Connect()
        hello = ScriptedAgent(coordinator.address, name=name).hello()
        await call.write(agent_service_pb2.ConnectRequest(hello=hello))
        if reason:
            assert (await refused(call.read())).reason == reason
        else:
            welcome = await asyncio.wait_for(call.read(), CALL_TIMEOUT_S)
            assert welcome.welcome.coordinator == "c"
        call.cancel()
        await channel.close()


async def test_an_agent_may_not_act_as_a_user(secured: tuple[Coordinator, dict[str, TlsSettings]]) -> None:
    coordinator, files = secured
    for identity, allowed in (("agent/node-0", False), ("user/ada", True)):
        channel = rpc.open_channel(coordinator.address, files[identity])
        stub: Any = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
        call = stub.ListDeployments(deployment_service_pb2.ListDeploymentsRequest())
        if allowed:
            await call
        else:
            assert (await refused(call)).reason == "WRONG_ROLE"
        await channel.close()
