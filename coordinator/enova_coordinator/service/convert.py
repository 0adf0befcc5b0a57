"""Protobuf to the coordinator's values and back; what is checked here is form, meaning is `core.validation`'s."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING

from enova.v1 import agent_service_pb2, cluster_pb2, decision_service_pb2
from enova_coordinator.core.advice import proposal_etag
from enova_coordinator.core.gpu_facts import GpuFacts
from enova_coordinator.core.lengths import LengthState
from enova_coordinator.core.model import (
    AssignedMember,
    Assignment,
    Configuration,
    Decision,
    Deployment,
    DeploymentAdvice,
    DeploymentSpec,
    Event,
    FlagValue,
    Gpu,
    Hardware,
    MaxTokensMode,
    MaxTokensPolicy,
    Member,
    Node,
    NodeReport,
    NodeView,
    Reconfiguration,
    Replica,
    ReplicaReport,
    ReplicaState,
    ServingClass,
    Variant,
)
from enova_coordinator.core.routes import LengthRules, Route, RoutesDelta

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

# The fields of a deployment that users write.
DESIRED_FIELDS = (
    "model",
    "served_names",
    "engine",
    "classes",
    "replicas",
    "min",
    "max",
    "hardware",
    "configuration",
    "policy",
    "priority",
    "autoscaling_paused",
    "reconfiguration",
    "max_tokens_policy",
    "conservatism",
)


def _set_time(timestamp: Timestamp, seconds: float) -> None:
    if seconds > 0:
        timestamp.FromMicroseconds(round(seconds * 1e6))


def _enum(prefix: str, value: StrEnum) -> str:
    return f"{prefix}_{value.value}"


def _present(message: object, names: Iterable[str]) -> dict[str, float]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}  # type: ignore[attr-defined]


def configuration(message: cluster_pb2.Configuration) -> Configuration:
    """The flags that were given, under vLLM's names."""
    return {field.name: value for field, value in message.ListFields()}


def configuration_message(value: Mapping[str, FlagValue]) -> cluster_pb2.Configuration:
    """The flags, for the wire."""
    return cluster_pb2.Configuration(**value)  # type: ignore[arg-type]  # names and types are the message's own


def serving_class(message: cluster_pb2.ServingClass) -> ServingClass:
    """A kind of request."""
    return ServingClass(
        name=message.name,
        priority=message.priority,
        **_present(message, ("ttft_p95_s", "tpot_p95_s", "attainment")),
    )


def serving_class_message(value: ServingClass) -> cluster_pb2.ServingClass:
    """A kind of request, for the wire; None leaves a field absent."""
    return cluster_pb2.ServingClass(
        name=value.name,
        priority=value.priority,
        ttft_p95_s=value.ttft_p95_s,
        tpot_p95_s=value.tpot_p95_s,
        attainment=value.attainment,
    )


def spec(message: cluster_pb2.Deployment) -> DeploymentSpec:
    """What the user wants."""
    hardware = message.hardware
    return DeploymentSpec(
        model=message.model,
        served_names=tuple(message.served_names),
        engine=message.engine,
        classes=tuple(serving_class(each) for each in message.classes),
        replicas=message.replicas if message.HasField("replicas") else None,
        min=message.min if message.HasField("min") else None,
        max=message.max if message.HasField("max") else None,
        hardware=Hardware(
            allow=tuple(hardware.allow),
            max_gpus=hardware.max_gpus if hardware.HasField("max_gpus") else None,
            clusters=tuple(hardware.clusters),
        ),
        configuration=configuration(message.configuration),
        policy=message.policy,
        priority=message.priority,
        autoscaling_paused=message.autoscaling_paused,
        reconfiguration=_reconfiguration(message.reconfiguration),
        max_tokens_policy=_max_tokens_policy(message.max_tokens_policy),
        **_present(message, ("conservatism",)),
    )


def _max_tokens_policy(message: cluster_pb2.MaxTokensPolicy) -> MaxTokensPolicy:
    """The policy; a mode that a newer release knows is off here."""
    words = {cluster_pb2.MaxTokensPolicy.Mode.Value(f"MODE_{each}"): each for each in MaxTokensMode}
    mode = words.get(message.mode, MaxTokensMode.OFF)
    return MaxTokensPolicy(mode=mode, cut_share=message.cut_share) if message.HasField("cut_share") else (
        MaxTokensPolicy(mode=mode)
    )


def _max_tokens_message(value: MaxTokensPolicy) -> cluster_pb2.MaxTokensPolicy | None:
    if value == MaxTokensPolicy():
        return None
    return cluster_pb2.MaxTokensPolicy(mode=_enum("MODE", value.mode), cut_share=value.cut_share)  # type: ignore[arg-type]


def _length_limits(value: LengthState | None) -> cluster_pb2.LengthLimits | None:
    if value is None:
        return None
    limits = value.limits
    return cluster_pb2.LengthLimits(
        answers=limits.answers,
        cut_share=limits.cut_share,
        limit_tokens=limits.overall,
        kinds=[
            cluster_pb2.LengthKind(
                answers=kind.answers,
                stopped=kind.stopped,
                median_tokens=kind.median,
                limit_tokens=kind.limit,
                reason="" if kind.no_limit is None else kind.no_limit.value,
            )
            for kind in limits.kinds
        ],
        drifts=limits.drifts,
        reason=value.reason,
    )


def _reconfiguration(value: cluster_pb2.Reconfiguration.ValueType) -> Reconfiguration:
    """The policy of a number; one that a newer release knows is the default here."""
    words = {cluster_pb2.Reconfiguration.Value(f"RECONFIGURATION_{each}"): each for each in Reconfiguration}
    return words.get(value, Reconfiguration.PROPOSE)


def _advice_message(value: DeploymentAdvice | None, *, etag: str = "") -> cluster_pb2.DeploymentAdvice | None:
    if value is None:
        return None
    message = cluster_pb2.DeploymentAdvice(
        gpu_type=value.gpu_type,
        configuration=configuration_message(value.configuration),
        reason=value.reason,
        explanation=value.explanation,
        cost_per_hour=value.cost_per_hour,
        capacity_rps=value.capacity_rps,
        gain=value.gain,
        etag=etag,
    )
    _set_time(message.create_time, value.create_time_s)
    return message


def deployment_message(
    value: Deployment, variants: Iterable[str] = (), *, lengths: LengthState | None = None
) -> cluster_pb2.Deployment:
    """A deployment, for the wire."""
    wanted, status = value.spec, value.status
    message = cluster_pb2.Deployment(
        name=value.name,
        uid=value.uid,
        etag=value.etag,
        model=wanted.model,
        served_names=value.served_names,
        engine=wanted.engine,
        classes=[serving_class_message(each) for each in wanted.classes],
        replicas=wanted.replicas,
        min=wanted.min,
        max=wanted.max,
        hardware=cluster_pb2.Hardware(
            allow=wanted.hardware.allow, max_gpus=wanted.hardware.max_gpus, clusters=wanted.hardware.clusters
        ),
        configuration=configuration_message(wanted.configuration),
        policy=wanted.policy,
        conservatism=wanted.conservatism,
        priority=wanted.priority,
        autoscaling_paused=wanted.autoscaling_paused,
        generation=value.generation,
        observed_generation=status.observed_generation,
        state="STATE_DELETING" if value.deleting else _enum("STATE", status.state),  # type: ignore[arg-type]
        reason=status.reason,
        target_replicas=status.target_replicas,
        ready_replicas=status.ready_replicas,
        variants=variants,
        reconfiguration=_enum("RECONFIGURATION", wanted.reconfiguration),  # type: ignore[arg-type]
        max_tokens_policy=_max_tokens_message(wanted.max_tokens_policy),
        length_limits=_length_limits(lengths),
        advice=_advice_message(value.advice),
        proposal=_advice_message(value.proposal, etag=proposal_etag(value)),
    )
    _set_time(message.create_time, value.create_time_s)
    _set_time(message.update_time, value.update_time_s)
    _set_time(message.delete_time, value.delete_time_s)
    return message


def variant_message(value: Variant, etag: str) -> cluster_pb2.Variant:
    """A variant, for the wire."""
    return cluster_pb2.Variant(
        name=value.name,
        etag=etag,
        gpu_type=value.gpu_type,
        configuration=configuration_message(value.configuration),
        target_replicas=value.target_replicas,
        weight=value.weight,
        role=_enum("ROLE", value.role),  # type: ignore[arg-type]  # protobuf takes the enum's name
        generation=value.generation,
        retired=value.retired,
    )


def _member_message(value: Member) -> cluster_pb2.Member:
    return cluster_pb2.Member(
        node=value.node,
        rank=value.rank,
        claims=[
            cluster_pb2.Claim(gpu_uuid=claim.gpu_uuid, memory_bytes=claim.memory_bytes, shared=claim.shared)
            for claim in value.claims
        ],
    )


def replica_message(value: Replica, *, routed: bool) -> cluster_pb2.Replica:
    """A replica, for the wire."""
    status = value.status
    message = cluster_pb2.Replica(
        name=value.name,
        uid=value.uid,
        etag=value.etag,
        deployment=value.deployment,
        variant=value.variant,
        role=_enum("ROLE", value.role),  # type: ignore[arg-type]
        members=[_member_message(member) for member in value.members],
        node=value.node,
        state=_enum("STATE", status.state),  # type: ignore[arg-type]
        reason=status.reason,
        pid=status.pid,
        endpoint=status.endpoint,
        gpus=value.gpus,
        generation=value.generation,
        phase=status.phase,
        restarts=status.restarts,
        routed=routed,
    )
    _set_time(message.create_time, value.create_time_s)
    _set_time(message.start_time, status.start_time_s)
    _set_time(message.ready_time, status.ready_time_s)
    return message


def gpu(message: cluster_pb2.Gpu) -> Gpu:
    """One GPU of a node."""
    return Gpu(
        uuid=message.uuid,
        index=message.index,
        type=message.type,
        memory_bytes=message.memory_bytes,
        pci_bus_id=message.pci_bus_id,
        simulated=message.simulated,
        free_memory_bytes=message.free_memory_bytes,
        facts=_gpu_facts(message.facts) if message.HasField("facts") else None,
    )


def _gpu_facts(message: cluster_pb2.GpuFacts) -> GpuFacts:
    """What a driver told; what it did not stays unknown."""
    return GpuFacts(**{"name": message.name, **{field.name: value for field, value in message.ListFields()}})


def gpu_message(value: Gpu) -> cluster_pb2.Gpu:
    """One GPU of a node, for the wire."""
    return cluster_pb2.Gpu(
        uuid=value.uuid,
        index=value.index,
        type=value.type,
        memory_bytes=value.memory_bytes,
        pci_bus_id=value.pci_bus_id,
        simulated=value.simulated,
        free_memory_bytes=value.free_memory_bytes,
        facts=None if value.facts is None else cluster_pb2.GpuFacts(**asdict(value.facts)),
    )


def node(message: cluster_pb2.Node) -> Node:
    """A node as its agent introduces it; what users and leader write of it is theirs."""
    return Node(
        name=message.name,
        uid=message.uid,
        cluster=message.cluster,
        labels=dict(message.labels),
        gpus=tuple(gpu(each) for each in message.gpus),
        boot_id=message.boot_id,
        agent_version=message.agent_version,
        engine=message.engine,
        engine_version=message.engine_version,
        openai_address=message.openai_address,
        hop_address=message.hop_address,
    )


def node_message(view: NodeView, *, etag: str, heartbeat_time_s: float) -> cluster_pb2.Node:
    """A node, for the wire."""
    value = view.node
    message = cluster_pb2.Node(
        name=value.name,
        uid=value.uid,
        etag=etag,
        cluster=value.cluster,
        labels=dict(value.labels),
        schedulable=value.schedulable and not value.draining,
        draining=value.draining,
        state=_enum("STATE", view.state),  # type: ignore[arg-type]
        reason=view.reason,
        gpus=[gpu_message(each) for each in view.gpus],
        boot_id=value.boot_id,
        agent_version=value.agent_version,
        engine=value.engine,
        engine_version=value.engine_version,
        openai_address=value.openai_address,
        hop_address=value.hop_address,
    )
    _set_time(message.create_time, value.create_time_s)
    _set_time(message.last_heartbeat_time, heartbeat_time_s)
    return message


_REPLICA_STATES = {
    cluster_pb2.Replica.State.Value(f"STATE_{state.value}"): state for state in ReplicaState
}


def _replica_report(message: agent_service_pb2.ReplicaStatus) -> ReplicaReport:
    return ReplicaReport(
        replica=message.replica,
        uid=message.uid,
        state=_REPLICA_STATES.get(message.state, ReplicaState.PENDING),
        rank=message.rank,
        reason=message.reason,
        phase=message.phase,
        pid=message.pid,
        endpoint=message.endpoint,
        restarts=message.restarts,
        start_time_s=message.start_time.ToNanoseconds() / 1e9,
        ready_time_s=message.ready_time.ToNanoseconds() / 1e9,
        in_routing=message.in_routing,
        in_flight=message.in_flight,
        gave_up=message.gave_up,
    )


def node_report(message: agent_service_pb2.NodeStatus) -> NodeReport:
    """What is on one node."""
    return NodeReport(
        assignment_revision=message.assignment_revision,
        routes_revision=message.routes_revision,
        ingress_connected=message.ingress_connected,
        replicas=tuple(_replica_report(each) for each in message.replicas),
        gpus=tuple(gpu(each) for each in message.gpus),
    )


def _assigned_message(value: AssignedMember) -> agent_service_pb2.AssignedMember:
    return agent_service_pb2.AssignedMember(
        replica=value.replica,
        uid=value.uid,
        desired=_enum("DESIRED", value.desired),  # type: ignore[arg-type]
        model=value.model,
        served_names=value.served_names,
        configuration=configuration_message(value.configuration),
        engine=value.engine,
        role=_enum("ROLE", value.role),  # type: ignore[arg-type]
        member=_member_message(value.member),
        member_count=value.member_count,
        drain_timeout_s=value.drain_timeout_s,
        restart_nonce=value.restart_nonce,
        queue_limit=value.queue_limit,
    )


def assignment_message(value: Assignment) -> agent_service_pb2.Assignment:
    """A node's assignment, for the wire."""
    return agent_service_pb2.Assignment(
        revision=value.revision, members=[_assigned_message(member) for member in value.members]
    )


def routes_message(value: RoutesDelta) -> agent_service_pb2.Routes:
    """A delta of the routes, for the wire."""
    return agent_service_pb2.Routes(
        revision=value.revision,
        base_revision=value.base_revision,
        routes=[_route_message(route) for route in value.routes],
        removed=value.removed,
    )


def _route_message(value: Route) -> agent_service_pb2.Route:
    return agent_service_pb2.Route(
        served_name=value.served_name,
        deployment=value.deployment,
        targets=[
            agent_service_pb2.RouteTarget(
                replica=target.replica,
                node=target.node,
                hop_address=target.hop_address,
                weight=target.weight,
                max_concurrency=target.max_concurrency,
            )
            for target in value.targets
        ],
        classes=[serving_class_message(each) for each in value.classes],
        lengths=_length_rules_message(value.lengths) if value.lengths is not None else None,
        wakes=value.wakes,
    )


def _length_rules_message(value: LengthRules) -> agent_service_pb2.LengthRules:
    return agent_service_pb2.LengthRules(
        method=value.method,
        seed=value.seed,
        dimension=value.dimension,
        apply=value.apply,
        context_tokens=value.context_tokens,
        limit_tokens=value.limit_tokens,
        samples_per_s=value.samples_per_s,
        kinds=[
            agent_service_pb2.LengthRule(
                centroid=kind.centroid, reach=kind.reach, limit_tokens=kind.limit_tokens
            )
            for kind in value.kinds
        ],
    )


def decision_message(value: Decision) -> decision_service_pb2.Decision:
    """A decision, for the wire."""
    message = decision_service_pb2.Decision(
        name=value.name,
        deployment=value.deployment,
        model_time_s=value.model_time_s,
        actor=value.actor,
        action=_enum("ACTION", value.action),  # type: ignore[arg-type]
        from_replicas=value.from_replicas,
        to_replicas=value.to_replicas,
        reason=value.reason,
        inputs=[
            decision_service_pb2.DecisionInput(
                object=each.object,
                feature=each.feature,
                start_s=each.start_s,
                step_s=each.step_s,
                values=each.values,
            )
            for each in value.inputs
        ],
        frames=value.frames,
        term=value.term,
        from_configuration=configuration_message(value.from_configuration),
        to_configuration=configuration_message(value.to_configuration),
    )
    _set_time(message.create_time, value.create_time_s)
    return message


def event_message(value: Event) -> decision_service_pb2.Event:
    """An event, for the wire."""
    message = decision_service_pb2.Event(
        name=value.name,
        object=value.object,
        reason=value.reason,
        message=value.message,
        severity=_enum("SEVERITY", value.severity),  # type: ignore[arg-type]
    )
    _set_time(message.create_time, value.create_time_s)
    return message


