"""Where GPUs are short the less urgent deployment gives way: one replica at a time, never below its minimum."""

from __future__ import annotations

from dataclasses import replace

import pytest

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
    NodeState,
    NodeView,
    Replica,
    ReplicaStatus,
    Snapshot,
    Variant,
)
from enova_coordinator.core.precedence import WAITED_S, yielding

NOW_S = 1_000.0


def deployment(name: str, *, priority: int, target: int, **spec: object) -> Deployment:
    fields: dict[str, object] = {"model": "m", "min": 1, "max": 8, "priority": priority} | spec
    return Deployment(
        name=f"deployments/{name}",
        uid=name,
        spec=DeploymentSpec(**fields),  # type: ignore[arg-type]
        status=DeploymentStatus(target_replicas=target),
    )


def replica(owner: str, number: int, *gpus: str, waited_s: float = 60.0) -> Replica:
    return Replica(
        name=f"deployments/{owner}/replicas/{number}",
        uid=f"{owner}{number}",
        deployment=f"deployments/{owner}",
        variant=f"deployments/{owner}/variants/v",
        members=(Member(node="nodes/n", claims=tuple(Claim(gpu_uuid=gpu) for gpu in gpus)),) if gpus else (),
        create_time_s=NOW_S - waited_s,
        status=ReplicaStatus(reason="no node has a free GPU"),
    )


def fleet(*deployments: Deployment, replicas: tuple[Replica, ...], gpus: int = 4, size: int = 1) -> Snapshot:
    view = NodeView(
        node=Node(name="nodes/n", uid="n"),
        state=NodeState.READY,
    )
    view = replace(view, node=replace(view.node, gpus=tuple(Gpu(uuid=f"g{i}", type="H100") for i in range(gpus))))
    return Snapshot(
        deployments={each.name: each for each in deployments},
        variants={
            f"{each.name}/variants/v": Variant(
                name=f"{each.name}/variants/v", deployment=each.name, model="m", served_names=(),
                gpu_type="H100", configuration={"tensor_parallel_size": size},
            )
            for each in deployments
        },
        replicas={each.name: each for each in replicas},
        nodes={"nodes/n": view},
    )


URGENT = deployment("urgent", priority=0, target=2)
BATCH = deployment("batch", priority=10, target=3)
HELD = (replica("urgent", 0, "g0"), *(replica("batch", i, f"g{i + 1}") for i in range(3)))
WAITING = replica("urgent", 1)


def test_the_less_urgent_lets_one_replica_go() -> None:
    step = yielding(fleet(URGENT, BATCH, replicas=(*HELD, WAITING)), now_s=NOW_S)
    assert step is not None
    assert (step.deployment, step.to_replicas) == ("deployments/batch", 2)
    assert "urgent" in step.reason


@pytest.mark.parametrize(
    "why_not",
    [
        fleet(URGENT, BATCH, replicas=HELD),                                              # nobody waits
        fleet(URGENT, BATCH, replicas=(*HELD, replica("urgent", 1, waited_s=WAITED_S / 2))),  # not for long
        fleet(URGENT, replace(BATCH, status=DeploymentStatus(target_replicas=1)), replicas=(*HELD, WAITING)),
        fleet(deployment("urgent", priority=10, target=2), BATCH, replicas=(*HELD, WAITING)),  # equals
        fleet(URGENT, deployment("batch", priority=10, target=3, min=None, max=None, replicas=3),
              replicas=(*HELD, WAITING)),                                                 # a fixed number
        fleet(URGENT, deployment("batch", priority=10, target=3, autoscaling_paused=True), replicas=(*HELD, WAITING)),
        fleet(deployment("urgent", priority=0, target=2, hardware=Hardware(clusters=("far",))), BATCH,
              replicas=(*HELD, WAITING)),                                                 # its GPUs would not help
        fleet(URGENT, BATCH, replicas=(*HELD, WAITING), size=2),                          # one GPU is not enough
        fleet(URGENT, BATCH, replicas=(HELD[0], replace(HELD[1], intent=Intent.DRAIN), *HELD[2:], WAITING)),
    ],
)
def test_nobody_gives_way_for_nothing(why_not: Snapshot) -> None:
    assert yielding(why_not, now_s=NOW_S) is None


def test_the_least_urgent_goes_first_and_among_equals_who_has_most_over_its_minimum() -> None:
    small = deployment("small", priority=20, target=2)
    large = deployment("large", priority=20, target=3)
    held = (
        *(replica("small", i, f"g{i}") for i in range(2)),
        *(replica("large", i, f"g{i + 2}") for i in range(3)),
        *(replica("batch", i, f"g{i + 5}") for i in range(3)),
    )
    step = yielding(fleet(URGENT, BATCH, small, large, replicas=(*held, WAITING), gpus=8), now_s=NOW_S)
    assert step is not None
    assert step.deployment == "deployments/large"
