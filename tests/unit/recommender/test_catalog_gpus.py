"""GPUs are found by any of their names, plausible, and readable from the operator's files and from drivers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from enova_recommender import catalog
from enova_recommender.catalog import DriverFacts, GpuError, gpu_from_driver, parse_gpu
from enova_recommender.types import GpuModel, PriceMissing

OWN = {"name": "Own", "memory_bytes": 48 << 30, "bandwidth_bytes_per_s": 1e12, "bf16_flops": 2e14}
# Width of the memory bus and cores, which data sheets have and the catalogue has no use for.
BUS_AND_CORES = {
    "H100": (5120, 16896), "H200": (6144, 16896), "A100-80G": (5120, 6912), "A100-40G": (5120, 6912),
    "L40S": (384, 18176), "L4": (192, 7424), "A10": (384, 9216), "A40": (384, 10752), "A6000": (384, 10752),
    "T4": (256, 2560), "V100-16G": (4096, 5120), "RTX4090": (384, 16384), "RTX3090": (384, 10496),
    "RTX5090": (512, 21760), "RTX-PRO-6000": (512, 24064), "RTX6000-Ada": (384, 18176), "B200": (8192, 18944),
    "GB200": (8192, 18944), "A30": (3072, 3584),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("H100", "H100"), ("h100", "H100"), ("NVIDIA H100 80GB HBM3", "H100"), ("H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"), ("NVIDIA H100 NVL", "H100-NVL"), ("NVIDIA A100-SXM4-40GB", "A100-40G"),
        ("A100-SXM4-80GB", "A100-80G"), ("NVIDIA A100 80GB PCIe", "A100-80G-PCIe"), (" nvidia l4 ", "L4"),
        ("NVIDIA  L40S", "L40S"), ("NVIDIA A10G", "A10G"), ("NVIDIA A10", "A10"), ("Tesla T4", "T4"),
        ("NVIDIA T4", "T4"), ("Tesla V100-SXM2-16GB", "V100-16G"), ("V100-SXM2-32GB", "V100-32G"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"), ("NVIDIA RTX 6000 Ada Generation", "RTX6000-Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"), ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA GH200 480GB", "GH200"), ("NVIDIA B300 SXM6 AC", "B300"), ("NVIDIA GB200", "GB200"),
        ("AMD Instinct MI300X", "MI300X"), ("MI250", "MI250"),
        ("GeForce 256", None), ("", None), ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
    ],
)  # fmt: skip
def test_gpus_are_found_by_catalogue_and_by_driver_name(name: str, found: str | None) -> None:
    gpu = catalog.find_gpu(name)
    assert (gpu.name if gpu else None) == found


def test_no_name_means_two_gpus() -> None:
    names = [name.lower() for gpu in catalog.gpus().values() for name in {gpu.name, *gpu.driver_names}]
    assert len(names) == len(set(names))
    for gpu in catalog.gpus().values():
        assert all(catalog.find_gpu(name) is gpu for name in (gpu.name, *gpu.driver_names))


def test_every_gpu_has_a_source_and_possible_figures() -> None:
    for gpu in catalog.gpus().values():
        assert gpu.source
        assert 0 < gpu.idle_power_w < gpu.power_limit_w
        assert 15 << 30 <= gpu.memory_bytes < 400 << 30
        # The ridge of the roofline of every card lies between these (H20 is the lowest, L40S the highest).
        assert 30 < gpu.bf16_flops / gpu.bandwidth_bytes_per_s < 450
        assert gpu.price_per_hour is None or 0 < gpu.price_per_hour < 20
        assert gpu.link_bytes_per_s >= gpu.pcie_bytes_per_s
        assert not gpu.unknown


def test_narrow_types_are_as_fast_as_their_generation_makes_them() -> None:
    for gpu in catalog.gpus().values():
        assert (gpu.fp8_flops is not None) == (gpu.compute_capability >= 8.9), gpu.name
        assert (gpu.fp4_flops is not None) == (gpu.compute_capability >= 10), gpu.name
        if gpu.fp8_flops is not None:
            assert gpu.fp8_flops / gpu.bf16_flops == pytest.approx(2, rel=0.02), gpu.name
        if gpu.fp4_flops is not None:
            assert 3.9 < gpu.fp4_flops / gpu.bf16_flops < 8.1, gpu.name


def test_costs_are_those_of_so_many_gpus_and_none_without_a_price() -> None:
    assert catalog.gpus()["H100"].cost_per_hour(8) == pytest.approx(8 * 2.99)
    with pytest.raises(PriceMissing, match="MI250 has no price_per_hour") as caught:
        catalog.gpus()["MI250"].cost_per_hour(1)
    assert caught.value.field == "price_per_hour"


def test_an_operators_gpu_needs_four_figures_and_names_what_it_leaves_to_estimates() -> None:
    gpu = parse_gpu(OWN)
    assert (gpu.memory_bytes, gpu.bandwidth_bytes_per_s, gpu.bf16_flops) == (48 << 30, 1e12, 2e14)
    assert gpu.fp8_flops is None
    assert gpu.price_per_hour is None
    assert set(gpu.unknown) == {
        "link_bytes_per_s", "power_limit_w", "idle_power_w", "sm_clock_mhz", "memory_clock_mhz",
    }  # fmt: skip
    assert "link_bytes_per_s" not in parse_gpu({**OWN, "link_bytes_per_s": 1e11}).unknown


def test_an_operators_gpu_may_be_like_a_known_one_but_for_what_it_says() -> None:
    known = catalog.gpus()
    assert parse_gpu({"like": "H100", "price_per_hour": 1.5}, known=known) == replace(known["H100"], price_per_hour=1.5)
    capped = parse_gpu({"like": "H100", "name": "H100 at 500 W", "power_limit_w": 500}, known=known)
    assert capped.driver_names == ("H100 at 500 W",)
    assert capped.power_limit_w == 500
    assert parse_gpu({"like": "H100", "price_per_hour": None}, known=known).price_per_hour is None


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"name": None}, "name", "must be a text"),
        ({"name": ""}, "name", "must be a text"),
        ({"memory_bytes": None}, "memory_bytes", "must be a number"),
        ({"memory_bytes": 0}, "memory_bytes", "at least 1"),
        ({"memory_bytes": 1.5}, "memory_bytes", "whole number"),
        ({"memory_bytes": True}, "memory_bytes", "must be a number"),
        ({"bandwidth_bytes_per_s": "fast"}, "bandwidth_bytes_per_s", "must be a number"),
        ({"bandwidth_bytes_per_s": math.nan}, "bandwidth_bytes_per_s", "must be a number"),
        ({"bf16_flops": -1.0}, "bf16_flops", "above 0"),
        ({"fp8_flops": 1e14}, "fp8_flops", "1e\\+14 is below bf16_flops 2e\\+14"),
        ({"price_per_hour": -3}, "price_per_hour", "above 0"),
        ({"idle_power_w": 300, "power_limit_w": 250}, "idle_power_w", "300 is not below power_limit_w 250"),
        ({"driver_names": "Own"}, "driver_names", "list"),
        ({"driver_names": [3]}, "driver_names", "list of names"),
        ({"bandwith_bytes_per_s": 1e12}, "bandwith_bytes_per_s", "is no key of a GPU.*bandwidth_bytes_per_s"),
        ({"like": "H1000"}, "like", "'H1000' is no GPU of the catalogue"),
        ({"unknown": []}, "unknown", "is no key"),
    ],
)
def test_what_is_wrong_with_an_operators_gpu_names_its_key(change: dict[str, object], field: str, words: str) -> None:
    with pytest.raises(GpuError, match=words) as caught:
        parse_gpu({**OWN, **change}, known=catalog.gpus())
    assert caught.value.field == field


@pytest.mark.parametrize("key", ["name", "memory_bytes", "bandwidth_bytes_per_s", "bf16_flops"])
def test_a_figure_that_must_be_there_is_named_when_it_is_not(key: str) -> None:
    with pytest.raises(GpuError, match=f"{key}: is missing"):
        parse_gpu({name: value for name, value in OWN.items() if name != key})


def facts(gpu: GpuModel, *, name: str) -> DriverFacts:
    """What a driver would tell of a card of the catalogue under another name."""
    width, cores = BUS_AND_CORES[gpu.name]
    return DriverFacts(
        name=name, memory_bytes=gpu.memory_bytes, sm_clock_mhz=gpu.sm_clock_mhz, memory_clock_mhz=gpu.memory_clock_mhz,
        bus_width_bits=width, cores=cores, compute_capability=gpu.compute_capability, power_limit_w=gpu.power_limit_w,
    )  # fmt: skip


@pytest.mark.parametrize("name", BUS_AND_CORES)
def test_what_a_driver_tells_gives_the_data_sheets_bandwidth_and_peak(name: str) -> None:
    known = catalog.gpus()[name]
    brand = "GeForce RTX" if name in {"RTX4090", "RTX3090", "RTX5090"} else "Data Centre"
    gpu = gpu_from_driver(facts(known, name=f"NVIDIA {brand} Unheard-Of"))
    assert gpu.bandwidth_bytes_per_s == pytest.approx(known.bandwidth_bytes_per_s, rel=0.07)
    assert gpu.bf16_flops == pytest.approx(known.bf16_flops, rel=0.10)
    assert (gpu.fp8_flops is None) == (known.fp8_flops is None)
    assert gpu.price_per_hour is None
    assert {"price_per_hour", "idle_power_w", "link_bytes_per_s"} <= set(gpu.unknown)
    assert "power_limit_w" not in gpu.unknown


def test_a_gpu_that_the_catalogue_knows_keeps_its_data_sheet_and_takes_the_drivers_memory() -> None:
    gpu = gpu_from_driver(DriverFacts(name="NVIDIA H100 80GB HBM3", memory_bytes=85_000_000_000))
    assert gpu == replace(catalog.gpus()["H100"], memory_bytes=85_000_000_000)


@pytest.mark.parametrize("key", ["bus_width_bits", "memory_clock_mhz", "cores", "sm_clock_mhz", "compute_capability"])
def test_a_fact_that_nothing_stands_in_for_is_named_when_the_driver_does_not_tell(key: str) -> None:
    nothing: dict[str, Any] = {key: None}
    told = replace(facts(catalog.gpus()["A10"], name="NVIDIA Unheard-Of"), **nothing)
    with pytest.raises(GpuError, match="the driver does not tell it of NVIDIA Unheard-Of") as caught:
        gpu_from_driver(told)
    assert caught.value.field == key


def test_a_gpu_of_an_unheard_of_generation_says_that_its_peak_is_a_guess() -> None:
    told = replace(facts(catalog.gpus()["B200"], name="NVIDIA Unheard-Of"), compute_capability=13.0)
    assert "bf16_flops" in gpu_from_driver(told).unknown
    with pytest.raises(GpuError, match="no tensor cores"):
        gpu_from_driver(replace(told, compute_capability=6.1))


def test_links_of_the_driver_count_as_known() -> None:
    told = replace(
        facts(catalog.gpus()["A40"], name="NVIDIA Unheard-Of"), link_bytes_per_s=1e11, pcie_generation=5, pcie_lanes=8
    )
    gpu = gpu_from_driver(told)
    assert (gpu.link_bytes_per_s, gpu.pcie_bytes_per_s) == (1e11, 32e9)
    assert not {"link_bytes_per_s", "pcie_bytes_per_s"} & set(gpu.unknown)
