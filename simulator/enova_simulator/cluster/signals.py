"""What the leader knows of one simulated deployment: gauges and counts by steps, minutes, and the `Situation`.

Theory of operation. Gauges of READY replicas are sampled every second and averaged over a step; counts are what a
step added. A figure is with the leader `delay_s` after its step ended, and never where it fell into a gap. Lengths
of requests are known when they finish.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from enova_recommender.scaling.bounds import Bounds
from enova_recommender.scaling.situation import (
    Demand,
    Phase,
    Recent,
    ReplicaSight,
    Signal,
    Situation,
    StartUp,
    VariantSight,
)
from enova_recommender.scaling.types import Feature, Observation, ReplicaSeries, Series
from enova_recommender.types import VerdictKind
from enova_simulator.cluster.crew import Member, Stage
from enova_simulator.cluster.engines import Engines
from enova_simulator.cluster.kernel import columns as at
from enova_simulator.cluster.kernel.state import Floats
from enova_simulator.cluster.serving import Desk
from enova_simulator.cluster.setup import DeploymentSetup, Facts, Ill, Telemetry, VariantSetup

SIGNALS = tuple(Signal)
MINUTE_S = 60.0
MINUTES_TOLD = 60                  # of the series that ENOVA 0.0.7 looks at
STARTS_LEARNT = 3                  # before which the prior is told
_COUNTERS = [at.FINISHES, at.PREFILLED, at.DECODED, at.PREEMPTIONS, at.FIRSTS, at.TTFT_SUM, at.TPOT_SUM, at.BUSY]
_PHASES = {
    Stage.PENDING: Phase.PENDING, Stage.STARTING: Phase.STARTING, Stage.READY: Phase.READY, Stage.LOST: Phase.READY,
}  # fmt: skip


class Detector(Protocol):
    """What says how a replica is."""

    def verdict(self, member: Member, now_s: float) -> tuple[VerdictKind, str]:
        """The verdict on it now, and the cause of a DEGRADED one."""
        ...


@dataclass(frozen=True, slots=True)
class Told:
    """A detector that is right, so many seconds after the onset: an assumption, not the production detector."""

    after_s: float

    def verdict(self, member: Member, now_s: float) -> tuple[VerdictKind, str]:
        """The verdict on it now, and the cause of a DEGRADED one."""
        if member.stage is Stage.LOST:
            return VerdictKind.DEGRADED, "DEAD"
        if member.ill in {Ill.SLOW, Ill.HUNG} and now_s - member.ill_since_s >= self.after_s:
            return VerdictKind.DEGRADED, str(member.ill)
        return VerdictKind.NORMAL, ""


@dataclass(slots=True)
class _Track:
    """The steps of one replica since it became READY."""

    first: int
    values: Floats                 # signals x steps, NaN where nothing was measured
    length: int = 0

    def append(self, row: Floats) -> None:
        if self.length == self.values.shape[1]:
            self.values = np.concatenate([self.values, np.full_like(self.values, np.nan)], axis=1)
        self.values[:, self.length] = row
        self.length += 1


@dataclass(slots=True)
class _Counts:
    """Demand by steps of equal length."""

    arrived: list[float] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)
    prompt_tokens: list[float] = field(default_factory=list)
    output_tokens: list[float] = field(default_factory=list)

    def append(self, row: Sequence[float]) -> None:
        for values, value in zip(self.columns(), row, strict=True):
            values.append(value)

    def columns(self) -> tuple[list[float], ...]:
        return self.arrived, self.finished, self.prompt_tokens, self.output_tokens

    def demand(self, first: int, last: int, *, step_s: float, before: Demand | None = None) -> Demand:
        """Steps `first` to `last` (exclusive), after those of `before`."""
        parts = [np.array(values[first:last]) for values in self.columns()]
        if before is not None:
            old = (before.arrived, before.finished, before.prompt_tokens, before.output_tokens)
            parts = [np.concatenate([past, part]) for past, part in zip(old, parts, strict=True)]
        arrived, finished, prompts, outputs = parts
        return Demand(
            end_s=last * step_s, step_s=step_s, arrived=arrived, finished=finished, prompt_tokens=prompts,
            output_tokens=outputs,
        )  # fmt: skip


class Watch:
    """Telemetry of one deployment."""

    def __init__(self, setup: DeploymentSetup, telemetry: Telemetry, engines: Engines, desk: Desk) -> None:
        self._setup, self._telemetry, self._engines, self._desk = setup, telemetry, engines, desk
        self._last = np.zeros((engines.count, len(_COUNTERS)))
        self._gauges = np.zeros((engines.count, 3))
        self._samples = np.zeros(engines.count)
        self._tracks: dict[str, _Track] = {}
        self._steps, self._minutes = _Counts(), _Counts()
        self._arrived = 0
        self._starts: dict[str, list[float]] = {variant.name: [] for variant in setup.variants}
        self._series: tuple[int, tuple[ReplicaSeries, ...]] = (-1, ())
        self.finished: list[int] = []          # requests, since the last step

    def ready(self, member: Member) -> None:
        """A replica is READY, its engine new."""
        self._last[member.engine] = 0.0
        self._gauges[member.engine], self._samples[member.engine] = 0.0, 0.0
        empty = np.full((len(SIGNALS), 256), np.nan)
        self._tracks[member.name] = _Track(first=len(self._steps.arrived), values=empty)

    def started(self, variant: VariantSetup, seconds: float) -> None:
        """A start took so long."""
        self._starts[variant.name].append(seconds)

    def gone(self, member: Member) -> None:
        """A replica is not told any more."""
        self._tracks.pop(member.name, None)

    def sample(self, members: Sequence[Member]) -> None:
        """Look at the gauges of these READY replicas; the engines are settled."""
        if not members:
            return
        index = [member.engine for member in members]
        rows = self._engines.state.engines[index]
        queued = [
            served.gate.queued if (served := self._desk.by_engine.get(number)) is not None else 0 for number in index
        ]
        blocks = self._engines.state.limits[rows[:, at.KIND], at.BLOCKS]
        used = (rows[:, at.PRIVATE] + rows[:, at.SHARED]) / blocks
        self._gauges[index] += np.stack([rows[:, at.RUNNING], rows[:, at.WAITING] + queued, used], axis=1)
        self._samples[index] += 1

    def step(self, members: Sequence[Member], prompts: Floats, outputs: Floats) -> None:
        """End a step."""
        number = len(self._steps.arrived)
        blind = self._blind((number + 1) * self._telemetry.step_s)
        for member in members:
            track = self._tracks[member.name]
            row = self._row(member)
            track.append(np.full(len(SIGNALS), np.nan) if blind else row)
        ended, self.finished = np.array(self.finished, dtype=np.int64), []
        came, self._arrived = self._desk.arrived - self._arrived, self._desk.arrived
        counts = (float(came), float(len(ended)), float(prompts[ended].sum()), float(outputs[ended].sum()))
        self._steps.append((math.nan,) * 4 if blind else counts)
        a_minute = round(MINUTE_S / self._telemetry.step_s)
        if (number + 1) % a_minute == 0:
            parts = [np.array(values[-a_minute:]) for values in self._steps.columns()]
            self._minutes.append([math.nan if np.isnan(part).all() else float(np.nansum(part)) for part in parts])

    def situation(
        self, members: Sequence[Member], *, now_s: float, targets: dict[str, int], detector: Detector,
        room: Callable[[VariantSetup], int], last_act_s: float, lost_share: float,
    ) -> Situation:  # fmt: skip
        """What is known at `now_s`."""
        telemetry, setup = self._telemetry, self._setup
        known = max(0, math.floor((now_s - telemetry.delay_s) / telemetry.step_s + 1e-9))
        known = min(known, len(self._steps.arrived))
        first = max(0, known - round(telemetry.window_s / telemetry.step_s))
        told = [member for member in members if member.present]
        demand = self._steps.demand(first, known, step_s=telemetry.step_s)
        seen = demand.arrived[-1:].size > 0 and not np.isnan(demand.arrived[-1])
        minute = math.floor(known * telemetry.step_s / MINUTE_S + 1e-9)
        return Situation(
            now_s=now_s, deployment=setup.name,
            bounds=Bounds(min_replicas=setup.bounds.min_replicas, max_replicas=setup.bounds.max_replicas),
            objective=setup.objective,
            variants=tuple(self._variant(each, members, targets, room) for each in setup.variants),
            replicas=tuple(_sight(member, detector, now_s) for member in told),
            recent=self._recent(told, first, known), demand=demand,
            history=self._minutes.demand(0, minute, step_s=MINUTE_S, before=setup.history),
            minutes=self._observation(told, minute, now_s, setup.facts) if setup.facts is not None else None,
            held=len(self._desk.held), last_act_s=last_act_s, conservatism=setup.conservatism,
            fleet_lost_share=lost_share, verdict=VerdictKind.NORMAL if seen else VerdictKind.UNKNOWN,
        )  # fmt: skip

    def _blind(self, at_s: float) -> bool:
        return any(gap.start_s < at_s <= gap.end_s for gap in self._telemetry.gaps)

    def _row(self, member: Member) -> Floats:
        """What one step measured of a replica, in the order of SIGNALS."""
        number, step_s = member.engine, self._telemetry.step_s
        totals = self._engines.state.clocks[number, _COUNTERS]
        added = totals - self._last[number]
        self._last[number] = totals
        samples = self._samples[number]
        running, waiting, used = self._gauges[number] / samples if samples else (math.nan,) * 3
        self._gauges[number], self._samples[number] = 0.0, 0.0
        finished, prefilled, decoded, preempted, firsts, ttft, tpot, busy = added
        return np.array([
            running, waiting, used, 1.0 if member.ill is Ill.HUNG else min(1.0, busy / step_s), finished, prefilled,
            decoded, preempted, ttft / firsts if firsts else math.nan, tpot / finished if finished else math.nan,
        ])  # fmt: skip

    def _recent(self, told: Sequence[Member], first: int, known: int) -> Recent:
        seen = [member for member in told if member.name in self._tracks]
        cube = np.full((len(SIGNALS), len(seen), known - first), np.nan)
        for place, member in enumerate(seen):
            track = self._tracks[member.name]
            start, end = max(first, track.first), min(known, track.first + track.length)
            if start < end:
                cube[:, place, start - first : end - first] = track.values[:, start - track.first : end - track.first]
        return Recent(
            end_s=known * self._telemetry.step_s, step_s=self._telemetry.step_s,
            replicas=tuple(member.name for member in seen),
            values={signal: cube[place] for place, signal in enumerate(SIGNALS)},
        )  # fmt: skip

    def _variant(
        self, variant: VariantSetup, members: Sequence[Member], targets: dict[str, int],
        room: Callable[[VariantSetup], int],
    ) -> VariantSight:  # fmt: skip
        holding = sum(member.variant is variant and member.stage is not Stage.PENDING for member in members)
        starts = self._starts[variant.name]
        start_up = variant.start_up
        if len(starts) >= STARTS_LEARNT:
            p50, p90 = np.quantile(starts, [0.5, 0.9]).tolist()
            start_up = StartUp(p50_s=p50, p90_s=p90, count=len(starts))
        return VariantSight(
            name=variant.name, target=targets[variant.name], gpu_type=variant.gpu_type, gpus=variant.gpus,
            usd_per_hour=variant.usd_per_hour, capacity=variant.capacity, start_up=start_up,
            places=holding + room(variant),
        )  # fmt: skip

    def _observation(self, told: Sequence[Member], minute: int, now_s: float, facts: Facts) -> Observation:
        if self._series[0] != minute:
            self._series = minute, tuple(self._six(member, minute) for member in told if member.name in self._tracks)
        return Observation(
            now_s=now_s, replicas=len(told), series=self._series[1], configuration=facts.configuration,
            model=facts.model, gpu=facts.gpu,
        )  # fmt: skip

    def _six(self, member: Member, minute: int) -> ReplicaSeries:
        """The six series of a replica by whole minutes."""
        track, a_minute = self._tracks[member.name], round(MINUTE_S / self._telemetry.step_s)
        start = max(minute - MINUTES_TOLD, math.ceil(track.first / a_minute))
        count = max(0, min(minute, (track.first + track.length) // a_minute) - start)
        if not count:
            return ReplicaSeries(replica=member.name, series={})
        begin = start * a_minute - track.first
        steps = track.values[:, begin : begin + count * a_minute].reshape(len(SIGNALS), count, a_minute)
        value = dict(zip(SIGNALS, steps, strict=True))
        running, waiting = value[Signal.RUNNING].mean(axis=1), value[Signal.WAITING].mean(axis=1)
        success = value[Signal.FINISHED].sum(axis=1)
        # What a replica took in is what it gave out and what it has more than before.
        held = value[Signal.RUNNING][:, -1] + value[Signal.WAITING][:, -1]
        new = np.maximum(0.0, success + np.diff(held, prepend=held[0]))
        columns = {
            Feature.ACTIVE: running + waiting, Feature.RUNNING: running, Feature.PENDING: waiting, Feature.NEW: new,
            Feature.SUCCESS: success, Feature.KV_USAGE: 100 * value[Signal.KV_CACHE_USAGE].mean(axis=1),
        }  # fmt: skip
        return ReplicaSeries(replica=member.name, series={
            feature: Series(start_s=(start + 1) * MINUTE_S, step_s=MINUTE_S, values=tuple(values.tolist()))
            for feature, values in columns.items()
        })  # fmt: skip


def _sight(member: Member, detector: Detector, now_s: float) -> ReplicaSight:
    verdict, cause = detector.verdict(member, now_s)
    return ReplicaSight(
        name=member.name, variant=member.variant.name, phase=_PHASES[member.stage], since_s=member.since_s,
        verdict=verdict, cause=cause,
    )  # fmt: skip
