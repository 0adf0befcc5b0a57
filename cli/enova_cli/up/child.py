"""One of the programs that `enova up` runs: started, awaited, restarted when it dies, ended on request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enova_common.backoff import Backoff
from enova_common.errors import FatalError, TimedOut

READY_TIMEOUT_S = 30.0
READY_POLL_S = 0.05
TERM_TIMEOUT_S = 10.0  # then KILL; the programs end within a second when nothing hangs
STEADY_S = 30.0  # a program that ran so long was well: its next restart is a first one
RESTART = Backoff(initial_s=0.2, maximum_s=10.0, jitter=0.2)
LOG_TAIL_LINES = 4
LOG_READ_BYTES = 1 << 20  # a program that fails to start says less

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Child:
    """A supervised program.

    It is ready when it has written `ready_file`, or, for programs that are not ours, when `listening` says so.
    """

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    log_path: Path
    ready_file: Path
    listening: Callable[[], bool] | None = None
    on_change: Callable[[], None] = field(default=lambda: None)
    restarts: int = 0
    _process: asyncio.subprocess.Process | None = None
    _keeper: asyncio.Task[None] | None = None
    _spawning: asyncio.Task[None] | None = None
    _log_start: int = 0  # where the words of the process that runs now begin

    @property
    def pid(self) -> int:
        """Of the process that runs now, or ran last; 0 before the first."""
        return self._process.pid if self._process is not None else 0

    @property
    def kept(self) -> bool:
        """Whether it is restarted when it dies: from its first readiness until it is stopped."""
        return self._keeper is not None and not self._keeper.done()

    async def start(self) -> Mapping[str, Any]:
        """Start it, wait until it is ready, keep it running from then on; what its ready file says."""
        try:
            process = await self._begin()
        except OSError as error:
            message = f"{self.name} cannot be started: {error.strerror or error}"
            raise FatalError(message, reason="START_FAILED", remedy=f"see that {self.argv[0]} can run") from error
        facts = await self._ready(process)
        self._keeper = asyncio.create_task(self._keep(), name=f"keep-{self.name}")
        return facts

    async def stop(self) -> None:
        """TERM, then KILL after a deadline; returns when it is gone, whether or not its start had succeeded."""
        if self._keeper is not None:
            self._keeper.cancel()
        if self._spawning is not None:
            # A process that is just being made is waited for: nobody else would know of it.
            with contextlib.suppress(OSError):  # none was made
                await self._spawning
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), TERM_TIMEOUT_S)
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await self._process.wait()

    def ready_facts(self) -> Mapping[str, Any] | None:
        """What the ready file of the running process says; None while it is not ready."""
        if self.listening is not None:
            return {} if self.listening() else None
        try:
            facts: dict[str, Any] = json.loads(self.ready_file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return facts if facts.get("pid") == self.pid else None

    async def _begin(self) -> asyncio.subprocess.Process:
        """A new process, known to us even if this is cancelled while it is made. Raises OSError."""
        self._spawning = asyncio.create_task(self._spawn(), name=f"spawn-{self.name}")
        await asyncio.shield(self._spawning)
        assert self._process is not None
        return self._process

    async def _spawn(self) -> None:
        self.ready_file.unlink(missing_ok=True)
        with self.log_path.open("ab") as words:
            self._log_start = words.tell()
            # A session of its own: the terminal's Ctrl-C reaches `up` alone, which then ends them in order.
            self._process = await asyncio.create_subprocess_exec(
                *self.argv,
                env=dict(self.environment),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                start_new_session=True,
            )

    async def _ready(self, process: asyncio.subprocess.Process) -> Mapping[str, Any]:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            facts = self.ready_facts()
            if facts is not None:
                return facts
            if process.returncode is not None:
                message = f"{self.name} ended with {process.returncode} before it was ready: {self._log_tail()}"
                raise FatalError(message, reason="START_FAILED", remedy=f"see {self.log_path}")
            await asyncio.sleep(READY_POLL_S)
        message = f"{self.name} was not ready within {READY_TIMEOUT_S:g} s"
        raise TimedOut(message, reason="START_TIMED_OUT", remedy=f"see {self.log_path}")

    async def _keep(self) -> None:
        """Restart it whenever it ends, for as long as it takes."""
        attempt = 0
        started = time.monotonic()
        while self._process is not None:
            await self._process.wait()
            attempt = 0 if time.monotonic() - started > STEADY_S else attempt + 1
            await asyncio.sleep(RESTART.delay_s(attempt, random.random()))  # noqa: S311 - jitter
            started = time.monotonic()
            try:
                await self._begin()
            except OSError as error:  # no descriptors, no space, the program replaced: that may pass
                log.warning("%s cannot be restarted, trying on: %s", self.name, error)
                continue
            self.restarts += 1
            self.on_change()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):  # it ended in this very moment
            self._process.send_signal(number)

    def _log_tail(self) -> str:
        """The last things that it said: of JSON lines the messages, of others the text."""
        with self.log_path.open("rb") as words:
            # A log that was emptied meanwhile is shorter than where these words began.
            words.seek(self._log_start if self._log_start <= self.log_path.stat().st_size else 0)
            lines = words.read(LOG_READ_BYTES).decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return " | ".join(_message(line) for line in lines)


def _message(line: str) -> str:
    try:
        return str(json.loads(line)["message"])
    except (ValueError, KeyError, TypeError):
        return line
