"""Bad input through the real command and the real port: a clear error, and the system still serves."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from enova.v1 import (
    agent_service_pb2,
    agent_service_pb2_grpc,
    cluster_pb2,
    replica_service_pb2,
    replica_service_pb2_grpc,
    telemetry_pb2,
)
from enova_cli.up.leftovers import remaining
from enova_common import rpc
from enova_testing.fleet import MODEL, Result, UpFleet, run_enova, start_up, up
from enova_testing.hosts import namespaces_work
from enova_testing.waiting import until

pytestmark = [pytest.mark.network, pytest.mark.slow]


@pytest.fixture(scope="module")
def serving(fleet: UpFleet) -> UpFleet:
    """The fleet with a deployment that must go on serving whatever is thrown at it."""
    fleet.deploy("steady")
    return fleet


@pytest.fixture(autouse=True)
def _still_serves(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test that used the fleet, it still answers."""
    yield
    if "serving" in request.fixturenames:
        fleet: UpFleet = request.getfixturevalue("serving")
        body = {"model": "steady", "prompt": [1, 2], "max_tokens": 2}
        assert httpx.post(f"{fleet.openai}/completions", json=body, timeout=30).status_code == 200


BASE = f"name: bad\nmodel: {MODEL}\n"
WRONG_SHARE = BASE + "configuration: {gpu_memory_utilization: 1.5}\n"


@pytest.mark.parametrize(
    ("manifest", "reason", "field"),
    [
        (BASE + "replica: 2\n", "UNKNOWN_FIELD", "replica"),
        (BASE + "configuration: {max_num_sequences: 2}\n", "UNKNOWN_FIELD", "configuration.max_num_sequences"),
        (BASE + "min: 4\nmax: 2\n", "INVALID_FIELD", "min"),
        (BASE + "min: -1\n", "INVALID_FIELD", "min"),
        (BASE + "replicas: 2\nmin: 1\n", "INVALID_FIELD", "replicas"),
        (WRONG_SHARE, "INVALID_FIELD", "configuration.gpu_memory_utilization"),
        (BASE + "configuration: {max_num_seqs: 0}\n", "INVALID_FIELD", "configuration.max_num_seqs"),
        (BASE + "configuration: {dtype: float99}\n", "INVALID_FIELD", "configuration.dtype"),
        (BASE + "policy: nonsense\n", "INVALID_FIELD", "policy"),
        (BASE + "objectives: {ttft_p95_s: -1}\n", "INVALID_FIELD", "classes[0].ttft_p95_s"),
        ("name: BAD NAME\nmodel: m\n", "INVALID_FIELD", "name"),
        ("name: bad\nmodel: --trust-remote-code\n", "INVALID_FIELD", "model"),
        ("name: bad\n", "INVALID_FIELD", "model"),
        ("name: bad\nmodel: no/such-model\n", "MODEL_NOT_FOUND", "model"),
        (BASE + "served_names: [steady]\n", "INVALID_FIELD", "served_names[0]"),
        ("name: [\n", "INVALID_YAML", "-"),
        ("name: bad\nmodel: /nonexistent/model\n", "MODEL_NOT_FOUND", "model"),
        ("name: bad\nmodel: /usr\n", "MODEL_HAS_NO_CONFIG", "model"),
    ],
)
def test_a_bad_manifest_names_its_field_and_the_remedy(
    serving: UpFleet, manifest: str, reason: str, field: str
) -> None:
    result = serving.enova("apply", "-f", "-", "-o", "json", stdin=manifest)
    assert (result.code, result.error["reason"], result.error["field"]) == (1, reason, field), result
    # Where the remedy is empty the message says what would be right.
    assert result.error["remedy"] or re.search("must |not YAML", result.error["message"]), result
    assert serving.enova("get", "deployment/bad").code == 4


def test_the_exit_code_says_who_acts_next(serving: UpFleet) -> None:
    for result, code, reason, field in (
        (serving.enova("get", "deployment/nobody", "-o", "json"), 4, "NOT_FOUND", "name"),
        (serving.enova("get", "nonsense", "-o", "json"), 2, "USAGE", ""),
        (run_enova("get", "nodes", "-o", "json"), 3, "UNREACHABLE", ""),
    ):
        assert (result.code, result.error["reason"], result.error["field"]) == (code, reason, field), result
        assert result.error["remedy"]
    # A GPU type that no node has: it stays PENDING, with a reason for each node.
    serving.ok("deploy", MODEL, "--name", "nowhere", "--replicas", "1", "--gpu", "H200")
    waited = serving.enova("wait", "deployment/nowhere", "--timeout", "1s", "-o", "json")
    assert (waited.code, waited.error["reason"]) == (5, "NOT_READY")
    assert "node-0" in waited.error["message"]
    assert "node-1" in waited.error["message"]
    serving.ok("delete", "deployment/nowhere")


@pytest.mark.parametrize("option", ["--port", "--openai-port"])
def test_a_port_in_use_is_named(serving: UpFleet, tmp_path: Path, option: str) -> None:
    free = {"--port": "0", "--openai-port": "0"}
    port = serving.facts["api"].rpartition(":")[2]
    ports = [word for pair in (free | {option: port}).items() for word in pair]
    result = run_enova("up", "--data-dir", str(tmp_path / "data"), *ports, "-o", "json")
    assert (result.code, result.error["reason"], result.error["field"]) == (1, "ADDRESS_IN_USE", option), result
    assert port in result.error["message"]
    assert result.error["remedy"]
    assert not remaining(tmp_path / "data")


def test_a_data_directory_in_use_names_its_owner(serving: UpFleet) -> None:
    result = run_enova("up", "--data-dir", str(serving.data_dir), "--port", "0", "--openai-port", "0", "-o", "json")
    assert (result.code, result.error["reason"], result.error["field"]) == (1, "IN_USE", "--data-dir")
    assert result.error["remedy"]
    assert str(serving.process.pid) in result.error["message"]


def test_an_unknown_gpu_type_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    result = run_enova("up", "--gpu", "H1000:8", "--data-dir", str(tmp_path / "data"), "--port", "0", "-o", "json")
    assert (result.code, result.error["reason"], result.error["field"]) == (1, "INVALID_FIELD", "--gpu")
    assert "H100" in result.error["remedy"]


def test_a_trace_in_the_wrong_form_is_refused_with_its_line(serving: UpFleet, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n1,2,3\n0.5,2,3\n")
    result = serving.enova("load", "steady", "--trace", str(trace), "-o", "json")
    assert (result.code, result.error["reason"], result.error["field"]) == (1, "INVALID_TRACE", "--trace")
    assert "line 3" in result.error["message"]
    assert result.error["remedy"]


def test_a_load_of_which_nothing_is_served_fails(serving: UpFleet) -> None:
    # More than the model takes: the engine refuses each.
    arguments = ("--rate", "10", "--duration", "1s", "--prompt-tokens", "5000", "--seed", "1")
    result = serving.enova("load", "steady", *arguments, "-o", "json")
    assert (result.code, result.error["reason"]) == (1, "UNSERVED"), result
    assert result.value["failed"] == result.value["sent"] > 0
    assert result.error["remedy"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("load", "steady", "--rate", "1", "--output-tokens", "-5"),
        ("load", "steady", "--rate", "1", "--max-requests", "0"),
        ("scale", "deployment/steady", "--replicas", "-1"),
        ("logs", "replica/steady", "--tail", "-1"),
    ],
)
def test_a_number_out_of_range_is_a_wrong_use_that_names_its_option(
    serving: UpFleet, arguments: tuple[str, ...]
) -> None:
    result = serving.enova(*arguments, "-o", "json")
    assert (result.code, result.error["reason"], result.error["field"]) == (2, "USAGE", arguments[-2])
    assert result.error["remedy"]


@pytest.mark.parametrize("what", ["deployment/nope", "replica/nope", "node/nope", "decision/nope"])
def test_what_is_not_there_says_where_to_look(serving: UpFleet, what: str) -> None:
    result = serving.enova("get", what, "-o", "json")
    assert (result.code, result.error["reason"]) == (4, "NOT_FOUND")
    assert result.error["remedy"].startswith("enova get ")


async def test_an_agent_with_a_taken_name_is_refused(serving: UpFleet) -> None:
    hello = agent_service_pb2.Hello(node=cluster_pb2.Node(name="nodes/node-0", uid="another"), instance="x")
    error = await _connect(serving, [agent_service_pb2.ConnectRequest(hello=hello)])
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    told = rpc.error_from_rpc(error)
    assert (told.reason, told.field) == ("NODE_NAME_TAKEN", "node")
    assert "agent.toml" in told.remedy


async def test_a_message_of_ten_mebibytes_is_refused(serving: UpFleet) -> None:
    hello = agent_service_pb2.Hello(node=cluster_pb2.Node(name="nodes/huge", uid="u", boot_id="x" * (10 << 20)))
    error = await _connect(serving, [agent_service_pb2.ConnectRequest(hello=hello)])
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert rpc.error_from_rpc(error).reason == "MESSAGE_TOO_LARGE"


async def test_frames_with_impossible_figures_are_counted_and_never_kept(serving: UpFleet) -> None:
    before, now_s = rejected(serving), model_time_s(serving)
    figures: dict[str, dict[str, Any]] = {
        "GPU-nan": {"utilization": math.nan},
        "GPU-infinite": {"temperature_c": math.inf},
        "GPU-negative": {"power_w": -5.0, "memory_used_bytes": -1},
    }
    first = telemetry_pb2.Frame(
        node="nodes/liar", boot="b", sequence=1, start_s=now_s - 1, end_s=now_s,
        gpus=[telemetry_pb2.GpuSample(uuid=uuid, power_limit_w=700.0, **each) for uuid, each in figures.items()],
    )  # fmt: skip
    tomorrow = telemetry_pb2.Frame(
        node="nodes/liar", boot="b", sequence=2, start_s=now_s + 86_400, end_s=now_s + 86_401,
        gpus=[telemetry_pb2.GpuSample(uuid="GPU-tomorrow", power_w=1.0)],
    )  # fmt: skip
    forged = telemetry_pb2.Frame(
        node="nodes/node-0", boot="b", sequence=3, start_s=now_s - 1, end_s=now_s,
        gpus=[telemetry_pb2.GpuSample(uuid="GPU-forged", power_w=1.0)],
    )  # fmt: skip
    hello = agent_service_pb2.Hello(node=cluster_pb2.Node(name="nodes/liar", uid="liar"), instance="liar")
    requests = [agent_service_pb2.ConnectRequest(hello=hello)]
    requests += [agent_service_pb2.ConnectRequest(frame=frame) for frame in (first, tomorrow, forged)]
    await _connect(serving, requests, wait_s=1.0)

    counted = {"not_finite": 2, "negative": 2, "future": 1, "other_node": 1}
    now = rejected(serving)
    assert {reason: now[reason] - before[reason] for reason in counted} == counted
    answer = telemetry_of(serving, "nodes/liar")
    # What could be measured is kept, and nothing else: neither among the newest figures nor in the series.
    assert {gpu.uuid for gpu in answer.latest_gpus} == set(figures)
    assert all(plain_figures(gpu) == {"power_limit_w": 700.0} for gpu in answer.latest_gpus)
    kept = {series.feature for series in answer.series if not all(map(math.isnan, series.values))}
    assert kept == {"power_limit_w"}
    assert "GPU-forged" not in {gpu.uuid for gpu in telemetry_of(serving, "nodes/node-0").latest_gpus}
    until(lambda: serving.ok("get", "node/liar")["state"] == "LOST", timeout_s=30)
    serving.ok("delete", "node/liar")


def rejected(fleet: UpFleet) -> Counter[str]:
    """What the coordinator has refused of frames so far, by reason."""
    log = (fleet.data_dir / "logs" / "coordinator.log").read_text()
    address = re.findall(r"metrics on ([0-9.:]+)", log)[-1]
    page = httpx.get(f"http://{address}/metrics", timeout=10).text
    found = re.findall(r'^enova_coordinator_rejected_total{reason="(\w+)"} (\S+)$', page, re.MULTILINE)
    return Counter({reason: int(float(value)) for reason, value in found})


def telemetry_of(fleet: UpFleet, parent: str) -> replica_service_pb2.GetTelemetryResponse:
    """The newest figures of an object, and its last five minutes."""
    request = replica_service_pb2.GetTelemetryRequest(parent=parent, window_s=300)
    with grpc.insecure_channel(fleet.facts["api"]) as channel:
        return replica_service_pb2_grpc.ReplicaServiceStub(channel).GetTelemetry(request, timeout=10)


def model_time_s(fleet: UpFleet) -> float:
    """What the fleet's clock says."""
    return telemetry_of(fleet, "deployments/steady").now_s


def plain_figures(gpu: telemetry_pb2.GpuSample) -> dict[str, float]:
    """The figures that a sample holds."""
    return {field.name: value for field, value in gpu.ListFields() if field.name != "uuid"}


async def _connect(
    fleet: UpFleet, requests: list[agent_service_pb2.ConnectRequest], *, wait_s: float = 5.0
) -> grpc.aio.AioRpcError:
    """Open an agent's stream, say these things, and return how it ended (OK if it was still open)."""
    async with grpc.aio.insecure_channel(fleet.facts["api"]) as channel:
        call = agent_service_pb2_grpc.AgentServiceStub(channel).Connect(timeout=wait_s)
        try:
            for request in requests:
                await call.write(request)
            while await call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return error
        return grpc.aio.AioRpcError(
            await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
        )


def test_a_corrupt_journal_is_put_aside_and_the_engines_are_adopted(serving: UpFleet) -> None:
    before = {r["name"]: r["pid"] for r in serving.replicas("steady")}
    agents = serving.pids()["agents"]
    journals = list(serving.data_dir.glob("nodes/*/agent/engines.json"))
    assert len(journals) == len(agents)
    for pid in agents.values():
        os.kill(pid, signal.SIGSTOP)     # nothing mends what is corrupted here before the end
    for journal in journals:
        journal.write_bytes(b'{"version": 1, "engi\xff')
    for pid in agents.values():
        os.kill(pid, signal.SIGKILL)
    until(lambda: all(serving.pids()["agents"][n] != pid for n, pid in agents.items()), timeout_s=10)
    until(
        lambda: {n["state"] for n in serving.ok("get", "nodes") if "liar" not in n["name"]} == {"READY"}, timeout_s=20
    )
    assert {r["name"]: r["pid"] for r in serving.replicas("steady")} == before
    for journal in journals:
        (aside,) = journal.parent.glob("engines.json.corrupt-*")
        assert aside.read_bytes().endswith(b"engi\xff")
    logs = sorted(serving.data_dir.glob("logs/agent-node-*.log"))
    assert len(logs) == len(agents)
    assert all("JournalCorrupt" in log.read_text() for log in logs)


# The leader steps down, the call waits for the store, or the store's own deadline is told.
STORE_AWAY = {(3, "UNREACHABLE"), (5, "TIMED_OUT"), (5, "STORE_TIMED_OUT")}


def test_a_store_that_is_away_is_said_and_survived(tmp_path: Path) -> None:
    arguments = ("--nodes", "1", "--gpu", "H100:1", "--time-scale", "20", "--store", "etcd")
    with up(tmp_path / "data", *arguments) as fleet:
        fleet.deploy("steady")
        etcd = next(int(p.split()[0]) for p in fleet.left() if "--listen-client-urls" in p)
        os.kill(etcd, signal.SIGSTOP)
        try:
            refused = until(
                lambda: (r := fleet.enova("scale", "deployment/steady", "--replicas", "1", "-o", "json")).code and r,
                timeout_s=30,
            )
            assert isinstance(refused, Result)
            assert (refused.code, refused.error["reason"]) in STORE_AWAY, refused
            body = {"model": "steady", "prompt": [1, 2], "max_tokens": 2}
            assert httpx.post(f"{fleet.openai}/completions", json=body, timeout=30).status_code == 200
        finally:
            os.kill(etcd, signal.SIGCONT)
        until(lambda: fleet.enova("scale", "deployment/steady", "--replicas", "1").code == 0, timeout_s=30)


def test_up_after_its_own_sigkill_ends_what_it_finds_and_adopts_the_engines(tmp_path: Path) -> None:
    arguments = ("--nodes", "1", "--gpu", "H100:2", "--time-scale", "20")
    first = start_up(tmp_path / "data", arguments)
    first.deploy("kept")
    pids = {r["name"]: r["pid"] for r in first.replicas("kept")}
    first.process.kill()
    first.process.wait()
    with up(tmp_path / "data", *arguments) as second:
        assert second.facts["pids"]["coordinator"] != first.facts["pids"]["coordinator"]
        second.ok("wait", "deployment/kept", "--timeout", "60s")
        assert {r["name"]: r["pid"] for r in second.replicas("kept")} == pids


if namespaces_work():  # who may not mount a small disk does not collect it

    @pytest.mark.root
    def test_a_full_disk_is_said_and_serving_goes_on(tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
        try:
            with up(disk / "data", "--nodes", "1", "--gpu", "H100:2", "--time-scale", "20") as fleet:
                fleet.deploy("steady")
                filler = disk / "filler"
                with filler.open("wb") as file:
                    try:
                        while True:
                            file.write(b"\0" * 65536)
                            file.flush()
                    except OSError:
                        sys.stderr.write("disk full\n")
                refused = fleet.enova("deploy", MODEL, "--name", "more", "--replicas", "1", "-o", "json")
                assert refused.code == 1
                assert refused.error["reason"] == "STORE_NO_SPACE"
                body = {"model": "steady", "prompt": [1, 2], "max_tokens": 2}
                assert httpx.post(f"{fleet.openai}/completions", json=body, timeout=30).status_code == 200
                filler.unlink()
                until(lambda: fleet.enova("scale", "deployment/steady", "--replicas", "1").code == 0, timeout_s=30)
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_failed_start_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "nodes" / "node-1"
    folder.mkdir(parents=True)
    (folder / "ingress").write_text("no folder for its files")
    ports = ("--port", "0", "--openai-port", "0")
    result = run_enova("up", "--nodes", "2", "--data-dir", str(tmp_path / "data"), *ports, "-o", "json")
    assert (result.code, result.error["reason"]) == (1, "START_FAILED"), result
    assert "ingress/node-1" in result.error["message"]
    until(lambda: not remaining(tmp_path / "data"), timeout_s=5.0)


def test_a_flag_that_the_engine_does_not_know_is_named_and_the_next_up_mends_it(tmp_path: Path) -> None:
    arguments = ("--nodes", "1", "--gpu", "H100:2", "--time-scale", "20")
    with up(tmp_path / "data", *arguments, "--engine-args", "--no-such-flag 3") as fleet:
        fleet.ok("deploy", MODEL, "--name", "flagged", "--replicas", "1", "--set", "max_num_seqs=8")
        waited = fleet.enova("wait", "deployment/flagged", "--timeout", "60s", "-o", "json")
        assert (waited.code, waited.error["reason"]) == (1, "DEPLOYMENT_FAILED"), waited
        assert "unrecognized arguments: --no-such-flag 3" in waited.error["message"]
        assert waited.error["remedy"] == "enova explain deployment/flagged"
        assert "unrecognized arguments: --no-such-flag 3" in fleet.enova("explain", "deployment/flagged").out
        # Whatever else may be asked is answered.
        assert [node["state"] for node in fleet.ok("get", "nodes")] == ["READY"]
        unserved = httpx.post(f"{fleet.openai}/completions", json={"model": "flagged", "prompt": [1]}, timeout=30)
        assert (unserved.status_code, unserved.json()["error"]["code"]) == (503, "no_replica")
    with up(tmp_path / "data", *arguments) as fleet:
        until(lambda: fleet.enova("wait", "deployment/flagged", "--timeout", "20s").code == 0, timeout_s=60)
        body = {"model": "flagged", "prompt": [1, 2], "max_tokens": 2}
        assert httpx.post(f"{fleet.openai}/completions", json=body, timeout=30).status_code == 200
