"""What holds of every plan, for snapshots that nobody thought of, and of every healthy fleet."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st

from enova_coordinator.core.model import (
    Claim,
    Deployment,
    DeploymentSpec,
    DeploymentStatus,
    Gpu,
    Hardware,
    Intent,
    Member,
    Node,
    NodeReport,
    NodeState,
    NodeView,
    Replica,
    ReplicaReport,
    ReplicaState,
    ReplicaStatus,
    Snapshot,
    Variant,
)
from enova_coordinator.core.placement import double_claims
from enova_coordinator.core.plan import Delete, Plan, Put
from enova_coordinator.core.reconcile import ReconcileLimits, reconcile
from enova_testing.examples import examples
from enova_testing.world import World

GIB = 1 << 30
V = TypeVar("V")
LIMITS = ReconcileLimits(creates_per_round=8)
NOW_S = 1000.0
CLAIM_STATES = [state for state in ReplicaState if state is not ReplicaState.PENDING]


@st.composite
def specs(draw: st.DrawFn) -> DeploymentSpec:
    replicas, least, most = draw(st.sampled_from([
        (None, None, None), (0, None, None), (3, None, None), (None, 0, 2), (None, 1, 6),
    ]))
    return DeploymentSpec(
        model=draw(st.sampled_from(["m-1", "m-2"])),
        engine=draw(st.sampled_from(["", "", "vllm", "simulated"])),
        hardware=Hardware(
            allow=draw(st.sampled_from([(), (), ("H100",), ("A100", "H100")])),
            max_gpus=draw(st.sampled_from([None, None, 3])),
            clusters=draw(st.sampled_from([(), (), ("oslo",)])),
        ),
        configuration={"tensor_parallel_size": draw(st.sampled_from([1, 1, 2, 4]))},
        priority=draw(st.integers(0, 2)),
        replicas=replicas, min=least, max=most,
    )


@st.composite
def nodes(draw: st.DrawFn, name: str) -> NodeView:
    free = st.sampled_from([80 * GIB, 80 * GIB, 10 * GIB])
    gpus = tuple(
        Gpu(uuid=f"{name}-{index}", index=index, type=draw(st.sampled_from(["H100", "A100"])), memory_bytes=80 * GIB,
            free_memory_bytes=draw(free))
        for index in range(draw(st.integers(0, 4)))
    )
    node = Node(
        name=name, uid=name, gpus=gpus, engine="simulated", cluster=draw(st.sampled_from(["", "oslo"])),
        schedulable=draw(st.booleans()) or draw(st.booleans()), draining=draw(st.integers(0, 5)) == 0,
    )
    return NodeView(
        node=node, state=draw(st.sampled_from([NodeState.READY, NodeState.READY, *NodeState])),
        state_age_s=draw(st.sampled_from([0.0, 100.0])), report=NodeReport(gpus=gpus),
    )


@st.composite
def replicas(draw: st.DrawFn, name: str, variant: Variant, free: dict[str, list[Gpu]]) -> Replica:
    open_nodes = sorted(node for node, gpus in free.items() if gpus)
    state = ReplicaState.PENDING
    members: tuple[Member, ...] = ()
    if open_nodes and draw(st.integers(0, 3)) > 0:
        node = draw(st.sampled_from(open_nodes))
        gpu = free[node].pop()
        members = (Member(node=node, claims=(Claim(gpu_uuid=gpu.uuid, memory_bytes=gpu.memory_bytes // 2),)),)
        state = draw(st.sampled_from([ReplicaState.READY, *CLAIM_STATES]))
    served = state is ReplicaState.READY or draw(st.booleans())
    return Replica(
        name=name, uid=name, deployment=variant.deployment, variant=variant.name, members=members,
        intent=draw(st.sampled_from([Intent.RUN, Intent.RUN, *Intent])) if members else Intent.RUN,
        create_time_s=float(draw(st.integers(0, 9))),
        status=ReplicaStatus(
            state=state, ready_time_s=1.0 if served else 0.0, gave_up=state is ReplicaState.FAILED,
            state_time_s=draw(st.sampled_from([0.0, NOW_S])),
        ),
    )


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    views = {name: draw(nodes(name)) for name in (f"nodes/n{number}" for number in range(draw(st.integers(0, 3))))}
    free = {name: list(view.node.gpus) for name, view in views.items()}
    deployments: dict[str, Deployment] = {}
    variants: dict[str, Variant] = {}
    made: dict[str, Replica] = {}
    for number in range(draw(st.integers(0, 3))):
        name, spec = f"deployments/d{number}", draw(specs())
        generation = draw(st.integers(1, 3))
        status = DeploymentStatus(
            observed_generation=draw(st.integers(0, generation)), target_replicas=draw(st.integers(0, 7))
        )
        if draw(st.integers(0, 8)):  # else its parts are orphans
            deployments[name] = Deployment(
                name=name, uid=name, spec=spec, generation=generation, status=status,
                delete_time_s=1.0 if draw(st.integers(0, 5)) == 0 else 0.0,
            )
        for older in range(1, draw(st.integers(1, 3))):
            variant = Variant(
                name=f"{name}/variants/v{older}", deployment=name, model=spec.model if older == 1 else "m-0",
                served_names=(f"d{number}",), engine=spec.engine, configuration=spec.configuration,
                generation=older, retired=draw(st.booleans()), replicas_made=9,
                failures=draw(st.integers(0, 40)), failure_time_s=draw(st.sampled_from([0.0, NOW_S - 5.0])),
            )
            variants[variant.name] = variant
            for index in range(draw(st.integers(0, 3))):
                replica = draw(replicas(f"{name}/replicas/v{older}-{index}", variant, free))
                made[replica.name] = replica
    views = {name: _with_reports(draw, view, made) for name, view in views.items()}
    return Snapshot(
        revision=50, deployments=deployments, variants=variants, replicas=made, nodes=views,
        revisions=dict.fromkeys([*deployments, *variants, *made], 7),
        replacement_held=draw(st.sampled_from(["", "", "held"])),
    )


def _with_reports(draw: st.DrawFn, view: NodeView, made: dict[str, Replica]) -> NodeView:
    """The node reports some of its replicas, in states of its own."""
    if draw(st.integers(0, 4)) == 0:
        return replace(view, report=None)
    here = [replica for replica in made.values() if replica.node == view.node.name]
    reports = tuple(
        ReplicaReport(replica=replica.name, uid=replica.uid, state=draw(st.sampled_from(CLAIM_STATES)))
        for replica in here
        if draw(st.integers(0, 3))
    )
    return replace(view, report=NodeReport(replicas=reports, gpus=view.node.gpus))


def applied(snapshot: Snapshot, plan: Plan) -> dict[str, Replica]:
    after = dict(snapshot.replicas)
    for change in plan.changes:
        for write in change.writes:
            if isinstance(write, Delete):
                after.pop(write.name, None)
            elif isinstance(write.value, Replica):
                after[write.name] = write.value
    return after


def puts(plan: Plan) -> list[Put]:
    return [write for change in plan.changes for write in change.writes if isinstance(write, Put)]


@given(snapshots())
@examples(300)
def test_no_plan_claims_a_gpu_twice_or_more_than_it_has_even_if_half_of_it_is_refused(snapshot: Snapshot) -> None:
    plan = reconcile(snapshot, now_s=NOW_S, limits=LIMITS)
    assert not double_claims(applied(snapshot, plan))
    # Removals may be refused where placements are not: claims must not overlap even then.
    kept = {**applied(snapshot, plan), **{
        name: replica for name, replica in snapshot.replicas.items() if name not in applied(snapshot, plan)
    }}
    assert not double_claims(kept)
    memory = {gpu.uuid: gpu.memory_bytes for view in snapshot.nodes.values() for gpu in view.node.gpus}
    for replica in kept.values():
        assert all(claim.memory_bytes <= memory[claim.gpu_uuid] for m in replica.members for claim in m.claims)


@given(snapshots())
@examples(200)
def test_each_object_is_written_once_under_the_revision_that_was_read(snapshot: Snapshot) -> None:
    plan = reconcile(snapshot, now_s=NOW_S, limits=LIMITS)
    writes = [write for change in plan.changes for write in change.writes]
    names = [write.name for write in writes]
    assert len(names) == len(set(names))
    assert all(write.revision == snapshot.revisions.get(write.name, 0) for write in writes)


@given(snapshots())
@examples(200)
def test_what_is_on_its_way_out_never_comes_back_and_claims_never_move(snapshot: Snapshot) -> None:
    after = applied(snapshot, reconcile(snapshot, now_s=NOW_S, limits=LIMITS))
    for name, before in snapshot.replicas.items():
        if name in after:
            assert before.intent is Intent.RUN or after[name].intent is before.intent
            assert not before.members or after[name].members == before.members


@given(snapshots())
@examples(200)
def test_new_places_are_on_reachable_nodes_that_take_new_replicas(snapshot: Snapshot) -> None:
    after = applied(snapshot, reconcile(snapshot, now_s=NOW_S, limits=LIMITS))
    for name, replica in after.items():
        before = snapshot.replicas.get(name)
        if replica.members and (before is None or not before.members):
            view = snapshot.nodes[replica.node]
            assert view.state is NodeState.READY
            assert view.report is not None
            assert view.node.schedulable
            assert not view.node.draining
            spec = snapshot.deployments[replica.deployment].spec
            assert not spec.hardware.clusters or view.node.cluster in spec.hardware.clusters
            types = {gpu.type for gpu in view.gpus if gpu.uuid in replica.gpus}
            assert len(types) == 1
            assert not spec.hardware.allow or types <= set(spec.hardware.allow)


@given(snapshots())
@examples(200)
def test_a_deleted_or_zero_deployment_gets_nothing_new(snapshot: Snapshot) -> None:
    after = applied(snapshot, reconcile(snapshot, now_s=NOW_S, limits=LIMITS))
    for name, replica in after.items():
        deployment = snapshot.deployments.get(replica.deployment)
        if deployment is None or deployment.deleting or deployment.spec.bounds[1] == 0:
            before = snapshot.replicas.get(name)
            assert before is not None
            assert replica.members == before.members
            assert replica.intent is not Intent.RUN or not replica.members


@given(snapshots(), st.randoms(use_true_random=False))
@examples(200)
def test_the_order_in_which_objects_were_read_changes_nothing(snapshot: Snapshot, shuffle: random.Random) -> None:
    def shuffled(values: Mapping[str, V]) -> dict[str, V]:
        names = list(values)
        shuffle.shuffle(names)
        return {name: values[name] for name in names}

    other = replace(
        snapshot,
        deployments=shuffled(snapshot.deployments),
        variants=shuffled(snapshot.variants),
        replicas=shuffled(snapshot.replicas),
        nodes=shuffled(snapshot.nodes),
        revisions=shuffled(snapshot.revisions),
    )
    plans = [reconcile(each, now_s=NOW_S, limits=LIMITS) for each in (snapshot, other)]
    assert _unordered(plans[0]) == _unordered(plans[1])


def _unordered(plan: Plan) -> list[tuple[str, frozenset[str]]]:
    return [(change.subject, frozenset(str(write) for write in change.writes)) for change in plan.changes]


@given(st.lists(specs(), min_size=1, max_size=3), st.integers(0, 1 << 30))
@examples(40)
def test_a_healthy_fleet_comes_to_rest_whatever_is_deployed(wanted: list[DeploymentSpec], seed: int) -> None:
    world = World(seed, nodes=3, gpus=3)
    for number, spec in enumerate(wanted):
        world.deploy(f"d{number}", spec)
    world.run(40.0)
    assert world.settled()
    revision = world.store.revision
    world.run(20.0)
    assert world.store.revision == revision


@given(
    before=st.integers(1, 4), after=st.integers(1, 4), again=st.booleans(), pause_s=st.integers(0, 20),
    seed=st.integers(0, 1 << 30),
)
@examples(40)
def test_with_room_a_rollout_never_serves_with_fewer_than_both_targets_ask_for(
    before: int, after: int, again: bool, pause_s: int, seed: int
) -> None:
    world = World(seed, nodes=3, gpus=4)
    world.deploy("chat", DeploymentSpec(model="m-1", replicas=before))
    world.run(20.0)
    least = min(before, after)
    world.deploy("chat", DeploymentSpec(model="m-2", replicas=after))
    for step in range(240):
        if again and step == 2 * pause_s:
            world.deploy("chat", DeploymentSpec(model="m-3", replicas=after))
        world.step()
        assert world.serving("chat") >= least
    assert world.serving("chat") == after
    assert [variant.model for variant in world.variants("chat")] == ["m-3" if again else "m-2"]
