"""enova's scaling policy: enough capacity for the demand at the time at which a replica started now is ready.

Theory of operation, each interval. (1) What is asked for now, in requests a second of the mix that capacity is told
for (`demand`). (2) What it will be when a start of now is READY: the wanted quantile of the forecaster that was best
of late (`forecast`), and what waits already. (3) What a replica carries: the told capacity, corrected by what
replicas did (`learning`). (4) The fewest replicas that carry it, over all variants (`mixture`).

Up goes at once: replicas that start count, so nothing is asked for twice, unless one has been starting for longer
than starts take. Down waits until the need has been lower for as long as a start takes (to let one go and start it
again costs that much), and passes a counterfactual: the fewer replicas carry the *high* forecast. UNKNOWN never
shrinks. The one knob, `conservatism`, sets the quantile, the headroom and the patience together.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from enova_recommender.scaling.enova.demand import DemandNow, demand_now
from enova_recommender.scaling.enova.mixture import mixture
from enova_recommender.scaling.enova.need import INTERVAL_S, QUEUE_PER_REPLICA, Need, need_of, patience
from enova_recommender.scaling.enova.state import PolicyState
from enova_recommender.scaling.situation import (
    Decided,
    Forecast,
    Memory,
    Phase,
    ReplicaSight,
    Situation,
    Wish,
)
from enova_recommender.scaling.types import Action, Evidence
from enova_recommender.types import VerdictKind

STUCK_TIMES = 2.0             # a start that takes this many times the 90th percentile is not counted on
STUCK_S_MIN = 60.0
SPARE_MAX = 1                 # replicas beside those that never start: what keeps all of them from it keeps more
IDLE_STARTS = 4.0             # idle for this many slow starts before the last replica goes
IDLE_S_MIN = 120.0
FLEET_LOST_SHARE = 0.5
NOISE_LOADS = 3               # of late: the median decides unless requests wait
DEAD_BAND = 0.3               # of a replica's capacity, between what asks for one more and what lets one go
REPLACED_AT_ONCE = 1
REPLACEABLE = frozenset({"SLOW", "THROTTLED", "FAILING"})   # hung and dead ones are restarted by their agent


@dataclass(frozen=True, slots=True, kw_only=True)
class EnovaPolicy:
    """enova's policy; `scale` multiplies the deployment's own conservatism."""

    scale: float = 1.0

    @property
    def name(self) -> str:
        """The name in the deployment's `policy` field."""
        return "enova"

    @property
    def interval_s(self) -> float:
        """Model seconds between two calls."""
        return INTERVAL_S

    def decide(self, situation: Situation, memory: Memory) -> Decided:
        """The wish for this situation."""
        state = PolicyState.of(memory).seeing(situation.target, now_s=situation.now_s)
        demand = demand_now(situation)
        trouble = _trouble(situation, demand)
        if trouble:
            return _decided(situation, _keep(situation, VerdictKind.UNKNOWN, f"nothing is done: {trouble}"), state)
        need = need_of(situation, demand, state, knob=situation.conservatism * self.scale)
        return _decided(situation, _wish(situation, need), need.state)


def _wish(situation: Situation, need: Need) -> Wish:
    zero = _zero(situation, need)
    if zero is not None:
        return zero
    up = _targets(situation, need, _up_load(need), spare=min(len(_stuck(situation)), SPARE_MAX))
    if sum(up.values()) > situation.target:
        return _scale_up(situation, need, up)
    if situation.verdict is VerdictKind.MISCONFIGURED and need.demand.waiting > 0:
        reason = "requests wait although a resource is slack: other settings, not more GPUs"
        wish = _keep(situation, VerdictKind.MISCONFIGURED, reason)
        return replace(wish, action=Action.RECONFIGURE, evidence=_evidence(situation, need))
    return _scale_down(situation, need)


def _zero(situation: Situation, need: Need) -> Wish | None:
    """The wish where nobody asks; None where somebody does, or one replica must stay."""
    if situation.bounds.min_replicas > 0:
        return None
    idle_s = need.demand.idle_s
    if situation.target == 0:
        return _keep(situation, VerdictKind.NORMAL, "nobody asks, and nothing runs") if idle_s > 0 else None
    slow_s = max(variant.start_up.p90_s for variant in situation.variants)
    window_s = max(IDLE_S_MIN, IDLE_STARTS * need.knob * slow_s)
    if idle_s < window_s or situation.now_s - need.state.edited_s < window_s:
        return None
    return Wish(
        action=Action.SCALE_DOWN,
        targets={variant.name: 0 for variant in situation.variants},
        verdict=VerdictKind.UNDERUSED,
        reason=f"no request for {idle_s:.0f} s; from {window_s:.0f} s on a replica costs more than to start it again",
        evidence=(Evidence(feature="idle_s", value=idle_s, threshold=window_s),),
    )


def _scale_up(situation: Situation, need: Need, targets: dict[str, int]) -> Wish:
    stuck = _stuck(situation)
    waits = f", and {need.demand.waiting:.0f} requests wait" if need.demand.waiting > 0 else ""
    beside = f"; {len(stuck)} that never became READY are not counted on" if stuck else ""
    reason = (
        f"{need.ahead.high:.3g} requests/s are to be carried in {need.lead_s:.0f} s (now {need.demand.rate:.3g})"
        f"{waits}: {sum(targets.values())} replicas do, {situation.target} do not{beside}"
    )
    return Wish(
        action=Action.SCALE_UP,
        targets=targets,
        verdict=VerdictKind.OVERLOADED,
        reason=reason,
        evidence=_evidence(situation, need),
        forecast=_forecast(situation, need),
        replace=_to_replace(situation),
    )


def _scale_down(situation: Situation, need: Need) -> Wish:
    """Fewer, if no load of the patience window needed more; else what runs is kept, and the reason said."""
    loads = need.state.loads
    margin = DEAD_BAND * min(need.sure.values())
    spare = min(len(_stuck(situation)), SPARE_MAX)
    most = max(load for _, load in loads) + margin
    fewer = _targets(situation, replace(need, carried=need.sure), most, spare=spare)
    lasted_s = situation.now_s - loads[0][0]
    kept = replace(
        _keep(situation, VerdictKind.NORMAL, _carried_by(situation, need)),
        evidence=_evidence(situation, need),
        forecast=_forecast(situation, need),
        replace=_to_replace(situation),
    )
    if sum(fewer.values()) >= situation.target:
        return kept
    patience_s = patience(situation, need.knob)
    why = _why_not_fewer(situation, need, lasted_s=lasted_s, patience_s=patience_s)
    if why:
        left_s = max(0.0, patience_s - lasted_s)
        return replace(kept, verdict=VerdictKind.UNDERUSED, reason=f"fewer would do, but {why}", cooldown_s=left_s)
    return replace(
        kept,
        action=Action.SCALE_DOWN,
        targets=fewer,
        verdict=VerdictKind.UNDERUSED,
        reason=f"{kept.reason}; no more than {sum(fewer.values())} were needed for {lasted_s:.0f} s",
        remove_first=_to_leave(situation.replicas),
    )


def _why_not_fewer(situation: Situation, need: Need, *, lasted_s: float, patience_s: float) -> str:
    """What speaks against fewer replicas; empty where nothing does."""
    if need.demand.partial:
        return need.demand.partial
    if situation.verdict is VerdictKind.UNKNOWN:
        return "the detector knows too little"
    if situation.now_s - need.state.edited_s < patience_s:
        return "the number of replicas was set by hand a moment ago"
    if lasted_s < patience_s:
        return f"only for {lasted_s:.0f} s: a start takes longer"
    if need.demand.waiting > QUEUE_PER_REPLICA * max(situation.ready, 1):
        return f"{need.demand.waiting:.0f} requests wait"
    return ""


def _up_load(need: Need) -> float:
    """The load that may raise the target: one jittery sample does not, unless requests wait already."""
    if need.demand.is_burst or need.demand.waiting > QUEUE_PER_REPLICA:
        return need.load
    return statistics.median_low([load for _, load in need.state.loads[-NOISE_LOADS:]])


def _targets(situation: Situation, need: Need, load: float, *, spare: int) -> dict[str, int]:
    """The cheapest targets that carry `load`, and `spare` replicas more for those that cannot be counted on."""
    bounds = situation.bounds
    least = max(bounds.min_replicas, 1)
    first = situation.variants[0].name
    if spare:
        load += spare * need.carried[first]
    return mixture(load, situation.variants, need.carried, least=least, most=max(bounds.max_replicas, least))


def _stuck(situation: Situation) -> tuple[ReplicaSight, ...]:
    """Replicas that should have been READY long ago, by what starts take: they block nothing and carry nothing."""
    starts = {variant.name: variant.start_up for variant in situation.variants}
    return tuple(
        replica
        for replica in situation.replicas
        if replica.phase is Phase.STARTING
        and replica.variant in starts
        and situation.now_s - replica.since_s > max(STUCK_S_MIN, STUCK_TIMES * starts[replica.variant].p90_s)
    )


def _to_replace(situation: Situation) -> tuple[str, ...]:
    """Degraded replicas for which a new one should come first; one at a time, and not while another starts."""
    if any(replica.phase is not Phase.READY for replica in situation.replicas):
        return ()
    ill = [each.name for each in situation.replicas if _is_ill(each)]
    return tuple(ill[:REPLACED_AT_ONCE]) if 2 * len(ill) < len(situation.replicas) or len(ill) == 1 else ()


def _is_ill(replica: ReplicaSight) -> bool:
    return replica.verdict is VerdictKind.DEGRADED and replica.cause in REPLACEABLE and replica.certain


def _to_leave(replicas: tuple[ReplicaSight, ...]) -> tuple[str, ...]:
    """Who leaves first: what waits for GPUs, what starts (the youngest first), what is ill, then the youngest."""
    order = {Phase.PENDING: 0, Phase.STARTING: 1, Phase.READY: 2}
    ranked = sorted(replicas, key=lambda each: (order[each.phase], not _is_ill(each), -each.since_s, each.name))
    return tuple(replica.name for replica in ranked)


def _trouble(situation: Situation, demand: DemandNow) -> str:
    """Why nothing may be done at all; empty where something may."""
    if not situation.variants:
        return "no variant is known"
    if demand.trouble:
        return demand.trouble
    if situation.fleet_lost_share >= FLEET_LOST_SHARE:
        return f"{situation.fleet_lost_share:.0%} of the fleet's nodes were lost at once, which scaling cannot mend"
    return ""


def _carried_by(situation: Situation, need: Need) -> str:
    return (
        f"{need.demand.rate:.3g} requests/s now, {need.ahead.high:.3g} at most in {need.lead_s:.0f} s "
        f"({need.ahead.method}); {situation.target} replicas carry it"
    )


def _evidence(situation: Situation, need: Need) -> tuple[Evidence, ...]:
    carried = sum(need.carried[variant.name] * variant.target for variant in situation.variants)
    most_waiting = QUEUE_PER_REPLICA * max(situation.ready, 1)
    return (
        Evidence(feature="load_requests_per_s", value=need.load, threshold=carried),
        Evidence(feature="arriving_requests_per_s", value=need.demand.rate, threshold=carried),
        Evidence(feature="waiting_requests", value=need.demand.waiting, threshold=most_waiting),
        Evidence(feature="work_of_a_request", value=need.demand.weight, threshold=1.0),
    )


def _forecast(situation: Situation, need: Need) -> Forecast:
    ahead = need.ahead
    method = f"{ahead.method}, judged on {ahead.record_minutes} minutes"
    return Forecast(at_s=situation.now_s + need.lead_s, p50=ahead.p50, low=ahead.low, high=ahead.high, method=method)


def _keep(situation: Situation, verdict: VerdictKind, reason: str) -> Wish:
    targets = {variant.name: variant.target for variant in situation.variants}
    return Wish(action=Action.KEEP, targets=targets, verdict=verdict, reason=reason)


def _decided(situation: Situation, wish: Wish, state: PolicyState) -> Decided:
    wished = sum(wish.targets.values()) if wish.targets else situation.target
    return Decided(wish=wish, memory=replace(state, target=situation.target, wish=wished).memory())
