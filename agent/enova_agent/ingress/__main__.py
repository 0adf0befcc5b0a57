"""`enova-ingress`: reads the settings, serves until SIGTERM or SIGINT, then lets open requests finish."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import uvloop

from enova_agent.ingress.server import Ingress
from enova_agent.ingress.settings import PREFIX, IngressSettings
from enova_common import logs
from enova_common.clock import clock_from_environment
from enova_common.errors import EnovaError
from enova_common.notify import Notifier, keep_watchdog
from enova_common.settings import load_settings

PROGRAM = "enova-ingress"


def main() -> int:
    """The program; its exit code."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="The OpenAI-compatible reverse proxy of one node.")
    parser.add_argument("--config", type=Path, help=f"TOML file of settings; {PREFIX}_* in the environment win over it")
    parser.add_argument("--insecure-http", action="store_true", help="plain HTTP to applications on other hosts")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version('enova')}")
    arguments = parser.parse_args()
    environment = dict(os.environ)
    if arguments.insecure_http:
        environment[f"{PREFIX}_INSECURE_HTTP"] = "true"
    logs.configure(PROGRAM)
    try:
        settings = load_settings(IngressSettings, arguments.config, environment, PREFIX)
        logs.configure(PROGRAM, level=settings.log_level, form=settings.log_form)
        uvloop.run(serve(settings))
    except (EnovaError, OSError) as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")  # for whoever starts it, whatever the form of the log
        return 1
    return 0


async def serve(settings: IngressSettings) -> None:
    """Serve until told to stop."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    notifier = Notifier.from_environment()
    ingress = Ingress(settings, clock=clock_from_environment())
    await ingress.start()
    if settings.ready_file is not None:
        _write_ready(settings.ready_file, {"pid": os.getpid(), "node": settings.node, **ingress.addresses()})
    notifier.ready("serving")
    gc.collect()
    gc.freeze()  # a full collection walks what is left for ever, and stops all streams for tens of milliseconds
    watchdog = loop.create_task(keep_watchdog(notifier))
    await stopped.wait()
    notifier.stopping("letting requests finish")
    await ingress.stop()
    watchdog.cancel()
    with contextlib.suppress(asyncio.CancelledError):  # it was told to end
        await watchdog


def _write_ready(path: Path, facts: dict[str, object]) -> None:
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(facts))
    draft.replace(path)


if __name__ == "__main__":
    raise SystemExit(main())
