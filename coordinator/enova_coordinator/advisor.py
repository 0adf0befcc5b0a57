"""Asks the recommender, which works in a process of its own, about a request or a deployment.

Searches take seconds of pure computation: the process is not that of the policies, which would wait for them. A whole
fleet is asked about in several processes, which end with the question.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from enova_common.errors import EnovaError, InvalidField, TimedOut
from enova_coordinator.core import advice
from enova_coordinator.core.advice import Observed
from enova_coordinator.core.gpu_types import GpuTypes
from enova_coordinator.core.model import DeploymentAdvice, DeploymentSpec, Snapshot
from enova_coordinator.policy_process import PolicyProcess
from enova_recommender.performance import Correction
from enova_recommender.recommend.allocation_types import Allocation
from enova_recommender.recommend.carried import carried
from enova_recommender.recommend.fleet import (
    AllocationQuestion,
    FleetOptions,
    OptionsQuestion,
    allocated,
    fleet_options,
)
from enova_recommender.recommend.respond import Problem, respond
from enova_recommender.recommend.types import Capacity

SOLVE_TIMES_MAX = 3.0              # of its time limit that the programme may take with all that is around it
SOLVE_BESIDE_S = 15.0
PROCESSES_MAX = 4                  # that search for the options of a fleet, 150 MB each; no more than there are cores

Plain = Mapping[str, Any]
Found = TypeVar("Found")
AskOptions = Callable[[OptionsQuestion], Awaitable[FleetOptions]]

log = logging.getLogger(__name__)


class Advisor:
    """The recommender's door. `now_s` is the wall clock; `creation_wait_s` bounds what a user's write waits for.

    `new_process` makes a process for it, which starts when it is first asked.
    """

    def __init__(
        self,
        new_process: Callable[[], PolicyProcess],
        *,
        now_s: Callable[[], float],
        creation_wait_s: float,
        types: GpuTypes = advice.CATALOGUE,
    ) -> None:
        self.types = types
        """The fleet's types of GPU that an operator described."""
        self.corrections: Callable[[], Mapping[str, Correction]] = dict
        """What live engines taught of step times, by engine; the leader sets it."""
        self._new_process = new_process
        self._process = new_process()
        self._fleet = asyncio.Lock()
        self._now_s = now_s
        self._creation_wait_s = creation_wait_s
        self._asked: set[asyncio.Task[DeploymentAdvice]] = set()

    async def answer(self, request: Plain) -> Plain:
        """The answer to a request. Raises InvalidField, TimedOut, Unavailable, PolicyRaised."""
        return _usable(await self._process.run(respond, {**request, "corrections": dict(self.corrections())}))

    @contextlib.asynccontextmanager
    async def fleet(self) -> AsyncIterator[AskOptions]:
        """A way to ask for the options of one deployment after the other, many at once: each call takes the first
        process that is free. It raises as `answer` does. Fleets come one after the other.
        """
        async with self._fleet:
            beside = [self._new_process() for _ in range(min(PROCESSES_MAX, len(os.sched_getaffinity(0))) - 1)]
            free: asyncio.Queue[PolicyProcess] = asyncio.Queue()
            for process in (self._process, *beside):
                free.put_nowait(process)

            async def ask(question: OptionsQuestion) -> FleetOptions:
                asked = replace(question, request={**question.request, "corrections": dict(self.corrections())})
                process = await free.get()
                try:
                    return _usable(await process.run(fleet_options, asked))
                finally:
                    free.put_nowait(process)

            try:
                yield ask
            finally:
                for process in beside:
                    await process.close()

    async def allocation(self, question: AllocationQuestion) -> Allocation:
        """Replicas for the whole fleet. Raises as `answer` does."""
        timeout_s = SOLVE_TIMES_MAX * question.limits.time_limit_s + SOLVE_BESIDE_S
        return _usable(await self._process.run(allocated, question, timeout_s=timeout_s))

    async def carried(self, request: Plain) -> Capacity | Problem:
        """What one replica of the request's `current` carries. Raises TimedOut, Unavailable, PolicyRaised."""
        return await self._process.run(carried, {**request, "corrections": dict(self.corrections())})

    async def on_creation(
        self, snapshot: Snapshot, name: str, spec: DeploymentSpec, *, config_json: str
    ) -> DeploymentAdvice:
        """The advice for a deployment that has just been asked for, or why there is none; never raises, never late."""
        task = asyncio.create_task(self.for_deployment(snapshot, name, spec, config_json=config_json))
        self._asked.add(task)              # a late answer is not wanted; the process that gives it is not to be killed
        task.add_done_callback(self._asked.discard)
        done, _ = await asyncio.wait([task], timeout=self._creation_wait_s)
        if not done:
            reason = f"the recommender took more than {self._creation_wait_s:g} s"
            return advice.none_for(reason, now_s=self._now_s())
        return task.result()

    async def for_deployment(
        self,
        snapshot: Snapshot,
        name: str,
        spec: DeploymentSpec,
        *,
        config_json: str,
        observed: Observed | None = None,
    ) -> DeploymentAdvice:
        """The advice for a deployment, or why there is none; never raises."""
        now_s = self._now_s()
        question = advice.request_for(
            snapshot, name, spec, config_json=config_json, observed=observed, types=self.types
        )
        if isinstance(question, str):
            return advice.none_for(question, now_s=now_s)
        request, grounds = question.request, advice.grounds_of(observed, question.left_out)
        try:
            answer = await self._within_objectives(request)
            if answer is None:
                # What misses its objectives is better than what does not start.
                without = {key: value for key, value in request.items() if key != "objectives"}
                answer = await self.answer(without)
                if "objectives" in request:
                    grounds += "; nothing that is free meets the objectives, so without them"
        except (InvalidField, TimedOut) as error:
            return advice.none_for(str(error), now_s=now_s)
        except EnovaError as error:
            log.warning("no advice for %s: %s", name, error)
            return advice.none_for(f"the recommender failed: {error}", now_s=now_s)
        if not answer.get("chosen"):
            return advice.none_for(_first(answer), now_s=now_s)
        return advice.advice_of(answer, reason=grounds, now_s=now_s)

    async def _within_objectives(self, request: Plain) -> Plain | None:
        """The answer, if one configuration meets the objectives; None if none does, or nothing ever could."""
        try:
            answer = await self.answer(request)
        except InvalidField as error:
            if not error.field.startswith("objectives."):
                raise
            return None
        return answer if answer.get("chosen") else None

    async def close(self) -> None:
        """End the process."""
        for task in self._asked:
            task.cancel()
        await self._process.close()


def _usable(found: Found | Problem) -> Found:
    """The answer. Raises InvalidField where it is what is wrong with the question."""
    if isinstance(found, Problem):
        raise InvalidField(found.message, field=found.field, remedy=found.remedy)
    return found


def _first(answer: Plain) -> str:
    sentences = answer["explanation"]
    return str(sentences[0]["text"]) if sentences else "nothing that is free can serve it"
