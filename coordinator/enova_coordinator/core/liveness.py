"""Which nodes can be reached: stream and heartbeat ages become READY, SUSPECT or LOST.

Theory of operation. A node is called LOST only when its silence is proved to be its own: not while the leader's
own loop lags or has just lagged (heartbeats may lie unread), and not before a new leader gave every agent the time
to reconnect. When many nodes vanish at once the cause is rarely the nodes (a switch, our own network): then
nothing that is lost is replaced until most of them return or a time-out passes.
All times are of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from enova_coordinator.core.model import NodeObservation, NodeState


@dataclass(frozen=True, slots=True, kw_only=True)
class LivenessLimits:
    """When silence counts. All of real time."""

    suspect_s: float = 3.0
    lost_s: float = 10.0
    takeover_grace_s: float = 15.0  # agents' longest backoff and some: a new leader has heard nobody yet
    loop_lag_s: float = 1.0
    lag_recovery_s: float = 3.0    # after a lag, until what lay unread was read
    mass_window_s: float = 60.0
    mass_share: float = 0.5
    mass_count: int = 3
    mass_hold_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLiveness:
    """One node's state, since when, and why."""

    state: NodeState
    since_s: float
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Liveness:
    """What is remembered between two looks at all nodes. `started_s` is when this leader took over."""

    started_s: float
    nodes: Mapping[str, NodeLiveness] = field(default_factory=dict)
    lagged_s: float | None = None  # when the loop was last found lagging
    held: frozenset[str] = frozenset()  # nodes whose common loss is being held
    held_since_s: float = 0.0
    held_total: int = 0
    written_off: frozenset[str] = frozenset()  # lost, and the hold timed out: they do not cause another

    @property
    def replacement_held(self) -> str:
        """Why nothing lost may be replaced now; "" = it may."""
        if not self.held:
            return ""
        return (
            f"{len(self.held)} of {self.held_total} nodes vanished together: "
            "nothing of theirs is replaced until they return or the hold times out"
        )


def observe(
    before: Liveness,
    names: tuple[str, ...],
    observations: Mapping[str, NodeObservation],
    *,
    now_s: float,
    loop_lag_s: float,
    limits: LivenessLimits,
) -> Liveness:
    """The liveness of all nodes as of now."""
    lagged_s = now_s if loop_lag_s > limits.loop_lag_s else before.lagged_s
    after = replace(before, lagged_s=lagged_s)
    may_lose = _may_lose(after, now_s, limits)
    nodes = {
        name: _node(before.nodes.get(name), observations.get(name), after.started_s, now_s, limits, may_lose=may_lose)
        for name in names
    }
    return _mass_loss(replace(after, nodes=nodes), now_s, limits)


def _may_lose(liveness: Liveness, now_s: float, limits: LivenessLimits) -> bool:
    if now_s - liveness.started_s < limits.takeover_grace_s:
        return False
    return liveness.lagged_s is None or now_s - liveness.lagged_s >= limits.lag_recovery_s


def _node(
    before: NodeLiveness | None,
    observation: NodeObservation | None,
    started_s: float,
    now_s: float,
    limits: LivenessLimits,
    *,
    may_lose: bool,
) -> NodeLiveness:
    heard_s = observation.last_heard_s if observation is not None else started_s
    silence_s = now_s - heard_s
    connected = observation is not None and observation.connected
    if connected and silence_s <= limits.suspect_s:
        return _since(before, NodeState.READY, now_s, "")
    lost_before = before is not None and before.state is NodeState.LOST
    if lost_before or (silence_s > limits.lost_s and may_lose):
        return _since(before, NodeState.LOST, now_s, f"nothing was heard for {limits.lost_s:g} s")
    reason = f"no heartbeat for more than {limits.suspect_s:g} s" if connected else "its agent is not connected"
    return _since(before, NodeState.SUSPECT, now_s, reason)


def _since(before: NodeLiveness | None, state: NodeState, now_s: float, reason: str) -> NodeLiveness:
    if before is not None and before.state is state:
        return before if before.reason == reason else replace(before, reason=reason)
    return NodeLiveness(state=state, since_s=now_s, reason=reason)


def _mass_loss(liveness: Liveness, now_s: float, limits: LivenessLimits) -> Liveness:
    lost = {name for name, node in liveness.nodes.items() if node.state is NodeState.LOST}
    written_off = liveness.written_off & lost
    recent = {
        name
        for name in lost - written_off
        if name in liveness.held or now_s - liveness.nodes[name].since_s <= limits.mass_window_s
    }
    total = len(liveness.nodes) - len(lost) + len(recent)
    if len(recent) < max(limits.mass_count, limits.mass_share * total):
        # Most came back: the others' grace begins now, so that those a moment later are not replaced in between.
        nodes = {
            name: replace(node, since_s=now_s) if name in liveness.held and name in recent else node
            for name, node in liveness.nodes.items()
        }
        return replace(liveness, nodes=nodes, held=frozenset(), written_off=written_off)
    since_s = liveness.held_since_s if liveness.held else now_s
    if now_s - since_s > limits.mass_hold_s:
        return replace(liveness, held=frozenset(), written_off=frozenset(written_off | recent))
    return replace(
        liveness, held=frozenset(recent), held_since_s=since_s, held_total=total, written_off=frozenset(written_off)
    )
