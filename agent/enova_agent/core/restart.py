"""Whether, when and why to start an engine again after it failed; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from enova_agent.core.failure import Cause, Fault
from enova_common.backoff import Backoff

# How often the same start may be tried again when it failed for a reason that starting again rarely mends.
# A port gets another number each time, so it has no bound here beyond the budget.
_IDENTICAL_RETRIES: Mapping[Fault, int] = MappingProxyType(
    {
        Fault.GPU_MEMORY: 2,       # what held the memory may be about to end
        Fault.HOST_MEMORY: 2,
        Fault.MODEL: 1,            # a network mount may come late
        Fault.HUB_DENIED: 0,       # until somebody accepts terms or gives a token
        Fault.HUB_MISSING: 0,
        Fault.ARGUMENT: 0,         # the parser will say the same
        Fault.GPU_MISSING: 1,
        Fault.EXECUTABLE: 0,
        Fault.DISK_FULL: 2,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """How patiently a failing engine is started again."""

    backoff: Backoff = field(default_factory=lambda: Backoff(initial_s=1.0, maximum_s=300.0, factor=2.0, jitter=0.2))
    attempts_max: int = 8          # restarts within the window; then the replica is FAILED for good
    window_s: float = 600.0
    healthy_s: float = 300.0       # ready for so long: what failed before is forgiven


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartHistory:
    """What is remembered of past failures: the times of restarts in the window, and the last fault in a row."""

    times_s: tuple[float, ...] = ()
    fault: Fault | None = None
    identical: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Start again after a delay."""

    delay_s: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """Do not start again until somebody changes something."""

    reason: str


def decide(
    policy: RestartPolicy,
    history: RestartHistory,
    *,
    cause: Cause,
    ready_s: float | None,
    now_s: float,
    draw: float,
) -> tuple[RestartHistory, Retry | GiveUp]:
    """The answer to one failure. `ready_s`: how long the engine had been ready, None if it never was."""
    if ready_s is not None and ready_s >= policy.healthy_s:
        history = RestartHistory()
    times_s = tuple(time_s for time_s in history.times_s if now_s - time_s < policy.window_s)
    # A fault that struck after the engine had served is not a failing start: it counts anew.
    identical = history.identical + 1 if cause.fault == history.fault and ready_s is None else 0
    history = replace(history, times_s=times_s, fault=cause.fault, identical=identical)
    limit = _IDENTICAL_RETRIES.get(cause.fault)
    if ready_s is None and limit is not None and identical >= limit:
        tries = f"{identical + 1} starts" if identical else "the start"
        return history, GiveUp(reason=f"given up: {tries} failed the same way: {cause.detail}")
    if len(times_s) >= policy.attempts_max:
        return history, GiveUp(
            reason=f"given up: {len(times_s)} restarts in {policy.window_s:g} s did not help; last: {cause.detail}"
        )
    delay_s = policy.backoff.delay_s(len(times_s), draw)
    history = replace(history, times_s=(*times_s, now_s))
    attempt = f"restart {len(times_s) + 1} of at most {policy.attempts_max}"
    return history, Retry(delay_s=delay_s, reason=f"{cause.detail}; {attempt} in {delay_s:.1f} s")
