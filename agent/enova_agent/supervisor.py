"""Makes the engines of this node what the assignment says, and keeps them so, with or without a coordinator.

Theory of operation. `apply` only remembers the newest assignment; `run` looks at everything a few times a second:
what must change (`core.assignment`), what each replica needs (`replica.Replica`), what the journal lacks. So an
assignment may come twice, late or not at all. Until one comes after a start, what the journal says runs goes on
running, and is watched and restarted as before. No engine is ended because the agent is (`close` leaves them).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from enova_agent import capture
from enova_agent.core.assignment import Change, Drain, Replace, Restart, Resume, Running, Start, Stop, Update, converge
from enova_agent.core.command import RECORD_VARIABLE
from enova_agent.core.events import RestartWanted, RunWanted, StopWanted
from enova_agent.core.local import HeldReplica, HeldUpdate
from enova_agent.core.machine import Goal, Stage
from enova_agent.core.model import Assignment, Claim, LocalEngine, MemberSpec, ReplicaView
from enova_agent.core.node import next_beat_s
from enova_agent.disk import boot_id
from enova_agent.engine import EngineProbe
from enova_agent.engine_settings import EngineSettings
from enova_agent.host import Host, Notice, Scrape
from enova_agent.journal import Journal, Record, decode_record
from enova_agent.process import EngineProcess, Processes
from enova_agent.replica import Replica
from enova_common.errors import Corrupt, NotFound

_log = logging.getLogger(__name__)
_SWEEP_INTERVAL_S = 2.0
_HALT_S = 30.0
_LOG_FILES_MAX = 64


class Supervisor:
    """The engines of one node. All methods are for the event loop's thread.

    `on_change` is called, once for any number of changes, when views or engines may have changed; `on_notice` for
    everything worth telling people. `gpu_utilization` gives the busiest of some GPUs (0..1), or None.
    """

    def __init__(
        self,
        *,
        settings: EngineSettings,
        data_dir: Path,
        node_uid: str,
        processes: Processes,
        probe: EngineProbe,
        on_change: Callable[[], None],
        on_notice: Callable[[Notice], None] = lambda _: None,
        gpu_types: Callable[[], Mapping[str, str]] = lambda: MappingProxyType({}),
        gpu_utilization: Callable[[tuple[str, ...]], float | None] = lambda _: None,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        draw: Callable[[], float] = random.random,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._settings = settings
        self._processes = processes
        self._probe = probe
        self._on_change = on_change
        self._on_notice = on_notice
        self._monotonic = monotonic
        self._log_folder = data_dir / "logs"
        self._token_prefix = f"{node_uid}."
        self._journal = Journal(data_dir / "engines.json")
        self._journal_lock = asyncio.Lock()
        self._journal_stale = False
        self._journal_error = ""
        self._replicas: dict[str, Replica] = {}
        self._assignment: Assignment | None = None
        self._halted_until_s = 0.0
        self._change_told = True
        self._sweep_s = 0.0
        self._ingress = False
        self._host = Host(
            settings=settings,
            limits=settings.limits,
            hang_limits=settings.hang_limits,
            processes=processes,
            probe=probe,
            log_folder=self._log_folder,
            evidence_folder=data_dir / "evidence",
            token_prefix=self._token_prefix,
            environment=environment,
            monotonic=monotonic,
            wall=wall,
            draw=draw,
            notice=self._notice,
            changed=self._changed,
            journal=self._save_journal,
            taken_ports=lambda: {replica.port for replica in self._replicas.values()},
            gpu_types=gpu_types,
            gpu_utilization=gpu_utilization,
        )

    # --- what the rest of the agent asks ---

    @property
    def assignment_revision(self) -> int:
        """The revision of the assignment worked on; 0 before the first."""
        return 0 if self._assignment is None else self._assignment.revision

    def apply(self, assignment: Assignment) -> bool:
        """Work on this assignment from now on; False if a newer one is known (term first, then revision)."""
        known = self._assignment
        if known is not None and (assignment.term, assignment.revision) < (known.term, known.revision):
            return False
        self._assignment = assignment
        self._converge()
        return True

    def views(self) -> tuple[ReplicaView, ...]:
        """What each replica of this node is."""
        return tuple(replica.view() for _, replica in sorted(self._replicas.items()))

    def local_engines(self) -> tuple[LocalEngine, ...]:
        """What the ingress may send to."""
        engines = (replica.local_engine() for _, replica in sorted(self._replicas.items()))
        return tuple(engine for engine in engines if engine is not None)

    def held(self, update: HeldUpdate | None) -> None:
        """What the ingress holds; None once there is no ingress."""
        for name, replica in self._replicas.items():
            replica.set_held(None if update is None else update.replicas.get(name, HeldReplica()))
        self._ingress = update is not None

    def scrapes(self) -> Mapping[str, Scrape]:
        """The newest /metrics of each replica that serves."""
        serving = (Stage.READY, Stage.SUSPECT, Stage.DRAINING)
        return {
            name: replica.watch.scraped
            for name, replica in self._replicas.items()
            if replica.watch is not None and replica.machine.stage in serving
        }

    def resident_bytes(self) -> Mapping[str, int]:
        """What the processes of each engine hold in memory, where it was measured."""
        known = ((name, replica.resident_bytes) for name, replica in self._replicas.items())
        return {name: size for name, size in known if size is not None}

    async def logs(self, replica: str, *, tail_lines: int, follow: bool) -> AsyncIterator[list[str]]:
        """Lines of a replica's engine, safe to print; with `follow` until the caller stops. Raises NotFound."""
        known = self._replicas.get(replica)
        if known is None:
            raise NotFound(f"{replica} is not on this node", field="name", remedy="see: enova get replicas")
        if follow:
            async for lines in capture.follow(known.log_path, tail_lines=tail_lines):
                yield lines
        else:
            yield await asyncio.to_thread(capture.tail, known.log_path, tail_lines)

    async def stop_all(self, drain_timeout_s: float) -> int:
        """Drain and end all engines; how many there were. Nothing is started until a while after."""
        self._halted_until_s = self._monotonic() + drain_timeout_s + _HALT_S
        running = [replica for replica in self._replicas.values() if replica.machine.holds_processes]
        for replica in self._replicas.values():
            self._stop(replica, drain_timeout_s, reason="all engines of this node were told to stop")
        while any(replica.machine.holds_processes for replica in self._replicas.values()):
            self._step()
            await asyncio.sleep(self._settings.tick_s)
        await self._save_journal()
        self._halted_until_s = self._monotonic() + _HALT_S
        return len(running)

    async def adopt(self) -> None:
        """Take over what an earlier agent left running. Call it once, before `run`."""
        try:
            records = self._journal.load()
        except Corrupt as error:
            self._notice(Notice(replica="", kind="JournalCorrupt", message=str(error), warning=True))
            records = None
        found = await asyncio.to_thread(self._processes.found, self._token_prefix)
        living = {process.token: process for process in found}
        if records is None:        # no journal to trust: what runs says itself what it is
            records = tuple(record for record in map(self._carried_record, found) if record is not None)
        for record in records:
            await self._adopt_record(record, living.pop(record.token, None))
        for process in living.values():
            await self._end_stray(process)
        await self._save_journal()

    async def run(self) -> None:
        """Look after the engines until cancelled. A step that fails is reported; the next one is tried."""
        while True:
            try:
                self._step()
                await self._keep_house()
            except Exception as error:  # noqa: BLE001  the loop outlives a defect of one step
                _log.exception("a step of the supervisor failed")
                self._notice(Notice(replica="", kind="AgentDefect", message=f"supervisor: {error}", warning=True))
            # On the beat of the frames and heartbeats, so that the program wakes once for all of them.
            await asyncio.sleep(next_beat_s(self._monotonic(), self._settings.tick_s) - self._monotonic())

    async def close(self) -> None:
        """Stop looking after the engines; they go on, and the journal knows them."""
        await asyncio.gather(*(replica.close() for replica in self._replicas.values()))
        await self._save_journal()
        await self._probe.close()

    # --- steps ---

    def _step(self) -> None:
        self._converge()
        now_s = self._monotonic()
        for replica in list(self._replicas.values()):
            replica.tick(now_s, self._blocked_by(replica) if replica.machine.stage is Stage.WAITING else "")
        gone = [r for r in self._replicas.values() if r.leaving and r.machine.stage is Stage.STOPPED]
        for replica in gone:
            del self._replicas[replica.name]
            self._changed()
        if gone:
            prune_logs(self._log_folder, (replica.log_path for replica in self._replicas.values()))
            self._converge()       # what was to be replaced may start now

    async def _keep_house(self) -> None:
        if self._journal_stale:
            await self._save_journal()
        now_s = self._monotonic()
        if now_s >= self._sweep_s:
            self._sweep_s = now_s + _SWEEP_INTERVAL_S
            await asyncio.to_thread(self._processes.sweep)

    def _converge(self) -> None:
        if self._assignment is None or self._monotonic() < self._halted_until_s:
            return
        running = {
            name: Running(spec=replica.spec, stopping=replica.machine.goal is Goal.STOP, leaving=replica.leaving)
            for name, replica in self._replicas.items()
        }
        for change in converge(self._assignment, running):
            self._carry_out(change)

    def _carry_out(self, change: Change) -> None:
        now_s = self._monotonic()
        match change:
            case Start(spec=spec):
                replica = Replica(spec, self._host)
                replica.set_held(HeldReplica() if self._ingress else None)
                self._replicas[spec.replica] = replica
                self._changed()
            case Stop(replica=name, drain_timeout_s=timeout_s) | Replace(replica=name, drain_timeout_s=timeout_s):
                self._replicas[name].leaving = True
                self._stop(self._replicas[name], timeout_s, reason="not assigned to this node any more")
            case Drain(spec=spec):
                self._respec(spec)
                self._stop(self._replicas[spec.replica], spec.drain_timeout_s, reason="drained on request")
            case Resume(spec=spec):
                self._respec(spec).handle(RunWanted(now_s=now_s))
            case Restart(spec=spec):
                self._respec(spec).handle(RestartWanted(now_s=now_s, drain_timeout_s=spec.drain_timeout_s))
            case Update(spec=spec):
                self._respec(spec)

    def _respec(self, spec: MemberSpec) -> Replica:
        replica = self._replicas[spec.replica]
        replica.spec = spec
        self._changed()
        return replica

    def _stop(self, replica: Replica, drain_timeout_s: float, *, reason: str) -> None:
        replica.handle(StopWanted(now_s=self._monotonic(), drain_timeout_s=drain_timeout_s, reason=reason))

    def _blocked_by(self, replica: Replica) -> str:
        """Why it cannot start now: a GPU that it wants is still held by processes of another replica."""
        if self._monotonic() < self._halted_until_s:
            return "all engines of this node were told to stop"
        for other in self._replicas.values():
            if other is replica or not other.machine.holds_processes:
                continue
            shared = _conflict(replica.spec.claims, other.spec.claims)
            if shared:
                return f"waits for GPU {shared}, still held by {other.name}"
        return ""

    # --- adoption ---

    def _carried_record(self, process: EngineProcess) -> Record | None:
        """What an engine's own environment says of it."""
        text = self._processes.environment(process).get(RECORD_VARIABLE, "")
        try:
            record = decode_record(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        # Whether it was ready is not known any more; its first token will tell again.
        return replace(record, token=process.token, pid=process.pid, start_ticks=process.start_ticks,
                       boot_id=process.boot_id)

    async def _adopt_record(self, record: Record, living: EngineProcess | None) -> None:
        if record.spec.replica in self._replicas:
            if living is not None:
                await self._end_stray(living)
            return
        if record.gave_up and record.boot_id != boot_id():
            return                             # a new boot may have mended it: it starts as if it were new
        replica = Replica(record.spec, self._host)
        self._replicas[replica.name] = replica
        if record.gave_up:
            replica.adopt_failed(record)
            return
        if record.pid == 0 and living is not None:
            replica.adopt(record, living)      # started, but the agent ended before it could write so
            return
        if record.pid == 0:
            if record.stopping:
                self._stop(replica, 0.0, reason="stopped")
            return
        process = EngineProcess(
            pid=record.pid, start_ticks=record.start_ticks, boot_id=record.boot_id, token=record.token
        )
        if await asyncio.to_thread(self._processes.adopt, process):
            replica.adopt(record, process)
        else:
            replica.adopt_dead(record, process)

    async def _end_stray(self, process: EngineProcess) -> None:
        text = f"process {process.pid} bears this node's token but is no engine that should run: ended"
        self._notice(Notice(replica="", kind="StrayEnded", message=text, warning=True))
        names = await asyncio.to_thread(self._processes.shared_memory, process)
        while await asyncio.to_thread(self._processes.kill_all, process) > 0:  # noqa: ASYNC110  nobody tells us
            await asyncio.sleep(self._settings.tick_s)
        await asyncio.to_thread(self._processes.remove_shared_memory, names)

    # --- housekeeping ---

    async def _save_journal(self) -> None:
        async with self._journal_lock:
            self._journal_stale = False
            records = [record for record in (r.record() for r in self._replicas.values()) if record is not None]
            try:
                await asyncio.to_thread(self._journal.save, records)
                self._journal_error = ""
            except OSError as error:
                # Engines carry their records themselves, so this stops nothing; it is tried again each step.
                self._journal_stale = True
                if str(error) != self._journal_error:
                    self._journal_error = str(error)
                    text = f"the journal of engines cannot be written: {error}"
                    self._notice(Notice(replica="", kind="JournalNotWritten", message=text, warning=True))

    def _notice(self, notice: Notice) -> None:
        level = logging.WARNING if notice.warning else logging.INFO
        _log.log(level, "%s: %s: %s", notice.replica or "agent", notice.kind, notice.message)
        self._on_notice(notice)

    def _changed(self) -> None:
        self._journal_stale = True
        if self._change_told:
            self._change_told = False
            asyncio.get_running_loop().call_soon(self._tell_change)

    def _tell_change(self) -> None:
        self._change_told = True
        self._on_change()


def prune_logs(folder: Path, kept: Iterable[Path]) -> None:
    """Remove the oldest logs of replicas that are gone, so that the folder stays bounded."""
    living = {path.name for path in kept}
    files = sorted(
        (path for path in folder.glob("*.log*") if path.name.removesuffix(".1") not in living),
        key=lambda path: path.stat().st_mtime,
    )
    for path in files[:-_LOG_FILES_MAX]:
        path.unlink(missing_ok=True)


def _conflict(claims: tuple[Claim, ...], others: tuple[Claim, ...]) -> str:
    """A GPU that two replicas cannot both hold; empty if there is none."""
    theirs = {claim.gpu_uuid: claim.shared for claim in others}
    for claim in claims:
        if claim.gpu_uuid in theirs and not (claim.shared and theirs[claim.gpu_uuid]):
            return claim.gpu_uuid
    return ""
