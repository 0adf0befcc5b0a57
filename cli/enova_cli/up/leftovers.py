"""The processes of one data directory: what an earlier `enova up` left running, and what is left after one.

Programs carry the directory's token in their environment, engines a token that begins with their node's uid.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Collection
from pathlib import Path

import psutil

from enova_cli.up.layout import TOKEN_VARIABLE

END_TIMEOUT_S = 5.0
ENGINE_VARIABLE = "ENOVA_ENGINE_TOKEN"


def end_leftovers(token: str) -> list[int]:
    """End every program that carries the token; their pids.

    Engines are not touched: their agents' journals know them, and the new agents adopt them.
    """
    return _end(_find(lambda environment: environment.get(TOKEN_VARIABLE) == token))


def end_engines(data_dir: Path, *, kept: Collection[str] = ()) -> list[int]:
    """End every engine of a data directory's nodes, but of those in `kept`; their pids.

    For engines that no agent will end: of nodes that are no longer part of the fleet, or whose agent died just now.
    """
    uids = _uids(data_dir, kept)
    return _end(_find(lambda environment: environment.get(ENGINE_VARIABLE, "").startswith(uids))) if uids else []


def remaining(data_dir: Path) -> list[str]:
    """Every program and engine of a data directory that still runs, as "pid command"."""
    token = (data_dir / "token").read_text().strip()
    uids = _uids(data_dir)

    def ours(environment: dict[str, str]) -> bool:
        engine = environment.get(ENGINE_VARIABLE, "")
        return environment.get(TOKEN_VARIABLE) == token or (bool(uids) and engine.startswith(uids))

    return [f"{process.pid} {_command(process)}" for process in _find(ours)]


def _uids(data_dir: Path, kept: Collection[str] = ()) -> tuple[str, ...]:
    """What the engine tokens of each node begin with."""
    uids = []
    for path in data_dir.glob("nodes/*/agent/node.json"):
        # A file that is broken names no engine; its agent says so when it starts.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if path.parts[-3] not in kept:
                uids.append(str(json.loads(path.read_text())["uid"]) + ".")
    return tuple(uids)


def _end(found: list[psutil.Process]) -> list[int]:
    for process in found:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(found, timeout=END_TIMEOUT_S)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=END_TIMEOUT_S)
    return [process.pid for process in found]


def _find(wanted: Callable[[dict[str, str]], bool]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and wanted(process.environ()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # gone, or somebody else's
    return found


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # children end with their parents, between two of our steps
        process.send_signal(number)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return "gone meanwhile"
