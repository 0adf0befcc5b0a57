"""What is killed under load, and what that may cost: nothing but the killed engine's own streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import httpx
import psutil
import pytest

from enova_testing.fleet import ENOVA, MODEL, UpFleet
from enova_testing.processes import is_alive
from enova_testing.telemetry import telemetry
from enova_testing.waiting import until

pytestmark = [pytest.mark.network, pytest.mark.slow]

SCALE = 20.0


@pytest.fixture(scope="module")
def served(fleet: UpFleet) -> UpFleet:
    """The fleet with a deployment of three replicas."""
    fleet.deploy("busy", replicas=3, max_num_seqs=32)
    return fleet


def under_load(fleet: UpFleet, act: Callable[[], None], *, duration_s: float = 200.0) -> dict[str, int]:
    """Run a load (model seconds), do something in the middle of it, and return the report."""
    arguments = ["--rate", "4", "--duration", f"{duration_s}s", "--prompt-tokens", "64", "--output-tokens", "60"]
    load = subprocess.Popen(
        [str(ENOVA), "load", "busy", *arguments, "--time-scale", f"{SCALE:g}", "-o", "json"],
        env={**os.environ, "ENOVA_API": fleet.facts["api"]},
        stdout=subprocess.PIPE,
        text=True,
    )
    busy = until(lambda: telemetry(fleet, "deployments/busy").held > 0, timeout_s=20, what="traffic")
    assert busy
    act()
    out, _ = load.communicate(timeout=120)
    assert load.returncode == 0, fleet.logs()
    report: dict[str, int] = json.loads(out.strip().splitlines()[-1])
    return report


def test_a_killed_engine_costs_its_own_streams_and_comes_back(served: UpFleet) -> None:
    victim = served.replicas("busy")[0]
    descendants = [p.pid for p in psutil.Process(victim["pid"]).children(recursive=True)]
    report = under_load(served, lambda: os.kill(victim["pid"], signal.SIGKILL))
    lost = report["failed"] + report["cut"]
    assert report["served"] + lost == report["sent"]
    assert lost <= 32

    def back() -> bool:
        replica = next((r for r in served.replicas("busy") if r["name"] == victim["name"]), None)
        return bool(replica and replica["state"] == "READY" and replica["pid"] != victim["pid"])

    until(back, timeout_s=30, what=f"restart of {victim['name']}")
    assert not any(is_alive(pid) for pid in descendants)


def test_a_killed_agent_fails_no_request_and_adopts_its_engines(served: UpFleet) -> None:
    before = {r["name"]: r["pid"] for r in served.replicas("busy")}
    agent = served.pids()["agents"]["node-0"]
    report = under_load(served, lambda: os.kill(agent, signal.SIGKILL))
    assert report["served"] == report["sent"], report
    until(lambda: served.pids()["agents"]["node-0"] != agent, timeout_s=10)
    until(lambda: all(n["state"] == "READY" for n in served.ok("get", "nodes")), timeout_s=20)
    assert {r["name"]: r["pid"] for r in served.replicas("busy")} == before


def test_a_killed_coordinator_fails_no_request_and_comes_back(served: UpFleet) -> None:
    before = {r["name"]: r["pid"] for r in served.replicas("busy")}
    coordinator = served.pids()["coordinator"]

    def kill_it() -> None:
        os.kill(coordinator, signal.SIGKILL)

    report = under_load(served, kill_it)
    assert report["served"] == report["sent"], report
    until(lambda: served.enova("get", "nodes").code == 0, timeout_s=20)
    until(lambda: all(n["state"] == "READY" for n in served.ok("get", "nodes")), timeout_s=20)
    assert {r["name"]: r["pid"] for r in served.replicas("busy")} == before


def test_a_stopped_core_process_is_found_within_ten_seconds_and_mended(served: UpFleet) -> None:
    victim = served.replicas("busy")[0]
    children = psutil.Process(victim["pid"]).children(recursive=True)
    core = next(p for p in children if "EngineCore" in " ".join(p.cmdline()))
    os.kill(core.pid, signal.SIGSTOP)
    stopped_at = time.monotonic()

    def found() -> bool:
        replica = next(r for r in served.replicas("busy") if r["name"] == victim["name"])
        return bool(replica["pid"] != victim["pid"] or replica["state"] != "READY")

    until(found, timeout_s=15, what="the hang to be found")
    assert time.monotonic() - stopped_at <= 10.0 + 1.0  # one poll of the command line takes up to a second
    until(lambda: sum(r["state"] == "READY" for r in served.replicas("busy")) == 3, timeout_s=40)
    until(lambda: not is_alive(core), timeout_s=10, what="the end of the stopped core")


def test_a_changed_spec_that_cannot_start_keeps_the_old_replicas_serving(served: UpFleet) -> None:
    before = {r["name"]: r["pid"] for r in served.replicas("busy")}
    # One block of KV cache holds no request of the model's length: the engine refuses to start, as vLLM does.
    configuration = "{max_num_seqs: 32, num_gpu_blocks_override: 1}"
    manifest = f"name: busy\nmodel: {MODEL}\nreplicas: 3\nconfiguration: {configuration}\n"
    assert served.enova("apply", "-f", "-", stdin=manifest).code == 0
    until(lambda: served.ok("get", "deployment/busy")["state"] == "FAILED", timeout_s=60)
    failed = served.ok("get", "deployment/busy")
    assert failed["reason"]
    now = {r["name"]: r["pid"] for r in served.replicas("busy") if r["state"] == "READY"}
    assert now == before
    waited = served.enova("wait", "deployment/busy", "--timeout", "5s", "-o", "json")
    assert waited.error["reason"] == "DEPLOYMENT_FAILED"
    body = {"model": "busy", "prompt": [1, 2], "max_tokens": 2}
    assert httpx.post(f"{served.openai}/completions", json=body, timeout=30).status_code == 200
    served.deploy("busy", replicas=3, max_num_seqs=32)
    assert {r["name"]: r["pid"] for r in served.replicas("busy")} == before


def test_a_drained_node_is_left_and_taken_up_again(served: UpFleet) -> None:
    served.ok("drain", "node/node-1")
    until(lambda: {r["node"] for r in served.replicas("busy")} == {"nodes/node-0"}, timeout_s=60)
    assert sum(r["state"] == "READY" for r in served.replicas("busy")) == 3
    served.ok("uncordon", "node/node-1")
    node = next(n for n in served.ok("get", "nodes") if n["name"] == "nodes/node-1")
    assert node["schedulable"]
    assert not node["draining"]


@pytest.mark.timeout(300)
def test_the_demo_ends_zero() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "enova_cli.demo"], capture_output=True, text=True, timeout=280, check=False
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    report = json.loads(shown.stdout.strip().splitlines()[-1])
    assert {"sent", "served", "failed", "cut", "ttft_s", "tpot_s", "tokens_per_s", "gpu_seconds", "decisions"} <= set(
        report
    )


@pytest.mark.timeout(300)
def test_the_demo_with_the_policy_paused_ends_non_zero() -> None:
    paused = subprocess.run(
        [sys.executable, "-m", "enova_cli.demo", "--pause-policy"],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert paused.returncode == 1, paused.stdout + paused.stderr
    assert "FAIL scaled out" in paused.stdout
