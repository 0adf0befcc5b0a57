"""`enova-agent`: the composition root. Reads settings, wires the parts, runs until a signal; engines outlive it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from enova_agent import convert
from enova_agent.core.hub import hub_cache
from enova_agent.core.local import (
    EnginesStopped,
    HeldUpdate,
    LengthsUpdate,
    StopEngines,
    SummariesUpdate,
    decode,
    encode,
)
from enova_agent.disk import AssignmentFile, TermFile, boot_id, locked, node_uid, replace_file
from enova_agent.engine import HttpProbe
from enova_agent.frames import FrameBuffer, FrameMaker
from enova_agent.gpu import NoGpus, NvmlGpus, engine_sessions
from enova_agent.local_server import LocalServer
from enova_agent.node import EngineFigures, FrameBeat, ModelSources, Node, NodeIdentity
from enova_agent.observability import AgentCollector, MetricsServer, Sources
from enova_agent.process import LocalProcesses
from enova_agent.session import Session, SessionSettings
from enova_agent.settings import PREFIX, AgentSettings, GpuSource
from enova_agent.simulated_gpu import SimulatedGpus
from enova_agent.supervisor import Supervisor
from enova_common.backoff import Backoff
from enova_common.clock import ModelClock, clock_from_environment
from enova_common.errors import EnovaError, Unavailable
from enova_common.logs import configure, log_context
from enova_common.notify import Notifier, keep_watchdog
from enova_common.rpc import error_from_rpc, open_channel
from enova_common.settings import load_settings

STOP_TIMEOUT_S = 60.0         # of --stop-engines beyond the drain itself
INGRESS_PATIENCE_S = 2.0      # how long the first Hello waits for the ingress, whose addresses it bears
THREADS_MAX = 4               # for /proc, disks and forks: short calls, and each thread has its memory
_MALLOC_ARENAS = -8           # M_ARENA_MAX of mallopt(3)
STALL_S = 10.0                # a loop that made no frame for so long beyond its interval is not healthy

log = logging.getLogger(__name__)


class Agent:
    """All parts of one agent, wired."""

    def __init__(self, settings: AgentSettings, clock: ModelClock) -> None:
        data_dir = settings.data_dir
        uid = node_uid(data_dir / "node.json")
        self._settings = settings
        self._addresses: tuple[str, str] = ("", "")
        self._ingress_seen = asyncio.Event()
        self._notifier = Notifier.from_environment()
        self.buffer = FrameBuffer()
        self.terms = TermFile(data_dir / "term.json")
        self.local = LocalServer(
            settings.socket_path,
            node=settings.node,
            on_change=self._changed,
            on_held=self._held,
            on_summaries=self._summaries,
            on_lengths=self._lengths,
            stop_engines=self._stop_engines,
        )
        cgroup = Path(settings.engine.cgroup) if settings.engine.cgroup else None
        self.supervisor = Supervisor(
            settings=settings.engine,
            data_dir=data_dir,
            node_uid=uid,
            processes=LocalProcesses(cgroup=cgroup, session_nice=settings.engine.session_nice),
            probe=HttpProbe(),
            on_change=self._changed,
            gpu_types=lambda: {facts.uuid: facts.type for facts in self.gpus.describe()},
            gpu_utilization=self._gpu_utilization,
        )
        self.gpus: NvmlGpus | SimulatedGpus | NoGpus = self._gpu_source()
        self.node = Node(
            NodeIdentity(
                name=settings.node,
                uid=uid,
                cluster=settings.cluster,
                labels=settings.labels,
                boot_id=boot_id(),
                agent_version=version("enova"),
                engine=settings.engine.kind,
            ),
            supervisor=self.supervisor,
            gpus=self.gpus,
            local=self.local,
            assignments=AssignmentFile(data_dir / "assignment.json"),
            models=ModelSources(
                roots=settings.model_roots,
                catalogue=settings.simulated_models,
                allow_downloads=settings.engine.allow_downloads,
                hub_cache=_hub_cache(settings),
            ),
        )
        instance = uuid.uuid4().hex
        self.maker = FrameMaker(
            node=f"nodes/{settings.node}",
            boot=instance,
            gpus=self.gpus,
            engines=EngineFigures(self.supervisor, agent_instance=instance[:8], agent_start_s=time.time()),
            model_time_s=clock.now,
            monotonic_s=time.monotonic,
        )
        self.beat = FrameBeat(self._make_frame, self._frame_interval_s)
        self.session = self._session(instance)
        self.metrics = MetricsServer(self._collector())

    async def run(self, stop: asyncio.Event) -> None:
        """Runs until `stop`; whatever part fails first ends the agent, and systemd starts it anew."""
        await self.supervisor.adopt()
        if isinstance(self.gpus, NvmlGpus):
            await asyncio.to_thread(self.gpus.start)
        self.node.resume()
        await self.local.start()
        metrics = await self.metrics.start(self._settings.metrics_listen) if self._settings.metrics_listen else ""
        self._changed()
        watchdog = keep_watchdog(self._notifier, healthy=self._healthy)
        parts = (self.supervisor.run(), self.beat.run(), self._talk(), watchdog, *self._gpu_parts())
        tasks = [asyncio.create_task(part) for part in parts]
        stopping = asyncio.create_task(stop.wait())
        try:
            self._say_ready(metrics)
            _quiet_collector()
            await self._until_one_fails(tasks, stopping)
        finally:
            self._notifier.stopping()
            for task in (*tasks, stopping):
                task.cancel()
            await asyncio.gather(*tasks, stopping, return_exceptions=True)
            await self.local.close()
            await self.metrics.close()
            await self.supervisor.close()
            if isinstance(self.gpus, NvmlGpus):
                self.gpus.close()

    def _session(self, instance: str) -> Session:
        settings = self._settings
        return Session(
            SessionSettings(
                endpoints=settings.coordinators,
                instance=instance,
                heartbeat_interval_s=settings.heartbeat_interval_s,
                heartbeat_timeout_s=settings.heartbeat_timeout_s,
                backoff=Backoff(initial_s=settings.reconnect_initial_s, maximum_s=settings.reconnect_maximum_s),
            ),
            node=self.node,
            terms=self.terms,
            frames=self.buffer,
            open_channel=lambda endpoint: open_channel(endpoint, settings.tls),
            error_of=error_from_rpc,
            loop_lag_s=lambda: self.beat.lag_s,
            draw=random.random,
        )

    def _collector(self) -> AgentCollector:
        return AgentCollector(
            Sources(
                session=self.session.figures,
                buffer=self.buffer,
                term=lambda: self.terms.highest,
                views=self.supervisor.views,
                gpus=lambda: len(self.gpus.describe()),
                missed_gpu_rounds=lambda: self.gpus.missed_rounds if isinstance(self.gpus, NvmlGpus) else 0,
                ingress_connected=lambda: self.local.ingress is not None,
                loop_lag_s=lambda: self.beat.lag_s,
            )
        )

    def _gpu_source(self) -> NvmlGpus | SimulatedGpus | NoGpus:
        settings = self._settings
        match settings.gpus:
            case GpuSource.NVML:
                return NvmlGpus(is_ours=engine_sessions(lambda: {view.pid for view in self.supervisor.views()}))
            case GpuSource.SIMULATED:
                return SimulatedGpus(
                    settings.simulated_gpus,
                    endpoints=lambda: [view.endpoint for view in self.supervisor.views()],
                    interval_s=settings.frame_interval_s,
                )
            case GpuSource.NONE:
                return NoGpus()

    def _gpu_parts(self) -> tuple[Coroutine[Any, Any, None], ...]:
        return (self.gpus.run(),) if isinstance(self.gpus, SimulatedGpus) else ()

    async def _talk(self) -> None:
        """The session; it begins when the ingress has said where it serves, or after a while without."""
        with contextlib.suppress(TimeoutError):  # then without; the stream is opened anew when it comes
            async with asyncio.timeout(INGRESS_PATIENCE_S):
                await self._ingress_seen.wait()
        await self.session.run()

    async def _until_one_fails(self, tasks: Iterable[asyncio.Task[Any]], stopping: asyncio.Task[Any]) -> None:
        pending = {*tasks, stopping}
        while not stopping.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises what ended it; the watchdog's task just ends where nobody watches

    def _say_ready(self, metrics: str) -> None:
        settings = self._settings
        self._notifier.ready(f"node {settings.node}")
        if settings.ready_file is not None:
            ready = {
                "pid": os.getpid(),
                "node": settings.node,
                "socket": str(settings.socket_path),
                "metrics_address": metrics,
            }
            replace_file(settings.ready_file, json.dumps(ready).encode())

    def _healthy(self) -> bool:
        """Whether frames are made: a loop that turns without doing its work is not alive."""
        return self.beat.late_s < STALL_S

    def _frame_interval_s(self) -> float:
        return self.session.frame_interval_s or self._settings.frame_interval_s

    def _make_frame(self) -> None:
        frame = self.maker.make(self.local.held)
        self.buffer.append(convert.frame_request(frame), end_s=frame.end_s)
        self.session.notify()

    def _changed(self) -> None:
        """Engines or ingresses changed: each side is told what the other is."""
        self.local.set_engines(self.supervisor.local_engines())
        ingress = self.local.ingress
        if ingress is not None and self._addresses != (ingress.openai_address, ingress.hop_address):
            self._addresses = (ingress.openai_address, ingress.hop_address)
            self._ingress_seen.set()
            self.session.reopen()
        self.session.notify()

    def _held(self, update: HeldUpdate | None) -> None:
        self.supervisor.held(update)

    def _summaries(self, update: SummariesUpdate) -> None:
        self.maker.add_summaries(update.summaries, start_s=update.start_s)

    def _lengths(self, update: LengthsUpdate) -> None:
        self.maker.add_lengths(update.samples)

    async def _stop_engines(self, drain_timeout_s: float) -> int:
        return await self.node.stop_engines(drain_timeout_s)

    def _gpu_utilization(self, uuids: tuple[str, ...]) -> float | None:
        """The busiest of some GPUs, by readings that are fresh."""
        known = [
            sample.utilization
            for sample in self.gpus.sample()
            if sample.uuid in uuids and sample.utilization is not None and sample.age_s < 3.0
        ]
        return max(known, default=None)


async def stop_engines(socket: Path, drain_timeout_s: float) -> int:
    """Asks the agent behind `socket` to end all engines; how many it ended."""
    try:
        async with asyncio.timeout(drain_timeout_s + STOP_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            writer.write(encode(StopEngines(drain_timeout_s=drain_timeout_s)))
            while line := await reader.readline():
                match decode(line):
                    case EnginesStopped(stopped=stopped):
                        writer.close()
                        return stopped
                    case _:
                        continue
    except OSError as error:
        raise Unavailable(f"no agent answers on {socket}: {error}", remedy="is enova-agent running?") from error
    raise Unavailable("the agent broke off before the engines had stopped", remedy="ask again")


def _hub_cache(settings: AgentSettings) -> Path | None:
    """Where engines of this host keep what they fetch from the hub."""
    found = hub_cache({**os.environ, **settings.engine.environment})
    return None if found is None else Path(found)


def _quiet_collector() -> None:
    """What was loaded for good is not searched for garbage again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def _save_memory() -> None:
    """One heap for all threads: glibc gives each thread its own, which costs this program half of its size."""
    with contextlib.suppress(OSError, AttributeError):  # another C library: it has no such habit
        ctypes.CDLL(None).mallopt(_MALLOC_ARENAS, 1)


async def _serve(settings: AgentSettings, clock: ModelClock) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="agent"))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with log_context(node=settings.node):
        await Agent(settings, clock).run(stop)
        log.info("stopped; engines go on")


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="enova-agent", description="Runs and watches the engines of one GPU host.")
    parser.add_argument("--config", type=Path, help="settings as TOML; variables ENOVA_AGENT_* win over it")
    parser.add_argument("--version", action="version", version=f"enova-agent {version('enova')}")
    parser.add_argument("--stop-engines", action="store_true", help="ask the running agent to end all engines")
    parser.add_argument("--drain-timeout", type=float, default=10.0, metavar="SECONDS", help="for --stop-engines")
    return parser.parse_args(words)


def run(words: list[str], env: Mapping[str, str]) -> int:
    """The program: its exit code."""
    arguments = _arguments(words)
    _save_memory()
    try:
        settings = load_settings(AgentSettings, arguments.config, env, PREFIX)
        configure("enova-agent", level=settings.log_level, form=settings.log_form)
        if arguments.stop_engines:
            stopped = asyncio.run(stop_engines(settings.socket_path, arguments.drain_timeout))
            log.info("%d engines stopped", stopped)
            return 0
        with locked(settings.data_dir):
            asyncio.run(_serve(settings, clock_from_environment(env)))
    except (EnovaError, OSError) as error:
        sys.stderr.write(f"enova-agent: {error}\n")
        return 1
    return 0


def main() -> None:
    """Entry point of `enova-agent`."""
    sys.exit(run(sys.argv[1:], os.environ))


if __name__ == "__main__":
    main()
