"""A candidate process as a test sees it: what it reported, what it is told, when it is stopped."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

TESTS = Path(__file__).parents[1]


@dataclass
class CandidateProcess:
    """One candidate in its own process."""

    name: str
    process: asyncio.subprocess.Process
    reports: list[dict[str, Any]] = field(default_factory=list)
    _reader: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, name: str, *, prefix: str, endpoint: str, ttl_s: int) -> Self:
        """Start it; it stands for election at once."""
        argument = json.dumps({"name": name, "prefix": prefix, "endpoint": endpoint, "ttl_s": ttl_s})
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "enova_testing.candidate",
            argument,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(TESTS)},
        )
        made = cls(name, process)
        made._reader = asyncio.create_task(made._read())
        return made

    async def report(self, timeout_s: float, **wanted: object) -> dict[str, Any]:
        """The first report, of those already here and those to come, that has these values."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    for found in self.reports:
                        if wanted.items() <= found.items():
                            return found
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"{self.name} never reported {wanted}; it said {self.reports[-10:]}") from None

    @property
    def term(self) -> int:
        """The term in which it leads, by its own account; 0 if it does not."""
        terms = [said for said in self.reports if said["event"] in ("leading", "ended")]
        return int(terms[-1]["term"]) if terms and terms[-1]["event"] == "leading" else 0

    def order(self, **values: object) -> None:
        """Tell it what to do in its next round."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(values).encode() + b"\n")

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    async def stopped(self, timeout_s: float) -> None:
        """Wait until the kernel says that it is stopped."""
        async with asyncio.timeout(timeout_s):
            while " T " not in Path(f"/proc/{self.process.pid}/stat").read_text()[:64]:
                await asyncio.sleep(0.005)

    async def end(self) -> None:
        """SIGKILL, if it still runs."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        if self._reader is not None:
            await self._reader

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.reports.append(json.loads(line))
