"""The leader's look for better configurations: measured traffic to the recommender, its answer to a proposal.

Each round asks for every deployment that is settled and has traffic. A configuration that saves enough of the cost of a
request is proposed on the deployment, or put in force where its `reconfiguration` says so: a new generation, which
rolls out as a user's change does, with a decision that says why.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from enova_common.errors import EnovaError
from enova_coordinator import traffic
from enova_coordinator.advisor import Advisor
from enova_coordinator.controller import Controller
from enova_coordinator.core import advice
from enova_coordinator.core.advice import Observed
from enova_coordinator.core.model import (
    Decision,
    DecisionAction,
    Deployment,
    DeploymentAdvice,
    DeploymentState,
    Reconfiguration,
)
from enova_coordinator.core.plan import Put, Write
from enova_coordinator.election import Leadership
from enova_coordinator.events import EventLog
from enova_coordinator.known_models import KnownModels
from enova_coordinator.settings import AdviceSettings
from enova_coordinator.store import Store, codec
from enova_coordinator.store.changes import commit
from enova_coordinator.telemetry import Telemetry

INTERVAL_REAL_S_MIN = 0.5          # under a fast model clock
GAIN_STEP = 0.05                   # of a proposal, from which on it is worth writing anew
ACTOR = "policy/recommender"

Plain = Mapping[str, Any]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class AdviceFigures:
    """What the loop did, for the coordinator's own metrics."""

    looks: int = 0
    failures: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)

    def count(self, outcome: str) -> None:
        """One more outcome of a kind."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1


class AdviceLoop:
    """Looks, compares, proposes or applies, for one term."""

    def __init__(
        self,
        store: Store,
        leadership: Leadership,
        controller: Controller,
        telemetry: Telemetry,
        advisor: Advisor,
        *,
        events: EventLog,
        models: KnownModels,
        settings: AdviceSettings,
        real_s: Callable[[float], float],
    ) -> None:
        self.figures = AdviceFigures()
        self._store = store
        self._leadership = leadership
        self._controller = controller
        self._telemetry = telemetry
        self._advisor = advisor
        self._events = events
        self._models = models
        self._settings = settings
        self._interval_s = max(INTERVAL_REAL_S_MIN, real_s(settings.interval_s))

    async def run(self) -> None:
        """Look round after round, until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            for deployment in list(self._controller.snapshot.deployments.values()):
                try:
                    await self._look(deployment)
                except EnovaError as error:
                    self.figures.failures += 1
                    log.warning("no look for a better configuration of %s: %s", deployment.name, error)
                except Exception:
                    # A defect here must cost one look, not the leader its term.
                    self.figures.failures += 1
                    log.exception("no look for a better configuration of %s", deployment.name)

    async def _look(self, deployment: Deployment) -> None:
        settled = deployment.status.state is DeploymentState.READY and deployment.status.ready_replicas
        if deployment.deleting or not settled or deployment.spec.reconfiguration is Reconfiguration.OFF:
            return
        observed = self.observed(deployment)
        types = self._advisor.types
        current = advice.current_of(self._controller.snapshot, deployment, types=types)
        advised = bool(deployment.spec.configuration) or bool(deployment.advised_gpu_type)
        if current is None or (observed is None and advised):
            return                     # without traffic nothing is known that the advice on creation did not know
        self.figures.looks += 1
        facts = self._models.get(deployment.spec.model)
        config_json = facts.config_json if facts is not None else ""
        snapshot, spec = self._controller.snapshot, deployment.spec
        question = advice.request_for(
            snapshot, deployment.name, spec, config_json=config_json, observed=observed, types=types
        )
        if isinstance(question, str):
            self.figures.count("no_request")
            return
        answer = await self._advisor.answer({**question.request, "current": current})
        grounds = advice.grounds_of(observed, question.left_out)
        await self._conclude(deployment, self._better(deployment, answer, current, grounds))

    def observed(self, deployment: Deployment) -> Observed | None:
        """What was counted of a deployment's requests; None where that is too little."""
        return traffic.observed(self._telemetry, self._controller.snapshot, deployment.name)

    def _better(
        self, deployment: Deployment, answer: Plain, current: Plain, grounds: str
    ) -> DeploymentAdvice | None:
        """The configuration that is better by enough; None if what runs is good."""
        gain = advice.gain_of(answer)
        if gain is None or gain < self._settings.gain_min:
            return None
        found = advice.advice_of(answer, reason=grounds, now_s=time.time(), gain=gain)
        same = found.gpu_type == current["gpu_type"] and dict(found.configuration) == dict(deployment.configuration)
        return None if same else found

    async def _conclude(self, deployment: Deployment, better: DeploymentAdvice | None) -> None:
        apply = deployment.spec.reconfiguration is Reconfiguration.APPLY and not deployment.spec.configuration
        standing = deployment.proposal
        if better is None and standing is None:
            self.figures.count("good")
        elif better is not None and apply:
            await self._write(deployment, advice.applied(deployment, better, now_s=time.time()), better)
        elif not _is_news(standing, better):
            self.figures.count("standing")
        else:
            await self._write(deployment, replace(deployment, proposal=better), None)

    async def _write(self, before: Deployment, after: Deployment, put_in_force: DeploymentAdvice | None) -> None:
        """Write the deployment as it is wanted, if nobody changed it meanwhile: else the next round looks anew."""
        revision = self._controller.snapshot.revisions.get(before.name, 0)
        if self._controller.snapshot.deployments.get(before.name) != before:
            self.figures.count("overtaken")
            return
        writes: list[Write] = [Put(value=after, revision=revision)]
        if put_in_force is not None:
            writes.append(Put(value=self._decision(before, put_in_force), revision=0))
        result = await commit(self._store, self._leadership.guard(), writes)
        if not result.succeeded:
            self.figures.count("overtaken")
            return
        self._tell(before.name, after.proposal, put_in_force)
        self._controller.wake()

    def _decision(self, deployment: Deployment, put_in_force: DeploymentAdvice) -> Decision:
        target = deployment.status.target_replicas
        return Decision(
            name=codec.decision_name(deployment.name, time.time()),
            deployment=deployment.name,
            action=DecisionAction.RECONFIGURE,
            actor=ACTOR,
            reason=_saves(put_in_force),
            from_replicas=target,
            to_replicas=target,
            create_time_s=time.time(),
            model_time_s=self._telemetry.now_s,
            term=self._leadership.term,
            from_configuration=dict(deployment.configuration),
            to_configuration=dict(put_in_force.configuration),
        )

    def _tell(self, name: str, proposal: DeploymentAdvice | None, put_in_force: DeploymentAdvice | None) -> None:
        if put_in_force is not None:
            self.figures.count("applied")
            self._events.record(name, "ConfigurationApplied", _saves(put_in_force))
        elif proposal is not None:
            self.figures.count("proposed")
            self._events.record(name, "ConfigurationProposed", _saves(proposal))
        else:
            self.figures.count("withdrawn")
            self._events.record(name, "ProposalWithdrawn", "what runs is as good")


def _is_news(standing: DeploymentAdvice | None, better: DeploymentAdvice | None) -> bool:
    if standing is None or better is None or not advice.is_same(standing, better):
        return True
    return not math.isclose(standing.gain, better.gain, abs_tol=GAIN_STEP)


def _saves(better: DeploymentAdvice) -> str:
    flags = advice.words(better.configuration)
    if better.gain >= advice.MEETS:
        return f"{flags} on {better.gpu_type} meets the objectives, which what runs cannot: {better.reason}"
    return f"{flags} on {better.gpu_type} saves {better.gain:.0%} of the cost: {better.reason}"
