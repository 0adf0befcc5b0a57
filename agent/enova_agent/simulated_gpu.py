"""GPUs of a host that has none: facts from the settings, live figures from the simulated engines that claim them."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from enova_agent.core.telemetry import GpuFacts, GpuSample
from enova_agent.loopback import LoopbackClient
from enova_common.errors import EnovaError, InvalidField
from enova_common.settings import between

READ_TIMEOUT_S = 1.0
_FIGURES = (
    "utilization",
    "memory_utilization",
    "power_w",
    "power_limit_w",
    "temperature_c",
    "sm_clock_mhz",
    "memory_clock_mhz",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedGpuSettings:
    """One simulated GPU, with the facts of the catalogue."""

    uuid: str
    type: str
    memory_bytes: int = field(metadata=between(1))
    index: int | None = None       # its place in the list, if not given
    pci_bus_id: str = ""
    idle_power_w: float = 70.0
    power_limit_w: float = 700.0

    def __post_init__(self) -> None:
        if not self.uuid or not self.type:
            raise InvalidField("a simulated GPU needs a uuid and a type", field="uuid" if self.type else "type")


class SimulatedGpus:
    """Reads `GET /simulated/gpu` of every engine on a beat; a GPU that no engine uses idles."""

    def __init__(
        self,
        gpus: Sequence[SimulatedGpuSettings],
        *,
        endpoints: Callable[[], Iterable[str]],
        interval_s: float = 1.0,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gpus = tuple(gpus)
        self._endpoints = endpoints
        self._interval_s = interval_s
        self._monotonic_s = monotonic_s
        self._clients: dict[str, LoopbackClient] = {}
        self._without: set[str] = set()  # engines that answer but know nothing of simulated GPUs: a real vLLM
        self._read: dict[str, list[tuple[GpuSample, float]]] = {}  # by endpoint

    def describe(self) -> tuple[GpuFacts, ...]:
        """The GPUs of the settings; whoever claims memory of them is one of ours, so that all of it is free."""
        return tuple(
            GpuFacts(
                uuid=gpu.uuid,
                index=index if gpu.index is None else gpu.index,
                type=gpu.type,
                memory_bytes=gpu.memory_bytes,
                pci_bus_id=gpu.pci_bus_id,
                simulated=True,
                free_memory_bytes=gpu.memory_bytes,
            )
            for index, gpu in enumerate(self._gpus)
        )

    def sample(self) -> tuple[GpuSample, ...]:
        """The newest reading of each GPU that an engine uses, and idleness of the others."""
        read = {sample.uuid: (sample, read_s) for readings in self._read.values() for sample, read_s in readings}
        return tuple(self._sample(gpu, read.get(gpu.uuid)) for gpu in self._gpus)

    def _sample(self, gpu: SimulatedGpuSettings, read: tuple[GpuSample, float] | None) -> GpuSample:
        if read is None:
            return GpuSample(
                uuid=gpu.uuid,
                utilization=0.0,
                memory_utilization=0.0,
                memory_used_bytes=0,
                memory_total_bytes=gpu.memory_bytes,
                power_w=gpu.idle_power_w,
                power_limit_w=gpu.power_limit_w,
            )
        sample, read_s = read
        return GpuSample(
            uuid=gpu.uuid,
            age_s=max(0.0, self._monotonic_s() - read_s),
            memory_used_bytes=sample.memory_used_bytes,
            memory_total_bytes=sample.memory_total_bytes,
            throttle_reasons=sample.throttle_reasons,
            **{name: getattr(sample, name) for name in _FIGURES},
        )

    async def run(self) -> None:
        """Keeps the readings up, until it is cancelled."""
        while True:
            endpoints = {endpoint for endpoint in self._endpoints() if endpoint}
            for gone in self._clients.keys() - endpoints:
                self._clients.pop(gone).close()
                self._read.pop(gone, None)
            self._without &= endpoints
            await asyncio.gather(*(self._ask(endpoint) for endpoint in endpoints - self._without))
            await asyncio.sleep(self._interval_s)

    async def _ask(self, endpoint: str) -> None:
        """Reads one engine; one that does not answer keeps its last readings, which grow old."""
        client = self._clients.get(endpoint)
        if client is None:
            address = urlsplit(endpoint)
            client = self._clients[endpoint] = LoopbackClient(address.hostname or "127.0.0.1", address.port or 80)
        try:
            answer = await client.get("/simulated/gpu", timeout_s=READ_TIMEOUT_S)
            if answer.status == 404:
                self._without.add(endpoint)
            if answer.status == 200:
                value = json.loads(answer.body)
                self._read[endpoint] = [(_parsed(gpu), self._monotonic_s()) for gpu in value["gpus"]]
        except (EnovaError, ValueError, KeyError, TypeError) as error:
            log.debug("no GPU readings from %s: %s", endpoint, error)


def _parsed(value: Mapping[str, Any]) -> GpuSample:
    figures = {name: float(value[name]) for name in _FIGURES if value.get(name) is not None}
    return GpuSample(
        uuid=str(value["uuid"]),
        memory_used_bytes=int(value["memory_used_bytes"]),
        memory_total_bytes=int(value["memory_total_bytes"]),
        throttle_reasons=int(value["throttle_reasons"]) if value.get("throttle_reasons") is not None else None,
        **figures,  # type: ignore[arg-type]  # mypy takes the names for any field's
    )
