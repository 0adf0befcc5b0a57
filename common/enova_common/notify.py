"""Telling systemd how the program is: READY, WATCHDOG, STOPPING, STATUS over NOTIFY_SOCKET."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)


class Notifier:
    """A sender of sd_notify(3) datagrams; without a socket every call is a no-op that returns False."""

    def __init__(self, address: str = "") -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> Notifier:
        """The socket that systemd named, if it named one."""
        return cls(env.get("NOTIFY_SOCKET", ""))

    def ready(self, status: str = "") -> bool:
        """Start-up is complete: units ordered after this one may start."""
        return self._send("READY=1", status)

    def watchdog(self) -> bool:
        """Still alive: without this every WatchdogSec, systemd kills and restarts the program."""
        return self._send("WATCHDOG=1")

    def stopping(self, status: str = "") -> bool:
        """Shutting down on request."""
        return self._send("STOPPING=1", status)

    def status(self, text: str) -> bool:
        """One line for `systemctl status`."""
        return self._send("", text)

    def _send(self, state: str, status: str = "") -> bool:
        if not self._address:
            return False
        lines = [state] if state else []
        if status:
            lines.append("STATUS=" + " ".join(status.split()))  # a newline would start another assignment
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                # Never wait for systemd: a full queue there must not stop this program.
                sender.settimeout(0)
                sender.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            log.warning("systemd was not told %s: %s", state or "the status", error)
            return False
        return True


def watchdog_interval_s(env: Mapping[str, str] = os.environ) -> float | None:
    """How often to call `Notifier.watchdog`: half of what systemd allows; None where it does not watch this process."""
    microseconds = env.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or int(microseconds) == 0:
        return None
    if env.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None  # inherited from a parent that is the one watched
    return int(microseconds) / 2e6


async def keep_watchdog(
    notifier: Notifier, *, healthy: Callable[[], bool] = lambda: True, env: Mapping[str, str] = os.environ
) -> None:
    """Feeds the watchdog from the event loop while `healthy` says so; returns at once where nobody watches.

    That it runs on the loop is the point: a loop that hangs feeds nothing, and systemd restarts the program.
    """
    interval_s = watchdog_interval_s(env)
    while interval_s is not None:
        if healthy():
            notifier.watchdog()
        await asyncio.sleep(interval_s)
