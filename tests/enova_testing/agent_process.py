"""The real enova-agent as a process, with settings in a folder of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from enova_testing.waiting import until

ENGINE = Path(__file__).with_name("exposition_engine.py")


class AgentProcess:
    """One agent. `settings` are lines of TOML before the tables, `engine` lines of the table [engine]."""

    def __init__(
        self,
        folder: Path,
        coordinators: Sequence[str],
        *,
        settings: Sequence[str] = ('gpus = "none"',),
        engine: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.config = folder / "agent.toml"
        self.environment = {**os.environ, **(environment or {})}
        self.log = folder / "agent.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.config.write_text(
            "\n".join(
                [
                    'node = "node-0"',
                    f"coordinators = {json.dumps(list(coordinators))}",
                    f'data_dir = "{folder}/data"',
                    f'ready_file = "{folder}/ready.json"',
                    "heartbeat_interval_s = 0.2",
                    "heartbeat_timeout_s = 2.0",
                    "frame_interval_s = 0.2",
                    "reconnect_maximum_s = 0.5",
                    *settings,
                    "[engine]",
                    f'command = ["{sys.executable}", "{ENGINE}"]',
                    *engine,
                    "",
                ]
            )
        )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> dict[str, Any]:
        """Starts it; what its ready file says."""
        ready = self.folder / "ready.json"
        ready.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "enova_agent", "--config", str(self.config)], env=self.environment, stderr=log
            )
        until(lambda: ready.exists() or self._ended(), timeout_s=30.0, what=f"the agent is ready: {self.log}")
        assert ready.exists(), self.log.read_text()
        value: dict[str, Any] = json.loads(ready.read_text())
        return value

    def _ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def signal(self, number: signal.Signals) -> int:
        """Sends a signal that ends it; its exit code."""
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(timeout=20)

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs enova-agent with other words on the same settings."""
        return subprocess.run(
            [sys.executable, "-m", "enova_agent", "--config", str(self.config), *words],
            env=self.environment, capture_output=True, text=True, timeout=60, check=False,
        )

    def end(self) -> None:
        """Ends its engines, then the agent, whatever state they are in."""
        if self._process is None:
            return
        if self._process.poll() is not None:
            self.start()  # an agent that is gone left engines, as it must: a new one ends them
        self.call("--stop-engines", "--drain-timeout", "0")
        self.signal(signal.SIGTERM)
