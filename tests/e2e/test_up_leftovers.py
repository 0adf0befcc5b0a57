"""What `enova up` leaves behind when it ends at a bad moment, or comes back smaller: nothing."""

from __future__ import annotations

import os
import signal
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
