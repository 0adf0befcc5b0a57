"""AcceptProposal: a user puts in force what the recommender proposed."""

from __future__ import annotations

from collections.abc import Callable

from enova.v1 import deployment_service_pb2
from enova_common.errors import Conflict, NotFound
from enova_coordinator.core.advice import accepted, proposal_etag, words
from enova_coordinator.core.model import Decision, DecisionAction, Deployment
from enova_coordinator.service import names
from enova_coordinator.service.leading import Leading
from enova_coordinator.service.writes import Writes, call, check_etag


async def accept_proposal(
    leading: Leading,
    writes: Writes,
    request: deployment_service_pb2.AcceptProposalRequest,
    *,
    who: str,
    now_s: Callable[[], float],
    model_time_s: Callable[[], float],
) -> Deployment:
    """The deployment with its proposal in force: a new generation, and a decision that says why."""
    name = names.deployment_name(request.name)
    by = call("AcceptProposal", request)
    if (done := await writes.repeated(by)) is not None:
        return await writes.read(Deployment, done)
    before = await writes.read(Deployment, name)

    def edit(stored: Deployment | None) -> Deployment:
        nonlocal before
        before = _with_proposal(stored, name)
        check_etag(request.etag, proposal_etag(before), f"the proposal of {name}")
        return accepted(before, now_s=now_s())

    after = await writes.change(Deployment, name, edit, by=by, validate_only=request.validate_only)
    assert after is not None, name
    if not request.validate_only:
        await leading.control.record_decision(_decision(before, after, who=who, model_time_s=model_time_s()))
    return after


def _with_proposal(stored: Deployment | None, name: str) -> Deployment:
    if stored is None or stored.deleting:
        raise NotFound(f"there is no {name}", field="name", remedy="enova get deployments lists them")
    if stored.proposal is None:
        raise Conflict(
            f"{name} has no proposal", reason="NO_PROPOSAL", field="name", remedy="enova describe shows what there is"
        )
    return stored


def _decision(before: Deployment, after: Deployment, *, who: str, model_time_s: float) -> Decision:
    target = before.status.target_replicas
    assert after.advice is not None, after.name
    return Decision(
        name="",                   # it and the numbers of replicas are filled in when it is written
        deployment=before.name,
        action=DecisionAction.RECONFIGURE,
        actor=who,
        reason=f"{who.removeprefix('user/')} accepted the proposal of {words(after.configuration)} on "
        f"{after.advice.gpu_type}: {after.advice.reason}",
        from_replicas=target,
        to_replicas=target,
        model_time_s=model_time_s,
        from_configuration=dict(before.configuration),
        to_configuration=dict(after.configuration),
    )
