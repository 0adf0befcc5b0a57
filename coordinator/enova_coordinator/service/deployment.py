"""DeploymentService: what users ask for."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from google.protobuf.empty_pb2 import Empty

from enova.v1 import cluster_pb2, deployment_service_pb2, deployment_service_pb2_grpc
from enova_common.errors import AlreadyExists, Conflict, InvalidField, NotFound, RetryableError
from enova_coordinator.core.advice import is_asked, kept
from enova_coordinator.core.lengths import LengthState
from enova_coordinator.core.model import (
    Decision,
    DecisionAction,
    Deployment,
    DeploymentAdvice,
    DeploymentSpec,
    NodeState,
    Variant,
)
from enova_coordinator.core.validation import (
    FieldProblem,
    conflicts,
    context_problems,
    name_problems,
    scale_problems,
    spec_problems,
)
from enova_coordinator.service import convert, names, paging
from enova_coordinator.service.advice import recommend
from enova_coordinator.service.fleet import recommend_allocation
from enova_coordinator.service.leading import Chair, Leading, actor
from enova_coordinator.service.live import get_live_capacity
from enova_coordinator.service.masks import merged
from enova_coordinator.service.proposal import accept_proposal
from enova_coordinator.service.watching import watch
from enova_coordinator.service.writes import Call, Writes, call, check_etag
from enova_coordinator.store import Store, codec
from enova_recommender.scaling import NAMES

Context = Any  # grpc.aio.ServicerContext of whatever messages
INSPECT_NODES_MAX = 3      # that are asked for a model before it is called missing

log = logging.getLogger(__name__)


class DeploymentService(deployment_service_pb2_grpc.DeploymentServiceServicer):
    """See deployment_service.proto. `now_s` is the wall clock."""

    def __init__(
        self,
        store: Store,
        chair: Chair,
        writes: Writes,
        *,
        now_s: Callable[[], float],
        model_time_s: Callable[[], float],
    ) -> None:
        self._store = store
        self._chair = chair
        self._writes = writes
        self._now_s = now_s
        self._model_time_s = model_time_s
        # The leader alone writes: who holds this sees every served name that is taken until its own is written.
        self._naming = asyncio.Lock()

    async def GetDeployment(  # noqa: N802
        self, request: deployment_service_pb2.GetDeploymentRequest, context: Context
    ) -> cluster_pb2.Deployment:
        """One deployment."""
        actor(context)
        name = names.deployment_name(request.name)
        return await self._message(await self._writes.read(Deployment, name))

    async def ListDeployments(  # noqa: N802
        self, request: deployment_service_pb2.ListDeploymentsRequest, context: Context
    ) -> deployment_service_pb2.ListDeploymentsResponse:
        """A page of all deployments, by name."""
        actor(context)
        size = paging.page_size(request.page_size)
        after = paging.decode_token("deployments", request.page_token)
        prefix = codec.prefix("deployments")
        entries, _ = await self._store.range(prefix, start_after=after, limit=size + 1)
        values = [codec.decode_as(Deployment, entry.value, key=entry.key) for entry in entries[:size]]
        token = paging.encode_token("deployments", entries[size - 1].key) if len(entries) > size else ""
        variants = await self._variant_names()
        return deployment_service_pb2.ListDeploymentsResponse(
            deployments=[
                convert.deployment_message(value, variants.get(value.name, ()), lengths=self._lengths(value.name))
                for value in values
            ],
            next_page_token=token,
        )

    async def CreateDeployment(  # noqa: N802
        self, request: deployment_service_pb2.CreateDeploymentRequest, context: Context
    ) -> cluster_pb2.Deployment:
        """A new deployment; its name must be free."""
        actor(context)
        leading = self._chair.leading()
        _raise_first(name_problems(request.deployment_id, "deployment_id"))
        name = f"deployments/{request.deployment_id}"
        if request.deployment.name not in {"", name}:
            raise InvalidField(
                f"{request.deployment.name[:120]!r} is not {name}, which deployment_id asks for",
                field="deployment.name",
                remedy="leave it out",
            )
        by = call("CreateDeployment", request)
        if (made := await self._writes.repeated(by)) is not None:
            return await self._message(await self._writes.read(Deployment, made))
        wanted = convert.spec(request.deployment)
        await self._check(leading, name, wanted, None)
        advised = await self._advice(leading, name, wanted, None)

        def edit(before: Deployment | None) -> Deployment:
            if before is not None:
                raise AlreadyExists(
                    f"{name} exists", field="deployment_id", remedy="choose another name, or update it (enova apply)"
                )
            return self._new(name, wanted, advised)

        return await self._write(name, wanted, edit, by=by, validate_only=request.validate_only)

    async def UpdateDeployment(  # noqa: N802
        self, request: deployment_service_pb2.UpdateDeploymentRequest, context: Context
    ) -> cluster_pb2.Deployment:
        """Changes the fields of the mask, or all desired fields; with allow_missing creates it."""
        actor(context)
        leading = self._chair.leading()
        name = request.deployment.name
        _raise_first(name_problems(name.removeprefix("deployments/"), "name"))
        names.deployment_name(name)
        by = call("UpdateDeployment", request)
        if (made := await self._writes.repeated(by)) is not None:
            return await self._message(await self._writes.read(Deployment, made))
        stored = await self._find(name)
        if stored is None and not request.allow_missing:
            raise NotFound(f"there is no {name}", field="name", remedy="create it, or set allow_missing")
        wanted = self._wanted(stored, request)
        await self._check(leading, name, wanted, stored)
        advised = await self._advice(leading, name, wanted, stored)

        def edit(before: Deployment | None) -> Deployment:
            if before is not None:
                _check_alive(before)
            check_etag(request.deployment.etag, before.etag if before is not None else "", name)
            if before is None:
                return self._new(name, wanted, advised)
            return self._changed(before, self._wanted(before, request), advised)

        return await self._write(name, wanted, edit, by=by, validate_only=request.validate_only)

    async def DeleteDeployment(  # noqa: N802
        self, request: deployment_service_pb2.DeleteDeploymentRequest, context: Context
    ) -> Empty:
        """Asks for its end: replicas drain and stop, then it is gone."""
        actor(context)
        self._chair.leading()
        name = names.deployment_name(request.name)
        by = call("DeleteDeployment", request)
        if await self._writes.repeated(by) is not None:
            return Empty()
        if await self._find(name) is None:
            if request.allow_missing:
                return Empty()
            raise NotFound(f"there is no {name}", field="name", remedy="enova get deployments lists them")

        def edit(before: Deployment | None) -> Deployment | None:
            if before is None or before.deleting:
                return before
            check_etag(request.etag, before.etag, name)
            return replace(before, delete_time_s=self._now_s(), update_time_s=self._now_s())

        await self._writes.change(Deployment, name, edit, by=by, validate_only=request.validate_only)
        return Empty()

    async def ScaleDeployment(  # noqa: N802
        self, request: deployment_service_pb2.ScaleDeploymentRequest, context: Context
    ) -> cluster_pb2.Deployment:
        """A fixed number becomes the new number; an autoscaled deployment goes on from it."""
        who = actor(context)
        leading = self._chair.leading()
        name = names.deployment_name(request.name)
        by = call("ScaleDeployment", request)
        if (made := await self._writes.repeated(by)) is not None:
            return await self._message(await self._writes.read(Deployment, made))
        stored = await self._writes.read(Deployment, name)
        _check_alive(stored)
        check_etag(request.etag, stored.etag, name)
        _raise_first(scale_problems(stored.spec, request.replicas))
        if not request.validate_only:
            decision = self._scaling(stored, request.replicas, who)
            try:
                record = self._writes.record(by, name)
                await leading.control.set_target(name, request.replicas, decision, request=record)
            except Conflict:
                if await self._writes.repeated(by) is None:  # else the same request came twice; the other one won
                    raise
        return await self._message(await self._writes.read(Deployment, name))

    async def WatchDeployments(  # noqa: N802
        self, request: deployment_service_pb2.WatchDeploymentsRequest, context: Context
    ) -> AsyncIterator[deployment_service_pb2.WatchDeploymentsResponse]:
        """First everything as it is (or what changed after resume_revision), then every change."""
        actor(context)
        wanted = names.deployment_name(request.name) if request.name else ""
        prefix = codec.prefix("deployments")
        async for batch in watch(self._store, Deployment, prefix, resume_revision=request.resume_revision):
            changed = [await self._message(value) for value in batch.changed if wanted in {"", value.name}]
            deleted = [name for name in batch.deleted if wanted in {"", name}]
            yield deployment_service_pb2.WatchDeploymentsResponse(
                revision=batch.revision, changed=changed, deleted=deleted
            )

    async def ListVariants(  # noqa: N802
        self, request: deployment_service_pb2.ListVariantsRequest, context: Context
    ) -> deployment_service_pb2.ListVariantsResponse:
        """A page of the variants of one deployment, or of all."""
        actor(context)
        prefix = codec.prefix("variants", names.parent_deployment(request.parent))
        entries, _ = await self._store.range(prefix)
        taken, token = paging.page(
            entries,
            collection="variants",
            size=request.page_size,
            token=request.page_token,
            key=lambda entry: entry.key,
        )
        return deployment_service_pb2.ListVariantsResponse(
            variants=[
                convert.variant_message(codec.decode_as(Variant, entry.value, key=entry.key), str(entry.mod_revision))
                for entry in taken
            ],
            next_page_token=token,
        )

    async def InspectModel(  # noqa: N802
        self, request: deployment_service_pb2.InspectModelQuery, context: Context
    ) -> deployment_service_pb2.InspectModelResponse:
        """The facts of a model as a host sees them."""
        actor(context)
        leading = self._chair.leading()
        if not request.model.strip():
            raise InvalidField("must not be empty", field="model", remedy="give a path on the hosts, or a model's id")
        nodes = (names.node_name(request.node, "node"),) if request.node else _ready_nodes(leading)
        facts = await leading.agents.inspect(request.model, nodes=nodes)
        leading.models.put(request.model, facts)
        return deployment_service_pb2.InspectModelResponse(
            node=facts.node,
            config_json=facts.config_json,
            weight_bytes=facts.weight_bytes,
            digest=facts.digest,
            vocabulary_size=facts.vocabulary_size,
        )

    async def RecommendConfiguration(  # noqa: N802
        self, request: deployment_service_pb2.RecommendConfigurationRequest, context: Context
    ) -> deployment_service_pb2.RecommendConfigurationResponse:
        """The configuration that carries a workload within its objectives at the least cost, and why."""
        actor(context)
        return await recommend(self._chair.leading(), request)

    async def RecommendAllocation(  # noqa: N802
        self, request: deployment_service_pb2.RecommendAllocationRequest, context: Context
    ) -> deployment_service_pb2.RecommendAllocationResponse:
        """Variants, replicas, nodes and weights of all deployments together at the least cost, and what is missing."""
        actor(context)
        return await recommend_allocation(self._chair.leading(), request)

    async def AcceptProposal(  # noqa: N802
        self, request: deployment_service_pb2.AcceptProposalRequest, context: Context
    ) -> cluster_pb2.Deployment:
        """Puts a deployment's proposal in force."""
        who = actor(context)
        leading = self._chair.leading()
        written = await accept_proposal(
            leading, self._writes, request, who=who, now_s=self._now_s, model_time_s=self._model_time_s
        )
        return await self._message(written)

    async def GetLiveCapacity(  # noqa: N802
        self, request: deployment_service_pb2.GetLiveCapacityRequest, context: Context
    ) -> deployment_service_pb2.LiveCapacity:
        """What one replica of the newest configuration carries at most, by its own telemetry."""
        actor(context)
        return await get_live_capacity(self._chair.leading(), request)

    async def _find(self, name: str) -> Deployment | None:
        try:
            return await self._writes.read(Deployment, name)
        except NotFound:
            return None

    async def _write(
        self,
        name: str,
        wanted: DeploymentSpec,
        edit: Callable[[Deployment | None], Deployment],
        *,
        by: Call,
        validate_only: bool,
    ) -> cluster_pb2.Deployment:
        async with self._naming:
            _raise_first(await self._name_conflicts(name, wanted))
            written = await self._writes.change(Deployment, name, edit, by=by, validate_only=validate_only)
        assert written is not None, name
        return await self._message(written)

    async def _message(self, value: Deployment) -> cluster_pb2.Deployment:
        entries, _ = await self._store.range(codec.prefix("variants", value.name))
        variants = [codec.name(entry.key) for entry in entries]
        return convert.deployment_message(value, variants, lengths=self._lengths(value.name))

    def _lengths(self, name: str) -> LengthState | None:
        """What the leader learned of a deployment's answers; whoever does not lead does not know."""
        leading = self._chair.current
        return leading.lengths.get(name) if leading is not None else None

    async def _variant_names(self) -> dict[str, list[str]]:
        entries, _ = await self._store.range(codec.prefix("variants"))
        found: dict[str, list[str]] = {}
        for entry in entries:
            name = codec.name(entry.key)
            found.setdefault(name.rsplit("/variants/", 1)[0], []).append(name)
        return found

    def _new(self, name: str, spec: DeploymentSpec, advised: DeploymentAdvice | None) -> Deployment:
        now_s = self._now_s()
        return Deployment(
            name=name, uid=str(uuid.uuid4()), spec=spec, create_time_s=now_s, update_time_s=now_s, advice=advised
        )

    def _changed(self, before: Deployment, spec: DeploymentSpec, advised: DeploymentAdvice | None) -> Deployment:
        if spec == before.spec:
            return before
        return replace(
            before,
            spec=spec,
            generation=before.generation + 1,
            update_time_s=self._now_s(),
            advice=advised if is_asked(before, spec) else kept(before, spec),
            proposal=None,
        )

    async def _advice(
        self, leading: Leading, name: str, wanted: DeploymentSpec, before: Deployment | None
    ) -> DeploymentAdvice | None:
        """The configuration for a spec that gives none; None where none is asked for."""
        if not is_asked(before, wanted):
            return None
        facts = leading.models.get(wanted.model)
        config_json = facts.config_json if facts is not None else ""
        return await leading.advisor.on_creation(leading.control.snapshot, name, wanted, config_json=config_json)

    def _wanted(
        self, before: Deployment | None, request: deployment_service_pb2.UpdateDeploymentRequest
    ) -> DeploymentSpec:
        if before is None or list(request.update_mask.paths) in ([], ["*"]):
            return convert.spec(request.deployment)
        return convert.spec(
            merged(
                convert.deployment_message(before, ()),
                request.deployment,
                request.update_mask.paths,
                allowed=convert.DESIRED_FIELDS,
            )
        )

    async def _check(
        self, leading: Leading, name: str, wanted: DeploymentSpec, before: Deployment | None
    ) -> None:
        """Raises InvalidField for the first problem; says how many more there are."""
        if before is not None:
            _check_alive(before)
        problems = spec_problems(wanted, policies=sorted(NAMES))
        _raise_first([*problems, *await self._name_conflicts(name, wanted)])
        if before is None or before.spec.model != wanted.model:
            await self._inspect(leading, wanted.model)
        facts = leading.models.get(wanted.model)
        if facts is not None:
            _raise_first(context_problems(wanted.configuration, facts.config_json))

    async def _name_conflicts(self, name: str, wanted: DeploymentSpec) -> tuple[FieldProblem, ...]:
        entries, _ = await self._store.range(codec.prefix("deployments"))
        others = {
            value.name: value
            for value in (codec.decode_as(Deployment, entry.value, key=entry.key) for entry in entries)
        }
        return conflicts(name, wanted.served_names or (name.removeprefix("deployments/"),), others)

    async def _inspect(self, leading: Leading, model: str) -> None:
        """Raises InvalidField if the hosts that are ready say that they cannot use the model."""
        refusal: InvalidField | None = None
        for node in _ready_nodes(leading)[:INSPECT_NODES_MAX]:
            try:
                leading.models.put(model, await leading.agents.inspect(model, nodes=(node,)))
            except RetryableError as error:
                log.warning("%s could not be asked for %s: %s", node, model, error)
            except InvalidField as error:
                refusal = error
            else:
                return
        if refusal is not None:
            raise refusal

    def _scaling(self, before: Deployment, replicas: int, who: str) -> Decision:
        current = before.status.target_replicas
        if replicas == current:
            action = DecisionAction.HOLD
        else:
            action = DecisionAction.SCALE_UP if replicas > current else DecisionAction.SCALE_DOWN
        return Decision(
            name="",                   # it and the numbers of replicas are filled in when it is written
            deployment=before.name,
            action=action,
            actor=who,
            reason=f"{who.removeprefix('user/')} asked for {replicas} replicas",
            model_time_s=self._model_time_s(),
        )


def _ready_nodes(leading: Leading) -> tuple[str, ...]:
    views = leading.control.snapshot.nodes
    return tuple(name for name, view in sorted(views.items()) if view.state is NodeState.READY)


def _check_alive(deployment: Deployment) -> None:
    if deployment.deleting:
        raise NotFound(
            f"{deployment.name} is being deleted",
            reason="DELETING",
            field="name",
            remedy="wait until it is gone, then create it anew",
        )


def _raise_first(problems: Sequence[FieldProblem]) -> None:
    if not problems:
        return
    first, others = problems[0], problems[1:]
    more = f"; also {', '.join(f'{each.field}: {each.message}' for each in others)}" if others else ""
    raise InvalidField(first.message + more, field=first.field, remedy=first.remedy)


