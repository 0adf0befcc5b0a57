"""Who is in the routes, since when, and what a delta says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from enova_coordinator.core.model import (
    Deployment,
    DeploymentSpec,
    Intent,
    Member,
    Node,
    NodeReport,
    NodeState,
    NodeView,
    Replica,
    ReplicaState,
    ReplicaStatus,
    ServingClass,
    Snapshot,
    Variant,
)
from enova_coordinator.core.routes import RouteTable, next_table, routed, routed_everywhere

DEPLOYMENT = Deployment(
    name="deployments/d",
    uid="d",
    spec=DeploymentSpec(model="m", served_names=("x", "y"), classes=(ServingClass(name="c"),)),
)
VARIANT = Variant(
    name="deployments/d/variants/v1", deployment="deployments/d", model="m", served_names=("x", "y"), weight=2.0,
    configuration={"max_num_seqs": 7},
)


def replica(number: int, **fields: object) -> Replica:
    made = Replica(
        name=f"deployments/d/replicas/v1-{number}", uid=str(number), deployment="deployments/d", variant=VARIANT.name,
        members=(Member(node="nodes/n"),), status=ReplicaStatus(state=ReplicaState.READY),
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def snapshot(*replicas: Replica, state: NodeState = NodeState.READY, revision: int = 5) -> Snapshot:
    node = Node(name="nodes/n", uid="n", hop_address="n:1")
    return Snapshot(
        revision=revision,
        deployments={DEPLOYMENT.name: DEPLOYMENT},
        variants={VARIANT.name: VARIANT},
        replicas={each.name: each for each in replicas},
        nodes={node.name: NodeView(node=node, state=state)},
    )


def names(table: RouteTable) -> list[str]:
    return [target.replica for target in table.routes["x"].targets]


def test_a_ready_replica_is_reached_under_every_served_name_of_its_variant() -> None:
    table = next_table(RouteTable(), snapshot(replica(0)))
    assert sorted(table.routes) == ["x", "y"]
    (target,) = table.routes["y"].targets
    assert (target.hop_address, target.weight, target.max_concurrency) == ("n:1", 2.0, 7)
    assert table.routes["x"].classes == DEPLOYMENT.spec.classes


@pytest.mark.parametrize(
    "left_out",
    [
        replica(1, intent=Intent.DRAIN),
        replica(1, status=ReplicaStatus(state=ReplicaState.STARTING)),
        replica(1, status=ReplicaStatus(state=ReplicaState.READY, in_routing=False)),
        replica(1, members=()),
    ],
)
def test_what_drains_starts_hangs_or_has_no_place_is_not_routed(left_out: Replica) -> None:
    assert names(next_table(RouteTable(), snapshot(replica(0), left_out))) == [replica(0).name]


def test_a_suspect_node_is_routed_and_a_lost_one_is_not() -> None:
    assert names(next_table(RouteTable(), snapshot(replica(0), state=NodeState.SUSPECT)))
    assert not names(next_table(RouteTable(), snapshot(replica(0), state=NodeState.LOST)))


def test_a_deployment_without_ready_replicas_keeps_its_names() -> None:
    assert names(next_table(RouteTable(), snapshot())) == []


def test_the_same_routes_are_the_same_table() -> None:
    table = next_table(RouteTable(), snapshot(replica(0)))
    assert next_table(table, snapshot(replica(0), revision=99)) is table


def test_revisions_grow_with_the_store_and_without_it() -> None:
    first = next_table(RouteTable(), snapshot(replica(0), revision=5))
    second = next_table(first, snapshot(replica(0), replica(1), revision=5))
    third = next_table(second, snapshot(revision=50))
    assert (first.revision, second.revision, third.revision) == (5, 6, 50)


def test_a_delta_has_what_changed_and_what_went() -> None:
    first = next_table(RouteTable(), snapshot(replica(0)))
    one_name = replace(DEPLOYMENT, spec=replace(DEPLOYMENT.spec, served_names=("x",)))
    second = next_table(first, replace(snapshot(replica(0), revision=9), deployments={one_name.name: one_name}))
    delta = second.delta(first)
    assert (delta.base_revision, delta.revision, delta.routes, delta.removed) == (5, 9, (), ("y",))
    assert second.whole().base_revision == 0


def test_a_replica_is_routed_once_every_connected_ingress_serves_a_table_that_has_it() -> None:
    first = next_table(RouteTable(), snapshot(replica(0), revision=5))
    table = next_table(first, snapshot(replica(0), replica(1), revision=9))

    def reports(*revisions: int) -> list[NodeReport]:
        return [NodeReport(routes_revision=revision, ingress_connected=True) for revision in revisions]

    assert routed_everywhere(table, replica(0).name, reports(5, 9))
    assert not routed_everywhere(table, replica(1).name, reports(5, 9))
    assert routed_everywhere(table, replica(1).name, [*reports(9), NodeReport(routes_revision=0)])
    assert not routed_everywhere(table, replica(1).name, [])
    assert not routed_everywhere(table, replica(2).name, reports(9))
    both = {replica(0).name, replica(1).name}
    assert routed(table, reports(5, 9)) == {replica(0).name}
    assert routed(table, [*reports(9), NodeReport(routes_revision=0)]) == both
    assert routed(table, []) == both
