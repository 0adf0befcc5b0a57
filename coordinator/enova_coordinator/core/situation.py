"""From the coordinator's state and telemetry to the situation that a policy with foresight is told. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from enova_coordinator.core.advice import objectives_of
from enova_coordinator.core.model import (
    Deployment,
    Intent,
    NodeState,
    NodeView,
    Replica,
    ReplicaState,
    Snapshot,
    Variant,
)
from enova_coordinator.core.observation import eligible
from enova_coordinator.core.series import COLUMN, MINUTE_S, Figures, waiting_at
from enova_coordinator.core.verdicts import Verdict
from enova_recommender.detection.causes import SuggestedAction
from enova_recommender.scaling.bounds import Bounds
from enova_recommender.scaling.situation import (
    Capacity,
    Demand,
    Objective,
    Phase,
    Recent,
    ReplicaSight,
    Signal,
    StartUp,
    VariantSight,
)
from enova_recommender.types import VerdictKind

TTFT_S, TPOT_S = 1.0, 0.05         # the objectives, where no class of the deployment names any
ATTAINMENT = 0.99
START_UP = StartUp(p50_s=120.0, p90_s=300.0)  # of a replica, until starts have been seen: a 70B from a local disk
STARTS_MIN = 3                     # seen, before they replace the prior
LOST_LATELY_S = 300.0              # real time
DEAD = frozenset({ReplicaState.FAILED, ReplicaState.LOST})


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a replica of a variant costs an hour, and how many of them its GPU type has room for."""

    usd_per_hour: float
    places: int


def objective_of(deployment: Deployment) -> Objective:
    """The strictest objectives of all classes; where none says which share must meet them, 99 % must."""
    promised = objectives_of(deployment.spec)
    shares = [each.attainment for each in deployment.spec.classes if each.attainment is not None]
    return Objective(
        ttft_s=promised.get("ttft_s", TTFT_S),
        tpot_s=promised.get("tpot_s", TPOT_S),
        attainment=max(shares, default=ATTAINMENT),
    )


def bounds_of(deployment: Deployment) -> Bounds:
    """What a policy may choose between."""
    least, most = deployment.spec.bounds
    return Bounds(min_replicas=least, max_replicas=most)


def sights(
    replicas: Iterable[Replica], verdicts: Mapping[str, Verdict], *, model_s: float, wall_s: float, scale: float
) -> tuple[ReplicaSight, ...]:
    """The replicas that are meant to serve. `model_s` and `wall_s` are now; `scale` is model seconds a real one."""
    return tuple(
        _sight(replica, verdicts.get(replica.name), model_s=model_s, wall_s=wall_s, scale=scale)
        for replica in replicas
        if replica.intent is Intent.RUN
    )


def _sight(
    replica: Replica, verdict: Verdict | None, *, model_s: float, wall_s: float, scale: float
) -> ReplicaSight:
    status = replica.status
    match status.state:
        case ReplicaState.READY | ReplicaState.FAILED | ReplicaState.LOST:
            phase = Phase.READY
        case _:
            phase = Phase.STARTING if replica.members else Phase.PENDING
    # A replica that starts again after a crash is as young as that start.
    since_s = replica.create_time_s if phase is Phase.PENDING else status.state_time_s
    cause = verdict.cause if verdict is not None else ""
    if status.state in DEAD:
        cause = "DEAD"
    elif status.state is ReplicaState.READY and not status.in_routing:
        cause = "HUNG"
    return ReplicaSight(
        name=replica.name,
        variant=replica.variant,
        phase=phase,
        since_s=model_s - (wall_s - since_s) * scale,
        verdict=verdict.kind if verdict is not None else VerdictKind.UNKNOWN,
        cause=cause,
        certain=verdict is None or verdict.suggested_action == SuggestedAction.REPLACE,
    )


def starts_s(replicas: Iterable[Replica]) -> dict[str, float]:
    """By replica, the real seconds that its first start took; those that restarted or are on their way are left out."""
    return {
        replica.name: replica.status.ready_time_s - replica.status.start_time_s
        for replica in replicas
        if replica.status.state is ReplicaState.READY
        and not replica.status.restarts
        and replica.status.ready_time_s > replica.status.start_time_s > 0
    }


def start_up(seen_s: Sequence[float]) -> StartUp:
    """What starts take (model seconds), from those that were seen; the prior while they are few."""
    if len(seen_s) < STARTS_MIN:
        # One start says where the others will be: within a factor of two, as long as nothing else is known.
        return StartUp(p50_s=seen_s[-1], p90_s=2 * seen_s[-1], count=len(seen_s)) if seen_s else START_UP
    p50_s, p90_s = (float(each) for each in np.percentile(seen_s, [50, 90]))
    return StartUp(p50_s=p50_s, p90_s=p90_s, count=len(seen_s))


def variant_sights(
    variants: Iterable[Variant],
    *,
    target: int,
    capacities: Mapping[str, Capacity],
    prices: Mapping[str, Price],
    starts: StartUp,
) -> tuple[VariantSight, ...]:
    """The current variant as a policy sees it; none where its capacity is not known."""
    return tuple(
        VariantSight(
            name=variant.name,
            target=target,
            gpu_type=variant.gpu_type,
            gpus=variant.gpus_per_replica,
            usd_per_hour=prices[variant.name].usd_per_hour,
            capacity=capacities[variant.name],
            start_up=starts,
            places=prices[variant.name].places,
        )
        for variant in variants
        if not variant.retired and variant.name in capacities and variant.name in prices
    )[-1:]


def places(snapshot: Snapshot, deployment: Deployment, variant: Variant) -> int:
    """Replicas of the variant that the fleet has room for, its own included, node by node."""
    own = {gpu for replica in snapshot.replicas_of(deployment.name) for gpu in replica.gpus}
    taken = {gpu for replica in snapshot.replicas.values() for gpu in replica.gpus} - own
    hardware, size = deployment.spec.hardware, max(variant.gpus_per_replica, 1)
    free = [
        sum(gpu.uuid not in taken and variant.gpu_type in {"", gpu.type} for gpu in view.gpus)
        for view in snapshot.nodes.values()
        if view.state is not NodeState.LOST and eligible(view.node, hardware.clusters)
    ]
    fit = sum(count // size for count in free)
    return fit if hardware.max_gpus is None else min(fit, hardware.max_gpus // size)


def fleet_lost_share(nodes: Iterable[NodeView]) -> float:
    """The share of all nodes that were lost of late; one that has been away for longer is no surprise any more."""
    lost = [view.state is NodeState.LOST and view.state_age_s <= LOST_LATELY_S for view in nodes]
    return sum(lost) / len(lost) if lost else 0.0


def recent_of(windows: Mapping[str, Figures], *, end_s: float, step_s: float) -> Recent:
    """The newest steps of each replica, by replica; all windows are of one length and end at `end_s`."""
    names = tuple(windows)
    if not names:
        return Recent(end_s=end_s, step_s=step_s, replicas=(), values={})
    figures = np.stack([windows[name] for name in names]).astype(np.float64)

    def column(name: str) -> NDArray[np.float64]:
        found: NDArray[np.float64] = figures[:, :, COLUMN[name]]
        return found

    values = {
        Signal.RUNNING: column("running"),
        Signal.WAITING: waiting_at(figures),
        Signal.KV_CACHE_USAGE: column("kv_cache_usage"),
        Signal.FINISHED: column("finished"),
        Signal.PROMPT_TOKENS: column("prompt_tokens"),
        Signal.GENERATION_TOKENS: column("generation_tokens"),
        Signal.PREEMPTIONS: column("preemptions"),
    }
    return Recent(end_s=end_s, step_s=step_s, replicas=names, values=values)


def demand_of(rows: NDArray[np.floating], *, end_s: float, step_s: float) -> Demand:
    """Rows of DEMAND_FEATURES, one a step, the last ending at `end_s`."""
    figures = np.asarray(rows, dtype=np.float64).reshape(-1, 4)
    arrived, finished, prompt_tokens, output_tokens = figures.T
    return Demand(
        end_s=end_s,
        step_s=step_s,
        arrived=arrived,
        finished=finished,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )


def history_of(ends_s: Sequence[float], rows: Sequence[NDArray[np.floating]]) -> Demand:
    """Minutes of a deployment's demand on a grid without gaps: NaN where a minute is not known."""
    if not ends_s:
        return demand_of(np.empty((0, 4)), end_s=0.0, step_s=MINUTE_S)
    first, last = ends_s[0], ends_s[-1]
    grid = np.full((round((last - first) / MINUTE_S) + 1, 4), math.nan)
    for end_s, row in zip(ends_s, rows, strict=True):
        grid[round((end_s - first) / MINUTE_S)] = row
    return demand_of(grid, end_s=last, step_s=MINUTE_S)
