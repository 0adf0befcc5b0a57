"""Protobuf <-> the agent's values. Nothing else of the agent's decisions knows the wire."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable, Mapping

from enova.v1 import agent_service_pb2, cluster_pb2, telemetry_pb2
from enova_agent.core.local import LengthSample, SketchValue, Summary
from enova_agent.core.model import (
    Assignment,
    Claim,
    Desired,
    FlagValue,
    LengthRule,
    LengthRules,
    MemberSpec,
    ReplicaView,
    Role,
    Route,
    RouteTarget,
    ServingClass,
)
from enova_agent.core.node import ModelFacts, NodeFacts, NodeStatus
from enova_agent.core.telemetry import EngineMetrics, Frame, GpuFacts, GpuSample, ReplicaSample
from enova_common.errors import EnovaError

_DESIRED: Mapping[int, Desired] = {
    agent_service_pb2.AssignedMember.DESIRED_UNSPECIFIED: Desired.RUN,
    agent_service_pb2.AssignedMember.DESIRED_RUN: Desired.RUN,
    agent_service_pb2.AssignedMember.DESIRED_DRAIN: Desired.DRAIN,
}
_ROLES: Mapping[int, Role] = {
    cluster_pb2.ROLE_UNSPECIFIED: Role.AGGREGATED,
    cluster_pb2.ROLE_AGGREGATED: Role.AGGREGATED,
    cluster_pb2.ROLE_PREFILL: Role.PREFILL,
    cluster_pb2.ROLE_DECODE: Role.DECODE,
}
_GPU_FIGURES = tuple(
    field.name for field in telemetry_pb2.GpuSample.DESCRIPTOR.fields if field.name not in {"uuid", "age_s"}
)
_ENGINE_FIGURES = (
    "running",
    "waiting",
    "kv_cache_usage",
    "prompt_tokens_total",
    "generation_tokens_total",
    "preemptions_total",
    "iterations_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "kv_cache_tokens",
)


def assignment(message: agent_service_pb2.Assignment, *, term: int) -> Assignment:
    """The assignment that a leader of `term` sent."""
    return Assignment(
        revision=message.revision, term=term, members=tuple(_member_spec(member) for member in message.members)
    )


def _member_spec(message: agent_service_pb2.AssignedMember) -> MemberSpec:
    return MemberSpec(
        replica=message.replica,
        uid=message.uid,
        model=message.model,
        # A value of a newer protocol: draining is the careful reading of a wish that is not understood.
        desired=_DESIRED.get(message.desired, Desired.DRAIN),
        served_names=tuple(message.served_names),
        configuration=_configuration(message.configuration),
        engine=message.engine,
        role=_ROLES.get(message.role, Role.AGGREGATED),
        rank=message.member.rank,
        member_count=max(1, message.member_count),
        claims=tuple(
            Claim(gpu_uuid=claim.gpu_uuid, memory_bytes=claim.memory_bytes, shared=claim.shared)
            for claim in message.member.claims
        ),
        drain_timeout_s=message.drain_timeout_s,
        restart_nonce=message.restart_nonce,
        queue_limit=message.queue_limit,
    )


def _configuration(message: cluster_pb2.Configuration) -> dict[str, FlagValue]:
    return {field.name: value for field, value in message.ListFields()}


def routes(message: agent_service_pb2.Routes) -> tuple[Route, ...]:
    """The routes of one delta."""
    return tuple(
        Route(
            served_name=route.served_name,
            deployment=route.deployment,
            targets=tuple(
                RouteTarget(
                    replica=target.replica,
                    node=target.node,
                    hop_address=target.hop_address,
                    weight=target.weight,
                    max_concurrency=target.max_concurrency,
                )
                for target in route.targets
            ),
            classes=tuple(_serving_class(serving_class) for serving_class in route.classes),
            lengths=_length_rules(route.lengths) if route.HasField("lengths") else None,
            wakes=route.wakes,
        )
        for route in message.routes
    )


def _length_rules(message: agent_service_pb2.LengthRules) -> LengthRules:
    return LengthRules(
        method=message.method,
        seed=message.seed,
        dimension=message.dimension,
        apply=message.apply,
        context_tokens=message.context_tokens,
        limit_tokens=message.limit_tokens,
        samples_per_s=message.samples_per_s,
        kinds=tuple(
            LengthRule(
                centroid=base64.b64encode(kind.centroid).decode("ascii"),
                reach=kind.reach,
                limit_tokens=kind.limit_tokens,
            )
            for kind in message.kinds
        ),
    )


def _serving_class(message: cluster_pb2.ServingClass) -> ServingClass:
    return ServingClass(
        name=message.name,
        priority=message.priority,
        ttft_p95_s=message.ttft_p95_s if message.HasField("ttft_p95_s") else None,
        tpot_p95_s=message.tpot_p95_s if message.HasField("tpot_p95_s") else None,
    )


def replica_status(view: ReplicaView) -> agent_service_pb2.ReplicaStatus:
    """What one member is, for the wire."""
    message = agent_service_pb2.ReplicaStatus(
        replica=view.replica,
        uid=view.uid,
        rank=view.rank,
        state=cluster_pb2.Replica.State.Value(f"STATE_{view.state}"),
        reason=view.reason,
        phase=view.phase,
        pid=view.pid,
        endpoint=view.endpoint,
        restarts=view.restarts,
        in_routing=view.in_routing,
        in_flight=view.in_flight,
        gave_up=view.gave_up,
    )
    if view.start_time_s:
        message.start_time.FromNanoseconds(round(view.start_time_s * 1e9))
    if view.ready_time_s:
        message.ready_time.FromNanoseconds(round(view.ready_time_s * 1e9))
    return message


def gpu(facts: GpuFacts) -> cluster_pb2.Gpu:
    """What a GPU is, for the wire."""
    told = facts.driver
    return cluster_pb2.Gpu(
        uuid=facts.uuid,
        index=facts.index,
        type=facts.type,
        memory_bytes=facts.memory_bytes,
        pci_bus_id=facts.pci_bus_id,
        simulated=facts.simulated,
        free_memory_bytes=facts.free_memory_bytes,
        facts=None if told is None else cluster_pb2.GpuFacts(**dataclasses.asdict(told)),
    )


def frame(value: Frame) -> telemetry_pb2.Frame:
    """A frame for the wire; what was not measured stays absent."""
    message = telemetry_pb2.Frame(
        node=value.node,
        sequence=value.sequence,
        boot=value.boot,
        start_s=value.start_s,
        end_s=value.end_s,
        dropped_samples=value.dropped_samples,
    )
    message.gpus.extend(_gpu_sample(sample) for sample in value.gpus)
    for sample in value.replicas:
        _fill_replica_sample(message.replicas.add(), sample)
    message.requests.extend(_summary(summary) for summary in value.requests)
    message.lengths.extend(_length_sample(sample) for sample in value.lengths)
    return message


def _length_sample(sample: LengthSample) -> telemetry_pb2.LengthSample:
    return telemetry_pb2.LengthSample(
        deployment=sample.deployment,
        method=sample.method,
        vector=base64.b64decode(sample.vector),
        tokens=sample.tokens,
        stopped=sample.stopped,
    )


def _gpu_sample(sample: GpuSample) -> telemetry_pb2.GpuSample:
    # None leaves an optional field absent.
    return telemetry_pb2.GpuSample(
        uuid=sample.uuid, age_s=sample.age_s, **{name: getattr(sample, name) for name in _GPU_FIGURES}
    )


def _fill_replica_sample(message: telemetry_pb2.ReplicaSample, sample: ReplicaSample) -> None:
    message.replica = sample.replica
    message.state = sample.state
    message.age_s = sample.age_s
    message.scrape_error = sample.scrape_error
    message.instance = sample.instance
    if sample.resident_memory_bytes is not None:
        message.resident_memory_bytes = sample.resident_memory_bytes
    if sample.held is not None:
        message.held = sample.held
    if sample.metrics is not None:
        _fill_metrics(message, sample.metrics)


def _fill_metrics(message: telemetry_pb2.ReplicaSample, metrics: EngineMetrics) -> None:
    for name in _ENGINE_FIGURES:
        value = getattr(metrics, name)
        if value is not None:
            setattr(message, name, value)
    message.finished_total.update(metrics.finished_total)
    for histogram in metrics.histograms:
        message.histograms.add(metric=histogram.metric, counts=histogram.counts, sum=histogram.sum)


def _summary(summary: Summary) -> telemetry_pb2.RequestSummary:
    return telemetry_pb2.RequestSummary(
        deployment=summary.deployment,
        replica=summary.replica,
        serving_class=summary.serving_class,
        arrived=summary.arrived,
        finished=summary.finished,
        failed=summary.failed,
        cut=summary.cut,
        refused=summary.refused,
        cancelled=summary.cancelled,
        prompt_tokens=summary.prompt_tokens,
        output_tokens=summary.output_tokens,
        held=summary.held,
        ttft_s=_sketch(summary.ttft_s),
        tpot_s=_sketch(summary.tpot_s),
        queue_s=_sketch(summary.queue_s),
        e2e_s=_sketch(summary.e2e_s),
        prompt_lengths=summary.prompt_lengths,
        output_lengths=summary.output_lengths,
    )


def _sketch(value: SketchValue | None) -> telemetry_pb2.Sketch | None:
    if value is None:
        return None
    return telemetry_pb2.Sketch(
        relative_accuracy=value.relative_accuracy,
        offset=value.offset,
        counts=value.counts,
        zero_count=value.zero_count,
        sum=value.sum,
        min=value.min,
        max=value.max,
    )


def hello(
    facts: NodeFacts, *, highest_term: int, instance: str, buffered_frames: int
) -> agent_service_pb2.ConnectRequest:
    """The first message of a stream."""
    node = cluster_pb2.Node(
        name=facts.name,
        uid=facts.uid,
        cluster=facts.cluster,
        labels=dict(facts.labels),
        gpus=[gpu(each) for each in facts.gpus],
        boot_id=facts.boot_id,
        agent_version=facts.agent_version,
        engine=facts.engine,
        engine_version=facts.engine_version,
        openai_address=facts.openai_address,
        hop_address=facts.hop_address,
    )
    return agent_service_pb2.ConnectRequest(
        hello=agent_service_pb2.Hello(
            node=node, highest_term=highest_term, instance=instance, buffered_frames=buffered_frames
        )
    )


def heartbeat(sequence: int, *, loop_lag_s: float) -> agent_service_pb2.ConnectRequest:
    """A sign of life."""
    return agent_service_pb2.ConnectRequest(
        heartbeat=agent_service_pb2.Heartbeat(sequence=sequence, loop_lag_s=loop_lag_s)
    )


def node_status(status: NodeStatus) -> agent_service_pb2.ConnectRequest:
    """What is, on this node."""
    return agent_service_pb2.ConnectRequest(
        status=agent_service_pb2.NodeStatus(
            assignment_revision=status.assignment_revision,
            routes_revision=status.routes_revision,
            ingress_connected=status.ingress_connected,
            replicas=[replica_status(view) for view in status.views],
            gpus=[gpu(facts) for facts in status.gpus],
        )
    )


def frame_request(value: Frame) -> bytes:
    """A frame as the bytes of a whole message of the stream."""
    return agent_service_pb2.ConnectRequest(frame=frame(value)).SerializeToString()


def inspect_result(request: str, facts: ModelFacts) -> agent_service_pb2.ConnectRequest:
    """The answer to an InspectModelRequest."""
    return agent_service_pb2.ConnectRequest(
        inspect_model_result=agent_service_pb2.InspectModelResult(
            request=request,
            config_json=facts.config_json,
            weight_bytes=facts.weight_bytes,
            digest=facts.digest,
            vocabulary_size=facts.vocabulary_size,
        )
    )


def inspect_error(request: str, error: EnovaError) -> agent_service_pb2.ConnectRequest:
    """Why there is no answer to an InspectModelRequest."""
    return agent_service_pb2.ConnectRequest(
        inspect_model_result=agent_service_pb2.InspectModelResult(
            request=request, error_reason=error.reason, error_message=error.message, error_remedy=error.remedy
        )
    )


def log_chunk(
    request: str, lines: Iterable[str], *, end: bool = False, error: EnovaError | None = None
) -> agent_service_pb2.ConnectRequest:
    """Some lines of a log; the last chunk says so, and why if it failed."""
    return agent_service_pb2.ConnectRequest(
        log_chunk=agent_service_pb2.LogChunk(
            request=request,
            lines=list(lines),
            end=end,
            error_reason=error.reason if error else "",
            error_message=error.message if error else "",
            error_remedy=error.remedy if error else "",
        )
    )
