"""The replica's machine: every (stage, event), and the rules of start, stop, hang and crash."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from enova_agent.core.events import (
    Action,
    Adopted,
    AnnounceRouting,
    CheckDrained,
    CollectEvidence,
    DrainDone,
    Event,
    EvidenceCollected,
    Exited,
    GenerateToken,
    HangConfirmed,
    HangHealed,
    HangSuspected,
    HealthOk,
    KillAll,
    KillDone,
    Phase,
    PhaseSeen,
    ProbeHealth,
    ProgressSeen,
    RemoveSharedMemory,
    Report,
    RestartWanted,
    RunWanted,
    SendTerm,
    Spawn,
    Spawned,
    SpawnFailed,
    StopWanted,
    Tick,
    TokenGenerated,
)
from enova_agent.core.failure import Cause, Fault
from enova_agent.core.machine import (
    TRANSITIONS,
    Goal,
    InvalidTransition,
    Limits,
    Machine,
    Stage,
    accepts,
    step,
)
from enova_agent.core.model import ReplicaState

LIMITS = Limits(start_stall_s=60.0, start_limit_s=600.0, term_timeout_s=10.0, start_term_timeout_s=3.0)
CRASH = Cause(fault=Fault.CRASHED, detail="ended with exit code 0, silently")
EVENTS: tuple[Event, ...] = (
    Tick(now_s=100.0),
    Spawned(now_s=100.0),
    SpawnFailed(now_s=100.0, cause=CRASH),
    Adopted(now_s=100.0, ready=True),
    PhaseSeen(now_s=100.0, phase=Phase.LOAD),
    ProgressSeen(now_s=100.0),
    HealthOk(),
    TokenGenerated(now_s=100.0),
    HangSuspected(reason="r"),
    HangHealed(),
    HangConfirmed(now_s=100.0, reason="r"),
    EvidenceCollected(now_s=100.0),
    Exited(now_s=100.0, cause=CRASH),
    StopWanted(now_s=100.0, drain_timeout_s=30.0),
    RunWanted(now_s=100.0),
    RestartWanted(now_s=100.0, drain_timeout_s=30.0),
    DrainDone(now_s=100.0),
    KillDone(now_s=100.0, draw=0.5),
)


def drive(machine: Machine, *events: Event) -> tuple[Machine, list[Action]]:
    """The machine after all events, and what the last one asked for."""
    actions: tuple[Action, ...] = ()
    for event in events:
        machine, actions = step(machine, event, LIMITS)
    return machine, list(actions)


def starting(now_s: float = 0.0) -> Machine:
    return drive(Machine(), Tick(now_s=now_s), Spawned(now_s=now_s))[0]


def ready(now_s: float = 0.0) -> Machine:
    return drive(starting(now_s), HealthOk(), TokenGenerated(now_s=now_s))[0]


def kinds(actions: list[Action]) -> list[type[Action]]:
    return [type(action) for action in actions if not isinstance(action, Report)]


def test_every_event_is_in_the_list_of_this_test() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(Event))
    assert set(TRANSITIONS) == set(Stage)


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_leads_where_the_table_says_or_is_refused_and_changes_nothing(stage: Stage, event: Event) -> None:
    machine = Machine(stage=stage, goal=Goal.STOP if stage in (Stage.TERMINATING, Stage.KILLING) else Goal.RUN)
    before = replace(machine)
    if type(event) in TRANSITIONS[stage]:
        after, _ = step(machine, event, LIMITS)
        assert after.stage in TRANSITIONS[stage][type(event)]
    else:
        assert not accepts(machine, event)
        with pytest.raises(InvalidTransition, match=type(event).__name__):
            step(machine, event, LIMITS)
    assert machine == before


def test_a_replica_is_ready_only_after_health_and_a_token() -> None:
    machine, actions = drive(Machine(), Tick(now_s=1.0))
    assert (machine.state, kinds(actions)) == (ReplicaState.STARTING, [Spawn])
    machine, actions = drive(machine, Spawned(now_s=1.0), Tick(now_s=2.0))
    assert kinds(actions) == [ProbeHealth]
    machine, actions = drive(machine, HealthOk())
    assert (machine.state, kinds(actions)) == (ReplicaState.STARTING, [GenerateToken])
    machine, actions = drive(machine, TokenGenerated(now_s=5.0))
    assert machine.state is ReplicaState.READY
    assert AnnounceRouting(on=True) in actions


def test_progress_extends_the_deadline_of_a_start_and_health_does_not() -> None:
    machine = starting(0.0)
    for now_s in (50.0, 100.0, 150.0):
        machine, actions = drive(machine, ProgressSeen(now_s=now_s), Tick(now_s=now_s + 59.0))
        assert kinds(actions) == [ProbeHealth]
    machine, actions = drive(machine, HealthOk(), Tick(now_s=210.0))
    assert machine.stage is Stage.COLLECTING
    assert CollectEvidence in kinds(actions)
    assert "no progress for 60 s" in machine.reason


def test_a_start_ends_at_its_limit_whatever_its_progress() -> None:
    machine, _ = drive(starting(0.0), ProgressSeen(now_s=599.0), Tick(now_s=600.0))
    assert machine.stage is Stage.COLLECTING
    assert "longer than 600 s" in machine.reason


def test_phases_of_a_start_are_stamped_and_reported() -> None:
    machine, actions = drive(
        starting(0.0), PhaseSeen(now_s=1.0, phase=Phase.LOAD), PhaseSeen(now_s=4.0, phase=Phase.WARM), HealthOk(),
        TokenGenerated(now_s=6.0),
    )
    assert dict(machine.phase_times_s) == {Phase.LOAD: 1.0, Phase.WARM: 4.0}
    report = next(action for action in actions if isinstance(action, Report))
    assert report.message == "ready after 6.0 s (load 3.0 s, warm 2.0 s)"


def test_stopping_goes_out_of_routing_drains_terminates_kills_and_cleans() -> None:
    machine, actions = drive(ready(), StopWanted(now_s=10.0, drain_timeout_s=30.0, reason="scaled in"))
    assert (machine.state, kinds(actions)) == (ReplicaState.DRAINING, [AnnounceRouting])
    assert not machine.routed
    assert kinds(drive(machine, Tick(now_s=10.1))[1]) == []  # ingresses must have heard of it first
    machine, actions = drive(machine, Tick(now_s=11.0))
    assert kinds(actions) == [CheckDrained]
    machine, actions = drive(machine, DrainDone(now_s=12.0))
    assert (machine.state, kinds(actions)) == (ReplicaState.STOPPING, [SendTerm])
    machine, actions = drive(machine, Exited(now_s=13.0, cause=CRASH))
    assert kinds(actions) == [KillAll]  # what the first process left behind
    machine, actions = drive(machine, KillDone(now_s=14.0, draw=0.0))
    assert (machine.state, kinds(actions)) == (ReplicaState.STOPPED, [RemoveSharedMemory])


def test_a_drain_ends_at_its_deadline() -> None:
    machine, _ = drive(ready(), StopWanted(now_s=10.0, drain_timeout_s=30.0))
    assert drive(machine, Tick(now_s=39.0))[0].stage is Stage.DRAINING
    assert kinds(drive(machine, Tick(now_s=40.0))[1]) == [SendTerm]


def test_an_engine_that_ignores_term_is_killed_at_its_deadline_and_until_nothing_is_left() -> None:
    machine, _ = drive(ready(), StopWanted(now_s=0.0, drain_timeout_s=30.0), DrainDone(now_s=1.0))
    assert drive(machine, Tick(now_s=10.9))[0].stage is Stage.TERMINATING
    machine, actions = drive(machine, Tick(now_s=11.0))
    assert kinds(actions) == [KillAll]
    machine, actions = drive(machine, Tick(now_s=11.6))
    assert kinds(actions) == [KillAll]


def test_any_exit_that_nobody_asked_for_is_a_failure_whatever_its_code() -> None:
    for machine in (starting(), ready()):
        after, actions = drive(machine, Exited(now_s=20.0, cause=CRASH))
        assert after.goal is Goal.RETRY
        assert KillAll in kinds(actions)
        after, actions = drive(after, KillDone(now_s=20.0, draw=0.0))
        assert after.state is ReplicaState.PENDING
        assert after.restarts == 1
        assert "exit code 0" in after.reason
        assert kinds(drive(after, Tick(now_s=20.5))[1]) == []
        assert kinds(drive(after, Tick(now_s=21.0))[1]) == [Spawn]


def test_a_suspect_leaves_routing_and_comes_back_when_it_heals() -> None:
    machine, actions = drive(ready(), HangSuspected(reason="no token"))
    assert machine.state is ReplicaState.READY
    assert AnnounceRouting(on=False) in actions
    machine, actions = drive(machine, HangHealed())
    assert machine.stage is Stage.READY
    assert machine.routed
    assert AnnounceRouting(on=True) in actions


def test_a_hung_engine_leaves_evidence_before_it_is_killed_and_is_started_again() -> None:
    machine, actions = drive(ready(), HangSuspected(reason="r"), HangConfirmed(now_s=10.0, reason="no token"))
    assert CollectEvidence(reason="no token") in actions
    assert KillAll not in kinds(actions)
    machine, actions = drive(machine, EvidenceCollected(now_s=11.0))
    assert kinds(actions) == [KillAll]
    machine, _ = drive(machine, KillDone(now_s=12.0, draw=0.0))
    assert machine.state is ReplicaState.PENDING
    assert "no token" in machine.reason


def test_evidence_that_takes_too_long_does_not_hold_the_restart_up() -> None:
    machine, _ = drive(ready(), HangSuspected(reason="r"), HangConfirmed(now_s=10.0, reason="r"))
    assert kinds(drive(machine, Tick(now_s=15.0))[1]) == [KillAll]


def test_a_start_does_not_begin_while_something_forbids_it_and_says_what() -> None:
    machine, actions = drive(Machine(), Tick(now_s=1.0, blocked_by="waits for GPU-1"))
    assert (machine.state, machine.reason, actions) == (ReplicaState.PENDING, "waits for GPU-1", [])


def test_a_stop_during_the_spawn_ends_the_engine_as_soon_as_it_exists() -> None:
    machine, _ = drive(Machine(), Tick(now_s=1.0), StopWanted(now_s=1.0, drain_timeout_s=30.0))
    machine, actions = drive(machine, Spawned(now_s=1.5))
    assert (machine.stage, kinds(actions)) == (Stage.TERMINATING, [SendTerm])


def test_a_drain_that_is_taken_back_serves_again() -> None:
    machine, actions = drive(ready(), StopWanted(now_s=1.0, drain_timeout_s=30.0), RunWanted(now_s=2.0))
    assert (machine.stage, machine.goal, kinds(actions)) == (Stage.READY, Goal.RUN, [AnnounceRouting])


def test_a_stop_that_is_taken_back_after_term_starts_anew() -> None:
    machine, _ = drive(
        ready(), StopWanted(now_s=1.0, drain_timeout_s=30.0), DrainDone(now_s=2.0), RunWanted(now_s=3.0),
        Exited(now_s=4.0, cause=CRASH), KillDone(now_s=5.0, draw=0.0),
    )
    assert machine.state is ReplicaState.PENDING
    assert kinds(drive(machine, Tick(now_s=5.0))[1]) == [Spawn]


def test_a_restart_on_request_drains_and_counts_as_no_failure() -> None:
    machine, _ = drive(ready(), RestartWanted(now_s=1.0, drain_timeout_s=30.0))
    assert machine.state is ReplicaState.DRAINING
    machine, _ = drive(machine, DrainDone(now_s=2.0), Exited(now_s=3.0, cause=CRASH), KillDone(now_s=4.0, draw=0.0))
    assert (machine.state, machine.restarts, machine.history.times_s) == (ReplicaState.PENDING, 1, ())


def test_a_replica_that_gave_up_starts_again_only_on_request() -> None:
    wrong = Cause(fault=Fault.ARGUMENT, detail="unrecognized arguments: --x")
    machine, _ = drive(starting(), Exited(now_s=1.0, cause=wrong), KillDone(now_s=2.0, draw=0.0))
    assert (machine.state, machine.gave_up) == (ReplicaState.FAILED, True)
    assert "--x" in machine.reason
    assert kinds(drive(machine, Tick(now_s=1e6))[1]) == []
    machine, _ = drive(machine, RestartWanted(now_s=3.0, drain_timeout_s=0.0))
    assert kinds(drive(machine, Tick(now_s=3.0))[1]) == [Spawn]


def test_an_adopted_engine_that_was_ready_is_routed_at_once() -> None:
    machine, actions = drive(Machine(), Adopted(now_s=1.0, ready=True))
    assert machine.stage is Stage.READY
    assert AnnounceRouting(on=True) in actions


def test_an_adopted_engine_that_was_starting_must_prove_itself() -> None:
    machine, _ = drive(Machine(), Adopted(now_s=1.0, ready=False))
    assert (machine.stage, machine.routed) == (Stage.STARTING, False)


def test_an_adopted_engine_that_was_stopping_goes_on_draining() -> None:
    machine, _ = drive(Machine(), Adopted(now_s=1.0, ready=True, stopping=True, drain_timeout_s=5.0))
    assert (machine.stage, machine.goal, machine.routed) == (Stage.DRAINING, Goal.STOP, False)
    assert drive(machine, Tick(now_s=6.0))[0].stage is Stage.TERMINATING
