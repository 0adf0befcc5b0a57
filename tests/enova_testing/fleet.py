"""A whole fleet for tests: `enova up` as a process, and the enova command against it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enova_cli.up.leftovers import remaining
from enova_testing.waiting import until

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 150.0
ENOVA = Path(sys.executable).parent / "enova"
MODEL = "meta-llama/Llama-3.1-8B-Instruct"


@dataclass(slots=True)
class Result:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        """What it printed, as JSON."""
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, str]:
        """The one JSON object on stderr."""
        error: dict[str, str] = json.loads(self.err.strip().splitlines()[-1])
        return error


@dataclass(slots=True)
class UpFleet:
    """A running `enova up`."""

    process: subprocess.Popen[str]
    facts: dict[str, Any]
    data_dir: Path
    environment: dict[str, str] = field(default_factory=dict)

    def enova(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S, stdin: str | None = None) -> Result:
        """Run the command against this fleet."""
        return run_enova(*arguments, api=self.facts["api"], timeout_s=timeout_s, stdin=stdin)

    def ok(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> Any:
        """Run a command that must succeed, with -o json; what it printed, if it printed JSON."""
        result = self.enova(*arguments, "-o", "json", timeout_s=timeout_s)
        assert result.code == 0, (
            f"enova {' '.join(arguments)}: {result.code}\n{result.out}\n{result.err}\n{self.logs()}"
        )
        return result.value if result.out.strip() else None

    @property
    def openai(self) -> str:
        """The OpenAI base URL."""
        return str(self.facts["openai"])

    def pids(self) -> dict[str, Any]:
        """The pids that up.json says now."""
        pids: dict[str, Any] = json.loads((self.data_dir / "up.json").read_text())["pids"]
        return pids

    def deploy(self, name: str = "chat", *, replicas: int = 1, **configuration: object) -> dict[str, Any]:
        """Deploy the small model of the catalogue and wait until it is ready."""
        settings = [f"--set={key}={value}" for key, value in ({"max_model_len": 4096} | configuration).items()]
        self.ok("deploy", MODEL, "--name", name, "--replicas", str(replicas), *settings)
        ready: dict[str, Any] = self.ok("wait", f"deployment/{name}", "--for", "ready", "--timeout", "60s")
        return ready

    def replicas(self, name: str = "chat") -> list[dict[str, Any]]:
        """The replicas of a deployment."""
        return [r for r in self.ok("get", "replicas") if r["deployment"] == f"deployments/{name}"]

    def stop(self) -> int:
        """End it as a person would; its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(STOP_TIMEOUT_S)

    def left(self) -> list[str]:
        """Processes of this fleet that are still there, engines included."""
        return remaining(self.data_dir)

    def logs(self) -> str:
        """The ends of all programs' logs, for a failing test."""
        paths = sorted((self.data_dir / "logs").glob("*.log"))
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]) for path in paths
        )


def run_enova(
    *arguments: str, api: str = "127.0.0.1:1", timeout_s: float = COMMAND_TIMEOUT_S, stdin: str | None = None
) -> Result:
    """Run the enova command."""
    done = subprocess.run(
        [str(ENOVA), *arguments],
        env={**os.environ, "ENOVA_API": api, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        input=stdin,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@contextlib.contextmanager
def up(data_dir: Path, *arguments: str) -> Iterator[UpFleet]:
    """`enova up -o json` with free ports, until the block ends; then nothing of it may be left."""
    fleet = start_up(data_dir, arguments)
    try:
        yield fleet
    finally:
        if fleet.process.poll() is None:
            fleet.process.send_signal(signal.SIGINT)
            try:
                fleet.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                fleet.process.kill()
                fleet.process.wait()
        with contextlib.suppress(FileNotFoundError):
            until(lambda: not fleet.left(), timeout_s=10.0, what=f"processes left: {fleet.left()}\n{fleet.logs()}")


def start_up(data_dir: Path, arguments: Sequence[str] = ()) -> UpFleet:
    """Start `enova up` and wait for its line."""
    log = (data_dir.parent / f"{data_dir.name}.up.log").open("w")
    process = subprocess.Popen(
        [str(ENOVA), "up", "--data-dir", str(data_dir), "--port", "0", "--openai-port", "0", "-o", "json", *arguments],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    log.close()
    assert process.stdout is not None
    deadline = time.monotonic() + READY_TIMEOUT_S
    ready, _, _ = select.select([process.stdout], [], [], deadline - time.monotonic())
    line = process.stdout.readline() if ready else ""
    process.stdout.close()  # one line is all that comes
    fleet = UpFleet(process, json.loads(line) if line else {}, data_dir)
    if not line:
        process.kill()
        process.wait()
        error = (data_dir.parent / f"{data_dir.name}.up.log").read_text()
        raise AssertionError(f"enova up printed no line: {error}\n{fleet.logs()}")
    return fleet
