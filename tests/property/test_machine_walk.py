"""Whatever happens, in whatever order: the rules that every walk through the machine keeps."""

from __future__ import annotations

from dataclasses import fields, replace

from hypothesis import given
from hypothesis import strategies as st

from enova_agent.core.events import (
    Action,
    Adopted,
    AnnounceRouting,
    CollectEvidence,
    DrainDone,
    Event,
    EvidenceCollected,
    Exited,
    HangConfirmed,
    HangHealed,
    HangSuspected,
    HealthOk,
    KillAll,
    KillDone,
    Phase,
    PhaseSeen,
    ProgressSeen,
    RemoveSharedMemory,
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
from enova_agent.core.machine import Goal, Limits, Machine, Stage, accepts, step
from enova_testing.examples import examples

LIMITS = Limits()
_CAUSES = st.sampled_from(list(Fault)).map(lambda fault: Cause(fault=fault, detail=fault.value))
_BOOM = Cause(fault=Fault.CRASHED, detail="boom")
_EVENTS: tuple[Event, ...] = (
    Tick(now_s=0.0),
    Tick(now_s=0.0, blocked_by="a GPU"),
    Spawned(now_s=0.0),
    SpawnFailed(now_s=0.0, cause=_BOOM),
    Adopted(now_s=0.0, ready=True),
    PhaseSeen(now_s=0.0, phase=Phase.LOAD),
    ProgressSeen(now_s=0.0),
    HealthOk(),
    TokenGenerated(now_s=0.0),
    HangSuspected(reason="r"),
    HangHealed(),
    HangConfirmed(now_s=0.0, reason="r"),
    EvidenceCollected(now_s=0.0),
    Exited(now_s=0.0, cause=_BOOM),
    StopWanted(now_s=0.0, drain_timeout_s=30.0),
    RunWanted(now_s=0.0),
    RestartWanted(now_s=0.0, drain_timeout_s=30.0),
    DrainDone(now_s=0.0),
    KillDone(now_s=0.0, draw=0.5),
)
_STEPS = st.lists(st.tuples(st.floats(0.0, 400.0), st.sampled_from(_EVENTS), _CAUSES), max_size=60)


def at(event: Event, now_s: float, cause: Cause) -> Event:
    """The event as it happens at `now_s`, for `cause` if it has one."""
    names = {field.name for field in fields(event)}
    values = {"now_s": now_s, "cause": cause}
    return replace(event, **{name: value for name, value in values.items() if name in names})  # type: ignore[arg-type]


@examples()  # a loaded machine is slow, not wrong
@given(_STEPS)
def test_a_walk_never_spawns_beside_a_living_run_and_announces_routing_truly(
    steps: list[tuple[float, Event, Cause]],
) -> None:
    machine, now_s = Machine(), 0.0
    alive = False                  # processes of a run may exist
    told = False                   # what routing was last told
    for delay_s, template, cause in steps:
        now_s += delay_s
        event = at(template, now_s, cause)
        if not accepts(machine, event):
            continue
        before = machine
        machine, actions = step(machine, event, LIMITS)
        if isinstance(event, Adopted):
            alive = True
        if isinstance(event, KillDone):
            alive = False
            assert any(isinstance(action, RemoveSharedMemory) for action in actions)
        for action in actions:
            told = action.on if isinstance(action, AnnounceRouting) else told
            _check(action, before, alive=alive)
            alive = alive or isinstance(action, Spawn)
        assert machine.routed == told
        assert not machine.routed or machine.stage is Stage.READY
        assert machine.holds_processes or not alive
        assert machine.goal is not Goal.STOP or machine.stage not in (Stage.READY, Stage.STARTING, Stage.WAITING)


def _check(action: Action, before: Machine, *, alive: bool) -> None:
    if isinstance(action, Spawn):
        assert not alive, "a new run beside an old one"
    if isinstance(action, SendTerm):
        assert not before.routed, "out of routing comes before SIGTERM"
    if isinstance(action, CollectEvidence | KillAll):
        assert alive or before.stage in (Stage.SPAWNING, Stage.WAITING, Stage.KILLING)


@examples()
@given(_STEPS)
def test_whatever_happened_a_stop_ends_with_nothing_left(steps: list[tuple[float, Event, Cause]]) -> None:
    machine, now_s = Machine(), 0.0
    for delay_s, template, cause in steps:
        now_s += delay_s
        event = at(template, now_s, cause)
        if accepts(machine, event):
            machine, _ = step(machine, event, LIMITS)
    machine, actions = step(machine, StopWanted(now_s=now_s, drain_timeout_s=30.0), LIMITS)
    pending = list(actions)
    for _ in range(200):           # the world answers what it is asked, or lets deadlines pass
        if machine.stage is Stage.STOPPED:
            break
        now_s += 1.0
        answer: Event = Tick(now_s=now_s)
        if machine.stage is Stage.SPAWNING:
            answer = Spawned(now_s=now_s)
        elif any(isinstance(action, KillAll) for action in pending):
            answer = KillDone(now_s=now_s, draw=0.0)
        machine, actions = step(machine, answer, LIMITS)
        pending = list(actions)
    assert machine.stage is Stage.STOPPED


@examples()
@given(st.lists(st.floats(0.0, 1.0, exclude_max=True), min_size=1, max_size=40), _CAUSES)
def test_a_crash_loop_restarts_eight_times_in_ten_minutes_at_most(draws: list[float], cause: Cause) -> None:
    machine, now_s, spawns = Machine(), 0.0, []
    for draw in draws:
        for event in (Tick(now_s=now_s), Spawned(now_s=now_s), Exited(now_s=now_s, cause=cause)):
            if accepts(machine, event):
                machine, actions = step(machine, event, LIMITS)
                spawns += [now_s for action in actions if isinstance(action, Spawn)]
        if machine.stage is Stage.KILLING:
            machine, _ = step(machine, KillDone(now_s=now_s, draw=draw), LIMITS)
        now_s = max(now_s, machine.spawn_at_s)
    assert all(sum(start <= other < start + 600.0 for other in spawns) <= 9 for start in spawns)
