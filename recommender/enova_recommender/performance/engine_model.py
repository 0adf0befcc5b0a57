"""What the step times of an engine depend on, its identity, and the fit of its live steps as one pure function.

`fitted` is what the coordinator's child process runs: it takes and returns plain values.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from enova_recommender.performance.calibration import Calibration, learnt, prior
from enova_recommender.performance.kernel_times import KernelTimes
from enova_recommender.performance.live_steps import ObservedStep
from enova_recommender.types import AS_PUBLISHED, SINGLE_GPU, GpuModel, ModelShape, Parallelism, Precision

MODELS_REMEMBERED = 64


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
        """The same for engines whose steps take equally long, whatever the model is called.

        Fields that have their default are left out, so that a field that is new tomorrow changes no identity of today.
        """
        plain = [_plain(part) for part in (replace(self.shape, name=""), self.parallelism, self.precision, self.eager)]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


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
    """What is asked: the calibration after these steps, oldest first. None: nothing was measured before."""

    model: EngineModel
    calibration: Calibration | None
    steps: tuple[ObservedStep, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """The answer; `predicted_s` and `kernels` (seconds by class) are of the newest step, by the corrected model."""

    calibration: Calibration
    predicted_s: float
    kernels: Mapping[str, float]


def fitted(fit: Fit) -> Fitted:
    """The calibration after some steps, and what the corrected model makes of the newest one."""
    assert fit.steps, "nothing to learn from"
    times = _times(fit.model)
    calibration = learnt(fit.calibration or prior(times.spread), times, fit.steps)
    corrected = times.corrected(calibration.correction)
    newest = fit.steps[-1]
    kernels: dict[str, float] = {}
    for share, batch in newest.parts:
        for kernel, seconds in corrected.shares(batch).items():
            kernels[kernel.value] = kernels.get(kernel.value, 0.0) + share * seconds
    return Fitted(calibration=calibration, predicted_s=math.fsum(kernels.values()), kernels=kernels)


@lru_cache(maxsize=MODELS_REMEMBERED)
def _times(model: EngineModel) -> KernelTimes:
    return KernelTimes(model.shape, model.gpu, parallelism=model.parallelism, precision=model.precision)
