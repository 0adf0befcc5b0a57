"""Reads one GPU type from a parsed JSON object: a row of the catalogue, or a file that the operator wrote."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, fields

from enova_recommender.types import GpuModel

DRIVER_NAMES_MAX = 100
_TEXTS = frozenset({"name", "source"})
_WHOLE = frozenset({"memory_bytes", "island_gpus"})
_MAY_BE_NULL = frozenset({"fp8_flops", "fp4_flops", "int8_ops", "price_per_hour"})
_REQUIRED = ("name", "memory_bytes", "bandwidth_bytes_per_s", "bf16_flops")
_KEYS = tuple(field.name for field in fields(GpuModel) if field.name != "unknown")
# What a file may leave out: an estimate, which `unknown` then names. The link is PCIe 4.0 x16, the power that of a
# card that one slot can feed, the clocks those that nothing depends on but monitoring.
_ESTIMATES: Mapping[str, object] = {
    "link_bytes_per_s": 32e9, "power_limit_w": 300.0, "idle_power_w": 30.0, "sm_clock_mhz": 1500.0,
    "memory_clock_mhz": 1500.0,
}  # fmt: skip


class GpuError(ValueError):
    """A description of a GPU that cannot be used; `field` names the key that is to blame."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


def parse_gpu(content: Mapping[str, object], *, known: Mapping[str, GpuModel] | None = None) -> GpuModel:
    """The GPU type that the object describes; GpuError names what is wrong.

    With `like` it is the named one of `known`, but for what the object says. Without, name, memory, bandwidth and the
    16-bit peak must be there; what else is missing is estimated, and named in `unknown`.
    """
    for key in content:
        if key not in {*_KEYS, "like"}:
            near = difflib.get_close_matches(key, _KEYS, n=1) or _KEYS
            raise GpuError(key, f"is no key of a GPU; what could be meant: {', '.join(near)}")
    values = {key: _checked(key, value) for key, value in content.items() if key != "like"}
    gpu = _new(values) if "like" not in content else _alike(content, values, known or {})
    _check_against_itself(gpu)
    return gpu


def _new(values: dict[str, object]) -> GpuModel:
    for key in _REQUIRED:
        if values.get(key) is None:
            raise GpuError(key, "is missing")
    missing = tuple(key for key in _ESTIMATES if key not in values)
    unsaid = {"driver_names": (values["name"],), "source": "operator", "fp8_flops": None, "price_per_hour": None}
    return GpuModel(**{**unsaid, **_ESTIMATES, "unknown": missing, **values})  # type: ignore[arg-type]  # checked above


def _alike(content: Mapping[str, object], values: dict[str, object], known: Mapping[str, GpuModel]) -> GpuModel:
    like = content["like"]
    if not isinstance(like, str) or like not in known:
        raise GpuError("like", f"{like!r} is no GPU of the catalogue; these are: {', '.join(known)}")
    base = known[like]
    if "name" in values and values["name"] != base.name and "driver_names" not in values:
        values["driver_names"] = (values["name"],)
    unknown = tuple(key for key in base.unknown if key not in values)
    return GpuModel(**{**asdict(base), "unknown": unknown, **values})


def _checked(key: str, value: object) -> object:
    """The value, if it is one that the key can have."""
    if value is None and key in _MAY_BE_NULL:
        return None
    if key in _TEXTS:
        if not isinstance(value, str) or not value.strip():
            raise GpuError(key, f"must be a text, not {value!r}")
        return value
    if key == "driver_names":
        if not isinstance(value, list | tuple) or len(value) > DRIVER_NAMES_MAX:
            raise GpuError(key, f"must be a list of at most {DRIVER_NAMES_MAX} names, not {value!r}")
        if not all(isinstance(name, str) and name for name in value):
            raise GpuError(key, f"must be a list of names, not {value!r}")
        return tuple(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise GpuError(key, f"must be a number, not {value!r}")
    if key in _WHOLE and (value != int(value) or value < 1):
        raise GpuError(key, f"must be a whole number of at least 1, not {value!r}")
    if value < 0 or (value == 0 and key not in {"price_per_hour", "idle_power_w"}):
        raise GpuError(key, f"must be above 0, not {value!r}")
    return int(value) if key in _WHOLE else float(value)


def _check_against_itself(gpu: GpuModel) -> None:
    if gpu.idle_power_w >= gpu.power_limit_w:
        raise GpuError("idle_power_w", f"{gpu.idle_power_w:g} is not below power_limit_w {gpu.power_limit_w:g}")
    narrower = (("fp8_flops", gpu.fp8_flops, gpu.bf16_flops), ("fp4_flops", gpu.fp4_flops, gpu.bf16_flops))
    for key, peak, plain in narrower:
        if peak is not None and peak < plain:
            raise GpuError(key, f"{peak:g} is below bf16_flops {plain:g}")
