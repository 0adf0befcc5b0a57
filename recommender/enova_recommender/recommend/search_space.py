"""What a search goes through: layouts of a replica on the GPUs of a node, and settings of the engine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from enova_recommender.recommend.capacity_lengths import Floats
from enova_recommender.recommend.errors import RecommendError
from enova_recommender.recommend.types import Constraint, InventoryNode
from enova_recommender.types import Experts, GpuModel, ModelShape, Parallelism, Precision

SIZES = (1, 2, 4, 8, 16)
CONTEXT_STEP = 1024        # max_model_len below the model's own is a multiple of it
BFLOAT16_CAPABILITY = 8.0  # CUDA compute capability from which the type is computed
FP8_CACHE_CAPABILITY = 8.9


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """Values to try. Empty parallelisms: all that a node allows; empty max_model_lens: the model's own context and
    the least that the workload needs. With `is_guarded` each max_num_seqs is lowered to what keeps the objective
    between tokens in a batch that is always full: when more comes than is carried, requests wait instead of all
    becoming slow."""

    parallelisms: tuple[Parallelism, ...] = ()
    max_num_seqs: tuple[int, ...] = (256, 128, 64, 32, 16, 8, 512, 1024)
    max_num_batched_tokens: tuple[int, ...] = (8192, 4096, 2048, 16384)
    gpu_memory_utilizations: tuple[float, ...] = (0.92, 0.85, 0.95)
    max_model_lens: tuple[int, ...] = ()
    kv_cache_dtypes: tuple[str, ...] = ("auto", "fp8")
    prefix_caching: tuple[bool, ...] = (True,)
    is_guarded: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """All nodes with one type of GPU."""

    gpu: GpuModel
    nodes: tuple[InventoryNode, ...]

    @property
    def price_per_hour(self) -> float:
        """Price of one GPU, USD an hour."""
        assert self.gpu.price_per_hour is not None, "pools_of takes no GPU without a price"
        return self.gpu.price_per_hour

    @property
    def largest_gpus(self) -> int:
        """GPUs of the largest node."""
        return max(node.gpus for node in self.nodes)

    @property
    def island_gpus(self) -> int:
        """GPUs of the largest island of a node."""
        return max(min(node.island_gpus, node.gpus) for node in self.nodes)

    def room(self, parallelism: Parallelism) -> int:
        """Replicas of this layout that all nodes hold together; a tensor-parallel group stays within an island."""
        return sum(_replicas(node, parallelism) for node in self.nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Combinations:
    """All settings of the engine that are tried with each layout, an array each."""

    max_num_seqs: Floats
    max_num_batched_tokens: Floats
    gpu_memory_utilization: Floats
    max_model_len: Floats
    prefix_caching: Floats    # 1 or 0

    def __len__(self) -> int:
        return len(self.max_num_seqs)


def pools_of(inventory: Sequence[InventoryNode]) -> tuple[Pool, ...]:
    """Nodes by type of GPU. RecommendError if there is none, or one cannot be meant."""
    if not inventory:
        raise RecommendError("inventory", "holds no node: without GPUs nothing can be advised")
    for index, node in enumerate(inventory):
        if node.gpus < 1:
            raise RecommendError(f"inventory[{index}].gpus", f"must be 1 or more, is {node.gpus} ({node.name})")
        if node.island_gpus < 1:
            raise RecommendError(f"inventory[{index}].island_gpus", f"must be 1 or more, is {node.island_gpus}")
        price = node.gpu.price_per_hour
        if price is None or not (math.isfinite(price) and price > 0):
            raise RecommendError(
                f"inventory[{index}].gpu.price_per_hour", f"{node.gpu.name} needs a price above 0, has {price}"
            )
    types = dict.fromkeys(node.gpu for node in inventory)
    return tuple(Pool(gpu=gpu, nodes=tuple(node for node in inventory if node.gpu == gpu)) for gpu in types)


def check_space(space: SearchSpace) -> None:
    """RecommendError if a value cannot be meant."""
    for name in ("max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilizations", "kv_cache_dtypes",
                 "prefix_caching"):  # fmt: skip
        if not getattr(space, name):
            raise RecommendError(f"space.{name}", "must hold at least one value")
    for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_lens"):
        if (least := min(getattr(space, name), default=1)) < 1:
            raise RecommendError(f"space.{name}", f"must be 1 or more, one is {least}")
    for share in space.gpu_memory_utilizations:
        if not 0 < share <= 1:
            raise RecommendError("space.gpu_memory_utilizations", f"must lie in (0, 1], one is {share}")


def combinations(space: SearchSpace, *, longest_tokens: int, context_tokens: int) -> Combinations:
    """All settings, those that vLLM would choose by itself first."""
    needed = min(context_tokens, -(-longest_tokens // CONTEXT_STEP) * CONTEXT_STEP)
    lens = space.max_model_lens or tuple(dict.fromkeys((context_tokens, needed)))
    rows = [
        (seqs, tokens, share, length, float(prefix))
        for length, prefix, share, tokens, seqs in itertools.product(
            lens, space.prefix_caching, space.gpu_memory_utilizations, space.max_num_batched_tokens, space.max_num_seqs
        )
        if tokens >= seqs  # vLLM refuses less than one token a sequence
    ]
    if not rows:
        raise RecommendError("space.max_num_batched_tokens", "must reach max_num_seqs at least once")
    seqs, tokens, shares, lengths, prefixes = np.array(rows, dtype=np.float64).T
    return Combinations(
        max_num_seqs=seqs, max_num_batched_tokens=tokens, gpu_memory_utilization=shares, max_model_len=lengths,
        prefix_caching=prefixes,
    )  # fmt: skip


def parallelisms(shape: ModelShape, pool: Pool) -> Iterator[Parallelism]:
    """Layouts within a node: tensor, pipeline and, for experts, data and expert parallel."""
    sizes = [size for size in SIZES if size <= pool.largest_gpus]
    sparse = any(isinstance(block.feed_forward, Experts) for block in shape.blocks)
    for tensor, pipeline, data, expert in itertools.product(
        sizes, sizes, sizes if sparse else (1,), (False, True) if sparse else (False,)
    ):
        found = Parallelism(tensor=tensor, pipeline=pipeline, data=data, expert=expert)
        if found.gpus > pool.largest_gpus or (expert and tensor * data == 1) or (data > 1 and pipeline > 1):
            continue
        if data > 1 and not expert:
            continue  # ranks that share nothing are replicas
        yield found


def why_no_layout(
    shape: ModelShape, pool: Pool, parallelism: Parallelism, precision: Precision
) -> tuple[Constraint, str] | None:
    """What keeps a model from being cut so, or computed on this GPU, with its numbers; None if nothing does."""
    tensor, gpu = parallelism.tensor, pool.gpu
    if parallelism.gpus > pool.largest_gpus:
        return Constraint.LAYOUT, f"takes {parallelism.gpus} GPUs of one node, the largest has {pool.largest_gpus}"
    if tensor > pool.island_gpus:
        return Constraint.LAYOUT, f"tensor parallel {tensor} leaves the island of {pool.island_gpus} {gpu.name}"
    if shape.attention_heads % tensor:
        return Constraint.LAYOUT, f"{shape.attention_heads} attention heads cannot be divided by {tensor}"
    if parallelism.pipeline > shape.layers:
        return Constraint.LAYOUT, f"{shape.layers} layers make no {parallelism.pipeline} stages"
    experts = [block.feed_forward.experts for block in shape.blocks if isinstance(block.feed_forward, Experts)]
    if parallelism.expert and any(count % (tensor * parallelism.data) for count in experts):
        return Constraint.LAYOUT, f"{experts[0]} experts cannot be divided by {tensor * parallelism.data}"
    dtype = shape.dtype if precision.dtype == "auto" else precision.dtype
    if dtype == "bfloat16" and gpu.compute_capability < BFLOAT16_CAPABILITY:
        return Constraint.PRECISION, f"{gpu.name} (capability {gpu.compute_capability}) has no bfloat16"
    if precision.kv_cache_dtype.startswith("fp8") and gpu.compute_capability < FP8_CACHE_CAPABILITY:
        return Constraint.PRECISION, f"{gpu.name} (capability {gpu.compute_capability}) has no fp8 KV cache"
    return None


def _replicas(node: InventoryNode, parallelism: Parallelism) -> int:
    """Replicas that one node holds."""
    island = min(node.island_gpus, node.gpus)
    if parallelism.tensor > island:
        return 0
    if parallelism.gpus <= island:
        return node.gpus // island * (island // parallelism.gpus) + node.gpus % island // parallelism.gpus
    groups = node.gpus // island * (island // parallelism.tensor)
    return groups // (parallelism.gpus // parallelism.tensor)
