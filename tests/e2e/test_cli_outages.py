"""Commands that wait go on when the coordinator that answered them is restarted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from enova_testing.fleet import ENOVA, MODEL, UpFleet
from enova_testing.waiting import until

pytestmark = [pytest.mark.network, pytest.mark.slow]


def test_wait_outlives_a_restart_of_the_coordinator(fleet: UpFleet) -> None:
    assert fleet.enova("deploy", MODEL, "--name", "late", "--replicas", "1").code == 0
    waiting = subprocess.Popen(
        [str(ENOVA), "wait", "deployment/late", "--timeout", "60s", "-o", "json"],
        env={**os.environ, "ENOVA_API": fleet.facts["api"]},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: any(r["pid"] for r in fleet.replicas("late")), timeout_s=20)
    os.kill(fleet.pids()["coordinator"], signal.SIGKILL)
    _, said = waiting.communicate(timeout=90)
    assert waiting.returncode == 0, said
    fleet.ok("delete", "deployment/late")


def test_following_events_and_logs_outlives_a_restart_of_the_coordinator(fleet: UpFleet, tmp_path: Path) -> None:
    fleet.deploy("followed")
    replica = fleet.replicas("followed")[0]["name"].rsplit("/", 1)[1]
    told = {"events": tmp_path / "events", "logs": tmp_path / "logs"}
    commands = {"events": ("events", "-f"), "logs": ("logs", f"replica/{replica}", "-f")}
    running = [_follow(fleet, told[name], *command) for name, command in commands.items()]
    try:
        until(lambda: all(_objects(path) for path in told.values()), timeout_s=20)
        os.kill(fleet.pids()["coordinator"], signal.SIGKILL)
        until(lambda: fleet.enova("get", "nodes").code == 0, timeout_s=20)
        until(lambda: all(n["state"] == "READY" for n in fleet.ok("get", "nodes")), timeout_s=20)
        fleet.ok("scale", "deployment/followed", "--replicas", "2")
        until(lambda: any("target 2" in e["message"] for e in _objects(told["events"])), timeout_s=20)

        def logged() -> bool:
            for path in fleet.data_dir.glob("nodes/*/agent/**/*.log"):
                with path.open("a") as engine:
                    engine.write("said after the outage\n")
            return any(line["line"] == "said after the outage" for line in _objects(told["logs"]))

        until(logged, timeout_s=20)
        assert [follower.poll() for follower in running] == [None, None]
        names = [(event["name"], event["create_time"]) for event in _objects(told["events"])]
        assert len(names) == len(set(names))
    finally:
        for follower in running:
            follower.kill()
            follower.wait()
    fleet.ok("delete", "deployment/followed")


def _follow(fleet: UpFleet, path: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with path.open("wb") as file:
        environment = {**os.environ, "ENOVA_API": fleet.facts["api"]}
        return subprocess.Popen([str(ENOVA), *arguments, "-o", "json"], env=environment, stdout=file)


def _objects(path: Path) -> list[dict[str, str]]:
    """One JSON object a line, of the lines that are whole."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
