"""Describes a GPU that the catalogue does not know from what its driver tells, and says what stays unknown.

Theory of operation. NVML tells name, memory, clocks, the width of the memory bus, the number of cores and the compute
capability. Memory moves two words per pin and clock; every core array (SM) of a generation multiplies a fixed number of
16-bit elements per clock. Both hold for the data sheets of the catalogue within a few percent, since drivers report
the highest clock and data sheets a sustained one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from enova_recommender.catalog.gpu_file import GpuError
from enova_recommender.types import GpuModel

WORDS_PER_CLOCK = 2          # of each pin of the memory bus, for GDDR and HBM alike
IDLE_SHARE = 0.1             # of the power limit: typical of the catalogue
# By generation (compute capability): cores of an SM, and 16-bit operations of an SM in one clock, dense, with 32-bit
# sums. Cards for gamers have half of it.
_GENERATIONS: tuple[tuple[float, int, int], ...] = (
    (7.0, 64, 1024), (7.5, 64, 1024), (8.0, 64, 2048), (8.6, 128, 1024), (8.9, 128, 1024), (9.0, 128, 4096),
    (10.0, 128, 8192), (12.0, 128, 1024),
)  # fmt: skip
_CONSUMER = "geforce"
_PCIE_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 1e9, 4: 2e9, 5: 4e9, 6: 8e9}


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverFacts:
    """What NVML tells of one GPU; None where this driver or card does not."""

    name: str
    memory_bytes: int
    sm_clock_mhz: float | None = None        # the highest
    memory_clock_mhz: float | None = None    # the highest
    bus_width_bits: int | None = None
    cores: int | None = None
    compute_capability: float | None = None
    power_limit_w: float | None = None
    link_bytes_per_s: float | None = None    # of all NVLinks that are up, one direction
    pcie_generation: int | None = None
    pcie_lanes: int | None = None


def describe(facts: DriverFacts) -> GpuModel:
    """The GPU by its own facts; `unknown` names what is estimated. GpuError names what cannot be."""
    if facts.memory_bytes <= 0:
        raise GpuError("memory_bytes", f"must be above 0, not {facts.memory_bytes}")
    width, memory_clock_mhz = _told(facts, "bus_width_bits"), _told(facts, "memory_clock_mhz")
    capability, peak = _told(facts, "compute_capability"), _bf16_flops(facts)
    pcie = _PCIE_LANE_BYTES_PER_S.get(facts.pcie_generation or 0, 2e9) * (facts.pcie_lanes or 16)
    power = facts.power_limit_w or 300.0
    gpu = GpuModel(
        name=facts.name,
        driver_names=(facts.name,),
        memory_bytes=facts.memory_bytes,
        bandwidth_bytes_per_s=width / 8 * WORDS_PER_CLOCK * memory_clock_mhz * 1e6,
        bf16_flops=peak,
        fp8_flops=2 * peak if capability >= 8.9 else None,
        fp4_flops=4 * peak if capability >= 10.0 else None,
        int8_ops=2 * peak if capability >= 7.5 else None,
        link_bytes_per_s=facts.link_bytes_per_s or pcie,
        pcie_bytes_per_s=pcie,
        power_limit_w=power,
        idle_power_w=power * IDLE_SHARE,
        sm_clock_mhz=_told(facts, "sm_clock_mhz"),
        memory_clock_mhz=memory_clock_mhz,
        price_per_hour=None,
        compute_capability=capability,
        source="the driver: bandwidth from clock and bus width, peaks from clock, cores and generation",
    )
    return replace(gpu, unknown=_unknown(facts))


def _told(facts: DriverFacts, key: str) -> float:
    """A fact that nothing else can stand in for."""
    value: float | None = getattr(facts, key)
    if not value or value < 0:
        raise GpuError(key, f"the driver does not tell it of {facts.name}: describe this GPU in a file")
    return value


def _bf16_flops(facts: DriverFacts) -> float:
    capability, clock_mhz = _told(facts, "compute_capability"), _told(facts, "sm_clock_mhz")
    older = [row for row in _GENERATIONS if row[0] <= capability]
    if not older:
        raise GpuError("compute_capability", f"{capability:g} has no tensor cores: not modelled")
    _, cores_per_sm, operations = older[-1]
    share = 0.5 if _CONSUMER in facts.name.lower() else 1.0
    return _told(facts, "cores") / cores_per_sm * operations * clock_mhz * 1e6 * share


def _unknown(facts: DriverFacts) -> tuple[str, ...]:
    """What `describe` estimates: always the idle power, the price, the island, and the rates of narrow types."""
    found = ["idle_power_w", "price_per_hour", "island_gpus", "fp8_flops", "fp4_flops", "int8_ops"]
    if facts.compute_capability not in {generation for generation, _, _ in _GENERATIONS}:
        found.append("bf16_flops")
    if not facts.link_bytes_per_s:
        found.append("link_bytes_per_s")
    if not facts.power_limit_w:
        found.append("power_limit_w")
    if not (facts.pcie_generation and facts.pcie_lanes):
        found.append("pcie_bytes_per_s")
    return tuple(found)
