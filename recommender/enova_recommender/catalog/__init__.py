"""Known GPUs and models, with the source of each figure; package data, read once. And readers of the operator's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from enova_recommender.catalog.driver import DriverFacts, describe
from enova_recommender.catalog.gpu_file import GpuError, parse_gpu
from enova_recommender.shape import parse_shape
from enova_recommender.types import GpuModel, ModelShape

__all__ = [
    "DriverFacts", "GpuError", "find_gpu", "find_model", "gpu_from_driver", "gpus", "model_config", "models",
    "parse_gpu",
]  # fmt: skip

# Words that drivers put before the name of a card, or not, by their version.
_MAKERS = ("nvidia ", "amd ", "tesla ", "instinct ")


@cache
def gpus() -> Mapping[str, GpuModel]:
    """All known GPU types by catalogue name."""
    rows = json.loads(files(__package__).joinpath("gpus.json").read_text(encoding="utf-8"))
    return MappingProxyType({gpu.name: gpu for gpu in map(parse_gpu, rows)})


@cache
def model_configs() -> Mapping[str, Mapping[str, object]]:
    """What the config.json of each known model says of its shape, by Hugging Face id."""
    rows = json.loads(files(__package__).joinpath("models.json").read_text(encoding="utf-8"))
    return MappingProxyType({name: MappingProxyType(_unfolded(rows, row)) for name, row in rows.items()})


def _unfolded(rows: Mapping[str, dict[str, object]], row: dict[str, object]) -> dict[str, object]:
    """The row with that of the model that it is `like` beneath it."""
    like = row.get("like")
    own = {key: value for key, value in row.items() if key != "like"}
    return {**rows[like], **own} if isinstance(like, str) else own


def model_config(name: str) -> Mapping[str, object] | None:
    """The config.json of a known model, in what matters for its shape; None for an unknown one."""
    return model_configs().get(name)


@cache
def models() -> Mapping[str, ModelShape]:
    """All known models by Hugging Face id."""
    return MappingProxyType({name: parse_shape(config, name=name) for name, config in model_configs().items()})


@cache
def _models_by_lower_name() -> Mapping[str, ModelShape]:
    return {name.lower(): shape for name, shape in models().items()}


def find_model(name: str) -> ModelShape | None:
    """The model of a Hugging Face id, whatever its case, else None."""
    return models().get(name) or _models_by_lower_name().get(name.strip().lower())


@cache
def _gpus_by_known_name() -> Mapping[str, GpuModel]:
    return {_bare(name): gpu for gpu in gpus().values() for name in (gpu.name, *gpu.driver_names)}


def _bare(name: str) -> str:
    """The name in lower case, without the maker's and the line's."""
    bare = " ".join(name.lower().split())
    for word in _MAKERS:
        bare = bare.removeprefix(word)
    return bare


def find_gpu(name: str) -> GpuModel | None:
    """The GPU type of a catalogue name (`H100`) or of a driver's name (`NVIDIA H100 80GB HBM3`), else None."""
    return _gpus_by_known_name().get(_bare(name))


def gpu_from_driver(facts: DriverFacts) -> GpuModel:
    """The GPU that a driver reports: the catalogue's where it knows the name, else described by its facts.

    Its memory is what the driver says. `unknown` names what is estimated; GpuError what cannot be.
    """
    known = find_gpu(facts.name)
    return describe(facts) if known is None else replace(known, memory_bytes=facts.memory_bytes)
