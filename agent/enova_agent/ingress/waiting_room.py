"""Where requests wait for the first replica of a deployment that was scaled to zero: bounded, and never for ever.

A route says whether its deployment may have no replica (`wakes`). Requests for one that has none are held, told to the
coordinator as held, which wakes the deployment, and go on as soon as a route brings a target. Over a bound a request
is answered at once with 503 and a Retry-After; one whose own time is over, with 429 as at a full replica's queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from enova_agent.core.model import Route
from enova_agent.core.openai_errors import no_replica, queue_timeout
from enova_agent.ingress.calls import Rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingLimits:
    """What is held at most, of all deployments together. Real time."""

    requests_max: int = 100
    bytes_max: int = 64 << 20          # of bodies
    wait_s: float = 300.0              # a start-up of a large model; clients give up at about this age
    retry_after_s: int = 30


class _Routes(Protocol):
    @property
    def routes(self) -> Mapping[str, Route]: ...


class WaitingRoom:
    """Made inside the running loop. `table` is the routes as they are."""

    def __init__(self, limits: WaitingLimits, *, table: Callable[[], _Routes]) -> None:
        self._limits = limits
        self._table = table
        self._requests = 0
        self._bytes = 0
        self._changed = asyncio.Event()

    @property
    def requests(self) -> int:
        """How many wait."""
        return self._requests

    def changed(self) -> None:
        """The routes are different ones: who waits looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def target(self, served_name: str, *, body_bytes: int, own_timeout_s: float | None = None) -> Route:
        """The name's route once it leads to a replica. Raises Rejected over a bound, or if the name is gone.

        `own_timeout_s` is how long the request itself is willing to wait, where it says so.
        """
        limits = self._limits
        full = self._requests >= limits.requests_max or self._bytes + body_bytes > limits.bytes_max
        if full:
            raise self._refused(served_name)
        self._requests += 1
        self._bytes += body_bytes
        try:
            async with asyncio.timeout(min(limits.wait_s, own_timeout_s or limits.wait_s)):
                while True:
                    changed = self._changed
                    route = self._table().routes.get(served_name)
                    if route is None or not (route.targets or route.wakes):
                        raise self._refused(served_name)
                    if route.targets:
                        return route
                    await changed.wait()
        except TimeoutError as error:
            if own_timeout_s is not None and own_timeout_s <= limits.wait_s:
                raise Rejected(queue_timeout(own_timeout_s)) from error
            raise self._refused(served_name) from error
        finally:
            self._requests -= 1
            self._bytes -= body_bytes

    def _refused(self, served_name: str) -> Rejected:
        return Rejected(no_replica(served_name, retry_after_s=self._limits.retry_after_s))
