"""Builders for tests of configuration advice: a model, GPUs, nodes, workloads, step times of a known form."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from enova_recommender import catalog
from enova_recommender.performance import Affine
from enova_recommender.recommend.types import EngineSettings, InventoryNode, Workload
from enova_recommender.types import AS_PUBLISHED, SINGLE_GPU, GpuModel, ModelShape, Parallelism, Precision

SPREAD = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineTimes(Affine):
    """Affine step times that answer for arrays as well."""

    spread: float = SPREAD

    def steps_s(
        self, prefill_tokens: npt.ArrayLike, prefill_pairs: npt.ArrayLike, decode_sequences: npt.ArrayLike,
        context_tokens: npt.ArrayLike,
    ) -> npt.NDArray[np.float64]:  # fmt: skip
        """Durations of steps."""
        return np.asarray(
            self.base_s + self.prefill_token_s * np.asarray(prefill_tokens, dtype=np.float64)
            + self.prefill_pair_s * np.asarray(prefill_pairs) + self.sequence_s * np.asarray(decode_sequences)
            + self.context_token_s * np.asarray(context_tokens)
        )  # fmt: skip


# About an 8B model on one H100.
STEP = AffineTimes(base_s=7e-3, prefill_token_s=2e-5, prefill_pair_s=2e-10, sequence_s=2e-5, context_token_s=6e-8)


def model() -> ModelShape:
    """A small dense model."""
    return catalog.models()["meta-llama/Llama-3.1-8B-Instruct"]


def gpu(name: str = "H100") -> GpuModel:
    """A known GPU with a price."""
    return replace(catalog.gpus()[name], price_per_hour=3.0)


def nodes(name: str = "H100", *, count: int = 2, gpus: int = 8, price: float = 3.0) -> list[InventoryNode]:
    """Equal nodes."""
    kind = replace(catalog.gpus()[name], price_per_hour=price)
    return [InventoryNode(name=f"{name}-{index}", gpu=kind, gpus=gpus, island_gpus=gpus) for index in range(count)]


def times(shape: ModelShape, gpu: GpuModel, parallelism: Parallelism, precision: Precision) -> AffineTimes:
    """Step times of a known form: with each doubling of the tensor-parallel size 1.6 times as fast."""
    del shape, gpu, precision
    faster = 1.6 ** math.log2(parallelism.tensor)
    return replace(STEP, **{name: getattr(STEP, name) / faster for name in Affine.__dataclass_fields__})


def settings(
    *,
    max_num_seqs: int = 128,
    max_num_batched_tokens: int = 8192,
    parallelism: Parallelism = SINGLE_GPU,
    enable_prefix_caching: bool = True,
) -> EngineSettings:
    """Settings on one H100."""
    return EngineSettings(
        gpu=gpu(), parallelism=parallelism, precision=AS_PUBLISHED, max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens, gpu_memory_utilization=0.9, max_model_len=16384,
        enable_prefix_caching=enable_prefix_caching,
    )  # fmt: skip


def lognormal_lengths(
    *, prompt: float, prompt_cv: float, output: float, output_cv: float, count: int = 500, seed: int = 7
) -> tuple[tuple[int, int], ...]:
    """Pairs of lengths with these means and coefficients of variation."""
    draw = np.random.default_rng(seed)

    def column(mean: float, cv: float) -> list[int]:
        sigma = math.sqrt(math.log(1 + cv**2))
        drawn = draw.lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
        return [int(value) for value in np.clip(np.rint(drawn), 1, 8000)]

    return tuple(zip(column(prompt, prompt_cv), column(output, output_cv), strict=True))


CHAT = lognormal_lengths(prompt=500, prompt_cv=1.2, output=250, output_cv=1.0)
CODE = lognormal_lengths(prompt=2000, prompt_cv=0.8, output=30, output_cv=1.2)
REASONING = lognormal_lengths(prompt=300, prompt_cv=0.8, output=1200, output_cv=0.6)
FIXED = ((1024, 128),)


def workload(*, rate: float = 5.0, lengths: tuple[tuple[int, int], ...] = CHAT, cv: float = 1.0) -> Workload:
    """Requests of these lengths."""
    return Workload(requests_per_s=rate, lengths=lengths, arrival_cv=cv)
