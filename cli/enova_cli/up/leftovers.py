"""What an earlier `enova up` on the same data directory left running, found by token and ended.

Engines are not touched: their agents' journals know them, and the new agents adopt them.
"""

from __future__ import annotations

import psutil

from enova_cli.up.layout import TOKEN_VARIABLE

END_TIMEOUT_S = 5.0


def end_leftovers(token: str) -> list[int]:
    """End every process that carries the token; their pids."""
    found = [process for process in psutil.process_iter() if _has_token(process, token)]
    for process in found:
        process.terminate()
    _, alive = psutil.wait_procs(found, timeout=END_TIMEOUT_S)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=END_TIMEOUT_S)
    return [process.pid for process in found]


def _has_token(process: psutil.Process, token: str) -> bool:
    try:
        return process.environ().get(TOKEN_VARIABLE) == token
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False  # gone, or somebody else's
