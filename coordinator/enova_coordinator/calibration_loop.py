"""The leader's look at live steps: what engines counted corrects the performance model, and is kept in the store.

Each round looks at all engines, makes observed steps of what they counted since the last round, and lets the child
process fit them: nothing here computes. What was learnt belongs to a GPU type, a model's shape and what its steps
depend on, whichever deployment runs it; it is stored soon after it began and then at most once a minute, under the
leader's guard, and read back when a term begins.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from enova_common.errors import Corrupt, EnovaError
from enova_coordinator.core.calibration import StoredCalibration
from enova_coordinator.core.engine_facts import (
    batched_tokens,
    calibration_name,
    engine_model,
    observed,
    restored,
    stored,
)
from enova_coordinator.core.gpu_types import GpuTypes, gpu_of
from enova_coordinator.core.model import Snapshot, Variant
from enova_coordinator.core.plan import Delete, Put, Write
from enova_coordinator.core.service_times import EngineLook
from enova_coordinator.known_models import KnownModels
from enova_coordinator.policy_process import PolicyProcess
from enova_coordinator.service_log import ServiceLog, in_turns
from enova_coordinator.store import Compare, Store, codec
from enova_coordinator.store.changes import commit
from enova_recommender.performance.correction import Correction
from enova_recommender.performance.engine_model import EngineModel, Fit, PredictedStep, fitted
from enova_recommender.performance.live_steps import ObservedStep

INTERVAL_S = 10.0                  # model time between two looks
INTERVAL_REAL_S_MIN = 0.5          # under a fast model clock
WRITE_EVERY_S = 60.0               # real time, of one calibration ...
WRITE_AFTER_FACTOR = 2             # ... or when it has learnt from so many times the steps of the last write
STEPS_MAX = 256                    # of one calibration in one round: half a millisecond each in the child
SHOWN_MAX = 64                     # variants of one calibration whose step is told apart in one round
CALIBRATIONS_MAX = 500
DELETES_MAX = 50                   # in one transaction

log = logging.getLogger(__name__)


@dataclass(slots=True)
class CalibrationFigures:
    """What the loop did, for the coordinator's own metrics."""

    rounds: int = 0
    steps: int = 0
    failures: int = 0
    writes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantSteps:
    """The newest steps of a variant that said something, and what the corrected model makes of them."""

    time_s: float
    step: ObservedStep
    calibration: str
    predicted: PredictedStep


@dataclass(slots=True)
class _Written:
    """What of a calibration lies in the store."""

    revision: int = 0
    updates: int = 0
    time_s: float = -WRITE_EVERY_S


@dataclass(slots=True)
class _Work:
    """The steps of one calibration in one round."""

    model: EngineModel
    variant: Variant
    steps: list[tuple[str, float, ObservedStep]] = field(default_factory=list)


class CalibrationLoop:
    """Learns while this coordinator leads. `snapshot` is the leader's, `guard` its compare for every write.

    `types` are the GPU types that the operator described: engines on them are known by the same names as in requests
    for advice, so that what is learnt of them is found there.
    """

    def __init__(
        self,
        store: Store,
        services: ServiceLog,
        process: PolicyProcess,
        models: KnownModels,
        *,
        types: GpuTypes,
        snapshot: Callable[[], Snapshot],
        guard: Callable[[], Compare],
        real_s: Callable[[float], float],
        wall_s: Callable[[], float] = time.time,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.services = services
        self.figures = CalibrationFigures()
        self.calibrations: dict[str, StoredCalibration] = {}
        """All that is known, by name."""
        self.steps: dict[str, VariantSteps] = {}
        """By variant."""
        self._store = store
        self._process = process
        self._models = models
        self._types = types
        self._snapshot = snapshot
        self._guard = guard
        self._interval_s = max(INTERVAL_REAL_S_MIN, real_s(INTERVAL_S))
        self._wall_s = wall_s
        self._monotonic_s = monotonic_s
        self._written: dict[str, _Written] = {}
        self._loaded = False

    async def run(self) -> None:
        """Look round after round, until cancelled; a round that fails is one round less."""
        while True:
            try:
                if not self._loaded:
                    await self._load()
                await self.round()
            except EnovaError as error:
                self.figures.failures += 1
                log.warning("live steps were not learnt from: %s", error)
            except Exception:
                # A defect here must cost the correction, not the leader its term.
                self.figures.failures += 1
                log.exception("live steps were not learnt from")
            await asyncio.sleep(self._interval_s)

    async def round(self) -> None:
        """Look at all engines, learn, write."""
        snapshot = self._snapshot()
        for name, work in (await self._work(snapshot, await self.services.look(snapshot))).items():
            await self._learn(name, work)
        for variant in [variant for variant in self.steps if variant not in snapshot.variants]:
            del self.steps[variant]
        self.figures.rounds += 1

    def facts(self, variant: Variant) -> EngineModel | str:
        """What the step times of a variant's engines depend on, or why nobody can say."""
        known = self._models.get(variant.model)
        config = json.loads(known.config_json) if known is not None and known.config_json else None
        return engine_model(variant, config, self._types.model(gpu_of(self._snapshot(), variant.gpu_type)))

    def corrections(self) -> dict[str, Correction]:
        """What is known of step times, by `EngineModel.key`: what `corrected_times` takes."""
        found = ((name, restored(value)) for name, value in self.calibrations.items())
        return {name.removeprefix("calibrations/"): each.correction for name, each in found if each is not None}

    async def _work(self, snapshot: Snapshot, looks: list[EngineLook]) -> Mapping[str, _Work]:
        found: dict[str, _Work] = {}
        models: dict[str, EngineModel | str] = {}
        async for look in in_turns(looks):
            variant = snapshot.variants.get(look.replica.variant)
            if variant is None:
                continue
            model = models.get(variant.name)
            if model is None:
                model = models[variant.name] = self.facts(variant)
            step = observed(look, batched_tokens_max=batched_tokens(variant.configuration))
            if step is None or isinstance(model, str):
                continue
            work = found.setdefault(calibration_name(model), _Work(model, variant))
            work.steps.append((variant.name, look.time_s, step))
        return found

    async def _learn(self, name: str, work: _Work) -> None:
        known = self.calibrations.get(name)
        before = restored(known) if known is not None else None
        # Evenly over the replicas, and enough: more tell the same, and keep policies waiting.
        steps = tuple(step for _, _, step in work.steps[:: -(-len(work.steps) // STEPS_MAX)])
        shown = self._shown(work)
        fit = Fit(model=work.model, calibration=before, steps=steps, shown=tuple(step for _, _, step in shown))
        result = await self._process.run(fitted, fit)
        self.figures.steps += len(steps)
        for (variant, time_s, step), predicted in zip(shown, result.predicted, strict=True):
            self.steps[variant] = VariantSteps(time_s=time_s, step=step, calibration=name, predicted=predicted)
        value = stored(name, work.variant, work.model, result.calibration, now_s=self._wall_s())
        self.calibrations[name] = value
        written = self._written.setdefault(name, _Written())
        due_s = written.time_s + WRITE_EVERY_S
        if value.updates >= WRITE_AFTER_FACTOR * written.updates or self._monotonic_s() >= due_s:
            await self.keep(value)

    def _shown(self, work: _Work) -> list[tuple[str, float, ObservedStep]]:
        """The newest step of each variant; over the bound, of those that were shown longest ago."""
        newest = {step[0]: step for step in work.steps}
        shown_s = {name: each.time_s for name, each in self.steps.items()}
        return sorted(newest.values(), key=lambda step: shown_s.get(step[0], -math.inf))[:SHOWN_MAX]

    async def keep(self, value: StoredCalibration) -> None:
        """Write a calibration now, and let go of those that changed longest ago, over the bound."""
        written = self._written.setdefault(value.name, _Written())
        writes: list[Write] = [Put(value=value, revision=written.revision), *self._surplus()]
        result = await commit(self._store, self._guard(), writes)
        if not result.succeeded:
            entry = await self._store.get(codec.key(value.name))  # an earlier write whose outcome was not told
            written.revision = entry.mod_revision if entry is not None else 0
            return
        self.figures.writes += 1
        written.revision, written.updates, written.time_s = result.revision, value.updates, self._monotonic_s()
        for write in writes[1:]:
            self.calibrations.pop(write.name, None)
            self._written.pop(write.name, None)

    def _surplus(self) -> list[Delete]:
        """The calibrations that changed longest ago, over the bound."""
        oldest = sorted(self.calibrations.values(), key=lambda each: each.update_time_s)
        surplus = oldest[: max(0, len(oldest) - CALIBRATIONS_MAX)][:DELETES_MAX]
        return [
            Delete(name=each.name, revision=self._written[each.name].revision)
            for each in surplus
            if each.name in self._written
        ]

    async def _load(self) -> None:
        entries, _ = await self._store.range(codec.prefix("calibrations"))
        for entry in entries:
            try:
                value = codec.decode_as(StoredCalibration, entry.value, key=entry.key)
            except Corrupt as error:
                log.warning("a calibration is begun anew: %s", error)
                self._written[codec.name(entry.key)] = _Written(revision=entry.mod_revision)
                continue
            self._written[value.name] = _Written(revision=entry.mod_revision, updates=value.updates)
            self.calibrations[value.name] = value
        self._loaded = True
