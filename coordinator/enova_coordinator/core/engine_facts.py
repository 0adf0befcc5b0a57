"""From a variant and what is known of its model and GPU to what its engines' step times depend on. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from enova_coordinator.core.calibration import StoredCalibration
from enova_coordinator.core.model import Configuration, ReplicaState, Variant
from enova_coordinator.core.service_times import FIRST_TOKEN, INTER_TOKEN, EngineLook
from enova_recommender.catalog import models as catalogue
from enova_recommender.performance.calibration import Calibration
from enova_recommender.performance.correction import GROUPS
from enova_recommender.performance.engine_model import EngineModel
from enova_recommender.performance.live_steps import EngineChange, ObservedStep, observed_step
from enova_recommender.shape import ShapeError, parse_shape
from enova_recommender.types import GpuModel, ModelShape, Parallelism, Precision

BATCHED_TOKENS = 2048              # vLLM's default where it knows no better
_DEPENDS_ON = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "dtype", "quantization",
               "kv_cache_dtype", "enable_expert_parallel", "enforce_eager")  # fmt: skip


def engine_model(
    variant: Variant, config: Mapping[str, object] | None, gpu: GpuModel | str
) -> EngineModel | str:
    """What the engines of a variant are, or why nobody can say.

    `config` is the model's config.json, if it is known; `gpu` the data sheet of the variant's type, or why there is
    none.
    """
    if not variant.gpu_type:
        return "no replica has found its GPU type yet"
    if isinstance(gpu, str):
        return f"GPU type {variant.gpu_type} {gpu}"
    shape = shape_of(variant.model, config)
    if isinstance(shape, str):
        return shape
    flags = variant.configuration
    return EngineModel(
        shape=shape,
        gpu=gpu,
        parallelism=Parallelism(
            tensor=_size(flags, "tensor_parallel_size"),
            pipeline=_size(flags, "pipeline_parallel_size"),
            data=_size(flags, "data_parallel_size"),
            expert=bool(flags.get("enable_expert_parallel", False)),
        ),
        precision=Precision(
            dtype=str(flags.get("dtype", "auto")),
            quantization=str(flags["quantization"]) if flags.get("quantization") else None,
            kv_cache_dtype=str(flags.get("kv_cache_dtype", "auto")),
        ),
        eager=bool(flags.get("enforce_eager", False)),
    )


def _size(flags: Configuration, name: str) -> int:
    return int(flags.get(name, 1))


def shape_of(model: str, config: Mapping[str, object] | None) -> ModelShape | str:
    """The shape of a model, by its config.json or the catalogue, or why nobody can say."""
    try:
        return parse_shape(config or {}, name=model)
    except ShapeError as error:
        # No config.json: a catalogued model on simulated engines, or no host was asked yet.
        known = catalogue().get(model)
        why = f"cannot be read from its config.json: {error}" if config else "is not known: no host has shown it yet"
        return known or f"the shape of {model} {why}"


def batched_tokens(flags: Configuration) -> float:
    """Tokens that one step takes at most."""
    return float(flags.get("max_num_batched_tokens", BATCHED_TOKENS))


def observed(look: EngineLook, *, batched_tokens_max: float) -> ObservedStep | None:
    """The steps that an engine made between two looks; None where they say nothing of its model's step times."""
    change, replica = look.change, look.replica
    first, gaps = change.histograms.get(FIRST_TOKEN), change.histograms.get(INTER_TOKEN)
    shared = any(claim.shared for member in replica.members for claim in member.claims)
    if shared or replica.status.state is not ReplicaState.READY:
        return None                # others compute on its GPU, or it is not warm
    if first is None or gaps is None or not look.running > 0:
        return None
    if change.steps is None or change.prompt_tokens is None or change.kv_cache_tokens is None:
        return None
    return observed_step(
        EngineChange(
            steps=change.steps,
            prompt_tokens=max(0.0, change.prompt_tokens - (change.cached_tokens or 0.0)),
            first_tokens=float(first.total),
            decode_tokens=float(gaps.total),
            decode_s=gaps.sum,
            context_tokens=look.kv_cache_usage * change.kv_cache_tokens / look.running,
            preemptions=change.preemptions or 0.0,
        ),
        batched_tokens_max=batched_tokens_max,
    )


def calibration_name(model: EngineModel) -> str:
    """The name under which what is learnt of these engines is kept."""
    return f"calibrations/{model.key}"


def stored(
    name: str, variant: Variant, model: EngineModel, calibration: Calibration, *, now_s: float
) -> StoredCalibration:
    """What goes into the store."""
    words = [f"{flag}={variant.configuration[flag]}" for flag in _DEPENDS_ON if flag in variant.configuration]
    return StoredCalibration(
        name=name,
        gpu_type=model.gpu.name,
        model=variant.model,
        configuration=" ".join(words),
        groups=tuple(group.value for group in GROUPS),
        factors=calibration.factors,
        covariance=calibration.covariance,
        noise=calibration.noise,
        prior_spread=calibration.prior_spread,
        updates=calibration.updates,
        outliers=calibration.outliers,
        run=calibration.run,
        load=calibration.load,
        update_time_s=now_s,
    )


def restored(value: StoredCalibration) -> Calibration | None:
    """What was in the store; None if it speaks of other groups of kernels than this release has."""
    size = len(GROUPS)
    fits = len(value.factors) == size and len(value.covariance) == size * size and len(value.load) in {0, size}
    if value.groups != tuple(group.value for group in GROUPS) or not fits:
        return None
    return Calibration(
        factors=value.factors,
        covariance=value.covariance,
        noise=value.noise,
        prior_spread=value.prior_spread,
        updates=value.updates,
        outliers=value.outliers,
        run=value.run,
        load=value.load,
    )
