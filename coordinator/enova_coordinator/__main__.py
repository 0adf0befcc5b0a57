"""enova-coordinator: settings, store, signals. SIGTERM resigns, so that another leads at once, and ends."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from pathlib import Path

from enova_common import logs
from enova_common.clock import clock_from_environment
from enova_common.errors import EnovaError
from enova_common.notify import Notifier, keep_watchdog
from enova_common.settings import load_settings
from enova_coordinator.coordinator import Coordinator, open_store
from enova_coordinator.settings import CoordinatorSettings

log = logging.getLogger(__name__)


def main() -> None:
    """Run until told to stop. Exit code 1 where it cannot run, with one line that says why."""
    parser = argparse.ArgumentParser(prog="enova-coordinator", description=__doc__)
    parser.add_argument("--config", type=Path, help="the settings, TOML; ENOVA_COORDINATOR_* wins over it")
    arguments = parser.parse_args()
    try:
        settings = load_settings(CoordinatorSettings, arguments.config, os.environ, "ENOVA_COORDINATOR")
        logs.configure("enova-coordinator", level=settings.log_level, form=settings.log_form)
        asyncio.run(_run(settings))
    except EnovaError as error:
        sys.stderr.write(f"enova-coordinator: {error}\n")
        raise SystemExit(1) from error
    except OSError as error:
        sys.stderr.write(f"enova-coordinator: {error.filename or 'the system'}: {error.strerror or error}\n")
        raise SystemExit(1) from error


async def _run(settings: CoordinatorSettings) -> None:
    clock = clock_from_environment()
    stop, listening = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    coordinator = Coordinator(settings, await open_store(settings), clock)
    announcing = asyncio.create_task(_announce(coordinator, stop, listening))
    try:
        await coordinator.run(stop, listening=listening)
    finally:
        announcing.cancel()
        await asyncio.gather(announcing, return_exceptions=True)


async def _announce(coordinator: Coordinator, stop: asyncio.Event, listening: asyncio.Event) -> None:
    """Tell systemd and whoever started this program that it answers, then keep the watchdog fed."""
    notifier = Notifier.from_environment()
    await listening.wait()
    facts = {
        "pid": os.getpid(),
        "name": coordinator.settings.name,
        "api_address": coordinator.address,
        "metrics_address": coordinator.metrics_address,
    }
    if coordinator.settings.ready_file is not None:
        _write_ready_file(coordinator.settings.ready_file, facts)
    log.info("serving on %s, metrics on %s", coordinator.address, coordinator.metrics_address or "nothing")
    notifier.ready(f"serving on {coordinator.address}")
    watchdog = asyncio.create_task(keep_watchdog(notifier))
    try:
        await stop.wait()
        notifier.stopping()
    finally:
        watchdog.cancel()
        await asyncio.gather(watchdog, return_exceptions=True)


def _write_ready_file(path: Path, facts: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
