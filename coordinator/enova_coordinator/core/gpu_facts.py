"""What a driver tells of a GPU beyond its memory, as an agent reports it. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """The driver's name of a card and its figures; None where it does not tell."""

    name: str
    sm_clock_mhz: float | None = None        # the highest
    memory_clock_mhz: float | None = None    # the highest
    bus_width_bits: int | None = None
    cores: int | None = None
    compute_capability: float | None = None
    power_limit_w: float | None = None
    link_bytes_per_s: float | None = None    # of all NVLinks that are up, one direction
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
