"""Engine processes that exist only in memory: the twin of `enova_agent.process.LocalProcesses`.

The first word of a command says what the process does:

    polite           runs until it is told to end
    exits CODE       says its last words and ends
    stubborn         ignores SIGTERM
    family           has a child in its session and an orphan in a session of its own
    listener PORT    listens
    busy             burns CPU time
    sharing NAME     maps a segment of shared memory

Any other first word is a program that cannot be found. Pids and start times are drawn from counters.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from enova_agent.core.command import TOKEN_VARIABLE, Command
from enova_agent.core.failure import Ending
from enova_agent.core.progress import Activity
from enova_agent.process import EngineProcess, Usage

BOOT = "boot-1"
_BEHAVIOURS = frozenset({"polite", "exits", "stubborn", "family", "listener", "busy", "sharing"})


@dataclass
class FakeProcess:
    """One process of the fake host."""

    pid: int
    start_ticks: int
    environment: dict[str, str]
    behaviour: str
    leads: bool
    ending: Ending | None = None
    stopped: bool = False
    cpu_s: float = 0.0
    port: int = 0
    shared_memory: frozenset[str] = frozenset()
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def token(self) -> str:
        """The engine that it belongs to."""
        return self.environment.get(TOKEN_VARIABLE, "")


class FakeProcesses:
    """See enova_agent.process.Processes. `table` is the host's processes; tests kill and stop them there."""

    def __init__(self) -> None:
        self.table: dict[int, FakeProcess] = {}
        self.segments: set[str] = set()
        self.born_here: set[int] = set()
        self.stepped_back: set[int] = set()
        self._pids = itertools.count(1000)
        self._ticks = itertools.count(5_000_000, 7)
        self._ports = itertools.count(20_000)

    def spawn(self, command: Command, log_path: Path) -> EngineProcess:
        """See Processes."""
        behaviour, *arguments = command.argv
        if behaviour not in _BEHAVIOURS:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", behaviour)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log_path.touch()
        first = self._add(dict(command.environment), behaviour, leads=True)
        self.born_here.add(first.pid)
        match behaviour:
            case "exits":
                with log_path.open("a") as log:
                    log.write("last words\n")
                self.end(first.pid, Ending(code=int(arguments[0])))
            case "family":
                self._add(dict(command.environment), "polite", leads=False)
                self._add(dict(command.environment), "polite", leads=True)
            case "listener":
                first.port = int(arguments[0])
            case "sharing":
                first.shared_memory = frozenset({arguments[0]})
                self.segments.add(arguments[0])
        return self._name(first)

    def step_back(self, process: EngineProcess) -> None:
        """See Processes."""
        self.stepped_back.add(process.pid)

    def adopt(self, process: EngineProcess) -> bool:
        """See Processes."""
        entry = self._living(process)
        return entry is not None and entry.token == process.token

    def found(self, token_prefix: str) -> tuple[EngineProcess, ...]:
        """See Processes."""
        by_token: dict[str, list[FakeProcess]] = {}
        for entry in self.table.values():
            if entry.ending is None and entry.token.startswith(token_prefix):
                by_token.setdefault(entry.token, []).append(entry)
        firsts = (min(group, key=lambda e: (not e.leads, e.start_ticks)) for _, group in sorted(by_token.items()))
        return tuple(map(self._name, firsts))

    def environment(self, process: EngineProcess) -> dict[str, str]:
        """See Processes."""
        entry = self._living(process)
        return dict(entry.environment) if entry is not None else {}

    async def wait(self, process: EngineProcess) -> Ending:
        """See Processes."""
        entry = self.table.get(process.pid)
        if entry is None or entry.start_ticks != process.start_ticks:
            return Ending()
        await entry.ended.wait()
        assert entry.ending is not None
        return entry.ending if entry.pid in self.born_here else Ending()

    def terminate(self, process: EngineProcess) -> None:
        """See Processes."""
        entry = self._living(process)
        if entry is not None and entry.behaviour != "stubborn":
            self.end(entry.pid, Ending(signal=15))

    def kill_all(self, process: EngineProcess) -> int:
        """See Processes."""
        for entry in self._members(process):
            self.end(entry.pid, Ending(signal=9))
        return 0

    def activity(self, process: EngineProcess, now_s: float) -> Activity:
        """See Processes."""
        members = self._members(process)
        self._burn(members)
        return Activity(
            time_s=now_s,
            server_pid=process.pid,
            cpu_s={entry.pid: entry.cpu_s for entry in members},
            stopped=tuple(entry.pid for entry in members if entry.stopped),
        )

    def usage(self, process: EngineProcess) -> Usage:
        """See Processes."""
        members = self._members(process)
        self._burn(members)
        return Usage(cpu_s=sum(entry.cpu_s for entry in members), resident_bytes=len(members) << 20)

    def shared_memory(self, process: EngineProcess) -> frozenset[str]:
        """See Processes."""
        return frozenset().union(*(entry.shared_memory for entry in self._members(process)))

    def remove_shared_memory(self, names: Iterable[str]) -> tuple[str, ...]:
        """See Processes."""
        used = frozenset().union(*(entry.shared_memory for entry in self.table.values() if entry.ending is None))
        removed = tuple(sorted((set(names) - used) & self.segments))
        self.segments -= set(removed)
        return removed

    def owns_port(self, process: EngineProcess, port: int) -> bool:
        """See Processes."""
        listeners = [entry for entry in self.table.values() if entry.ending is None and entry.port == port]
        return bool(listeners) and all(entry.token == process.token for entry in listeners)

    def free_port(self, taken: Iterable[int]) -> int:
        """See Processes."""
        avoided = set(taken) | {entry.port for entry in self.table.values() if entry.ending is None}
        return next(port for port in self._ports if port not in avoided)

    def sweep(self) -> None:
        """See Processes: no orphans here."""

    def end(self, pid: int, ending: Ending) -> None:
        """Let one process end."""
        entry = self.table[pid]
        if entry.ending is None:
            entry.ending = ending
            entry.ended.set()

    def _add(self, environment: dict[str, str], behaviour: str, *, leads: bool) -> FakeProcess:
        entry = FakeProcess(
            pid=next(self._pids), start_ticks=next(self._ticks), environment=environment, behaviour=behaviour,
            leads=leads,
        )
        self.table[entry.pid] = entry
        return entry

    def _name(self, entry: FakeProcess) -> EngineProcess:
        return EngineProcess(pid=entry.pid, start_ticks=entry.start_ticks, boot_id=BOOT, token=entry.token)

    def _living(self, process: EngineProcess) -> FakeProcess | None:
        entry = self.table.get(process.pid)
        if process.boot_id != BOOT or entry is None or entry.start_ticks != process.start_ticks:
            return None
        return entry if entry.ending is None else None

    def _members(self, process: EngineProcess) -> list[FakeProcess]:
        if process.boot_id != BOOT:
            return []
        return [entry for entry in self.table.values() if entry.ending is None and entry.token == process.token]

    def _burn(self, members: list[FakeProcess]) -> None:
        for entry in members:
            if entry.behaviour == "busy" and not entry.stopped:
                entry.cpu_s += 0.5
