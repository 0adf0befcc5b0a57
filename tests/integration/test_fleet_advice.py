"""Advice for a whole fleet on a running coordinator: allocation, live capacity, accepted proposals, described GPUs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from click.testing import CliRunner, Result

from enova.v1 import (
    cluster_pb2,
    decision_service_pb2,
    decision_service_pb2_grpc,
    deployment_service_pb2_grpc,
    telemetry_pb2,
)
from enova.v1 import deployment_service_pb2 as wire
from enova_cli.__main__ import main
from enova_common.clock import ModelClock
from enova_common.errors import Conflict, InvalidField
from enova_common.rpc import error_from_rpc
from enova_coordinator.gpus_file import read_gpu_types
from enova_testing.coordinator_process import Config, CoordinatorProcess, running_coordinator
from enova_testing.scripted_agent import MODEL, ScriptedAgent
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network

SCALE = 30.0                       # the window of telemetry then holds 40 steps
DEADLINE_S = 60.0
LARGE = "meta-llama/Llama-3.1-70B-Instruct"
LENGTHS = ((1200, 80), (300, 200), (4000, 40))
OWN_GPUS = [{"type": "H20", "price_per_hour": 1.5}]
UNHEARD_OF = cluster_pb2.GpuFacts(
    name="NVIDIA Unheard-Of", sm_clock_mhz=1410, memory_clock_mhz=1593, bus_width_bits=5120, cores=6912,
    compute_capability=8.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def clock() -> ModelClock:
    return ModelClock(SCALE, time.time())


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory, clock: ModelClock) -> Iterator[CoordinatorProcess]:
    folder = tmp_path_factory.mktemp("fleet")
    gpus_file = folder / "gpus.json"
    gpus_file.write_text(json.dumps(OWN_GPUS))
    config = Config(
        environment={"ENOVA_TIME_SCALE": f"{clock.scale}", "ENOVA_CLOCK_EPOCH": f"{clock.epoch_unix_s:.6f}"},
        advice={"interval_s": 60.0, "creation_wait_s": 40.0, "timeout_s": 60.0, "gpus_file": str(gpus_file)},
    )
    with running_coordinator(folder, config) as running:
        yield running


@pytest_asyncio.fixture
async def channel(coordinator: CoordinatorProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(coordinator.address) as opened:
        yield opened


@pytest_asyncio.fixture
async def stub(channel: grpc.aio.Channel) -> Any:
    return deployment_service_pb2_grpc.DeploymentServiceStub(channel)


@pytest_asyncio.fixture
async def agent(coordinator: CoordinatorProcess, stub: Any) -> AsyncIterator[ScriptedAgent]:
    models = {MODEL: "{}", LARGE: "{}"}
    async with ScriptedAgent(coordinator.address, models=models).connected() as connected:
        yield connected
        await clear(stub)


async def clear(stub: Any) -> None:
    """Delete all deployments and wait until they are gone: their GPUs are free again."""
    listed = await stub.ListDeployments(wire.ListDeploymentsRequest())
    for each in listed.deployments:
        await stub.DeleteDeployment(wire.DeleteDeploymentRequest(name=each.name))

    async def gone() -> bool:
        return not (await stub.ListDeployments(wire.ListDeploymentsRequest())).deployments

    await until_async(gone, timeout_s=20, what="all deployments are gone")


def enova(coordinator: CoordinatorProcess, *words: str) -> Result:
    return CliRunner().invoke(main, ["--api", coordinator.address, *words])


async def create(stub: Any, name: str, **fields: Any) -> cluster_pb2.Deployment:
    request = wire.CreateDeploymentRequest(deployment_id=name, deployment=cluster_pb2.Deployment(**fields))
    made: cluster_pb2.Deployment = await stub.CreateDeployment(request, timeout=DEADLINE_S)
    return made


async def tell_frames(agent: ScriptedAgent, clock: ModelClock, requests_a_frame: int, waiting: float) -> None:
    """Frames of requests with the lengths above, on a beat, of every replica that this node runs."""
    assert agent.welcome is not None
    finished = 0
    prompts = [prompt for prompt, _ in LENGTHS]
    outputs = [output for _, output in LENGTHS]
    while True:
        finished += requests_a_frame
        samples = [
            telemetry_pb2.ReplicaSample(
                replica=replica, state="READY", instance="one", running=32, waiting=waiting, held=32 + waiting,
                finished_total={"stop": finished},
            )
            for replica in agent.running
        ]  # fmt: skip
        requests = [
            telemetry_pb2.RequestSummary(
                deployment=replica.split("/replicas/")[0], replica=replica, arrived=requests_a_frame,
                finished=requests_a_frame, prompt_tokens=requests_a_frame * sum(prompts) // len(prompts),
                output_tokens=requests_a_frame * sum(outputs) // len(outputs), prompt_lengths=prompts,
                output_lengths=outputs,
            )
            for replica in agent.running
        ]  # fmt: skip
        length_s = agent.welcome.frame_interval_s * clock.scale
        agent.say(frame=agent.frame(clock.now(), length_s=length_s, replicas=samples, requests=requests))
        await asyncio.sleep(agent.welcome.frame_interval_s)


@contextlib.asynccontextmanager
async def traffic(
    agent: ScriptedAgent, clock: ModelClock, requests_a_frame: int = 60, waiting: float = 0.0
) -> AsyncIterator[None]:
    sending = asyncio.create_task(tell_frames(agent, clock, requests_a_frame, waiting))
    try:
        yield
    finally:
        sending.cancel()


async def allocation(stub: Any, **fields: Any) -> wire.RecommendAllocationResponse:
    request = wire.RecommendAllocationRequest(**fields)
    answer: wire.RecommendAllocationResponse = await stub.RecommendAllocation(request, timeout=DEADLINE_S)
    return answer


async def test_the_fleet_is_advised_together_for_what_was_counted(
    coordinator: CoordinatorProcess, stub: Any, agent: ScriptedAgent, clock: ModelClock
) -> None:
    await create(stub, "small", model=MODEL, min=1, max=8, priority=1, autoscaling_paused=True)
    await create(stub, "large", model=LARGE, min=1, max=4, autoscaling_paused=True)
    await until_async(lambda: len(agent.running) == 2, timeout_s=30, what="both run")
    async with traffic(agent, clock):

        async def counted() -> bool:
            found = await allocation(stub, headroom=0.1, time_limit_s=5)
            return all("lengths of" in each.grounds and each.demand_rps > 0 for each in found.deployments)

        await until_async(counted, timeout_s=60, what="requests of both are counted")
        answer = await allocation(stub, headroom=0.1, time_limit_s=5)
        done = await asyncio.to_thread(enova, coordinator, "recommend", "--fleet", "-o", "json")
        table = await asyncio.to_thread(enova, coordinator, "recommend", "--fleet")
    by_name = {each.name: each for each in answer.deployments}
    assert sorted(by_name) == ["deployments/large", "deployments/small"]
    for each in answer.deployments:
        carried = sum(v.replicas * v.capacity_rps.low for v in each.variants)
        assert carried == pytest.approx(each.carried_rps) or carried >= each.carried_rps
        assert sum(v.weight for v in each.variants) == pytest.approx(1.0)
        assert {node.node for v in each.variants for node in v.nodes} == {"nodes/node-0"}
        assert each.running_replicas == 1
    assert answer.cost_per_hour == pytest.approx(sum(each.cost_per_hour for each in answer.deployments))
    assert 0 < answer.bound_per_hour <= answer.objective_per_hour
    assert (answer.headroom, answer.time_limit_s) == (0.1, 5)
    assert answer.solve_s > 0
    (gpus,) = answer.gpus
    assert (gpus.gpu_type, gpus.total) == ("H100", 8)
    assert gpus.held == sum(
        node.replicas * (v.configuration.tensor_parallel_size or 1) * (v.configuration.pipeline_parallel_size or 1)
        for each in answer.deployments for v in each.variants for node in v.nodes
    )
    plain = json.loads(done.output)
    assert sorted(each["name"] for each in plain["deployments"]) == sorted(by_name)
    assert plain["capacity_basis"].startswith("the lower bound")
    assert "requests/s are carried for" in table.output
    assert table.output.splitlines()[0].split()[:2] == ["DEPLOYMENT", "GPU"]


async def test_what_the_fleet_cannot_carry_is_told_with_what_is_missing(
    stub: Any, agent: ScriptedAgent, clock: ModelClock
) -> None:
    await create(stub, "large", model=LARGE, min=1, max=50, autoscaling_paused=True)
    await until_async(lambda: agent.running, timeout_s=30, what="it runs")
    async with traffic(agent, clock, requests_a_frame=600):

        async def short() -> Any:
            found = await allocation(stub)
            return found if found.deployments and found.deployments[0].HasField("unmet") else None

        answer: Any = await until_async(short, timeout_s=60, what="the fleet is too small")
    (found,) = answer.deployments
    assert found.unmet.obstacle == wire.OBSTACLE_GPUS
    assert found.unmet.requests_per_s == pytest.approx(found.demand_rps - found.carried_rps)
    assert answer.missing[0].gpu_type == "H100"
    assert not answer.complete


@pytest.mark.parametrize(
    ("fields", "field"), [({"headroom": -1.0}, "headroom"), ({"time_limit_s": 1e6}, "time_limit_s")]
)
async def test_a_question_that_cannot_be_meant_names_its_field(
    stub: Any, agent: ScriptedAgent, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await allocation(stub, **fields)
    error = error_from_rpc(caught.value)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.reason, error.field) == ("INVALID_FIELD", field)


async def test_a_proposal_is_accepted_once_under_its_etag(
    coordinator: CoordinatorProcess, channel: grpc.aio.Channel, stub: Any, agent: ScriptedAgent, clock: ModelClock
) -> None:
    poor = cluster_pb2.Configuration(tensor_parallel_size=8, max_num_seqs=1, seed=7)
    await create(stub, "poor", model=MODEL, replicas=1, configuration=poor)
    name = "deployments/poor"
    await until_async(lambda: agent.running, timeout_s=30, what="a replica runs")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.AcceptProposal(wire.AcceptProposalRequest(name=name))
    nothing = error_from_rpc(caught.value)
    assert isinstance(nothing, Conflict)
    assert nothing.reason == "NO_PROPOSAL"
    async with traffic(agent, clock):

        async def proposed() -> Any:
            found = await stub.GetDeployment(wire.GetDeploymentRequest(name=name))
            return found if found.HasField("proposal") else None

        found: Any = await until_async(proposed, timeout_s=60, what="a better configuration is proposed")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.AcceptProposal(wire.AcceptProposalRequest(name=name, etag="another"))
    other = error_from_rpc(caught.value)
    assert isinstance(other, Conflict)
    assert other.reason == "ETAG_MISMATCH"
    checked = await stub.AcceptProposal(wire.AcceptProposalRequest(name=name, validate_only=True))
    assert checked.generation == 2
    assert (await stub.GetDeployment(wire.GetDeploymentRequest(name=name))).generation == 1
    request = wire.AcceptProposalRequest(name=name, etag=found.proposal.etag, request_id="once")
    accepted = await stub.AcceptProposal(request)
    assert (accepted.generation, accepted.HasField("proposal")) == (2, False)
    assert accepted.advice.configuration.max_num_seqs == found.proposal.configuration.max_num_seqs > 1
    assert accepted.advice.configuration.seed == 7
    assert not accepted.configuration.ListFields()
    assert (await stub.AcceptProposal(request)).generation == 2
    decisions: Any = decision_service_pb2_grpc.DecisionServiceStub(channel)
    listed = await decisions.ListDecisions(decision_service_pb2.ListDecisionsRequest(deployment=name))
    (decision,) = [each for each in listed.decisions if each.action == each.ACTION_RECONFIGURE]
    assert "accepted the proposal" in decision.reason
    assert decision.from_configuration.max_num_seqs == 1

    async def rolled_out() -> bool:
        listed = await stub.ListVariants(wire.ListVariantsRequest(parent=name))
        current = [each for each in listed.variants if not each.retired]
        return [each.configuration.max_num_seqs for each in current] == [accepted.advice.configuration.max_num_seqs]

    await until_async(rolled_out, timeout_s=20, what="the accepted configuration rolls out")
    again = await asyncio.to_thread(enova, coordinator, "accept", "deployment/poor", "-o", "json")
    assert again.exit_code == 1
    assert "NO_PROPOSAL" in again.output


async def test_live_capacity_is_told_in_figures_with_the_cache_that_they_take(
    coordinator: CoordinatorProcess, stub: Any, agent: ScriptedAgent, clock: ModelClock
) -> None:
    await create(stub, "busy", model=MODEL, replicas=1, configuration=cluster_pb2.Configuration(max_num_seqs=32))
    name = "deployments/busy"
    await until_async(lambda: agent.running, timeout_s=30, what="a replica runs")
    before = await stub.GetLiveCapacity(wire.GetLiveCapacityRequest(name=name))
    assert before.doubt == wire.CAPACITY_DOUBT_TOO_FEW_FRAMES
    assert not before.HasField("n_limit_rps")
    async with traffic(agent, clock, waiting=50.0):

        async def saturated() -> Any:
            found = await stub.GetLiveCapacity(wire.GetLiveCapacityRequest(name=name))
            return found if found.HasField("n_limit_rps") and found.HasField("memory") else None

        found: Any = await until_async(saturated, timeout_s=60, what="it is seen to be saturated")
        told = await asyncio.to_thread(enova, coordinator, "describe", "deployment/busy")
        plain = await asyncio.to_thread(enova, coordinator, "explain", "deployment/busy", "-o", "json")
    assert found.n_limit_rps.low <= found.n_limit_rps.value <= found.n_limit_rps.high
    assert (found.evidence, found.variant) == (wire.SATURATION_EVIDENCE_QUEUE, f"{name}/variants/v1")
    assert (found.saturation_load.value, found.configured_max_num_seqs, found.memory.sequences) == (32, 32, 32)
    assert 0 < found.memory.cache_bytes < found.memory.configured_cache_bytes
    assert "live capacity: n_limit" in told.output
    live = json.loads(plain.output)["live_capacity"]
    assert live["n_limit_rps"]["value"] > 0, live


async def test_gpus_that_no_catalogue_knows_are_described_by_their_driver_or_named(
    coordinator: CoordinatorProcess, stub: Any
) -> None:
    async with (
        ScriptedAgent(coordinator.address, name="node-1", gpu_type="H20").connected(),
        ScriptedAgent(
            coordinator.address, name="node-2", gpu_type=UNHEARD_OF.name, gpu_facts=UNHEARD_OF
        ).connected() as odd,
    ):
        question = wire.RecommendConfigurationRequest(
            model=MODEL,
            workload=wire.ExpectedWorkload(
                requests_per_s=1,
                prompt_tokens=wire.TokenPercentiles(p50=512),
                output_tokens=wire.TokenPercentiles(p50=99),
            ),
        )

        async def known() -> Any:
            answer = await stub.RecommendConfiguration(question, timeout=DEADLINE_S)
            return answer if answer.left_out else None

        answer: Any = await until_async(known, timeout_s=30, what="the nodes are ready")
        assert answer.chosen.gpu_type == "H20"
        assert [(each.object, "has no price" in each.reason) for each in answer.left_out] == [(UNHEARD_OF.name, True)]
        only = cluster_pb2.Hardware(allow=[UNHEARD_OF.name])
        made = await create(stub, "odd", model=MODEL, replicas=1, hardware=only)
        assert made.advice.gpu_type == UNHEARD_OF.name, made.advice.reason
        assert "GPU-hours" in made.advice.reason
        await until_async(lambda: odd.running, timeout_s=30, what="it runs there")
        await clear(stub)


def test_an_operators_file_that_cannot_be_used_ends_the_start_with_its_field(tmp_path: Path) -> None:
    file = tmp_path / "gpus.json"
    wrong = (("{", "not JSON"), ('{"type": "H20"}', "list"), ('[{"type": "Odd"}]', "not in the catalogue"))
    for content, words in wrong:
        file.write_text(content)
        with pytest.raises(InvalidField, match=words) as caught:
            read_gpu_types(file)
        assert (caught.value.reason, caught.value.field) == ("INVALID_FIELD", "advice.gpus_file")
    with pytest.raises(InvalidField, match="cannot read"):
        read_gpu_types(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--fleet", "--model", MODEL], "it takes no --model"),
        (["--fleet", "--gpus-file", "x.json"], "it takes no --gpu"),
        (["--model", MODEL, "--workload", "rate=1", "--headroom", "0.2"], "--headroom belongs to --fleet"),
        (["--model", MODEL, "--workload", "rate=1", "--time-limit", "2s"], "--time-limit belongs to --fleet"),
        (["--workload", "rate=1"], "Missing option '--model'"),
    ],
)
def test_options_of_the_fleet_and_of_one_deployment_do_not_mix(words: list[str], told: str) -> None:
    done = CliRunner().invoke(main, ["recommend", *words])
    assert done.exit_code == 2
    assert told in done.output
