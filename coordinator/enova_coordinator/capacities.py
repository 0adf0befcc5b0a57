"""What a replica of each deployment carries: asked of the recommender beside the policies' loop, kept until it is old.

Asking takes a moment of computation in the recommender's process, so it never stands in a policy's way: what was last
known is used meanwhile. Where the recommender knows the model or the GPU too little, the capacity is taken from what
was counted: the sequences that fit in the batch, over the time that a request took (Little's law).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from enova_common.errors import EnovaError
from enova_coordinator.advisor import Advisor
from enova_coordinator.core import advice
from enova_coordinator.core.advice import Observed
from enova_coordinator.core.gpu_types import priced
from enova_coordinator.core.model import Deployment, Snapshot, Variant
from enova_coordinator.core.routes import DEFAULT_CONCURRENCY
from enova_coordinator.known_models import KnownModels
from enova_coordinator.telemetry import Telemetry
from enova_recommender.recommend.respond import Problem
from enova_recommender.recommend.types import MeanLengths
from enova_recommender.scaling.situation import Capacity
from enova_recommender.types import Interval

FRESH_REAL_S = 30.0                # of an answer; then it is asked for anew: mixes and corrections change
COUNTED_MIN = 20                   # finished requests, for a capacity from what was counted
COUNTED_SHARE = 0.6                # of the batch at which the objectives are taken to hold
COUNTED_SPREAD = 2.0               # by which such a capacity may be wrong, either way
GUESSED_S = 10.0                   # that a request takes inside the engine, until any was counted
GUESSED_SPREAD = 10.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Known:
    """The last answer about a variant."""

    capacity: Capacity | None = None
    reason: str = ""
    asked_s: float = float("-inf")
    task: asyncio.Task[None] | None = None


class Capacities:
    """One for each term."""

    def __init__(
        self,
        advisor: Advisor,
        models: KnownModels,
        telemetry: Telemetry,
        *,
        snapshot: Callable[[], Snapshot],
        observed: Callable[[Deployment], Observed | None],
        real_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._advisor = advisor
        self._models = models
        self._telemetry = telemetry
        self._snapshot = snapshot
        self._observed = observed
        self._real_s = real_s
        self._known: dict[str, _Known] = {}

    def of(self, deployment: Deployment, variant: Variant) -> Capacity:
        """What one replica of the variant carries, as far as is known; a wide guess where nothing is."""
        known = self._known.setdefault(variant.name, _Known())
        if known.task is None and self._real_s() - known.asked_s > FRESH_REAL_S:
            known.asked_s = self._real_s()
            known.task = asyncio.create_task(self._ask(deployment, variant, known))
        if known.capacity is not None:
            return known.capacity
        return self._counted(deployment, variant) or _guessed(variant)

    def doubt(self, variant: str) -> str:
        """Why the recommender does not know what a replica of the variant carries; empty where it does."""
        known = self._known.get(variant)
        if known is None or known.capacity is not None:
            return ""
        return known.reason or "what a replica carries is being worked out"

    def usd_per_hour(self, variant: Variant) -> float:
        """The price of a replica; 0 where it is not known."""
        gpus = (gpu for view in self._snapshot().nodes.values() for gpu in view.gpus if gpu.type == variant.gpu_type)
        model = priced(gpus, self._advisor.types).models.get(variant.gpu_type)
        return model.cost_per_hour(variant.gpus_per_replica) if model is not None else 0.0

    def forget(self, snapshot: Snapshot) -> None:
        """Drop the variants that are gone."""
        for name in [name for name in self._known if name not in snapshot.variants]:
            task = self._known.pop(name).task
            if task is not None:
                task.cancel()

    def close(self) -> None:
        """Give up what is being asked."""
        for known in self._known.values():
            if known.task is not None:
                known.task.cancel()

    async def _ask(self, deployment: Deployment, variant: Variant, known: _Known) -> None:
        try:
            found = await self._answer(deployment)
        except EnovaError as error:
            log.warning("the capacity of %s is not known: %s", variant.name, error)
            found = str(error)
        except Exception as error:
            # A defect here must cost one answer, not the leader its term.
            log.exception("the capacity of %s is not known", variant.name)
            found = f"internal error: {type(error).__name__}"
        finally:
            known.task = None
        if isinstance(found, str):
            known.reason = f"what a replica carries is not known: {found}"
        else:
            known.capacity, known.reason = found, ""

    async def _answer(self, deployment: Deployment) -> Capacity | str:
        snapshot = self._snapshot()
        current = advice.current_of(snapshot, deployment, types=self._advisor.types)
        if current is None:
            return "no replica has found its place, or its GPU is not modelled"
        facts = self._models.get(deployment.spec.model)
        question = advice.request_for(
            snapshot,
            deployment.name,
            deployment.spec,
            config_json=facts.config_json if facts is not None else "",
            observed=self._observed(deployment),
            types=self._advisor.types,
        )
        if isinstance(question, str):
            return question
        found = await self._advisor.carried({**question.request, "current": current})
        return found.message if isinstance(found, Problem) else found

    def _counted(self, deployment: Deployment, variant: Variant) -> Capacity | None:
        """From finished requests alone; None while they are too few."""
        totals = self._telemetry.totals(deployment.name).values()
        count = sum(each.e2e_s.total for each in totals)
        if count < COUNTED_MIN:
            return None
        took_s = max(sum(each.e2e_s.sum for each in totals) / count, 1e-3)
        waited_s = sum(each.queue_s.sum for each in totals) / count
        inside_s = max(took_s - waited_s, 0.1 * took_s)
        places = int(variant.configuration.get("max_num_seqs", DEFAULT_CONCURRENCY))
        rate = COUNTED_SHARE * places / inside_s
        prompts = sum(each.prompt_tokens for each in totals) / count
        answers = sum(each.output_tokens for each in totals) / count
        return Capacity(
            requests_per_s=Interval(value=rate, low=rate / COUNTED_SPREAD, high=rate * COUNTED_SPREAD),
            prefill_tokens_per_s=max(rate * prompts, 1.0),
            decode_tokens_per_s=max(rate * answers, 1.0),
            kv_tokens=places * (prompts + answers),
            max_num_seqs=places,
            told_for=MeanLengths(prompts, answers) if prompts + answers > 0 else None,
        )


def _guessed(variant: Variant) -> Capacity:
    """From the batch alone, of requests with as many tokens in as out at a usual pace: wrong, but mended by load."""
    places = int(variant.configuration.get("max_num_seqs", DEFAULT_CONCURRENCY))
    rate = COUNTED_SHARE * places / GUESSED_S
    return Capacity(
        requests_per_s=Interval(value=rate, low=rate / GUESSED_SPREAD, high=rate * GUESSED_SPREAD),
        prefill_tokens_per_s=1000.0 * rate,
        decode_tokens_per_s=1000.0 * rate,
        kv_tokens=1000.0 * places,
        max_num_seqs=places,
    )
