"""Known GPUs and models, with the source of each figure; package data, read once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from enova_recommender.shape import parse_shape
from enova_recommender.types import GpuModel, ModelShape


@cache
def gpus() -> Mapping[str, GpuModel]:
    """All known GPU types by catalogue name."""
    rows = json.loads(files(__package__).joinpath("gpus.json").read_text(encoding="utf-8"))
    models = (GpuModel(**{**row, "driver_names": tuple(row["driver_names"])}) for row in rows)
    return MappingProxyType({gpu.name: gpu for gpu in models})


@cache
def models() -> Mapping[str, ModelShape]:
    """All known models by Hugging Face id."""
    rows = json.loads(files(__package__).joinpath("models.json").read_text(encoding="utf-8"))
    return MappingProxyType({name: parse_shape(config, name=name) for name, config in rows.items()})


def find_gpu(name: str) -> GpuModel | None:
    """The GPU type of a catalogue name (`H100`) or of a driver's name (`NVIDIA H100 80GB HBM3`), else None."""
    wanted = name.strip().lower()
    for gpu in gpus().values():
        if wanted == gpu.name.lower() or any(wanted == known.lower() for known in gpu.driver_names):
            return gpu
    return None
