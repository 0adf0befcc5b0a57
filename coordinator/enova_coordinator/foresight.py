"""Asks the policies that look ahead: gathers a deployment's situation, asks in the child, keeps their memory.

The memory lives as long as this coordinator leads. A new leader starts with an empty one: what a policy learnt is
learnt anew within minutes, and the history that its forecast rests on is in the rollups.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from enova_coordinator.capacities import Capacities
from enova_coordinator.core import situation as gather
from enova_coordinator.core.model import DecisionInput, Deployment, Replica, Snapshot
from enova_coordinator.core.recording import Recorded
from enova_coordinator.core.verdicts import Verdict
from enova_coordinator.demand_history import DemandHistory
from enova_coordinator.policy_process import PolicyProcess
from enova_coordinator.telemetry import Telemetry
from enova_recommender.scaling import foreseeing
from enova_recommender.scaling.situation import Decided, Floats, Memory, Recent, Signal, Situation, StartUp, Wish
from enova_recommender.scaling.types import Observation
from enova_recommender.types import VerdictKind

WINDOW_S = 600.0                   # of steps that a policy is told, as far as telemetry keeps them
STEPS_KEPT = 60                    # of each series in a decision's record
STARTS_KEPT = 64                   # of a model, that its start-up time is learnt from


@dataclass(frozen=True, slots=True)
class Asked:
    """What a policy was told, and what it said."""

    situation: Situation
    decided: Decided
    doubt: str                         # why the capacity in it is no more than a guess; empty where it is more


def decide(question: tuple[str, Situation, Memory]) -> Decided:
    """Runs in the child: what the policy of this name says."""
    name, situation, memory = question
    return foreseeing(name).decide(situation, memory)


class Foresight:
    """One for each term. `scale` is model seconds in a real one."""

    def __init__(
        self,
        telemetry: Telemetry,
        history: DemandHistory,
        capacities: Capacities,
        process: PolicyProcess,
        *,
        verdicts: Callable[[], Mapping[str, Verdict]],
        scale: float,
        wall_s: Callable[[], float] = time.time,
        record: Callable[[str, Recorded], None] | None = None,
    ) -> None:
        self._record = record
        self._telemetry = telemetry
        self._history = history
        self._capacities = capacities
        self._process = process
        self._verdicts = verdicts
        self._scale = scale
        self._wall_s = wall_s
        self._memory: dict[str, Memory] = {}
        self._starts: dict[str, deque[float]] = {}
        self._started: dict[str, float] = {}

    async def ask(
        self, policy: str, deployment: Deployment, snapshot: Snapshot, *, minutes: Observation | None, last_act_s: float
    ) -> Asked | str:
        """The policy's wish for the deployment as it stands, or why it could not be asked."""
        situation = await self._situation(deployment, snapshot, minutes=minutes, last_act_s=last_act_s)
        if isinstance(situation, str):
            return situation
        memory = self._memory.get(deployment.uid, {})
        decided = await self._process.run(decide, (policy, situation, memory))
        self._memory[deployment.uid] = decided.memory
        if self._record is not None:
            question = Recorded(
                uid=deployment.uid, policy=policy, situation=situation, memory=memory, wish=decided.wish
            )
            self._record(deployment.name, question)
        newest = situation.variants[-1].name if situation.variants else ""
        return Asked(situation, decided, self._capacities.doubt(newest))

    def forget(self, snapshot: Snapshot) -> None:
        """Drop what belongs to deployments and replicas that are gone."""
        uids = {deployment.uid for deployment in snapshot.deployments.values()}
        for uid in [uid for uid in self._memory if uid not in uids]:
            del self._memory[uid]
        for name in [name for name in self._started if name not in snapshot.replicas]:
            del self._started[name]
        models = {deployment.spec.model for deployment in snapshot.deployments.values()}
        for model in [model for model in self._starts if model not in models]:
            del self._starts[model]
        self._history.forget(snapshot.deployments.__contains__)
        self._capacities.forget(snapshot)

    async def _situation(
        self, deployment: Deployment, snapshot: Snapshot, *, minutes: Observation | None, last_act_s: float
    ) -> Situation | str:
        telemetry, limits, now_s = self._telemetry, self._telemetry.limits, self._telemetry.now_s
        variants = [variant for variant in snapshot.variants_of(deployment.name) if not variant.retired]
        if not variants:
            return "it has no variant yet"
        current = variants[-1]
        capacity = self._capacities.of(deployment, current)
        steps = max(1, round(min(WINDOW_S, limits.window_s) / limits.step_s) - 1)
        start_s, demand = telemetry.demand_window(deployment.name, steps=steps)
        end_s = start_s + len(demand) * limits.step_s
        replicas, verdicts = snapshot.replicas_of(deployment.name), self._verdicts()
        price = gather.Price(
            usd_per_hour=self._capacities.usd_per_hour(current), places=gather.places(snapshot, deployment, current)
        )
        return Situation(
            now_s=now_s,
            deployment=deployment.name,
            bounds=gather.bounds_of(deployment),
            objective=gather.objective_of(deployment),
            variants=gather.variant_sights(
                [current],
                target=deployment.status.target_replicas,
                capacities={current.name: capacity},
                prices={current.name: price},
                starts=self._start_up(deployment.spec.model, snapshot),
            ),
            replicas=gather.sights(
                replicas, verdicts, model_s=now_s, wall_s=self._wall_s(), scale=self._scale
            ),
            recent=self._recent(replicas, end_s=end_s, steps=len(demand)),
            demand=gather.demand_of(demand, end_s=end_s, step_s=limits.step_s),
            history=await self._history.of(deployment.name),
            minutes=minutes,
            held=telemetry.held_nowhere(deployment.name),
            last_act_s=last_act_s,
            conservatism=deployment.spec.conservatism,
            fleet_lost_share=gather.fleet_lost_share(snapshot.nodes.values()),
            # Until the detector has said anything a policy goes by the data alone.
            verdict=verdicts[deployment.name].kind if deployment.name in verdicts else VerdictKind.NORMAL,
        )

    def _recent(self, replicas: tuple[Replica, ...], *, end_s: float, steps: int) -> Recent:
        """The same steps as the demand's: the newest one, which is not over, is left out."""
        windows = {}
        for replica in replicas:
            found = self._telemetry.replica_window(replica.name, steps=steps + 1)
            if found is not None and len(found[1]) == steps + 1:
                windows[replica.name] = found[1][:-1]
        return gather.recent_of(windows, end_s=end_s, step_s=self._telemetry.limits.step_s)

    def _start_up(self, model: str, snapshot: Snapshot) -> StartUp:
        """Learnt from all starts of the model that this leader saw end, whatever deployment they were of."""
        seen = self._starts.setdefault(model, deque(maxlen=STARTS_KEPT))
        owners = {each.name for each in snapshot.deployments.values() if each.spec.model == model}
        found = gather.starts_s(each for each in snapshot.replicas.values() if each.deployment in owners)
        for replica, took_s in found.items():
            if replica not in self._started:
                self._started[replica] = took_s
                seen.append(took_s * self._scale)
        return gather.start_up(seen)


def inputs_of(situation: Situation, wish: Wish) -> Iterator[DecisionInput]:
    """The newest part of the series that the policy saw, and the band that it forecast."""
    demand, recent = situation.demand, situation.recent
    for feature, values in (("arrived", demand.arrived), ("finished", demand.finished)):
        yield _input(situation.deployment, feature, values, end_s=demand.end_s, step_s=demand.step_s)
    for row, replica in enumerate(recent.replicas):
        for signal in (Signal.RUNNING, Signal.WAITING):
            if signal in recent.values:
                series = recent.values[signal][row]
                yield _input(replica, signal.value, series, end_s=recent.end_s, step_s=recent.step_s)
    if (forecast := wish.forecast) is not None:
        yield DecisionInput(
            object=situation.deployment,
            feature="forecast_requests_per_s",     # low, median, high
            start_s=forecast.at_s,
            step_s=0.0,
            values=(forecast.low, forecast.p50, forecast.high),
        )


def _input(name: str, feature: str, values: Floats, *, end_s: float, step_s: float) -> DecisionInput:
    """Stamped with the ends of the steps, as all series of decisions are."""
    kept = values[-STEPS_KEPT:]
    start_s = end_s - step_s * (len(kept) - 1)
    return DecisionInput(
        object=name, feature=feature, start_s=start_s, step_s=step_s, values=tuple(float(each) for each in kept)
    )
