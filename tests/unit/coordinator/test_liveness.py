"""READY, SUSPECT, LOST, and when silence proves nothing."""

from __future__ import annotations

from enova_coordinator.core.liveness import Liveness, LivenessLimits, observe
from enova_coordinator.core.model import NodeObservation, NodeState

LIMITS = LivenessLimits(takeover_grace_s=15.0)


def heard(at_s: float, *names: str, connected: bool = True) -> dict[str, NodeObservation]:
    return {name: NodeObservation(node=name, connected=connected, last_heard_s=at_s) for name in names}


def look(
    before: Liveness, observations: dict[str, NodeObservation], now_s: float, *, lag_s: float = 0.0,
    names: tuple[str, ...] = ("a",),
) -> Liveness:
    return observe(before, names, observations, now_s=now_s, loop_lag_s=lag_s, limits=LIMITS)


def old_leader() -> Liveness:
    return Liveness(started_s=-1000.0)


def test_silence_makes_a_node_suspect_then_lost() -> None:
    liveness, states = old_leader(), []
    for now_s in (1.0, 3.0, 3.5, 10.0, 10.5):
        liveness = look(liveness, heard(0.0, "a"), now_s)
        states.append(liveness.nodes["a"].state)
    assert states == [NodeState.READY, NodeState.READY, NodeState.SUSPECT, NodeState.SUSPECT, NodeState.LOST]


def test_a_broken_stream_is_suspect_at_once() -> None:
    liveness = look(old_leader(), heard(0.9, "a", connected=False), 1.0)
    assert liveness.nodes["a"].state is NodeState.SUSPECT
    assert liveness.nodes["a"].reason == "its agent is not connected"


def test_a_lost_node_stays_lost_until_it_is_heard_again_on_a_stream() -> None:
    liveness = look(old_leader(), heard(0.0, "a"), 11.0)
    liveness = look(liveness, heard(11.5, "a", connected=False), 12.0)
    assert liveness.nodes["a"].state is NodeState.LOST
    liveness = look(liveness, heard(12.5, "a"), 13.0)
    assert liveness.nodes["a"].state is NodeState.READY
    assert liveness.nodes["a"].since_s == 13.0


def test_no_node_is_lost_while_our_own_loop_lags_or_has_just_lagged() -> None:
    liveness = look(old_leader(), heard(0.0, "a"), 20.0, lag_s=5.0)
    assert liveness.nodes["a"].state is NodeState.SUSPECT
    liveness = look(liveness, heard(0.0, "a"), 22.0)
    assert liveness.nodes["a"].state is NodeState.SUSPECT
    liveness = look(liveness, heard(0.0, "a"), 23.0)
    assert liveness.nodes["a"].state is NodeState.LOST


def test_a_new_leader_gives_agents_time_to_connect() -> None:
    liveness = look(Liveness(started_s=0.0), {}, 14.0)
    assert liveness.nodes["a"].state is NodeState.SUSPECT
    assert look(liveness, {}, 15.0).nodes["a"].state is NodeState.LOST


def test_losses_below_half_of_the_fleet_are_not_held() -> None:
    names = tuple("abcdefgh")
    liveness = look(old_leader(), heard(20.0, *names[3:]) | heard(0.0, *names[:3]), 20.0, names=names)
    assert liveness.replacement_held == ""


def test_two_nodes_are_not_a_mass() -> None:
    liveness = look(old_leader(), heard(0.0, "a", "b"), 20.0, names=("a", "b"))
    assert liveness.replacement_held == ""


def test_half_of_the_fleet_lost_within_a_minute_is_held_until_most_return() -> None:
    names = tuple("abcdef")
    liveness = look(old_leader(), heard(20.0, *"def") | heard(0.0, *"abc"), 20.0, names=names)
    assert liveness.replacement_held.startswith("3 of 6 nodes vanished together")
    liveness = look(liveness, heard(30.0, *"cdef") | heard(0.0, *"ab"), 30.0, names=names)
    assert liveness.replacement_held == ""
    assert liveness.nodes["a"].since_s == 30.0, "the grace of the others begins anew"


def test_losses_that_are_a_minute_apart_are_not_one() -> None:
    names = tuple("abcdef")
    liveness = old_leader()
    for number, now_s in enumerate((20.0, 90.0, 160.0), start=1):
        lost = names[:number]
        liveness = look(liveness, heard(now_s, *names[number:]) | heard(0.0, *lost), now_s, names=names)
        assert liveness.replacement_held == ""


def test_a_hold_times_out_and_does_not_begin_again_for_the_same_nodes() -> None:
    names = tuple("abcd")
    liveness = look(old_leader(), heard(0.0, *names), 20.0, names=names)
    assert liveness.replacement_held
    liveness = look(liveness, heard(0.0, *names), 620.0, names=names)
    assert liveness.replacement_held
    for now_s in (620.5, 621.0, 700.0):
        liveness = look(liveness, heard(0.0, *names), now_s, names=names)
        assert liveness.replacement_held == ""
