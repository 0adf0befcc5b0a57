"""GPUs that engines simulate: facts from settings, figures from whoever claims them, idleness of the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest

from enova_agent.simulated_gpu import SimulatedGpus, SimulatedGpuSettings
from enova_testing.waiting import until_async

pytestmark = pytest.mark.network

READING = {
    "uuid": "GPU-1", "name": "NVIDIA H100 80GB HBM3", "utilization": 0.75, "memory_utilization": 0.4,
    "memory_used_bytes": 70, "memory_total_bytes": 80, "power_w": 500.0, "power_limit_w": 700.0, "temperature_c": 66.0,
    "sm_clock_mhz": 1980.0, "memory_clock_mhz": 2619.0,
}


class Engine:
    """Answers GET /simulated/gpu with `body`, while it listens."""

    def __init__(self) -> None:
        self.body = json.dumps({"simulated": True, "type": "H100", "gpus": [READING]}).encode()
        self.endpoint = ""
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(self.body), self.body)
        )
        writer.close()
        await writer.wait_closed()


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine()
    await engine.start()
    yield engine
    await engine.stop()


@contextlib.asynccontextmanager
async def running(endpoints: list[str]) -> AsyncIterator[SimulatedGpus]:
    settings = [SimulatedGpuSettings(uuid=f"GPU-{index}", type="H100", memory_bytes=80) for index in range(2)]
    gpus = SimulatedGpus(settings, endpoints=lambda: endpoints, interval_s=0.02)
    task = asyncio.create_task(gpus.run())
    yield gpus
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_facts_come_from_the_settings_and_say_that_they_are_simulated(engine: Engine) -> None:
    async with running([]) as gpus:
        facts = gpus.describe()
    assert [(gpu.uuid, gpu.index, gpu.type, gpu.memory_bytes) for gpu in facts] == [
        ("GPU-0", 0, "H100", 80), ("GPU-1", 1, "H100", 80),
    ]
    assert all(gpu.simulated and gpu.free_memory_bytes == 80 for gpu in facts)


async def test_a_gpu_that_an_engine_claims_shows_its_figures_and_the_others_idle(engine: Engine) -> None:
    async with running([engine.endpoint]) as gpus:
        await until_async(lambda: gpus.sample()[1].utilization == 0.75)
        idle, busy = gpus.sample()
        assert (busy.power_w, busy.memory_used_bytes, busy.temperature_c) == (500.0, 70, 66.0)
        assert (idle.utilization, idle.power_w, idle.memory_used_bytes) == (0.0, 70.0, 0)


async def test_readings_of_an_engine_that_does_not_answer_grow_old(engine: Engine) -> None:
    async with running([engine.endpoint]) as gpus:
        await until_async(lambda: gpus.sample()[1].utilization == 0.75)
        engine.body = b"garbage"
        await until_async(lambda: gpus.sample()[1].age_s > 0.2)
        assert gpus.sample()[1].utilization == 0.75


async def test_a_gpu_whose_engine_is_gone_idles_while_others_are_read(engine: Engine) -> None:
    other = Engine()
    await other.start()
    other.body = json.dumps({"gpus": [{**READING, "uuid": "GPU-0", "utilization": 0.25}]}).encode()
    endpoints = [engine.endpoint, other.endpoint]
    async with running(endpoints) as gpus:
        await until_async(lambda: [sample.utilization for sample in gpus.sample()] == [0.25, 0.75])
        endpoints.remove(engine.endpoint)
        await until_async(lambda: [sample.utilization for sample in gpus.sample()] == [0.25, 0.0])
    await other.stop()
