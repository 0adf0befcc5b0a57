"""What the step times of an engine depend on, its identity, and the fit of its live steps as one pure function.

`fitted` is what the coordinator's child process runs: it takes and returns plain values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter

from enova_recommender.performance.calibration import Calibration, learnt, prior
from enova_recommender.performance.correction import UNCORRECTED, Correction
from enova_recommender.performance.kernel_times import KernelTimes
from enova_recommender.performance.live_steps import ObservedStep
from enova_recommender.performance.site import taught_by
from enova_recommender.types import AS_PUBLISHED, SINGLE_GPU, GpuModel, ModelShape, Parallelism, Precision

MODELS_REMEMBERED = 64
DIGEST_CHARACTERS = 12     # of a shape, and of a layout
KIN_SPREAD = 0.10          # of the factors between two layouts of one model on one GPU type


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """A model on GPUs of one type, split and stored in one way."""

    shape: ModelShape
    gpu: GpuModel
    parallelism: Parallelism = SINGLE_GPU
    precision: Precision = AS_PUBLISHED
    eager: bool = False            # without CUDA graphs: the host takes longer

    @property
    def identity(self) -> str:
        """The same for engines whose steps take equally long, whatever the model is called: shape first, then layout.

        Fields that have their default are left out, so that a field that is new tomorrow changes no identity of today.
        """
        return _digest(replace(self.shape, name="")) + _digest(self.parallelism, self.precision, self.eager)

    @property
    def key(self) -> str:
        """The identity with the GPU type."""
        return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', self.gpu.name)}.{self.identity}"

    @property
    def kin(self) -> str:
        """How the keys of this model on this GPU type begin, however it is cut and stored."""
        return self.key[:-DIGEST_CHARACTERS]


def corrected_times(
    corrections: Mapping[str, Correction],
) -> Callable[[ModelShape, GpuModel, Parallelism, Precision], KernelTimes]:
    """Step times by what was learnt of engines, by key: of this very layout, else of the model's best known other one,
    else of other models on this type of GPU.

    What holds for another layout holds less here: its spread grows by KIN_SPREAD.
    """

    def times_of(shape: ModelShape, gpu: GpuModel, parallelism: Parallelism, precision: Precision) -> KernelTimes:
        model = EngineModel(shape=shape, gpu=gpu, parallelism=parallelism, precision=precision)
        times = KernelTimes(shape, gpu, parallelism=parallelism, precision=precision)
        exact = corrections.get(model.key)
        if exact is not None:
            return times.corrected(exact)
        kin = [
            (each.spread, key, each)
            for key, each in corrections.items()
            if key.startswith(model.kin) and each.spread is not None
        ]
        if not kin:
            site = taught_by(_others(corrections, model), spread=times.spread)
            return times if site is UNCORRECTED else times.corrected(site)
        spread, _, known = min(kin, key=itemgetter(0, 1))
        return times.corrected(
            replace(known, spread=math.hypot(spread, KIN_SPREAD), noise=math.hypot(known.noise, KIN_SPREAD))
        )

    return times_of


def _others(corrections: Mapping[str, Correction], model: EngineModel) -> list[Correction]:
    """The best known correction of each other model on the type of GPU."""
    best: dict[str, tuple[float, str, Correction]] = {}
    gpu = model.kin[: -DIGEST_CHARACTERS]
    for key, each in corrections.items():
        if key.startswith(gpu) and not key.startswith(model.kin) and each.spread is not None:
            kin = key[:-DIGEST_CHARACTERS]
            best[kin] = min(best.get(kin, (math.inf, "", each)), (each.spread, key, each), key=itemgetter(0, 1))
    return [each for _, _, each in best.values()]


def _digest(*parts: object) -> str:
    plain = json.dumps([_plain(part) for part in parts], sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()[:DIGEST_CHARACTERS]


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            each.name: _plain(getattr(value, each.name))
            for each in dataclasses.fields(value)
            if getattr(value, each.name) != each.default
        }
        return [type(value).__name__, fields]
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What is asked: the calibration after `steps`, oldest first, and predictions of those in `shown`.

    `calibration` None: nothing was measured before.
    """

    model: EngineModel
    calibration: Calibration | None
    steps: tuple[ObservedStep, ...]
    shown: tuple[ObservedStep, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedStep:
    """What the corrected model makes of one observed step; `kernels` are its seconds by class."""

    step_s: float
    kernels: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """The answer; `predicted` are those of `Fit.shown`, in its order."""

    calibration: Calibration
    predicted: tuple[PredictedStep, ...]


def fitted(fit: Fit) -> Fitted:
    """The calibration after some steps, and what the corrected model makes of those that are shown."""
    assert fit.steps, "nothing to learn from"
    times = _times(fit.model)
    calibration = learnt(fit.calibration or prior(times.spread), times, fit.steps)
    corrected = times.corrected(calibration.correction)
    return Fitted(calibration=calibration, predicted=tuple(_predicted(corrected, step) for step in fit.shown))


def _predicted(times: KernelTimes, step: ObservedStep) -> PredictedStep:
    kernels: dict[str, float] = {}
    for share, batch in step.parts:
        for kernel, seconds in times.shares(batch).items():
            kernels[kernel.value] = kernels.get(kernel.value, 0.0) + share * seconds
    return PredictedStep(step_s=math.fsum(kernels.values()), kernels=kernels)


@lru_cache(maxsize=MODELS_REMEMBERED)
def _times(model: EngineModel) -> KernelTimes:
    return KernelTimes(model.shape, model.gpu, parallelism=model.parallelism, precision=model.precision)
