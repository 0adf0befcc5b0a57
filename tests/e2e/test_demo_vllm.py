"""The demonstration on a real vLLM on the CPU: all of it happens, and without a policy it says that it did not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(1500)]

ENVIRONMENT = Path(__file__).parents[2] / ".venv-vllm"
DEMO_TIMEOUT_S = 1400.0  # six minutes alone; twelve with ten other programs on the same two cores


def shown(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What `make demo ENGINE=vllm` runs."""
    command = f"{ENVIRONMENT / 'bin' / 'python'} -m vllm.entrypoints.openai.api_server"
    words = ["--engine", "vllm", "--model", str(ENVIRONMENT / "tiny-model"), "--engine-command", command, *arguments]
    return subprocess.run(
        [sys.executable, "-m", "enova_cli.demo", *words],
        capture_output=True,
        text=True,
        timeout=DEMO_TIMEOUT_S,
        check=False,
    )


def test_the_demo_scales_a_real_engine_out_and_in_and_kills_one_on_the_way() -> None:
    demo = shown()
    assert demo.returncode == 0, demo.stdout + demo.stderr
    report = json.loads(demo.stdout.strip().splitlines()[-1])
    steps = [(each["action"], each["from_replicas"], each["to_replicas"]) for each in report["decisions"]]
    assert [step for step in steps if step[0] != "HOLD"] == [("SCALE_UP", 1, 2), ("SCALE_DOWN", 2, 1)]
    assert {each["actor"].split("/")[0] for each in report["decisions"]} == {"policy"}
    assert report["served"] > 0


def test_with_the_policy_paused_it_ends_non_zero() -> None:
    demo = shown("--pause-policy")
    assert demo.returncode == 1, demo.stdout + demo.stderr
    assert "FAIL scaled out" in demo.stdout
    assert "autoscaling is paused" in " ".join(demo.stdout.split())
    assert "ok   no process is left" in demo.stdout
