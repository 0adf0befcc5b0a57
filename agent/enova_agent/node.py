"""The node as its session, its ingress and its frames see it: joins supervisor, GPUs, local socket and disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from enova_agent.core.command import downloads_refused
from enova_agent.core.hub import hub_model
from enova_agent.core.local import HeldUpdate
from enova_agent.core.model import Assignment, LocalEngine, ReplicaView, Route, RouteTable
from enova_agent.core.node import ModelFacts, NodeFacts, NodeStatus, next_beat_s
from enova_agent.core.telemetry import EngineScrape
from enova_agent.disk import AssignmentFile
from enova_agent.frames import Gpus
from enova_agent.host import Scrape
from enova_agent.hub import inspect_hub
from enova_agent.inspect_model import inspect_directory, inspect_simulated
from enova_agent.local_server import LocalServer

log = logging.getLogger(__name__)


class Supervisor(Protocol):
    """What the node asks of its engines' supervision."""

    @property
    def assignment_revision(self) -> int:
        """The revision of the assignment worked on."""
        ...

    def apply(self, assignment: Assignment) -> bool:
        """Works on this assignment from now on; False if a newer one is known."""
        ...

    def views(self) -> tuple[ReplicaView, ...]:
        """What each replica of this node is."""
        ...

    def local_engines(self) -> tuple[LocalEngine, ...]:
        """What an ingress may send to."""
        ...

    def held(self, update: HeldUpdate | None) -> None:
        """What the ingresses hold."""
        ...

    def scrapes(self) -> Mapping[str, Scrape]:
        """The newest metrics of each replica that serves."""
        ...

    def resident_bytes(self) -> Mapping[str, int]:
        """What the processes of each engine hold in memory."""
        ...

    def logs(self, replica: str, *, tail_lines: int, follow: bool) -> AsyncIterator[list[str]]:
        """Lines of a replica's engine."""
        ...

    async def stop_all(self, drain_timeout_s: float) -> int:
        """Ends all engines; how many there were."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeIdentity:
    """What never changes of a node while its agent runs."""

    name: str
    uid: str
    cluster: str
    labels: Mapping[str, str]
    boot_id: str
    agent_version: str
    engine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSources:
    """Where this host's models are."""

    roots: Sequence[Path] = ()
    catalogue: Path | None = None
    allow_downloads: bool = False
    hub_cache: Path | None = None


class EngineFigures:
    """The supervisor's scrapes in the form that frames are made of."""

    def __init__(self, supervisor: Supervisor, *, agent_instance: str, agent_start_s: float) -> None:
        self._supervisor = supervisor
        self._agent_instance = agent_instance
        self._agent_start_s = agent_start_s

    def views(self) -> tuple[ReplicaView, ...]:
        """Every member that this node has."""
        return self._supervisor.views()

    def scrapes(self) -> Mapping[str, EngineScrape]:
        """The newest scrape of each replica."""
        memory = self._supervisor.resident_bytes()
        views = {view.replica: view for view in self._supervisor.views()}
        return {
            name: self._scrape(views[name], scrape, memory.get(name))
            for name, scrape in self._supervisor.scrapes().items()
            if name in views and scrape.time_s > 0
        }

    def _scrape(self, view: ReplicaView, scrape: Scrape, resident_bytes: int | None) -> EngineScrape:
        return EngineScrape(
            replica=view.replica,
            # A process id may come again, a process with the same start time does not.
            instance=f"{view.uid}.{view.pid}.{view.start_time_s:.3f}.{self._agent_instance}",
            taken_s=scrape.time_s,
            adopted=view.start_time_s < self._agent_start_s,
            metrics=scrape.metrics,
            error=scrape.error,
            resident_memory_bytes=None if resident_bytes is None else float(resident_bytes),
            canaries_before=scrape.canaries_before,
            canaries=scrape.canaries,
        )


class Node:
    """This node, for the session (facts, status, commands) and for the local socket (routes, engines)."""

    def __init__(
        self,
        identity: NodeIdentity,
        *,
        supervisor: Supervisor,
        gpus: Gpus,
        local: LocalServer,
        assignments: AssignmentFile,
        models: ModelSources,
    ) -> None:
        self._identity = identity
        self._supervisor = supervisor
        self._gpus = gpus
        self._local = local
        self._assignments = assignments
        self._models = models
        self._routes = RouteTable()
        self._last: Assignment | None = None
        self._stopped = False

    def facts(self) -> NodeFacts:
        """Who this node is."""
        identity, ingress = self._identity, self._local.ingress
        return NodeFacts(
            name=f"nodes/{identity.name}",
            uid=identity.uid,
            cluster=identity.cluster,
            labels=identity.labels,
            gpus=self._gpus.describe(),
            boot_id=identity.boot_id,
            agent_version=identity.agent_version,
            engine=identity.engine,
            openai_address="" if ingress is None else ingress.openai_address,
            hop_address="" if ingress is None else ingress.hop_address,
        )

    def status(self) -> NodeStatus:
        """What is, on this node."""
        return NodeStatus(
            assignment_revision=self._supervisor.assignment_revision,
            routes_revision=self._local.routes_revision,
            ingress_connected=self._local.ingress is not None,
            views=self._supervisor.views(),
            gpus=self._gpus.describe(),
        )

    def resume(self) -> None:
        """Goes on with the last assignment, before any coordinator is reached."""
        self._last = self._assignments.load()
        if self._last is not None:
            log.info("going on with assignment %d of term %d", self._last.revision, self._last.term)
            self._supervisor.apply(self._last)

    async def assign(self, assignment: Assignment) -> None:
        """Makes this the node's assignment."""
        repeated = self._last is not None and assignment == self._last
        if self._stopped and repeated:
            return  # engines were stopped on this host's request: only a new assignment starts any
        if not self._supervisor.apply(assignment):
            log.warning("assignment %d is older than the one that is worked on", assignment.revision)
            return
        self._stopped = False
        self._last = assignment
        if not repeated:
            await self._keep(assignment)

    def route(self, *, revision: int, base_revision: int, routes: tuple[Route, ...], removed: tuple[str, ...]) -> bool:
        """Applies a delta of the routes; False if it builds on another revision."""
        merged = self._routes.merged(revision=revision, base_revision=base_revision, routes=routes, removed=removed)
        if merged is None:
            return False
        self._routes = merged
        self._local.set_routes(merged)
        return True

    async def inspect(self, model: str) -> ModelFacts:
        """What this host knows of a model."""
        catalogue = self._models.catalogue
        if catalogue is not None and not model.startswith("/"):
            return await asyncio.to_thread(inspect_simulated, model, catalogue)
        hub = hub_model(model)
        if hub is not None and not self._models.allow_downloads:
            raise downloads_refused(model)
        if hub is not None:
            return await asyncio.to_thread(inspect_hub, hub, self._models.hub_cache)
        return await asyncio.to_thread(inspect_directory, model, roots=self._models.roots)

    def logs(self, replica: str, *, tail_lines: int, follow: bool) -> AsyncIterator[Sequence[str]]:
        """Lines of a replica's log."""
        return self._supervisor.logs(replica, tail_lines=tail_lines, follow=follow)

    async def stop_engines(self, drain_timeout_s: float) -> int:
        """Ends all engines; a restart of the agent does not bring them back, only a new assignment does."""
        self._stopped = True
        if self._last is not None:
            nothing = Assignment(revision=self._last.revision, term=self._last.term)
            await self._keep(nothing)
        return await self._supervisor.stop_all(drain_timeout_s)

    async def _keep(self, assignment: Assignment) -> None:
        try:
            await asyncio.to_thread(self._assignments.save, assignment)
        except OSError as error:
            # It is obeyed all the same: a full disk must not stop a fleet from being steered.
            log.warning("assignment %d cannot be kept: %s", assignment.revision, error)


class FrameBeat:
    """Calls `make` once an interval, without drift, and measures how late the loop is."""

    def __init__(self, make: Callable[[], None], interval_s: Callable[[], float]) -> None:
        self._make = make
        self._interval_s = interval_s
        self.lag_s = 0.0
        self._next_s = 0.0

    @property
    def late_s(self) -> float:
        """How long the next beat is overdue."""
        return max(0.0, asyncio.get_running_loop().time() - self._next_s) if self._next_s else 0.0

    async def run(self) -> None:
        """Beats until it is cancelled; a frame that fails costs that frame."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = self._next_s = next_beat_s(loop.time(), self._interval_s())
            await asyncio.sleep(due_s - loop.time())
            self.lag_s = max(0.0, loop.time() - due_s)
            try:
                self._make()
            except Exception:
                log.exception("a frame could not be made")
