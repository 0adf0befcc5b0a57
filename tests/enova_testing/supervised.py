"""A supervisor over real processes, as an agent has it, short in its patience; and what a test asks of it."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from dataclasses import replace
from pathlib import Path

import aiohttp

from enova_agent import procfs
from enova_agent.core.command import TOKEN_VARIABLE
from enova_agent.core.model import Assignment, Claim, FlagValue, MemberSpec, ReplicaState, ReplicaView
from enova_agent.engine import HttpProbe
from enova_agent.engine_settings import EngineSettings
from enova_agent.host import Notice
from enova_agent.process import LocalProcesses, Processes
from enova_agent.supervisor import Supervisor
from enova_testing.waiting import until_async

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
SIMULATED = (sys.executable, "-m", "enova_simulator.engine", "serve")
# Quick in everything that a test waits for; hang limits are vLLM-sized and shortened by those tests that need it.
QUICK = EngineSettings(
    command=SIMULATED,
    kind="simulated",
    extra_arguments=("--simulated-start-s", "0", "--max-model-len", "2048"),
    tick_s=0.05,
    scrape_interval_s=0.25,
    drain_settle_s=0.1,
    term_timeout_s=3.0,
    restart_initial_s=0.1,
)


def member(name: str = "a", *, gpu: str = "", **configuration: FlagValue) -> MemberSpec:
    """A member that serves the simulated model."""
    return MemberSpec(
        replica=f"deployments/chat/replicas/{name}",
        uid=f"uid-{name}",
        model=MODEL,
        configuration=configuration,
        claims=(Claim(gpu_uuid=gpu),) if gpu else (),
        drain_timeout_s=5.0,
    )


class Supervised:
    """`async with Supervised(folder) as agent:`; leaving the block ends every engine.

    `die()` is what SIGKILL does to an agent: nothing is saved, nothing is told, engines go on.
    """

    def __init__(
        self, folder: Path, settings: EngineSettings = QUICK, *, uid: str = "", processes: Processes | None = None
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.uid = uid or f"node-{secrets.token_hex(4)}"
        self.notices: list[Notice] = []
        self.gpu_utilization: float | None = None  # of every GPU, as the agent reads it
        self._processes = processes or LocalProcesses()
        self._revision = 0
        self._loop_task: asyncio.Task[None] | None = None
        self.supervisor: Supervisor

    async def __aenter__(self) -> Supervised:
        await self.begin()
        return self

    async def __aexit__(self, *error: object) -> None:
        for process in self._processes.found(f"{self.uid}."):
            await until_async(lambda p=process: self._processes.kill_all(p) == 0)  # type: ignore[misc]
        await self.close()
        self._processes.sweep()
        self._processes.sweep()

    async def begin(self) -> None:
        """A new agent over the same folder."""
        self.supervisor = Supervisor(
            settings=self.settings,
            data_dir=self.folder,
            node_uid=self.uid,
            processes=self._processes,
            probe=HttpProbe(),
            on_change=lambda: None,
            on_notice=self.notices.append,
            gpu_utilization=lambda _: self.gpu_utilization,
        )
        await self.supervisor.adopt()
        self._loop_task = asyncio.create_task(self.supervisor.run())

    async def close(self) -> None:
        """The agent ends by SIGTERM."""
        await self._cancel_loop()
        await self.supervisor.close()

    async def die(self) -> None:
        """The agent ends by SIGKILL."""
        journal = self.folder / "engines.json"
        before = journal.read_bytes() if journal.exists() else None
        await self.close()
        if before is not None:
            journal.write_bytes(before)

    async def _cancel_loop(self) -> None:
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
            self._loop_task = None

    def assign(self, *members: MemberSpec) -> None:
        """All that shall run from now on."""
        self._revision += 1
        self.supervisor.apply(Assignment(revision=self._revision, term=1, members=members))

    def view(self, name: str = "a") -> ReplicaView:
        """What the replica is now."""
        return next(v for v in self.supervisor.views() if v.replica == f"deployments/chat/replicas/{name}")

    async def reaches(self, state: ReplicaState, name: str = "a", *, timeout_s: float = 30.0) -> ReplicaView:
        """Waits until the replica is in this state."""
        try:
            await until_async(lambda: self.view(name).state is state, timeout_s=timeout_s)
        except AssertionError as error:
            raise AssertionError(f"not {state} within {timeout_s} s: {self.view(name)}") from error
        return self.view(name)

    async def restarted(self, before: ReplicaView, name: str = "a", *, timeout_s: float = 30.0) -> ReplicaView:
        """Waits until another process serves."""

        def is_new() -> bool:
            view = self.view(name)
            return view.state is ReplicaState.READY and view.pid != before.pid

        await until_async(is_new, timeout_s=timeout_s, what=f"a restart of {before}")
        return self.view(name)

    def living(self) -> list[int]:
        """Every process alive that bears this node's token, looked at from outside."""
        return [
            entry.pid
            for entry in procfs.processes().values()
            if entry.alive and procfs.environment(entry.pid).get(TOKEN_VARIABLE, "").startswith(f"{self.uid}.")
        ]

    def children(self, pid: int) -> list[int]:
        """The processes below `pid`."""
        return sorted(procfs.descendants(procfs.processes(), pid) - {pid})

    def noticed(self, kind: str) -> list[str]:
        """The messages of this kind."""
        return [notice.message for notice in self.notices if notice.kind == kind]


async def complete(endpoint: str, *, max_tokens: int = 4) -> int:
    """The status of one completion."""
    body = {"model": "chat", "prompt": [1, 2, 3], "max_tokens": max_tokens, "ignore_eos": True}
    async with aiohttp.ClientSession() as session, session.post(f"{endpoint}/v1/completions", json=body) as response:
        await response.read()
        return response.status


async def inject(endpoint: str, kind: str, **values: float) -> None:
    """A fault of the simulated engine."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{endpoint}/simulated/fault", json={"kind": kind, **values}) as response,
    ):
        assert response.status == 200, await response.text()


async def gpu_utilization(endpoint: str) -> float:
    """How busy the simulated engine says its GPUs are."""
    async with aiohttp.ClientSession() as session, session.get(f"{endpoint}/simulated/gpu") as response:
        value = await response.json()
        return float(value["gpus"][0]["utilization"])


def with_program(settings: EngineSettings, *words: str) -> EngineSettings:
    """The same, but another program is started."""
    return replace(settings, command=words, extra_arguments=())


def exists(pid: int) -> bool:
    """True if the process is there and no zombie."""
    entry = procfs.stat(pid)
    return entry is not None and entry.alive and pid != os.getpid()
