"""Commands that wait go on when the coordinator that answered them is restarted."""

from __future__ import annotations

import os
import signal
import subprocess

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
