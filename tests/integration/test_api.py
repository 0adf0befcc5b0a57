"""The API of the real coordinator process: standard methods, pages, masks, repeated requests, watches, clear errors."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask

from enova.v1 import (
    agent_service_pb2,
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
from enova_common.errors import EnovaError, InvalidField
from enova_common.rpc import error_from_rpc
from enova_testing.coordinator_process import CoordinatorProcess, running_coordinator
from enova_testing.scripted_agent import MODEL, ScriptedAgent
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network
CALL_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Api:
    """Stubs of all services; each call has a deadline."""

    channel: grpc.aio.Channel

    def __getattr__(self, method: str) -> Any:
        for stub in self._all():
            if (found := getattr(stub, method, None)) is not None:
                return found
        raise AttributeError(method)

    def _all(self) -> list[Any]:
        return [
            deployment_service_pb2_grpc.DeploymentServiceStub(self.channel),
            replica_service_pb2_grpc.ReplicaServiceStub(self.channel),
            node_service_pb2_grpc.NodeServiceStub(self.channel),
            decision_service_pb2_grpc.DecisionServiceStub(self.channel),
            verdict_service_pb2_grpc.VerdictServiceStub(self.channel),
        ]


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorProcess]:
    with running_coordinator(tmp_path_factory.mktemp("api")) as process:
        yield process


@pytest_asyncio.fixture
async def api(coordinator: CoordinatorProcess) -> AsyncIterator[Api]:
    async with grpc.aio.insecure_channel(coordinator.address) as channel:
        await asyncio.wait_for(channel.channel_ready(), CALL_TIMEOUT_S)
        yield Api(channel)


@pytest_asyncio.fixture
async def agent(coordinator: CoordinatorProcess, api: Api) -> AsyncIterator[ScriptedAgent]:
    async with ScriptedAgent(coordinator.address, gpus=64).connected() as connected:
        await until_async(lambda: _node_state(api, connected), timeout_s=20, what="the node is READY")
        yield connected


async def _node_state(api: Api, agent: ScriptedAgent) -> bool:
    with contextlib.suppress(grpc.aio.AioRpcError):  # it is not registered yet
        node = await api.GetNode(node_service_pb2.GetNodeRequest(name=agent.node))
        return bool(node.state == cluster_pb2.Node.STATE_READY)
    return False


def wanted(**fields: Any) -> cluster_pb2.Deployment:
    merged: dict[str, Any] = {"model": MODEL, "replicas": 1} | fields
    return cluster_pb2.Deployment(**merged)


def creation(name: str, **fields: Any) -> deployment_service_pb2.CreateDeploymentRequest:
    return deployment_service_pb2.CreateDeploymentRequest(deployment_id=name, deployment=wanted(**fields))


def fresh() -> str:
    return f"d-{uuid.uuid4().hex[:8]}"


async def refused(call: Any) -> EnovaError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_rpc(caught.value)


async def told(call: Any) -> tuple[str, str]:
    """Why a call is refused, and which field is wrong."""
    error = await refused(call)
    return error.reason, error.field


async def created(api: Api, **fields: Any) -> cluster_pb2.Deployment:
    deployment: cluster_pb2.Deployment = await api.CreateDeployment(creation(fresh(), **fields))
    return deployment


async def test_a_deployment_becomes_ready_and_is_routed(api: Api, agent: ScriptedAgent) -> None:
    deployment = await created(api)

    async def ready() -> bool:
        replicas = (
            await api.ListReplicas(replica_service_pb2.ListReplicasRequest(parent=deployment.name))
        ).replicas
        return [(each.state, each.routed) for each in replicas] == [(cluster_pb2.Replica.STATE_READY, True)]

    await until_async(ready, what="one replica is READY and routed")
    now = await api.GetDeployment(deployment_service_pb2.GetDeploymentRequest(name=deployment.name))
    assert now.state == cluster_pb2.Deployment.STATE_READY
    assert now.variants == [f"{deployment.name}/variants/v1"]
    names = [route.served_name for routes in agent.routes for route in routes.routes]
    assert deployment.name.removeprefix("deployments/") in names
    assert min(agent.terms) > 0


async def test_a_repeated_request_is_done_once(api: Api, agent: ScriptedAgent) -> None:
    request = creation(fresh())
    request.request_id = str(uuid.uuid4())
    first, second = await api.CreateDeployment(request), await api.CreateDeployment(request)
    assert first.uid == second.uid
    request.deployment.priority = 7
    error = await refused(api.CreateDeployment(request))
    assert (error.reason, error.field) == ("REQUEST_ID_REUSED", "request_id")


async def test_validate_only_changes_nothing(api: Api, agent: ScriptedAgent) -> None:
    request = creation(fresh())
    request.validate_only = True
    answer = await api.CreateDeployment(request)
    assert answer.model == MODEL
    error = await refused(api.GetDeployment(deployment_service_pb2.GetDeploymentRequest(name=answer.name)))
    assert error.reason == "NOT_FOUND"


async def test_a_name_that_exists_is_refused(api: Api, agent: ScriptedAgent) -> None:
    deployment = await created(api)
    error = await refused(api.CreateDeployment(creation(deployment.name.removeprefix("deployments/"))))
    assert (error.reason, error.field) == ("ALREADY_EXISTS", "deployment_id")


async def test_of_deployments_that_want_one_served_name_at_once_one_gets_it(api: Api, agent: ScriptedAgent) -> None:
    served = fresh()
    calls = [api.CreateDeployment(creation(fresh(), served_names=[served])) for _ in range(4)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    refusals = [error_from_rpc(each) for each in answers if isinstance(each, grpc.aio.AioRpcError)]
    assert [(each.reason, each.field) for each in refusals] == [("INVALID_FIELD", "served_names[0]")] * 3


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"model": ""}, "model"),
        ({"replicas": None, "min": 5, "max": 2}, "min"),
        ({"replicas": -1}, "replicas"),
        ({"policy": "wishful"}, "policy"),
        ({"configuration": cluster_pb2.Configuration(gpu_memory_utilization=1.5)},
         "configuration.gpu_memory_utilization"),
        ({"classes": [cluster_pb2.ServingClass(name="chat", ttft_p95_s=float("nan"))]}, "classes[0].ttft_p95_s"),
    ],
)
async def test_bad_input_names_its_field_and_the_system_still_serves(
    api: Api, agent: ScriptedAgent, fields: dict[str, Any], field: str
) -> None:
    error = await refused(api.CreateDeployment(creation(fresh(), **fields)))
    assert (type(error), error.reason, error.field) == (InvalidField, "INVALID_FIELD", field)
    assert error.message
    await api.ListDeployments(deployment_service_pb2.ListDeploymentsRequest())


async def test_a_model_that_no_host_has_is_refused_with_the_hosts_reason(api: Api, agent: ScriptedAgent) -> None:
    error = await refused(api.CreateDeployment(creation(fresh(), model="/models/absent")))
    assert (error.reason, error.field, error.remedy) == ("MODEL_NOT_FOUND", "model", "check the path")
    assert "/models/absent" in error.message


async def test_a_mask_changes_its_fields_alone(api: Api, agent: ScriptedAgent) -> None:
    before = await created(api, priority=3, configuration=cluster_pb2.Configuration(max_num_seqs=8, seed=1))
    request = deployment_service_pb2.UpdateDeploymentRequest(
        deployment=cluster_pb2.Deployment(
            name=before.name, configuration=cluster_pb2.Configuration(max_num_seqs=16), priority=9
        ),
        update_mask=FieldMask(paths=["configuration.max_num_seqs"]),
    )
    after = await api.UpdateDeployment(request)
    assert (after.configuration.max_num_seqs, after.configuration.seed, after.priority) == (16, 1, 3)
    assert after.generation == before.generation + 1


async def test_conservatism_is_one_where_it_is_left_out_and_is_checked(api: Api, agent: ScriptedAgent) -> None:
    before = await created(api, replicas=None, min=1, max=2)
    assert before.conservatism == 1.0
    request = deployment_service_pb2.UpdateDeploymentRequest(
        deployment=cluster_pb2.Deployment(name=before.name, conservatism=2.5),
        update_mask=FieldMask(paths=["conservatism"]),
    )
    assert (await api.UpdateDeployment(request)).conservatism == 2.5
    request.deployment.conservatism = 0.0
    assert await told(api.UpdateDeployment(request)) == ("INVALID_FIELD", "conservatism")
    request.deployment.ClearField("conservatism")
    assert (await api.UpdateDeployment(request)).conservatism == 1.0


async def test_a_mask_of_an_unknown_field_is_refused(api: Api, agent: ScriptedAgent) -> None:
    before = await created(api)
    for path in ("state", "nonsense", "configuration.nonsense"):
        request = deployment_service_pb2.UpdateDeploymentRequest(
            deployment=cluster_pb2.Deployment(name=before.name), update_mask=FieldMask(paths=[path])
        )
        assert await told(api.UpdateDeployment(request)) == ("INVALID_FIELD", "update_mask")


async def test_an_update_of_a_name_without_its_collection_is_refused(api: Api, agent: ScriptedAgent) -> None:
    request = deployment_service_pb2.UpdateDeploymentRequest(
        deployment=cluster_pb2.Deployment(name="bare", model=MODEL, replicas=1), allow_missing=True
    )
    error = await refused(api.UpdateDeployment(request))
    assert (error.reason, error.field, error.remedy) == ("INVALID_FIELD", "name", "write deployments/{deployment}")


async def test_an_old_etag_is_refused(api: Api, agent: ScriptedAgent) -> None:
    before = await created(api)
    request = deployment_service_pb2.UpdateDeploymentRequest(deployment=wanted(priority=1))
    request.deployment.name = before.name
    await api.UpdateDeployment(request)
    request.deployment.priority = 2
    request.deployment.etag = before.etag
    assert (await refused(api.UpdateDeployment(request))).reason == "ETAG_MISMATCH"


async def test_apply_creates_what_is_missing_and_changes_nothing_the_second_time(
    api: Api, agent: ScriptedAgent
) -> None:
    request = deployment_service_pb2.UpdateDeploymentRequest(deployment=wanted(), allow_missing=True)
    request.deployment.name = f"deployments/{fresh()}"
    first, second = await api.UpdateDeployment(request), await api.UpdateDeployment(request)
    assert (first.uid, first.generation) == (second.uid, second.generation)
    request.allow_missing = False
    request.deployment.name = f"deployments/{fresh()}"
    assert (await refused(api.UpdateDeployment(request))).reason == "NOT_FOUND"


async def test_an_etag_of_what_is_missing_is_refused_and_creates_nothing(api: Api, agent: ScriptedAgent) -> None:
    request = deployment_service_pb2.UpdateDeploymentRequest(deployment=wanted(etag="7"), allow_missing=True)
    request.deployment.name = f"deployments/{fresh()}"
    assert (await refused(api.UpdateDeployment(request))).reason == "ETAG_MISMATCH"
    one = deployment_service_pb2.GetDeploymentRequest(name=request.deployment.name)
    assert (await refused(api.GetDeployment(one))).reason == "NOT_FOUND"


async def test_a_mask_of_everything_replaces_everything(api: Api, agent: ScriptedAgent) -> None:
    before = await created(api, priority=3, configuration=cluster_pb2.Configuration(seed=1))
    request = deployment_service_pb2.UpdateDeploymentRequest(
        deployment=wanted(name=before.name, replicas=2), update_mask=FieldMask(paths=["*"])
    )
    after = await api.UpdateDeployment(request)
    assert (after.replicas, after.priority, after.configuration.HasField("seed")) == (2, 0, False)
    request.update_mask.paths.append("priority")
    assert await told(api.UpdateDeployment(request)) == ("INVALID_FIELD", "update_mask")


async def test_a_name_that_contradicts_the_id_is_refused(api: Api, agent: ScriptedAgent) -> None:
    request = creation(fresh())
    request.deployment.name = "deployments/other"
    assert await told(api.CreateDeployment(request)) == ("INVALID_FIELD", "deployment.name")
    request.deployment.name = f"deployments/{request.deployment_id}"
    assert (await api.CreateDeployment(request)).name == request.deployment.name


async def test_a_context_beyond_the_models_is_refused_by_its_field(
    api: Api, coordinator: CoordinatorProcess
) -> None:
    async with ScriptedAgent(coordinator.address, "short").connected() as short:
        short.models["/models/short"] = '{"max_position_embeddings": 2048}'
        await until_async(lambda: _node_state(api, short), timeout_s=20)
        configuration = cluster_pb2.Configuration(max_model_len=2049)
        error = await refused(
            api.CreateDeployment(creation(fresh(), model="/models/short", configuration=configuration))
        )
        assert (error.reason, error.field) == ("INVALID_FIELD", "configuration.max_model_len")
        assert "2048" in error.message
        assert error.remedy


@pytest.mark.parametrize(("revision", "reason"), [(10**9, "RESUME_REVISION_FUTURE"), (-5, "INVALID_FIELD")])
async def test_a_watch_from_a_revision_that_never_was_is_refused(api: Api, revision: int, reason: str) -> None:
    request = deployment_service_pb2.WatchDeploymentsRequest(resume_revision=revision)
    error = await refused(asyncio.wait_for(anext(aiter(api.WatchDeployments(request))), CALL_TIMEOUT_S))
    assert (error.reason, error.field) == (reason, "resume_revision")


async def test_what_is_refused_comes_with_a_remedy(api: Api, agent: ScriptedAgent) -> None:
    deployment = await created(api)
    calls = (
        api.GetDeployment(deployment_service_pb2.GetDeploymentRequest(name="deployments/nope")),
        api.GetDecision(decision_service_pb2.GetDecisionRequest(name="decisions/nope.0000000000000001")),
        api.ScaleDeployment(deployment_service_pb2.ScaleDeploymentRequest(name=deployment.name, replicas=-1)),
        anext(aiter(api.StreamLogs(replica_service_pb2.StreamLogsRequest(name=deployment.name, tail_lines=-1)))),
        api.GetTelemetry(replica_service_pb2.GetTelemetryRequest(parent="deployments/nope")),
    )
    for each in calls:
        error = await refused(each)
        assert error.remedy, error


async def test_pages_hold_every_deployment_once(api: Api, agent: ScriptedAgent) -> None:
    made = {(await created(api)).name for _ in range(3)}
    seen: list[str] = []
    token = ""
    while True:
        page = await api.ListDeployments(
            deployment_service_pb2.ListDeploymentsRequest(page_size=2, page_token=token)
        )
        assert len(page.deployments) <= 2
        seen += [each.name for each in page.deployments]
        token = page.next_page_token
        if not token:
            break
    assert made <= set(seen)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("token", ["nonsense", "bm9kZXMKeA"])
async def test_a_page_token_of_another_list_is_refused(api: Api, token: str) -> None:
    request = deployment_service_pb2.ListDeploymentsRequest(page_token=token)
    assert await told(api.ListDeployments(request)) == ("INVALID_FIELD", "page_token")


async def test_scaling_a_fixed_deployment_records_who_asked(api: Api, agent: ScriptedAgent) -> None:
    deployment = await created(api)
    request = deployment_service_pb2.ScaleDeploymentRequest(name=deployment.name, replicas=3)
    scaled = await api.ScaleDeployment(request)
    assert scaled.replicas == 3
    await until_async(lambda: len([r for r in agent.running if r.startswith(deployment.name)]) == 3)
    listed = decision_service_pb2.ListDecisionsRequest(deployment=deployment.name)
    decisions = (await api.ListDecisions(listed)).decisions
    assert [(d.actor, d.to_replicas) for d in decisions] == [("user/local", 3)]
    assert decisions[0].term > 0
    one = await api.GetDecision(decision_service_pb2.GetDecisionRequest(name=decisions[0].name))
    assert one == decisions[0]


async def test_scaling_beyond_the_bounds_is_refused(api: Api, agent: ScriptedAgent) -> None:
    deployment = await created(api, replicas=None, min=1, max=2)
    request = deployment_service_pb2.ScaleDeploymentRequest(name=deployment.name, replicas=9)
    assert await told(api.ScaleDeployment(request)) == ("INVALID_FIELD", "replicas")


async def test_one_scaling_request_that_comes_many_times_is_one_decision(api: Api, agent: ScriptedAgent) -> None:
    deployment = await created(api)
    request = deployment_service_pb2.ScaleDeploymentRequest(
        name=deployment.name, replicas=2, request_id=str(uuid.uuid4())
    )
    answers = await asyncio.gather(*(api.ScaleDeployment(request) for _ in range(4)))
    assert [each.replicas for each in answers] == [2] * 4
    listed = decision_service_pb2.ListDecisionsRequest(deployment=deployment.name)
    assert len((await api.ListDecisions(listed)).decisions) == 1


async def test_min_zero_is_accepted_and_one_replica_is_held(api: Api, agent: ScriptedAgent) -> None:
    deployment = await created(api, replicas=None, min=0, max=2)
    await until_async(lambda: len([r for r in agent.running if r.startswith(deployment.name)]) == 1)


async def test_a_deleted_deployment_goes_and_its_replicas_with_it(api: Api, agent: ScriptedAgent) -> None:
    deployment = await created(api)
    await until_async(lambda: any(r.startswith(deployment.name) for r in agent.running))
    await api.DeleteDeployment(deployment_service_pb2.DeleteDeploymentRequest(name=deployment.name))

    async def gone() -> bool:
        error = None
        with contextlib.suppress(grpc.aio.AioRpcError):  # NOT_FOUND is what is waited for
            error = await api.GetDeployment(deployment_service_pb2.GetDeploymentRequest(name=deployment.name))
        return error is None

    await until_async(gone, what="the deployment is gone")
    request = deployment_service_pb2.DeleteDeploymentRequest(name=deployment.name)
    assert (await refused(api.DeleteDeployment(request))).reason == "NOT_FOUND"
    request.allow_missing = True
    await api.DeleteDeployment(request)


async def test_a_watch_tells_everything_and_then_each_change(api: Api, agent: ScriptedAgent) -> None:
    deployment = await created(api)
    call = api.WatchDeployments(deployment_service_pb2.WatchDeploymentsRequest(name=deployment.name))
    first = await asyncio.wait_for(call.read(), CALL_TIMEOUT_S)
    assert [each.name for each in first.changed] == [deployment.name]
    await api.ScaleDeployment(deployment_service_pb2.ScaleDeploymentRequest(name=deployment.name, replicas=2))
    while True:
        batch = await asyncio.wait_for(call.read(), CALL_TIMEOUT_S)
        assert batch.revision > first.revision
        if any(each.replicas == 2 for each in batch.changed):
            break
    call.cancel()
    resumed = api.WatchDeployments(
        deployment_service_pb2.WatchDeploymentsRequest(name=deployment.name, resume_revision=first.revision)
    )
    batch = await asyncio.wait_for(resumed.read(), CALL_TIMEOUT_S)
    assert batch.revision > first.revision
    resumed.cancel()


async def test_a_watch_of_replicas_tells_when_they_are_routed(api: Api, agent: ScriptedAgent) -> None:
    deployment = await created(api)
    call = api.WatchReplicas(replica_service_pb2.WatchReplicasRequest(parent=deployment.name))
    while True:
        batch = await asyncio.wait_for(call.read(), CALL_TIMEOUT_S)
        if any(each.routed and each.state == cluster_pb2.Replica.STATE_READY for each in batch.changed):
            break
    call.cancel()


async def test_drain_moves_replicas_away_and_uncordon_ends_it(
    api: Api, agent: ScriptedAgent, coordinator: CoordinatorProcess
) -> None:
    async with ScriptedAgent(coordinator.address, name="node-1").connected() as other:
        await until_async(lambda: _node_state(api, other), timeout_s=20)
        deployment = await created(api)

        def nodes_running() -> list[str]:
            return [
                each.node for each in (agent, other) if any(r.startswith(deployment.name) for r in each.running)
            ]

        await until_async(lambda: len(nodes_running()) == 1)
        source = nodes_running()[0]
        drained = await api.DrainNode(node_service_pb2.DrainNodeRequest(name=source))
        assert drained.draining
        await until_async(lambda: nodes_running() not in ([source], []) and source not in nodes_running())
        freed = await api.UncordonNode(node_service_pb2.UncordonNodeRequest(name=source))
        assert not freed.draining
        assert freed.schedulable
        await api.DeleteDeployment(deployment_service_pb2.DeleteDeploymentRequest(name=deployment.name))


async def test_a_node_that_is_not_lost_is_not_forgotten(api: Api, agent: ScriptedAgent) -> None:
    error = await refused(api.DeleteNode(node_service_pb2.DeleteNodeRequest(name=agent.node)))
    assert error.reason == "NODE_NOT_LOST"


async def test_a_second_agent_of_the_same_name_is_refused(
    api: Api, agent: ScriptedAgent, coordinator: CoordinatorProcess
) -> None:
    async with ScriptedAgent(coordinator.address, uid="another").connected() as twin:
        assert twin.error is not None
        error = error_from_rpc(twin.error)
    assert (error.reason, error.field) == ("NODE_NAME_TAKEN", "node")
    assert agent.error is None
    acks = agent.acks
    await until_async(lambda: agent.acks > acks, what="the first agent is still served")


async def test_heartbeats_are_acknowledged_and_every_message_bears_the_term(agent: ScriptedAgent) -> None:
    await until_async(lambda: agent.acks >= 3)
    assert len(set(agent.terms)) == 1


async def test_a_stream_without_a_hello_is_refused(coordinator: CoordinatorProcess) -> None:
    async with grpc.aio.insecure_channel(coordinator.address) as channel:
        connect: Any = channel.stream_stream(
            "/enova.v1.AgentService/Connect",
            request_serializer=agent_service_pb2.ConnectRequest.SerializeToString,
            response_deserializer=agent_service_pb2.ConnectResponse.FromString,
        )
        call = connect()
        await call.write(agent_service_pb2.ConnectRequest(heartbeat=agent_service_pb2.Heartbeat(sequence=1)))
        assert await told(call.read()) == ("INVALID_FIELD", "hello")


async def test_logs_come_from_the_node(api: Api, agent: ScriptedAgent) -> None:
    deployment = await created(api)
    await until_async(lambda: any(r.startswith(deployment.name) for r in agent.running))
    name = next(r for r in agent.running if r.startswith(deployment.name))
    request = replica_service_pb2.StreamLogsRequest(name=name, tail_lines=1)
    lines = [line async for part in api.StreamLogs(request) for line in part.lines]
    assert lines == ["second"]


async def test_a_restart_is_written_into_the_desired_state(api: Api, agent: ScriptedAgent) -> None:
    deployment = await created(api)
    await until_async(lambda: any(r.startswith(deployment.name) for r in agent.running))
    name = next(r for r in agent.running if r.startswith(deployment.name))
    request = replica_service_pb2.RestartReplicaRequest(name=name, request_id=str(uuid.uuid4()))
    await api.RestartReplica(request)
    await api.RestartReplica(request)  # the same request again is done once

    def nonce() -> int:
        return next(member.restart_nonce for member in agent.assignment.members if member.replica == name)

    await until_async(lambda: nonce() == 1)


async def test_node_and_replica_calls_are_tried_only_and_are_refused_on_an_old_etag(
    api: Api, agent: ScriptedAgent
) -> None:
    deployment = await created(api)
    await until_async(lambda: any(r.startswith(deployment.name) for r in agent.running))
    name = next(r for r in agent.running if r.startswith(deployment.name))
    replica = await api.GetReplica(replica_service_pb2.GetReplicaRequest(name=name))
    node = await api.GetNode(node_service_pb2.GetNodeRequest(name=agent.node))
    assert not (
        await api.DrainNode(node_service_pb2.DrainNodeRequest(name=node.name, etag=node.etag, validate_only=True))
    ).draining
    await api.RestartReplica(replica_service_pb2.RestartReplicaRequest(name=name, validate_only=True))
    assert (await api.GetNode(node_service_pb2.GetNodeRequest(name=node.name))).etag == node.etag
    assert next(m.restart_nonce for m in agent.assignment.members if m.replica == name) == 0
    for late in (
        api.DrainNode(node_service_pb2.DrainNodeRequest(name=node.name, etag=node.etag + "0")),
        api.UncordonNode(node_service_pb2.UncordonNodeRequest(name=node.name, etag="1")),
        api.RestartReplica(replica_service_pb2.RestartReplicaRequest(name=name, etag=replica.etag + "0")),
    ):
        error = await refused(late)
        assert (error.reason, error.field) == ("ETAG_MISMATCH", "etag")


async def test_events_are_watched_on_from_where_a_list_ended(api: Api, agent: ScriptedAgent) -> None:
    listed = await api.ListEvents(decision_service_pb2.ListEventsRequest(page_size=1))
    deployment = await created(api)
    request = decision_service_pb2.WatchEventsRequest(object=deployment.name, resume_revision=listed.revision)
    call = api.WatchEvents(request)
    first = await call.read()
    assert first.events[0].object.startswith(deployment.name)
    assert first.revision > listed.revision
    call.cancel()
    error = await refused(api.WatchEvents(decision_service_pb2.WatchEventsRequest(resume_revision=1)).read())
    assert (error.reason, error.field) == ("RESUME_REVISION_COMPACTED", "resume_revision")
    for watch in (
        api.WatchEvents(decision_service_pb2.WatchEventsRequest(resume_revision=-1)),
        api.WatchNodes(node_service_pb2.WatchNodesRequest(resume_revision=-1)),
    ):
        assert await told(watch.read()) == ("INVALID_FIELD", "resume_revision")


async def test_explanations_and_events_name_what_happened(api: Api, agent: ScriptedAgent) -> None:
    deployment = await created(api, configuration=cluster_pb2.Configuration(tensor_parallel_size=64))

    async def pending() -> bool:
        answer = await api.Explain(decision_service_pb2.ExplainRequest(name=deployment.name))
        return any("PENDING" in sentence for sentence in answer.sentences)

    await until_async(pending, what="the replica has no place, and Explain says so")
    events = (await api.ListEvents(decision_service_pb2.ListEventsRequest(object=deployment.name))).events
    assert "ReplicaCreated" in {event.reason for event in events}
    node = await api.Explain(decision_service_pb2.ExplainRequest(name=agent.node))
    assert node.state == "READY"
    error = await refused(api.Explain(decision_service_pb2.ExplainRequest(name="deployments/absent")))
    assert error.reason == "NOT_FOUND"
    await api.DeleteDeployment(deployment_service_pb2.DeleteDeploymentRequest(name=deployment.name))


async def test_verdicts_are_listed(api: Api, agent: ScriptedAgent) -> None:
    answer = await api.ListVerdicts(verdict_service_pb2.ListVerdictsRequest(object="deployments/absent"))
    assert not answer.verdicts


@pytest.mark.parametrize("name", ["", "nodes/", "deployments/a/b", "deployments/ä", "..", "deployments/" + "a" * 9999])
async def test_a_name_that_cannot_be_is_refused_with_its_field(api: Api, name: str) -> None:
    request = deployment_service_pb2.GetDeploymentRequest(name=name)
    assert await told(api.GetDeployment(request)) == ("INVALID_FIELD", "name")


async def test_a_message_of_ten_mebibytes_is_refused_and_the_system_still_serves(
    api: Api, agent: ScriptedAgent
) -> None:
    request = creation(fresh(), served_names=["x" * (10 << 20)])
    error = await refused(api.CreateDeployment(request))
    assert error.reason == "MESSAGE_TOO_LARGE"
    await api.ListNodes(node_service_pb2.ListNodesRequest())


def test_a_port_in_use_is_one_clear_line(coordinator: CoordinatorProcess, tmp_path: Path) -> None:
    from enova_testing.coordinator_process import Config

    with (
        pytest.raises(AssertionError, match="is in use by another program"),
        running_coordinator(tmp_path, Config(settings={"listen": coordinator.address})),
    ):
        pass
