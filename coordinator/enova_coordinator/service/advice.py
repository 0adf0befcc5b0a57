"""RecommendConfiguration: messages to the recommender's plain values and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from enova.v1 import deployment_service_pb2
from enova_common.errors import InvalidField, RetryableError
from enova_coordinator.core.advice import fleet_supply, in_words, model_of
from enova_coordinator.core.gpu_types import LeftOut
from enova_coordinator.core.model import NodeState
from enova_coordinator.service.leading import Leading
from enova_recommender.recommend.types import LENGTHS_MAX

Plain = dict[str, Any]

GPU_TYPES_MAX = 64  # of one request; the catalogue has fewer


async def recommend(
    leading: Leading, request: deployment_service_pb2.RecommendConfigurationRequest
) -> deployment_service_pb2.RecommendConfigurationResponse:
    """The answer to a request; GPUs and config.json that it leaves out are the fleet's."""
    for field, count, most in (
        ("workload.lengths", len(request.workload.lengths), LENGTHS_MAX),
        ("gpus", len(request.gpus), GPU_TYPES_MAX),
    ):
        if count > most:  # before it is converted, on the loop that all share
            raise InvalidField(f"at most {most} are taken, not {count}", field=field, remedy="give a sample")
    plain, left_out = plain_of(request), tuple[LeftOut, ...]()
    if not request.gpus:
        supply = fleet_supply(leading.control.snapshot, types=leading.advisor.types)
        plain["gpus"] = list(supply.rows)
        left_out = supply.left_out
        if not plain["gpus"]:
            why = f": {in_words(left_out)}" if left_out else ""
            remedy = "give types and counts, H100:8"
            raise InvalidField(f"the fleet has no free GPU of a known type{why}", field="gpus", remedy=remedy)
    if request.model and not request.config_json:
        plain |= await known_model(leading, request.model)
    response = deployment_service_pb2.RecommendConfigurationResponse()
    fill(response, await leading.advisor.answer(plain))
    response.left_out.extend(
        deployment_service_pb2.LeftOut(object=each.object, reason=each.reason) for each in left_out
    )
    return response


async def known_model(leading: Leading, model: str) -> Plain:
    """The model as a host said it before, the catalogue or a host has it. Raises InvalidField where nobody knows it."""
    known = leading.models.get(model)
    found = model_of(model, known.config_json if known is not None else "")
    if isinstance(found, str):
        views = leading.control.snapshot.nodes.items()
        ready = tuple(name for name, view in sorted(views) if view.state is NodeState.READY)
        try:
            facts = await leading.agents.inspect(model, nodes=ready)
        except (RetryableError, InvalidField) as error:
            remedy = "give its config.json, or a model of the catalogue"
            raise InvalidField(f"no host knows it: {error.message}", field="model", remedy=remedy) from error
        leading.models.put(model, facts)
        found = model_of(model, facts.config_json)
    if isinstance(found, str):
        raise InvalidField(found, field="model", remedy="give its config.json")
    return found


def plain_of(message: Message) -> Plain:
    """The fields that are set, under their names."""
    return {field.name: _plain_value(value) for field, value in message.ListFields()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, Message):
        return plain_of(value)
    if isinstance(value, str | int | float):
        return value
    return [_plain_value(each) for each in value]


def fill(message: Message, plain: Mapping[str, Any]) -> None:
    """Set the fields of plain values in a message; enums are given by their bare words."""
    fields: Sequence[Any] = message.DESCRIPTOR.fields
    for field in fields:
        value = plain.get(field.name)
        if value is None:
            continue
        target = getattr(message, field.name)
        if field.is_repeated and field.message_type is not None:
            for each in value:
                fill(target.add(), each)
        elif field.is_repeated:
            target.extend(value)
        elif field.message_type is not None:
            target.SetInParent()
            fill(target, value)
        else:
            setattr(message, field.name, _number(field, value) if field.enum_type is not None else value)


def _number(field: FieldDescriptor, word: str) -> int:
    assert field.enum_type is not None
    suffix = f"_{word}"
    return next(value.number for value in field.enum_type.values if value.name.endswith(suffix))
