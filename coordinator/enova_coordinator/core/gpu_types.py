"""What is known of the fleet's types of GPU: by the operator's file, else the catalogue, else their drivers. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType

from enova_coordinator.core.model import Gpu, Snapshot
from enova_coordinator.core.placement import CPU_TYPE
from enova_recommender import catalog
from enova_recommender.catalog import DriverFacts, GpuError
from enova_recommender.types import GpuModel

UNIT_PRICE = 1.0                   # USD an hour, where there is one type alone and nobody gave its price
_GIVE = "give it in advice.gpus_file"


@dataclass(frozen=True, slots=True)
class GpuTypes:
    """The types that the operator described or priced, by name in lower case."""

    described: Mapping[str, GpuModel] = field(default_factory=lambda: MappingProxyType({}))

    def model(self, gpu: Gpu) -> GpuModel | str:
        """The data sheet of a GPU under the name that the fleet calls it by, or why there is none."""
        found = self.described.get(gpu.type.lower()) or catalog.find_gpu(gpu.type)
        if found is None and gpu.facts is not None:
            found = self.described.get(gpu.facts.name.lower())
        if found is not None:
            return replace(found, name=gpu.type)
        if gpu.type == CPU_TYPE:
            return "is a slot of the host's processor, whose steps are not modelled"
        if gpu.facts is None:
            return f"is not in the catalogue, and no driver tells what it is: {_GIVE}"
        try:
            told = DriverFacts(memory_bytes=gpu.memory_bytes, **asdict(gpu.facts))
            return replace(catalog.gpu_from_driver(told), name=gpu.type)
        except GpuError as error:
            return f"is not in the catalogue, and its driver does not tell {error.field}: {_GIVE}"


def gpu_of(snapshot: Snapshot, kind: str) -> Gpu:
    """A GPU of this type with what its driver tells; of a type that no node has, no more than the name."""
    gpus = (gpu for view in snapshot.nodes.values() for gpu in view.gpus)
    return next((gpu for gpu in gpus if gpu.type == kind), Gpu(uuid="", type=kind))


def described_types(models: Iterable[GpuModel]) -> GpuTypes:
    """The types of an operator's file, by all names that they go by."""
    return GpuTypes({
        name.lower(): model for model in models for name in dict.fromkeys((model.name, *model.driver_names))
    })


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Something that an answer does not take into account, and why."""

    object: str
    reason: str


@dataclass(frozen=True, slots=True)
class PricedTypes:
    """Data sheets with prices by the fleet's names of the types, and what of the others is not known."""

    models: Mapping[str, GpuModel]
    left_out: tuple[LeftOut, ...]


def priced(gpus: Iterable[Gpu], types: GpuTypes) -> PricedTypes:
    """The types of these GPUs that can be compared by cost.

    One type alone needs no price: what it costs is then counted in GPU-hours, which `left_out` says.
    """
    models: dict[str, GpuModel] = {}
    left_out: dict[str, str] = {}
    for gpu in gpus:
        if gpu.type in models or gpu.type in left_out:
            continue
        found = types.model(gpu)
        if isinstance(found, str):
            left_out[gpu.type] = found
        else:
            models[gpu.type] = found
    priceless = [name for name, model in models.items() if not model.price_per_hour]
    if len(models) == len(priceless) == 1:
        name = priceless.pop()
        models[name] = replace(models[name], price_per_hour=UNIT_PRICE)
        left_out[name] = "nobody gave its price, so costs count its GPU-hours"
    for name in priceless:
        del models[name]
        left_out[name] = f"has no price: {_GIVE}"
    return PricedTypes(models, tuple(LeftOut(object=name, reason=why) for name, why in sorted(left_out.items())))
