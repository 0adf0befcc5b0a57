"""What the step times of a variant's engines depend on, or why nobody can say."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from enova_coordinator.core.engine_facts import calibration_name, engine_model, observed, restored, stored
from enova_coordinator.core.gpu_types import GpuTypes
from enova_coordinator.core.model import Claim, Gpu, Member, Replica, ReplicaState, ReplicaStatus, Variant
from enova_coordinator.core.service_times import (
    FIRST_TOKEN,
    INTER_TOKEN,
    EngineCounters,
    EngineLook,
    HistogramCounts,
)
from enova_recommender.performance.calibration import Calibration, prior, updated
from enova_recommender.performance.engine_model import EngineModel

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
VARIANT = Variant(
    name="deployments/d/variants/v1", deployment="deployments/d", model=MODEL, served_names=("d",), gpu_type="H100",
    configuration={"tensor_parallel_size": 2, "quantization": "fp8", "enforce_eager": True},
)  # fmt: skip
REPLICA = Replica(
    name="deployments/d/replicas/v1-0", uid="u", deployment="deployments/d", variant=VARIANT.name,
    members=(Member(node="nodes/n", claims=(Claim(gpu_uuid="g"),)),), status=ReplicaStatus(state=ReplicaState.READY),
)  # fmt: skip


def known(variant: Variant = VARIANT) -> EngineModel:
    model = engine_model(variant, None, GpuTypes().model(Gpu(uuid="", type=variant.gpu_type)))
    assert isinstance(model, EngineModel), model
    return model


def look(replica: Replica = REPLICA, **fields: object) -> EngineLook:
    counters = EngineCounters(
        instance="i", steps=100.0, prompt_tokens=900.0, cached_tokens=400.0, preemptions=0.0, kv_cache_tokens=10_000.0,
        histograms={
            FIRST_TOKEN: HistogramCounts(np.array([5]), 1.0),
            INTER_TOKEN: HistogramCounts(np.array([795]), 7.95),
        },
    )  # fmt: skip
    change = replace(counters, **fields)  # type: ignore[arg-type]  # of any of its fields
    return EngineLook(replica=replica, time_s=1.0, change=change, running=8.0, kv_cache_usage=0.4)


def test_flags_make_the_layout_and_the_name() -> None:
    model = known()
    assert (model.gpu.name, model.parallelism.tensor, model.precision.quantization, model.eager) == (
        "H100", 2, "fp8", True,
    )  # fmt: skip
    name = calibration_name(model)
    assert name.startswith("calibrations/H100.")
    assert name == calibration_name(known(replace(VARIANT, name="deployments/e/variants/v7", served_names=("e",))))
    assert name != calibration_name(known(replace(VARIANT, gpu_type="A100-80G")))
    assert name != calibration_name(known(replace(VARIANT, configuration={})))


@pytest.mark.parametrize(
    ("variant", "config", "why"),
    [
        (replace(VARIANT, gpu_type="CPU"), None, "GPU type CPU is a slot of the host's processor"),
        (replace(VARIANT, gpu_type="T5000"), None, "GPU type T5000 is not in the catalogue"),
        (replace(VARIANT, gpu_type=""), None, "no replica has found its GPU type yet"),
        (replace(VARIANT, model="/models/x"), None, "no host has shown it yet"),
        (replace(VARIANT, model="/models/x"), {"model_type": "abacus"}, "cannot be read from its config.json"),
    ],
)
def test_what_is_not_known_is_said(variant: Variant, config: dict[str, object] | None, why: str) -> None:
    reason = engine_model(variant, config, GpuTypes().model(Gpu(uuid="", type=variant.gpu_type)))
    assert isinstance(reason, str)
    assert why in reason


def test_counters_become_a_step_without_what_the_prefix_cache_held() -> None:
    step = observed(look(), batched_tokens_max=2048)
    assert step is not None
    assert step.step_s == pytest.approx(0.01)
    with_prompt = next(batch for _, batch in step.parts if batch.prefill_tokens)
    assert with_prompt.prefill_tokens == 100
    decoding = [batch for _, batch in step.parts if not batch.prefill_tokens]
    assert [batch.context_tokens for batch in decoding] == [500 * batch.decode_sequences for batch in decoding]


@pytest.mark.parametrize("field", ["steps", "prompt_tokens", "kv_cache_tokens"])
def test_a_counter_that_is_missing_makes_no_step(field: str) -> None:
    missing: dict[str, Any] = {field: None}
    assert observed(look(**missing), batched_tokens_max=2048) is None
    assert observed(look(histograms={}), batched_tokens_max=2048) is None


def test_an_engine_that_shares_its_gpu_or_is_not_ready_makes_no_step() -> None:
    shared = replace(REPLICA, members=(Member(node="nodes/n", claims=(Claim(gpu_uuid="g", shared=True),)),))
    starting = replace(REPLICA, status=ReplicaStatus(state=ReplicaState.STARTING))
    assert observed(look(shared), batched_tokens_max=2048) is None
    assert observed(look(starting), batched_tokens_max=2048) is None


def test_a_calibration_comes_back_from_the_store_as_it_went_in() -> None:
    calibration = updated(prior(0.5), np.array([1e-3, 6e-3, 2e-3, 0.0, 1e-3, 1e-4]), 0.05)
    assert calibration.run == 1
    assert all(getattr(calibration, each.name) != each.default for each in fields(Calibration))
    value = stored("calibrations/H100.x", VARIANT, known(), calibration, now_s=5.0)
    assert restored(value) == calibration
    assert value.configuration == "tensor_parallel_size=2 quantization=fp8 enforce_eager=True"
    assert restored(replace(value, groups=("A", *value.groups[1:]))) is None
    assert restored(replace(value, covariance=value.covariance[1:])) is None
