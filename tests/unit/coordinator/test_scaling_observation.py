"""What policies are told is what was stored: missing stays missing, the ingress's queue counts, facts fit the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from enova_coordinator.core.model import (
    Deployment,
    DeploymentSpec,
    Gpu,
    Hardware,
    Node,
    NodeState,
    NodeView,
    Snapshot,
    Variant,
)
from enova_coordinator.core.observation import gpu_facts, model_facts, series_of, sizes
from enova_coordinator.core.series import COLUMN, REPLICA_FEATURES
from enova_coordinator.core.situation import recent_of
from enova_recommender.scaling.situation import Signal
from enova_recommender.scaling.types import Feature, GpuFacts

NAN = math.nan


@dataclass(frozen=True, slots=True)
class StoredMinutes:
    """Minutes as telemetry hands them over."""

    values: NDArray[np.float64]


def stored(**columns: list[float]) -> StoredMinutes:
    count = len(next(iter(columns.values())))
    values = np.full((count, len(REPLICA_FEATURES)), NAN)
    for name, figures in columns.items():
        values[:, COLUMN[name]] = figures
    return StoredMinutes(values)


def test_what_the_ingress_holds_beyond_the_engine_is_pending() -> None:
    found = series_of("r", 60.0, stored(running=[4, 4, 4], waiting=[0, 3, 1], held=[90, 5, NAN]))
    assert found.series[Feature.PENDING].values == (86, 3, 1)
    assert found.series[Feature.ACTIVE].values == (90, 7, 5)


def test_both_kinds_of_policies_are_told_the_same_of_what_waits() -> None:
    rows = stored(running=[4, NAN, 4, 2], waiting=[0, 3, NAN, NAN], held=[90, 5, 9, NAN])
    by_minute = series_of("r", 60.0, rows).series[Feature.PENDING].values
    by_step = recent_of({"r": rows.values.astype(np.float32)}, end_s=60.0, step_s=1.0).values[Signal.WAITING][0]
    assert by_minute == pytest.approx(tuple(by_step), nan_ok=True)
    assert by_minute == pytest.approx((86, 3, 5, NAN), nan_ok=True)


def test_missing_stays_missing() -> None:
    found = series_of("r", 60.0, stored(running=[NAN, 2, NAN], waiting=[NAN, 0, 0]))
    assert [math.isnan(value) for value in found.series[Feature.RUNNING].values] == [True, False, True]
    assert Feature.KV_USAGE not in found.series
    assert series_of("r", 60.0, None).series == {}


def test_cache_use_is_told_in_per_cent() -> None:
    found = series_of("r", 60.0, stored(kv_cache_usage=[0.25]))
    assert found.series[Feature.KV_USAGE].values == (25,)


def test_a_catalogued_model_is_known_without_a_config() -> None:
    facts = model_facts("meta-llama/Llama-3.1-8B-Instruct", None, weight_bytes=0)
    assert facts is not None
    assert (facts.framework, facts.size_billion, facts.kv_elements_per_token) == ("llama", 8, 2 * 32 * 8 * 128)


def test_an_architecture_without_words_is_told_roughly() -> None:
    config = {
        "model_type": "mixtral",
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "num_local_experts": 8,
        "max_position_embeddings": 32768,
    }
    facts = model_facts("org/mix", config, weight_bytes=94_000_000_000)
    assert facts is not None
    assert (facts.framework, facts.size_billion, facts.kv_elements_per_token) == ("mistral", 47, 65536)
    assert model_facts("org/mix", {"model_type": "strange"}, weight_bytes=94_000_000_000) is None


def snapshot(*, memory_bytes: int = 80 << 30) -> Snapshot:
    gpus = tuple(
        Gpu(uuid=f"g{index}", type="H100" if index < 6 else "A100", memory_bytes=memory_bytes) for index in range(8)
    )
    node = NodeView(node=Node(name="nodes/n", uid="n", gpus=gpus), state=NodeState.READY)
    variant = Variant(
        name="deployments/d/variants/v1",
        deployment="deployments/d",
        model="m",
        served_names=("d",),
        gpu_type="H100",
        configuration={"tensor_parallel_size": 2, "max_num_seqs": 64},
    )
    return Snapshot(nodes={"nodes/n": node}, variants={variant.name: variant})


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        (Hardware(), GpuFacts(count=6, memory_bytes=80 << 30)),
        (Hardware(max_gpus=4), GpuFacts(count=4, memory_bytes=80 << 30)),
        (Hardware(allow=("L4",)), None),
        (Hardware(clusters=("elsewhere",)), None),
    ],
)
def test_gpus_are_those_that_the_deployment_may_have(hardware: Hardware, expected: GpuFacts | None) -> None:
    wanted = Deployment(name="deployments/d", uid="u", spec=DeploymentSpec(model="m", hardware=hardware))
    assert gpu_facts(snapshot(), wanted) == expected


def test_sizes_are_those_of_the_newest_variant() -> None:
    wanted = Deployment(name="deployments/d", uid="u", spec=DeploymentSpec(model="m"))
    found = sizes(snapshot(), wanted)
    assert (found.tensor_parallel_size, found.max_num_seqs) == (2, 64)
