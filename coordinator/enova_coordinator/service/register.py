"""Puts all services on a server."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from enova.v1 import (
    agent_service_pb2_grpc,
    breakdown_service_pb2_grpc,
    decision_service_pb2_grpc,
    deployment_service_pb2_grpc,
    node_service_pb2_grpc,
    replica_service_pb2_grpc,
    verdict_service_pb2_grpc,
)
from enova_coordinator.service.agent import AgentPace, AgentService
from enova_coordinator.service.breakdown import BreakdownService
from enova_coordinator.service.decision import DecisionService
from enova_coordinator.service.deployment import DeploymentService
from enova_coordinator.service.leading import Chair
from enova_coordinator.service.node import NodeService
from enova_coordinator.service.replica import ReplicaService
from enova_coordinator.service.verdict import VerdictService
from enova_coordinator.service.writes import Writes
from enova_coordinator.store import Store

SERVICES = tuple(
    f"enova.v1.{name}"
    for name in (
        "AgentService",
        "BreakdownService",
        "DecisionService",
        "DeploymentService",
        "NodeService",
        "ReplicaService",
        "VerdictService",
    )
)


def add_services(
    server: grpc.aio.Server,
    store: Store,
    chair: Chair,
    *,
    coordinator: str,
    pace: AgentPace,
    now_s: Callable[[], float],
    model_time_s: Callable[[], float],
) -> None:
    """Adds the services of `SERVICES`. `now_s` is the wall clock."""
    writes = Writes(store, chair, now_s=now_s)
    deployments = DeploymentService(store, chair, writes, now_s=now_s, model_time_s=model_time_s)
    agents = AgentService(chair, writes, coordinator=coordinator, pace=pace, now_s=now_s)
    agent_service_pb2_grpc.add_AgentServiceServicer_to_server(agents, server)
    breakdown_service_pb2_grpc.add_BreakdownServiceServicer_to_server(BreakdownService(chair), server)
    decision_service_pb2_grpc.add_DecisionServiceServicer_to_server(DecisionService(store, chair), server)
    deployment_service_pb2_grpc.add_DeploymentServiceServicer_to_server(deployments, server)
    node_service_pb2_grpc.add_NodeServiceServicer_to_server(NodeService(chair, writes), server)
    replica_service_pb2_grpc.add_ReplicaServiceServicer_to_server(ReplicaService(store, chair, writes), server)
    verdict_service_pb2_grpc.add_VerdictServiceServicer_to_server(
        VerdictService(store, chair, writes, now_s=now_s), server
    )
