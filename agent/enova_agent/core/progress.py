"""Finds engines that answer /health but make no progress, without mistaking hard work for a hang; pure.

Theory of operation. An engine proves that it lives by *progress*: a counter of its /metrics moves (tokens,
iterations, KV use), a canary of one token is answered, or, where there is no scrape, bytes reach the ingress.
Only where there is *demand* can progress be missed: requests that the ingress holds and the engine says it runs,
or a canary that is not answered. So an idle engine is asked for one token every few seconds, and so is one that
claims to run nothing while the ingress still holds something (a client that reads slowly, or an engine whose
core is stopped: both look the same until asked). At saturation counters move, so no canary waits in the queue.

Without progress under demand, *activity* decides: an engine deep in a long prefill computes (its worker
processes use CPU time, its GPUs are busy), a hung one does not. The first process, the API server, burns a
little CPU on our own probes, so it counts only when it is really busy. A process in state T is stopped, whatever
the others burn: workers may spin while they wait for a stopped core.

No progress and no activity: first SUSPECT (out of routing), then HUNG. No progress with activity: the same with
much longer limits, for a GPU that spins in a dead collective looks busy too. Progress while SUSPECT is HEALED.
What is not known (no activity sample) never counts against the engine. Time in which the agent itself did not
run (a paused machine) counts for nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType


class Verdict(StrEnum):
    """What the last observation says."""

    NORMAL = "NORMAL"
    SUSPECT = "SUSPECT"
    HUNG = "HUNG"
    HEALED = "HEALED"


@dataclass(frozen=True, slots=True, kw_only=True)
class HangLimits:
    """When missing progress becomes a suspicion and a fact. Idle: found after canary_interval_s + hung_after_s."""

    canary_interval_s: float = 2.0
    probe_after_s: float = 1.0     # without progress for so long: look closer
    suspect_after_s: float = 2.0   # without progress and activity
    hung_after_s: float = 5.5
    busy_suspect_after_s: float = 600.0  # without progress, but active: longer than any prefill that is worth its while
    busy_hung_after_s: float = 900.0
    worker_cpu_share: float = 0.05  # of a core, all workers together: more than waiting costs
    server_cpu_share: float = 0.5
    gpu_share: float = 0.05
    gap_s: float = 3.0             # between two observations: the agent itself stood still


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What the processes of an engine did so far, and what its GPUs do now."""

    time_s: float
    server_pid: int
    cpu_s: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))  # by pid
    stopped: tuple[int, ...] = ()  # pids in state T
    gpu_utilization: float | None = None  # the busiest of its GPUs, 0..1


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What is known of an engine at one instant."""

    now_s: float
    marks: tuple[float | None, ...] | None = None  # whatever moves when the engine works; None: no usable scrape
    running: float | None = None   # requests that the engine says it runs or has waiting
    held: int | None = None        # requests that the ingress has sent to it; None: no ingress
    silent_s: float = 0.0          # since it sent the ingress any byte, while it holds some
    canary_since_s: float | None = None  # since when a canary waits for an answer
    canary_ok_s: float | None = None  # when the last one was answered
    activity: Activity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What is remembered between observations."""

    now_s: float
    progress_s: float
    active_s: float
    demand_s: float | None = None
    marks: tuple[float | None, ...] | None = None
    canary_ok_s: float | None = None
    activity: Activity | None = None
    activity_known: bool = False   # whether it was active could be told since progress stopped
    suspect: bool = False
    hung: bool = False

    @classmethod
    def begin(cls, now_s: float) -> Watch:
        """A watch over an engine that has just proved that it serves."""
        return cls(now_s=now_s, progress_s=now_s, active_s=now_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The verdict with its reason, and what the next observation should contain."""

    verdict: Verdict
    reason: str = ""
    wants_canary: bool = False
    wants_activity: bool = False


def judge(watch: Watch, observation: Observation, limits: HangLimits) -> tuple[Watch, Judgement]:
    """The watch after an observation, and what it means."""
    watch = _forgive_gap(watch, observation.now_s, limits)
    if _progressed(watch, observation):
        verdict = Verdict.HEALED if watch.suspect else Verdict.NORMAL
        after = replace(
            watch, now_s=observation.now_s, progress_s=observation.now_s, demand_s=None,
            marks=observation.marks or watch.marks, canary_ok_s=observation.canary_ok_s,
            activity=None, activity_known=False, suspect=False, hung=False,
        )
        return after, Judgement(verdict=verdict)
    watch = _with_demand(watch, observation)
    watch = _with_activity(watch, observation, limits)
    watch = replace(watch, now_s=observation.now_s, marks=observation.marks or watch.marks)
    return _grade(watch, observation, limits)


def _forgive_gap(watch: Watch, now_s: float, limits: HangLimits) -> Watch:
    gap_s = now_s - watch.now_s
    if gap_s <= limits.gap_s:
        return watch
    return replace(
        watch, progress_s=watch.progress_s + gap_s, active_s=watch.active_s + gap_s, activity=None,
        demand_s=None if watch.demand_s is None else watch.demand_s + gap_s,
    )


def _progressed(watch: Watch, observation: Observation) -> bool:
    if observation.canary_ok_s is not None and observation.canary_ok_s != watch.canary_ok_s:
        return True
    if observation.marks is not None:
        return watch.marks is not None and observation.marks != watch.marks
    return bool(observation.held) and observation.silent_s < 1.0


def _works(observation: Observation) -> bool:
    """True if the ingress holds requests that the engine, too, says it works on."""
    return bool(observation.held) and bool(observation.running)


def _with_demand(watch: Watch, observation: Observation) -> Watch:
    since = [watch.demand_s] if watch.demand_s is not None else []
    if observation.canary_since_s is not None:
        since.append(max(observation.canary_since_s, watch.progress_s))
    if _works(observation):
        since.append(watch.now_s)
    wanted = observation.canary_since_s is not None or _works(observation)
    return replace(watch, demand_s=min(since) if wanted else None)


def _with_activity(watch: Watch, observation: Observation, limits: HangLimits) -> Watch:
    now, before = observation.activity, watch.activity
    if now is None:
        return watch
    if now.stopped:
        return replace(watch, activity=now, activity_known=True)
    if before is None or now.time_s - before.time_s < 0.2:
        return replace(watch, activity=before or now)
    active = _is_active(before, now, limits)
    return replace(
        watch, activity=now, activity_known=True, active_s=observation.now_s if active else watch.active_s
    )


def _is_active(before: Activity, now: Activity, limits: HangLimits) -> bool:
    seconds = now.time_s - before.time_s
    used_s = {pid: max(0.0, cpu_s - before.cpu_s.get(pid, cpu_s)) for pid, cpu_s in now.cpu_s.items()}
    server_share = used_s.pop(now.server_pid, 0.0) / seconds
    return (
        sum(used_s.values()) / seconds >= limits.worker_cpu_share
        or server_share >= limits.server_cpu_share
        or (now.gpu_utilization or 0.0) >= limits.gpu_share
    )


def _grade(watch: Watch, observation: Observation, limits: HangLimits) -> tuple[Watch, Judgement]:
    now_s = observation.now_s
    stalled_s = now_s - max(watch.progress_s, watch.demand_s) if watch.demand_s is not None else 0.0
    idle_s = min(stalled_s, now_s - watch.active_s) if watch.activity_known else 0.0
    if idle_s >= limits.hung_after_s or stalled_s >= limits.busy_hung_after_s:
        watch = replace(watch, suspect=True, hung=True)
    elif idle_s >= limits.suspect_after_s or stalled_s >= limits.busy_suspect_after_s:
        watch = replace(watch, suspect=True)
    verdict = Verdict.HUNG if watch.hung else Verdict.SUSPECT if watch.suspect else Verdict.NORMAL
    return watch, Judgement(
        verdict=verdict,
        reason=_reason(watch, observation, stalled_s) if watch.suspect else "",
        wants_canary=_wants_canary(watch, observation, limits),
        wants_activity=stalled_s >= limits.probe_after_s,
    )


def _wants_canary(watch: Watch, observation: Observation, limits: HangLimits) -> bool:
    """Whether to ask for a token; the shell keeps at most one such request open."""
    if _works(observation):
        return False               # its own requests tell, and a canary would wait behind them
    quiet_s = observation.now_s - watch.progress_s
    return quiet_s >= (limits.probe_after_s if observation.held else limits.canary_interval_s)


def _reason(watch: Watch, observation: Observation, stalled_s: float) -> str:
    if _works(observation):
        what = f"{observation.held} requests are held and none moved for {stalled_s:.1f} s"
    else:
        what = f"a one-token canary has had no answer for {stalled_s:.1f} s"
    stopped = watch.activity.stopped if watch.activity is not None else ()
    if stopped:
        return f"no progress: {what}; stopped processes: {', '.join(map(str, stopped))}"
    active = watch.activity_known and stalled_s > 0 and observation.now_s - watch.active_s < stalled_s
    return f"no progress: {what}; its processes are {'busy' if active else 'idle'}"
