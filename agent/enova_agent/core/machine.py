"""One replica's life as a state machine: what happened goes in, what to do comes out.

Theory of operation. A `Machine` is a frozen value; `step(machine, event, limits)` is the only door and returns
the next machine and the actions for the shell (`enova_agent.replica`) to carry out; each result of an action
is again an event. `TRANSITIONS` says which events a stage understands and where they may lead; anything else
raises InvalidTransition and, values being frozen, changes nothing. Results that come late (a probe's answer
after the engine was told to stop) are such events: the shell asks `accepts` first and drops them.

A run of the engine ends in KILLING, whatever ended it: there every process that is left is killed, shared
memory is removed, and `goal` says what follows: STOP, RESTART (asked for) or RETRY (it failed; the restart
policy answers). So nothing of an old run can live beside a new one.

Times are monotonic seconds given from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from types import MappingProxyType
from typing import Any, assert_never

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
from enova_agent.core.model import ReplicaState
from enova_agent.core.phases import later
from enova_agent.core.restart import GiveUp, RestartHistory, RestartPolicy, Retry, decide


class Stage(StrEnum):
    """Where a replica is; finer than the states that the API shows."""

    WAITING = "WAITING"            # for its time to be started
    SPAWNING = "SPAWNING"
    STARTING = "STARTING"          # its process runs, it does not serve yet
    READY = "READY"
    SUSPECT = "SUSPECT"            # ready but without progress: out of routing
    COLLECTING = "COLLECTING"      # hung: evidence is being kept before it is killed
    DRAINING = "DRAINING"
    TERMINATING = "TERMINATING"
    KILLING = "KILLING"
    STOPPED = "STOPPED"
    FAILED = "FAILED"


class Goal(StrEnum):
    """What follows when the present run of the engine has ended."""

    RUN = "RUN"                    # nobody wants it to end
    STOP = "STOP"
    RESTART = "RESTART"
    RETRY = "RETRY"


_STATES: Mapping[Stage, ReplicaState] = MappingProxyType(
    {
        Stage.WAITING: ReplicaState.PENDING,
        Stage.SPAWNING: ReplicaState.STARTING,
        Stage.STARTING: ReplicaState.STARTING,
        Stage.READY: ReplicaState.READY,
        Stage.SUSPECT: ReplicaState.READY,
        Stage.COLLECTING: ReplicaState.STOPPING,
        Stage.DRAINING: ReplicaState.DRAINING,
        Stage.TERMINATING: ReplicaState.STOPPING,
        Stage.KILLING: ReplicaState.STOPPING,
        Stage.STOPPED: ReplicaState.STOPPED,
        Stage.FAILED: ReplicaState.FAILED,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The deadlines of a replica's life, in real seconds."""

    start_stall_s: float = 300.0   # a start without any sign of progress
    start_limit_s: float = 7200.0  # a start altogether, whatever its progress
    drain_settle_s: float = 0.5    # out of routing for so long before "nothing runs" is believed
    term_timeout_s: float = 10.0   # from SIGTERM to SIGKILL once nothing runs
    start_term_timeout_s: float = 3.0  # the same during a start: nothing can be lost
    evidence_timeout_s: float = 5.0
    kill_interval_s: float = 0.5
    restart: RestartPolicy = field(default_factory=RestartPolicy)


# --- state ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Everything the decisions about one replica depend on."""

    stage: Stage = Stage.WAITING
    goal: Goal = Goal.RUN
    reason: str = ""
    routed: bool = False           # it may be sent requests
    spawn_at_s: float = 0.0
    started_s: float = 0.0         # the present run began
    progress_s: float = 0.0        # last sign of life of a start
    ready_s: float | None = None   # the present run became ready
    since_s: float = 0.0           # entered the present stage
    deadline_s: float = 0.0        # of draining, terminating, collecting
    kill_at_s: float = 0.0         # last KillAll
    phase: Phase | None = None
    phase_times_s: Mapping[Phase, float] = field(default_factory=lambda: MappingProxyType({}))
    cause: Cause | None = None
    history: RestartHistory = field(default_factory=RestartHistory)
    restarts: int = 0

    @property
    def state(self) -> ReplicaState:
        """The state that the API shows."""
        return _STATES[self.stage]

    @property
    def holds_processes(self) -> bool:
        """True if processes of this replica may exist, so that its GPUs are not free."""
        return self.stage not in (Stage.WAITING, Stage.STOPPED, Stage.FAILED)

    @property
    def gave_up(self) -> bool:
        """True if it will not be started again until somebody changes something."""
        return self.stage is Stage.FAILED


class InvalidTransition(Exception):
    """An event that the present stage does not understand; nothing was changed."""

    def __init__(self, machine: Machine, event: Event) -> None:
        super().__init__(f"{type(event).__name__} is not understood in {machine.stage}")
        self.machine = machine
        self.event = event


_S = Stage
_ENDING = frozenset({_S.KILLING})
TRANSITIONS: Mapping[Stage, Mapping[type[Any], frozenset[Stage]]] = MappingProxyType(
    {
        _S.WAITING: {
            Tick: frozenset({_S.WAITING, _S.SPAWNING}),
            Adopted: frozenset({_S.STARTING, _S.READY, _S.DRAINING}),
            Exited: _ENDING,       # it ended while no agent watched
            StopWanted: frozenset({_S.STOPPED}),
            RunWanted: frozenset({_S.WAITING}),
            RestartWanted: frozenset({_S.WAITING}),
        },
        _S.SPAWNING: {
            Tick: frozenset({_S.SPAWNING}),
            Spawned: frozenset({_S.STARTING, _S.TERMINATING}),
            SpawnFailed: _ENDING,
            StopWanted: frozenset({_S.SPAWNING}),
            RunWanted: frozenset({_S.SPAWNING}),
            RestartWanted: frozenset({_S.SPAWNING}),
        },
        _S.STARTING: {
            Tick: frozenset({_S.STARTING, _S.COLLECTING}),
            PhaseSeen: frozenset({_S.STARTING}),
            ProgressSeen: frozenset({_S.STARTING}),
            HealthOk: frozenset({_S.STARTING}),
            TokenGenerated: frozenset({_S.READY}),
            Exited: _ENDING,
            StopWanted: frozenset({_S.TERMINATING}),
            RunWanted: frozenset({_S.STARTING}),
            RestartWanted: frozenset({_S.TERMINATING}),
        },
        _S.READY: {
            Tick: frozenset({_S.READY}),
            HangSuspected: frozenset({_S.SUSPECT}),
            Exited: _ENDING,
            StopWanted: frozenset({_S.DRAINING}),
            RunWanted: frozenset({_S.READY}),
            RestartWanted: frozenset({_S.DRAINING}),
        },
        _S.SUSPECT: {
            Tick: frozenset({_S.SUSPECT}),
            HangHealed: frozenset({_S.READY}),
            HangConfirmed: frozenset({_S.COLLECTING}),
            Exited: _ENDING,
            StopWanted: frozenset({_S.DRAINING}),
            RunWanted: frozenset({_S.SUSPECT}),
            RestartWanted: frozenset({_S.DRAINING}),
        },
        _S.COLLECTING: {
            Tick: frozenset({_S.COLLECTING, _S.KILLING}),
            EvidenceCollected: _ENDING,
            Exited: _ENDING,
            StopWanted: frozenset({_S.COLLECTING}),
            RunWanted: frozenset({_S.COLLECTING}),
            RestartWanted: frozenset({_S.COLLECTING}),
        },
        _S.DRAINING: {
            Tick: frozenset({_S.DRAINING, _S.TERMINATING}),
            DrainDone: frozenset({_S.TERMINATING}),
            Exited: _ENDING,
            StopWanted: frozenset({_S.DRAINING}),
            RunWanted: frozenset({_S.READY}),
            RestartWanted: frozenset({_S.DRAINING}),
        },
        _S.TERMINATING: {
            Tick: frozenset({_S.TERMINATING, _S.KILLING}),
            Exited: _ENDING,
            StopWanted: frozenset({_S.TERMINATING}),
            RunWanted: frozenset({_S.TERMINATING}),
            RestartWanted: frozenset({_S.TERMINATING}),
        },
        _S.KILLING: {
            Tick: _ENDING,
            Exited: _ENDING,
            KillDone: frozenset({_S.STOPPED, _S.WAITING, _S.FAILED}),
            StopWanted: _ENDING,
            RunWanted: _ENDING,
            RestartWanted: _ENDING,
        },
        _S.STOPPED: {
            Tick: frozenset({_S.STOPPED}),
            StopWanted: frozenset({_S.STOPPED}),
            RunWanted: frozenset({_S.WAITING}),
            RestartWanted: frozenset({_S.STOPPED}),
        },
        _S.FAILED: {
            Tick: frozenset({_S.FAILED}),
            StopWanted: frozenset({_S.STOPPED}),
            RunWanted: frozenset({_S.WAITING}),
            RestartWanted: frozenset({_S.WAITING}),
        },
    }
)

Step = tuple[Machine, tuple[Action, ...]]


def accepts(machine: Machine, event: Event) -> bool:
    """True if the present stage understands the event."""
    return type(event) in TRANSITIONS[machine.stage]


def step(machine: Machine, event: Event, limits: Limits) -> Step:
    """The machine after an event, and what to do now. Raises InvalidTransition."""
    if not accepts(machine, event):
        raise InvalidTransition(machine, event)
    after, actions = _handle(machine, event, limits)
    assert after.stage in TRANSITIONS[machine.stage][type(event)], (machine.stage, event, after.stage)
    return after, actions


def _handle(machine: Machine, event: Event, limits: Limits) -> Step:
    match event:
        case Tick():
            return _TICKS[machine.stage](machine, event, limits)
        case Spawned(now_s=now_s):
            return _spawned(machine, now_s, limits)
        case SpawnFailed(now_s=now_s, cause=cause) | Exited(now_s=now_s, cause=cause):
            return _ended(machine, now_s, cause)
        case Adopted():
            return _adopted(machine, event)
        case PhaseSeen(now_s=now_s, phase=phase):
            return _phase(machine, now_s, phase), ()
        case ProgressSeen(now_s=now_s):
            return replace(machine, progress_s=now_s), ()
        case HealthOk():
            return machine, (GenerateToken(),)  # no progress in itself: a server may say 200 and never serve
        case TokenGenerated(now_s=now_s):
            return _ready(machine, now_s)
        case HangSuspected(reason=reason):
            suspect = replace(machine, stage=Stage.SUSPECT, routed=False, reason=reason)
            return suspect, (AnnounceRouting(on=False), Report(kind="ReplicaSuspect", message=reason, warning=True))
        case HangHealed():
            healed = replace(machine, stage=Stage.READY, routed=True, reason="")
            return healed, (AnnounceRouting(on=True), Report(kind="ReplicaHealed", message="it makes progress again"))
        case HangConfirmed(now_s=now_s, reason=reason):
            return _hung(machine, now_s, Cause(fault=Fault.HUNG, detail=reason), limits)
        case EvidenceCollected(now_s=now_s):
            return _kill(machine, now_s)
        case StopWanted():
            return _stop(machine, event, limits)
        case RunWanted(now_s=now_s):
            return _run(machine, now_s)
        case RestartWanted():
            return _restart(machine, event, limits)
        case DrainDone(now_s=now_s):
            return _terminate(machine, now_s, limits.term_timeout_s)
        case KillDone():
            return _gone(machine, event, limits)
        case _:
            assert_never(event)


# --- ticks ----------------------------------------------------------------------------------------------------


def _tick_waiting(machine: Machine, tick: Tick, limits: Limits) -> Step:
    del limits
    if tick.now_s < machine.spawn_at_s:
        return machine, ()
    if tick.blocked_by:
        return replace(machine, reason=tick.blocked_by), ()
    spawning = Machine(
        stage=Stage.SPAWNING, history=machine.history, restarts=machine.restarts, since_s=tick.now_s,
        started_s=tick.now_s, progress_s=tick.now_s,
    )
    return spawning, (Spawn(),)


def _tick_starting(machine: Machine, tick: Tick, limits: Limits) -> Step:
    stalled_s, total_s = tick.now_s - machine.progress_s, tick.now_s - machine.started_s
    phase = f" in phase {machine.phase}" if machine.phase else ""
    if stalled_s >= limits.start_stall_s:
        detail = f"the start made no progress for {stalled_s:.0f} s{phase}"
    elif total_s >= limits.start_limit_s:
        detail = f"the start took longer than {limits.start_limit_s:.0f} s{phase}"
    else:
        return machine, (ProbeHealth(),)
    return _hung(machine, tick.now_s, Cause(fault=Fault.START_TIMED_OUT, detail=detail), limits)


def _tick_draining(machine: Machine, tick: Tick, limits: Limits) -> Step:
    if tick.now_s >= machine.deadline_s:
        after, actions = _terminate(machine, tick.now_s, limits.term_timeout_s)
        message = "requests were still running when its drain deadline passed"
        return after, (Report(kind="DrainTimedOut", message=message, warning=True), *actions)
    if tick.now_s - machine.since_s >= limits.drain_settle_s:
        return machine, (CheckDrained(),)
    return machine, ()


def _tick_deadline(machine: Machine, tick: Tick, limits: Limits) -> Step:
    del limits
    return _kill(machine, tick.now_s) if tick.now_s >= machine.deadline_s else (machine, ())


def _tick_killing(machine: Machine, tick: Tick, limits: Limits) -> Step:
    if tick.now_s - machine.kill_at_s < limits.kill_interval_s:
        return machine, ()
    return replace(machine, kill_at_s=tick.now_s), (KillAll(),)


def _tick_nothing(machine: Machine, tick: Tick, limits: Limits) -> Step:
    del tick, limits
    return machine, ()


_TICKS: Mapping[Stage, Callable[[Machine, Tick, Limits], Step]] = MappingProxyType(
    {
        Stage.WAITING: _tick_waiting,
        Stage.SPAWNING: _tick_nothing,
        Stage.STARTING: _tick_starting,
        Stage.READY: _tick_nothing,
        Stage.SUSPECT: _tick_nothing,
        Stage.COLLECTING: _tick_deadline,
        Stage.DRAINING: _tick_draining,
        Stage.TERMINATING: _tick_deadline,
        Stage.KILLING: _tick_killing,
        Stage.STOPPED: _tick_nothing,
        Stage.FAILED: _tick_nothing,
    }
)


# --- events ---------------------------------------------------------------------------------------------------


def _spawned(machine: Machine, now_s: float, limits: Limits) -> Step:
    started = replace(machine, stage=Stage.STARTING, started_s=now_s, progress_s=now_s, since_s=now_s)
    if machine.goal is Goal.RUN:
        return started, ()
    return _terminate(started, now_s, limits.start_term_timeout_s)  # unwanted since it was asked for


def _adopted(machine: Machine, event: Adopted) -> Step:
    now_s = event.now_s
    base = replace(machine, started_s=now_s, progress_s=now_s, since_s=now_s, reason="", cause=None)
    report = Report(kind="EngineAdopted", message="found running and taken over after a restart of the agent")
    if event.stopping:
        draining = replace(
            base, stage=Stage.DRAINING, goal=Goal.STOP, deadline_s=now_s + event.drain_timeout_s, ready_s=now_s
        )
        return draining, (report,)
    if event.ready:
        return replace(base, stage=Stage.READY, routed=True, ready_s=now_s), (AnnounceRouting(on=True), report)
    return replace(base, stage=Stage.STARTING), (report,)


def _phase(machine: Machine, now_s: float, phase: Phase) -> Machine:
    # Back from loading to a download: loading begins again, and its time with it.
    times_s = {known: time_s for known, time_s in machine.phase_times_s.items() if not later(phase, known)}
    times_s.setdefault(phase, now_s)
    return replace(machine, phase=phase, phase_times_s=MappingProxyType(times_s), progress_s=now_s)


def _ready(machine: Machine, now_s: float) -> Step:
    ready = replace(machine, stage=Stage.READY, routed=True, ready_s=now_s, since_s=now_s, reason="")
    took = f"ready after {now_s - machine.started_s:.1f} s"
    edges = [*machine.phase_times_s.items(), ("", now_s)]
    phases = ", ".join(f"{phase} {end_s - time_s:.1f} s" for (phase, time_s), (_, end_s) in pairwise(edges))
    message = f"{took} ({phases})" if phases else took
    return ready, (AnnounceRouting(on=True), Report(kind="ReplicaReady", message=message))


def _ended(machine: Machine, now_s: float, cause: Cause) -> Step:
    """The first process is gone. If nobody asked for it, it is a failure, whatever its exit code says."""
    if machine.stage is Stage.KILLING:
        return machine, ()
    if machine.goal is Goal.RUN:
        machine = replace(machine, goal=Goal.RETRY, cause=cause, reason=cause.detail)
    failed = machine.goal is Goal.RETRY and machine.stage is not Stage.COLLECTING
    report = (Report(kind="EngineFailed", message=cause.detail, warning=True),) if failed else ()
    after, actions = _kill(machine, now_s)
    return after, (*report, *actions)


def _hung(machine: Machine, now_s: float, cause: Cause, limits: Limits) -> Step:
    collecting = replace(
        machine, stage=Stage.COLLECTING, goal=Goal.RETRY, cause=cause, routed=False, reason=cause.detail,
        since_s=now_s, deadline_s=now_s + limits.evidence_timeout_s,
    )
    report = Report(kind="EngineFailed", message=cause.detail, warning=True)
    return collecting, (AnnounceRouting(on=False), report, CollectEvidence(reason=cause.detail))


def _stop(machine: Machine, event: StopWanted, limits: Limits) -> Step:
    machine = replace(machine, goal=Goal.STOP, reason=event.reason or machine.reason)
    match machine.stage:
        case Stage.WAITING | Stage.FAILED | Stage.STOPPED:
            return replace(machine, stage=Stage.STOPPED, since_s=event.now_s), ()
        case Stage.READY | Stage.SUSPECT:
            return _drain(machine, event.now_s, event.drain_timeout_s)
        case Stage.STARTING:
            return _terminate(machine, event.now_s, limits.start_term_timeout_s)
        case Stage.DRAINING:
            deadline_s = min(machine.deadline_s, event.now_s + event.drain_timeout_s)
            return replace(machine, deadline_s=deadline_s), ()
        case Stage.SPAWNING | Stage.COLLECTING | Stage.TERMINATING | Stage.KILLING:
            return machine, ()
        case _:
            assert_never(machine.stage)


def _run(machine: Machine, now_s: float) -> Step:
    match machine.stage:
        case Stage.DRAINING if machine.goal is Goal.STOP:
            back = replace(machine, stage=Stage.READY, goal=Goal.RUN, routed=True, reason="")
            return back, (AnnounceRouting(on=True),)
        case Stage.STOPPED | Stage.FAILED:
            return Machine(spawn_at_s=now_s, since_s=now_s, restarts=machine.restarts), ()
        case Stage.SPAWNING if machine.goal is Goal.STOP:
            return replace(machine, goal=Goal.RUN), ()
        case Stage.TERMINATING | Stage.KILLING | Stage.COLLECTING if machine.goal is Goal.STOP:
            return replace(machine, goal=Goal.RESTART), ()
        case Stage.DRAINING:
            return replace(machine, stage=Stage.READY, goal=Goal.RUN, routed=True), (AnnounceRouting(on=True),)
        case _:
            return machine, ()


def _restart(machine: Machine, event: RestartWanted, limits: Limits) -> Step:
    """As a stop, but it comes back; what failed before is forgiven, for a person says so."""
    machine = replace(machine, history=RestartHistory())
    reason = "restarted on request"
    match machine.stage:
        case Stage.WAITING | Stage.FAILED:
            return Machine(spawn_at_s=event.now_s, since_s=event.now_s, restarts=machine.restarts), ()
        case Stage.STOPPED:
            return machine, ()
        case Stage.READY | Stage.SUSPECT:
            machine = replace(machine, goal=Goal.RESTART, reason=reason)
            return _drain(machine, event.now_s, event.drain_timeout_s)
        case Stage.STARTING:
            machine = replace(machine, goal=Goal.RESTART, reason=reason)
            return _terminate(machine, event.now_s, limits.start_term_timeout_s)
        case Stage.SPAWNING | Stage.DRAINING | Stage.COLLECTING | Stage.TERMINATING | Stage.KILLING:
            # What is being started is new enough; what ends comes back unless it was told to stop.
            return machine, ()
        case _:
            assert_never(machine.stage)


# --- moves ----------------------------------------------------------------------------------------------------


def _drain(machine: Machine, now_s: float, drain_timeout_s: float) -> Step:
    draining = replace(
        machine, stage=Stage.DRAINING, routed=False, since_s=now_s, deadline_s=now_s + drain_timeout_s
    )
    return draining, (AnnounceRouting(on=False),)


def _terminate(machine: Machine, now_s: float, timeout_s: float) -> Step:
    terminating = replace(
        machine, stage=Stage.TERMINATING, routed=False, since_s=now_s, deadline_s=now_s + timeout_s
    )
    return terminating, (SendTerm(),)


def _kill(machine: Machine, now_s: float) -> Step:
    killing = replace(machine, stage=Stage.KILLING, routed=False, since_s=now_s, kill_at_s=now_s)
    routing = (AnnounceRouting(on=False),) if machine.routed else ()
    return killing, (*routing, KillAll())


def _gone(machine: Machine, event: KillDone, limits: Limits) -> Step:
    now_s = event.now_s
    match machine.goal:
        case Goal.STOP:
            stopped = replace(machine, stage=Stage.STOPPED, since_s=now_s)
            return stopped, (RemoveSharedMemory(), Report(kind="ReplicaStopped", message=machine.reason or "stopped"))
        case Goal.RESTART | Goal.RUN:
            waiting = Machine(
                spawn_at_s=now_s, since_s=now_s, history=machine.history, restarts=machine.restarts + 1,
                reason=machine.reason,
            )
            return waiting, (RemoveSharedMemory(),)
        case Goal.RETRY:
            return _retry(machine, event, limits)
        case _:
            assert_never(machine.goal)


def _retry(machine: Machine, event: KillDone, limits: Limits) -> Step:
    now_s = event.now_s
    cause = machine.cause or Cause(fault=Fault.CRASHED, detail="ended for an unknown reason")
    ready_s = None if machine.ready_s is None else now_s - machine.ready_s
    history, answer = decide(
        limits.restart, machine.history, cause=cause, ready_s=ready_s, now_s=now_s, draw=event.draw
    )
    match answer:
        case Retry(delay_s=delay_s, reason=reason):
            waiting = Machine(
                spawn_at_s=now_s + delay_s, since_s=now_s, history=history, restarts=machine.restarts + 1, reason=reason
            )
            return waiting, (RemoveSharedMemory(), Report(kind="RestartScheduled", message=reason, warning=True))
        case GiveUp(reason=reason):
            failed = replace(machine, stage=Stage.FAILED, history=history, reason=reason, since_s=now_s)
            return failed, (RemoveSharedMemory(), Report(kind="ReplicaFailed", message=reason, warning=True))
        case _:
            assert_never(answer)
