"""docs/two-hosts.md, walked word for word on two hosts made of namespaces."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from enova_testing.hosts import PROGRAMS, Host, Shell, cable, namespaces_work
from enova_testing.waiting import until

pytestmark = [pytest.mark.network, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]

PAGE = Path(__file__).parents[2] / "docs" / "two-hosts.md"
ASK = (
    "curl --fail --silent --cacert /etc/enova/tls/ca.crt https://gpu-2:8000/v1/completions"
    """ -H 'content-type: application/json' -d '{"model": "chat", "prompt": "a", "max_tokens": 2}'"""
)
SCP = """#!/usr/bin/env bash
# scp for hosts that share a folder: FILE... HOST:DIRECTORY
set -e
target=${@: -1}
cp "${@:1:$#-1}" "$HOSTS/${target%%:*}${target#*:}"
"""


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(host, lines) of each block that stands below a line "On HOST:"."""
    for host, block in re.findall(r"^On (\S+):\n\n((?:    .*\n|\n)+)", text, re.MULTILINE):
        yield host, re.sub("^    ", "", block, flags=re.MULTILINE).rstrip()


def environment(folder: Path) -> dict[str, str]:
    """The page's hosts have real GPUs and vLLM; these have simulated ones. All else is as the page says."""
    catalogue = subprocess.run(
        [sys.executable, "-m", "enova_simulator.plan", "--models"], capture_output=True, check=True, timeout=60
    )
    models = folder / "models.json"
    models.write_bytes(catalogue.stdout)
    tools = folder / "tools"
    tools.mkdir()
    (tools / "scp").write_text(SCP)
    (tools / "scp").chmod(0o755)
    return {
        "PATH": f"{tools}:{PROGRAMS}:{os.environ['PATH']}",
        "HOSTS": str(folder),
        "HOME": str(folder),
        "COLUMNS": "200",
        "ENOVA_TIME_SCALE": "20",  # model time, in which simulated engines start
        "ENOVA_CLOCK_EPOCH": str(int(time.time())),
        "ENOVA_AGENT_GPUS": "simulated",
        "ENOVA_AGENT_SIMULATED_MODELS": str(models),
        "ENOVA_AGENT_ENGINE_KIND": "simulated",
        "ENOVA_AGENT_ENGINE_COMMAND": "enova-simulated-engine",
        "ENOVA_AGENT_ENGINE_EXTRA_ARGUMENTS": "--simulated-time-scale,20",
    }


def test_the_page_has_a_block_for_each_step() -> None:
    assert [host for host, _ in blocks(PAGE.read_text())] == [
        "both", "gpu-1", "gpu-1", "gpu-1", "gpu-1", "gpu-2", "gpu-1", "gpu-1",
    ]


if namespaces_work():  # elsewhere it is not collected

    def test_the_page_works_word_for_word(tmp_path: Path) -> None:
        env = environment(tmp_path)
        with Host("gpu-1", tmp_path) as one, Host("gpu-2", tmp_path) as two:
            cable(one, two)
            shells = {}
            for host in (one, two):
                gpu = f'[{{type = "H100", memory_bytes = 85899345920, uuid = "GPU-sim-{host.name}", index = 0}}]'
                shells[host.name] = Shell(host, env | {"ENOVA_AGENT_SIMULATED_GPUS": gpu})
            try:
                for name, block in blocks(PAGE.read_text()):
                    for host_name in [name] if name != "both" else shells:
                        shells[host_name].type(block, timeout_s=150)
                    if "enova-coordinator --config" in block:  # a person reads in the log that it serves
                        until(lambda: listens(one, 7700), timeout_s=30, what="the coordinator to listen")
                check(one, two, shells["gpu-1"], env)
            finally:
                for name, shell in shells.items():
                    print(f"--- {name}\n{shell.said()}")
                    shell.close()

    def check(one: Host, two: Host, shell: Shell, env: dict[str, str]) -> None:
        """Both nodes serve, requests hop between them, and what is not of the fleet does not get in."""
        assert '"finish_reason"' in shell.said()
        shell.type("enova get nodes -o json >/etc/enova/nodes.json", timeout_s=30)
        nodes = json.loads((one.folder / "etc" / "enova" / "nodes.json").read_text())
        assert {(node["name"], node["state"]) for node in nodes} == {("nodes/gpu-1", "READY"), ("nodes/gpu-2", "READY")}
        shell.type(f"for n in $(seq 12); do {ASK} >/dev/null; done", timeout_s=60)
        # One replica a host: whichever is at gpu-1 was reached by a hop.
        until(lambda: served(two) == {"v1-0", "v1-1"}, what="both hosts to have served what came in at gpu-2")

        command = ["env", "-i", f"PATH={env['PATH']}", "enova", "--api", "gpu-1:7700", "get", "nodes", "-o", "json"]
        refused = subprocess.run(two.inside(*command), capture_output=True, text=True, check=False, timeout=30)
        assert json.loads(refused.stderr)["reason"] == "PLAINTEXT_REFUSED"
        trial = "import grpc; grpc.channel_ready_future(grpc.insecure_channel('gpu-1:7700')).result(timeout=3)"
        done = subprocess.run(two.inside(sys.executable, "-c", trial), capture_output=True, check=False, timeout=30)
        assert done.returncode != 0, "a client in plaintext got in"


def listens(host: Host, port: int) -> bool:
    """Whether something accepts connections there."""
    trial = f"import socket; socket.create_connection(('{host.name}', {port}), 1)"
    return subprocess.run(host.inside(sys.executable, "-c", trial), capture_output=True, check=False).returncode == 0


def served(entry: Host) -> set[str]:
    """The replicas that served what came in at this host, by its ingress's request records."""
    folder = entry.folder / "var" / "lib" / "enova" / "ingress" / "records"
    rows = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return {row["replica"].rpartition("/")[2] for row in rows if row["outcome"] == "FINISHED"}
