"""enova-agent as a program: engines outlive it, settings and locks are checked, it says how it is."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from enova.v1 import agent_service_pb2 as wire
from enova.v1 import cluster_pb2
from enova_common import certs
from enova_common.settings import TlsSettings
from enova_testing.agent_process import AgentProcess
from enova_testing.fake_nvml import FakeDriver
from enova_testing.scripted_coordinator import ScriptedCoordinator
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network

READY = cluster_pb2.Replica.STATE_READY
NOBODY = "127.0.0.1:1"

Start = Callable[..., AgentProcess]


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Start]:
    made: list[AgentProcess] = []

    def make(*coordinators: str, **options: object) -> AgentProcess:
        made.append(AgentProcess(tmp_path / "agent", coordinators or (NOBODY,), **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for agent in made:
        agent.end()


@pytest.fixture
async def coordinator() -> AsyncIterator[ScriptedCoordinator]:
    server = ScriptedCoordinator(term=5)
    await server.start()
    yield server
    await server.stop()


def assignment(revision: int = 1, replicas: int = 2) -> wire.ConnectResponse:
    members = [
        wire.AssignedMember(
            replica=f"deployments/d/replicas/r{index}", uid=f"u{index}", desired=wire.AssignedMember.DESIRED_RUN,
            model="tiny", member=cluster_pb2.Member(node="nodes/node-0"), member_count=1, drain_timeout_s=1.0,
        )
        for index in range(replicas)
    ]
    return wire.ConnectResponse(assignment=wire.Assignment(revision=revision, members=members))


def statuses(coordinator: ScriptedCoordinator) -> list[wire.ReplicaStatus]:
    status = coordinator.stream.status if coordinator.streams else None
    return [] if status is None else list(status.replicas)


def pids(coordinator: ScriptedCoordinator) -> set[int]:
    return {replica.pid for replica in statuses(coordinator) if replica.state == READY}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def begin(agent: AgentProcess) -> None:
    await asyncio.to_thread(agent.start)


async def test_engines_run_report_and_outlive_the_agent_which_goes_on_without_a_coordinator(
    coordinator: ScriptedCoordinator, agents: Start
) -> None:
    agent = agents(coordinator.address)
    await begin(agent)
    await until_async(lambda: coordinator.streams and coordinator.stream.status, timeout_s=20.0)
    coordinator.send(assignment())
    await until_async(lambda: len(pids(coordinator)) == 2, timeout_s=30.0)
    engines = pids(coordinator)
    await until_async(
        lambda: coordinator.stream.frames and all(r.running == 100.0 for r in coordinator.stream.frames[-1].replicas)
    )
    frame = coordinator.stream.frames[-1]
    assert {replica.state for replica in frame.replicas} == {"READY"}
    assert len({replica.instance for replica in frame.replicas}) == 2
    assert all(replica.resident_memory_bytes > 5e6 for replica in frame.replicas)
    await coordinator.stop()
    assert await asyncio.to_thread(agent.signal, signal.SIGTERM) == 0
    assert all(alive(pid) for pid in engines)

    victim = max(engines)
    await begin(agent)
    os.kill(victim, signal.SIGKILL)  # nobody but this agent can start it again: no coordinator is there
    await coordinator.start(coordinator.address)
    await until_async(lambda: len(pids(coordinator)) == 2 and victim not in pids(coordinator), timeout_s=30.0)
    assert (engines - {victim}) <= pids(coordinator)
    assert coordinator.stream.hello is not None
    assert coordinator.stream.hello.highest_term == 5


async def test_an_agent_that_was_killed_adopts_its_engines(coordinator: ScriptedCoordinator, agents: Start) -> None:
    agent = agents(coordinator.address)
    await begin(agent)
    await until_async(lambda: coordinator.streams and coordinator.stream.status, timeout_s=20.0)
    coordinator.send(assignment())
    await until_async(lambda: len(pids(coordinator)) == 2, timeout_s=30.0)
    engines = pids(coordinator)
    await asyncio.to_thread(agent.signal, signal.SIGKILL)
    streams = len(coordinator.streams)
    await begin(agent)
    await until_async(lambda: len(coordinator.streams) > streams and len(pids(coordinator)) == 2, timeout_s=20.0)
    assert pids(coordinator) == engines


async def test_stop_engines_ends_all_and_a_restarted_agent_does_not_bring_them_back(
    coordinator: ScriptedCoordinator, agents: Start
) -> None:
    agent = agents(coordinator.address)
    await begin(agent)
    await until_async(lambda: coordinator.streams and coordinator.stream.status, timeout_s=20.0)
    coordinator.send(assignment())
    await until_async(lambda: len(pids(coordinator)) == 2, timeout_s=30.0)
    engines = pids(coordinator)
    done = await asyncio.to_thread(agent.call, "--stop-engines", "--drain-timeout", "1")
    assert (done.returncode, done.stdout) == (0, "")
    assert "2 engines stopped" in done.stderr
    assert not any(alive(pid) for pid in engines)
    await coordinator.stop()
    await asyncio.to_thread(agent.signal, signal.SIGTERM)
    await begin(agent)
    coordinator.streams.clear()
    await coordinator.start(coordinator.address)
    await until_async(lambda: coordinator.streams and coordinator.stream.frames, timeout_s=20.0)
    assert statuses(coordinator) == []


async def test_gpus_of_the_driver_are_in_hello_and_frames(
    coordinator: ScriptedCoordinator, agents: Start, tmp_path: Path
) -> None:
    driver = FakeDriver(tmp_path, gpus=8)
    driver.say("gpu 5 util 64")
    await begin(agents(coordinator.address, settings=(), environment=driver.environment))
    await until_async(lambda: coordinator.streams and coordinator.stream.frames, timeout_s=20.0)
    assert coordinator.stream.hello is not None
    assert len(coordinator.stream.hello.node.gpus) == 8
    assert coordinator.stream.hello.node.gpus[5].memory_bytes == 85_520_809_984
    assert coordinator.stream.frames[-1].gpus[5].utilization == 0.64


async def test_mutual_tls_all_the_way(agents: Start, tmp_path: Path) -> None:
    authority = tmp_path / "ca"
    ca = certs.init_authority(authority)
    server = certs.issue(authority, certs.Role.COORDINATOR, "c0")
    client = certs.issue(authority, certs.Role.AGENT, "node-0")
    coordinator = ScriptedCoordinator()
    tls = TlsSettings(ca=ca.certificate_path, cert=server.certificate_path, key=server.key_path)
    address = await coordinator.start(tls=tls)
    try:
        agent = agents(address, settings=(
            'gpus = "none"',
            f'tls = {{ca = "{ca.certificate_path}", cert = "{client.certificate_path}", key = "{client.key_path}"}}',
        ))
        await begin(agent)
        await until_async(lambda: coordinator.streams and coordinator.stream.frames, timeout_s=20.0)
    finally:
        await coordinator.stop()


def test_plaintext_off_the_loopback_is_refused_with_a_remedy(agents: Start) -> None:
    agent = agents("192.0.2.1:7000")
    done = agent.call()
    assert done.returncode == 1
    assert "tls: refusing to reach 192.0.2.1:7000 in plaintext" in done.stderr
    assert "enova certs issue" in done.stderr


def test_two_agents_on_one_directory_are_refused(agents: Start) -> None:
    agent = agents()
    agent.start()
    second = agent.call()
    assert second.returncode == 1
    assert second.stderr == (
        f"enova-agent: data_dir: another agent uses {agent.folder}/data "
        "(stop it, or give this one another data_dir)\n"
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('nodes = "a"', "nodes: unknown key; did you mean node?"),
        ("frame_interval_s = 0.0", "frame_interval_s: 0.0 is not between 0.1 and 60"),
        ('metrics_listen = "0.0.0.0:9000"', "metrics_listen: must be on the loopback: it is served without TLS"),
        ('gpus = "amd"', "gpus: 'amd' is not one of nvml, none, simulated"),
        ('cluster = "A B"', "cluster: 'A B' is not a name: lower case letters, digits and dashes"),
        ('coordinators = ["here"]', "coordinators: 'here' has no host"),
        ('coordinators = ["127.0.0.1:1", "10.0.0.1:7700"]', "tls: refusing to reach 10.0.0.1:7700 in plaintext"),
    ],
)
def test_a_wrong_setting_is_named_and_nothing_starts(agents: Start, tmp_path: Path, line: str, problem: str) -> None:
    key = line.split(" ", 1)[0]
    agent = agents(settings=())
    kept = [known for known in agent.config.read_text().splitlines() if not known.startswith(f"{key} ")]
    agent.config.write_text("\n".join([line, *kept]))
    done = agent.call()
    assert done.returncode == 1
    assert problem in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "agent" / "data").exists()


def test_files_that_cannot_be_read_are_set_aside_and_the_agent_starts(agents: Start) -> None:
    agent = agents()
    data = agent.folder / "data"
    data.mkdir()
    for name in ("term.json", "assignment.json", "node.json"):
        (data / name).write_bytes(b'{"version": 1, "assign\xff')
    agent.start()
    assert {path.name for path in data.glob("*.corrupt")} == {
        "term.json.corrupt", "assignment.json.corrupt", "node.json.corrupt",
    }


def test_its_own_metrics_are_served_on_the_loopback(agents: Start) -> None:
    ready = agents().start()
    with urllib.request.urlopen(f"http://{ready['metrics_address']}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    assert "enova_agent_session_connected 0.0" in text
    assert "# TYPE enova_agent_frames_sent_total counter" in text


def test_systemd_is_told_ready_fed_and_told_of_the_end(agents: Start, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(path))
        notify.settimeout(10)
        agent = agents(environment={"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "200000", "WATCHDOG_PID": ""})
        agent.environment.pop("WATCHDOG_PID")
        agent.start()
        told = {notify.recv(4096).decode().split("\n")[0] for _ in range(4)}
        assert told == {"READY=1", "WATCHDOG=1"}
        assert agent.signal(signal.SIGTERM) == 0
        while (word := notify.recv(4096).decode()) == "WATCHDOG=1":
            continue
        assert word == "STOPPING=1"
        agent.environment.pop("NOTIFY_SOCKET")


def test_version_is_said(agents: Start) -> None:
    assert agents().call("--version").stdout.startswith("enova-agent 0.")


def test_stop_engines_without_an_agent_says_so(agents: Start) -> None:
    done = agents().call("--stop-engines")
    assert done.returncode == 1
    assert "no agent answers on" in done.stderr
