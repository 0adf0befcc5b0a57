"""Bounded logs of the programs that `enova up` runs.

A program keeps its log open to append, so a log over its bound is copied to `.1`, in place of the one before,
and emptied. What is written between the two steps is lost: a line or two, and only of a program that says much.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from pathlib import Path

LOG_BYTES_MAX = 16 << 20  # a program; with the one before, twice that
LOG_CHECK_PERIOD_S = 5.0

log = logging.getLogger(__name__)


async def keep_bounded(folder: Path) -> None:
    """Bound the logs of a folder until cancelled."""
    while True:
        await asyncio.sleep(LOG_CHECK_PERIOD_S)
        await asyncio.to_thread(bound_logs, folder)


def bound_logs(folder: Path, bytes_max: int = LOG_BYTES_MAX) -> None:
    """Empty every log that is over its bound; its words are kept beside it, if there is room."""
    for path in sorted(folder.glob("*.log")):
        try:
            if path.stat().st_size > bytes_max:
                _keep_copy(path)
                os.truncate(path, 0)
        except OSError as error:
            log.warning("%s cannot be bounded: %s", path, error)


def _keep_copy(path: Path) -> None:
    previous = path.with_name(path.name + ".1")
    try:
        shutil.copyfile(path, previous)
    except OSError as error:  # most likely no space: then emptying the log matters more than its words
        log.warning("%s cannot be kept as %s: %s", path, previous.name, error)
