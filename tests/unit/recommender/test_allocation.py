"""The allocation of a fleet: each rule that it keeps, what it says of what it cannot carry, and what it refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from enova_recommender.recommend.allocation import allocate, check
from enova_recommender.recommend.allocation_types import (
    AllocationRequest,
    ClassDemand,
    FleetDeployment,
    Obstacle,
    Option,
    PlacedReplica,
    SolveLimits,
    Spread,
    options_of,
)
from enova_recommender.recommend.errors import RecommendError
from enova_recommender.recommend.types import Candidate, Constraint, InventoryNode, Prediction
from enova_recommender.types import Interval
from enova_testing.allocations import GIB, gpu_model, node, option, placed

BIG = gpu_model("Big", price_per_hour=3.0)
SMALL = gpu_model("Small", price_per_hour=1.0, memory_gib=24)
FIRST = "deployments[0]"
OPTION = f"{FIRST}.options[0]"
EXACT = SolveLimits(time_limit_s=20.0, gap=0.0)


def deployment(
    name: str, rate: float, options: Sequence[Option], *, priority: int = 0, headroom: float = 0.0,
    min_replicas: int = 0, max_replicas: int | None = None, max_gpus: int | None = None,
    clusters: tuple[str, ...] = (), gpu_types: tuple[str, ...] = (), spread: Spread | None = None,
) -> FleetDeployment:
    return FleetDeployment(
        name=name, classes=(ClassDemand(name="all", requests_per_s=rate, priority=priority),), options=tuple(options),
        headroom=headroom, min_replicas=min_replicas, max_replicas=max_replicas, max_gpus=max_gpus, clusters=clusters,
        gpu_types=gpu_types, spread=spread or Spread(),
    )


def request(
    nodes: Sequence[InventoryNode], *deployments: FleetDeployment, running: Sequence[PlacedReplica] = ()
) -> AllocationRequest:
    return AllocationRequest(nodes=tuple(nodes), deployments=deployments, running=tuple(running))


def nodes(count: int, *, gpus: int = 8, island_gpus: int | None = None) -> list[InventoryNode]:
    return [node(f"n{i}", BIG, gpus, island_gpus=island_gpus) for i in range(count)]


def test_the_cheapest_mix_carries_demand_with_headroom() -> None:
    fleet = [*nodes(1), *(node(f"s{i}", SMALL, 4) for i in range(3))]
    asked = request(fleet, deployment("a", 10, [option("big", BIG, 5), option("small", SMALL, 1.5)], headroom=0.2))
    found = allocate(asked, EXACT)
    # 12 requests/s: two Big and two Small cost 8, eight Small as much; one Big and five Small carry 12.5 for 8.
    assert found.cost_per_hour == pytest.approx(8.0)
    assert found.complete
    assert found.gap == pytest.approx(0, abs=1e-6)
    assert check(found, asked) == []


def test_weights_are_in_proportion_to_capacity() -> None:
    fleet = [node("b", BIG, 1), node("s", SMALL, 1)]
    found = allocate(request(fleet, deployment("a", 6, [option("big", BIG, 5), option("small", SMALL, 1)])))
    assert {share.option: share.weight for share in found.variants} == pytest.approx({"big": 5 / 6, "small": 1 / 6})


def test_replicas_of_a_tensor_parallel_group_lie_within_an_island() -> None:
    asked = request(nodes(1, island_gpus=4), deployment("a", 2, [option("four", BIG, 1, tensor=4)]))
    found = allocate(asked)
    assert sorted(replica.gpus for replica in found.replicas) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    three = allocate(request(nodes(1, island_gpus=4), deployment("a", 2, [option("three", BIG, 1, tensor=3)])))
    assert sorted({gpu // 4 for gpu in replica.gpus} for replica in three.replicas) == [{0}, {1}]


def test_pipeline_stages_may_lie_in_different_islands_of_one_node() -> None:
    staged = option("staged", BIG, 1, tensor=2, pipeline=2)
    found = allocate(request(nodes(1, gpus=4, island_gpus=2), deployment("a", 1, [staged])))
    assert [replica.gpus for replica in found.replicas] == [(0, 1, 2, 3)]
    split = allocate(request(nodes(2, gpus=2), deployment("a", 1, [staged])))
    assert split.replicas == ()
    assert split.unmet[0].obstacle is Obstacle.NO_NODE


def test_small_models_share_a_gpu_by_bytes_and_by_time() -> None:
    by_bytes = option("m", SMALL, 1, shared=True, utilization=0.3, time_share=0.1)
    by_time = option("t", SMALL, 1, shared=True, utilization=0.1, time_share=0.5)
    asked = request([node("s", SMALL, 4)], deployment("a", 3, [by_bytes]), deployment("b", 2, [by_time]))
    found = allocate(asked, EXACT)
    # A GPU holds three of the first by bytes and two of the second by time; both of them need two GPUs.
    assert found.cost_per_hour == pytest.approx(2.0)
    assert check(found, asked) == []


def test_a_shared_gpu_has_no_exclusive_replica() -> None:
    shared, whole = option("m", SMALL, 1, shared=True, utilization=0.3, time_share=0.2), option("w", SMALL, 1)
    asked = request([node("s", SMALL, 1)], deployment("a", 1, [shared], priority=1), deployment("b", 1, [whole]))
    found = allocate(asked)
    assert [replica.deployment for replica in found.replicas] == ["a"]


def test_memory_that_others_hold_is_not_claimed() -> None:
    fleet = [node("n", BIG, 4, free_gib=(80, 40, 80, 8))]
    half = deployment("b", 9, [option("half", BIG, 1, utilization=0.5)])
    asked = request(fleet, deployment("a", 9, [option("whole", BIG, 1)]), half)
    found = allocate(asked)
    assert Counter(gpu for replica in found.replicas for gpu in replica.gpus) == {0: 1, 1: 1, 2: 1}
    assert check(found, asked) == []


def test_a_deployment_stays_in_its_clusters_and_types() -> None:
    fleet = [node("w", BIG, 2, cluster="west"), node("e", BIG, 2, cluster="east"), node("s", SMALL, 8)]
    both = [option("big", BIG, 1), option("small", SMALL, 1)]
    asked = request(fleet, deployment("a", 2, both, clusters=("east",)), deployment("b", 2, both, gpu_types=("Big",)))
    found = allocate(asked)
    assert found.counts() == {("a", "big", "e"): 2, ("b", "big", "w"): 2}


def test_replicas_are_spread_over_failure_domains() -> None:
    fleet = [node(f"n{i}", BIG, 8, domain=f"rack-{i % 3}") for i in range(6)]
    asked = request(fleet, deployment("a", 6, [option("one", BIG, 1)], spread=Spread(domain_share=0.34, domains=3)))
    found = allocate(asked)
    domains = Counter(int(replica.node[1:]) % 3 for replica in found.replicas)
    assert domains == {0: 2, 1: 2, 2: 2}


def test_no_domain_has_too_much_of_the_capacity_either() -> None:
    fleet = [node("big", BIG, 8, domain="a"), node("small", SMALL, 8, domain="b"), node("more", BIG, 2, domain="c")]
    options = [option("large", BIG, 10), option("little", SMALL, 1)]
    asked = request(fleet, deployment("a", 40, options, spread=Spread(domain_share=0.5)))
    found = allocate(asked)
    assert check(found, asked) == []
    assert found.carried_rps == pytest.approx(40)
    assert sum(1 for replica in found.replicas if replica.node == "more") == 2


def test_too_few_domains_leave_a_deployment_unserved_and_say_so() -> None:
    asked = request(nodes(1), deployment("a", 1, [option("one", BIG, 1)], spread=Spread(domains=2)))
    found = allocate(asked)
    assert found.replicas == ()
    assert found.unmet[0].obstacle is Obstacle.SPREAD
    assert "2 failure domains" in found.unmet[0].reason


def test_higher_priorities_are_carried_first_whatever_they_cost() -> None:
    dear, cheap = [option("dear", BIG, 1, tensor=4)], [option("cheap", BIG, 50)]
    asked = request(nodes(1), deployment("low", 300, cheap), deployment("high", 2, dear, priority=1))
    found = allocate(asked)
    assert {item.deployment: item.carried_rps for item in found.classes} == {"low": 0.0, "high": 2.0}
    less = allocate(request(nodes(1), deployment("low", 300, cheap), deployment("high", 1, dear, priority=1)))
    assert {item.deployment: item.carried_rps for item in less.classes} == {"low": 200.0, "high": 1.0}


def test_classes_of_one_deployment_are_carried_by_priority_and_equals_in_proportion() -> None:
    mixed = replace(
        deployment("a", 1, [option("one", BIG, 1)]),
        classes=(
            ClassDemand(name="batch", requests_per_s=6), ClassDemand(name="other", requests_per_s=2),
            ClassDemand(name="chat", requests_per_s=4, priority=5),
        ),
    )
    found = allocate(request(nodes(1), mixed))
    assert {item.request_class: item.carried_rps for item in found.classes} == pytest.approx(
        {"chat": 4.0, "batch": 3.0, "other": 1.0}
    )


def test_what_is_missing_is_named_by_type_and_number() -> None:
    found = allocate(request(nodes(1), deployment("a", 5, [option("four", BIG, 1, tensor=4)])), EXACT)
    assert found.carried_rps == pytest.approx(2)
    assert [(item.gpu, item.gpus, item.cost_per_hour) for item in found.missing] == [("Big", 12, 36.0)]
    assert found.unmet[0].obstacle is Obstacle.GPUS
    assert found.unmet[0].requests_per_s == pytest.approx(3)


@pytest.mark.parametrize(
    ("bounded", "obstacle"),
    [
        (deployment("a", 5, [option("one", BIG, 1)], max_replicas=2), Obstacle.MAX_REPLICAS),
        (deployment("a", 5, [option("two", BIG, 1, tensor=2)], max_gpus=5), Obstacle.MAX_GPUS),
        (deployment("a", 5, []), Obstacle.NO_OPTION),
        (deployment("a", 5, [option("one", SMALL, 1)]), Obstacle.NO_NODE),
        (deployment("a", 5, [option("one", BIG, 1)], clusters=("moon",)), Obstacle.NO_NODE),
        (deployment("a", 5, [option("nine", BIG, 1, tensor=9)]), Obstacle.NO_NODE),
    ],
)
def test_what_no_gpu_would_help_is_said(bounded: FleetDeployment, obstacle: Obstacle) -> None:
    found = allocate(request(nodes(1), bounded))
    assert found.unmet[0].obstacle is obstacle
    assert not found.complete


def test_a_shadow_price_says_what_one_gpu_more_buys() -> None:
    fleet = [node("b", BIG, 4), node("s", SMALL, 2)]
    full = allocate(request(fleet, deployment("a", 6, [option("big", BIG, 2), option("small", SMALL, 1)])), EXACT)
    shadows = {item.gpu: item for item in full.resources}
    # A Small carries for 1 what costs 1.5 on a Big, and all of them are taken.
    assert shadows["Small"].saved_per_hour == pytest.approx(0.5, abs=0.06)
    assert shadows["Big"].saved_per_hour == 0
    short = allocate(request(fleet, deployment("a", 60, [option("big", BIG, 2), option("small", SMALL, 1)])))
    assert {item.gpu: item.gained_rps for item in short.resources} == pytest.approx({"Big": 2.0, "Small": 1.0})


def test_what_runs_stays_where_it_is() -> None:
    running = [placed("a", "two", "n1", 2, 3), placed("a", "two", "n0", 6, 7)]
    asked = request(nodes(3), deployment("a", 3, [option("two", BIG, 1, tensor=2)]), running=running)
    found = allocate(asked)
    assert sorted((r.node, r.gpus) for r in found.replicas if r.kept) == [("n0", (6, 7)), ("n1", (2, 3))]
    assert found.stopped == ()
    assert found.objective_per_hour == pytest.approx(found.cost_per_hour + 0.05 * 6)


def test_a_replica_moves_if_that_saves_more_than_a_start_costs() -> None:
    options = [option("big", BIG, 1), option("small", SMALL, 1)]
    fleet = [*nodes(1), node("s", SMALL, 1)]
    asked = request(fleet, deployment("a", 1, options), running=[placed("a", "big", "n0", 0)])
    assert [replica.option for replica in allocate(asked).replicas] == ["small"]
    dear = replace(asked, start_hours=3.0)
    assert [replica.option for replica in allocate(dear).replicas] == ["big"]


def test_a_fragmented_node_is_cleared_only_if_nothing_else_has_room() -> None:
    ones, eight = [option("one", BIG, 1)], [option("eight", BIG, 8, tensor=8)]
    running = [placed("a", "one", "n0", 1), placed("a", "one", "n1", 5)]
    two = allocate(request(nodes(2), deployment("a", 2, ones), deployment("b", 8, eight), running=running))
    assert sum(replica.kept for replica in two.replicas) == 1
    three = allocate(request(nodes(3), deployment("a", 2, ones), deployment("b", 8, eight), running=running))
    assert sum(replica.kept for replica in three.replicas) == 2


def test_a_replica_whose_option_is_gone_is_stopped() -> None:
    running = [placed("a", "old", "n0", 0), placed("gone", "x", "n0", 1)]
    asked = request(nodes(1), deployment("a", 1, [option("new", BIG, 1)]), running=running)
    found = allocate(asked)
    assert set(found.stopped) == set(running)
    assert check(found, asked) == []


def test_least_replicas_run_without_demand_and_are_missed_if_they_do_not_fit() -> None:
    idle = allocate(request(nodes(1), deployment("a", 0, [option("one", BIG, 1)], min_replicas=2)))
    assert len(idle.replicas) == 2
    crowded = allocate(request(nodes(1), deployment("a", 0, [option("eight", BIG, 1, tensor=8)], min_replicas=2)))
    assert len(crowded.replicas) == 1
    assert crowded.unmet[0].replicas == 1


def test_nothing_wanted_is_nothing_placed() -> None:
    found = allocate(request(nodes(1)))
    assert found.replicas == ()
    assert found.complete
    assert found.cost_per_hour == 0


def test_nothing_wanted_where_nothing_fits_is_an_answer_as_well() -> None:
    found = allocate(request([node("s", SMALL, 1)], deployment("a", 0, [option("big", BIG, 1)])), EXACT)
    assert not found.replicas
    assert not found.unmet


def test_an_option_that_another_outdoes_changes_nothing() -> None:
    better, worse = option("better", BIG, 2), option("worse", BIG, 1)
    found = allocate(request(nodes(1), deployment("a", 4, [worse, better])))
    assert {replica.option for replica in found.replicas} == {"better"}


def test_a_replica_sold_whole_costs_its_own_price() -> None:
    asked = request(nodes(1), deployment("a", 2, [option("four", BIG, 1, tensor=4, price_per_hour=7.5)]))
    assert allocate(asked).cost_per_hour == pytest.approx(15.0)


def test_with_next_to_no_time_the_answer_is_valid_and_admits_what_it_is() -> None:
    fleet = [node(f"n{i}", (BIG, SMALL)[i % 2], 8, domain=f"rack-{i % 5}") for i in range(60)]
    others = [option("two", BIG, 2.5, tensor=2), option("s", SMALL, 0.7)]
    many = [
        deployment(
            f"d{i}", 20 + i, [option("one", BIG, 1.1 + i / 7), *others], priority=i % 3, spread=Spread(domain_share=0.4)
        )
        for i in range(8)
    ]
    asked = request(fleet, *many)
    found = allocate(asked, SolveLimits(time_limit_s=0.01))
    assert check(found, asked) == []
    assert found.replicas
    assert found.bound_per_hour <= found.objective_per_hour


def test_equal_nodes_cost_the_programme_nothing() -> None:
    asked = request(nodes(1000), deployment("a", 700, [option("four", BIG, 1, tensor=4), option("one", BIG, 0.2)]))
    found = allocate(asked, SolveLimits(time_limit_s=5.0))
    assert found.complete
    assert found.gap <= 1e-3
    assert check(found, asked) == []


@pytest.mark.parametrize(
    ("faulty", "field"),
    [
        (request([]), "nodes"),
        (request([node("n", BIG, 0, island_gpus=1)]), "nodes[0].gpus"),
        (request([node("n", gpu_model("Free", price_per_hour=None), 1)]), "nodes[0].gpu.price_per_hour"),
        (request([node("n", BIG, 1), node("n", BIG, 1)]), "nodes[1].name"),
        (request([node("n", BIG, 2, free_gib=(80,))]), "nodes[0].free_bytes"),
        (request(nodes(1), deployment("a", -1, [])), "deployments[0].classes[0].requests_per_s"),
        (request(nodes(1), deployment("a", float("nan"), [])), "deployments[0].classes[0].requests_per_s"),
        (request(nodes(1), deployment("a", 1, [option("o", BIG, 0)])), "deployments[0].options[0].capacity_rps"),
        (request(nodes(1), deployment("a", 1, [option("o", BIG, 1, tensor=2, shared=True)])), f"{OPTION}.shared"),
        (request(nodes(1), deployment("a", 1, [], spread=Spread(domain_share=0))), f"{FIRST}.spread.domain_share"),
        (request(nodes(1), deployment("a", 1, [], min_replicas=3, max_replicas=2)), "deployments[0].max_replicas"),
        (request(nodes(1), running=[placed("a", "o", "elsewhere", 0)]), "running[0].node"),
        (request(nodes(1), running=[placed("a", "o", "n0", 8)]), "running[0].gpus"),
    ],
)
def test_a_faulty_request_is_refused_with_its_field(faulty: AllocationRequest, field: str) -> None:
    with pytest.raises(RecommendError) as refused:
        allocate(faulty)
    assert refused.value.field == field


def test_evaluated_candidates_become_options() -> None:
    settings = option("o", BIG, 1).settings
    capacity = Interval(value=3.0, low=2.0, high=4.0)
    prediction = Prediction(
        requests_per_s=1, ttft_s=capacity, tpot_s=capacity, capacity_rps=capacity, prefill_tokens_per_s=1,
        decode_tokens_per_s=1, mean_sequences=1, kv_tokens=1, binding=Constraint.TPOT,
    )
    fits = Candidate(settings=settings, prediction=prediction, replicas=1, cost_per_hour=3, constraint=None, reason="")
    fails = replace(fits, prediction=None, constraint=Constraint.MEMORY)
    assert [o.capacity_rps for o in options_of((fails, fits))] == [3.0]
    assert [o.capacity_rps for o in options_of((fails, fits), cautious=True)] == [2.0]


BROKEN: dict[str, tuple[PlacedReplica, ...]] = {
    "is held by 2 replicas": (placed("a", "one", "n0", 0), placed("a", "one", "n0", 0)),
    "bytes, and more are claimed": (placed("a", "one", "n1", 0),),
    "across islands": (placed("a", "two", "n0", 3, 4),),
    "has not its 2 GPUs": (placed("a", "two", "n0", 0),),
    "is of no node or option": (placed("a", "three", "n0", 0),),
    "has GPUs that the node has not": (placed("a", "one", "n0", 8),),
    "replicas in one domain": (placed("a", "one", "n0", 0), placed("a", "one", "n0", 1)),
    "where none runs": (replace(placed("a", "one", "n0", 0), kept=True),),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_checker_names_each_broken_rule(broken: str) -> None:
    fleet = [node("n0", BIG, 8, island_gpus=4), node("n1", BIG, 1, free_gib=(8,))]
    options = [option("one", BIG, 1), option("two", BIG, 2, tensor=2)]
    asked = request(fleet, deployment("a", 1, options, spread=Spread(domain_share=0.5)))
    found = replace(allocate(request(fleet)), replicas=BROKEN[broken])
    assert any(broken in violation for violation in check(found, asked))


def test_claims_are_bytes_of_the_data_sheet() -> None:
    assert option("o", BIG, 1, utilization=0.5).claim_bytes == 40 * GIB
