"""The whole fleet as the integer programme is asked about it: nodes, what runs, what each deployment may run. Pure.

Nodes count as placement sees them: those that are ready and take replicas, with what engines of others than enova hold
missing. Replicas that run in a deployment's current configuration may stay where they are; those of deployments that
cannot be asked about (their model is not understood, say) keep their GPUs, which are nobody else's then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from enova_coordinator.core.advice import (
    CATALOGUE,
    Observed,
    Plain,
    current_of,
    model_of,
    objectives_of,
    takes_replicas,
    workload,
)
from enova_coordinator.core.gpu_types import GpuTypes, LeftOut, PricedTypes, priced
from enova_coordinator.core.model import Deployment, Gpu, Intent, NodeView, Replica, ReplicaState, Snapshot
from enova_recommender.recommend.allocation_types import (
    PRIORITIES_MAX,
    AllocationRequest,
    ClassDemand,
    FleetDeployment,
    PlacedReplica,
)
from enova_recommender.recommend.fleet import RUNNING, FleetOptions, OptionsQuestion
from enova_recommender.recommend.request import supply_row
from enova_recommender.recommend.types import InventoryNode

PART_GPUS = 8              # larger hosts are looked at part by part: the ways to fill them are too many
OPTION_RATE = 0.01         # requests/s that options are sought for: so few that each layout has room
DEFAULT_CLASS = "default"

_GONE = frozenset({ReplicaState.STOPPED, ReplicaState.FAILED, ReplicaState.LOST})


@dataclass(frozen=True, slots=True)
class Part:
    """Equal GPUs of one node, in the order that the programme counts them in."""

    node: str
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True, slots=True)
class Ground:
    """The nodes of a fleet: parts by the names that the programme knows them by, and what of it is left out."""

    types: PricedTypes
    parts: Mapping[str, Part]
    clusters: Mapping[str, str]    # by part
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What one deployment may run, and what is asked of it."""

    deployment: Deployment
    options: FleetOptions
    observed: Observed | None = None
    arrived: Mapping[str, float] = field(default_factory=dict)  # requests so far, by class


def ground_of(snapshot: Snapshot, *, types: GpuTypes = CATALOGUE) -> Ground:
    """The nodes that replicas may be given to, in parts of equal GPUs."""
    views = [view for _, view in sorted(snapshot.nodes.items())]
    usable = [view for view in views if takes_replicas(view)]
    known = priced((gpu for view in usable for gpu in view.gpus), types)
    parts: dict[str, Part] = {}
    clusters: dict[str, str] = {}
    for view in usable:
        for name, part in _parts(view, known):
            parts[name] = part
            clusters[name] = _cluster(view)
    away = tuple(
        LeftOut(object=view.node.name, reason=f"is {_why_not(view)}") for view in views if not takes_replicas(view)
    )
    return Ground(types=known, parts=parts, clusters=clusters, left_out=(*known.left_out, *away))


def _why_not(view: NodeView) -> str:
    if view.node.draining:
        return "being drained"
    return view.state.value if view.node.schedulable else "cordoned"


def _cluster(view: NodeView) -> str:
    """Where a node is and which engine it starts: what a deployment may restrict itself to."""
    return f"{view.node.cluster}|{view.node.engine}"


def _parts(view: NodeView, known: PricedTypes) -> Iterator[tuple[str, Part]]:
    by_type: dict[str, list[Gpu]] = {}
    for gpu in sorted(view.gpus, key=lambda each: (each.index, each.uuid)):
        if gpu.type in known.models:
            by_type.setdefault(gpu.type, []).append(gpu)
    for kind, gpus in by_type.items():
        for first in range(0, len(gpus), PART_GPUS):
            yield f"{view.node.name} {kind} {first}", Part(view.node.name, tuple(gpus[first : first + PART_GPUS]))


def options_question(
    snapshot: Snapshot, deployment: Deployment, ground: Ground, *, config_json: str, observed: Observed | None,
    types: GpuTypes = CATALOGUE,
) -> OptionsQuestion | str:  # fmt: skip
    """What the recommender is asked about one deployment, or why nothing can be asked."""
    supply = _supply(deployment, ground)
    if not supply:
        return "no node that it may use has a GPU that is known"
    model = model_of(deployment.spec.model, config_json)
    if isinstance(model, str):
        return model
    asked = {**workload(observed), "requests_per_s": OPTION_RATE}
    request: dict[str, object] = {**model, "gpus": supply, "workload": asked, "deployable": True}
    if objectives := objectives_of(deployment.spec):
        request["objectives"] = objectives
    current = current_of(snapshot, deployment, types=types)
    if current is not None:
        request["current"] = current
    pinned = dict(deployment.spec.configuration) or None
    return OptionsQuestion(request=request, pinned=pinned)


def _supply(deployment: Deployment, ground: Ground) -> list[Plain]:
    """One row for each type and size of part that the deployment may use."""
    allowed, clusters = deployment.spec.hardware.allow, _clusters(deployment, ground)
    sizes = dict.fromkeys(
        (part.gpus[0].type, len(part.gpus))
        for name, part in ground.parts.items()
        if (not clusters or ground.clusters[name] in clusters) and (not allowed or part.gpus[0].type in allowed)
    )
    return [
        {**supply_row(ground.types.models[kind]), "count": size, "gpus_per_node": size} for kind, size in sorted(sizes)
    ]


def _clusters(deployment: Deployment, ground: Ground) -> tuple[str, ...]:
    """The clusters and engines that a deployment may use; empty: any."""
    spec = deployment.spec
    if not spec.hardware.clusters and not spec.engine:
        return ()
    found = []
    for each in sorted(set(ground.clusters.values())):
        cluster, _, engine = each.rpartition("|")
        if (not spec.hardware.clusters or cluster in spec.hardware.clusters) and spec.engine in {"", engine}:
            found.append(each)
    return tuple(found) or ("nowhere",)


def allocation_request(
    snapshot: Snapshot, ground: Ground, wanted: Sequence[Wanted], *, headroom: float = 0.0
) -> AllocationRequest:
    """The request of the integer programme over all of the deployments."""
    ranks = _ranks(wanted)
    asked = {each.deployment.name: each for each in wanted}
    running = tuple(_running(snapshot, ground, asked))
    return AllocationRequest(
        nodes=tuple(_nodes(snapshot, ground, asked)),
        deployments=tuple(_fleet_deployment(each, ground, ranks, headroom) for each in wanted),
        running=running,
    )


def _ranks(wanted: Sequence[Wanted]) -> dict[tuple[int, int], int]:
    """Priorities of deployment and class as the programme has them: higher is carried first; the last share one."""
    pairs = {(each.deployment.spec.priority, each_class.priority) for each in wanted for each_class in _classes(each)}
    return {pair: -min(place, PRIORITIES_MAX - 1) for place, pair in enumerate(sorted(pairs))}


@dataclass(frozen=True, slots=True)
class _Class:
    name: str
    priority: int
    requests_per_s: float


def demand_of(wanted: Wanted) -> dict[str, float]:
    """Requests a second by class: the busiest minute's, in the proportion of what arrived of each class."""
    return {each.name: each.requests_per_s for each in _classes(wanted)}


def _classes(wanted: Wanted) -> tuple[_Class, ...]:
    spec = wanted.deployment.spec
    priorities = {each.name: each.priority for each in spec.classes} or {DEFAULT_CLASS: 0}
    rate = wanted.observed.requests_per_s if wanted.observed is not None else 0.0
    first = next(iter(priorities))
    counts = dict.fromkeys(priorities, 0.0)
    for name, count in wanted.arrived.items():
        counts[name if name in counts else first] += count
    total = sum(counts.values())
    if not total:
        counts[first] = total = 1.0
    return tuple(_Class(name, priorities[name], rate * count / total) for name, count in counts.items())


def _fleet_deployment(
    wanted: Wanted, ground: Ground, ranks: Mapping[tuple[int, int], int], headroom: float
) -> FleetDeployment:
    spec = wanted.deployment.spec
    least, most = spec.bounds
    return FleetDeployment(
        name=wanted.deployment.name,
        classes=tuple(
            ClassDemand(
                name=each.name, requests_per_s=each.requests_per_s, priority=ranks[spec.priority, each.priority]
            )
            for each in _classes(wanted)
        ),
        options=wanted.options.options,
        headroom=headroom,
        min_replicas=least,
        max_replicas=most,
        max_gpus=spec.hardware.max_gpus,
        gpu_types=spec.hardware.allow,
        clusters=_clusters(wanted.deployment, ground),
    )


def _nodes(snapshot: Snapshot, ground: Ground, asked: Mapping[str, Wanted]) -> Iterator[InventoryNode]:
    """The parts with the memory of each GPU that is to be shared out; agents count our own engines' as free."""
    taken = {gpu for each in snapshot.replicas.values() if each.deployment not in asked for gpu in each.gpus}
    for name, part in ground.parts.items():
        model = ground.types.models[part.gpus[0].type]
        yield InventoryNode(
            name=name,
            gpu=model,
            gpus=len(part.gpus),
            island_gpus=min(len(part.gpus), max(1, model.island_gpus)),
            cluster=ground.clusters[name],
            free_bytes=tuple(0 if gpu.uuid in taken else gpu.free_memory_bytes for gpu in part.gpus),
        )


def _running(snapshot: Snapshot, ground: Ground, asked: Mapping[str, Wanted]) -> Iterator[PlacedReplica]:
    """Replicas of current configurations, which may stay where they are."""
    places = {gpu.uuid: (name, at) for name, part in ground.parts.items() for at, gpu in enumerate(part.gpus)}
    current = {each.name for each in snapshot.variants.values() if not each.retired}
    for replica in living_replicas(snapshot):
        found = [places.get(uuid) for uuid in replica.gpus]
        parts = {place[0] for place in found if place is not None}
        if replica.deployment not in asked or replica.variant not in current or None in found or len(parts) != 1:
            continue
        indexes = tuple(sorted(place[1] for place in found if place is not None))
        yield PlacedReplica(deployment=replica.deployment, option=RUNNING, node=parts.pop(), gpus=indexes, kept=True)


def living_replicas(snapshot: Snapshot) -> Iterator[Replica]:
    """Replicas that run, or are about to, and are wanted."""
    for _, replica in sorted(snapshot.replicas.items()):
        if replica.intent is Intent.RUN and replica.status.state not in _GONE and replica.gpus:
            yield replica
