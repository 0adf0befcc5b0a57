"""What `enova up` leaves behind when it ends at a bad moment or comes back smaller, and where it comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import httpx
import pytest

from enova_cli.up.fleet import Fleet
from enova_cli.up.leftovers import remaining
from enova_cli.up.plan import UpOptions
from enova_testing.fleet import MODEL, UpFleet, run_enova, up
from enova_testing.processes import is_alive
from enova_testing.waiting import until

pytestmark = [pytest.mark.network, pytest.mark.slow]


def deployed(fleet: UpFleet, replicas: int) -> list[int]:
    """Deploy, and the pids of the engines."""
    fleet.deploy("chat", replicas=replicas)
    return [replica["pid"] for replica in fleet.replicas()]


def test_an_agent_that_dies_when_up_ends_comes_back_and_drains_its_engines(data_dir: Path) -> None:
    with up(data_dir, "--nodes", "1", "--gpu", "H100:2", "--time-scale", "10") as fleet:
        assert deployed(fleet, 1)
        body = {"model": "chat", "prompt": [1, 2], "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{fleet.openai}/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data:")
            os.kill(fleet.pids()["agents"]["node-0"], signal.SIGKILL)
            fleet.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert fleet.process.wait(60) == 0
        assert fleet.left() == []


async def test_engines_that_an_agent_does_not_end_in_time_are_killed_and_named(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("enova_cli.up.fleet.STOP_ENGINES_TIMEOUT_S", 4.0)
    monkeypatch.setattr("enova_cli.up.child.TERM_TIMEOUT_S", 0.5)
    fleet = Fleet(UpOptions(
        nodes=2, gpu_type="H100", gpus_per_node=1, engine="simulated", engine_command=(), engine_arguments=(),
        data_dir=data_dir, port=0, openai_port=0, store="sqlite", time_scale=100.0,
    ))  # fmt: skip
    try:
        facts = await fleet.start(asyncio.Event())
        assert facts is not None
        deploy = ("deploy", MODEL, "--name", "chat", "--replicas", "2", "--set=max_model_len=4096", "--wait")
        assert (await asyncio.to_thread(run_enova, *deploy, api=facts["api"])).code == 0
        os.kill(facts["pids"]["agents"]["node-1"], signal.SIGSTOP)
    finally:
        late = await fleet.stop()
    assert late == ["node-1"]
    assert remaining(data_dir) == []


def test_the_data_directory_is_its_owners_alone_and_forgets_the_pids_of_what_has_ended(data_dir: Path) -> None:
    with up(data_dir, "--nodes", "1", "--gpu", "H100:1") as fleet:
        modes = {path.name: path.stat().st_mode & 0o777 for path in (data_dir, data_dir / "nodes", data_dir / "logs")}
        assert set(modes.values()) == {0o700}, modes
        assert (data_dir / "up.json").exists()
        assert fleet.stop() == 0
    assert not (data_dir / "up.json").exists()


def test_a_smaller_fleet_ends_the_engines_of_nodes_that_it_no_longer_has(data_dir: Path) -> None:
    with up(data_dir, "--nodes", "2", "--gpu", "H100:1", "--time-scale", "100") as fleet:
        engines = deployed(fleet, 2)
        fleet.process.kill()
        fleet.process.wait()
        nodes = {replica["pid"]: replica["node"] for replica in fleet.replicas()}
        with up(data_dir, "--nodes", "1", "--gpu", "H100:1", "--time-scale", "100"):
            alive = [pid for pid in engines if is_alive(pid)]
            assert [nodes[pid] for pid in alive] == ["nodes/node-0"]
        until(lambda: not fleet.left(), timeout_s=10.0)


def test_a_port_that_is_asked_for_wins_over_that_of_last_time(data_dir: Path) -> None:
    arguments = ("--nodes", "1", "--gpu", "H100:1")
    with up(data_dir, *arguments) as fleet:
        before = fleet.facts
    with up(data_dir, *arguments) as fleet:
        assert (fleet.facts["api"], fleet.facts["openai"]) == (before["api"], before["openai"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wanted = taken.getsockname()[1]
    with up(data_dir, *arguments, "--port", str(wanted)) as fleet:
        assert fleet.facts["api"] == f"127.0.0.1:{wanted}"


def test_a_port_of_last_time_that_somebody_took_is_replaced_where_any_will_do(data_dir: Path) -> None:
    arguments = ("--nodes", "1", "--gpu", "H100:1")
    with up(data_dir, *arguments) as fleet:
        before = fleet.facts["api"]
    with socket.create_server(("127.0.0.1", int(before.rpartition(":")[2]))), up(data_dir, *arguments) as fleet:
        assert fleet.facts["api"] != before
