"""From the coordinator's state and telemetry to what a policy is told. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from enova_coordinator.core.model import Deployment, Intent, Node, NodeState, Replica, Snapshot
from enova_coordinator.core.routes import DEFAULT_CONCURRENCY
from enova_coordinator.core.series import COLUMN, MINUTE_S, waiting_at
from enova_recommender.catalog import models as catalogue
from enova_recommender.scaling.types import (
    EngineSizes,
    Feature,
    GpuFacts,
    ModelFacts,
    ReplicaSeries,
    Series,
)
from enova_recommender.shape import ShapeError, parse_shape
from enova_recommender.types import ModelShape

FEATURES = frozenset(Feature)
GPU_MEMORY_UTILIZATION = 0.92      # vLLM's default
_FRAMEWORK_OF = {"qwen2": "qwen", "qwen3": "qwen", "mixtral": "mistral"}  # 0.0.7's names of model families


class Minutes(Protocol):
    """Whole minutes of a replica, one row each."""

    @property
    def values(self) -> NDArray[np.float64]:
        """Minutes x features."""
        ...


def wanted_replicas(snapshot: Snapshot, deployment: Deployment) -> tuple[Replica, ...]:
    """The replicas that are meant to serve."""
    return tuple(each for each in snapshot.replicas_of(deployment.name) if each.intent is Intent.RUN)


def series_of(replica: str, first_end_s: float, minutes: Minutes | None) -> ReplicaSeries:
    """A replica's six series; none where it never reported."""
    if minutes is None:
        return ReplicaSeries(replica=replica, series={})
    values = minutes.values

    def column(name: str) -> NDArray[np.float64]:
        found: NDArray[np.float64] = values[:, COLUMN[name]]
        return found

    running, pending = column("running"), waiting_at(values)
    by_feature: Mapping[Feature, NDArray[np.float64]] = {
        Feature.ACTIVE: running + pending,
        Feature.RUNNING: running,
        Feature.PENDING: pending,
        Feature.NEW: column("arrived"),
        Feature.SUCCESS: column("finished"),
        Feature.KV_USAGE: 100 * column("kv_cache_usage"),
    }
    return ReplicaSeries(
        replica=replica,
        series={
            feature: Series(start_s=first_end_s, step_s=MINUTE_S, values=tuple(map(float, figures)))
            for feature, figures in by_feature.items()
            if not np.isnan(figures).all()
        },
    )


def sizes(snapshot: Snapshot, deployment: Deployment) -> EngineSizes:
    """What runs: the newest variant's configuration, vLLM's defaults where it says nothing."""
    variants = [variant for variant in snapshot.variants_of(deployment.name) if not variant.retired]
    configuration = variants[-1].configuration if variants else deployment.spec.configuration
    return EngineSizes(
        tensor_parallel_size=int(configuration.get("tensor_parallel_size", 1)),
        gpu_memory_utilization=float(configuration.get("gpu_memory_utilization", GPU_MEMORY_UTILIZATION)),
        max_num_seqs=int(configuration.get("max_num_seqs", DEFAULT_CONCURRENCY)),
    )


def gpu_facts(snapshot: Snapshot, deployment: Deployment) -> GpuFacts | None:
    """The GPUs of the deployment's type that it holds or could have; None where there are none."""
    own = {gpu for replica in snapshot.replicas_of(deployment.name) for gpu in replica.gpus}
    taken = {gpu for replica in snapshot.replicas.values() for gpu in replica.gpus} - own
    variants = [variant for variant in snapshot.variants_of(deployment.name) if not variant.retired]
    gpu_type = variants[-1].gpu_type if variants else ""
    hardware = deployment.spec.hardware
    memories = [
        gpu.memory_bytes
        for view in snapshot.nodes.values()
        if view.state is not NodeState.LOST and eligible(view.node, hardware.clusters)
        for gpu in view.gpus
        if gpu.uuid not in taken
        and gpu_type in {"", gpu.type}
        and (not hardware.allow or gpu.type in hardware.allow)
        and gpu.memory_bytes > 0
    ]
    if not memories:
        return None
    count = len(memories) if hardware.max_gpus is None else min(len(memories), hardware.max_gpus)
    return GpuFacts(count=count, memory_bytes=min(memories))


def eligible(node: Node, clusters: Sequence[str]) -> bool:
    """Whether a node takes replicas of a deployment that is bound to these clusters (empty: to none)."""
    return node.schedulable and not node.draining and (not clusters or node.cluster in clusters)


def model_facts(name: str, config: Mapping[str, object] | None, *, weight_bytes: int) -> ModelFacts | None:
    """The model as its config.json has it, or the catalogue; None where neither says enough."""
    family = str(config.get("model_type", "")) if config is not None else ""
    shape = _shape(name, config)
    if shape is None:
        return _rough_facts(family, config or {}, weight_bytes)
    return ModelFacts(
        framework=_FRAMEWORK_OF.get(family, family) or "llama",
        size_billion=max(1, round(shape.parameters / 1e9)),
        parameters=shape.parameters,
        kv_elements_per_token=shape.kv_elements_per_token,
        attention_heads=shape.attention_heads,
        context_tokens=shape.context_tokens,
    )


def _shape(name: str, config: Mapping[str, object] | None) -> ModelShape | None:
    try:
        return parse_shape(config or {}, name=name)
    except ShapeError:
        # No config.json (a catalogued model on simulated engines), or an architecture without words for it.
        return catalogue().get(name)


def _rough_facts(family: str, config: Mapping[str, object], weight_bytes: int) -> ModelFacts | None:
    """What every decoder's config.json tells, and its weights by their bytes at two a parameter."""
    layers, heads, hidden = (
        config.get(key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int) and heads > 0):
        return None
    kv_heads = config.get("num_key_value_heads")
    context = config.get("max_position_embeddings")
    parameters = weight_bytes // 2
    if parameters <= 0:
        return None
    return ModelFacts(
        framework=_FRAMEWORK_OF.get(family, family),
        size_billion=max(1, round(parameters / 1e9)),
        parameters=parameters,
        kv_elements_per_token=2 * layers * (kv_heads if isinstance(kv_heads, int) else heads) * (hidden // heads),
        attention_heads=heads,
        context_tokens=context if isinstance(context, int) else 4096,
    )
