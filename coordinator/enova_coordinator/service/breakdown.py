"""BreakdownService: where the time of requests goes, and what was learnt of step times."""

from __future__ import annotations

import math
from typing import Any

from enova.v1 import breakdown_service_pb2, breakdown_service_pb2_grpc
from enova_common.errors import InvalidField, NotFound, Unavailable
from enova_coordinator.calibration_loop import CalibrationLoop, VariantSteps
from enova_coordinator.core.calibration import StoredCalibration
from enova_coordinator.core.engine_facts import calibration_name, restored
from enova_coordinator.core.model import Variant
from enova_coordinator.core.service_times import Quantile, ServiceSums, TimePart, service_times
from enova_coordinator.service import names, paging
from enova_coordinator.service.frames import HISTOGRAM_BOUNDS
from enova_coordinator.service.leading import Chair, Leading, actor

Context = Any  # grpc.aio.ServicerContext of whatever messages

WINDOW_S_MAX = 900.0


class BreakdownService(breakdown_service_pb2_grpc.BreakdownServiceServicer):
    """See breakdown_service.proto."""

    def __init__(self, chair: Chair) -> None:
        self._chair = chair

    async def GetBreakdown(  # noqa: N802
        self, request: breakdown_service_pb2.GetBreakdownRequest, context: Context
    ) -> breakdown_service_pb2.Breakdown:
        """The parts of the time of a deployment's requests, and of its engines' steps."""
        actor(context)
        leading = self._chair.leading()
        name = names.deployment_name(request.name, "name")
        if name not in leading.control.snapshot.deployments:
            raise NotFound(f"there is no {name}", field="name", remedy="enova get deployments lists them")
        if not 0 <= request.window_s <= WINDOW_S_MAX:
            raise InvalidField(f"must lie between 0 and {WINDOW_S_MAX:g} (model time)", field="window_s")
        learner = _learner(leading)
        now_s = leading.telemetry.now_s
        nothing = now_s, ServiceSums(time_s=now_s)  # before the first look at a new deployment
        start_s, sums = learner.services.since(name, window_s=request.window_s) or nothing
        times = service_times(sums, bounds=HISTOGRAM_BOUNDS)
        answer = breakdown_service_pb2.Breakdown(
            name=name,
            start_s=start_s,
            end_s=sums.time_s,
            requests=times.end_to_end.count,
            end_to_end=_part(times.end_to_end),
            parts=[_part(part) for part in times.parts],
            ttft=_part(times.ttft),
            tpot=_part(times.tpot),
            notes=times.notes,
        )
        for variant in leading.control.snapshot.variants_of(name):
            _add_steps(answer, learner, variant)
        return answer

    async def ListCalibrations(  # noqa: N802
        self, request: breakdown_service_pb2.ListCalibrationsRequest, context: Context
    ) -> breakdown_service_pb2.ListCalibrationsResponse:
        """A page of all calibrations, in the order of their names."""
        actor(context)
        taken, token = paging.page(
            sorted(_learner(self._chair.leading()).calibrations.values(), key=lambda each: each.name),
            collection="calibrations",
            size=request.page_size,
            token=request.page_token,
            key=lambda each: each.name,
        )
        return breakdown_service_pb2.ListCalibrationsResponse(
            calibrations=[_calibration(each) for each in taken], next_page_token=token
        )


def _learner(leading: Leading) -> CalibrationLoop:
    if leading.calibration is None:
        raise Unavailable("this coordinator does not learn from live steps")
    return leading.calibration


def _part(part: TimePart) -> breakdown_service_pb2.TimePart:
    return breakdown_service_pb2.TimePart(
        name=part.name,
        count=part.count,
        sum_s=part.sum_s,
        mean_s=part.mean_s,
        share=part.share,
        p50=_quantile(part.p50),
        p95=_quantile(part.p95),
    )


def _quantile(quantile: Quantile | None) -> breakdown_service_pb2.Quantile | None:
    if quantile is None:
        return None
    return breakdown_service_pb2.Quantile(value_s=quantile.value_s, low_s=quantile.low_s, high_s=quantile.high_s)


def _add_steps(answer: breakdown_service_pb2.Breakdown, learner: CalibrationLoop, variant: Variant) -> None:
    facts = learner.facts(variant)
    if isinstance(facts, str):
        answer.notes.append(f"{variant.id}: {facts}")
        return
    steps = learner.steps.get(variant.name)
    if steps is None:
        answer.notes.append(f"{variant.id}: no steps were measured since this coordinator leads: nothing was decoded")
        message = breakdown_service_pb2.StepBreakdown(variant=variant.name)
    else:
        message = _steps(variant, steps)
    calibration = learner.calibrations.get(calibration_name(facts))
    if calibration is not None:
        message.calibration.CopyFrom(_calibration(calibration))
    if steps is not None or calibration is not None:
        answer.steps.append(message)


def _steps(variant: Variant, steps: VariantSteps) -> breakdown_service_pb2.StepBreakdown:
    parts, predicted_s = steps.step.parts, steps.predicted.step_s
    return breakdown_service_pb2.StepBreakdown(
        variant=variant.name,
        time_s=steps.time_s,
        step_s=steps.step.step_s,
        predicted_s=predicted_s,
        prefill_tokens=math.fsum(share * batch.prefill_tokens for share, batch in parts),
        decode_sequences=math.fsum(share * batch.decode_sequences for share, batch in parts),
        context_tokens=math.fsum(share * batch.context_tokens for share, batch in parts),
        shares=[
            breakdown_service_pb2.KernelShare(kernel=kernel, seconds=seconds, share=seconds / predicted_s)
            for kernel, seconds in sorted(steps.predicted.kernels.items(), key=lambda item: -item[1])
            if seconds > 0
        ],
    )


def _calibration(value: StoredCalibration) -> breakdown_service_pb2.Calibration:
    known = restored(value)
    message = breakdown_service_pb2.Calibration(
        name=value.name,
        gpu_type=value.gpu_type,
        model=value.model,
        configuration=value.configuration,
        updates=value.updates,
        outliers=value.outliers,
    )
    message.update_time.FromMicroseconds(round(value.update_time_s * 1e6))
    if known is not None:
        message.factor, message.spread = known.factor, known.spread
        for kernel, factor, deviation in zip(value.groups, known.factors, known.deviations, strict=True):
            message.factors.add(kernel=kernel, factor=factor, deviation=deviation)
    return message
