"""NVML: what GPUs this host has and how they are, read in threads of their own so that a hanging driver blocks nobody.

Theory of operation. One thread reads all GPUs, one after the other, once a round, and publishes each GPU's reading when
it is complete. Who asks gets the newest readings at once, with their age. When a round is not over after `deadline_s`,
the thread is stuck in the GPU that it said it would read: that GPU is left to it, and a fresh thread reads the others.
A GPU that hangs so costs its own readings and one parked thread; the thread comes back to work if the call ever does.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pynvml

from enova_agent.core.telemetry import DriverFacts, GpuFacts, GpuSample

DEADLINE_S = 2.0             # of a round: a healthy driver takes milliseconds
START_TIMEOUT_S = 10.0       # of the first round, in which the driver may have to wake up
DESCRIBE_AGE_MAX_S = 30.0    # free memory older than this is not known

# Bytes per second of one NVLink in one direction, by NVML's number of its generation.
_LINK_BYTES_PER_S = {
    pynvml.NVML_NVLINK_VERSION_1_0: 20e9,
    pynvml.NVML_NVLINK_VERSION_2_0: 25e9,
    pynvml.NVML_NVLINK_VERSION_2_2: 25e9,
    pynvml.NVML_NVLINK_VERSION_3_0: 25e9,
    pynvml.NVML_NVLINK_VERSION_3_1: 25e9,
    pynvml.NVML_NVLINK_VERSION_4_0: 25e9,
    pynvml.NVML_NVLINK_VERSION_5_0: 50e9,
}
_MILLIWATTS = 1000.0

log = logging.getLogger(__name__)


class NoGpus:
    """A host without GPUs, or one whose GPUs are not to be read."""

    def describe(self) -> tuple[GpuFacts, ...]:
        """There are none."""
        return ()

    def sample(self) -> tuple[GpuSample, ...]:
        """There are none."""
        return ()

    async def run(self) -> None:
        """There is nothing to keep up."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """One GPU as last read."""

    facts: GpuFacts
    sample: GpuSample
    read_s: float              # monotonic


class NvmlGpus:
    """The GPUs of this host. `start` once, then `sample` each interval."""

    def __init__(
        self,
        *,
        types: Callable[[str], str] = lambda name: name,
        is_ours: Callable[[int], bool] = lambda _pid: False,
        deadline_s: float = DEADLINE_S,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._types = types
        self._is_ours = is_ours
        self._deadline_s = deadline_s
        self._monotonic_s = monotonic_s
        self._lock = threading.Lock()
        self._readings: dict[int, _Reading] = {}       # by index
        self._worker: _Worker | None = None
        self._stuck: dict[int, _Worker] = {}           # by the index of the GPU that holds the thread
        self._count = 0
        self._complaints: set[str] = set()
        self.missed_rounds = 0

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Loads the driver's library and reads every GPU once; a host without one has no GPUs, and says so once."""
        # Held here as well: a worker that finds no driver lets go of itself.
        worker = self._worker = _Worker(self, skip=frozenset(), initialise=True)
        worker.ask()
        if not worker.done.wait(timeout_s):
            log.warning("NVML has not answered within %.0f s; going on without GPUs until it does", timeout_s)

    def close(self) -> None:
        """Lets the threads end; one that hangs is left behind, as it cannot be interrupted."""
        for worker in (self._worker, *self._stuck.values()):
            if worker is not None:
                worker.stop()

    def describe(self) -> tuple[GpuFacts, ...]:
        """The GPUs that were found, with the memory that enova may count on."""
        now_s = self._monotonic_s()
        with self._lock:
            readings = [self._readings[index] for index in sorted(self._readings)]
        return tuple(
            reading.facts
            if now_s - reading.read_s <= DESCRIBE_AGE_MAX_S
            else dataclasses.replace(reading.facts, free_memory_bytes=0)
            for reading in readings
        )

    def sample(self) -> tuple[GpuSample, ...]:
        """The newest readings, with their ages; starts the next round."""
        self._next_round()
        now_s = self._monotonic_s()
        with self._lock:
            readings = [self._readings[index] for index in sorted(self._readings)]
        return tuple(
            dataclasses.replace(reading.sample, age_s=max(0.0, now_s - reading.read_s)) for reading in readings
        )

    def _next_round(self) -> None:
        worker = self._worker
        if worker is None:
            return
        for index, stuck in tuple(self._stuck.items()):
            if stuck.done.is_set():
                stuck.stop()
                del self._stuck[index]
                worker.skip -= {index}
        if worker.done.is_set():
            worker.ask()
        elif self._monotonic_s() - worker.asked_s > self._deadline_s:
            self.missed_rounds += 1
            self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        """Leaves a stuck thread to its GPU, and has a fresh one read the others."""
        index = worker.at
        if index is None:  # stuck in loading the library: nothing can be read until that ends
            self.complain("init", "NVML does not answer; the GPUs of this host are not read")
            return
        self.complain(f"stuck {index}", f"NVML hangs in GPU {index}; it is left out, the others are read")
        self._stuck[index] = worker
        self._worker = _Worker(self, skip=frozenset(self._stuck), initialise=False)
        self._worker.ask()

    def publish(self, reading: _Reading) -> None:
        """A worker has read one GPU."""
        with self._lock:
            self._readings[reading.facts.index] = reading

    def complain(self, what: str, text: str) -> None:
        """Says a thing once, not each second."""
        if what not in self._complaints:
            self._complaints.add(what)
            log.warning("%s", text)

    def read(self, index: int) -> None:
        """Reads one GPU; whatever the driver does not say stays unknown."""
        handle = _value(pynvml.nvmlDeviceGetHandleByIndex, index)
        if handle is None:
            self.complain(f"lost {index}", f"GPU {index} cannot be read any more")
            return
        known = self._readings.get(index)
        facts = known.facts if known is not None else self._facts(handle, index)
        if facts is None:
            return
        memory = _memory(handle)
        power_limit_mw = _value(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        use = _value(pynvml.nvmlDeviceGetUtilizationRates, handle)
        power_mw = _value(pynvml.nvmlDeviceGetPowerUsage, handle)
        if memory is None and use is None and power_mw is None:
            # A lost GPU answers nothing. What was read before grows old, which says it.
            self.complain(f"lost {index}", f"GPU {index} ({facts.uuid}) does not answer any more")
            return
        sample = GpuSample(
            uuid=facts.uuid,
            utilization=None if use is None else use.gpu / 100,
            memory_utilization=None if use is None else use.memory / 100,
            memory_used_bytes=None if memory is None else memory.used,
            memory_total_bytes=None if memory is None else memory.total,
            power_w=None if power_mw is None else power_mw / 1000,
            power_limit_w=None if power_limit_mw is None else power_limit_mw / 1000,
            temperature_c=_float(_value(_temperature, handle)),
            sm_clock_mhz=_float(_value(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM)),
            memory_clock_mhz=_float(_value(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM)),
            throttle_reasons=_value(_throttle_reasons, handle),
            ecc_errors_total=_value(
                pynvml.nvmlDeviceGetTotalEccErrors,
                handle,
                pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                pynvml.NVML_AGGREGATE_ECC,
            ),
        )
        free = 0 if memory is None else memory.free + self._held_by_us(handle)
        facts = dataclasses.replace(facts, free_memory_bytes=min(free, facts.memory_bytes))
        self.publish(_Reading(facts, sample, self._monotonic_s()))

    def _facts(self, handle: Any, index: int) -> GpuFacts | None:
        uuid, name, memory = (
            _value(pynvml.nvmlDeviceGetUUID, handle),
            _value(pynvml.nvmlDeviceGetName, handle),
            _memory(handle),
        )
        if uuid is None or memory is None:
            self.complain(f"facts {index}", f"GPU {index} says neither its UUID nor its memory; it is left out")
            return None
        pci = _value(pynvml.nvmlDeviceGetPciInfo, handle)
        return GpuFacts(
            uuid=_text(uuid),
            index=index,
            type=self._types(_text(name or "unknown")),
            memory_bytes=memory.total,
            pci_bus_id="" if pci is None else _text(pci.busId),
            driver=_driver_facts(handle, _text(name or "unknown")),
        )

    def _held_by_us(self, handle: Any) -> int:
        """Bytes that processes of our own engines hold: the coordinator counts those by its claims."""
        processes: Collection[Any] = _value(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()
        return sum(process.usedGpuMemory or 0 for process in processes if self._is_ours(process.pid))


class _Worker:
    """One thread that reads all GPUs but those in `skip`, whenever it is asked."""

    def __init__(self, gpus: NvmlGpus, *, skip: frozenset[int], initialise: bool) -> None:
        self.skip = skip
        self.at: int | None = None       # the GPU that is being read
        self.asked_s = 0.0
        self.done = threading.Event()
        self._gpus = gpus
        self._initialise = initialise
        self._asked = threading.Semaphore(0)
        self._stopping = False
        threading.Thread(target=self._run, name="nvml", daemon=True).start()

    def ask(self) -> None:
        self.asked_s = self._gpus._monotonic_s()
        self.done.clear()
        self._asked.release()

    def stop(self) -> None:
        self._stopping = True
        self._asked.release()

    def _run(self) -> None:
        while True:
            self._asked.acquire()
            if self._stopping:
                return
            # Not before it was asked: by then whoever made this thread knows it.
            if self._initialise and not self._load():
                self.done.set()
                return
            self._initialise = False
            for index in range(self._gpus._count):
                if index not in self.skip:
                    self.at = index
                    self._gpus.read(index)
            self.done.set()

    def _load(self) -> bool:
        try:
            pynvml.nvmlInit()
            self._gpus._count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            self._gpus._worker = None
            self._gpus.complain("init", f"no GPUs on this host: {error}")
            return False
        return True


def engine_sessions(pids: Callable[[], Collection[int]]) -> Callable[[int], bool]:
    """Whether a process belongs to an engine: each engine leads a session of its own, which its workers inherit."""

    def is_ours(pid: int) -> bool:
        try:
            return os.getsid(pid) in pids()
        except OSError:  # it ended, or lives in another namespace of processes
            return False

    return is_ours


def _value(call: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML says, or None where this GPU, driver or moment does not know."""
    try:
        return call(*arguments)
    except pynvml.NVMLError:
        return None


def _driver_facts(handle: Any, name: str) -> DriverFacts:
    """What NVML tells of a GPU beyond its memory. A zero is no answer: drivers give it where they do not know."""
    capability = _value(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    limit_mw = _value(pynvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
    return DriverFacts(
        name=name,
        sm_clock_mhz=_value(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM) or None,
        memory_clock_mhz=_value(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_MEM) or None,
        bus_width_bits=_value(pynvml.nvmlDeviceGetMemoryBusWidth, handle) or None,
        cores=_value(pynvml.nvmlDeviceGetNumGpuCores, handle) or None,
        compute_capability=None if capability is None else float(f"{capability[0]}.{capability[1]}"),
        power_limit_w=limit_mw / _MILLIWATTS if limit_mw else None,
        link_bytes_per_s=_link_bytes_per_s(handle),
        pcie_generation=_value(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle) or None,
        pcie_lanes=_value(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle) or None,
    )


def _link_bytes_per_s(handle: Any) -> float | None:
    """All NVLinks that are up together; None without one, or where one of an unknown generation is up."""
    total = 0.0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        if _value(pynvml.nvmlDeviceGetNvLinkState, handle, link) != pynvml.NVML_FEATURE_ENABLED:
            continue
        rate = _LINK_BYTES_PER_S.get(_value(pynvml.nvmlDeviceGetNvLinkVersion, handle, link))
        if rate is None:
            return None
        total += rate
    return total or None


def _memory(handle: Any) -> Any:
    """Memory with what the driver reserves told apart; older drivers count that as used."""
    return _value(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)) or _value(
        pynvml.nvmlDeviceGetMemoryInfo, handle
    )


def _temperature(handle: Any) -> int:
    try:
        return int(pynvml.nvmlDeviceGetTemperatureV(handle, pynvml.NVML_TEMPERATURE_GPU))
    except pynvml.NVMLError_FunctionNotFound:  # drivers before 570
        return int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))


def _throttle_reasons(handle: Any) -> int:
    try:
        return int(pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
    except pynvml.NVMLError_FunctionNotFound:  # the name before driver 535
        return int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
