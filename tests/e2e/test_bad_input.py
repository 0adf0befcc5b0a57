"""Bad input through the real command and the real port: a clear error, and the system still serves."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from enova.v1 import agent_service_pb2, agent_service_pb2_grpc, cluster_pb2, telemetry_pb2
from enova_cli.up.leftovers import remaining
from enova_common import rpc
from enova_testing.fleet import MODEL, UpFleet, run_enova, start_up, up
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


@pytest.mark.parametrize(
    ("manifest", "reason", "field"),
    [
        (BASE + "replica: 2\n", "UNKNOWN_FIELD", "replica"),
        (BASE + "configuration: {max_num_sequences: 2}\n", "UNKNOWN_FIELD", "configuration.max_num_sequences"),
        (BASE + "min: 4\nmax: 2\n", None, "min"),
        (BASE + "min: -1\n", None, "min"),
        (BASE + "replicas: 2\nmin: 1\n", None, "replicas"),
        (BASE + "configuration: {gpu_memory_utilization: 1.5}\n", None, "configuration.gpu_memory_utilization"),
        (BASE + "configuration: {max_num_seqs: 0}\n", None, "configuration.max_num_seqs"),
        (BASE + "configuration: {dtype: float99}\n", None, "configuration.dtype"),
        (BASE + "policy: nonsense\n", None, "policy"),
        (BASE + "objectives: {ttft_p95_s: -1}\n", None, "classes[0].ttft_p95_s"),
        ("name: BAD NAME\nmodel: m\n", None, "name"),
        ("name: bad\nmodel: --trust-remote-code\n", None, "model"),
        ("name: bad\n", None, "model"),
        ("name: bad\nmodel: no/such-model\n", "MODEL_NOT_FOUND", "model"),
        (BASE + "served_names: [steady]\n", None, "served_names[0]"),
        ("name: [\n", "INVALID_YAML", "-"),
    ],
)
def test_a_bad_manifest_names_its_field_and_the_remedy(
    serving: UpFleet, manifest: str, reason: str | None, field: str
) -> None:
    result = serving.enova("apply", "-f", "-", "-o", "json", stdin=manifest)
    assert result.code in (1, 4), result
    error = result.error
    assert error["field"] == field, error
    assert reason is None or error["reason"] == reason
    assert error["message"]
    assert serving.enova("get", "deployment/bad").code == 4


def test_the_exit_code_says_who_acts_next(serving: UpFleet) -> None:
    assert serving.enova("get", "deployment/nobody").code == 4
    assert serving.enova("get", "nonsense").code == 2
    assert run_enova("get", "nodes").code == 3
    # A GPU type that no node has: it stays PENDING, with a reason for each node.
    serving.ok("deploy", MODEL, "--name", "nowhere", "--replicas", "1", "--gpu", "H200")
    waited = serving.enova("wait", "deployment/nowhere", "--timeout", "1s", "-o", "json")
    assert waited.code == 5
    assert "node-0" in waited.error["message"]
    assert "node-1" in waited.error["message"]
    serving.ok("delete", "deployment/nowhere")


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run_enova("up", "--data-dir", str(tmp_path / "data"), "--port", str(port), "--openai-port", "0")
    assert result.code == 1
    assert str(port) in result.err


def test_a_data_directory_in_use_names_its_owner(serving: UpFleet) -> None:
    result = run_enova("up", "--data-dir", str(serving.data_dir), "--port", "0", "--openai-port", "0", "-o", "json")
    assert result.code == 1
    assert result.error["reason"] == "IN_USE"
    assert str(serving.process.pid) in result.error["message"]


def test_an_unknown_gpu_type_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    result = run_enova("up", "--gpu", "H1000:8", "--data-dir", str(tmp_path / "data"), "--port", "0", "-o", "json")
    assert (result.code, result.error["field"]) == (1, "--gpu")
    assert "H100" in result.error["remedy"]


def test_a_trace_in_the_wrong_form_is_refused_with_its_line(serving: UpFleet, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n1,2,3\n0.5,2,3\n")
    result = serving.enova("load", "steady", "--trace", str(trace), "-o", "json")
    assert (result.code, result.error["reason"]) == (1, "INVALID_TRACE")
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
    assert (result.code, result.error["field"]) == (2, arguments[-2])
    assert result.error["remedy"]


@pytest.mark.parametrize("what", ["deployment/nope", "replica/nope", "node/nope", "decision/nope"])
def test_what_is_not_there_says_where_to_look(serving: UpFleet, what: str) -> None:
    result = serving.enova("get", what, "-o", "json")
    assert result.code == 4
    assert result.error["remedy"].startswith("enova get ")


async def test_an_agent_with_a_taken_name_is_refused(serving: UpFleet) -> None:
    hello = agent_service_pb2.Hello(node=cluster_pb2.Node(name="nodes/node-0", uid="another"), instance="x")
    error = await _connect(serving, [agent_service_pb2.ConnectRequest(hello=hello)])
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert rpc.error_from_rpc(error).reason == "NODE_NAME_TAKEN"


async def test_a_message_of_ten_mebibytes_is_refused(serving: UpFleet) -> None:
    hello = agent_service_pb2.Hello(node=cluster_pb2.Node(name="nodes/huge", uid="u", boot_id="x" * (10 << 20)))
    error = await _connect(serving, [agent_service_pb2.ConnectRequest(hello=hello)])
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_frames_with_impossible_figures_are_counted_and_never_kept(serving: UpFleet) -> None:
    now = time.time()
    hello = agent_service_pb2.Hello(node=cluster_pb2.Node(name="nodes/liar", uid="liar"), instance="liar")
    bad = [
        telemetry_pb2.GpuSample(uuid="GPU-liar", utilization=math.nan),
        telemetry_pb2.GpuSample(uuid="GPU-liar", power_w=-5.0),
        telemetry_pb2.GpuSample(uuid="GPU-liar", memory_used_bytes=-1),
    ]
    frames = [
        telemetry_pb2.Frame(node="nodes/liar", boot="b", sequence=1, start_s=now, end_s=now + 1, gpus=bad),
        telemetry_pb2.Frame(node="nodes/liar", boot="b", sequence=2, start_s=now + 1e9, end_s=now + 1e9 + 1),
        telemetry_pb2.Frame(node="nodes/node-0", boot="b", sequence=3, start_s=now, end_s=now + 1),
    ]
    requests = [agent_service_pb2.ConnectRequest(hello=hello)]
    requests += [agent_service_pb2.ConnectRequest(frame=frame) for frame in frames]
    await _connect(serving, requests, wait_s=1.0)
    node = serving.ok("describe", "node/liar")
    assert node["name"] == "nodes/liar"
    until(lambda: serving.ok("get", "node/liar")["state"] == "LOST", timeout_s=30)
    serving.ok("delete", "node/liar")


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
    for journal in serving.data_dir.glob("nodes/*/agent/journal*"):
        journal.write_bytes(b'{"version": 1, "engi\xff')
    for pid in agents.values():
        os.kill(pid, signal.SIGKILL)
    until(lambda: all(serving.pids()["agents"][n] != pid for n, pid in agents.items()), timeout_s=10)
    until(
        lambda: {n["state"] for n in serving.ok("get", "nodes") if "liar" not in n["name"]} == {"READY"}, timeout_s=20
    )
    assert {r["name"]: r["pid"] for r in serving.replicas("steady")} == before


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
            assert refused.code in (3, 5)  # type: ignore[attr-defined]
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
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ("up", "--nodes", "2", "--data-dir", str(tmp_path / "data"), "--port", "0", "-o", "json")
        result = run_enova(*arguments, "--openai-port", str(port))
    assert result.code == 1
    assert str(port) in result.error["message"]
    until(lambda: not remaining(tmp_path / "data"), timeout_s=5.0)
