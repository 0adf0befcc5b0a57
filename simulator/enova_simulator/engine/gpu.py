"""What NVML would read of the simulated GPUs, derived from how busy the engine is."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping

from enova_simulator.engine.generation import Generator
from enova_simulator.engine.model import Served, visible_gpus

WINDOW_S = 1.0  # model seconds over which a driver averages utilisation
MARKS_MAX = 64
AMBIENT_C = 32.0
HEATING_C = 45.0  # above ambient at the power limit
HOT_C = 91.0
HEAT_SLOWDOWN = 0x40  # NVML: slowed by the hardware's own thermal limit
IDLE_CLOCK_SHARE = 0.17


class GpuReader:
    """Readings of all GPUs of one engine; they march in step."""

    def __init__(self, served: Served, generator: Generator, environment: Mapping[str, str] = os.environ) -> None:
        self._served = served
        self._generator = generator
        self._uuids = visible_gpus(environment)
        self._marks: deque[tuple[float, float]] = deque([(generator.now_s(), 0.0)], maxlen=MARKS_MAX)
        self.slow_factor = 1.0
        self.is_throttled = False
        self.is_loaded = False

    def read(self) -> dict[str, object]:
        """One reading, as `GET /simulated/gpu` answers it."""
        self._generator.settle()
        gpu, share = self._served.gpu, self._utilization()
        power_w = gpu.idle_power_w + (gpu.power_limit_w - gpu.idle_power_w) * share * (0.45 + 0.5 * self._intensity())
        clock_share = (1.0 if share > 0 else IDLE_CLOCK_SHARE) / self.slow_factor
        memory = self._served.memory.used_bytes if self.is_loaded else 0
        reading = {
            "name": gpu.driver_names[0],
            "utilization": share,
            "memory_utilization": share * 0.6,
            "memory_used_bytes": memory,
            "memory_total_bytes": gpu.memory_bytes,
            "power_w": power_w,
            "power_limit_w": gpu.power_limit_w,
            "temperature_c": HOT_C if self.is_throttled else AMBIENT_C + HEATING_C * power_w / gpu.power_limit_w,
            "sm_clock_mhz": gpu.sm_clock_mhz * clock_share,
            "memory_clock_mhz": gpu.memory_clock_mhz,
            "throttle_reasons": HEAT_SLOWDOWN if self.is_throttled else 0,
        }
        names = self._uuids or tuple(str(index) for index in range(self._served.parallelism.gpus))
        return {"simulated": True, "type": gpu.name, "gpus": [{"uuid": name, **reading} for name in names]}

    def _utilization(self) -> float:
        """Share of the last model second, or since the last reading before it, in which a step ran."""
        now_s, busy_s = self._generator.now_s(), self._generator.busy_until_now_s()
        while len(self._marks) > 1 and self._marks[1][0] <= now_s - WINDOW_S:
            self._marks.popleft()
        then_s, before_s = self._marks[0]
        if now_s - self._marks[-1][0] >= WINDOW_S / 8:
            self._marks.append((now_s, busy_s))
        return min(1.0, max(0.0, (busy_s - before_s) / (now_s - then_s))) if now_s > then_s else 0.0

    def _intensity(self) -> float:
        """How full the batches are: a full one draws more power than a lone sequence."""
        return min(1.0, self._generator.scheduler.running / self._served.limits.max_num_seqs)
