"""RecommendAllocation: all deployments together, as the recommender's process finds it."""

from __future__ import annotations

import asyncio
import math
import time

from enova.v1 import deployment_service_pb2
from enova_common.errors import InvalidField, RetryableError, TimedOut
from enova_coordinator import traffic
from enova_coordinator.advisor import AskOptions
from enova_coordinator.core.fleet import Ground, Wanted, allocation_request, ground_of, options_question
from enova_coordinator.core.fleet_answer import Solved, answer_of
from enova_coordinator.core.gpu_types import LeftOut
from enova_coordinator.core.model import Deployment
from enova_coordinator.service.advice import fill, known_model
from enova_coordinator.service.leading import Leading
from enova_recommender.recommend.allocation_types import DEPLOYMENTS_MAX, NODES_MAX, SolveLimits
from enova_recommender.recommend.fleet import AllocationQuestion

TIME_LIMIT_S, TIME_LIMIT_S_MIN, TIME_LIMIT_S_MAX = 10.0, 0.1, 60.0
HEADROOM_MAX = 10.0
OPTIONS_WAIT_S = 100.0             # for all deployments together: half a second each, in as many processes as cores
ASKED_AT_ONCE = 16                 # deployments: their models may have to be read from hosts first


async def recommend_allocation(
    leading: Leading, request: deployment_service_pb2.RecommendAllocationRequest
) -> deployment_service_pb2.RecommendAllocationResponse:
    """What would be best for the whole fleet as it stands. Changes nothing."""
    limit_s = request.time_limit_s if request.HasField("time_limit_s") else TIME_LIMIT_S
    _check("headroom", request.headroom, 0.0, HEADROOM_MAX)
    _check("time_limit_s", limit_s, TIME_LIMIT_S_MIN, TIME_LIMIT_S_MAX)
    snapshot = leading.control.snapshot
    ground = ground_of(snapshot, types=leading.advisor.types)
    if not ground.parts:
        why = "; ".join(f"{each.object} {each.reason}" for each in ground.left_out[:16]) or "no node is registered"
        raise InvalidField(f"the fleet has no GPU to share out: {why}", field="nodes", remedy="enova get nodes")
    for field, count, most in (("nodes", len(ground.parts), NODES_MAX), ("deployments", len(snapshot.deployments),
                                                                        DEPLOYMENTS_MAX)):  # fmt: skip
        if count > most:
            raise InvalidField(f"at most {most} are taken, not {count}", field=field)
    try:
        async with asyncio.timeout(OPTIONS_WAIT_S):
            wanted, left_out = await _wanted(leading, ground)
    except TimeoutError as error:
        raise TimedOut(f"the options of all deployments took more than {OPTIONS_WAIT_S:g} s") from error
    asked = allocation_request(snapshot, ground, wanted, headroom=request.headroom)
    began_s = time.monotonic()
    question = AllocationQuestion(request=asked, limits=SolveLimits(time_limit_s=limit_s))
    found = await leading.advisor.allocation(question)
    solved = Solved(
        allocation=found, headroom=request.headroom, time_limit_s=limit_s, solve_s=time.monotonic() - began_s
    )
    response = deployment_service_pb2.RecommendAllocationResponse()
    fill(response, await asyncio.to_thread(answer_of, snapshot, ground, wanted, solved, left_out))
    return response


def _check(field: str, value: float, least: float, most: float) -> None:
    if not (math.isfinite(value) and least <= value <= most):
        raise InvalidField(f"must lie between {least:g} and {most:g}, is {value:g}", field=field)


async def _wanted(leading: Leading, ground: Ground) -> tuple[list[Wanted], list[LeftOut]]:
    """The deployments with what they may run; those that cannot be asked about, and why."""
    snapshot = leading.control.snapshot
    known = [each for name, each in sorted(snapshot.deployments.items()) if name not in snapshot.frozen]
    turns = asyncio.Semaphore(ASKED_AT_ONCE)
    async with leading.advisor.fleet() as ask:

        async def asked(deployment: Deployment) -> Wanted | str:
            async with turns:
                return await _asked(leading, ground, deployment, ask)

        # All are waited for, whatever one of them raises: none may go on when the processes end.
        answers = await asyncio.gather(*(asked(each) for each in known), return_exceptions=True)
    wanted: list[Wanted] = []
    left_out = [LeftOut(object=name, reason="it cannot be read") for name in sorted(snapshot.frozen)]
    for deployment, found in zip(known, answers, strict=True):
        if isinstance(found, BaseException):
            raise found
        if isinstance(found, str):
            left_out.append(LeftOut(object=deployment.name, reason=found))
        else:
            wanted.append(found)
    return wanted, left_out


async def _asked(leading: Leading, ground: Ground, deployment: Deployment, ask: AskOptions) -> Wanted | str:
    if deployment.deleting:
        return "it is being deleted"
    snapshot, types = leading.control.snapshot, leading.advisor.types
    observed = traffic.observed(leading.telemetry, snapshot, deployment.name)
    try:
        model = await known_model(leading, deployment.spec.model)
        question = options_question(
            snapshot, deployment, ground, config_json=str(model.get("config_json", "")), observed=observed, types=types
        )
        if isinstance(question, str):
            return question
        options = await ask(question)
    except (InvalidField, RetryableError) as error:
        return error.message
    arrived = traffic.arrived_by_class(leading.telemetry, deployment.name)
    return Wanted(deployment=deployment, options=options, observed=observed, arrived=arrived)
