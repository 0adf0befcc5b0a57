"""What came of a run: a row a request, a row a replica, and the figures that are made of them.

Attainment: share of *sent* requests whose first token came within max(T0, 3 x its unloaded prefill time) and whose
mean gap between tokens was within the target; whatever was refused, cut or not finished missed. GPU-hours count from
the start command to the process's exit. The first 10 minutes are left out of both attainment and the figures of time.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from enova_recommender.scaling.situation import Objective
from enova_simulator.cluster.acts import Acts
from enova_simulator.cluster.crew import Roll
from enova_simulator.cluster.engines import Engines
from enova_simulator.cluster.kernel import columns as at
from enova_simulator.cluster.kernel.state import Bytes, Floats, Ints, Longs
from enova_simulator.cluster.serving import Fate
from enova_simulator.cluster.setup import FleetSetup, Traffic, VariantSetup

WARM_UP_S = 600.0
WORST_WINDOW_S = 300.0
UNLOADED_TIMES = 3.0               # the unloaded prefill time that a first token may take


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Requested:
    """A row a request; NaN where something did not happen. `first_s` counts from the arrival."""

    deployment: Longs
    arrival_s: Floats
    first_s: Floats                # TTFT
    finish_s: Floats               # when the last token came
    tpot_s: Floats                 # mean gap between tokens; 0 with a single one
    prompt_tokens: Longs
    output_tokens: Longs
    cached_tokens: Ints
    preemptions: Ints
    fate: Bytes
    limit_s: Floats                # that the first token may take
    met: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lived:
    """One replica: `started_s` is when GPUs were taken (NaN: never), `gone_s` NaN if it outlived the run."""

    name: str
    deployment: str
    variant: str
    gpus: int
    usd_per_hour: float
    created_s: float
    started_s: float
    ready_s: float
    gone_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record:
    """All that came of a run."""

    end_s: float
    deployments: tuple[str, ...]
    requested: Requested
    lived: tuple[Lived, ...]
    acts: Mapping[str, Acts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What is said of one deployment's run. NaN where there was no request."""

    requests: int
    attainment: float
    gpu_hours: float
    cost_usd: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p99_s: float
    worst_5_minutes: float         # attainment of the worst whole window
    direction_changes_per_hour: float
    acts: int
    refused: int
    cut: int
    open: int
    nonsense: int                  # wishes that were not followed


def record_of(
    setup: FleetSetup, traffic: Traffic, engines: Engines, *, fates: Bytes, kinds: Ints, rolls: Sequence[Roll],
    acts: Sequence[Acts],
) -> Record:  # fmt: skip
    """Put together what a run left behind."""
    names = tuple(deployment.name for deployment in setup.deployments)
    members = [(names[place], member) for place, roll in enumerate(rolls) for member in [*roll.gone, *roll.members]]
    lived = tuple(
        Lived(
            name=member.name, deployment=name, variant=member.variant.name, gpus=member.variant.gpus,
            usd_per_hour=member.variant.usd_per_hour, created_s=member.created_s, started_s=member.started_s,
            ready_s=member.ready_s, gone_s=member.gone_s,
        )
        for name, member in sorted(members, key=lambda pair: (pair[1].created_s, pair[1].name))
    )  # fmt: skip
    return Record(
        end_s=setup.end_s, deployments=names, requested=_requested(setup, traffic, engines, fates, kinds),
        lived=lived, acts=dict(zip(names, acts, strict=True)),
    )  # fmt: skip


def figures(record: Record, deployment: str, *, until_s: float | None = None, warm_up_s: float = WARM_UP_S) -> Figures:
    """The figures of one deployment, over what arrived after the warm-up and, if given, before `until_s`."""
    last_s = record.end_s if until_s is None else until_s
    rows = record.requested
    chosen = rows.deployment == record.deployments.index(deployment)
    chosen &= (rows.arrival_s >= warm_up_s) & (rows.arrival_s < last_s)
    met, fate, ttft = rows.met[chosen], rows.fate[chosen], rows.first_s[chosen]
    late = np.where(np.isnan(ttft), np.inf, ttft)
    served = fate == Fate.SERVED
    acts = record.acts[deployment]
    hours = max(last_s - warm_up_s, 1.0) / 3600.0
    return Figures(
        requests=int(chosen.sum()),
        attainment=float(met.mean()) if len(met) else float("nan"),
        gpu_hours=_held(record, deployment, warm_up_s, last_s, cost=False),
        cost_usd=_held(record, deployment, warm_up_s, last_s, cost=True),
        ttft_p50_s=_quantile(late, 0.5), ttft_p99_s=_quantile(late, 0.99),
        tpot_p99_s=_quantile(rows.tpot_s[chosen][served], 0.99),
        worst_5_minutes=_worst(rows.arrival_s[chosen], met, warm_up_s, last_s),
        direction_changes_per_hour=direction_changes(acts, since_s=warm_up_s) / hours,
        acts=len(acts.done), refused=int((fate == Fate.REFUSED).sum()), cut=int((fate == Fate.CUT).sum()),
        open=int((fate == Fate.OPEN).sum()), nonsense=len(acts.refused),
    )  # fmt: skip


def direction_changes(acts: Acts, *, since_s: float = 0.0) -> int:
    """How often the target turned from rising to falling or back."""
    signs = [np.sign(act.after - act.before) for act in acts.done if act.at_s >= since_s and act.after != act.before]
    return sum(one != other for one, other in itertools.pairwise(signs))


def replicas_over_time(record: Record, deployment: str, *, step_s: float) -> tuple[Floats, Floats]:
    """Replicas that hold GPUs, and those that are READY, at each step from 0."""
    grid = np.arange(0.0, record.end_s, step_s)
    holding, ready = np.zeros(len(grid)), np.zeros(len(grid))
    for one in record.lived:
        if one.deployment != deployment or np.isnan(one.started_s):
            continue
        end_s = np.inf if np.isnan(one.gone_s) else one.gone_s
        holding += (grid >= one.started_s) & (grid < end_s)
        if not np.isnan(one.ready_s):
            ready += (grid >= one.ready_s) & (grid < end_s)
    return holding, ready


def _requested(setup: FleetSetup, traffic: Traffic, engines: Engines, fates: Bytes, kinds: Ints) -> Requested:
    requests, times, rows = traffic.requests, engines.state.times, engines.state.requests
    trip_s, limit_s, gap_s = (np.zeros(len(requests)) for _ in range(3))
    kind = 0
    for place, deployment in enumerate(setup.deployments):
        chosen = traffic.deployment == place
        limit_s[chosen] = _limits(deployment.objective, deployment.variants[0], requests.prompt_tokens[chosen])
        gap_s[chosen] = deployment.objective.tpot_s
        for variant in deployment.variants:
            trip_s[kinds == kind] = variant.first_token_delay_s + setup.round_trip_s.get(variant.site, 0.0)
            kind += 1
    first = times[:, at.FIRST] - times[:, at.ARRIVAL] + trip_s
    served = fates == Fate.SERVED
    spans = times[:, at.FINISH] - times[:, at.FIRST]
    tpot = np.where(served, spans / np.maximum(requests.output_tokens - 1, 1), np.nan)
    return Requested(
        deployment=traffic.deployment, arrival_s=requests.arrival_s, first_s=first,
        finish_s=np.where(served, times[:, at.FINISH] + trip_s, np.nan), tpot_s=tpot,
        prompt_tokens=requests.prompt_tokens, output_tokens=requests.output_tokens,
        cached_tokens=rows[:, at.CACHED], preemptions=rows[:, at.PREEMPTED], fate=fates, limit_s=limit_s,
        met=served & (first <= limit_s) & (tpot <= gap_s),
    )  # fmt: skip


def _limits(objective: Objective, variant: VariantSetup, prompts: Longs) -> Floats:
    """What the first token may take, by the first variant's unloaded times."""
    known = sorted(variant.unloaded_ttft_s.items())
    if not known:
        return np.full(len(prompts), objective.ttft_s)
    tokens, seconds = np.array(known, dtype=np.float64).T
    return np.asarray(np.maximum(objective.ttft_s, UNLOADED_TIMES * np.interp(prompts, tokens, seconds)))


def _held(record: Record, deployment: str, start_s: float, end_s: float, *, cost: bool) -> float:
    total = 0.0
    for one in record.lived:
        if one.deployment != deployment or np.isnan(one.started_s):
            continue
        gone_s = end_s if np.isnan(one.gone_s) else min(one.gone_s, end_s)
        hours = max(0.0, gone_s - max(one.started_s, start_s)) / 3600.0
        total += hours * (one.usd_per_hour if cost else one.gpus)
    return total


def _worst(arrival_s: Floats, met: NDArray[np.bool_], start_s: float, end_s: float) -> float:
    edges = np.arange(start_s, end_s + 1e-9, WORST_WINDOW_S)
    if len(edges) < 2 or not len(met):
        return float("nan")
    sent = np.histogram(arrival_s, edges)[0]
    good = np.histogram(arrival_s[met], edges)[0]
    return float(np.min(good[sent > 0] / sent[sent > 0])) if np.any(sent) else float("nan")


def _quantile(values: Floats, share: float) -> float:
    return float(np.quantile(values, share, method="higher")) if len(values) else float("nan")
