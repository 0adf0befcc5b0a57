"""What `enova up` leaves behind when it ends at a bad moment or comes back smaller, and where it comes back."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from enova_testing.fleet import UpFleet, up
from enova_testing.waiting import until

pytestmark = [pytest.mark.network, pytest.mark.slow]


def deployed(fleet: UpFleet, replicas: int) -> list[int]:
    """Deploy, and the pids of the engines."""
    fleet.deploy("chat", replicas=replicas)
    return [replica["pid"] for replica in fleet.replicas()]


def test_an_agent_that_is_away_when_up_ends_leaves_no_engine(data_dir: Path) -> None:
    with up(data_dir, "--nodes", "1", "--gpu", "H100:2", "--time-scale", "100") as fleet:
        assert deployed(fleet, 1)
        os.kill(fleet.pids()["agents"]["node-0"], signal.SIGKILL)
        assert fleet.stop() == 0
        assert fleet.left() == []


def test_a_smaller_fleet_ends_the_engines_of_nodes_that_it_no_longer_has(data_dir: Path) -> None:
    with up(data_dir, "--nodes", "2", "--gpu", "H100:1", "--time-scale", "100") as fleet:
        engines = deployed(fleet, 2)
        fleet.process.kill()
        fleet.process.wait()
        nodes = {replica["pid"]: replica["node"] for replica in fleet.replicas()}
        with up(data_dir, "--nodes", "1", "--gpu", "H100:1", "--time-scale", "100"):
            alive = [pid for pid in engines if Path(f"/proc/{pid}").exists()]
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
