"""What the kernel says of processes: /proc read directly, since a general library costs ten times the time."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
_AUTOGROUP_TRIES, _AUTOGROUP_INTERVAL_S = 5, 0.11
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)
_DEAD_STATES = frozenset("ZX")
_STOPPED_STATES = frozenset("Tt")
_LISTENING = "0A"
# 127.0.0.1, any, any of version 6, ::ffff:127.0.0.1, as /proc/net writes them on a little-endian machine.
_LOOPBACK_OR_ANY = frozenset(
    {"0100007F", "0" * 8, "0" * 32, "0000000000000000FFFF00000100007F"}
)
# Python's shared memory and semaphores, NCCL's and torch's segments: what engines are known to leave behind.
# Nothing else is ever removed: people keep model weights in /dev/shm.
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
_REMOVABLE = re.compile(r"(?:psm_|sem\.mp-|nccl-|torch_)[A-Za-z0-9_.-]+")


class Stat(NamedTuple):
    """One process at one instant."""

    pid: int
    parent: int
    session: int
    state: str
    cpu_s: float
    start_ticks: int
    resident_bytes: int

    @property
    def alive(self) -> bool:
        """False for a zombie: nothing of it is left but its number."""
        return self.state not in _DEAD_STATES

    @property
    def stopped(self) -> bool:
        """True if a signal or a tracer stopped it."""
        return self.state in _STOPPED_STATES


def boot_id() -> str:
    """A name of the present boot of this machine."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def stat(pid: int) -> Stat | None:
    """One process, None if there is none of that number."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # four times quicker than Path.read_bytes
            text = file.read()
    except _GONE:
        return None
    fields = text[text.rindex(b")") + 2 :].split()  # the command's name may hold anything, parentheses too
    return Stat(
        pid=pid,
        state=fields[0].decode(),
        parent=int(fields[1]),
        session=int(fields[3]),
        cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS_PER_S,
        start_ticks=int(fields[19]),
        resident_bytes=int(fields[21]) * _PAGE_BYTES,
    )


def processes() -> dict[int, Stat]:
    """All processes by number."""
    found = (stat(int(name)) for name in os.listdir("/proc") if name.isdecimal())
    return {entry.pid: entry for entry in found if entry is not None}


def environment(pid: int) -> Mapping[str, str]:
    """The environment a process was started with; empty if it is gone or not ours to read."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            text = file.read()
    except _GONE:
        return {}
    pairs = (item.split("=", 1) for item in text.decode(errors="replace").split("\0") if "=" in item)
    return {name: value for name, value in pairs}  # noqa: C416  dict() cannot type lists of unknown length


def children() -> list[Stat]:
    """This process's own children, whichever of its threads started or inherited them."""
    pids: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(*_GONE), open(f"/proc/self/task/{thread}/children", "rb") as file:
            pids |= {int(pid) for pid in file.read().split()}
    if not pids:  # there are none, or the kernel was built without these files
        me = os.getpid()
        return [entry for entry in processes().values() if entry.parent == me]
    return [entry for entry in map(stat, pids) if entry is not None]


def descendants(table: Mapping[int, Stat], root: int) -> set[int]:
    """The pids below `root`, itself included."""
    children: dict[int, list[int]] = {}
    for entry in table.values():
        children.setdefault(entry.parent, []).append(entry.pid)
    found, open_ = {root}, [root]
    while open_:
        for child in children.get(open_.pop(), []):
            if child not in found:
                found.add(child)
                open_.append(child)
    return found


def shared_memory(pids: Iterable[int]) -> frozenset[str]:
    """The names of removable segments in /dev/shm that these processes have mapped or open.

    They are compared by inode: the C library makes a semaphore under another name, links it to its own and removes
    the first, so that a mapping bears a name that is gone.
    """
    inodes = {inode for pid in pids for inode in _shared_inodes(pid)}
    if not inodes:
        return frozenset()
    entries = [entry for entry in os.scandir(_SHARED_MEMORY) if _REMOVABLE.fullmatch(entry.name)]
    return frozenset(entry.name for entry in entries if entry.inode() in inodes)


def io_bytes(pid: int) -> int:
    """Bytes that a process has read and written so far, through any file; 0 if that is not to be known."""
    with contextlib.suppress(*_GONE, ValueError):
        lines = (PROC / str(pid) / "io").read_text().splitlines()
        return sum(int(line.split(":")[1]) for line in lines[:2])
    return 0


def set_session_nice(pid: int, nice: int) -> None:
    """Make the scheduling group of a process's session nice (sched(7), autogroups), where that is to be had.

    The kernel takes one such write in 100 ms from all unprivileged processes together, so this may try several times.
    """
    path = PROC / str(pid) / "autogroup"
    for _ in range(_AUTOGROUP_TRIES):
        try:
            path.write_text(str(nice))
        except BlockingIOError:
            time.sleep(_AUTOGROUP_INTERVAL_S)
        except OSError:        # no such groups here, or the process has ended
            return
        else:
            return


def listening_inodes(port: int) -> frozenset[str]:
    """The inodes of the sockets that accept connections to a TCP port of the loopback."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        for fields in _socket_rows(table):
            address, _, port_hex = fields[1].rpartition(":")
            if fields[3] == _LISTENING and address in _LOOPBACK_OR_ANY and int(port_hex, 16) == port:
                inodes.add(fields[9])
    return frozenset(inodes)


def holds_socket(pid: int, inode: str) -> bool:
    """True if the process has this socket open."""
    wanted = f"socket:[{inode}]"
    return any(link == wanted for link in _links(pid))


def _socket_rows(table: str) -> Iterator[list[str]]:
    with contextlib.suppress(*_GONE):  # no IPv6 on this host
        for line in (PROC / "net" / table).read_text().splitlines()[1:]:
            yield line.split()


def _shared_inodes(pid: int) -> Iterator[int]:
    """The inodes of all files of /dev/shm that a process has mapped or open."""
    prefix = f"{_SHARED_MEMORY}/"
    with contextlib.suppress(*_GONE):
        for line in (PROC / str(pid) / "maps").read_text(errors="replace").splitlines():
            if prefix in line:
                yield int(line.split(maxsplit=5)[4])
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(*_GONE):
        for name in os.listdir(folder):
            with contextlib.suppress(*_GONE):  # closed since it was listed
                if os.readlink(f"{folder}/{name}").startswith(prefix):
                    yield os.stat(f"{folder}/{name}").st_ino


def _links(pid: int) -> Iterator[str]:
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(*_GONE):
        for name in os.listdir(folder):
            with contextlib.suppress(*_GONE):  # closed since it was listed
                yield os.readlink(f"{folder}/{name}")
