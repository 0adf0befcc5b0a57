"""Two coordinators on one real etcd, with real agents, ingresses and simulated engines; each a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enova_agent import procfs
from enova_cli.client import Client
from enova_cli.up import plan, settings
from enova_cli.up.layout import DataDirectory
from enova_cli.up.leftovers import remaining
from enova_testing.etcd_observer import EtcdObserver, HostObserver, Leader
from enova_testing.stoppable_coordinator import ORDER_VARIABLE
from enova_testing.waiting import until

READY_TIMEOUT_S = 60.0  # a dozen programs start at the same time on two cores
STOP_TIMEOUT_S = 20.0
TIME_SCALE = 20.0
MODEL = "meta-llama/Llama-3.1-8B-Instruct"


class Program:
    """One program with a settings file, started again at will."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], log: Path, ready_file: Path) -> None:
        self.log = log
        self.facts: dict[str, Any] = {}
        self._argv = list(argv)
        self._environment = dict(environment)
        self._ready_file = ready_file
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def stopped(self) -> bool:
        """Whether the kernel says that it is stopped."""
        found = procfs.stat(self.pid)
        return found is not None and found.stopped

    def launch(self) -> None:
        """Start it without waiting."""
        self._ready_file.unlink(missing_ok=True)
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(self._argv, env=self._environment, stdout=output, stderr=output)

    def ready(self) -> bool:
        """Whether it serves."""
        assert self._process is not None
        assert self._process.poll() is None, f"it ended: {self.log.read_text()[-2000:]}"
        if not self._ready_file.exists():
            return False
        self.facts = json.loads(self._ready_file.read_text())
        return True

    def start(self) -> None:
        """Start it, and wait until it serves."""
        self.launch()
        until(self.ready, timeout_s=READY_TIMEOUT_S, what=f"ready: {self.log}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Wait for its end; its exit code."""
        assert self._process is not None
        return self._process.wait(STOP_TIMEOUT_S)

    def end(self) -> None:
        """End it, whatever state it is in."""
        if self._process is None or self._process.poll() is not None:
            return
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSettings:
    """What a test wants of a fleet."""

    etcd: Sequence[str]
    """Where each coordinator finds etcd: endpoints, separated by commas."""
    observed: str
    """The endpoint at which the observer finds it."""
    ttl_s: int = 2
    nodes: int = 1
    stoppable: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


class PairFleet:
    """Coordinators a and b, nodes node-0 and so on, and who looks at them from outside."""

    def __init__(self, directory: Path, wanted: PairSettings) -> None:
        self.directory = directory
        self.data = DataDirectory(directory / "data")
        self.data.acquire()
        self.addresses = dict(zip("ab", (f"127.0.0.1:{port}" for port in _free_ports(2)), strict=True))
        options = plan.UpOptions(
            nodes=wanted.nodes,
            gpu_type="H100",
            gpus_per_node=4,
            engine="simulated",
            engine_command=(),
            engine_arguments=(),
            data_dir=self.data.path,
            port=0,
            openai_port=0,
            store="etcd",
            time_scale=TIME_SCALE,
        )
        clock = {"epoch_s": time.time(), "time_scale": TIME_SCALE}
        self.data.write_json("clock.json", clock)
        environment = plan.environment(options, os.environ, token=self.data.token, epoch_s=clock["epoch_s"])
        self._environment = environment | dict(wanted.environment)
        self.coordinators = {
            name: self._coordinator(name, endpoint, wanted) for name, endpoint in zip("ab", wanted.etcd, strict=True)
        }
        self.agents: dict[str, Program] = {}
        self.ingresses: dict[str, Program] = {}
        gpu = settings.gpu_facts(options)
        for node in options.node_names():
            self._node(options, node, gpu)
        self.etcd = EtcdObserver(wanted.observed)
        self.host = HostObserver({node: self.agent_data(node) for node in self.agents})

    def agent_data(self, node: str) -> Path:
        """Where an agent keeps its files."""
        return self.data.node_path(node) / "agent"

    def start(self) -> None:
        """Start everything, and wait until somebody leads."""
        programs = [*self.coordinators.values(), *self.agents.values(), *self.ingresses.values()]
        for program in programs:
            program.launch()
        for program in programs:
            until(program.ready, timeout_s=READY_TIMEOUT_S, what=f"ready: {program.log}")
        until(lambda: self.etcd.leader, timeout_s=READY_TIMEOUT_S, what="a leader")

    def stop(self) -> None:
        """End everything; nothing may be left."""
        for node, agent in self.agents.items():
            agent.send(signal.SIGCONT)
            config = self.data.node_path(node) / "agent.toml"
            subprocess.run(
                [plan.program("enova-agent"), "--config", str(config), "--stop-engines", "--drain-timeout", "0"],
                env=self._environment, capture_output=True, timeout=60, check=False,
            )  # fmt: skip
        for program in (*self.agents.values(), *self.ingresses.values(), *self.coordinators.values()):
            program.end()
        self.etcd.close()
        self.host.close()
        until(lambda: not remaining(self.data.path), what=f"processes left: {remaining(self.data.path)}")
        self.data.release()

    def leader(self) -> Leader:
        """Who leads by etcd; fails where nobody does within a while."""
        found = until(lambda: self.etcd.leader, timeout_s=20.0, what="a leader")
        assert isinstance(found, Leader)
        return found

    @contextlib.asynccontextmanager
    async def client(self, *names: str) -> AsyncIterator[Client]:
        """The command line's client, given these coordinators; both if none is named."""
        async with Client([self.addresses[name] for name in names or ("a", "b")], None) as client:
            yield client

    def order(self, name: str, **order: object) -> None:
        """Tell a stoppable coordinator where to stop."""
        path = self._order_file(name)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"subject": "", "skip": 0} | order))
        partial.replace(path)

    def withdraw(self, name: str) -> None:
        """Take an order back that was not met."""
        self._order_file(name).unlink(missing_ok=True)

    def reports(self, name: str, **wanted: object) -> list[dict[str, Any]]:
        """What a stoppable coordinator said of its orders."""
        path = self._order_file(name).with_suffix(".reports")
        lines = path.read_text().splitlines() if path.exists() else []
        reports = [json.loads(line) for line in lines]
        return [report for report in reports if wanted.items() <= report.items()]

    def logs(self) -> str:
        """The ends of all programs' logs, for a failing test."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.directory.glob("*.log"))
        )

    def _order_file(self, name: str) -> Path:
        return self.directory / f"{name}.order"

    def _coordinator(self, name: str, endpoints: str, wanted: PairSettings) -> Program:
        ready = self.directory / f"{name}.ready.json"
        value = {
            "name": name,
            "listen": self.addresses[name],
            "data_dir": str(self.directory / name),
            "ready_file": str(ready),
            "leader_ttl_s": wanted.ttl_s,
            "store": {"kind": "etcd", "endpoints": endpoints.split(",")},
        }
        config = self.data.write_toml(self.directory / f"{name}.toml", value)
        module = "enova_testing.stoppable_coordinator" if wanted.stoppable else "enova_coordinator"
        environment = self._environment | {ORDER_VARIABLE: str(self._order_file(name))}
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
        argv = [sys.executable, "-m", module, "--config", str(config)]
        return Program(argv, environment, self.directory / f"{name}.log", ready)

    def _node(self, options: plan.UpOptions, node: str, gpu: Mapping[str, Any]) -> None:
        folder = self.data.node_path(node)
        ready = self.directory / f"agent-{node}.ready.json"
        value = settings.agent(options, self.data, node, self.addresses["a"], gpu, ready)
        value |= {"coordinators": list(self.addresses.values()), "heartbeat_timeout_s": 2.0, "reconnect_maximum_s": 1.0}
        argv = [plan.program("enova-agent"), "--config", str(self.data.write_toml(folder / "agent.toml", value))]
        self.agents[node] = Program(argv, self._environment, self.directory / f"agent-{node}.log", ready)
        ready = self.directory / f"ingress-{node}.ready.json"
        value = settings.ingress(options, self.data, node, {}, ready)
        argv = [plan.program("enova-ingress"), "--config", str(self.data.write_toml(folder / "ingress.toml", value))]
        self.ingresses[node] = Program(argv, self._environment, self.directory / f"ingress-{node}.log", ready)


@contextlib.contextmanager
def running_pair(directory: Path, wanted: PairSettings) -> Iterator[PairFleet]:
    """A fleet, started, until the block ends."""
    directory.mkdir(parents=True)
    fleet = PairFleet(directory, wanted)
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.stop()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]
