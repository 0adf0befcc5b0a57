"""What crosses the wire means the same on both sides, and what was not measured stays absent."""

from __future__ import annotations

from dataclasses import fields

from enova.v1 import agent_service_pb2 as wire
from enova.v1 import cluster_pb2, telemetry_pb2
from enova_agent import convert
from enova_agent.core.local import SketchValue, Summary
from enova_agent.core.model import Claim, Desired, MemberSpec, ReplicaState, ReplicaView, Role
from enova_agent.core.telemetry import EngineMetrics, Frame, GpuSample, Histogram, ReplicaSample


def over_the_wire(value: Frame) -> telemetry_pb2.Frame:
    return wire.ConnectRequest.FromString(convert.frame_request(value)).frame


def test_an_assignment_keeps_every_field() -> None:
    member = wire.AssignedMember(
        replica="deployments/d/replicas/r", uid="u", desired=wire.AssignedMember.DESIRED_DRAIN, model="m",
        served_names=["a", "b"], engine="vllm", role=cluster_pb2.ROLE_DECODE, member_count=2, drain_timeout_s=7.5,
        restart_nonce=3, queue_limit=9,
        configuration=cluster_pb2.Configuration(max_num_seqs=16, enforce_eager=False, dtype="float32"),
        member=cluster_pb2.Member(rank=1, claims=[cluster_pb2.Claim(gpu_uuid="g", memory_bytes=5, shared=True)]),
    )
    assignment = convert.assignment(wire.Assignment(revision=4, members=[member]), term=8)
    assert (assignment.revision, assignment.term) == (4, 8)
    assert assignment.members == (
        MemberSpec(
            replica="deployments/d/replicas/r", uid="u", desired=Desired.DRAIN, model="m", served_names=("a", "b"),
            engine="vllm", role=Role.DECODE, rank=1, member_count=2, drain_timeout_s=7.5, restart_nonce=3,
            queue_limit=9, configuration={"max_num_seqs": 16, "enforce_eager": False, "dtype": "float32"},
            claims=(Claim(gpu_uuid="g", memory_bytes=5, shared=True),),
        ),
    )


def test_a_wish_of_a_newer_protocol_drains_and_never_starts() -> None:
    member = wire.AssignedMember.FromString(wire.AssignedMember(replica="r").SerializeToString() + b"\x18\x63")
    assert member.desired == 99
    assert convert.assignment(wire.Assignment(members=[member]), term=1).members[0].desired is Desired.DRAIN


def test_figures_that_were_not_measured_are_absent_not_zero() -> None:
    frame = over_the_wire(
        Frame(
            node="nodes/n", sequence=1, boot="b", start_s=1.0, end_s=2.0,
            gpus=(GpuSample(uuid="g", utilization=0.0),),
            replicas=(
                ReplicaSample(replica="r", state="READY", metrics=EngineMetrics(running=0.0), held=0.0),
                ReplicaSample(replica="s", state="STARTING", scrape_error="no answer in time"),
            ),
        )
    )
    (gpu,) = frame.gpus
    assert gpu.HasField("utilization")
    assert not any(gpu.HasField(name) for name in ("power_w", "memory_used_bytes", "ecc_errors_total"))
    measured, unknown = frame.replicas
    assert measured.HasField("running")
    assert measured.HasField("held")
    assert not measured.HasField("waiting")
    assert not measured.HasField("resident_memory_bytes")
    assert not any(unknown.HasField(name) for name in ("running", "held", "generation_tokens_total"))
    assert unknown.scrape_error == "no answer in time"


def test_every_gpu_figure_arrives() -> None:
    numbers = {field.name: index + 1 for index, field in enumerate(fields(GpuSample)) if field.name != "uuid"}
    sample = GpuSample(uuid="g", **numbers)
    (gpu,) = over_the_wire(Frame(node="n", sequence=1, boot="b", start_s=0.0, end_s=1.0, gpus=(sample,))).gpus
    assert {name: getattr(gpu, name) for name in numbers} == numbers


def test_metrics_histograms_and_sketches_arrive_whole() -> None:
    metrics = EngineMetrics(
        running=1.0, waiting=2.0, kv_cache_usage=0.5, prompt_tokens_total=3.0, generation_tokens_total=4.0,
        preemptions_total=5.0, iterations_total=6.0, prefix_cache_queries_total=7.0, prefix_cache_hits_total=8.0,
        kv_cache_tokens=4096.0, finished_total={"stop": 9.0, "length": 1.0},
        histograms=(Histogram(metric="time_to_first_token_seconds", counts=(1, 2, 3), sum=0.5),),
    )
    sketch = SketchValue(relative_accuracy=0.01, offset=-3, counts=(1, 0, 2), zero_count=4, sum=5.0, min=0.1, max=0.9)
    summary = Summary(
        deployment="deployments/d", replica="r", serving_class="c", arrived=1, finished=2, failed=3, cut=4, refused=5,
        cancelled=6, prompt_tokens=7, output_tokens=8, held=9, ttft_s=sketch, e2e_s=sketch,
        prompt_lengths=(10, 11), output_lengths=(3, 4),
    )
    frame = over_the_wire(
        Frame(
            node="n", sequence=1, boot="b", start_s=0.0, end_s=1.0, requests=(summary,), dropped_samples=2,
            replicas=(ReplicaSample(replica="r", state="READY", metrics=metrics, instance="i", age_s=0.5),),
        )
    )
    (replica,) = frame.replicas
    assert (replica.waiting, replica.preemptions_total, replica.prefix_cache_hits_total) == (2.0, 5.0, 8.0)
    assert replica.kv_cache_tokens == 4096.0
    assert dict(replica.finished_total) == {"stop": 9.0, "length": 1.0}
    assert list(replica.histograms[0].counts) == [1, 2, 3]
    (request,) = frame.requests
    plain = {field.name: getattr(summary, field.name) for field in fields(Summary) if not field.name.endswith("_s")}
    lengths = {name: tuple(getattr(request, name)) for name in ("prompt_lengths", "output_lengths")}
    assert {name: getattr(request, name) for name in plain} | lengths == plain
    assert (request.ttft_s.offset, list(request.ttft_s.counts), request.ttft_s.max) == (-3, [1, 0, 2], 0.9)
    assert list(request.e2e_s.counts) == [1, 0, 2]
    assert not request.HasField("tpot_s")
    assert frame.dropped_samples == 2


def test_every_state_of_a_replica_has_its_name_on_the_wire() -> None:
    for state in ReplicaState:
        view = ReplicaView(replica="r", uid="u", state=state, start_time_s=1.5)
        status = convert.replica_status(view)
        assert cluster_pb2.Replica.State.Name(status.state) == f"STATE_{state.value}"
        assert status.start_time.ToNanoseconds() == 1_500_000_000
        assert not status.HasField("ready_time")
