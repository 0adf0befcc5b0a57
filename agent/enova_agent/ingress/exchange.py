"""One request at the entry from its arrival to its record: what is measured, and where it is counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from enova_agent.core.model import Route, ServingClass
from enova_agent.ingress.calls import Call, prefix_blocks
from enova_agent.ingress.lengths import Look
from enova_agent.ingress.sse import Usage
from enova_agent.ingress.summaries import Key, Summaries
from enova_common.records import Outcome, RequestRecord

DEFAULT_CLASS = ServingClass(name="default")
TENANTS_MAX = 4096  # hashes of API keys that are remembered


class Ledger(Protocol):
    """Where a record goes."""

    def add(self, record: RequestRecord) -> None:
        """Take one record."""


class Hashes:
    """Keyed hashes: equal inputs are seen to be equal on this node, and say nothing without the key."""

    def __init__(self, key: bytes) -> None:
        self._key = key[:64]
        self._tenants: dict[str, str] = {}

    def tenant(self, credential: str) -> str:
        """The hash of a credential; empty for none."""
        if not credential:
            return ""
        known = self._tenants.get(credential)
        if known is None:
            known = hashlib.blake2b(credential.encode(), key=self._key, digest_size=8, person=b"tenant").hexdigest()
            if len(self._tenants) >= TENANTS_MAX:
                self._tenants.clear()
            self._tenants[credential] = known
        return known

    def prefixes(self, value: dict[str, Any]) -> tuple[str, ...]:
        """For each full block at the head of the prompt, the hash of everything up to its end."""
        return tuple(self._chained(prefix_blocks(value)))

    def _chained(self, blocks: Iterator[bytes]) -> Iterator[str]:
        running = hashlib.blake2b(key=self._key, digest_size=8, person=b"prefix")
        for block in blocks:
            running.update(block)
            yield running.hexdigest()


def class_of(route: Route, name: str) -> ServingClass:
    """The class that a request names; the first of the route, or the default, if it names none that is there."""
    for serving_class in route.classes:
        if serving_class.name == name:
            return serving_class
    return route.classes[0] if route.classes else DEFAULT_CLASS


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One request for a model. Times are read from `now`, the model clock."""

    now: Callable[[], float]
    route: Route
    serving_class: ServingClass
    call: Call
    request_id: str
    tenant_hash: str
    prefix_hashes: tuple[str, ...]
    node: str
    canary: bool
    arrival_s: float
    replica: str = ""
    attempts: int = 0
    status: int = 0
    awaited_s: float = 0.0    # until there was a replica at all
    queue_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    usage: Usage | None = None
    finish_reason: str = ""
    look: Look | None = None  # what was kept of the prompt
    told_end: bool = False  # the client was handed its stream's end marker: it is served, whatever it does next
    _held: Key | None = field(default=None)

    def aimed(self, summaries: Summaries, replica: str) -> None:
        """It is being sent to this replica."""
        self.attempts += 1
        self.replica = replica
        if self.canary:
            return
        key = (self.route.deployment, replica, self.serving_class.name)
        if self._held is None:
            summaries.arrived(key)
        else:
            summaries.held(self._held, -1)
        summaries.held(key, +1)
        self._held = key

    def waits(self, summaries: Summaries) -> None:
        """It is held until there is a replica."""
        key = (self.route.deployment, "", self.serving_class.name)
        summaries.arrived(key)
        summaries.held(key, +1)
        self._held = key

    def token_seen(self) -> None:
        """A piece of the answer with tokens came."""
        self.last_s = self.now()
        if self.first_s is None:
            self.first_s = self.last_s

    def ended(self, outcome: Outcome, *, reason: str = "") -> RequestRecord:
        """The record of its end."""
        usage = self.usage
        return RequestRecord(
            arrival_s=self.arrival_s,
            outcome=outcome,
            deployment=self.route.deployment,
            served_name=self.route.served_name,
            serving_class=self.serving_class.name,
            tenant_hash=self.tenant_hash,
            request_id=self.request_id,
            replica=self.replica,
            node=self.node,
            stream=self.call.stream,
            status=self.status,
            reason=reason,
            attempts=self.attempts,
            prompt_tokens=usage.prompt_tokens if usage else None,
            output_tokens=usage.output_tokens if usage else None,
            max_tokens=self.call.max_tokens,
            finish_reason=self.finish_reason,
            prefix_hashes=self.prefix_hashes,
            queue_s=self.queue_s,
            ttft_s=max(0.0, self.first_s - self.arrival_s) if self.first_s is not None else None,
            tpot_s=self._tpot_s(),
            duration_s=max(0.0, self.now() - self.arrival_s),
        )

    def settle(self, summaries: Summaries, record: RequestRecord) -> None:
        """Count the end, unless the request was a canary."""
        if self.canary:
            return
        if self._held is None:
            summaries.arrived((self.route.deployment, "", self.serving_class.name))
        else:
            summaries.held(self._held, -1)
            self._held = None
        summaries.ended(record)

    def _tpot_s(self) -> float | None:
        if self.usage is None or self.first_s is None or self.last_s is None:
            return None
        per_choice = self.usage.output_tokens / self.call.choices
        return max(0.0, self.last_s - self.first_s) / (per_choice - 1) if per_choice > 1 else None
