"""Carries faults out: waits for their trigger, makes the engine suffer, and lets it recover."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
from collections.abc import Callable

from enova_recommender.performance import Slowed
from enova_simulator.engine.core_process import CoreProcess
from enova_simulator.engine.faults import START_KINDS, Fault, FaultKind
from enova_simulator.engine.generation import Generator
from enova_simulator.engine.gpu import GpuReader

BEAT_S = 0.2  # real seconds between looks at the core, and steps of a leak
_SLOWING = frozenset({FaultKind.SLOW, FaultKind.THROTTLE})
LEAK_BYTES_MAX = 2 << 30  # a test machine must survive its own faults
log = logging.getLogger(__name__)


class Ills:
    """The faults of one running engine, and the watch over its core process."""

    def __init__(
        self, generator: Generator, gpu: GpuReader, core: CoreProcess | None, *, core_died: Callable[[], None]
    ) -> None:
        self._generator, self._gpu, self._core, self._core_died = generator, gpu, core, core_died
        self._faults: list[Fault] = []
        self._pending: list[tuple[Fault, int, float]] = []  # fault, request count and model time of its trigger
        self._lifts: list[tuple[float, Fault]] = []
        self._leaked = bytearray()
        self._leaked_blocks = 0.0
        self._requests = 0
        self._watches_core = core is not None
        self.ignores_sigterm = False
        generator.on_request = self._count_request
        generator.core_stopped = lambda: core is not None and core.is_stopped

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Faults at work and those that wait for their trigger."""
        return (*self._faults, *(fault for fault, _, _ in self._pending))

    def add(self, fault: Fault) -> None:
        """Let a fault strike now or at its trigger; ValueError for those of the start."""
        if fault.kind in START_KINDS:
            raise ValueError(f"kind: {fault.kind} strikes at the start only; give it by --simulated-faults")
        if fault.after_requests or fault.after_s:
            after_s = self._generator.now_s() + fault.after_s if fault.after_s else float("inf")
            after_requests = self._requests + fault.after_requests if fault.after_requests else 0
            self._pending.append((fault, after_requests, after_s))
        else:
            self._strike(fault)

    def lift(self) -> None:
        """End all faults that can end."""
        self._pending.clear()
        self._lifts.clear()
        self._faults.clear()
        self._apply()

    def beat(self) -> None:
        """Look after triggers, ends, leaks and the core; again and again on the loop."""
        now_s = self._generator.now_s()
        due = [entry for entry in self._pending if now_s >= entry[2]]
        self._fire(due)
        ended = [fault for at_s, fault in self._lifts if now_s >= at_s]
        if ended:
            self._lifts = [entry for entry in self._lifts if now_s < entry[0]]
            self._faults = [fault for fault in self._faults if fault not in ended]
            self._apply()
        self._leak()
        self.look_after_core()
        asyncio.get_running_loop().call_later(BEAT_S, self.beat)

    def look_after_core(self) -> None:
        """Notice the core's death, once."""
        if self._watches_core and self._core is not None and not self._core.is_alive:
            self._watches_core = False
            self._core_died()

    def release_core(self) -> None:
        """Its end is wanted now."""
        self._watches_core = False
        if self._core is not None:
            self._core.kill()

    def _count_request(self) -> None:
        self._requests += 1
        self._fire([entry for entry in self._pending if 0 < entry[1] <= self._requests])

    def _fire(self, due: list[tuple[Fault, int, float]]) -> None:
        for entry in due:
            self._pending.remove(entry)
            self._strike(entry[0])

    def _strike(self, fault: Fault) -> None:
        log.warning("simulated fault: %s", fault.kind)
        self._faults.append(fault)
        if fault.for_s is not None:
            self._lifts.append((self._generator.now_s() + fault.for_s, fault))
        match fault.kind:
            case FaultKind.CRASH:
                os._exit(fault.exit_code)
            case FaultKind.CORE_CRASH if self._core is not None:
                self._core.kill()
                self.look_after_core()
            case FaultKind.GRANDCHILD:
                subprocess.Popen(["/bin/sh", "-c", "exec sleep 86400"], start_new_session=True)
        self._apply()

    def _apply(self) -> None:
        """Make the engine what the faults at work want it to be."""
        self._generator.settle()
        kinds = {fault.kind for fault in self._faults}
        self._generator.is_hung = FaultKind.HANG in kinds
        self.ignores_sigterm = FaultKind.IGNORE_SIGTERM in kinds
        factor = 1.0
        for fault in self._faults:
            if fault.kind in _SLOWING:
                factor *= fault.factor
        times = self._generator.served.times
        self._generator.scheduler.times = Slowed(times=times, factor=factor) if factor != 1.0 else times
        self._gpu.slow_factor = max(1.0, factor)
        self._gpu.is_throttled = FaultKind.THROTTLE in kinds
        if FaultKind.LEAK not in kinds:
            self._leaked = bytearray()

    def _leak(self) -> None:
        for fault in self._faults:
            if fault.kind is not FaultKind.LEAK:
                continue
            room = LEAK_BYTES_MAX - len(self._leaked)
            # Written to, or the pages would never be resident.
            self._leaked += b"\x01" * min(room, int(fault.bytes_per_s * BEAT_S))
            self._leaked_blocks += fault.blocks_per_s * BEAT_S
            whole = int(self._leaked_blocks)
            if whole:
                self._leaked_blocks -= whole
                self._generator.lose_blocks(whole)
