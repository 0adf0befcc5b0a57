"""`enova simulate` over the real path: manifest and trace in, the plan process, a table, JSON and a picture out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from enova_cli.__main__ import main

pytestmark = [pytest.mark.network, pytest.mark.timeout(900)]     # the first run compiles the engines

MANIFEST = """
name: chat
model: meta-llama/Llama-3.1-8B-Instruct
min: 1
max: 6
objectives: {ttft_p95_s: 1.0, tpot_p95_s: 0.05}
"""


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "deployment.yaml"
    path.write_text(MANIFEST)
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rows = [f"{0.4 * index:.1f},{100 + index % 400},{20 + index % 60}" for index in range(900)]
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]) + "\n")
    return path


def simulate(manifest: Path, trace: Path, *words: str, fleet: str = "L40S:6") -> Result:
    arguments = ["simulate", "-f", str(manifest), "--trace", str(trace), "--fleet", fleet, *words]
    return CliRunner().invoke(main, arguments)


def answer(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def problem(result: Result) -> dict[str, Any]:
    assert result.exit_code != 0, result.output
    found: dict[str, Any] = json.loads(result.stderr)
    return found


def test_policies_are_compared_on_the_same_requests(manifest: Path, trace: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    words = ("--policy", "enova", "--policy", "static-peak", "--plot", str(picture), "-o", "json")
    found = answer(simulate(manifest, trace, *words))
    assert [row["policy"] for row in found["policies"]] == ["enova", "static-peak"]
    assert found["requests"] == 900
    for row in found["policies"]:
        assert row["holds"]
        assert row["attainment"] >= 0.95
        assert row["gpu_hours"] == pytest.approx(row["cost_usd"] / found["variants"][0]["usd_per_hour"])
        assert 1 <= max(row["replicas"]) <= 6
    assert 0 < found["least"]["cost_usd"] <= min(row["cost_usd"] for row in found["policies"])
    assert picture.read_text().lstrip().startswith("<?xml")
    again = answer(simulate(manifest, trace, *words))
    assert again == found, "the same seed gives the same answer"


def test_a_conservative_deployment_spends_more(manifest: Path, trace: Path) -> None:
    busy = [f"{0.1 * index:.1f},800,200" for index in range(6000)]
    trace.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *busy]) + "\n")
    [plain] = answer(simulate(manifest, trace, "-o", "json"))["policies"]
    manifest.write_text(f"{MANIFEST}conservatism: 10\n")
    [careful] = answer(simulate(manifest, trace, "-o", "json"))["policies"]
    assert careful["gpu_hours"] > plain["gpu_hours"]
    manifest.write_text(f"{MANIFEST}conservatism: 0\n")
    assert problem(simulate(manifest, trace, "-o", "json"))["field"] == "conservatism"


def test_a_fixed_number_of_replicas_needs_no_policy(manifest: Path, trace: Path) -> None:
    manifest.write_text(MANIFEST.replace("min: 1\nmax: 6", "replicas: 2"))
    [row] = answer(simulate(manifest, trace, "-o", "json"))["policies"]
    assert row["policy"] == "fixed"
    assert set(row["replicas"]) == {2}


@pytest.mark.parametrize(
    ("words", "fleet", "said"),
    [
        (("--policy", "magic"), "L40S:6", "--policy: magic is unknown"),
        ((), "T5000:6", "--fleet: 'T5000' is not in the catalogue"),
        ((), "L40S:0", "--fleet: L40S:0 is no GPU at all"),
    ],
)
def test_what_cannot_be_simulated_is_said(
    manifest: Path, trace: Path, words: tuple[str, ...], fleet: str, said: str
) -> None:
    told = problem(simulate(manifest, trace, *words, "-o", "json", fleet=fleet))
    assert f"{told['field']}: {told['message']}".startswith(said)


def test_a_model_that_no_gpu_of_the_fleet_holds_is_said(manifest: Path, trace: Path) -> None:
    manifest.write_text(MANIFEST.replace("3.1-8B", "3.1-70B"))
    told = problem(simulate(manifest, trace, "-o", "json", fleet="L40S:1"))
    assert told["field"] == "--fleet"
    assert "does not fit" in told["message"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "holds no request"),
        ("5.0,10,10\n4.0,10,10\n", "line 3: arrival_s 4 is before the row above"),
        ("0.0,10,10\n1.0,10,10\n2.0,10,10\n9000.0,10,10\n", "is a part missing"),
        ("0.0,99999999999,10\n", "is it another unit"),
    ],
)
def test_a_bad_trace_is_refused(manifest: Path, tmp_path: Path, rows: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    told = problem(simulate(manifest, path, "-o", "json"))
    assert told["field"] == "--trace"
    assert message in told["message"]


def test_the_table_says_who_holds_and_what_it_rests_on(manifest: Path, trace: Path) -> None:
    shown = simulate(manifest, trace).output
    assert "enova" in shown
    assert "yes" in shown
    assert "as predicted" in shown
