"""Whatever fleet the leader sees, the question about it can be answered, and the answer keeps to the fleet."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from enova_coordinator.core.advice import Observed
from enova_coordinator.core.fleet import Wanted, allocation_request, ground_of
from enova_coordinator.core.fleet_answer import Solved, answer_of
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
    Snapshot,
    Variant,
)
from enova_recommender import catalog
from enova_recommender.recommend.allocation import allocate, check
from enova_recommender.recommend.allocation_types import Option, SolveLimits
from enova_recommender.recommend.fleet import RUNNING, FleetOptions, OptionFacts
from enova_recommender.recommend.types import EngineSettings
from enova_recommender.types import Interval, Parallelism, Precision
from enova_testing.examples import examples

KINDS = ("H100", "H100", "H100", "L40S", "H20", "CPU", "Odd")

OPTIONS: tuple[list[str], ...] = (["H100"], ["H100", "L40S"], ["H100", "L40S"], [])


@st.composite
def nodes(draw: st.DrawFn, name: str) -> NodeView:
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6))
    gpus = tuple(
        Gpu(
            uuid=f"{name}-{at}", index=at, type=kind, memory_bytes=80 << 30,
            free_memory_bytes=draw(st.sampled_from([*[80 << 30] * 7, 1 << 30])),
        )
        for at, kind in enumerate(kinds)
    )
    node = Node(
        name=f"nodes/{name}", uid=name, gpus=gpus, engine=draw(st.sampled_from(["vllm", "simulated"])),
        cluster=draw(st.sampled_from(["here", "there"])), draining=draw(st.sampled_from([False, False, False, True])),
    )
    return NodeView(node=node, state=draw(st.sampled_from([*[NodeState.READY] * 4, NodeState.LOST])))


@st.composite
def deployments(draw: st.DrawFn, name: str) -> Deployment:
    least = draw(st.integers(0, 2))
    spec = DeploymentSpec(
        model="m", min=least, max=least + draw(st.sampled_from([0, 2, 30])), priority=draw(st.integers(0, 30)),
        engine=draw(st.sampled_from(["", "", "vllm"])),
        hardware=Hardware(
            allow=draw(st.sampled_from([(), (), (), ("H100",), ("L40S", "H20")])),
            max_gpus=draw(st.sampled_from([None, None, 3])), clusters=draw(st.sampled_from([(), (), ("here",)])),
        ),
    )
    return Deployment(name=f"deployments/{name}", uid=name, spec=spec)


def options(kinds: list[str], tensor: int) -> FleetOptions:
    """One option of each kind that has a price; the first is the one that runs."""
    names = [RUNNING if at == 0 else kind for at, kind in enumerate(kinds)]
    found = []
    for name, kind in zip(names, kinds, strict=True):
        gpu = catalog.find_gpu(kind)
        assert gpu is not None
        engine = EngineSettings(
            gpu=gpu, parallelism=Parallelism(tensor=tensor), precision=Precision(), max_num_seqs=64,
            max_num_batched_tokens=2048, gpu_memory_utilization=0.9, max_model_len=2048,
        )
        found.append(Option(name=name, settings=engine, capacity_rps=1.5))
    facts = {
        each.name: OptionFacts(
            gpu_type=each.settings.gpu.name, layout="TP", configuration={},
            capacity_rps=Interval(value=2.0, low=1.5, high=3.0),
        )
        for each in found
    }
    return FleetOptions(options=tuple(found), facts=facts)


@st.composite
def fleets(draw: st.DrawFn) -> tuple[Snapshot, list[Wanted]]:
    views = [draw(nodes(f"n{at}")) for at in range(draw(st.integers(1, 3)))]
    made = [draw(deployments(f"d{at}")) for at in range(draw(st.integers(2, 4)))]
    replicas: dict[str, Replica] = {}
    for at, gpu in enumerate(gpu for view in views for gpu in view.gpus):
        if draw(st.booleans()):
            continue
        owner = draw(st.sampled_from(made)).name
        member = Member(node=f"nodes/{gpu.uuid.split('-')[0]}", claims=(Claim(gpu_uuid=gpu.uuid),))
        name = f"{owner}/replicas/v1-{at}"
        replicas[name] = Replica(
            name=name, uid=name, deployment=owner, variant=f"{owner}/variants/v1", members=(member,),
            status=ReplicaStatus(state=draw(st.sampled_from([ReplicaState.READY, ReplicaState.FAILED]))),
        )
    variants = {
        name: Variant(name=name, deployment=each.name, model="m", served_names=("m",), gpu_type="H100")
        for each in made
        for name in (f"{each.name}/variants/v1",)
    }
    snapshot = Snapshot(
        nodes={view.node.name: view for view in views}, deployments={each.name: each for each in made},
        replicas=replicas, variants=variants,
    )
    asked = made[draw(st.integers(0, 1)) :]  # one may be left out: its GPUs stay its own
    wanted = [
        Wanted(
            deployment=each,
            options=options(draw(st.sampled_from(OPTIONS)), draw(st.sampled_from([1, 2]))),
            observed=Observed(
                requests_per_s=draw(st.sampled_from([0.5, 7.0, 60.0])), prompt_tokens=9, output_tokens=9, requests=99
            ),
        )
        for each in asked
    ]
    return snapshot, wanted


@examples(40)
@given(fleet=fleets(), headroom=st.sampled_from([0.0, 0.3]))
def test_any_fleet_gets_an_answer_that_keeps_to_it(fleet: tuple[Snapshot, list[Wanted]], headroom: float) -> None:
    snapshot, wanted = fleet
    ground = ground_of(snapshot)
    if not ground.parts:
        return
    request = allocation_request(snapshot, ground, wanted, headroom=headroom)
    found = allocate(request, SolveLimits(time_limit_s=2.0))
    assert not check(found, request)
    answer: Any = answer_of(
        snapshot, ground, wanted,
        Solved(allocation=found, headroom=headroom, time_limit_s=2.0, solve_s=0.1), (),
    )
    assert [each["name"] for each in answer["deployments"]] == [each.deployment.name for each in wanted]
    _check_nodes(snapshot, wanted, answer)
    for each in answer["deployments"]:
        assert 0 <= each["carried_rps"] <= each["demand_rps"] * (1 + 1e-9)
        assert 0 <= each["stopped_replicas"] <= each["running_replicas"]
        assert not each["variants"] or abs(sum(v["weight"] for v in each["variants"]) - 1) < 1e-9


def _check_nodes(snapshot: Snapshot, wanted: list[Wanted], answer: Any) -> None:
    """Replicas lie on nodes that take them, on no more GPUs than nobody else holds."""
    asked = {each.deployment.name: each for each in wanted}
    others = {gpu for each in snapshot.replicas.values() if each.deployment not in asked for gpu in each.gpus}
    used: Counter[tuple[str, str]] = Counter()
    for each in answer["deployments"]:
        spec = asked[each["name"]].deployment.spec
        tensor = {o.settings.gpu.name: o.gpus for o in asked[each["name"]].options.options}
        assert sum(variant["replicas"] for variant in each["variants"]) <= spec.bounds[1]
        for variant in each["variants"]:
            assert not spec.hardware.allow or variant["gpu_type"] in spec.hardware.allow
            for node in variant["nodes"]:
                view = snapshot.nodes[node["node"]]
                assert view.state is NodeState.READY
                assert not view.node.draining
                assert spec.engine in {"", view.node.engine}
                assert not spec.hardware.clusters or view.node.cluster in spec.hardware.clusters
                used[node["node"], variant["gpu_type"]] += node["replicas"] * tensor[variant["gpu_type"]]
    for (name, kind), count in used.items():
        assert count <= sum(gpu.type == kind and gpu.uuid not in others for gpu in snapshot.nodes[name].gpus)
