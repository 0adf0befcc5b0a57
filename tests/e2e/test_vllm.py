"""A real vLLM on the CPU, through the whole of enova: deploy, serve, count, kill, stop its core, drain, end."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from enova_testing.fleet import UpFleet, up
from enova_testing.telemetry import telemetry
from enova_testing.waiting import until

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(600)]

ENVIRONMENT = Path(__file__).parents[2] / ".venv-vllm"
MODEL = ENVIRONMENT / "tiny-model"
START_TIMEOUT_S = 240.0  # 26 s alone; minutes beside other tests on two cores


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpFleet]:
    """One slot with a real vLLM, and the tiny model deployed and ready in it."""
    command = f"{ENVIRONMENT / 'bin' / 'python'} -m vllm.entrypoints.openai.api_server"
    arguments = ["--nodes", "1", "--gpu", "CPU:1", "--engine", "vllm", "--engine-command", command]
    directory = tmp_path_factory.mktemp("vllm") / "data"
    with up(directory, *arguments, "--engine-args", "--dtype float32 --enforce-eager") as running:
        settings = ["--set", "max_num_seqs=16", "--set", "max_model_len=2048"]
        running.ok("deploy", str(MODEL), "--name", "tiny", "--replicas", "1", *settings)
        running.ok("wait", "deployment/tiny", "--timeout", f"{START_TIMEOUT_S}s", timeout_s=START_TIMEOUT_S + 30)
        yield running


def replica(fleet: UpFleet) -> dict[str, Any]:
    """The one replica."""
    (only,) = fleet.replicas("tiny")
    return only


def processes(fleet: UpFleet) -> list[psutil.Process]:
    """The API server and everything below it."""
    server = psutil.Process(replica(fleet)["pid"])
    return [server, *server.children(recursive=True)]


def ready_again(fleet: UpFleet, old_pid: int) -> None:
    """Wait until another process serves."""

    def serves() -> bool:
        now = replica(fleet)
        return bool(now["state"] == "READY" and now["pid"] not in (0, old_pid))

    until(serves, timeout_s=START_TIMEOUT_S, what=f"a new engine\n{fleet.logs()}")


def test_a_streamed_completion_goes_through_the_ingress_and_is_counted(fleet: UpFleet) -> None:
    before = telemetry(fleet, "deployments/tiny").counted
    client = openai.OpenAI(base_url=fleet.openai, api_key="none", max_retries=0)
    sent = output = 0
    for _ in range(4):
        stream = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hello there"}],
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        usage = list(stream)[-1].usage
        assert usage is not None
        assert usage.completion_tokens == 12
        sent, output = sent + usage.prompt_tokens, output + usage.completion_tokens
    until(lambda: telemetry(fleet, "deployments/tiny").counted == before.plus(4, sent, output), timeout_s=15)


def test_the_engines_own_counters_agree_without_the_canaries(fleet: UpFleet) -> None:
    # Canaries go on all the time: what the agent reports must move by what was sent and by nothing else.
    until(lambda: telemetry(fleet, "deployments/tiny").engine_tokens is not None, timeout_s=15)
    before = telemetry(fleet, "deployments/tiny").engine_tokens
    assert before is not None
    body = {"model": "tiny", "prompt": [20, 21, 22, 23, 24], "max_tokens": 7, "ignore_eos": True}
    for _ in range(3):
        assert httpx.post(f"{fleet.openai}/completions", json=body, timeout=30).status_code == 200
    wanted = (before[0] + 15, before[1] + 21)
    until(lambda: telemetry(fleet, "deployments/tiny").engine_tokens == wanted, timeout_s=15)
    steady_until = time.monotonic() + 6.0
    until(lambda: time.monotonic() > steady_until, timeout_s=10)  # two canaries long
    assert telemetry(fleet, "deployments/tiny").engine_tokens == wanted


def test_a_stopped_core_process_is_found_within_ten_seconds_and_mended(fleet: UpFleet) -> None:
    old = replica(fleet)
    core = next(p for p in processes(fleet) if "EngineCore" in " ".join([p.name(), *p.cmdline()]))
    os.kill(core.pid, signal.SIGSTOP)
    stopped_at = time.monotonic()
    assert httpx.get(f"{old['endpoint']}/health", timeout=5).status_code == 200

    def found() -> bool:
        now = replica(fleet)
        return bool(now["state"] != "READY" or now["pid"] != old["pid"])

    until(found, timeout_s=20, what="the hang to be found")
    assert time.monotonic() - stopped_at < 11.0  # ten, and the poll of the command line
    ready_again(fleet, old["pid"])
    assert not core.is_running()


def test_a_killed_api_server_takes_its_children_and_shared_memory_along(fleet: UpFleet) -> None:
    old = replica(fleet)
    family = processes(fleet)
    assert len(family) > 1
    segments = shared_memory()
    os.kill(old["pid"], signal.SIGKILL)
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), timeout_s=10)
    until(lambda: not (segments & shared_memory()), timeout_s=10, what=f"shared memory of the dead: {segments}")
    ready_again(fleet, old["pid"])


def test_a_bad_model_path_is_refused_with_its_field(fleet: UpFleet) -> None:
    result = fleet.enova("deploy", "/nonexistent/model", "--name", "bad", "--replicas", "1", "-o", "json")
    assert result.code in (1, 4)
    assert result.error["field"] == "model"
    assert result.error["reason"] == "MODEL_NOT_FOUND"
    assert result.error["remedy"]


def test_deleting_drains_and_leaves_no_process_port_or_shared_memory(fleet: UpFleet) -> None:
    family = processes(fleet)
    endpoint = replica(fleet)["endpoint"]
    fleet.ok("delete", "deployment/tiny")
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family)
    host, port = endpoint.removeprefix("http://").split(":")
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0
    assert not shared_memory()


def shared_memory() -> set[str]:
    """Segments that vLLM's processes leave behind when nobody cleans up."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.mp-"))}
