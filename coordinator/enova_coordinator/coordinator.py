"""One coordinator, put together: what every one of them runs, and what the leader runs besides."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from enova_common import rpc
from enova_common.clock import ModelClock
from enova_common.errors import InvalidField, Unavailable
from enova_coordinator.advice_loop import AdviceFigures, AdviceLoop
from enova_coordinator.advisor import Advisor
from enova_coordinator.agents import Agents
from enova_coordinator.calibration_loop import CalibrationLoop
from enova_coordinator.capacities import Capacities
from enova_coordinator.controller import Controller, ControllerSettings
from enova_coordinator.core.liveness import LivenessLimits
from enova_coordinator.core.model import Snapshot
from enova_coordinator.core.reconcile import ReconcileLimits
from enova_coordinator.core.series import pace
from enova_coordinator.core.verdicts import Verdict
from enova_coordinator.demand_history import DemandHistory
from enova_coordinator.detection_loop import DetectionFigures, DetectionLoop
from enova_coordinator.election import Election, Leadership
from enova_coordinator.events import EventLog
from enova_coordinator.figures import figures
from enova_coordinator.foresight import Foresight
from enova_coordinator.frame_inbox import FrameInbox
from enova_coordinator.gpus_file import read_gpu_types
from enova_coordinator.housekeeping import Housekeeping, HousekeepingFigures
from enova_coordinator.known_models import KnownModels
from enova_coordinator.length_loop import LearningFigures, LengthLoop, sweep_while_following
from enova_coordinator.observability import MetricsServer
from enova_coordinator.policy_loop import PolicyLoop, PolicyLoopFigures
from enova_coordinator.policy_process import PolicyProcess
from enova_coordinator.recorder import Recorder
from enova_coordinator.rollups import Rollups
from enova_coordinator.service.agent import AgentPace
from enova_coordinator.service.frames import HISTOGRAM_BOUNDS, engine_counters
from enova_coordinator.service.leading import Chair, Leading
from enova_coordinator.service.register import SERVICES, add_services
from enova_coordinator.service_log import ServiceLog
from enova_coordinator.settings import CoordinatorSettings, StoreKind
from enova_coordinator.snapshot import Mirror
from enova_coordinator.store import Store
from enova_coordinator.store.etcd import EtcdStore
from enova_coordinator.store.etcd.settings import EtcdSettings
from enova_coordinator.store.sqlite import SqliteStore
from enova_coordinator.telemetry import Telemetry, TelemetryLimits

CANCEL_AGAIN_S = 2.0
FUTURE_REAL_S = 30.0               # clocks of hosts differ by less, or something is wrong with them
STOP_GRACE_S = 0.5
DETECTION_TIMEOUT_S = 10.0         # a step of ten thousand replicas takes under two
LEARNING_TIMEOUT_S = 60.0          # seeking communities takes seconds of one core

log = logging.getLogger(__name__)


async def open_store(settings: CoordinatorSettings) -> Store:
    """The store that the settings name."""
    store = settings.store
    if store.kind is StoreKind.SQLITE:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        return await SqliteStore.open(store.path or settings.data_dir / "store.sqlite")
    tls = store.tls
    return await EtcdStore.open(
        EtcdSettings(
            endpoints=tuple(store.endpoints),
            ca_file=tls.ca if tls is not None else None,
            certificate_file=tls.cert if tls is not None else None,
            key_file=tls.key if tls is not None else None,
            username=store.user,
            password=_password(store.password_file),
        )
    )


def _password(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text("utf-8").strip()
    except OSError as error:
        raise InvalidField(f"cannot read {path}: {error.strerror}", field="store.password_file") from error


class Coordinator:
    """All parts of one coordinator process, around one store. Made inside the running loop."""

    def __init__(self, settings: CoordinatorSettings, store: Store, clock: ModelClock) -> None:
        self.settings = settings
        self.clock = clock
        self.store = store
        self.policies = PolicyProcess(timeout_s=settings.scaling.timeout_s)
        self.advisor = Advisor(
            lambda: PolicyProcess(timeout_s=settings.advice.timeout_s, work="advice"),
            now_s=time.time,
            creation_wait_s=settings.advice.creation_wait_s,
            types=read_gpu_types(settings.advice.gpus_file),
        )
        self.learner = PolicyProcess(timeout_s=LEARNING_TIMEOUT_S, work="lengths")
        self.learning_figures = LearningFigures()
        self.detector = PolicyProcess(timeout_s=DETECTION_TIMEOUT_S, work="detection")
        self.detection_figures = DetectionFigures()
        self.advice_figures = AdviceFigures()
        self.policy_figures = PolicyLoopFigures()
        self.housekeeping_figures = HousekeepingFigures()
        self.rollups = Rollups(settings.data_dir / "rollups.sqlite", file_bytes_max=settings.rollup_bytes_max)
        self.recorder = Recorder(
            settings.data_dir / "situations.sqlite", file_bytes_max=settings.situation_bytes_max
        )
        self.events = EventLog()
        self.mirror = Mirror(store, changed=self._wake)
        self.agents = Agents(now_s=time.monotonic, changed=self._wake)
        self.controller = Controller(
            store, self.mirror, self.agents, self.events, settings=_controller_settings(settings)
        )
        self.pace = pace(time_scale=clock.scale, frame_interval_s=settings.frame_interval_s)
        limits = TelemetryLimits(
            step_s=self.pace.step_s,
            window_s=settings.telemetry_window_s,
            future_s=max(FUTURE_REAL_S, FUTURE_REAL_S * clock.scale),
        )
        self.telemetry = Telemetry(limits, now_s=clock.now, owns=self._owns)
        self.inbox = FrameInbox(now_s=clock.now, old_s=limits.future_s)
        self.server = rpc.create_server()
        self.address = rpc.listen(self.server, settings.listen, settings.tls)
        self.advertised = settings.advertise or self.address
        self.election = Election(
            store, coordinator_id=settings.name, api_address=self.advertised, ttl_s=settings.leader_ttl_s
        )
        self.chair = Chair(leader_address=self._leader_address)
        self.metrics_address = ""

    async def run(self, stop: asyncio.Event, *, listening: asyncio.Event) -> None:
        """Serve until `stop`; sets `listening` once callers are answered. A part that fails ends it all."""
        self.settings.data_dir.mkdir(parents=True, exist_ok=True)
        await rpc.add_standard_services(self.server, SERVICES)
        add_services(
            self.server,
            self.store,
            self.chair,
            coordinator=self.settings.name,
            pace=AgentPace(
                heartbeat_interval_s=self.settings.heartbeat_interval_s, frame_interval_s=self.pace.frame_interval_s
            ),
            now_s=time.time,
            model_time_s=self.clock.now,
        )
        async with self._metrics(), self._serving():
            listening.set()
            await first_ended([
                asyncio.create_task(stop.wait(), name="stop"),
                asyncio.create_task(self.election.run(self.lead), name="election"),
                asyncio.create_task(self.mirror.run(), name="mirror"),
                asyncio.create_task(self._sweep_lengths(), name="lengths"),
            ])

    async def lead(self, leadership: Leadership) -> None:
        """What only the leader runs, for one term."""
        verdicts: dict[str, Verdict] = {}
        models = KnownModels(now_s=time.monotonic)
        calibration = CalibrationLoop(
            self.store,
            ServiceLog(self.telemetry, read=engine_counters),
            self.policies,
            models,
            types=self.advisor.types,
            snapshot=lambda: self.controller.snapshot,
            guard=leadership.guard,
            real_s=self.clock.real_s,
        )
        detection = self._detection(leadership, calibration)
        advice_loop = self._advice_loop(leadership, models)
        capacities = self._capacities(models, advice_loop)
        policy_loop = self._policy_loop(models, verdicts, detection, capacities)
        housekeeping = Housekeeping(
            self.store,
            self.telemetry,
            self.rollups,
            snapshot=lambda: self.controller.snapshot,
            guard=leadership.guard,
            history_keep_s=self.settings.store.history_keep_s,
        )
        self.housekeeping_figures = housekeeping.figures
        length_loop = LengthLoop(
            self.controller, self.telemetry, models, self.learner, folder=self.settings.data_dir / "lengths"
        )
        self.learning_figures = length_loop.figures
        self.chair.current = Leading(
            fence=leadership,
            control=self.controller,
            agents=self.agents,
            telemetry=self.telemetry,
            rollups=self.rollups,
            recorder=self.recorder,
            events=self.events,
            advisor=self.advisor,
            calibration=calibration,
            detection=detection,
            inbox=self.inbox,
            verdicts=verdicts,
            lengths=length_loop.states,
            models=models,
        )
        self.advisor.corrections = calibration.corrections
        works = (
            self.controller.run(leadership),
            policy_loop.run(),
            advice_loop.run(),
            calibration.run(),
            length_loop.run(),
            detection.run(),
            housekeeping.run(),
        )
        try:
            await first_ended(asyncio.create_task(work) for work in works)
        finally:
            self.chair.current = None
            capacities.close()
            self.agents.resign(Unavailable("this coordinator leads no longer", reason="NOT_LEADER"))

    def _capacities(self, models: KnownModels, advice_loop: AdviceLoop) -> Capacities:
        return Capacities(
            self.advisor,
            models,
            self.telemetry,
            snapshot=lambda: self.controller.snapshot,
            observed=advice_loop.observed,
        )

    def _policy_loop(
        self, models: KnownModels, verdicts: dict[str, Verdict], detection: DetectionLoop, capacities: Capacities
    ) -> PolicyLoop:
        loop = PolicyLoop(
            self.store,
            self.controller,
            self.telemetry,
            self.agents,
            self.policies,
            settings=self.settings.scaling,
            real_s=self.clock.real_s,
            verdicts_by_name=verdicts,
            models=models,
            dead=detection.dead,
            foresight=Foresight(
                self.telemetry,
                DemandHistory(self.telemetry, self.rollups),
                capacities,
                self.policies,
                verdicts=lambda: detection.verdicts,
                scale=self.clock.scale,
                record=self.recorder.put,
            ),
        )
        self.policy_figures = loop.figures
        return loop

    def _advice_loop(self, leadership: Leadership, models: KnownModels) -> AdviceLoop:
        loop = AdviceLoop(
            self.store,
            leadership,
            self.controller,
            self.telemetry,
            self.advisor,
            events=self.events,
            models=models,
            settings=self.settings.advice,
            real_s=self.clock.real_s,
        )
        self.advice_figures = loop.figures
        return loop

    def _detection(self, leadership: Leadership, calibration: CalibrationLoop) -> DetectionLoop:
        loop = DetectionLoop(
            self.store,
            self.inbox,
            self.detector,
            calibration,
            self.events,
            snapshot=lambda: self.controller.snapshot,
            guard=leadership.guard,
            session=f"{self.settings.name}.{leadership.term}",
            clock=self.clock,
            telemetry_step_s=self.pace.step_s,
            bounds=HISTOGRAM_BOUNDS,
            state_file=self.settings.data_dir / "detection.npz",
        )
        self.detection_figures = loop.figures
        return loop

    async def _sweep_lengths(self) -> None:
        """While another coordinator leads, nobody else looks after what this one kept when it led."""
        mirror = self.mirror
        await sweep_while_following(
            self.settings.data_dir / "lengths",
            snapshot=lambda: Snapshot(
                revision=mirror.revision, deployments=mirror.deployments, unreadable=frozenset(mirror.unreadable)
            ),
            leads=lambda: self.chair.current is not None,
        )

    @contextlib.asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        await self.server.start()
        try:
            yield
        finally:
            await self.server.stop(STOP_GRACE_S)
            await self.policies.close()
            await self.advisor.close()
            await self.learner.close()
            await self.detector.close()
            await asyncio.to_thread(self.rollups.close)
            await asyncio.to_thread(self.recorder.close)
            await self.store.close()

    @contextlib.asynccontextmanager
    async def _metrics(self) -> AsyncIterator[None]:
        if not self.settings.metrics_listen:
            yield
            return
        server = MetricsServer(self.settings.metrics_listen, lambda: figures(self), tls=self.settings.tls)
        self.metrics_address = server.address
        try:
            yield
        finally:
            await asyncio.to_thread(server.close)

    def _wake(self) -> None:
        self.controller.wake()

    def _owns(self, node: str, replica: str) -> bool:
        known = self.controller.snapshot.replicas.get(replica)
        return known is not None and any(member.node == node for member in known.members)

    def _leader_address(self) -> str:
        leader = self.election.leader
        if leader is None or leader.api_address == self.advertised:
            return ""
        return leader.api_address


async def first_ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Wait until the first of the tasks ends, end the others in their order, then raise what any of them raised."""
    waiting = list(tasks)
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            # Again and again: what waits in a library may lose a cancellation, and a term must end.
            while not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=CANCEL_AGAIN_S)
    for task in waiting:
        if not task.cancelled():
            task.result()


def _controller_settings(settings: CoordinatorSettings) -> ControllerSettings:
    return ControllerSettings(
        liveness=LivenessLimits(suspect_s=settings.suspect_after_s, lost_s=settings.lost_after_s),
        reconcile=ReconcileLimits(lost_grace_s=settings.lost_grace_s),
    )
