"""Calls to one coordinator alone, which follow nobody: how it refuses is what tests want to see."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from enova.v1 import (
    cluster_pb2,
    decision_service_pb2,
    decision_service_pb2_grpc,
    deployment_service_pb2,
    deployment_service_pb2_grpc,
)
from enova_common.errors import EnovaError
from enova_common.rpc import error_from_rpc
from enova_testing.coordinator_pair import MODEL, PairFleet

CALL_TIMEOUT_S = 30.0  # longer than any stop, so that a call to the stopped leader hears the leader's own answer


@contextlib.asynccontextmanager
async def channel(pair: PairFleet, name: str) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(pair.addresses[name]) as opened:
        yield opened


async def apply(pair: PairFleet, name: str, deployment: str, **fields: Any) -> EnovaError | None:
    """Create or change a deployment at one coordinator; its refusal."""
    wanted = cluster_pb2.Deployment(name=f"deployments/{deployment}", model=MODEL, **fields)
    wanted.configuration.max_model_len = 4096
    request = deployment_service_pb2.UpdateDeploymentRequest(deployment=wanted, allow_missing=True)
    async with channel(pair, name) as opened:
        stub: Any = deployment_service_pb2_grpc.DeploymentServiceStub(opened)
        return await refusal_of(stub.UpdateDeployment(request, timeout=CALL_TIMEOUT_S))


async def scale(pair: PairFleet, name: str, deployment: str, replicas: int) -> EnovaError | None:
    """Scale at one coordinator; its refusal."""
    request = deployment_service_pb2.ScaleDeploymentRequest(name=f"deployments/{deployment}", replicas=replicas)
    async with channel(pair, name) as opened:
        stub: Any = deployment_service_pb2_grpc.DeploymentServiceStub(opened)
        return await refusal_of(stub.ScaleDeployment(request, timeout=CALL_TIMEOUT_S))


async def events_refused(pair: PairFleet, name: str) -> EnovaError | None:
    """How one coordinator refuses what only the leader knows; it asks no store. None while it leads."""
    async with channel(pair, name) as opened:
        stub: Any = decision_service_pb2_grpc.DecisionServiceStub(opened)
        return await refusal_of(stub.ListEvents(decision_service_pb2.ListEventsRequest(page_size=1), timeout=5.0))


async def refusal_of(call: Any) -> EnovaError | None:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error)
    return None
