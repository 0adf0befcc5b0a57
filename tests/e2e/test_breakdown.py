"""Where time goes is shown and adds up; what is learnt of step times outlives the coordinator that learnt it."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from enova_testing.fleet import UpFleet, up
from enova_testing.waiting import until

pytestmark = [pytest.mark.network, pytest.mark.slow]

PARTS = ["ingress_queue", "engine_queue", "prefill", "decode", "remainder"]
REQUESTS = 60


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpFleet]:
    """One node with a deployment that has served some load, model clock ten times as fast."""
    directory = tmp_path_factory.mktemp("breakdown") / "data"
    with up(directory, "--nodes", "1", "--gpu", "H100:2", "--time-scale", "10") as fleet:
        fleet.deploy("chat", replicas=1, max_num_seqs=64)
        arguments = ("--rate", "4", "--duration", "60s", "--prompt-tokens", "300", "--output-tokens", "100")
        fleet.ok("load", "chat", *arguments, "--time-scale", "10")
        yield fleet


def breakdown(fleet: UpFleet, *arguments: str) -> dict[str, Any]:
    value: dict[str, Any] = fleet.ok("breakdown", "deployment/chat", "--window", "0", *arguments)
    return value


def shown_alike(fleet: UpFleet) -> tuple[dict[str, Any], str]:
    """The figures as values and as text, of one moment: frames of the last requests may still be on their way."""
    shown: list[tuple[dict[str, Any], str]] = []

    def still() -> bool:
        before = breakdown(fleet)
        text = fleet.enova("breakdown", "deployment/chat", "--window", "0").out
        shown.append((before, text))
        after = breakdown(fleet)
        return all(before[part] == after[part] for part in ("requests", "parts", "end_to_end"))

    until(still, timeout_s=60, what="the figures to stand still")
    return shown[-1]


def learnt(fleet: UpFleet) -> dict[str, Any] | None:
    steps = breakdown(fleet)["steps"]
    calibration: dict[str, Any] | None = steps[0]["calibration"] if steps else None
    return calibration


def test_the_parts_add_up_to_the_time_end_to_end(loaded: UpFleet) -> None:
    found: dict[str, Any] = {}

    def counted_alike() -> bool:
        """Frames of the ingress and of the engine come at different moments; in the end they tell of the same requests.

        A canary that ends together with real requests is one entry too many in a histogram.
        """
        found.update(breakdown(loaded))
        counts = [part["count"] for part in (*found["parts"], found["end_to_end"])]
        return bool(min(counts) >= REQUESTS and max(counts) - min(counts) <= 3)

    until(counted_alike, timeout_s=30, what="the same requests in all parts")
    parts = {part["name"]: part for part in found["parts"]}
    whole = found["end_to_end"]
    assert list(parts) == PARTS
    assert sum(part["mean_s"] for part in parts.values()) == pytest.approx(whole["mean_s"], rel=1e-9)
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1, rel=1e-9)
    assert parts["decode"]["mean_s"] > parts["prefill"]["mean_s"] > 0
    assert parts["remainder"]["mean_s"] > 0
    assert whole["p50"]["low_s"] <= whole["p50"]["value_s"] <= whole["p50"]["high_s"] < whole["p95"]["high_s"]


def test_the_step_is_told_by_kernel_and_agrees_with_the_model_once_corrected(loaded: UpFleet) -> None:
    until(lambda: bool(breakdown(loaded)["steps"]), timeout_s=15)
    step = breakdown(loaded)["steps"][0]
    assert step["variant"] == "deployments/chat/variants/v1"
    assert 0 < step["decode_sequences"] < 64
    assert sum(share["share"] for share in step["shares"]) == pytest.approx(1)
    assert sum(share["seconds"] for share in step["shares"]) == pytest.approx(step["predicted_s"])
    assert step["shares"][0]["kernel"] == "GEMM"
    assert step["predicted_s"] == pytest.approx(step["step_s"], rel=0.15)
    calibration = step["calibration"]
    assert calibration["updates"] > 0
    assert 0.2 < calibration["factor"] < 5
    assert {factor["kernel"] for factor in calibration["factors"]} >= {"COMPUTE", "MEMORY", "ATTENTION", "HOST"}


def test_a_person_is_shown_the_same_figures(loaded: UpFleet) -> None:
    found, text = shown_alike(loaded)
    assert f"chat: {found['requests']} requests" in text
    rows = [re.split(r"  +| \(", line)[0] for line in text.splitlines()[2:8]]
    assert rows == [*(name.replace("_", " ") for name in PARTS), "end to end"]
    assert f"{found['end_to_end']['mean_s'] * 1e3:.3g} ms" in text or f"{found['end_to_end']['mean_s']:.3g} s" in text
    assert "times what the kernel tables say" in text
    assert "v1: steps take" in loaded.enova("describe", "deployment/chat").out


def test_prometheus_is_told_the_factor(loaded: UpFleet) -> None:
    calibration = learnt(loaded)
    assert calibration is not None
    log = (loaded.data_dir / "logs" / "coordinator.log").read_text()
    address = re.findall(r"metrics on ([0-9.:]+)", log)[-1]
    page = httpx.get(f"http://{address}/metrics", timeout=10).text
    name = calibration["name"].removeprefix("calibrations/")
    found = re.search(rf'^enova_coordinator_calibration_factor{{calibration="{name}"}} (\S+)$', page, re.MULTILINE)
    assert found is not None, page
    assert float(found[1]) == pytest.approx(calibration["factor"], rel=0.2)


def test_what_was_learnt_outlives_the_coordinator(loaded: UpFleet) -> None:
    before = learnt(loaded)
    assert before is not None
    assert before["updates"] > 0
    pid = loaded.pids()["coordinator"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: loaded.pids()["coordinator"] != pid, timeout_s=20)

    def restored() -> bool:
        result = loaded.enova("breakdown", "deployment/chat", "--window", "0", "-o", "json")
        return result.code == 0 and any(step["calibration"] for step in json.loads(result.out)["steps"])

    until(restored, timeout_s=30, what="the calibration to be there again")
    after = learnt(loaded)
    assert after is not None
    # Nothing was measured since: what is known is what was in the store, at least half of all updates.
    assert (after["name"], after["gpu_type"], after["model"]) == (before["name"], before["gpu_type"], before["model"])
    assert before["updates"] / 2 <= after["updates"] <= before["updates"]
    assert after["factor"] == pytest.approx(before["factor"], rel=0.2)


def test_wrong_use_is_told(loaded: UpFleet, tmp_path: Path) -> None:
    assert loaded.enova("breakdown", "deployment/nobody").code == 4
    assert loaded.enova("breakdown", "node/node-0").code == 2
    result = loaded.enova("breakdown", "deployment/chat", "--window", "2h", "-o", "json")
    assert (result.code, result.error["field"]) == (1, "window_s")
