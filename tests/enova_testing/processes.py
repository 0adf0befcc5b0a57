"""Whether a process is still there: zombies are not, since orphans are reaped when the host's first process likes."""

from __future__ import annotations

import psutil


def is_alive(process: psutil.Process | int) -> bool:
    """True while it is the process that was meant (for a bare pid: any), and no zombie."""
    try:
        known = psutil.Process(process) if isinstance(process, int) else process
        return known.is_running() and known.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
