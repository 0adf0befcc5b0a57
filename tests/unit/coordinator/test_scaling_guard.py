"""Which proposals become acts: bounds, pauses, one action in flight, the cool-down; what is held says why."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from enova_coordinator.core.model import (
    DecisionAction,
    Deployment,
    DeploymentSpec,
    DeploymentStatus,
    Intent,
    Member,
    Replica,
    ReplicaState,
    ReplicaStatus,
)
from enova_coordinator.core.scaling_guard import Guard, History, Ruling, rule, rule_wish
from enova_recommender.scaling.situation import Wish
from enova_recommender.scaling.types import Action, EngineSizes, Proposal, VerdictKind

NOW_S = 10_000.0
SIZES = EngineSizes(tensor_parallel_size=1, gpu_memory_utilization=0.9, max_num_seqs=256)


def deployment(*, target: int = 2, **spec: object) -> Deployment:
    fields: dict[str, object] = {"model": "m", "min": 1, "max": 4} | spec
    return Deployment(
        name="deployments/d",
        uid="u",
        spec=DeploymentSpec(**fields),  # type: ignore[arg-type]
        status=DeploymentStatus(target_replicas=target),
    )


def replicas(*states: ReplicaState, placed: bool = True) -> tuple[Replica, ...]:
    return tuple(
        Replica(
            name=f"deployments/d/replicas/r{index}",
            uid=f"r{index}",
            deployment="deployments/d",
            variant="deployments/d/variants/v",
            members=(Member(node="nodes/n"),) if placed else (),
            status=ReplicaStatus(state=state, reason="no node has a free GPU"),
        )
        for index, state in enumerate(states)
    )


READY_PAIR = replicas(ReplicaState.READY, ReplicaState.READY)


def proposal(action: Action = Action.SCALE_UP, wanted: int = 3, sizes: EngineSizes = SIZES) -> Proposal:
    return Proposal(
        verdict=VerdictKind.OVERLOADED, action=action, replicas=wanted, configuration=sizes, reason="requests pend"
    )


def ruled(
    wish: Proposal,
    wanted: Deployment | None = None,
    present: tuple[Replica, ...] = READY_PAIR,
    *,
    last_act_s: float = -math.inf,
) -> Ruling | None:
    return rule(
        wish,
        wanted or deployment(),
        present,
        history=History(last_act_s=last_act_s),
        now_s=NOW_S,
        cooldown_s=60.0,
        gpus_per_node=8,
    )


def test_a_free_proposal_becomes_an_act() -> None:
    ruling = ruled(proposal())
    assert ruling == Ruling(action=DecisionAction.SCALE_UP, to_replicas=3, reason="requests pend")


def test_no_wish_is_no_ruling() -> None:
    assert ruled(proposal(Action.KEEP, 2)) is None


def test_a_wish_beyond_the_bounds_is_cut_and_says_so() -> None:
    ruling = ruled(proposal(wanted=9))
    assert ruling is not None
    assert (ruling.action, ruling.to_replicas) == (DecisionAction.SCALE_UP, 4)
    assert "max 4" in ruling.reason


@pytest.mark.parametrize(
    ("wish", "wanted", "present", "last_act_s", "guard"),
    [
        (proposal(wanted=9), deployment(target=4), replicas(*[ReplicaState.READY] * 4), -math.inf, Guard.BOUNDS),
        (proposal(Action.SCALE_DOWN, 0), deployment(target=1, min=0), replicas(ReplicaState.READY), 0.0, Guard.BOUNDS),
        (proposal(), deployment(autoscaling_paused=True), READY_PAIR, -math.inf, Guard.PAUSED),
        (proposal(), deployment(min=None, max=None, replicas=2), READY_PAIR, -math.inf, Guard.FIXED),
        (proposal(), None, replicas(ReplicaState.READY, ReplicaState.STARTING), -math.inf, Guard.IN_FLIGHT),
        (proposal(Action.SCALE_DOWN, 1), None, replicas(ReplicaState.READY), -math.inf, Guard.IN_FLIGHT),
        (proposal(), None, replicas(ReplicaState.PENDING, placed=False), -math.inf, Guard.NO_GPU),
        (proposal(), None, READY_PAIR, NOW_S - 59, Guard.COOLDOWN),
        (
            proposal(Action.RECONFIGURE, 2, replace(SIZES, tensor_parallel_size=16)),
            None,
            READY_PAIR,
            -math.inf,
            Guard.NOT_APPLICABLE,
        ),
        (
            proposal(Action.RECONFIGURE, 2, replace(SIZES, tensor_parallel_size=0)),
            None,
            READY_PAIR,
            -math.inf,
            Guard.NOT_APPLICABLE,
        ),
    ],
)
def test_what_is_forbidden_is_held_with_its_rule(
    wish: Proposal, wanted: Deployment | None, present: tuple[Replica, ...], last_act_s: float, guard: Guard
) -> None:
    ruling = ruled(wish, wanted, present, last_act_s=last_act_s)
    assert ruling is not None
    assert (ruling.action, ruling.guard) == (DecisionAction.HOLD, guard)
    assert ruling.to_replicas == (wanted or deployment()).status.target_replicas
    assert "held:" in ruling.reason


def test_the_cool_down_ends() -> None:
    ruling = ruled(proposal(), last_act_s=NOW_S - 60)
    assert ruling is not None
    assert ruling.action is DecisionAction.SCALE_UP


def test_replicas_on_their_way_out_are_not_in_flight() -> None:
    leaving = replace(replicas(ReplicaState.DRAINING)[0], name="deployments/d/replicas/old", intent=Intent.DRAIN)
    ruling = ruled(proposal(), present=(*READY_PAIR, leaving))
    assert ruling is not None
    assert ruling.action is DecisionAction.SCALE_UP


def test_a_new_tensor_parallel_size_is_an_act_without_more_replicas() -> None:
    ruling = ruled(proposal(Action.RECONFIGURE, 2, replace(SIZES, tensor_parallel_size=2)))
    assert ruling is not None
    assert (ruling.action, ruling.to_replicas) == (DecisionAction.RECONFIGURE, 2)


def test_a_dead_replica_holds_nothing_up_and_is_no_replica_in_flight() -> None:
    one_down = replicas(ReplicaState.READY, ReplicaState.FAILED)
    held = ruled(proposal(), present=one_down)
    assert held is not None
    assert held.guard is Guard.IN_FLIGHT
    free = rule(
        proposal(), deployment(), one_down, history=History(last_act_s=-math.inf), now_s=NOW_S, cooldown_s=60.0,
        gpus_per_node=8, dead=frozenset({one_down[1].name}),
    )  # fmt: skip
    assert free == Ruling(action=DecisionAction.SCALE_UP, to_replicas=3, reason="requests pend")


@pytest.mark.parametrize(("wanted", "named"), [(1, ("r2", "r0")), (2, ("r2",)), (4, ())])
def test_of_those_whom_a_wish_names_as_many_are_passed_on_as_leave(wanted: int, named: tuple[str, ...]) -> None:
    wish = Wish(
        action=Action.SCALE_UP if wanted > 3 else Action.SCALE_DOWN, targets={"v": wanted},
        verdict=VerdictKind.UNDERUSED, reason="little is asked for", remove_first=("r2", "r0", "r1"),
    )  # fmt: skip
    ruling = rule_wish(wish, deployment(target=3), replicas(*[ReplicaState.READY] * 3))
    assert ruling is not None
    assert (ruling.to_replicas, ruling.leave_first) == (wanted, named)
