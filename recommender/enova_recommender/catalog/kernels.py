"""Measured kernel times of some GPUs, in the compact form that ships with the package; read once.

The tables are made by `tests/tools/compact_kernels.py` from public measurements; KERNELS.md beside them says whose they
are and under which licences. A GPU is described by its data sheet: what the tables are used for is decided by likeness,
never by name.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import TypedDict

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """The figures of a data sheet that kernel times scale with; rates a second, no rate is zero."""

    bandwidth: float
    bf16_flops: float
    fp8_flops: float
    fp4_flops: float
    link: float
    memory: float
    compute_capability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Times on a grid: base-2 logarithms of microseconds, and of the axes' knots, each growing."""

    log2_us: Floats
    axes: tuple[Floats, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTable:
    """Times of the routed experts of a layer: a row a configuration, a column a number of tokens.

    The columns of `shapes`: hidden size, intermediate size, experts per token, experts, and over how many GPUs each
    expert is cut and the experts are spread.
    """

    log2_us: Floats
    log2_tokens: Floats
    shapes: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredGpu:
    """One GPU of which kernels were measured, and its tables by kind and variant (`gemm/fp8`, `gdn/context`)."""

    sheet: Sheet
    tables: Mapping[str, Table]
    experts: Mapping[str, ExpertTable]


class _Index(TypedDict):
    """What `kernels.json` holds: the step of the stored logarithms, data sheets, and the axes of each table."""

    scale: int
    gpus: dict[str, dict[str, float]]
    axes: dict[str, list[list[float]]]


@cache
def measured_gpus() -> tuple[MeasuredGpu, ...]:
    """All GPUs with measured kernels."""
    folder = files(__package__)
    index: _Index = json.loads(folder.joinpath("kernels.json").read_text(encoding="utf-8"))
    packed = np.load(io.BytesIO(folder.joinpath("kernels.npz").read_bytes()))
    return tuple(
        MeasuredGpu(
            sheet=Sheet(**sheet),
            tables=MappingProxyType(dict(_tables(name, index, packed))),
            experts=MappingProxyType(dict(_experts(name, index, packed))),
        )
        for name, sheet in index["gpus"].items()
    )


def _tables(
    gpu: str, index: _Index, packed: Mapping[str, npt.NDArray[np.int16]]
) -> Iterator[tuple[str, Table]]:
    """The grids of one GPU."""
    for name, axes in index["axes"].items():
        owner, _, kind = name.partition("/")
        if owner == gpu and not kind.startswith("moe/"):
            logarithms = packed[name].astype(np.float64) / index["scale"]
            yield kind, Table(log2_us=logarithms, axes=tuple(np.log2(np.array(axis)) for axis in axes))


def _experts(
    gpu: str, index: _Index, packed: Mapping[str, npt.NDArray[np.int16]]
) -> Iterator[tuple[str, ExpertTable]]:
    """The expert tables of one GPU."""
    for name, axes in index["axes"].items():
        owner, _, kind = name.partition("/")
        if owner == gpu and kind.startswith("moe/"):
            yield kind.removeprefix("moe/"), ExpertTable(
                log2_us=packed[name].astype(np.float64) / index["scale"],
                log2_tokens=np.log2(np.array(axes[0])),
                shapes=packed[f"{gpu}/moe_shapes/{kind.removeprefix('moe/')}"].astype(np.float64),
            )
