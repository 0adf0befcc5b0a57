"""A child process that stands for vLLM's EngineCore: stopped, nothing progresses; killed, the engine is dead.

It computes nothing and only waits for its parent to go, so it is a shell that reads from a pipe.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

NAME = "VLLM::EngineCore"
# The signals that end the API server go to the whole group; the core outlives them, as it does while it drains.
# The name in /proc/PID/comm holds 15 characters.
_SCRIPT = "trap '' TERM INT HUP; printf %s VLLM::EngineCor > /proc/$$/comm; read -r _"


class CoreProcess:
    """The child, as its parent sees it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([NAME, "-c", _SCRIPT], executable="/bin/sh", stdin=subprocess.PIPE)
        self.pid = self._process.pid
        self._stat = Path(f"/proc/{self.pid}/stat")

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    @property
    def is_stopped(self) -> bool:
        """Whether it is halted by SIGSTOP (or a tracer)."""
        try:
            state = self._stat.read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True  # gone: whoever asks for progress gets none
        return state in {"T", "t"}

    def kill(self) -> None:
        """End it and reap it."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
