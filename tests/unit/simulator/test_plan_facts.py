"""`enova_simulator.plan` hands out the catalogue as plain JSON values."""

from __future__ import annotations

import json

import pytest

from enova_simulator import plan


@pytest.mark.parametrize(("option", "key"), [("--gpus", "H100"), ("--models", "meta-llama/Llama-3.1-8B-Instruct")])
def test_the_catalogue_is_written_as_one_json_array(
    capsys: pytest.CaptureFixture[str], option: str, key: str
) -> None:
    plan.main([option])
    rows = json.loads(capsys.readouterr().out)
    assert key in {row["name"] for row in rows}


def test_gpus_carry_what_an_agent_needs_to_simulate_them() -> None:
    for row in plan.gpu_facts():
        assert {"name", "driver_names", "memory_bytes", "power_limit_w", "idle_power_w", "sm_clock_mhz"} <= row.keys()


def test_one_question_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        plan.main([])
    assert caught.value.code == 2
    assert "--gpus" in capsys.readouterr().err
