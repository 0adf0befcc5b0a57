"""The fleet as the integer programme is asked about it, and its answer: nodes, claims, demand, priorities, moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from enova_coordinator.core.advice import Observed
from enova_coordinator.core.fleet import (
    Ground,
    Wanted,
    allocation_request,
    demand_of,
    ground_of,
    options_question,
)
from enova_coordinator.core.fleet_answer import Solved, answer_of
from enova_coordinator.core.gpu_types import LeftOut
from enova_coordinator.core.model import (
    Claim,
    Deployment,
    DeploymentSpec,
    Gpu,
    Hardware,
    Member,
    Node,
    NodeState,
    NodeView,
    Replica,
    ReplicaState,
    ReplicaStatus,
    ServingClass,
    Snapshot,
    Variant,
)
from enova_recommender import catalog
from enova_recommender.recommend.allocation import allocate, check
from enova_recommender.recommend.allocation_types import PRIORITIES_MAX, AllocationRequest, Option, SolveLimits
from enova_recommender.recommend.fleet import RUNNING, FleetOptions, OptionFacts, fleet_options
from enova_recommender.recommend.types import EngineSettings
from enova_recommender.types import Interval, Parallelism, Precision

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
SPEC = DeploymentSpec(model=MODEL, min=0, max=100)
OBSERVED = Observed(requests_per_s=6.0, prompt_tokens=500, output_tokens=100, requests=1000)


def view(name: str, kind: str = "H100", count: int = 8, **fields: Any) -> NodeView:
    memory = 80 << 30
    gpus = tuple(
        Gpu(uuid=f"{name}-{at}", index=at, type=kind, memory_bytes=memory, free_memory_bytes=memory)
        for at in range(count)
    )
    node = Node(name=f"nodes/{name}", uid=name, gpus=gpus, engine="simulated", cluster="here")
    return NodeView(node=replace(node, **fields), state=NodeState.READY)


def deployment(name: str = "d", **fields: Any) -> Deployment:
    return Deployment(name=f"deployments/{name}", uid=name, spec=replace(SPEC, **fields))


def running(
    name: str, node: str, *uuids: str, variant: str = "v1", state: ReplicaState = ReplicaState.READY
) -> Replica:
    full = f"deployments/{name}"
    member = Member(node=f"nodes/{node}", claims=tuple(Claim(gpu_uuid=uuid) for uuid in uuids))
    return Replica(
        name=f"{full}/replicas/{variant}-{uuids[0]}", uid=uuids[0], deployment=full,
        variant=f"{full}/variants/{variant}", members=(member,), status=ReplicaStatus(state=state),
    )  # fmt: skip


def fleet(*views: NodeView, deployments: tuple[Deployment, ...] = (), replicas: tuple[Replica, ...] = ()) -> Snapshot:
    variants = {each.variant: each.deployment for each in replicas}
    return Snapshot(
        nodes={each.node.name: each for each in views},
        deployments={each.name: each for each in deployments},
        replicas={each.name: each for each in replicas},
        variants={
            name: Variant(name=name, deployment=owner, model=MODEL, served_names=("x",), gpu_type="H100")
            for name, owner in variants.items()
        },
    )


def settings(kind: str = "H100", tensor: int = 1) -> EngineSettings:
    gpu = catalog.find_gpu(kind)
    assert gpu is not None
    return EngineSettings(
        gpu=gpu, parallelism=Parallelism(tensor=tensor), precision=Precision(), max_num_seqs=256,
        max_num_batched_tokens=8192, gpu_memory_utilization=0.9, max_model_len=8192,
    )  # fmt: skip


def options(**rates: float) -> FleetOptions:
    """An option of each type of GPU on one GPU, with what it carries; "H100" is the one that runs."""
    return FleetOptions(
        options=tuple(
            Option(name=RUNNING if kind == "H100" else kind, settings=settings(kind), capacity_rps=rate)
            for kind, rate in rates.items()
        ),
        facts={
            RUNNING if kind == "H100" else kind: OptionFacts(
                gpu_type=kind, layout="TP 1", configuration={"max_num_seqs": 256},
                capacity_rps=Interval(value=2 * rate, low=rate, high=3 * rate),
            )
            for kind, rate in rates.items()
        },
    )  # fmt: skip


def wanted(of: Deployment, *, rate: float = 6.0, **fields: Any) -> Wanted:
    return Wanted(
        deployment=of, options=fields.pop("options", options(H100=2.0)),
        observed=replace(OBSERVED, requests_per_s=rate), **fields,
    )  # fmt: skip


def asked(snapshot: Snapshot, *each: Wanted, headroom: float = 0.0) -> tuple[Ground, AllocationRequest]:
    ground = ground_of(snapshot)
    return ground, allocation_request(snapshot, ground, each, headroom=headroom)


def solved(snapshot: Snapshot, *each: Wanted, headroom: float = 0.0, left_out: tuple[LeftOut, ...] = ()) -> Any:
    ground, request = asked(snapshot, *each, headroom=headroom)
    found = allocate(request, SolveLimits(time_limit_s=5.0))
    assert not check(found, request)
    answer: Any = answer_of(
        snapshot, ground, each,
        Solved(allocation=found, headroom=headroom, time_limit_s=5.0, solve_s=0.1), left_out,
    )  # fmt: skip
    return answer


def test_nodes_are_parts_of_equal_gpus_of_hosts_that_take_replicas() -> None:
    mixed = view("m", count=2)
    card = Gpu(uuid="l", index=2, type="L40S", memory_bytes=48 << 30, free_memory_bytes=48 << 30)
    mixed = replace(mixed, node=replace(mixed.node, gpus=(*mixed.node.gpus, card)))
    ground = ground_of(fleet(view("a", count=12), mixed, view("e", draining=True), view("c", "CPU", 1)))
    sizes = {name: (part.node, part.gpus[0].type, len(part.gpus)) for name, part in ground.parts.items()}
    assert sorted(sizes.values()) == [
        ("nodes/a", "H100", 4), ("nodes/a", "H100", 8), ("nodes/m", "H100", 2), ("nodes/m", "L40S", 1),
    ]  # fmt: skip
    assert {each.object for each in ground.left_out} == {"CPU", "nodes/e"}


def test_gpus_of_deployments_that_cannot_be_asked_about_are_nobody_elses() -> None:
    snapshot = fleet(view("a", count=2), replicas=(running("other", "a", "a-0"),))
    _, request = asked(snapshot, wanted(deployment()))
    assert request.nodes[0].free_bytes == (0, 80 << 30)
    assert request.running == ()


def test_what_others_than_enova_hold_of_a_gpu_is_missing() -> None:
    host = view("a", count=1)
    gpu = replace(host.node.gpus[0], free_memory_bytes=7)
    snapshot = fleet(replace(host, node=replace(host.node, gpus=(gpu,))))
    assert asked(snapshot, wanted(deployment()))[1].nodes[0].free_bytes == (7,)


def test_replicas_of_current_configurations_may_stay_and_others_may_not() -> None:
    replicas = (
        running("d", "a", "a-0"), running("d", "a", "a-1", variant="old"),
        running("d", "a", "a-2", state=ReplicaState.FAILED),
    )  # fmt: skip
    snapshot = fleet(view("a"), replicas=replicas)
    retired = {
        name: replace(each, retired=name.endswith("old")) for name, each in snapshot.variants.items()
    }
    _, request = asked(replace(snapshot, variants=retired), wanted(deployment()))
    assert [(each.option, each.gpus) for each in request.running] == [(RUNNING, (0,))]


def test_demand_is_the_busiest_minute_in_the_proportion_of_the_classes() -> None:
    classes = (ServingClass(name="chat"), ServingClass(name="batch", priority=5))
    each = wanted(deployment(classes=classes), rate=10.0, arrived={"chat": 30, "batch": 60, "": 10})
    assert demand_of(each) == {"chat": pytest.approx(4.0), "batch": pytest.approx(6.0)}


def test_without_traffic_only_the_least_replicas_are_asked_for() -> None:
    each = Wanted(deployment=deployment(min=2, max=4), options=options(H100=2.0))
    answer = solved(fleet(view("a")), each)
    (found,) = answer["deployments"]
    assert (found["demand_rps"], found["variants"][0]["replicas"]) == (0.0, 2)
    assert "no traffic was counted" in found["grounds"]


def test_the_priority_of_the_deployment_goes_before_that_of_the_class() -> None:
    classes = (ServingClass(name="a", priority=0), ServingClass(name="b", priority=9))
    first, last = deployment("first", priority=0, classes=classes), deployment("last", priority=1, classes=classes)
    _, request = asked(fleet(view("a")), wanted(last), wanted(first))
    ranks = {(d.name, c.name): c.priority for d in request.deployments for c in d.classes}
    order = sorted(ranks, key=lambda key: -ranks[key])
    assert order == [
        ("deployments/first", "a"), ("deployments/first", "b"), ("deployments/last", "a"), ("deployments/last", "b"),
    ]  # fmt: skip


def test_more_priorities_than_the_programme_takes_share_the_last() -> None:
    many = [wanted(deployment(f"d{number}", priority=number)) for number in range(PRIORITIES_MAX + 5)]
    _, request = asked(fleet(view("a")), *many)
    ranks = [each.classes[0].priority for each in request.deployments]
    assert len(set(ranks)) == PRIORITIES_MAX
    assert ranks == sorted(ranks, reverse=True)


@pytest.mark.parametrize(
    ("fields", "nodes"),
    [
        ({"hardware": Hardware(clusters=("there",))}, {"nodes/b"}),
        ({"engine": "vllm"}, {"nodes/c"}),
        ({"hardware": Hardware(allow=("L40S",))}, {"nodes/d"}),
        ({"hardware": Hardware(clusters=("nowhere",))}, set()),
    ],
)
def test_a_deployment_keeps_to_its_clusters_engine_and_types(fields: dict[str, Any], nodes: set[str]) -> None:
    snapshot = fleet(view("a"), view("b", cluster="there"), view("c", engine="vllm"), view("d", "L40S"))
    answer = solved(snapshot, wanted(deployment(**fields), rate=1.0, options=options(H100=2.0, L40S=1.5)))
    (found,) = answer["deployments"]
    assert {node["node"] for variant in found["variants"] for node in variant["nodes"]} == nodes
    assert found["carried_rps"] == pytest.approx(1.0 if nodes else 0.0)


def test_the_answer_holds_replicas_nodes_weights_cost_and_a_bound() -> None:
    snapshot = fleet(view("a"), view("b", "L40S", 2), replicas=(running("d", "a", "a-3"),))
    each = wanted(deployment(), rate=5.0, options=options(H100=2.0, L40S=1.0))
    answer = solved(snapshot, each, headroom=0.2, left_out=(LeftOut(object="deployments/x", reason="it is odd"),))
    (found,) = answer["deployments"]
    rates = [variant["replicas"] * variant["capacity_rps"]["low"] for variant in found["variants"]]
    assert sum(rates) >= 6.0
    assert sum(variant["weight"] for variant in found["variants"]) == pytest.approx(1.0)
    assert [variant["weight"] for variant in found["variants"]] == pytest.approx([rate / sum(rates) for rate in rates])
    assert answer["cost_per_hour"] == pytest.approx(sum(variant["cost_per_hour"] for variant in found["variants"]))
    assert answer["bound_per_hour"] <= answer["objective_per_hour"]
    assert answer["complete"]
    assert (found["running_replicas"], answer["carried_rps"]) == (1, pytest.approx(5.0))
    assert {"object": "deployments/x", "reason": "it is odd"} in answer["left_out"]
    for variant in found["variants"]:
        assert sum(node["replicas"] for node in variant["nodes"]) == variant["replicas"]
        assert variant["runs_now"] == (variant["gpu_type"] == "H100")


def test_what_runs_stays_where_it_is_as_moving_costs() -> None:
    replicas = tuple(running("d", "b", f"b-{at}") for at in (1, 5))
    answer = solved(fleet(view("a"), view("b"), replicas=replicas), wanted(deployment(), rate=4.0))
    (found,) = answer["deployments"]
    assert found["variants"][0]["nodes"] == [{"node": "nodes/b", "replicas": 2, "kept": 2}]
    assert (found["running_replicas"], found["stopped_replicas"]) == (2, 0)


def test_what_cannot_be_carried_is_told_by_priority_with_what_is_missing() -> None:
    first, last = deployment("first", priority=0), deployment("last", priority=1)
    answer = solved(fleet(view("a", count=2)), wanted(last, rate=4.0), wanted(first, rate=3.0))
    by_name = {each["name"]: each for each in answer["deployments"]}
    assert by_name["deployments/first"]["carried_rps"] == pytest.approx(3.0)
    assert "unmet" not in by_name["deployments/first"]
    assert by_name["deployments/last"]["carried_rps"] == 0.0
    assert by_name["deployments/last"]["unmet"]["obstacle"] == "GPUS"
    assert answer["missing"] == [{"gpu_type": "H100", "count": 2, "cost_per_hour": pytest.approx(
        2 * settings().cost_per_hour
    )}]  # fmt: skip
    assert answer["carried_proven"]


def test_the_question_holds_what_runs_and_what_a_user_pinned() -> None:
    snapshot = fleet(view("a", count=2), replicas=(running("d", "a", "a-0"),))
    pinned = deployment(configuration={"max_num_seqs": 32})
    question = options_question(snapshot, pinned, ground_of(snapshot), config_json="", observed=OBSERVED)
    assert not isinstance(question, str)
    assert question.pinned == {"max_num_seqs": 32}
    assert question.request["current"] == {
        "gpu_type": "H100", "gpu": {"type": "H100", "count": 1}, "configuration": {"max_num_seqs": 32},
    }  # fmt: skip
    assert question.request["gpus"] == [{"type": "H100", "count": 2, "gpus_per_node": 2}]


def test_a_pinned_configuration_is_the_only_option_and_runs_now() -> None:
    snapshot = fleet(view("a", count=2), view("b", "L40S", 2), replicas=(running("d", "a", "a-0"),))
    pinned = deployment(configuration={"max_num_seqs": 32, "max_model_len": 8192})
    question = options_question(snapshot, pinned, ground_of(snapshot), config_json="", observed=OBSERVED)
    assert not isinstance(question, str)
    found = fleet_options(question)
    assert isinstance(found, FleetOptions)
    assert [each.name for each in found.options] == [RUNNING, "L40S TP 1"]
    assert all(each.settings.max_num_seqs == 32 for each in found.options)
    assert all(each.capacity_rps == found.facts[each.name].capacity_rps.low for each in found.options)


def test_objectives_that_nothing_meets_are_left_out_and_that_is_told() -> None:
    classes = (ServingClass(name="all", tpot_p95_s=1e-5),)
    snapshot = fleet(view("a", count=1))
    hasty = deployment(classes=classes)
    question = options_question(snapshot, hasty, ground_of(snapshot), config_json="", observed=OBSERVED)
    assert not isinstance(question, str)
    found = fleet_options(question)
    assert isinstance(found, FleetOptions)
    assert found.options
    assert not found.within_objectives
    answer = solved(snapshot, Wanted(deployment=hasty, options=found, observed=OBSERVED))
    assert "no configuration meets the objectives" in answer["deployments"][0]["grounds"]


def test_a_model_that_nobody_knows_cannot_be_asked_about() -> None:
    snapshot = fleet(view("a"))
    odd = deployment(model="own/model")
    question = options_question(snapshot, odd, ground_of(snapshot), config_json="", observed=None)
    assert isinstance(question, str)
    assert "catalogue does not know it" in question
