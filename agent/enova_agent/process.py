"""Engine processes: started apart from the agent, found again, and ended with all their descendants.

Theory of operation. An engine is more than its first process: it forks cores and workers, which outlive it when
it is killed alone. So an engine is *everything that bears its token*: each engine gets a token of its own in its
environment, which children inherit, whatever session or parent they choose. The first process leads a session;
members are what descends from it, what is in its session, what bears the token, what was seen as a member before
and, where the host gives the agent a cgroup (version 2), what is in the engine's cgroup. The agent is a
subreaper, so that orphans become its children instead of vanishing to init.

A pid alone names nobody: it is always compared with the process's start time and the boot.

`Processes` is what the rest of the agent sees. A host that runs each engine as a systemd unit is another
implementation; `tests/contract/test_processes.py` says what every one must do.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import math
import os
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from enova_agent import procfs
from enova_agent.core.command import LOOPBACK, TOKEN_VARIABLE, Command
from enova_agent.core.failure import Ending
from enova_agent.core.progress import Activity

_PR_SET_CHILD_SUBREAPER = 36
_KILL_PASSES = 5
_TABLE_KEPT_S = 0.25
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
_LOG_MODE = 0o640
# Python ignores SIGPIPE and SIGXFSZ, and a child would inherit that.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProcess:
    """The first process of an engine, named so that no other can be mistaken for it."""

    pid: int
    start_ticks: int
    boot_id: str
    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What all processes of an engine used so far: a start that moves any of these makes progress."""

    cpu_s: float = 0.0
    resident_bytes: int = 0
    io_bytes: int = 0


class Processes(Protocol):
    """The processes of a host's engines. Calls block briefly (they read /proc): use a thread from a loop."""

    def spawn(self, command: Command, log_path: Path) -> EngineProcess:
        """Start an engine whose output is appended to `log_path`. Raises OSError."""
        ...

    def step_back(self, process: EngineProcess) -> None:
        """It has started: from now on what else computes on this host goes first, where that can be had."""
        ...

    def adopt(self, process: EngineProcess) -> bool:
        """True if exactly this process lives; its end can then be waited for."""
        ...

    def found(self, token_prefix: str) -> tuple[EngineProcess, ...]:
        """Every first process alive whose token begins so; an engine that lost its first process has another one."""
        ...

    def environment(self, process: EngineProcess) -> dict[str, str]:
        """The environment it was started with."""
        ...

    async def wait(self, process: EngineProcess) -> Ending:
        """Returns when the first process has ended; the status is unknown unless this agent started it."""
        ...

    def terminate(self, process: EngineProcess) -> None:
        """Ask the first process to end."""
        ...

    def kill_all(self, process: EngineProcess) -> int:
        """Kill every process of the engine; how many are still there (0: none, call again otherwise)."""
        ...

    def activity(self, process: EngineProcess, now_s: float) -> Activity:
        """What its processes did so far and which of them are stopped."""
        ...

    def usage(self, process: EngineProcess) -> Usage:
        """What its processes used so far."""
        ...

    def shared_memory(self, process: EngineProcess) -> frozenset[str]:
        """The segments of shared memory that it would leave behind if it died now."""
        ...

    def remove_shared_memory(self, names: Iterable[str]) -> tuple[str, ...]:
        """Remove those segments that no living process uses; the names removed."""
        ...

    def owns_port(self, process: EngineProcess, port: int) -> bool:
        """True if a process of this engine, and no other, listens on the port."""
        ...

    def free_port(self, taken: Iterable[int]) -> int:
        """A port of the loopback that nobody listens on now, none of `taken`."""
        ...

    def sweep(self) -> None:
        """Reap orphans that were left to the agent."""
        ...


class LocalProcesses:
    """Engines as plain children of the agent, each in a session and, if `cgroup` is given, a cgroup of its own.

    `session_nice` (0 to 19) is given to the scheduling group of a session that steps back, where the kernel has such.
    """

    def __init__(self, *, cgroup: Path | None = None, session_nice: int = 0) -> None:
        self._session_nice = session_nice
        self._cgroup = cgroup if cgroup is not None and (cgroup / "cgroup.procs").exists() else None
        self._boot_id = procfs.boot_id()
        self._members: dict[str, set[tuple[int, int]]] = {}   # token -> (pid, start ticks) seen as members
        self._zombies: set[int] = set()
        self._table: tuple[float, dict[int, procfs.Stat]] = (-math.inf, {})   # when it was read
        self._first: set[int] = set()     # first processes whose status `wait` will fetch
        _become_subreaper()

    def spawn(self, command: Command, log_path: Path) -> EngineProcess:
        """See Processes."""
        token = command.environment[TOKEN_VARIABLE]
        log_path.parent.mkdir(parents=True, exist_ok=True)
        pid = os.posix_spawnp(
            command.argv[0],
            command.argv,
            dict(command.environment),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(log_path), os.O_WRONLY | os.O_APPEND | os.O_CREAT, _LOG_MODE),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=_DEFAULT_SIGNALS,
        )
        self._first.add(pid)
        self._into_cgroup(token, pid)
        entry = procfs.stat(pid)
        assert entry is not None, "an unreaped child has an entry in /proc, even as a zombie"
        return EngineProcess(pid=pid, start_ticks=entry.start_ticks, boot_id=self._boot_id, token=token)

    def step_back(self, process: EngineProcess) -> None:
        """See Processes. One that starts beside others that serve would get next to nothing: so not before."""
        if self._session_nice and self.adopt(process):
            procfs.set_session_nice(process.pid, self._session_nice)

    def adopt(self, process: EngineProcess) -> bool:
        """See Processes."""
        if process.boot_id != self._boot_id:
            return False
        entry = procfs.stat(process.pid)
        if entry is None or not entry.alive or entry.start_ticks != process.start_ticks:
            return False
        return procfs.environment(process.pid).get(TOKEN_VARIABLE) == process.token

    def found(self, token_prefix: str) -> tuple[EngineProcess, ...]:
        """See Processes."""
        table = procfs.processes()
        by_token: dict[str, list[procfs.Stat]] = {}
        for entry in table.values():
            token = procfs.environment(entry.pid).get(TOKEN_VARIABLE, "") if entry.alive else ""
            if token.startswith(token_prefix) and token:
                by_token.setdefault(token, []).append(entry)
        return tuple(self._first_of(token, entries) for token, entries in sorted(by_token.items()))

    def _first_of(self, token: str, entries: list[procfs.Stat]) -> EngineProcess:
        """The oldest session leader; where the leader is dead, the oldest of those left stands for the engine."""
        leader = min(entries, key=lambda entry: (entry.session != entry.pid, entry.start_ticks, entry.pid))
        return EngineProcess(
            pid=leader.pid, start_ticks=leader.start_ticks, boot_id=self._boot_id, token=token
        )

    def environment(self, process: EngineProcess) -> dict[str, str]:
        """See Processes."""
        return dict(procfs.environment(process.pid)) if self.adopt(process) else {}

    async def wait(self, process: EngineProcess) -> Ending:
        """See Processes."""
        try:
            descriptor = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return Ending()
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        try:
            entry = procfs.stat(process.pid)
            if entry is not None and entry.start_ticks == process.start_ticks:
                loop.add_reader(descriptor, ended.set)
                await ended.wait()
                return self._status(process.pid)
            return Ending()        # another process has its number by now
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)

    def _status(self, pid: int) -> Ending:
        self._first.discard(pid)
        try:
            result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return Ending()        # an earlier agent's child
        if result is None:
            return Ending()
        if result.si_code == os.CLD_EXITED:
            return Ending(code=result.si_status)
        return Ending(signal=result.si_status)

    def terminate(self, process: EngineProcess) -> None:
        """See Processes."""
        _send(process.pid, process.start_ticks, signal.SIGTERM)

    def kill_all(self, process: EngineProcess) -> int:
        """See Processes."""
        folder = self._cgroup_of(process.token)
        if folder is not None:
            with contextlib.suppress(OSError):  # older than Linux 5.14, or already removed: members are killed below
                (folder / "cgroup.kill").write_text("1")
        for _ in range(_KILL_PASSES):
            members = self._living(process, everywhere=True)
            for entry in members:
                _send(entry.pid, entry.start_ticks, signal.SIGKILL)
            if not members:
                break
        left = len(self._living(process, everywhere=True))
        if left == 0:
            self._reap(self._members.pop(process.token, set()))
            if folder is not None:
                with contextlib.suppress(OSError):  # busy until the last zombie is reaped; the next run makes another
                    folder.rmdir()
        return left

    def activity(self, process: EngineProcess, now_s: float) -> Activity:
        """See Processes."""
        members = self._living(process)
        return Activity(
            time_s=now_s,
            server_pid=process.pid,
            cpu_s={entry.pid: entry.cpu_s for entry in members},
            stopped=tuple(entry.pid for entry in members if entry.stopped),
        )

    def usage(self, process: EngineProcess) -> Usage:
        """See Processes."""
        members = self._living(process, self._recent())
        return Usage(
            cpu_s=sum(entry.cpu_s for entry in members),
            resident_bytes=sum(entry.resident_bytes for entry in members),
            io_bytes=sum(procfs.io_bytes(entry.pid) for entry in members),
        )

    def shared_memory(self, process: EngineProcess) -> frozenset[str]:
        """See Processes."""
        return procfs.shared_memory(entry.pid for entry in self._living(process, self._recent()))

    def remove_shared_memory(self, names: Iterable[str]) -> tuple[str, ...]:
        """See Processes."""
        dead = set(names)
        if not dead:
            return ()
        dead -= procfs.shared_memory(entry.pid for entry in procfs.processes().values() if entry.alive)
        removed = []
        for name in sorted(dead):
            path = _SHARED_MEMORY / name
            with contextlib.suppress(FileNotFoundError):  # its owner, or the resource tracker, removed it
                if path.stat().st_uid == os.getuid():
                    path.unlink()
                    removed.append(name)
        return tuple(removed)

    def owns_port(self, process: EngineProcess, port: int) -> bool:
        """See Processes."""
        inodes = procfs.listening_inodes(port)
        if not inodes:
            return False
        members = self._living(process)
        return all(any(procfs.holds_socket(entry.pid, inode) for entry in members) for inode in inodes)

    def free_port(self, taken: Iterable[int]) -> int:
        """See Processes."""
        avoided = set(taken)
        for _ in range(len(avoided) + 100):
            with socket.socket() as probe:
                probe.bind((LOOPBACK, 0))
                port: int = probe.getsockname()[1]
            if port not in avoided:
                return port
        raise OSError(errno.EADDRNOTAVAIL, "no free port on the loopback")

    def sweep(self) -> None:
        """See Processes. A zombie that is still there at the second look has nobody else who waits for it."""
        zombies = {
            entry.pid for entry in procfs.children() if entry.state == "Z" and entry.pid not in self._first
        }
        for pid in zombies & self._zombies:
            with contextlib.suppress(ChildProcessError):  # its owner fetched the status in this instant
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
        self._zombies = zombies

    def _reap(self, members: set[tuple[int, int]]) -> None:
        """Orphans of a dead engine that fell to this process; `wait` sees to the first process itself."""
        for pid, _ in members:
            if pid not in self._first:
                with contextlib.suppress(ChildProcessError):  # another parent's, or reaped
                    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)

    def _recent(self) -> dict[int, procfs.Stat]:
        """All processes as of a moment ago, for who only adds up: a host has hundreds, and each engine asks twice."""
        read_s, table = self._table
        now_s = time.monotonic()
        if now_s - read_s > _TABLE_KEPT_S:
            table = procfs.processes()
            self._table = now_s, table
        return table

    def _living(
        self, process: EngineProcess, table: dict[int, procfs.Stat] | None = None, *, everywhere: bool = False
    ) -> list[procfs.Stat]:
        """The engine's living processes; `everywhere` also searches all environments for its token (slow)."""
        if process.boot_id != self._boot_id:
            return []
        if table is None:
            table = procfs.processes()
        first = table.get(process.pid)
        reused = first is not None and first.start_ticks != process.start_ticks
        pids: set[int] = set()
        if not reused:
            pids |= procfs.descendants(table, process.pid)
            pids |= {entry.pid for entry in table.values() if entry.session == process.pid}
        if everywhere:
            pids |= {pid for pid in table if procfs.environment(pid).get(TOKEN_VARIABLE) == process.token}
        known = self._members.setdefault(process.token, set())
        pids |= {pid for pid, start_ticks in known if pid in table and table[pid].start_ticks == start_ticks}
        pids |= self._cgroup_members(process.token)
        members = [table[pid] for pid in pids if pid in table and table[pid].alive and pid != os.getpid()]
        known |= {(entry.pid, entry.start_ticks) for entry in members}
        return members

    def _cgroup_of(self, token: str) -> Path | None:
        if self._cgroup is None:
            return None
        folder = self._cgroup / f"enova-{token}"
        return folder if folder.is_dir() else None

    def _into_cgroup(self, token: str, pid: int) -> None:
        if self._cgroup is None:
            return
        folder = self._cgroup / f"enova-{token}"
        with contextlib.suppress(OSError):  # delegated but not writable: sessions and tokens still hold
            folder.mkdir(exist_ok=True)
            (folder / "cgroup.procs").write_text(str(pid))

    def _cgroup_members(self, token: str) -> set[int]:
        folder = self._cgroup_of(token)
        with contextlib.suppress(OSError):  # removed in this instant
            return {int(pid) for pid in (folder / "cgroup.procs").read_text().split()} if folder else set()
        return set()


def _become_subreaper() -> None:
    """Orphans of engines become children of this process, so that it can reap them."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _send(pid: int, start_ticks: int, number: signal.Signals) -> None:
    """Signal a process if it is still the one meant: the descriptor pins it while its start time is compared."""
    try:
        descriptor = os.pidfd_open(pid)
    except (ProcessLookupError, OSError):
        return                     # gone
    try:
        entry = procfs.stat(pid)
        if entry is not None and entry.start_ticks == start_ticks:
            with contextlib.suppress(ProcessLookupError):  # ended in this instant
                signal.pidfd_send_signal(descriptor, number)
    finally:
        os.close(descriptor)
