"""The ingress's end of the local protocol: connected to the agent whenever there is one, for ever.

What the agent says is handed to `LinkEvents`; what this side has to say is sent if somebody listens, and is
otherwise the caller's to keep. A stalled agent is not written to beyond a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from enova_agent.core.local import (
    LINE_BYTES_MAX,
    VERSION,
    AgentHello,
    EnginesUpdate,
    IngressHello,
    MalformedLine,
    Message,
    RoutesApplied,
    RoutesUpdate,
    decode,
    encode,
)
from enova_common.backoff import Backoff

UNSENT_BYTES_MAX = 1 << 20
_BACKOFF = Backoff(initial_s=0.05, maximum_s=2.0, jitter=0.5)
_log = logging.getLogger(__name__)


class LinkEvents(Protocol):
    """Who is told what the agent says."""

    def connected(self, node: str) -> None:
        """The agent of this node greeted us."""

    def routes(self, update: RoutesUpdate) -> None:
        """All routes."""

    def engines(self, update: EnginesUpdate) -> None:
        """All engines of this node."""


class AgentLink:
    """A client of the agent's socket. `run` it as a task."""

    def __init__(self, socket_path: Path, *, hello: Callable[[], IngressHello], events: LinkEvents) -> None:
        self._path = socket_path
        self._hello = hello
        self._events = events
        self._writer: asyncio.StreamWriter | None = None

    @property
    def listening(self) -> bool:
        """Somebody reads what is sent: connected, and not stalled."""
        writer = self._writer
        return (
            writer is not None
            and not writer.is_closing()
            and writer.transport.get_write_buffer_size() < UNSENT_BYTES_MAX
        )

    def send(self, message: Message) -> bool:
        """Send if somebody listens; whether it was."""
        if not self.listening:
            return False
        assert self._writer is not None
        self._writer.write(encode(message))
        return True

    async def run(self) -> None:
        """Connect, listen, and connect again, until cancelled."""
        attempt = 0
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(str(self._path), limit=LINE_BYTES_MAX)
            except OSError as error:
                if attempt == 0:
                    _log.info("no agent at %s yet: %s", self._path, error)
            else:
                attempt = 0
                await self._converse(reader, writer)
            await asyncio.sleep(_BACKOFF.delay_s(attempt, random.random()))  # noqa: S311  jitter keeps no secret
            attempt += 1

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode(self._hello()))
        self._writer = writer
        try:
            while line := await reader.readline():
                self._obey(decode(line))
            _log.info("the agent closed the connection; serving goes on")
        except (OSError, MalformedLine, ValueError) as error:  # ValueError: a line over the limit
            _log.warning("the connection to the agent ended: %s; serving goes on", error)
        finally:
            self._writer = None
            writer.close()
            with contextlib.suppress(OSError):  # the agent is gone: closing has nothing left to say
                await writer.wait_closed()

    def _obey(self, message: Message | None) -> None:
        match message:
            case AgentHello():
                if message.version != VERSION:
                    raise MalformedLine(f"the agent speaks version {message.version}, this is version {VERSION}")
                self._events.connected(message.node)
            case RoutesUpdate():
                self._events.routes(message)
                self.send(RoutesApplied(revision=message.revision))
            case EnginesUpdate():
                self._events.engines(message)
            case _:
                _log.debug("a message that is not for an ingress was ignored: %r", message)
