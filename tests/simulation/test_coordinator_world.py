"""The coordinator's core with model agents under random faults: invariants at every step, convergence at the end."""

from __future__ import annotations

import random

import pytest

from enova_coordinator.core.model import DeploymentSpec, DeploymentState, Hardware, ReplicaState
from enova_testing.world import World

SEEDS = 200
CONVERGE_S = 180.0


def random_spec(draw: random.Random) -> DeploymentSpec:
    configuration = {"tensor_parallel_size": draw.choice([1, 1, 2]), "max_num_seqs": draw.choice([64, 128])}
    hardware = Hardware(max_gpus=draw.choice([None, None, 4]))
    return DeploymentSpec(
        model=draw.choice(["m-1", "m-2"]), min=draw.choice([0, 1]), max=draw.choice([2, 4]),
        configuration=configuration, hardware=hardware, priority=draw.randrange(3),
    )


def act(world: World, draw: random.Random) -> None:
    """One thing that a user does or that breaks."""
    names = sorted(name for name in world.store.values if name.count("/") == 1 and name.startswith("deployments/"))
    node = draw.choice(sorted(world.agents))
    agent = world.agents[node]
    chosen = draw.randrange(12)
    if chosen <= 2:
        name = f"d{draw.randrange(3)}"
        before = world.store.values.get(f"deployments/{name}")
        if before is None or not world.deployment(name).deleting:
            world.deploy(name, random_spec(draw))
    elif chosen == 3 and names:
        world.delete(draw.choice(names).removeprefix("deployments/"))
    elif chosen in {4, 5} and names:
        name = draw.choice(names).removeprefix("deployments/")
        if not world.deployment(name).deleting:
            world.scale(name, draw.randrange(5))
    elif chosen == 6:
        world.heal(node) if agent.cut else world.cut(node)
    elif chosen == 7:
        world.crash_node(node) if agent.up else world.boot_node(node)
    elif chosen == 8:
        world.break_stream(node)
    elif chosen == 9:
        world.elect() if not world.leading else world.crash_leader()
    elif chosen == 10:
        world.change_node(node.removeprefix("nodes/"), draining=draw.random() < 0.5)
    elif chosen == 11:
        agent.failure_rate = draw.choice([0.0, 0.3])


def end_faults(world: World) -> None:
    if not world.leading:
        world.elect()
    world.refuse_rate = 0.0
    for name, agent in world.agents.items():
        agent.failure_rate = 0.0
        world.change_node(name.removeprefix("nodes/"), draining=False)
        if agent.cut:
            world.heal(name)
        if not agent.up:
            world.boot_node(name)


def check_converged(world: World) -> None:
    plan = world.plan()
    assert not plan.changes, plan
    assert world.running() == {replica.name for replica in world.replicas() if replica.members}
    for name in [name for name in world.store.values if name.startswith("deployments/") and name.count("/") == 1]:
        deployment = world.deployment(name.removeprefix("deployments/"))
        assert not deployment.deleting
        if deployment.status.state is DeploymentState.READY:
            assert world.serving(deployment.id) == deployment.status.target_replicas
        else:
            pending = [r for r in world.replicas(deployment.id) if r.status.state is ReplicaState.PENDING]
            assert pending, deployment.status
            assert all(replica.status.reason for replica in pending)


@pytest.mark.parametrize("first_seed", range(0, SEEDS, 20))
def test_whatever_breaks_no_gpu_has_two_engines_and_all_converges_afterwards(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 20):
        draw = random.Random(seed)
        delay_s = (0.0, draw.choice([0.1, 2.0]))
        world = World(seed, nodes=draw.randrange(1, 5), gpus=draw.choice([1, 2, 4]), delay_s=delay_s)
        world.refuse_rate = draw.choice([0.0, 0.2])
        try:
            for _ in range(draw.randrange(5, 25)):
                act(world, draw)
                world.run(draw.choice([1.0, 3.0, 10.0]))
            end_faults(world)
            end_s = world.now_s + CONVERGE_S
            while not world.settled():
                assert world.now_s < end_s, [str(replica.status) for replica in world.replicas()]
                world.run(2.0)
            check_converged(world)
        except AssertionError as error:
            raise AssertionError(f"seed {seed} at {world.now_s} s: {error}") from error
