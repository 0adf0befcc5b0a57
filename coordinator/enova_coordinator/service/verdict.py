"""VerdictService: what the detector says of deployments and replicas."""

from __future__ import annotations

from typing import Any

from enova.v1 import verdict_service_pb2, verdict_service_pb2_grpc
from enova_coordinator.core.verdicts import Verdict, of_replica
from enova_coordinator.service import paging
from enova_coordinator.service.leading import Chair, Leading, actor

Context = Any  # grpc.aio.ServicerContext of whatever messages


class VerdictService(verdict_service_pb2_grpc.VerdictServiceServicer):
    """See verdict_service.proto."""

    def __init__(self, chair: Chair) -> None:
        self._chair = chair

    async def ListVerdicts(  # noqa: N802
        self, request: verdict_service_pb2.ListVerdictsRequest, context: Context
    ) -> verdict_service_pb2.ListVerdictsResponse:
        """A page of the verdicts that stand now."""
        actor(context)
        standing = [
            verdict
            for verdict in _standing(self._chair.leading())
            if request.object in {"", verdict.object} or verdict.object.startswith(request.object + "/")
        ]
        taken, token = paging.page(
            sorted(standing, key=lambda verdict: verdict.object),
            collection="verdicts",
            size=request.page_size,
            token=request.page_token,
            key=lambda verdict: verdict.object,
        )
        return verdict_service_pb2.ListVerdictsResponse(
            verdicts=[_message(verdict) for verdict in taken], next_page_token=token
        )


def _standing(leading: Leading) -> list[Verdict]:
    snapshot = leading.control.snapshot
    of_deployments = [verdict for name, verdict in leading.verdicts.items() if name in snapshot.deployments]
    of_replicas = (of_replica(replica) for replica in snapshot.replicas.values())
    return of_deployments + [verdict for verdict in of_replicas if verdict is not None]


def _message(verdict: Verdict) -> verdict_service_pb2.Verdict:
    message = verdict_service_pb2.Verdict(
        object=verdict.object,
        kind=f"KIND_{verdict.kind.value}",  # type: ignore[arg-type]  # protobuf takes the enum's name
        reason=verdict.reason,
        detector=verdict.detector,
        evidence=[
            verdict_service_pb2.Evidence(feature=each.feature, value=each.value, threshold=each.threshold)
            for each in verdict.evidence
        ],
        suggested_action=verdict.suggested_action,
    )
    if verdict.since_s > 0:
        message.since_time.FromMicroseconds(round(verdict.since_s * 1e6))
    return message
