"""The units under a real systemd, as PID 1 of namespaces: what stops what, and what engines survive."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from enova_testing.hosts import PROGRAMS
from enova_testing.systemd import ROOT, SystemdHost, systemd_works
from enova_testing.waiting import until

pytestmark = [pytest.mark.network, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]

SERVICES = ("enova-coordinator.service", "enova-agent.service", "enova-ingress.service", "enova-engines.service")
CGROUP = Path("/sys/fs/cgroup/enova.slice/enova-agent.service")
API = "127.0.0.1:7700"
SETTINGS = {
    "coordinator.toml": f'name = "here"\nlisten = "{API}"\ndata_dir = "/var/lib/enova-coordinator"\n',
    "agent.toml": f"""
node = "here"
coordinators = ["{API}"]
data_dir = "/var/lib/enova/agent"
socket = "/run/enova/agent.sock"
gpus = "simulated"
simulated_gpus = [{{type = "H100", memory_bytes = 85899345920, uuid = "GPU-sim-0", index = 0}}]
simulated_models = "/etc/enova/models.json"
[engine]
kind = "simulated"
command = ["{PROGRAMS}/enova-simulated-engine"]
extra_arguments = ["--simulated-time-scale", "20"]
""",
    "ingress.toml": 'node = "here"\ndata_dir = "/var/lib/enova/ingress"\nsocket = "/run/enova/agent.sock"\n',
}
ASK = (
    "curl", "--fail", "--silent", "--show-error", "http://127.0.0.1:8000/v1/completions",
    "-H", "content-type: application/json", "-d", '{"model": "chat", "prompt": "a", "max_tokens": 2}',
)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[SystemdHost]:
    """enova installed and enabled as docs/systemd.md says, on a host with one simulated GPU."""
    words = [sys.executable, "-m", "enova_simulator.plan", "--models"]
    models = subprocess.run(words, capture_output=True, check=True, timeout=60).stdout
    with SystemdHost(tmp_path / "host") as booted:
        for unit in (ROOT / "deploy" / "systemd").iterdir():
            booted.install(unit)
        folder = booted.folder / "etc" / "enova"
        folder.mkdir(mode=0o755)
        for name, text in SETTINGS.items():
            (folder / name).write_text(text)
        (folder / "models.json").write_bytes(models)
        users = booted.folder / "etc" / "sysusers.d"
        users.mkdir(exist_ok=True)
        (users / "enova.conf").write_text((ROOT / "deploy" / "sysusers.d" / "enova.conf").read_text())
        booted.run("systemd-sysusers")
        # A hung agent is found sooner than in service, so that the test does not wait.
        dropin = booted.units / "enova-agent.service.d"
        dropin.mkdir(exist_ok=True)
        (dropin / "watchdog.conf").write_text("[Service]\nWatchdogSec=3\n")
        booted.run("systemctl", "daemon-reload")
        booted.run("systemctl", "enable", "enova.target", *SERVICES)
        booted.run("systemctl", "start", "enova.target")
        until(lambda: {booted.state(service) for service in SERVICES} == {"active"}, timeout_s=40, what="all services")
        enova = ("enova", "--api", API)
        booted.run(*enova, "deploy", "meta-llama/Llama-3.1-8B-Instruct", "--name", "chat", "--replicas", "1")
        booted.run(*enova, "wait", "deployment/chat", "--for", "ready", "--timeout", "60s")
        yield booted


def replica(host: SystemdHost) -> dict[str, object]:
    """The one replica, as the API shows it."""
    [value] = json.loads(host.run("enova", "--api", API, "get", "replicas", "-o", "json"))
    assert isinstance(value, dict)
    return value


def engine(host: SystemdHost) -> list[str]:
    """The processes in the engine's cgroup."""
    return host.call("sh", "-c", f"cat {CGROUP}/enova-*/cgroup.procs").stdout.split()


if systemd_works():  # elsewhere these are not collected

    def test_engines_survive_the_agent_and_end_with_the_target(host: SystemdHost) -> None:
        before = engine(host)
        assert str(replica(host)["pid"]) in before, "the engine is in a cgroup of its own"
        host.run(*ASK)

        host.run("systemctl", "restart", "enova-agent")
        assert engine(host) == before
        host.run(*ASK)

        host.run("systemctl", "stop", "enova-agent")
        assert host.state("enova-agent.service") == "inactive"
        assert engine(host) == before
        host.run(*ASK)

        host.run("systemctl", "start", "enova-agent")
        until(lambda: replica(host)["state"] == "READY", timeout_s=20, what=host.story())
        pid = host.main_pid("enova-agent.service")
        host.run("kill", f"-{signal.SIGSTOP.name[3:]}", str(pid))
        watched = lambda: host.main_pid("enova-agent.service") not in {0, pid}  # noqa: E731
        until(watched, timeout_s=30, what="the watchdog to replace the agent that hangs")
        until(lambda: host.state("enova-agent.service") == "active", timeout_s=30, what=host.story())
        assert engine(host) == before
        host.run(*ASK)

        host.run("systemctl", "stop", "enova.target")  # returns once the others' stops are under way
        until(lambda: {host.state(service) for service in SERVICES} == {"inactive"}, timeout_s=60, what=host.story())
        assert engine(host) == []
        assert [pid for pid in before if host.call("kill", "-0", pid).returncode == 0] == []

    def test_engines_end_with_the_target_even_if_no_agent_runs(host: SystemdHost) -> None:
        before = engine(host)
        host.run("systemctl", "stop", "enova-agent")
        assert engine(host) == before != []
        host.run("systemctl", "stop", "enova.target")
        until(lambda: engine(host) == [], what="the cgroups to be killed")
        assert host.call("kill", "-0", before[0]).returncode != 0
