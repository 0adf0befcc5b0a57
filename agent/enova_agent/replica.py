"""One replica of this node: carries out what its machine decides, and tells it what happened.

The machine (`core.machine`) and the hang watch (`core.progress`) decide; this is their shell. Everything slow is
a task, at most one of each name; a task's result is an event for the run of the engine that it was begun in, and
is dropped if that run is over or the machine does not understand it any more.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
from collections import deque
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, assert_never

from enova_agent import evidence
from enova_agent.capture import LogReader, rotate, tail
from enova_agent.core import command
from enova_agent.core import machine as life
from enova_agent.core.events import (
    Action,
    Adopted,
    AnnounceRouting,
    CheckDrained,
    CollectEvidence,
    DrainDone,
    Event,
    EvidenceCollected,
    Exited,
    GenerateToken,
    HangConfirmed,
    HangHealed,
    HangSuspected,
    HealthOk,
    KillAll,
    KillDone,
    Phase,
    PhaseSeen,
    ProbeHealth,
    ProgressSeen,
    RemoveSharedMemory,
    Report,
    SendTerm,
    Spawn,
    Spawned,
    SpawnFailed,
    Tick,
    TokenGenerated,
)
from enova_agent.core.failure import Cause, Ending, Fault, classify, is_chatter
from enova_agent.core.hub import hub_cache
from enova_agent.core.local import HeldReplica
from enova_agent.core.machine import Goal, Machine, Stage
from enova_agent.core.model import LocalEngine, MemberSpec, ReplicaView
from enova_agent.core.phases import download, goes_on
from enova_agent.core.progress import Verdict
from enova_agent.disk import boot_id
from enova_agent.host import Host, Notice
from enova_agent.hub import room_problem
from enova_agent.journal import Record, encode_record
from enova_agent.process import EngineProcess, Usage
from enova_agent.watching import EngineWatch
from enova_common.errors import EnovaError

_log = logging.getLogger(__name__)
_LINES_KEPT = 200
_USAGE_INTERVAL_S = 2.0
_MEMORY_INTERVAL_S = 30.0
_DOWNLOAD_INTERVAL_S = 10.0         # each is told to the coordinator and stored there
_GROWTH_BYTES = 1 << 20            # less growth is noise of an allocator, not progress
_GROWTH_CPU_S = 0.05


class Replica:
    """One replica as this node has it. All methods are for the event loop's thread."""

    def __init__(self, spec: MemberSpec, host: Host) -> None:
        self.spec = spec
        self.leaving = False
        self.machine = Machine()
        self.process: EngineProcess | None = None
        self.watch: EngineWatch | None = None
        self.port = 0
        self._host = host
        self._run = 0
        self._token = ""
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._log = LogReader(host.log_folder / f"{_file_name(spec)}.log", from_end=True)
        self._usage: Usage | None = None
        self._shared_memory: frozenset[str] = frozenset()
        self._held: HeldReplica | None = None
        self._due_s: dict[str, float] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closed = False
        self._download = ""
        self._start_time_s = 0.0
        self._ready_time_s = 0.0

    # --- what others see ---

    @property
    def name(self) -> str:
        """The replica's full name."""
        return self.spec.replica

    @property
    def log_path(self) -> Path:
        """Where its engine writes."""
        return self._log.path

    @property
    def endpoint(self) -> str:
        """The engine's URL; empty while there is none."""
        return f"http://{command.LOOPBACK}:{self.port}" if self.port else ""

    @property
    def resident_bytes(self) -> int | None:
        """What its processes hold in memory, as last measured; None before the first time."""
        return None if self._usage is None else self._usage.resident_bytes

    def view(self) -> ReplicaView:
        """What the coordinator is told."""
        held = self._held
        reason = self.machine.reason
        if self.machine.stage is Stage.STARTING and not reason and self.watch is not None:
            reason = self._download if self.machine.phase is Phase.FETCH and self._download else self.watch.problem
        return ReplicaView(
            replica=self.name,
            uid=self.spec.uid,
            state=self.machine.state,
            reason=reason,
            rank=self.spec.rank,
            phase=self.machine.phase.value if self.machine.phase and self.machine.stage is Stage.STARTING else "",
            pid=self.process.pid if self.process is not None else 0,
            endpoint=self.endpoint,
            restarts=self.machine.restarts,
            start_time_s=self._start_time_s,
            ready_time_s=self._ready_time_s,
            in_routing=self.machine.stage is not Stage.SUSPECT,
            in_flight=held.in_flight if held is not None else 0,
            gave_up=self.machine.gave_up,
        )

    def local_engine(self) -> LocalEngine | None:
        """What the ingress is told; None while there is nothing to send to."""
        if not self.port or self.machine.stage not in (Stage.READY, Stage.SUSPECT, Stage.DRAINING):
            return None
        return LocalEngine(
            replica=self.name,
            endpoint=self.endpoint,
            max_concurrency=command.max_concurrency(self.spec),
            queue_limit=self.spec.queue_limit,
            admitting=self.machine.routed,
            served_names=command.served_names(self.spec),
        )

    def record(self) -> Record | None:
        """What the journal keeps; None if nothing of it runs, shall run again, or must not be tried again."""
        if self.machine.stage is Stage.STOPPED:
            return None
        failed = self.machine.stage is Stage.FAILED
        process = self.process
        return Record(
            spec=self.spec,
            token=self._token,
            port=self.port,
            log_path=str(self.log_path),
            pid=process.pid if process is not None else 0,
            start_ticks=process.start_ticks if process is not None else 0,
            boot_id=process.boot_id if process is not None else (boot_id() if failed else ""),
            ready=self.machine.ready_s is not None,
            stopping=self.machine.goal is Goal.STOP,
            start_time_s=self._start_time_s,
            ready_time_s=self._ready_time_s,
            restarts=self.machine.restarts,
            shared_memory=tuple(sorted(self._shared_memory)),
            gave_up=self.machine.reason if failed else "",
        )

    # --- what happens to it ---

    def set_held(self, held: HeldReplica | None) -> None:
        """What the ingress holds for it; None: there is no ingress."""
        before = self._held.in_flight if self._held is not None else 0
        self._held = held
        if (held.in_flight if held is not None else 0) != before:
            self._host.changed()

    def adopt(self, record: Record, process: EngineProcess) -> None:
        """Take over a living engine."""
        self._remember(record, process)
        self.watch = self._watching(process)
        now_s = self._host.monotonic()
        if not record.ready:
            self._lines.extend(tail(self.log_path, _LINES_KEPT))
        adopted = Adopted(
            now_s=now_s, ready=record.ready, stopping=record.stopping, drain_timeout_s=self.spec.drain_timeout_s
        )
        self.handle(adopted)

    def adopt_dead(self, record: Record, process: EngineProcess) -> None:
        """An engine of ours ended, or lost its first process, while no agent watched."""
        self._remember(record, process)
        self._lines.extend(tail(self.log_path, _LINES_KEPT))
        cause = classify(Ending(), list(self._lines))
        detail = f"found dead when the agent started: {cause.detail}"
        if record.stopping:
            self.machine = replace(self.machine, goal=Goal.STOP)
        self.handle(Exited(now_s=self._host.monotonic(), cause=replace(cause, detail=detail)))

    def adopt_failed(self, record: Record) -> None:
        """It was given up: a new agent has no better reason to try it again."""
        self.machine = replace(
            self.machine, stage=Stage.FAILED, reason=record.gave_up, restarts=record.restarts,
            since_s=self._host.monotonic(),
        )
        self._host.changed()

    def _remember(self, record: Record, process: EngineProcess) -> None:
        self.process, self.port, self._token = process, record.port, record.token
        self._log = LogReader(Path(record.log_path), from_end=True)
        self._shared_memory = frozenset(record.shared_memory)
        self._start_time_s, self._ready_time_s = record.start_time_s, record.ready_time_s
        self.machine = replace(self.machine, restarts=record.restarts)
        self._run += 1

    def handle(self, event: Event) -> None:
        """Tell the machine, and do what it says."""
        if not life.accepts(self.machine, event):
            _log.debug("%s: %s comes too late in %s", self.name, type(event).__name__, self.machine.stage)
            return
        before = self.machine
        self.machine, actions = life.step(before, event, self._host.limits)
        if self.machine.stage is not before.stage:
            self._entered(before)
        for action in actions:
            self._do(action)
        if (self.machine.stage, self.machine.reason, self.machine.routed, self.machine.phase) != (
            before.stage, before.reason, before.routed, before.phase,
        ):
            self._host.changed()

    def tick(self, now_s: float, blocked_by: str) -> None:
        """Look at everything once."""
        stage = self.machine.stage
        if self.machine.holds_processes:
            self._read_log(now_s)
        if self.process is not None and stage not in (Stage.KILLING, Stage.SPAWNING):
            self._begin("wait", self._wait(self.process))
        if self.watch is not None:
            self._look(self.watch, stage, now_s)
        self.handle(Tick(now_s=now_s, blocked_by=blocked_by))

    def _look(self, watch: EngineWatch, stage: Stage, now_s: float) -> None:
        """Begin what is due of looking at a running engine."""
        starting, serving = stage is Stage.STARTING, stage in (Stage.READY, Stage.SUSPECT)
        interval_s = _USAGE_INTERVAL_S if starting else _MEMORY_INTERVAL_S
        if (starting or serving) and self._is_due("usage", now_s, interval_s):
            self._begin("usage", self._measure_usage())
        if serving and self._is_due("scrape", now_s, self._host.settings.scrape_interval_s):
            self._begin("scrape", watch.scrape())
        if serving:
            self._judge(watch, now_s)

    async def close(self) -> None:
        """Stop looking at it; its engine is left as it is."""
        self._closed = True        # what ends in this instant must not begin anything
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    # --- actions ---

    def _do(self, action: Action) -> None:
        match action:
            case Spawn():
                self._begin("spawn", self._spawn())
            case ProbeHealth():
                if self.watch is not None:
                    self._begin("probe", self._probe_health(self.watch))
            case GenerateToken():
                if self.watch is not None:
                    self._begin("canary", self._first_token(self.watch))
            case AnnounceRouting():
                self._host.changed()
            case CheckDrained():
                if self.watch is not None:
                    self._begin("drain", self._check_drained(self.watch))
            case SendTerm():
                if self.process is not None:
                    self._host.processes.terminate(self.process)
            case KillAll():
                self._begin("kill", self._kill_all())
            case CollectEvidence(reason=reason):
                self._begin("evidence", self._collect_evidence(reason))
            case RemoveSharedMemory():
                self._begin(f"memory {self._run}", self._remove_shared_memory(self._shared_memory))
                self._forget_run()
            case Report(kind=kind, message=message, warning=warning):
                self._host.notice(Notice(replica=self.name, kind=kind, message=message, warning=warning))
            case _:
                assert_never(action)

    def _entered(self, before: Machine) -> None:
        """Bookkeeping of a new stage."""
        if self.machine.stage is Stage.READY and before.stage is Stage.STARTING:
            self._ready_time_s = self._host.wall()
            self._lines.clear()  # whatever ends it from now on, its start is not to blame
            if self.watch is not None:
                self.watch.begin()
            self._begin("step back", self._step_back())
            self._due_s.pop("usage", None)  # what a ready engine holds in /dev/shm is to be known at once

    def _forget_run(self) -> None:
        """The run is over: whatever still asks about it has no use."""
        me = asyncio.current_task()
        for name, task in list(self._tasks.items()):
            if task is not me and not name.startswith("memory"):
                task.cancel()
            if task.done() or task is me or not name.startswith("memory"):
                del self._tasks[name]
        self.process, self.watch, self.port, self._token = None, None, 0, ""
        self._usage, self._shared_memory, self._download = None, frozenset(), ""
        self._start_time_s = self._ready_time_s = 0.0
        self._due_s.clear()

    async def _spawn(self) -> None:
        host, settings = self._host, self._host.settings
        self._run += 1
        self._lines.clear()
        self._token = f"{host.token_prefix}{secrets.token_hex(12)}"
        try:
            self.port = host.processes.free_port(host.taken_ports())
            record = self.record()
            assert record is not None, "a replica that is being started has a record"
            built = command.build(
                self.spec, settings.engine_command, port=self.port, token=self._token, record=record_text(record),
                gpu_types=host.gpu_types(), ambient=host.environment,
            )
            full = await asyncio.to_thread(self._no_room, built.environment)
            if full:
                self._spawn_failed(Cause(fault=Fault.DISK_FULL, detail=full))
                return
            await host.journal()   # the intention first: an engine can then be orphaned, but never unknown
            self._log = LogReader(self.log_path, from_end=True)
            self._start_time_s = host.wall()
            self.process = await asyncio.to_thread(host.processes.spawn, built, self.log_path)
        except OSError as error:
            words = " ".join(settings.command)
            missing = isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError)
            fault = Fault.EXECUTABLE if missing else Fault.CRASHED
            self._spawn_failed(Cause(fault=fault, detail=f"cannot start {words}: {error.strerror or error}"))
            return
        except EnovaError as error:
            self._spawn_failed(Cause(fault=Fault.ARGUMENT, detail=str(error)))
            return
        self.watch = self._watching(self.process)
        self.handle(Spawned(now_s=host.monotonic()))

    def _no_room(self, environment: Mapping[str, str]) -> str:
        """Why its model cannot be fetched, empty if it can or need not be."""
        settings = self._host.settings
        model = command.fetched_model(self.spec, settings.engine_command)
        cache = hub_cache(environment)
        if model is None or cache is None:
            return ""
        return room_problem(model, Path(cache), free_bytes_min=settings.download_free_bytes_min)

    def _watching(self, process: EngineProcess) -> EngineWatch:
        return EngineWatch(
            self._host, process, port=self.port, endpoint=self.endpoint, model=command.served_names(self.spec)[0],
            gpu_uuids=tuple(claim.gpu_uuid for claim in self.spec.claims),
        )

    def _spawn_failed(self, cause: Cause) -> None:
        self.handle(SpawnFailed(now_s=self._host.monotonic(), cause=cause))

    async def _wait(self, process: EngineProcess) -> None:
        run = self._run
        ending = await self._host.processes.wait(process)
        self._read_log(self._host.monotonic())
        cause = classify(ending, list(self._lines))
        self._deliver(run, Exited(now_s=self._host.monotonic(), cause=cause))

    async def _probe_health(self, watch: EngineWatch) -> None:
        run = self._run
        if await watch.is_healthy():
            self._deliver(run, HealthOk())

    async def _first_token(self, watch: EngineWatch) -> None:
        run = self._run
        if await watch.generates():
            self._deliver(run, TokenGenerated(now_s=self._host.monotonic()))

    async def _check_drained(self, watch: EngineWatch) -> None:
        run = self._run
        await watch.scrape()
        if watch.runs_nothing(self._held):
            self._deliver(run, DrainDone(now_s=self._host.monotonic()))

    async def _kill_all(self) -> None:
        run, host, process = self._run, self._host, self.process
        if process is not None:
            # Whoever is still alive knows what the engine holds; afterwards nobody does.
            self._shared_memory |= await asyncio.to_thread(host.processes.shared_memory, process)
            if await asyncio.to_thread(host.processes.kill_all, process) > 0:
                return             # some die slowly (a driver call): the machine asks again
        self._deliver(run, KillDone(now_s=host.monotonic(), draw=host.draw()))

    async def _collect_evidence(self, reason: str) -> None:
        run, host, process = self._run, self._host, self.process
        if process is not None:
            activity = await asyncio.to_thread(host.processes.activity, process, host.monotonic())
            name = f"{_file_name(self.spec)}-{host.wall():.0f}"
            page = self.watch.scraped.page if self.watch is not None else b""
            try:
                path = await evidence.keep(
                    host.evidence_folder, name, reason=reason, pids=sorted(activity.cpu_s), metrics=page,
                    lines=list(self._lines),
                    program=host.settings.command[0],
                )
                host.notice(Notice(replica=self.name, kind="EvidenceKept", message=f"evidence is in {path}"))
            except OSError as error:
                text = f"no evidence of the hang was kept: {error}"
                host.notice(Notice(replica=self.name, kind="EvidenceLost", message=text, warning=True))
        self._deliver(run, EvidenceCollected(now_s=host.monotonic()))

    async def _remove_shared_memory(self, names: frozenset[str]) -> None:
        removed = await asyncio.to_thread(self._host.processes.remove_shared_memory, names)
        if removed:
            text = f"removed shared memory that the engine left: {', '.join(removed)}"
            self._host.notice(Notice(replica=self.name, kind="SharedMemoryRemoved", message=text))

    # --- observations ---

    def _read_log(self, now_s: float) -> None:
        lines = self._log.read()
        if lines:
            # Our own scrapes would push out what was said a minute ago.
            self._lines.extend(line for line in lines if not is_chatter(line))
            if self.machine.stage is Stage.STARTING:
                self._see_phases(lines, now_s)
        if self._is_due("rotate", now_s, 1.0):
            rotate(self.log_path, self._host.settings.log_bytes_max)

    def _see_phases(self, lines: list[str], now_s: float) -> None:
        for line in lines:
            phase = goes_on(self.machine.phase, line)
            if phase is not None:
                self.handle(PhaseSeen(now_s=now_s, phase=phase))
            fetched = download(line)
            if fetched and self._is_due("download", now_s, _DOWNLOAD_INTERVAL_S):
                self._download = f"downloads {fetched}"
                self._host.changed()
        self.handle(ProgressSeen(now_s=now_s))

    async def _step_back(self) -> None:
        if self.process is not None:
            await asyncio.to_thread(self._host.processes.step_back, self.process)

    async def _measure_usage(self) -> None:
        run, host, process = self._run, self._host, self.process
        if process is None:
            return
        usage, before = await asyncio.to_thread(host.processes.usage, process), self._usage
        if run != self._run:
            return
        self._usage = usage
        if self.machine.stage is Stage.STARTING and (before is None or _moved(before, usage)):
            self._deliver(run, ProgressSeen(now_s=host.monotonic()))
        names = await asyncio.to_thread(host.processes.shared_memory, process)
        if run == self._run:
            self._shared_memory |= names

    def _judge(self, watch: EngineWatch, now_s: float) -> None:
        """Ask the hang watch, and pass its verdict to the machine."""
        judgement = watch.judge(now_s, self._held)
        if judgement.wants_canary:
            self._begin("canary", watch.canary())
        if judgement.wants_activity:
            self._begin("activity", watch.measure_activity())
        match judgement.verdict:
            case Verdict.NORMAL:
                pass
            case Verdict.SUSPECT:
                if self.machine.stage is Stage.READY:
                    self.handle(HangSuspected(reason=judgement.reason))
            case Verdict.HEALED:
                self.handle(HangHealed())
            case Verdict.HUNG:
                if self.machine.stage is Stage.READY:
                    self.handle(HangSuspected(reason=judgement.reason))
                self.handle(HangConfirmed(now_s=now_s, reason=judgement.reason))
            case _:
                assert_never(judgement.verdict)

    # --- tasks ---

    def _deliver(self, run: int, event: Event) -> None:
        if run == self._run:
            self.handle(event)

    def _is_due(self, what: str, now_s: float, interval_s: float) -> bool:
        if now_s < self._due_s.get(what, 0.0):
            return False
        self._due_s[what] = now_s + interval_s
        return True

    def _begin(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run it as the only task of its name; if one runs already, that one is enough. After `close`, nothing."""
        running = self._tasks.get(name)
        if self._closed or (running is not None and not running.done()):
            work.close()
            return
        task = asyncio.create_task(self._guarded(name, work), name=f"{self.name} {name}")
        task.add_done_callback(lambda _: work.close())  # one that is cancelled before it began would be left open
        self._tasks[name] = task

    async def _guarded(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001  a defect in one task must not take the replica along
            _log.exception("%s: %s failed", self.name, name)
            text = f"{name} failed: {error}"
            self._host.notice(Notice(replica=self.name, kind="AgentDefect", message=text, warning=True))
            if name == "spawn":    # nobody else would ever tell the machine
                self._spawn_failed(Cause(fault=Fault.CRASHED, detail=text))


def record_text(record: Record) -> str:
    """A record as an engine carries it in its environment."""
    return json.dumps(encode_record(record), separators=(",", ":"))


def _moved(before: Usage, after: Usage) -> bool:
    return (
        after.cpu_s - before.cpu_s >= _GROWTH_CPU_S
        or abs(after.resident_bytes - before.resident_bytes) >= _GROWTH_BYTES
        or after.io_bytes - before.io_bytes >= _GROWTH_BYTES
    )


def _file_name(spec: MemberSpec) -> str:
    """A file name for the replica; its uid keeps two that differ only in odd characters apart."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{spec.replica.removeprefix('deployments/')}-{spec.uid}")[:200]
