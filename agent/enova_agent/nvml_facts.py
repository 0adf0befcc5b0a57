"""What NVML tells of a GPU once and for all: clocks, bus, cores, links. What it does not tell stays unknown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pynvml

from enova_agent.core.telemetry import DriverFacts

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


def driver_facts(handle: Any, name: str) -> DriverFacts:
    """What NVML tells of a GPU beyond its memory. A zero is no answer: drivers give it where they do not know."""
    capability = value_of(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    limit_mw = value_of(pynvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
    return DriverFacts(
        name=name,
        sm_clock_mhz=value_of(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM) or None,
        memory_clock_mhz=value_of(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_MEM) or None,
        bus_width_bits=value_of(pynvml.nvmlDeviceGetMemoryBusWidth, handle) or None,
        cores=value_of(pynvml.nvmlDeviceGetNumGpuCores, handle) or None,
        compute_capability=None if capability is None else float(f"{capability[0]}.{capability[1]}"),
        power_limit_w=limit_mw / _MILLIWATTS if limit_mw else None,
        link_bytes_per_s=_link_bytes_per_s(handle),
        pcie_generation=value_of(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle) or None,
        pcie_lanes=value_of(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle) or None,
    )


def _link_bytes_per_s(handle: Any) -> float | None:
    """All NVLinks that are up together; None without one, or where one of an unknown generation is up."""
    total = 0.0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        if value_of(pynvml.nvmlDeviceGetNvLinkState, handle, link) != pynvml.NVML_FEATURE_ENABLED:
            continue
        rate = _LINK_BYTES_PER_S.get(value_of(pynvml.nvmlDeviceGetNvLinkVersion, handle, link))
        if rate is None:
            return None
        total += rate
    return total or None


def value_of(call: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML says, or None where this GPU, driver or moment does not know."""
    try:
        return call(*arguments)
    except pynvml.NVMLError:
        return None
