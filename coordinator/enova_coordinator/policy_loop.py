"""The leader's scaling loop: stored frames to a policy in its child process, proposals to recorded decisions.

Each round asks for every deployment that serves, autoscaled or not: the verdict is shown for all, and acts follow for
those that `core.scaling_guard` lets pass. What a policy saw is recorded with the decision: its series, and the newest
frame of each node that they came from.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from enova_common.errors import Corrupt, EnovaError
from enova_coordinator.agents import Agents, ModelFacts
from enova_coordinator.core import verdicts
from enova_coordinator.core.model import Decision, DecisionAction, DecisionInput, Deployment, NodeState, Snapshot
from enova_coordinator.core.observation import (
    FEATURES,
    gpu_facts,
    model_facts,
    series_of,
    sizes,
    wanted_replicas,
)
from enova_coordinator.core.precedence import yielding
from enova_coordinator.core.ruling_record import record_of
from enova_coordinator.core.scaling_guard import RECORDED, History, Ruling, replacements, rule, rule_wish
from enova_coordinator.foresight import Foresight, inputs_of
from enova_coordinator.known_models import KnownModels
from enova_coordinator.policy_process import PolicyProcess
from enova_coordinator.settings import ScalingSettings
from enova_coordinator.store import Entry, Store, codec
from enova_coordinator.telemetry import Telemetry
from enova_recommender.catalog import models as catalogue
from enova_recommender.scaling import DEFAULT_POLICY, FORESEEING
from enova_recommender.scaling.types import Action, Observation, Proposal, ReplicaSeries
from enova_recommender.scaling.types import ModelFacts as PolicyModelFacts

MINUTES = 9                        # of each series that a policy gets: it needs five, and looks at three
ANSWER_WAIT_S = 0.5                # for what a host knows of a model, in the round that asks
PRECEDENCE = "policy/precedence"    # the actor of what a deployment gives up for a more urgent one
AHEAD_INTERVAL_S = 15.0            # model time between two questions to a policy that looks ahead
BEAT_S = 1.0                       # real time between two looks at who is due
INTERVAL_REAL_S_MIN = 0.2          # under a fast model clock

log = logging.getLogger(__name__)


class Control(Protocol):
    """The part of the controller that scaling needs."""

    snapshot: Snapshot

    async def set_target(
        self, deployment: str, replicas: int, decision: Decision, *, leave_first: tuple[str, ...] = ()
    ) -> None:
        """Make this the deployment's target and record why."""
        ...

    async def record_decision(self, decision: Decision) -> Decision:
        """Record a decision that changes nothing."""
        ...

    async def replace(self, replica: str, decision: Decision) -> None:
        """Have a new replica take this one's part, and record why."""
        ...


@dataclass(slots=True)
class PolicyLoopFigures:
    """What the loop did, for the coordinator's own metrics."""

    rounds: int = 0
    proposals: int = 0
    failures: int = 0
    decisions: dict[str, int] = field(default_factory=dict)


class PolicyLoop:
    """Asks, judges and acts, while this coordinator leads."""

    def __init__(
        self,
        store: Store,
        control: Control,
        telemetry: Telemetry,
        agents: Agents,
        process: PolicyProcess,
        *,
        settings: ScalingSettings,
        real_s: Callable[[float], float],
        verdicts_by_name: dict[str, verdicts.Verdict],
        models: KnownModels,
        dead: Callable[[], frozenset[str]] = frozenset,
        foresight: Foresight | None = None,
    ) -> None:
        self.figures = PolicyLoopFigures()
        self._store = store
        self._control = control
        self._telemetry = telemetry
        self._agents = agents
        self._process = process
        self._settings = settings
        self._interval_s = max(INTERVAL_REAL_S_MIN, real_s(settings.interval_s))
        self._ahead_interval_s = max(INTERVAL_REAL_S_MIN, real_s(AHEAD_INTERVAL_S))
        self._beat_s = max(INTERVAL_REAL_S_MIN, min(BEAT_S, self._interval_s, self._ahead_interval_s))
        self._last_asked_s: dict[str, float] = {}
        self._verdicts = verdicts_by_name
        self._models = models
        self._dead = dead
        self._foresight = foresight
        self._last_act_s: dict[str, float] = {}
        self._held: dict[str, tuple[str, int]] = {}
        self._asked: dict[str, asyncio.Task[ModelFacts]] = {}

    async def run(self) -> None:
        """Ask round after round, until cancelled."""
        try:
            await self._rounds()
        finally:
            for question in self._asked.values():
                question.cancel()

    async def _rounds(self) -> None:
        while True:
            started_s = time.monotonic()
            for name in list(self._control.snapshot.deployments):
                # Others were waited for meanwhile: it may be another by now, or gone.
                deployment = self._control.snapshot.deployments.get(name)
                if deployment is not None and not deployment.deleting and self._is_due(deployment, started_s):
                    await self._step(deployment)
            await self._make_room()
            self._forget()
            self.figures.rounds += 1
            await asyncio.sleep(max(INTERVAL_REAL_S_MIN, self._beat_s - (time.monotonic() - started_s)))

    async def _make_room(self) -> None:
        """Let a less urgent deployment give way where a more urgent one waits for GPUs."""
        step = yielding(self._control.snapshot, now_s=time.time())
        if step is None:
            return
        before = self._control.snapshot.deployments[step.deployment]
        ruling = Ruling(action=DecisionAction.SCALE_DOWN, to_replicas=step.to_replicas, reason=step.reason)
        decision = record_of(ruling, before, actor=PRECEDENCE, model_time_s=self._telemetry.now_s)
        try:
            await self._control.set_target(before.name, step.to_replicas, decision)
        except EnovaError as error:
            log.warning("%s does not give way: %s", before.name, error)
        except Exception:
            # A defect here must cost one step, not the leader its term.
            log.exception("%s does not give way", before.name)

    def _is_due(self, deployment: Deployment, now_s: float) -> bool:
        """Whether it is time to ask this deployment's policy again: by its kind's pace, or since requests wait."""
        ahead = (deployment.spec.policy or DEFAULT_POLICY) in FORESEEING
        interval_s = self._ahead_interval_s if ahead else self._interval_s
        # Half a beat early is in time: the next one would be late by more.
        slack_s = self._beat_s / 2
        sleeps = ahead and deployment.status.target_replicas == 0
        woken = sleeps and self._telemetry.held_nowhere(deployment.name) > 0
        if not woken and now_s - self._last_asked_s.get(deployment.name, -math.inf) < interval_s - slack_s:
            return False
        self._last_asked_s[deployment.name] = now_s
        return True

    async def _step(self, deployment: Deployment) -> None:
        """One deployment; its failure is kept as its verdict, and costs the others nothing."""
        policy = deployment.spec.policy or DEFAULT_POLICY
        try:
            await self._decide(deployment, policy)
        except EnovaError as error:
            log.warning("no decision for %s: %s", deployment.name, error)
            reason = str(error)
        except Exception as error:
            # A defect here must cost one deployment its decisions, not the leader its term.
            log.exception("no decision for %s", deployment.name)
            reason = f"internal error: {type(error).__name__}"
        else:
            return
        self.figures.failures += 1
        self._say(verdicts.unknown(deployment.name, policy, reason, now_s=time.time()))

    async def _decide(self, deployment: Deployment, policy: str) -> None:
        now_s = self._telemetry.now_s
        model = await self._model(deployment)
        dead = self._dead_of(deployment)
        observed = self._observe(deployment, model, now_s, dead)
        if policy in FORESEEING and self._foresight is not None:
            await self._look_ahead(self._foresight, deployment, policy, observed, now_s)
            return
        if observed is None:
            reason = "no replica has been measured yet, or its model or GPU is not known"
            if dead:
                reason = f"of its replicas none is left to go by: {len(dead)} are hung or fail again and again"
            self._say(verdicts.unknown(deployment.name, policy, reason, now_s=time.time()))
            return
        frames = self._frames(deployment)
        proposal = await self._process.decide(policy, observed)
        # The policy decided on those that serve. The dead stay wanted: they are restarted, not scaled away.
        proposal = replace(proposal, replicas=proposal.replicas + len(dead))
        self.figures.proposals += 1
        self._say(verdicts.of_proposal(deployment.name, policy, proposal, now_s=time.time()))
        current = self._control.snapshot.deployments.get(deployment.name)
        if proposal.action is Action.KEEP or current is None or _changed(deployment, current):
            return                 # a user changed it meanwhile: what was observed is not what runs
        ruling = rule(
            proposal,
            current,
            self._control.snapshot.replicas_of(deployment.name),
            history=History(last_act_s=await self._acted_s(deployment.name, now_s)),
            now_s=now_s,
            cooldown_s=self._settings.cooldown_s,
            gpus_per_node=max((len(view.gpus) for view in self._control.snapshot.nodes.values()), default=0),
            dead=dead,
        )
        if ruling is not None:
            decision = record_of(
                ruling, current, actor=f"policy/{policy}", model_time_s=observed.now_s, inputs=_inputs(observed),
                frames=frames, configuration=_plain_sizes(observed.configuration.tensor_parallel_size, observed),
                to_configuration=_plain_sizes(_applied(ruling, proposal, observed), observed),
            )  # fmt: skip
            await self._carry_out(current, ruling, decision)

    async def _look_ahead(
        self, foresight: Foresight, deployment: Deployment, policy: str, observed: Observation | None, now_s: float
    ) -> None:
        """Ask a policy that looks ahead, and act on its wish."""
        frames, snapshot = self._frames(deployment), self._control.snapshot
        acted_s = await self._acted_s(deployment.name, now_s)
        asked = await foresight.ask(policy, deployment, snapshot, minutes=observed, last_act_s=acted_s)
        if isinstance(asked, str):
            self._say(verdicts.unknown(deployment.name, policy, asked, now_s=time.time()))
            return
        wish = asked.decided.wish
        if asked.doubt:
            wish = replace(wish, reason=f"{wish.reason} ({asked.doubt}: the capacity is a guess)")
        self.figures.proposals += 1
        self._say(verdicts.of_wish(deployment.name, policy, wish, now_s=time.time()))
        current = self._control.snapshot.deployments.get(deployment.name)
        if current is None or _changed(deployment, current):
            return                 # a user changed it meanwhile: what was observed is not what runs
        if wish.action is Action.KEEP:
            self._held.pop(deployment.name, None)
        record = functools.partial(
            record_of, deployment=current, actor=f"policy/{policy}", model_time_s=asked.situation.now_s,
            inputs=tuple(inputs_of(asked.situation, asked.decided.wish)), frames=frames,
        )  # fmt: skip
        ruling = rule_wish(wish, current, self._control.snapshot.replicas_of(deployment.name))
        if ruling is not None:
            await self._carry_out(current, ruling, record(ruling))
        for replacement in replacements(wish, current, self._control.snapshot.replicas_of(deployment.name)):
            await self._control.replace(replacement.replica, record(replacement.ruling))

    async def _carry_out(self, deployment: Deployment, ruling: Ruling, decision: Decision) -> None:
        name = deployment.name
        if ruling.action is DecisionAction.HOLD:
            held = (str(ruling.guard), ruling.wanted if ruling.wanted is not None else ruling.to_replicas)
            if ruling.guard not in RECORDED or self._held.get(name) == held:
                return
            await self._control.record_decision(decision)
            self._held[name] = held
        else:
            await self._control.set_target(name, ruling.to_replicas, decision, leave_first=ruling.leave_first)
            self._last_act_s[name] = decision.model_time_s
            self._held.pop(name, None)
        counts = self.figures.decisions
        counts[ruling.action.value] = counts.get(ruling.action.value, 0) + 1

    async def _acted_s(self, deployment: str, now_s: float) -> float:
        """When a policy last acted: the cool-down outlives the leader that began it."""
        if deployment not in self._last_act_s:
            entries, _ = await self._store.range(codec.prefix("decisions", deployment))
            self._last_act_s[deployment] = last_act_s(entries, now_s=now_s)
        return self._last_act_s[deployment]

    def _dead_of(self, deployment: Deployment) -> frozenset[str]:
        """Replicas of a deployment that do not serve, and are left out of the arithmetic."""
        wanted = {each.name for each in wanted_replicas(self._control.snapshot, deployment)}
        return self._dead() & wanted

    def _observe(
        self, deployment: Deployment, model: PolicyModelFacts | None, now_s: float, dead: frozenset[str]
    ) -> Observation | None:
        snapshot = self._control.snapshot
        gpu = gpu_facts(snapshot, deployment)
        if model is None or gpu is None:
            return None
        replicas = [each for each in wanted_replicas(snapshot, deployment) if each.name not in dead]
        found: list[ReplicaSeries] = []
        for replica in replicas:
            minutes = self._telemetry.replica_minutes(replica.name, count=MINUTES)
            found.append(series_of(replica.name, minutes.first_end_s if minutes else now_s, minutes))
        if not any(each.series for each in found):
            return None
        return Observation(
            now_s=now_s,
            replicas=max(0, deployment.status.target_replicas - len(dead)),
            series=tuple(found),
            configuration=sizes(snapshot, deployment),
            model=model,
            gpu=gpu,
        )

    async def _model(self, deployment: Deployment) -> PolicyModelFacts | None:
        name = deployment.spec.model
        if not self._models.is_fresh(name) and name not in catalogue():
            await self._ask(name)
        known = self._models.get(name)
        config = json.loads(known.config_json) if known is not None and known.config_json else None
        weight_bytes = known.weight_bytes if known is not None else 0
        return model_facts(name, config, weight_bytes=weight_bytes)

    async def _ask(self, model: str) -> None:
        """Ask a host, and wait a moment: a slow one answers a later round, and delays no other deployment."""
        question = self._asked.get(model)
        if question is None:
            views = self._control.snapshot.nodes.items()
            ready = tuple(node for node, view in views if view.state is NodeState.READY)
            question = self._asked[model] = asyncio.create_task(self._agents.inspect(model, nodes=ready))
            await asyncio.wait([question], timeout=ANSWER_WAIT_S)
        if question.done():
            del self._asked[model]
            self._models.put(model, question.result())

    def _frames(self, deployment: Deployment) -> tuple[str, ...]:
        replicas = wanted_replicas(self._control.snapshot, deployment)
        return self._telemetry.newest_frames(sorted({replica.node for replica in replicas if replica.node}))

    def _say(self, verdict: verdicts.Verdict) -> None:
        self._verdicts[verdict.object] = verdicts.updated(self._verdicts, verdict)

    def _forget(self) -> None:
        if self._foresight is not None:
            self._foresight.forget(self._control.snapshot)
        living = self._control.snapshot.deployments
        kept: tuple[dict[str, object], ...] = (self._verdicts, self._last_act_s, self._held, self._last_asked_s)  # type: ignore[assignment]
        for values in kept:
            for name in [name for name in values if name not in living]:
                del values[name]
        models = {deployment.spec.model for deployment in living.values()}
        for model in [model for model in self._asked if model not in models]:
            self._asked.pop(model).cancel()


def _changed(observed: Deployment, current: Deployment) -> bool:
    """Whether somebody changed the spec or the target since a policy was told of them."""
    return (observed.generation, observed.status.target_replicas) != (
        current.generation,
        current.status.target_replicas,
    )


def last_act_s(entries: Sequence[Entry], *, now_s: float) -> float:
    """The model time of a policy's newest act among stored decisions, oldest first; minus infinity for none."""
    for entry in reversed(entries):
        try:
            decision = codec.decode_as(Decision, entry.value, key=entry.key)
        except Corrupt as error:
            log.warning("a decision is passed over: %s", error)
            continue
        if decision.action is not DecisionAction.HOLD and decision.actor.startswith("policy/"):
            # A model clock that was set back since must not hold the deployment until it comes round again.
            return min(decision.model_time_s, now_s)
    return -math.inf


def _applied(ruling: Ruling, proposal: Proposal, observed: Observation) -> int:
    """The tensor-parallel size that the decision sets: a HOLD sets none."""
    chosen = observed.configuration if ruling.action is DecisionAction.HOLD else proposal.configuration
    return chosen.tensor_parallel_size


def _plain_sizes(tensor_parallel_size: int, observed: Observation) -> Mapping[str, float | int]:
    current = observed.configuration
    return {
        "tensor_parallel_size": tensor_parallel_size,
        "gpu_memory_utilization": current.gpu_memory_utilization,
        "max_num_seqs": current.max_num_seqs,
    }


def _inputs(observed: Observation) -> tuple[DecisionInput, ...]:
    return tuple(
        DecisionInput(
            object=replica.replica,
            feature=feature.value,
            start_s=series.start_s,
            step_s=series.step_s,
            values=series.values,
        )
        for replica in observed.series
        for feature, series in replica.series.items()
        if feature in FEATURES
    )
