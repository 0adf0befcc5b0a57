"""The real coordinator as a process, for tests: started on a free port, asked over gRPC, ended for sure."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from enova_testing.waiting import until

READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0


@dataclass(slots=True)
class CoordinatorProcess:
    """A running enova-coordinator."""

    process: subprocess.Popen[bytes]
    address: str
    metrics_address: str
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def figures(self) -> dict[str, float]:
        """Its own /metrics: values by name with labels."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def policy_child(self) -> int:
        """The pid of the process that its policies run in; 0 while there is none."""
        return self.child("policies")

    def child(self, work: str) -> int:
        """The pid of its child for one kind of work; 0 while there is none."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return next((int(pid) for pid in children if _command(int(pid)).endswith(f"\0{work}\0".encode())), 0)


def _command(pid: int) -> bytes:
    with contextlib.suppress(FileNotFoundError):  # it ended between the listing and here
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@dataclass(slots=True)
class Config:
    """What a test wants of the coordinator beside the defaults: lines of TOML, variables of the environment."""

    settings: Mapping[str, object] = field(default_factory=dict)
    scaling: Mapping[str, object] = field(default_factory=dict)
    advice: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


def _toml(values: Mapping[str, object]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


@contextlib.contextmanager
def running_coordinator(directory: Path, config: Config | None = None) -> Iterator[CoordinatorProcess]:
    """A coordinator on a SQLite store in `directory`, until the block ends."""
    config = config or Config()
    directory.mkdir(parents=True, exist_ok=True)
    ready, log = directory / "ready.json", directory / "coordinator.log"
    ready.unlink(missing_ok=True)
    settings = {
        "name": "coordinator-0",
        "listen": "127.0.0.1:0",
        "data_dir": str(directory / "data"),
        "ready_file": str(ready),
    } | dict(config.settings)
    path = directory / "coordinator.toml"
    tables = {"scaling": config.scaling, "advice": config.advice}
    path.write_text(_toml(settings) + "".join(f"[{name}]\n{_toml(values)}" for name, values in tables.items()))
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "enova_coordinator", "--config", str(path)],
            env={**os.environ, **config.environment},
            stdout=output,
            stderr=output,
        )
    try:
        until(
            lambda: ready.exists() or process.poll() is not None,
            timeout_s=READY_TIMEOUT_S,
            what=f"the coordinator is ready, see {log}",
        )
        assert process.poll() is None, log.read_text()
        facts = json.loads(ready.read_text())
        running = CoordinatorProcess(process, facts["api_address"], facts["metrics_address"], log)
        until(lambda: running.figures()["enova_coordinator_leading"], what="it leads: nobody else can")
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
