"""An outside observer of a fleet: etcd's own history, agents' files, and engines in /proc; it asks enova nothing.

The history is read with the raw watch of etcd's protocol. A write is *stale* if at its revision the leader key's
creation revision was not the term that the write was signed with (see `stoppable_coordinator`).
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from enova.etcd import rpc_pb2, rpc_pb2_grpc
from enova_agent import procfs
from enova_agent.core.command import REPLICA_VARIABLE, TOKEN_VARIABLE
from enova_coordinator.election import LEADER_KEY
from enova_coordinator.store import prefix_end
from enova_testing.stoppable_coordinator import SIGNATURE_KEY

SCAN_S = 0.1
EXEC_S = 1.0  # a process that is younger may not have its environment yet
PREFIX = "/enova/"
STATE_PREFIX = "/enova/v1/"


@dataclass(slots=True)
class Write:
    """All keys that one revision changed; a value of None: deleted."""

    revision: int
    term_then: int
    """The leader's term when it was made; 0: nobody led."""
    values: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """The keys of enova's own, but the leader's."""
        return [key for key in self.values if key.startswith(STATE_PREFIX) and key != LEADER_KEY]

    @property
    def signed_term(self) -> int:
        """The term in which it was made, by its signature; -1 if there is none."""
        signature = self.values.get(SIGNATURE_KEY)
        return int(signature["term"]) if signature is not None else -1

    @property
    def stale(self) -> bool:
        """Whether it changed enova's state in another term than the one that lasted."""
        return bool(self.keys) and self.signed_term != self.term_then


@dataclass(frozen=True, slots=True)
class Leader:
    """Who leads, by the leader key."""

    name: str
    term: int
    since_s: float
    """When this observer learned it, monotonic."""


class EtcdObserver:
    """Follows etcd from revision 1, in a thread, until closed. Survives restarts of the server."""

    def __init__(self, endpoint: str) -> None:
        self.writes: list[Write] = []
        self.leaders: list[Leader | None] = [None]
        self.failures = 0
        self._endpoint = endpoint
        self._next_revision = 1
        self._term = 0
        self._closing = threading.Event()
        self._channel = grpc.insecure_channel(endpoint, [("grpc.max_reconnect_backoff_ms", 300)])
        self._call: Any = None
        self._thread = threading.Thread(target=self._run, name="etcd-observer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop following."""
        self._closing.set()
        if self._call is not None:
            self._call.cancel()
        self._thread.join(10)
        self._channel.close()

    @property
    def leader(self) -> Leader | None:
        """Who leads now."""
        return self.leaders[-1]

    def after(self, leader: Leader) -> Leader | None:
        """Who led last in a later term; None until somebody did."""
        later = (each for each in reversed(self.leaders) if each is not None and each.term > leader.term)
        return next(later, None)

    def stale(self) -> list[Write]:
        """The writes that should not have been."""
        return [write for write in self.writes if write.stale]

    def history(self, key: str) -> list[dict[str, Any]]:
        """All values that a key ever had."""
        return [value for write in self.writes if (value := write.values.get(key)) is not None]

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._follow()
            except grpc.RpcError:  # the server is away: ask again from where we are
                self.failures += 1
                self._closing.wait(SCAN_S)

    def _follow(self) -> None:
        create = rpc_pb2.WatchCreateRequest(
            key=PREFIX.encode(), range_end=prefix_end(PREFIX).encode(), start_revision=self._next_revision
        )
        request = rpc_pb2.WatchRequest(create_request=create)
        self._call = rpc_pb2_grpc.WatchStub(self._channel).Watch(self._asking(request))
        for answer in self._call:
            assert not answer.compact_revision, "compacted before it was seen"
            for event in answer.events:
                self._see(event)

    def _asking(self, request: rpc_pb2.WatchRequest) -> Iterator[rpc_pb2.WatchRequest]:
        yield request
        self._closing.wait()

    def _see(self, event: Any) -> None:
        revision, key = event.kv.mod_revision, event.kv.key.decode()
        if not self.writes or self.writes[-1].revision != revision:
            self.writes.append(Write(revision, self._term))
        self._next_revision = revision + 1
        deleted = event.type == rpc_pb2.Event.DELETE
        value = None if deleted else json.loads(event.kv.value)
        self.writes[-1].values[key] = value
        if key == LEADER_KEY:
            self._term = 0 if deleted else event.kv.create_revision
            leader = None if value is None else Leader(value["coordinator_id"], self._term, time.monotonic())
            self.leaders.append(leader)


@dataclass(slots=True)
class Engine:
    """One start of one engine: all processes that bear its token."""

    replica: str
    gpus: frozenset[str]
    pids: set[int] = field(default_factory=set)


class HostObserver:
    """Looks every 100 ms at /proc and at the files of the agents below `nodes`."""

    def __init__(self, nodes: Mapping[str, Path]) -> None:
        self.engines: dict[str, Engine] = {}
        """Every engine that was ever seen, by token."""
        self.overlaps: list[str] = []
        self.terms: dict[str, list[int]] = {name: [] for name in nodes}
        """What each agent's term file said, without repetitions."""
        self.assignments: dict[str, list[dict[str, Any]]] = {name: [] for name in nodes}
        self.scans = 0
        self._nodes = nodes
        self._uids: dict[str, str] = {}
        self._known: dict[tuple[int, int], tuple[float, str]] = {}  # (pid, start) -> (first seen, token)
        self._living: set[str] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="host-observer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._closing.set()
        self._thread.join(10)

    @property
    def living(self) -> dict[str, Engine]:
        """The engines that run now, by token."""
        return {token: self.engines[token] for token in self._living}

    def _run(self) -> None:
        while not self._closing.wait(SCAN_S):
            for name, folder in self._nodes.items():
                self._look_at_files(name, folder)
            self._look_at_processes()
            self.scans += 1

    def _look_at_files(self, name: str, folder: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._uids.setdefault(name, json.loads((folder / "node.json").read_text())["uid"])
        with contextlib.suppress(FileNotFoundError):
            term = json.loads((folder / "term.json").read_text())["term"]
            if self.terms[name][-1:] != [term]:
                self.terms[name].append(term)
        with contextlib.suppress(FileNotFoundError):
            assignment = json.loads((folder / "assignment.json").read_text())["assignment"]
            if self.assignments[name][-1:] != [assignment]:
                self.assignments[name].append(assignment)

    def _look_at_processes(self) -> None:
        living: set[str] = set()
        now_s = time.monotonic()
        table = procfs.processes()
        for entry in table.values():
            if token := self._token(entry, now_s) if entry.alive else "":
                living.add(token)
                self.engines[token].pids.add(entry.pid)
        self._living = living
        claims: dict[str, set[str]] = defaultdict(set)
        for token in living:
            for gpu in self.engines[token].gpus:
                claims[gpu].add(token)
        self.overlaps += [f"{gpu}: {sorted(tokens)}" for gpu, tokens in claims.items() if len(tokens) > 1]
        alive = {(entry.pid, entry.start_ticks) for entry in table.values()}
        self._known = {key: value for key, value in self._known.items() if key in alive}

    def _token(self, entry: procfs.Stat, now_s: float) -> str:
        """The token of an engine of ours that the process belongs to; read once it has had time for its exec."""
        key = (entry.pid, entry.start_ticks)
        first_s, token = self._known.get(key, (now_s, ""))
        if not token and now_s - first_s <= EXEC_S:
            environment = procfs.environment(entry.pid)
            token = environment.get(TOKEN_VARIABLE, "")
            if not token.startswith(tuple(f"{uid}." for uid in self._uids.values()) or ("\0",)):
                token = ""
            if token:
                gpus = frozenset(filter(None, environment.get("CUDA_VISIBLE_DEVICES", "").split(",")))
                self.engines.setdefault(token, Engine(environment.get(REPLICA_VARIABLE, ""), gpus))
        self._known[key] = (first_s, token)
        return token
