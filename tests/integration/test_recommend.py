"""Recommendations over the real paths: command line, plan process and API give one answer, and refuse alike."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import yaml
from click.testing import CliRunner

from enova.v1 import (
    cluster_pb2,
    decision_service_pb2,
    decision_service_pb2_grpc,
    deployment_service_pb2_grpc,
    node_service_pb2,
    node_service_pb2_grpc,
    telemetry_pb2,
)
from enova.v1 import deployment_service_pb2 as wire
from enova_cli.__main__ import main
from enova_common.clock import ModelClock
from enova_common.rpc import error_from_rpc
from enova_recommender.recommend.types import LENGTHS_MAX
from enova_testing.coordinator_process import Config, CoordinatorProcess, running_coordinator
from enova_testing.fleet import ENOVA, Result
from enova_testing.scripted_agent import MODEL, ScriptedAgent
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network

SCALE = 120.0
DEADLINE_S = 60.0
WORDS = (
    "recommend", "--model", MODEL, "--gpus", "H100:8,L40S:16", "--workload", "rate=5,prompt=512,output=128",
    "--ttft-p95", "500ms", "--tpot-p95", "50ms",
)  # fmt: skip
SMALL_CONFIG = {
    "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture(scope="module")
def clock() -> ModelClock:
    return ModelClock(SCALE, time.time())


def _config(clock: ModelClock) -> Config:
    return Config(
        environment={"ENOVA_TIME_SCALE": f"{clock.scale}", "ENOVA_CLOCK_EPOCH": f"{clock.epoch_unix_s:.6f}"},
        advice={"interval_s": 60.0, "creation_wait_s": 40.0, "timeout_s": 60.0},
    )


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory, clock: ModelClock) -> Iterator[CoordinatorProcess]:
    with running_coordinator(tmp_path_factory.mktemp("advice"), _config(clock)) as running:
        yield running


@pytest_asyncio.fixture
async def channel(coordinator: CoordinatorProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(coordinator.address) as opened:
        yield opened


@pytest_asyncio.fixture
async def stub(channel: grpc.aio.Channel) -> Any:
    return deployment_service_pb2_grpc.DeploymentServiceStub(channel)


@pytest_asyncio.fixture
async def agent(coordinator: CoordinatorProcess) -> AsyncIterator[ScriptedAgent]:
    async with ScriptedAgent(coordinator.address, gpus=32).connected() as connected:
        yield connected


def run_enova(*words: str) -> Result:
    """The command, in an environment that names no coordinator."""
    environment = {name: value for name, value in os.environ.items() if name != "ENOVA_API"} | {"COLUMNS": "200"}
    done = subprocess.run(
        [str(ENOVA), *words], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


async def create(stub: Any, name: str, **fields: Any) -> cluster_pb2.Deployment:
    request = wire.CreateDeploymentRequest(deployment_id=name, deployment=cluster_pb2.Deployment(**fields))
    made: cluster_pb2.Deployment = await stub.CreateDeployment(request, timeout=DEADLINE_S)
    return made


async def delete(stub: Any, name: str) -> None:
    """Ask for its end and wait for it: its GPUs are free again."""
    await stub.DeleteDeployment(wire.DeleteDeploymentRequest(name=f"deployments/{name}"))

    async def gone() -> bool:
        try:
            await stub.GetDeployment(wire.GetDeploymentRequest(name=f"deployments/{name}"))
        except grpc.aio.AioRpcError as error:
            return error.code() is grpc.StatusCode.NOT_FOUND
        return False

    await until_async(gone, timeout_s=20, what=f"{name} is gone")


async def variants(stub: Any, name: str) -> list[cluster_pb2.Variant]:
    answer = await stub.ListVariants(wire.ListVariantsRequest(parent=f"deployments/{name}"))
    return list(answer.variants)


async def test_the_command_and_the_api_give_the_same_answer(coordinator: CoordinatorProcess) -> None:
    def ask(*group: str) -> dict[str, Any]:
        done = run_enova(*group, *WORDS, "-o", "json")
        assert done.code == 0, done.err
        plain: dict[str, Any] = done.value
        return plain

    alone = await asyncio.to_thread(ask)
    by_api = await asyncio.to_thread(ask, "--api", coordinator.address)
    assert alone == by_api
    assert alone["chosen"]["replicas"] >= 1
    assert alone["chosen"]["prediction"]["ttft_s"]["value"] <= 0.5
    assert alone["capacity_rps"] >= alone["requests_per_s"] == 5
    assert alone["command"].startswith(f"vllm serve {MODEL} --gpu-memory-utilization ")


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"gpus": [{"type": "H100", "count": 0}]}, "gpus[0].count"),
        ({"gpus": [{"type": "B9000", "count": 1}]}, "gpus[0].type"),
        ({"gpus": [{"type": "Own", "count": 1, "memory_bytes": 80 << 30}]}, "gpus[0].price_per_hour"),
        ({"workload": {"requests_per_s": -1.0}}, "workload.requests_per_s"),
        ({"objectives": {"tpot_s": 1e-5}}, "objectives.tpot_s"),
        ({"model": "nobody/knows-it"}, "model"),
        ({"config_json": json.dumps({**SMALL_CONFIG, "hidden_size": "wide"})}, "config_json.hidden_size"),
    ],
)
async def test_the_api_refuses_with_the_field(stub: Any, changed: dict[str, Any], field: str) -> None:
    lengths = {"prompt_tokens": {"p50": 512}, "output_tokens": {"p50": 128}}
    plain: dict[str, Any] = {
        "model": MODEL, "gpus": [{"type": "H100", "count": 8}], "workload": {"requests_per_s": 1.0},
    }  # fmt: skip
    plain |= changed
    plain["workload"] = plain["workload"] | lengths
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.RecommendConfiguration(wire.RecommendConfigurationRequest(**plain), timeout=DEADLINE_S)
    error = error_from_rpc(caught.value)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.reason, error.field) == ("INVALID_FIELD", field), error
    if "floor" in field or field == "objectives.tpot_s":
        assert "floor" in error.message


async def test_the_api_refuses_more_lengths_than_it_samples_before_it_reads_them(stub: Any) -> None:
    pair = wire.TokenPair(prompt_tokens=1, output_tokens=1)
    workload = wire.ExpectedWorkload(requests_per_s=1.0, lengths=[pair] * (LENGTHS_MAX + 1))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.RecommendConfiguration(wire.RecommendConfigurationRequest(model=MODEL, workload=workload))
    error = error_from_rpc(caught.value)
    assert (error.reason, error.field) == ("INVALID_FIELD", "workload.lengths")


async def test_a_deployment_that_nothing_can_satisfy_is_advised_without_its_objectives(
    stub: Any, agent: ScriptedAgent
) -> None:
    hopeless = cluster_pb2.ServingClass(name="default", tpot_p95_s=1e-5)
    made = await create(stub, "hopeless", model=MODEL, replicas=1, classes=[hopeless])
    assert made.advice.gpu_type == "H100", made.advice
    assert "meets the objectives, so without them" in made.advice.reason
    await delete(stub, "hopeless")


async def test_the_api_answers_for_the_fleet_and_delays_no_heartbeat(
    coordinator: CoordinatorProcess, stub: Any, agent: ScriptedAgent
) -> None:
    request = wire.RecommendConfigurationRequest(
        model=MODEL,
        workload=wire.ExpectedWorkload(
            requests_per_s=2,
            prompt_tokens=wire.TokenPercentiles(p50=512, p95=2048),
            output_tokens=wire.TokenPercentiles(p50=128),
        ),
    )
    asking = stub.RecommendConfiguration(request, timeout=DEADLINE_S)
    worst_s = 0.0
    while not asking.done():
        figures = await asyncio.to_thread(coordinator.figures)
        worst_s = max(worst_s, figures["enova_coordinator_loop_lag_seconds"])
    answer = await asking
    assert answer.chosen.gpu_type == "H100"
    assert answer.chosen.gpus <= 32
    assert worst_s < 1.0


async def test_a_deployment_without_configuration_gets_one_that_its_engines_run_with(
    channel: grpc.aio.Channel, stub: Any, agent: ScriptedAgent
) -> None:
    objective = cluster_pb2.ServingClass(name="default", tpot_p95_s=0.03)
    made = await create(stub, "advised", model=MODEL, replicas=1, classes=[objective])
    assert made.advice.gpu_type == "H100", made.advice.reason
    assert not made.HasField("configuration") or not made.configuration.ListFields()
    assert made.advice.configuration.max_num_seqs > 0
    await until_async(lambda: agent.running, what="a replica runs")
    member = next(each for each in agent.assignment.members if each.replica.startswith("deployments/advised/"))
    assert member.configuration == made.advice.configuration
    (variant,) = await variants(stub, "advised")
    assert (variant.gpu_type, variant.configuration) == ("H100", made.advice.configuration)
    decisions: Any = decision_service_pb2_grpc.DecisionServiceStub(channel)
    told = await decisions.Explain(decision_service_pb2.ExplainRequest(name="deployments/advised"))
    assert any("Its configuration was advised" in sentence for sentence in told.sentences)
    assert set(made.advice.explanation) <= set(told.sentences)
    await delete(stub, "advised")


async def test_an_explicit_configuration_is_left_as_it_is(stub: Any, agent: ScriptedAgent) -> None:
    wanted = cluster_pb2.Configuration(max_num_seqs=7)
    made = await create(stub, "explicit", model=MODEL, replicas=1, configuration=wanted)
    assert not made.HasField("advice")
    await until_async(lambda: agent.running, what="a replica runs")
    assert agent.assignment.members[0].configuration == wanted
    await delete(stub, "explicit")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model": "own/model"}, "the catalogue does not know it"),
        ({"model": MODEL, "hardware": cluster_pb2.Hardware(allow=["L4"])}, "no GPU of L4 is free"),
    ],
)
async def test_without_the_facts_engines_keep_their_defaults_and_the_reason_is_told(
    stub: Any, agent: ScriptedAgent, fields: dict[str, Any], reason: str
) -> None:
    agent.models["own/model"] = "{}"
    made = await create(stub, "unknown", replicas=1, **fields)
    assert made.advice.gpu_type == ""
    assert reason in made.advice.reason
    assert "their own defaults" in made.advice.reason
    await delete(stub, "unknown")


async def test_advice_can_be_switched_off(stub: Any, agent: ScriptedAgent) -> None:
    made = await create(stub, "off", model=MODEL, replicas=1, reconfiguration="RECONFIGURATION_OFF")
    assert not made.HasField("advice")
    await delete(stub, "off")


async def test_a_change_of_bounds_keeps_the_advice_and_its_engines(stub: Any, agent: ScriptedAgent) -> None:
    made = await create(stub, "bounds", model=MODEL, min=1, max=2)
    changed = cluster_pb2.Deployment(name="deployments/bounds", model=MODEL, min=1, max=3)
    after = await stub.UpdateDeployment(wire.UpdateDeploymentRequest(deployment=changed), timeout=DEADLINE_S)
    assert (after.advice, after.generation) == (made.advice, 2)
    await until_async(lambda: agent.running, what="a replica runs")
    assert [variant.name.rsplit("/")[-1] for variant in await variants(stub, "bounds")] == ["v1"]
    await delete(stub, "bounds")


class Traffic:
    """Frames that count the requests of one deployment."""

    def __init__(self, agent: ScriptedAgent, clock: ModelClock, deployment: str, *, per_frame: int) -> None:
        self._agent, self._clock, self._deployment, self._per_frame = agent, clock, deployment, per_frame

    async def run(self) -> None:
        agent = self._agent
        assert agent.welcome is not None
        length_s = agent.welcome.frame_interval_s * self._clock.scale
        while True:
            now_s = self._clock.now()
            samples = [
                telemetry_pb2.ReplicaSample(replica=replica, state="READY", instance="one", running=8, held=8)
                for replica in agent.running
            ]
            requests = [
                telemetry_pb2.RequestSummary(
                    deployment=self._deployment, replica=replica, arrived=self._per_frame, finished=self._per_frame,
                    prompt_tokens=self._per_frame * 500, output_tokens=self._per_frame * 100,
                )
                for replica in agent.running
            ]  # fmt: skip
            agent.say(frame=agent.frame(now_s, length_s=length_s, replicas=samples, requests=requests))
            await asyncio.sleep(agent.welcome.frame_interval_s)


@contextlib.asynccontextmanager
async def traffic(agent: ScriptedAgent, clock: ModelClock, name: str, per_frame: int = 60) -> AsyncIterator[None]:
    sending = asyncio.create_task(Traffic(agent, clock, f"deployments/{name}", per_frame=per_frame).run())
    try:
        yield
    finally:
        sending.cancel()


async def test_a_better_configuration_is_proposed_with_its_gain_and_changes_nothing(
    channel: grpc.aio.Channel, stub: Any, agent: ScriptedAgent, clock: ModelClock
) -> None:
    poor = cluster_pb2.Configuration(tensor_parallel_size=8, max_num_seqs=1)
    await create(stub, "poor", model=MODEL, replicas=1, configuration=poor)
    await until_async(lambda: agent.running, what="a replica runs")
    async with traffic(agent, clock, "poor"):

        async def proposed() -> Any:
            found = await stub.GetDeployment(wire.GetDeploymentRequest(name="deployments/poor"))
            return found if found.HasField("proposal") else None

        found: Any = await until_async(proposed, timeout_s=60, what="a better configuration is proposed")
    assert found.proposal.gain > 0.5
    assert found.proposal.configuration.max_num_seqs > 1
    assert "were counted" in found.proposal.reason
    assert (found.generation, found.configuration) == (1, poor)
    decisions: Any = decision_service_pb2_grpc.DecisionServiceStub(channel)
    events = await decisions.ListEvents(decision_service_pb2.ListEventsRequest(object="deployments/poor"))
    assert "ConfigurationProposed" in {event.reason for event in events.events}

    async def told() -> bool:
        answer = await decisions.Explain(decision_service_pb2.ExplainRequest(name="deployments/poor"))
        return any("A better configuration is proposed" in sentence for sentence in answer.sentences)

    await until_async(told, what="the proposal is explained")
    await delete(stub, "poor")


async def test_a_better_configuration_rolls_out_where_the_deployment_says_so(
    tmp_path: Path, clock: ModelClock
) -> None:
    with running_coordinator(tmp_path, _config(clock)) as coordinator:
        async with grpc.aio.insecure_channel(coordinator.address) as channel:
            await _moves_to_the_better_gpu(coordinator.address, channel, clock)


async def _moves_to_the_better_gpu(address: str, channel: grpc.aio.Channel, clock: ModelClock) -> None:
    stub: Any = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
    tight = cluster_pb2.ServingClass(name="default", tpot_p95_s=0.03)
    apply = cluster_pb2.Reconfiguration.RECONFIGURATION_APPLY
    async with ScriptedAgent(address, name="node-0", gpu_type="L40S").connected() as slow:
        await until_async(lambda: _is_ready(channel, slow), timeout_s=20, what="the first node is READY")
        made = await create(stub, "auto", model=MODEL, replicas=1, classes=[tight], reconfiguration=apply)
        assert made.advice.gpu_type == "L40S", made.advice
        await until_async(lambda: slow.running, what="a replica runs")
        async with ScriptedAgent(address, name="node-1").connected() as quick, traffic(slow, clock, "auto", 600):
            await until_async(lambda: quick.running, timeout_s=60, what="a replica runs on the better GPUs")
            await until_async(lambda: not slow.running, timeout_s=60, what="the first one has gone")
    found = await stub.GetDeployment(wire.GetDeploymentRequest(name="deployments/auto"))
    assert (found.advice.gpu_type, found.generation) == ("H100", 2)
    decisions: Any = decision_service_pb2_grpc.DecisionServiceStub(channel)
    listed = await decisions.ListDecisions(decision_service_pb2.ListDecisionsRequest(deployment="deployments/auto"))
    (decision,) = listed.decisions
    assert (decision.action, decision.actor) == (decision.ACTION_RECONFIGURE, "policy/recommender")
    assert "of the cost" in decision.reason or "meets the objectives" in decision.reason


async def _is_ready(channel: grpc.aio.Channel, agent: ScriptedAgent) -> bool:
    nodes: Any = node_service_pb2_grpc.NodeServiceStub(channel)
    listed = await nodes.ListNodes(node_service_pb2.ListNodesRequest())
    return any(node.name == agent.node and node.state == node.STATE_READY for node in listed.nodes)


# The command line.


def test_the_table_is_for_people_and_ends_in_the_command(tmp_path: Path) -> None:
    done = run_enova(*WORDS, "--plot", str(tmp_path / "front.svg"))
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].split()[:2] == ["GPU", "REPLICAS"]
    assert lines[1].startswith("*")
    assert lines[-1].startswith(f"vllm serve {MODEL} ")
    assert (tmp_path / "front.svg").read_text().startswith("<?xml")


def test_yaml_and_a_config_file_and_a_described_gpu(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL_CONFIG))
    own = {
        "type": "Own", "count": 4, "gpus_per_node": 4, "price_per_hour": 0.5, "memory_bytes": 48 << 30,
        "bandwidth_bytes_per_s": 1e12, "bf16_flops": 2e14, "link_bytes_per_s": 3e10, "compute_capability": 8.9,
    }  # fmt: skip
    (tmp_path / "gpus.json").write_text(json.dumps([own]))
    done = run_enova(
        "recommend", "--model", str(tmp_path / "config.json"), "--gpu-file", str(tmp_path / "gpus.json"),
        "--workload", "rate=2,prompt=300,output=50", "-o", "yaml",
    )  # fmt: skip
    assert done.code == 0, done.err
    answer = yaml.safe_load(done.out)
    assert answer["chosen"]["gpu_type"] == "Own"
    assert answer["command"].startswith(f"vllm serve {tmp_path} ")


def test_a_trace_is_read_gzipped(tmp_path: Path) -> None:
    rows = "".join(f"{index * 0.5},{200 + index},{20 + index % 7}\n" for index in range(400))
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(f"arrival_s,prompt_tokens,output_tokens\n{rows}".encode()))
    done = run_enova("recommend", "--model", MODEL, "--gpus", "H100:1", "--workload", str(path), "-o", "json")
    assert done.code == 0, done.err
    assert done.value["requests_per_s"] == pytest.approx(2.0, rel=0.05)


TRACE = "arrival_s,prompt_tokens,output_tokens\n"
GAP = TRACE + "".join(f"{second},10,10\n" for second in (*range(9), 9000))


@pytest.mark.parametrize(
    ("words", "files", "error"),
    [
        (["--gpus", "H100:0"], {}, (1, "gpus[0].count", "at least 1")),
        (["--gpus", "H100"], {}, (1, "--gpus", "TYPE:COUNT")),
        (["--gpus", ""], {}, (1, "gpus", "no GPU")),
        (["--gpus", "H9000:8"], {}, (1, "gpus[0].type", "not in the catalogue")),
        (["--gpus", "H100:8@0"], {}, (1, "gpus[0].price_per_hour", "no price")),
        (["--workload", "rate=-5,prompt=512,output=128"], {}, (1, "--workload", "more than 0")),
        (["--workload", "rate=5,prompt=512"], {}, (1, "--workload", "output is missing")),
        (["--workload", "rate=5,prompts=512,output=1"], {}, (1, "--workload", "prompts=512")),
        (["--workload", "nothing.csv"], {}, (4, "", "no trace")),
        (["--tpot-p95", "10us"], {}, (2, "--tpot-p95", "duration")),
        (["--tpot-p95", "0.01ms"], {}, (1, "objectives.tpot_s", "floor")),
        (["--max-gpus", "0"], {}, (1, "max_gpus", "at least 1")),
        (["--model", "meta-llama/Llama-9"], {}, (1, "model", "not in the catalogue")),
        (["--model", "absent/config.json"], {}, (4, "--model", "no file")),
        (["--model", "config.json"], {"config.json": "{"}, (1, "config_json", "not JSON")),
        (["--model", "config.json"], {"config.json": '{"model_type": "llama"}'}, (1, "config_json.", "missing")),
        (["--plot", "front.gif"], {}, (1, "--plot", "neither")),
        (["--gpu-file", "gpus.json"], {"gpus.json": "{}"}, (1, "--gpu-file", "list")),
        (["--workload", "t.csv"], {"t.csv": TRACE + "5,10,10\n4,10,10\n"}, (1, "--workload", "sort the trace")),
        (["--workload", "t.csv"], {"t.csv": GAP}, (1, "--workload", "gap")),
        (["--workload", "t.csv"], {"t.csv": TRACE + "1,10,10\n2,x,10\n"}, (1, "--workload", "not a number")),
        (["--workload", "t.csv"], {"t.csv": TRACE + "1,10,10\n"}, (1, "--workload", "a rate needs two")),
        (["--workload", "t.csv"], {"t.csv": TRACE + "1,900000,10\n2,10,10\n"}, (1, "workload.lengths[0]", "context")),
        (["--workload", "t.csv"], {"t.csv": "a,b\n1,2\n"}, (1, "--workload", "unknown header")),
        (["--workload", "t.csv"], {"t.csv": "t_s,n_requests\n0,5\n60,5\n"}, (1, "--workload", "lengths")),
    ],
)
def test_bad_input_is_one_clear_error_with_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], files: dict[str, str],
    error: tuple[int, str, str],
) -> None:  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ENOVA_API", raising=False)
    done = CliRunner().invoke(main, [*WORDS, *words, "-o", "json"])
    told = json.loads(done.stderr.strip().splitlines()[-1])
    code, field, says = error
    assert (done.exit_code, told["field"][: len(field)]) == (code, field), told
    assert says in told["message"]
    assert told["reason"]
