"""The integer programme: no small fleet has a better allocation, and no allocation breaks a rule."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from enova_recommender.recommend.allocation import allocate, check
from enova_recommender.recommend.allocation_types import (
    AllocationRequest,
    ClassDemand,
    FleetDeployment,
    Option,
    PlacedReplica,
    SolveLimits,
    Spread,
)
from enova_recommender.recommend.types import InventoryNode
from enova_testing.allocations import best_value, gpu_model, node, option, value_of
from enova_testing.examples import examples

BIG, SMALL = gpu_model("Big", price_per_hour=3.0), gpu_model("Small", price_per_hour=1.0, memory_gib=24)
EXACT = SolveLimits(time_limit_s=20.0, gap=0.0)


@st.composite
def options(draw: st.DrawFn) -> tuple[Option, ...]:
    found = [
        option(
            f"o{i}", draw(st.sampled_from([BIG, SMALL])), draw(st.integers(1, 7)),
            tensor=draw(st.sampled_from([1, 1, 2, 3])), utilization=draw(st.sampled_from([0.5, 0.9])),
        )
        for i in range(draw(st.integers(1, 2)))
    ]
    if draw(st.booleans()):
        found.append(option(
            "shared", draw(st.sampled_from([BIG, SMALL])), draw(st.integers(1, 4)), shared=True,
            utilization=draw(st.sampled_from([0.25, 0.4])), time_share=draw(st.sampled_from([0.2, 0.5])),
        ))
    return tuple(found)


@st.composite
def deployments(draw: st.DrawFn, name: str) -> FleetDeployment:
    classes = [ClassDemand(name="first", requests_per_s=draw(st.integers(0, 12)), priority=draw(st.integers(0, 1)))]
    if draw(st.booleans()):
        rate, priority = draw(st.integers(1, 6)), draw(st.integers(0, 1))
        classes.append(ClassDemand(name="second", requests_per_s=rate, priority=priority))
    least = draw(st.sampled_from([0, 0, 1, 2]))
    return FleetDeployment(
        name=name, classes=tuple(classes), options=draw(options()), headroom=draw(st.sampled_from([0.0, 0.25])),
        min_replicas=least, max_replicas=draw(st.sampled_from([None, None, least + 1, least + 3])),
        max_gpus=draw(st.sampled_from([None, None, 2, 4])), weight=draw(st.sampled_from([1.0, 2.5])),
        clusters=draw(st.sampled_from([(), (), ("west",)])), gpu_types=draw(st.sampled_from([(), (), ("Big",)])),
        spread=draw(st.sampled_from([Spread(), Spread(), Spread(domain_share=0.5), Spread(domains=2)])),
    )


@st.composite
def nodes(draw: st.DrawFn) -> tuple[InventoryNode, ...]:
    found = []
    for i in range(draw(st.integers(1, 3))):
        gpus = draw(st.sampled_from([1, 2, 2, 3]))
        gpu = draw(st.sampled_from([BIG, SMALL]))
        free = draw(st.sampled_from([(), (), tuple(range(gpu.memory_bytes >> 30, 0, -13))[:gpus]]))
        found.append(node(
            f"n{i}", gpu, gpus, island_gpus=draw(st.sampled_from([gpus, gpus, 1])),
            cluster=draw(st.sampled_from(["west", "west", "east"])), domain=draw(st.sampled_from(["", "rack"])),
            free_gib=free if len(free) == gpus else (),
        ))
    return tuple(found)


@st.composite
def requests(draw: st.DrawFn) -> AllocationRequest:
    names = ("a", "b")[: draw(st.integers(1, 2))]
    return AllocationRequest(
        nodes=draw(nodes()), deployments=tuple(draw(deployments(name)) for name in names),
        start_hours=draw(st.sampled_from([0.05, 0.5])),
    )


@examples(40)
@given(request=requests())
def test_no_allocation_of_a_small_fleet_is_better(request: AllocationRequest) -> None:
    _is_best(request)


@examples(40)
@given(request=requests(), changed=st.integers(1, 15), data=st.data())
def test_nor_where_replicas_run_already(request: AllocationRequest, changed: int, data: st.DataObject) -> None:
    before = allocate(request, EXACT)
    lost = data.draw(st.sets(st.sampled_from(range(len(before.replicas))))) if before.replicas else set()
    running = tuple(replica for i, replica in enumerate(before.replicas) if i not in lost)
    deployments = (_with_demand(request.deployments[0], changed), *request.deployments[1:])
    _is_best(AllocationRequest(
        nodes=request.nodes, deployments=deployments, running=running, start_hours=request.start_hours,
    ))


def _with_demand(deployment: FleetDeployment, rate: int) -> FleetDeployment:
    return FleetDeployment(
        name=deployment.name, classes=(ClassDemand(name="all", requests_per_s=rate),), options=deployment.options,
        spread=deployment.spread,
    )


def _is_best(request: AllocationRequest) -> None:
    allocation = allocate(request, EXACT)
    assert check(allocation, request) == []
    mine, best = value_of(allocation, request), best_value(request)
    assert all(abs(a - b) < 1e-4 for a, b in zip(mine.carried, best.carried, strict=True)), (mine, best)
    # Where replicas stay is settled last: what that may cost is what the allocation itself says.
    assert mine.objective_per_hour <= best.objective_per_hour + allocation.gap * mine.objective_per_hour + 1e-4
    assert allocation.bound_per_hour <= best.objective_per_hour + 1e-4


@examples(20)
@given(counts=st.lists(st.integers(1, 5), min_size=2, max_size=4), demand=st.floats(5, 400), data=st.data())
def test_a_larger_fleet_breaks_no_rule_and_keeps_what_runs_if_nothing_changes(
    counts: Sequence[int], demand: float, data: st.DataObject
) -> None:
    fleet = tuple(
        node(f"n{kind}-{i}", (BIG, SMALL)[kind % 2], (8, 4)[kind % 2], island_gpus=4, domain=f"rack {i % 3}")
        for kind, count in enumerate(counts) for i in range(count)
    )
    chosen = tuple(data.draw(deployments(name)) for name in "abcd")
    first = FleetDeployment(
        name="main", classes=(ClassDemand(name="all", requests_per_s=demand, priority=1),),
        options=(option("four", BIG, 20, tensor=4), option("two", SMALL, 5, tensor=2)), headroom=0.1,
        spread=Spread(domain_share=0.7),
    )
    request = AllocationRequest(nodes=fleet, deployments=(first, *chosen))
    before = allocate(request, SolveLimits(time_limit_s=5.0))
    assert check(before, request) == []
    again = AllocationRequest(nodes=fleet, deployments=request.deployments, running=_as_running(before.replicas))
    after = allocate(again, SolveLimits(time_limit_s=5.0))
    assert check(after, again) == []


def _as_running(replicas: Sequence[PlacedReplica]) -> tuple[PlacedReplica, ...]:
    return tuple(
        PlacedReplica(deployment=item.deployment, option=item.option, node=item.node, gpus=item.gpus)
        for item in replicas
    )
