"""NVML through a compiled stand-in: values, failures per function, older drivers, lost and hanging GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from enova_testing import gpu_reader
from enova_testing.fake_nvml import FakeDriver
from enova_testing.waiting import until

pytestmark = pytest.mark.network

GPU_LOST, NOT_SUPPORTED = 15, 3


class Reader:
    """A process with NvmlGpus in it."""

    def __init__(self, environment: dict[str, str], *ours: int, deadline_s: float = 0.3) -> None:
        self._process = subprocess.Popen(
            [sys.executable, gpu_reader.__file__, str(deadline_s), *map(str, ours)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **environment},
        )

    def look(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        value: dict[str, Any] = json.loads(self._process.stdout.readline())
        return value

    def end(self) -> str:
        """Ends the process; what it logged."""
        _, log = self._process.communicate(timeout=10)
        return log


def _unknown(sample: dict[str, Any]) -> set[str]:
    return {name for name, value in sample.items() if value is None}


@pytest.fixture
def readers() -> Iterator[list[Reader]]:
    started: list[Reader] = []
    yield started
    for reader in started:
        if reader._process.poll() is None:
            reader._process.kill()
        reader._process.communicate()


@pytest.fixture
def driver(tmp_path: Path) -> FakeDriver:
    return FakeDriver(tmp_path, gpus=3)


def start(readers: list[Reader], driver: FakeDriver, *ours: int) -> Reader:
    readers.append(Reader(driver.environment, *ours))
    return readers[-1]


def test_every_figure_is_read_in_its_unit(readers: list[Reader], driver: FakeDriver) -> None:
    driver.say(
        "gpu 1 util 83", "gpu 1 memutil 41", "gpu 1 used 1000000000", "gpu 1 temp 71", "gpu 1 power_mw 654321",
        "gpu 1 limit_mw 700000", "gpu 1 sm_mhz 1755", "gpu 1 mem_mhz 2619", "gpu 1 throttle 8", "gpu 1 ecc 3",
        "name 1 NVIDIA A100-SXM4-80GB",
    )
    value = start(readers, driver).look()
    sample = dict(value["samples"][1])
    assert sample.pop("age_s") < 5.0
    assert sample == {
        "uuid": "GPU-0000e0a1-1111-2222-3333-000000000001",
        "utilization": 0.83,
        "memory_utilization": 0.41,
        "memory_used_bytes": 1_000_000_000,
        "memory_total_bytes": 85_520_809_984,
        "power_w": 654.321,
        "power_limit_w": 700.0,
        "temperature_c": 71.0,
        "sm_clock_mhz": 1755.0,
        "memory_clock_mhz": 2619.0,
        "throttle_reasons": 8,
        "ecc_errors_total": 3,
    }
    facts = value["facts"][1]
    assert (facts["type"], facts["index"], facts["pci_bus_id"]) == ("NVIDIA A100-SXM4-80GB", 1, "00000000:11:00.0")
    assert facts["free_memory_bytes"] == 85_520_809_984 - 629_145_600 - 1_000_000_000


def test_what_a_driver_tells_once_is_read_in_its_unit(readers: list[Reader], driver: FakeDriver) -> None:
    driver.say(
        "gpu 1 max_sm_mhz 1980", "gpu 1 max_mem_mhz 3201", "gpu 1 bus_bits 6144", "gpu 1 cores 16896",
        "gpu 1 capability 90", "gpu 1 default_mw 700000", "gpu 1 links 18", "gpu 1 link_version 6", "gpu 1 pcie_gen 5",
        "gpu 1 pcie_lanes 16", "name 1 NVIDIA H200",
    )  # fmt: skip
    facts = start(readers, driver).look()["facts"]
    assert facts[1]["driver"] == {
        "name": "NVIDIA H200", "sm_clock_mhz": 1980, "memory_clock_mhz": 3201, "bus_width_bits": 6144, "cores": 16896,
        "compute_capability": 9.0, "power_limit_w": 700.0, "link_bytes_per_s": 450e9, "pcie_generation": 5,
        "pcie_lanes": 16,
    }  # fmt: skip
    told = facts[0]["driver"]
    assert told.pop("name") == "NVIDIA H100 80GB HBM3"
    assert set(told.values()) == {None}


def test_memory_that_others_hold_is_not_free_and_ours_is(readers: list[Reader], driver: FakeDriver) -> None:
    driver.say("gpu 0 used 5000000000", "process 0 4242 2000000000", "process 0 77 3000000000")
    facts = start(readers, driver, 4242).look()["facts"][0]
    assert facts["free_memory_bytes"] == 85_520_809_984 - 629_145_600 - 3_000_000_000


@pytest.mark.parametrize(
    ("function", "figures"),
    [
        ("UtilizationRates", {"utilization", "memory_utilization"}),
        ("PowerUsage", {"power_w"}),
        ("EnforcedPowerLimit", {"power_limit_w"}),
        ("Temperature", {"temperature_c"}),
        ("ClockInfo", {"sm_clock_mhz", "memory_clock_mhz"}),
        ("ThrottleReasons", {"throttle_reasons"}),
        ("TotalEccErrors", {"ecc_errors_total"}),
        ("MemoryInfo", {"memory_used_bytes", "memory_total_bytes"}),
    ],
)
def test_a_function_that_fails_leaves_its_figures_unknown_and_no_other(
    readers: list[Reader], driver: FakeDriver, function: str, figures: set[str]
) -> None:
    reader = start(readers, driver)
    reader.look()  # a GPU that never said its memory is left out; this one did
    driver.say(f"fail 0 {function} {NOT_SUPPORTED}")
    until(lambda: _unknown(reader.look()["samples"][0]) == figures, what="the failure is seen")
    first, second, third = (_unknown(sample) for sample in reader.look()["samples"])
    assert (first, second, third) == (figures, set(), set())


def test_functions_that_an_older_driver_lacks_are_done_without(readers: list[Reader], tmp_path: Path) -> None:
    old = FakeDriver(tmp_path, gpus=1, without=("MEMORY_V2", "TEMPERATURE_V", "EVENT_REASONS"))
    old.say("gpu 0 throttle 4", "gpu 0 used 1000")
    (sample,) = start(readers, old).look()["samples"]
    assert sample["throttle_reasons"] == 4
    assert sample["temperature_c"] == 35.0
    assert sample["memory_used_bytes"] == 1_000 + 629_145_600  # what the driver reserves cannot be told apart


def test_a_lost_gpu_grows_old_while_the_others_are_read(readers: list[Reader], driver: FakeDriver) -> None:
    reader = start(readers, driver)
    before = reader.look()["samples"]
    driver.say(f"fail 2 * {GPU_LOST}", "gpu 0 util 9")
    until(lambda: reader.look()["samples"][2]["age_s"] > 0.5)
    first, _, lost = reader.look()["samples"]
    assert first["utilization"] == 0.09
    assert first["age_s"] < 0.5
    assert lost["uuid"] == before[2]["uuid"]
    assert "GPU 2 cannot be read any more" in reader.end()


def test_a_gpu_that_hangs_blocks_nobody_and_is_read_again_when_it_answers(
    readers: list[Reader], driver: FakeDriver
) -> None:
    reader = start(readers, driver)
    reader.look()
    driver.say("hang 1 PowerUsage", "gpu 2 util 77")
    began_s = time.monotonic()
    until(lambda: reader.look()["samples"][2]["utilization"] == 0.77, timeout_s=5.0)
    until(lambda: reader.look()["samples"][1]["age_s"] > 1.0, timeout_s=5.0)
    looks = [reader.look() for _ in range(20)]
    assert time.monotonic() - began_s < 5.0
    assert looks[-1]["missed_rounds"] == 1
    assert looks[-1]["samples"][0]["age_s"] < 0.5
    driver.unsay("hang 1 PowerUsage")
    until(lambda: reader.look()["samples"][1]["age_s"] < 0.5, timeout_s=5.0)
    driver.say("gpu 1 util 55")
    until(lambda: reader.look()["samples"][1]["utilization"] == 0.55, timeout_s=5.0)


def test_all_gpus_may_hang_one_after_the_other(readers: list[Reader], driver: FakeDriver) -> None:
    reader = start(readers, driver)
    reader.look()
    driver.say("hang -1 UtilizationRates")
    until(lambda: min(sample["age_s"] for sample in reader.look()["samples"]) > 1.5, timeout_s=8.0)
    driver.unsay("hang -1 UtilizationRates")
    until(lambda: max(sample["age_s"] for sample in reader.look()["samples"]) < 0.5, timeout_s=5.0)


@pytest.mark.parametrize(
    "environment", [{"LD_LIBRARY_PATH": "/nonexistent"}, {"LD_LIBRARY_PATH": "", "ENOVA_FAKE_NVML": ""}]
)
def test_a_host_without_a_driver_has_no_gpus_and_says_so_once(
    readers: list[Reader], environment: dict[str, str]
) -> None:
    readers.append(Reader(environment))
    looks = [readers[-1].look() for _ in range(3)]
    assert [(look["samples"], look["facts"]) for look in looks] == [([], [])] * 3
    assert readers[-1].end().count("no GPUs on this host") == 1


def test_a_driver_that_is_not_loaded_means_no_gpus(readers: list[Reader], driver: FakeDriver) -> None:
    driver.say("init 9")
    assert start(readers, driver).look() == {"samples": [], "facts": [], "missed_rounds": 0}
