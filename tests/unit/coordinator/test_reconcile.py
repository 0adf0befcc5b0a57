"""What the reconciler does, seen on a fleet of model agents in virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from enova_coordinator.core.model import (
    DeploymentSpec,
    DeploymentState,
    Hardware,
    Intent,
    NodeState,
    Replica,
    ReplicaReport,
    ReplicaState,
)
from enova_coordinator.core.plan import Put
from enova_coordinator.core.reconcile import ReconcileLimits, reconcile
from enova_testing.world import GIB, World


def spec(model: str = "m-1", **fields: object) -> DeploymentSpec:
    given = {"replicas": 1} if not {"replicas", "min", "max"} & set(fields) else {}
    return DeploymentSpec(model=model, **(given | fields))  # type: ignore[arg-type]


def tensor_parallel(size: int) -> dict[str, int]:
    return {"tensor_parallel_size": size}


def deployed(name: str, wanted: DeploymentSpec, *, nodes: int = 3, gpus: int = 4) -> World:
    made = World(nodes=nodes, gpus=gpus)
    made.run(2.0)
    made.deploy(name, wanted)
    made.run(15.0)
    return made


def reasons(world: World) -> list[str]:
    return [note.reason for note in world.notes]


def test_replicas_of_a_deployment_are_spread_over_nodes_and_become_ready() -> None:
    world = deployed("chat", spec(replicas=3), nodes=3)
    assert {replica.node for replica in world.replicas("chat")} == {"nodes/node-0", "nodes/node-1", "nodes/node-2"}
    status = world.deployment("chat").status
    assert (status.state, status.ready_replicas, status.observed_generation) == (DeploymentState.READY, 3, 1)
    assert world.settled()


def test_without_bounds_one_replica_runs() -> None:
    world = deployed("chat", DeploymentSpec(model="m-1"))
    assert world.serving("chat") == 1


def test_a_healthy_world_wants_nothing() -> None:
    world = deployed("chat", spec(replicas=2))
    revision = world.store.revision
    world.run(10.0)
    assert world.store.revision == revision


def test_pending_says_for_each_node_why_it_has_no_room() -> None:
    world = World(nodes=2, gpus=2)
    world.add_node("gate", gpus=0)
    world.change_node("node-1", draining=True)
    world.run(2.0)
    world.deploy("big", spec(configuration=tensor_parallel(4)))
    world.run(3.0)
    (replica,) = world.replicas("big")
    assert replica.status.state is ReplicaState.PENDING
    assert "gate has no GPU of type H100" in replica.status.reason
    assert "node-0 has 2 of 2 H100 free, 4 needed" in replica.status.reason
    assert "node-1 is being drained" in replica.status.reason
    assert world.deployment("big").status.state is DeploymentState.PENDING
    assert replica.status.reason in world.deployment("big").status.reason


def test_a_pending_replica_is_placed_when_room_appears() -> None:
    world = deployed("big", spec(configuration=tensor_parallel(4)), nodes=1, gpus=2)
    world.add_node("large", gpus=4)
    world.run(12.0)
    assert [replica.node for replica in world.replicas("big")] == ["nodes/large"]
    assert world.serving("big") == 1


def test_those_that_the_policy_named_leave_before_newer_ones_and_the_names_are_forgotten_then() -> None:
    world = deployed("chat", spec(min=1, max=4))
    world.scale("chat", 4)
    world.run(15.0)
    names = [replica.name for replica in world.replicas("chat")]
    ill, older = names[1], names[0]
    world.scale("chat", 2, leave_first=(ill, older))
    world.run(30.0)
    assert world.settled()
    assert [replica.name for replica in world.replicas("chat")] == names[2:]
    assert world.deployment("chat").status.leave_first == ()
    world.scale("chat", 1)
    world.run(30.0)
    assert [replica.name for replica in world.replicas("chat")] == [names[2]], "without a name the newest leaves"


def test_what_does_not_serve_leaves_before_what_the_policy_named() -> None:
    world = deployed("chat", spec(min=1, max=4))
    world.scale("chat", 2)
    world.run(15.0)
    serving = [replica.name for replica in world.replicas("chat")]
    world.scale("chat", 3)
    world.run(1.0)
    assert world.serving("chat") == 2
    world.scale("chat", 2, leave_first=(serving[0],))
    world.run(30.0)
    assert [replica.name for replica in world.replicas("chat")] == serving


def test_scaling_down_drops_a_starting_replica_before_a_ready_one() -> None:
    world = deployed("chat", spec(min=1, max=4))
    world.scale("chat", 2)
    world.run(2.0)
    ready, starting = world.replicas("chat")
    assert (ready.status.state, starting.status.state) == (ReplicaState.READY, ReplicaState.STARTING)
    world.scale("chat", 1)
    world.run(8.0)
    assert [replica.name for replica in world.replicas("chat")] == [ready.name]
    assert "ReplicaDraining" not in reasons(world)


def test_scaling_down_drains_the_newest_of_the_ready_ones() -> None:
    world = deployed("chat", spec(min=1, max=4))
    world.scale("chat", 2)
    world.run(12.0)
    oldest, _ = world.replicas("chat")
    world.scale("chat", 1)
    world.run(1.0)
    assert [replica.intent for replica in world.replicas("chat")] == [Intent.RUN, Intent.DRAIN]
    world.run(10.0)
    assert [replica.name for replica in world.replicas("chat")] == [oldest.name]


def test_a_target_outside_the_bounds_is_held_at_the_bound() -> None:
    world = deployed("chat", spec(min=1, max=2))
    world.scale("chat", 9)
    world.run(15.0)
    assert world.serving("chat") == 2


def test_a_target_of_zero_runs_nothing_and_is_ready() -> None:
    world = deployed("chat", spec(min=0, max=2))
    assert world.serving("chat") == 1
    world.scale("chat", 0)
    world.run(15.0)
    assert world.replicas("chat") == []
    assert world.deployment("chat").status.state is DeploymentState.READY


def test_a_changed_spec_replaces_one_at_a_time_and_never_serves_with_fewer() -> None:
    world = deployed("chat", spec(replicas=3))
    old = {replica.name for replica in world.replicas("chat")}
    world.deploy("chat", spec("m-2", replicas=3))
    most = 0
    for _ in range(160):
        world.step()
        assert world.serving("chat") >= 3
        running = [replica for replica in world.replicas("chat") if replica.intent is Intent.RUN]
        most = max(most, len(running))
    assert most == 4
    assert not old & {replica.name for replica in world.replicas("chat")}
    assert [variant.model for variant in world.variants("chat")] == ["m-2"]
    status = world.deployment("chat").status
    assert (status.state, status.observed_generation) == (DeploymentState.READY, 2)


def test_a_change_that_engines_do_not_see_restarts_nothing() -> None:
    world = deployed("chat", spec(min=1, max=2))
    before = [replica.name for replica in world.replicas("chat")]
    world.deploy("chat", spec(min=1, max=5, priority=3))
    world.run(10.0)
    assert [replica.name for replica in world.replicas("chat")] == before
    assert [replica.generation for replica in world.replicas("chat")] == [2]
    assert world.deployment("chat").status.observed_generation == 2


def test_a_new_spec_that_fails_leaves_the_old_one_serving_and_says_so() -> None:
    world = deployed("chat", spec(replicas=2))
    for agent in world.agents.values():
        agent.broken_models.add("bad")
    world.deploy("chat", spec("bad", replicas=2))
    for _ in range(120):
        world.step()
        assert world.serving("chat") == 2
    status = world.deployment("chat").status
    assert status.state is DeploymentState.FAILED
    assert "the model cannot be loaded" in status.reason
    assert status.ready_replicas == 2


def test_going_back_to_the_old_spec_keeps_the_replicas_that_still_run() -> None:
    world = deployed("chat", spec(replicas=2))
    before = [replica.name for replica in world.replicas("chat")]
    for agent in world.agents.values():
        agent.broken_models.add("bad")
    world.deploy("chat", spec("bad", replicas=2))
    world.run(20.0)
    world.deploy("chat", spec(replicas=2))
    world.run(20.0)
    assert [replica.name for replica in world.replicas("chat")] == before
    assert world.deployment("chat").status.state is DeploymentState.READY


def test_with_no_room_beside_it_one_of_several_replicas_goes_first() -> None:
    world = deployed("chat", spec(replicas=2), nodes=1, gpus=2)
    world.deploy("chat", spec("m-2", replicas=2))
    for _ in range(160):
        world.step()
        assert world.serving("chat") >= 1
    assert [variant.model for variant in world.variants("chat")] == ["m-2"]
    assert world.serving("chat") == 2


def test_with_no_room_beside_it_the_only_replica_stays_and_the_reason_is_given() -> None:
    world = deployed("chat", spec(replicas=1), nodes=1, gpus=1)
    world.deploy("chat", spec("m-2", replicas=1))
    world.run(30.0)
    assert world.serving("chat") == 1
    status = world.deployment("chat").status
    assert status.state is DeploymentState.UPDATING
    assert "node-0 has 0 of 1 H100 free, 1 needed" in status.reason


def test_no_replica_goes_first_if_its_going_would_not_make_room() -> None:
    world = deployed("chat", spec(replicas=2), nodes=2, gpus=1)
    world.deploy("chat", spec("m-2", replicas=2, configuration=tensor_parallel(2)))
    world.run(30.0)
    assert world.serving("chat") == 2


def test_a_replica_that_gave_up_is_replaced_on_another_node_after_a_pause() -> None:
    world = World(nodes=2, gpus=4)
    world.agents["nodes/node-0"].broken_models.add("m-1")
    world.run(2.0)
    world.deploy("chat", spec())
    world.run(10.0)
    (failed,) = world.replicas("chat")
    assert (failed.status.state, failed.node) == (ReplicaState.FAILED, "nodes/node-0")
    assert world.deployment("chat").status.state is DeploymentState.FAILED
    world.run(30.0)
    (replica,) = world.replicas("chat")
    assert (replica.status.state, replica.node) == (ReplicaState.READY, "nodes/node-1")


def test_failures_in_a_row_are_retried_ever_more_slowly() -> None:
    world = World(nodes=1, limits=ReconcileLimits(failure_delay_s=5.0, failure_delay_max_s=40.0))
    world.agents["nodes/node-0"].broken_models.add("m-1")
    world.run(2.0)
    world.deploy("chat", spec())
    world.run(600.0)
    made = world.variants("chat")[0].replicas_made
    assert 600 / 50 <= made <= 600 / 40 + 5


def test_draining_a_node_moves_its_replicas_without_serving_with_fewer() -> None:
    world = deployed("chat", spec(replicas=2), nodes=3)
    world.change_node("node-0", draining=True)
    for _ in range(60):
        world.step()
        assert world.serving("chat") >= 2
    assert {replica.node for replica in world.replicas("chat")} == {"nodes/node-1", "nodes/node-2"}
    assert world.settled()


def test_draining_the_only_node_keeps_its_replica_and_says_why() -> None:
    world = deployed("chat", spec(), nodes=1)
    world.change_node("node-0", draining=True)
    world.run(20.0)
    assert world.serving("chat") == 1
    assert "node-0 is being drained" in world.deployment("chat").status.reason


def test_replicas_of_a_lost_node_are_replaced_after_the_grace_and_not_before() -> None:
    world = deployed("chat", spec(replicas=2), nodes=3)
    world.crash_node("nodes/node-0")
    world.run(15.0)
    assert [replica.status.state for replica in world.replicas("chat")].count(ReplicaState.LOST) == 1
    assert len(world.replicas("chat")) == 2
    world.run(25.0)
    assert {replica.node for replica in world.replicas("chat")} == {"nodes/node-1", "nodes/node-2"}
    assert world.serving("chat") == 2


def test_a_node_that_returns_after_its_replacement_is_not_counted_twice() -> None:
    world = deployed("chat", spec(replicas=2), nodes=3)
    world.cut("nodes/node-0")
    world.run(50.0)
    assert world.serving("chat") == 3
    world.heal("nodes/node-0")
    world.run(20.0)
    assert world.serving("chat") == 2
    assert world.settled()


def test_a_node_that_returns_before_its_replacement_is_ready_keeps_its_replicas() -> None:
    world = deployed("chat", spec(replicas=2), nodes=3)
    for agent in world.agents.values():
        agent.start_s = (60.0, 60.0)
    before = {replica.name for replica in world.replicas("chat")}
    world.cut("nodes/node-0")
    world.run(30.0)
    assert len(world.replicas("chat")) == 3
    world.heal("nodes/node-0")
    world.run(20.0)
    assert {replica.name for replica in world.replicas("chat")} == before
    assert world.serving("chat") == 2


def test_when_half_of_the_fleet_vanishes_at_once_nothing_is_replaced() -> None:
    world = deployed("chat", spec(replicas=6), nodes=6)
    for number in range(4):
        world.cut(f"nodes/node-{number}")
    world.run(120.0)
    assert len(world.replicas("chat")) == 6
    for number in range(4):
        world.heal(f"nodes/node-{number}")
    world.run(20.0)
    assert world.serving("chat") == 6
    assert "ReplicaRemoved" not in reasons(world)


def test_the_hold_after_a_mass_loss_times_out() -> None:
    world = deployed("chat", spec(replicas=6), nodes=6, gpus=4)
    for number in range(3):
        world.crash_node(f"nodes/node-{number}")
    world.run(700.0)
    assert {replica.node for replica in world.replicas("chat")} == {f"nodes/node-{number}" for number in (3, 4, 5)}
    assert world.serving("chat") == 6


def test_a_new_leader_calls_nobody_lost_before_agents_had_time_to_return() -> None:
    world = deployed("chat", spec(replicas=2))
    world.crash_leader()
    world.run(60.0)
    world.elect()
    world.run(30.0)
    assert "ReplicaLost" not in reasons(world)
    assert world.serving("chat") == 2


def test_a_deleted_deployment_drains_and_leaves_nothing() -> None:
    world = deployed("chat", spec(replicas=2))
    world.delete("chat")
    world.run(2.0)
    assert {replica.intent for replica in world.replicas("chat")} == {Intent.DRAIN}
    world.run(10.0)
    left = [name for name in world.store.values if "chat" in name]
    assert left == []
    assert world.running() == set()


def test_a_deployment_on_a_lost_node_can_be_deleted() -> None:
    world = deployed("chat", spec(), nodes=1)
    world.cut("nodes/node-0")
    world.delete("chat")
    world.run(40.0)
    assert [name for name in world.store.values if "chat" in name] == []
    world.heal("nodes/node-0")
    world.run(15.0)
    assert world.running() == set()


def test_a_name_may_be_used_again_and_its_replicas_are_others() -> None:
    world = deployed("chat", spec(), nodes=1, gpus=1)
    first = world.replicas("chat")[0].uid
    world.cut("nodes/node-0")
    world.delete("chat")
    world.run(40.0)
    world.deploy("chat", spec())
    world.heal("nodes/node-0")
    world.run(30.0)
    (replica,) = world.replicas("chat")
    assert replica.uid != first
    assert world.serving("chat") == 1


def test_the_deployment_of_the_lower_priority_number_gets_the_last_gpu() -> None:
    world = World(nodes=1, gpus=1)
    world.deploy("a", spec(priority=5))
    world.deploy("b", spec(priority=1))
    world.run(15.0)
    assert (world.serving("a"), world.serving("b")) == (0, 1)


def test_max_gpus_bounds_a_deployment() -> None:
    world = deployed("chat", spec(min=1, max=8, hardware=Hardware(max_gpus=2)))
    world.scale("chat", 8)
    world.run(20.0)
    assert world.serving("chat") == 2
    assert "max_gpus 2 is reached" in world.deployment("chat").status.reason


def test_a_replica_outside_the_allowed_clusters_is_moved() -> None:
    world = World(nodes=1)
    world.add_node("other", cluster="oslo")
    world.run(2.0)
    world.deploy("chat", spec())
    world.run(15.0)
    assert [replica.node for replica in world.replicas("chat")] == ["nodes/node-0"]
    world.deploy("chat", spec(hardware=Hardware(clusters=("oslo",))))
    world.run(25.0)
    assert [replica.node for replica in world.replicas("chat")] == ["nodes/other"]


def test_a_deleted_node_takes_its_replicas_and_assignment_with_it() -> None:
    world = deployed("chat", spec(), nodes=2)
    (replica,) = world.replicas("chat")
    world.crash_node(replica.node)
    del world.store.values[replica.node], world.store.revisions[replica.node]
    world.run(20.0)
    (successor,) = world.replicas("chat")
    assert successor.node not in {"", replica.node}
    assert replica.node.replace("nodes/", "assignments/") not in world.store.values


@pytest.mark.parametrize("size", [1, 2])
def test_a_slot_of_the_cpu_takes_one_replica_whatever_its_memory_says(size: int) -> None:
    world = World(nodes=1, gpus=1, gpu_type="CPU")
    world.run(2.0)
    world.deploy("chat", spec(configuration=tensor_parallel(size)))
    world.run(15.0)
    assert world.serving("chat") == (1 if size == 1 else 0)


def test_memory_that_others_hold_is_seen_and_named() -> None:
    world = World(nodes=1, gpus=1)
    world.agents["nodes/node-0"].foreign_bytes = 60 * GIB
    world.run(2.0)
    world.deploy("chat", spec())
    world.run(5.0)
    (replica,) = world.replicas("chat")
    assert "hold memory that is not enova's" in replica.status.reason


def test_a_node_with_engines_that_nobody_wants_takes_nothing_until_they_ended() -> None:
    world = World(nodes=1, gpus=1)
    agent = world.agents["nodes/node-0"]
    stranger = ReplicaReport(replica="deployments/x/replicas/v1-0", uid="old", state=ReplicaState.READY)
    agent.strangers = (stranger,)
    world.run(2.0)
    world.deploy("chat", spec())
    world.run(5.0)
    assert "still ends deployments/x/replicas/v1-0" in world.replicas("chat")[0].status.reason
    agent.strangers = ()
    world.run(10.0)
    assert world.serving("chat") == 1


def test_a_suspect_node_keeps_its_replicas_and_takes_no_new_ones() -> None:
    world = deployed("chat", spec(min=1, max=2), nodes=1)
    world.cut("nodes/node-0")
    world.scale("chat", 2)
    world.run(5.0)
    assert world.liveness.nodes["nodes/node-0"].state is NodeState.SUSPECT
    states = [replica.status.state for replica in world.replicas("chat")]
    assert states == [ReplicaState.READY, ReplicaState.PENDING]


def unreadable_plan(world: World, *names: str, without: str = "") -> list[str]:
    """The names of what would be written if some objects could not be read and one had never been."""
    snapshot = world.snapshot()
    fields = {
        field: {name: value for name, value in getattr(snapshot, field).items() if name != without}
        for field in ("deployments", "variants", "replicas", "nodes")
    }
    blind = replace(snapshot, unreadable=frozenset(names), **fields)  # type: ignore[arg-type]
    plan = reconcile(blind, now_s=2_000_000.0, limits=world.limits)
    return [write.name for change in plan.changes for write in change.writes]


@pytest.mark.parametrize(
    "name", ["deployments/chat", "deployments/chat/variants/v1", "deployments/chat/replicas/v1-0"]
)
def test_nothing_of_a_deployment_that_cannot_be_read_is_stopped_or_written(name: str) -> None:
    world = deployed("chat", spec(replicas=2))
    assert unreadable_plan(world, name, without=name) == []
    assert unreadable_plan(world, without=name) != [], "the same, but readable and truly gone"


def test_replicas_on_a_node_that_cannot_be_read_stay() -> None:
    world = deployed("chat", spec(replicas=2))
    node = world.replicas("chat")[0].node
    assert unreadable_plan(world, node, without=node) == []


def test_a_gpu_of_a_replica_that_cannot_be_read_is_given_to_nobody() -> None:
    world = deployed("chat", spec(), nodes=1, gpus=1)
    world.deploy("other", spec())
    snapshot = world.snapshot()
    blind = replace(snapshot, replicas={}, unreadable=frozenset({world.replicas("chat")[0].name}))
    plan = reconcile(blind, now_s=2_000_000.0, limits=world.limits)
    made = [write.value for change in plan.changes for write in change.writes if isinstance(write, Put)]
    assert [value.members for value in made if isinstance(value, Replica)] == [()]


def test_a_round_creates_and_places_a_bounded_number_and_the_next_goes_on() -> None:
    limits = ReconcileLimits(creates_per_round=4, places_per_round=3)
    world = World(nodes=4, gpus=8, limits=limits)
    world.run(1.0)
    world.deploy("a", spec(replicas=10))
    world.deploy("b", spec(replicas=10))
    world.run(1.0)
    assert len(world.replicas("a")) == len(world.replicas("b")) == 4
    assert sum(bool(replica.members) for replica in world.replicas()) == 3
    world.run(25.0)
    assert (world.serving("a"), world.serving("b")) == (10, 10)


def test_changes_of_many_objects_are_cut_so_that_each_fits_a_transaction() -> None:
    world = deployed("chat", spec(replicas=150), nodes=20, gpus=8)
    world.run(15.0)
    assert world.serving("chat") == 150
    world.delete("chat")
    plan = world.plan()
    assert [len(change.writes) for change in plan.changes] == [100, 51]
    assert sum(len(change.notes) for change in plan.changes) == 150
    world.run(15.0)
    assert world.replicas() == []


def test_an_old_replica_stays_until_every_ingress_has_the_new_one_or_a_while_passed() -> None:
    world = deployed("chat", spec())
    world.deploy("chat", spec("m-2"))
    world.routed = frozenset()
    world.run(18.0)
    assert world.serving("chat") == 2
    world.run(15.0)
    assert world.serving("chat") == 1
    assert [variant.model for variant in world.variants("chat")] == ["m-2"]


def test_an_old_replica_goes_at_once_when_every_ingress_has_the_new_one() -> None:
    world = deployed("chat", spec())
    world.deploy("chat", spec("m-2"))
    world.routed = frozenset()
    world.run(10.0)
    assert world.serving("chat") == 2
    world.routed = frozenset({"deployments/chat/replicas/v2-0"})
    world.run(1.0)
    assert [replica.intent for replica in world.replicas("chat")] == [Intent.DRAIN, Intent.RUN]
