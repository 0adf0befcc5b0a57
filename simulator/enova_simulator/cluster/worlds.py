"""Where the step times of simulated engines come from: three worlds, so that no policy is judged by its own beliefs.

(a) ADDITIVE: a sum of five parts, fitted to published measurements (Splitwise, SageServe) that nothing else of enova is
fitted on; only the models and GPUs that were measured exist in it.
(b) PERTURBED: the recommender's kernel tables times a lognormal efficiency of each GPU and model (sigma 0.15), and of
each replica (0.03), so that the recommender's predictions are as wrong as predictions are.
(c) MATCHED: exactly what the recommender believes.

`built` makes one variant of a fleet: its step times in a world, its memory, and what policies are told of it. Their
capacity is measured in the world itself, times an error that is given: a prior that is neither right nor ours.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from enova_recommender import catalog
from enova_recommender.engine import Limits
from enova_recommender.memory import fit
from enova_recommender.performance import Affine, KernelTimes, Slowed, StepTimes, first_token_delay
from enova_recommender.types import Batch, GpuModel, ModelShape, Parallelism
from enova_simulator.cluster.setup import SetupError
from enova_simulator.cluster.tables import Tabulated, tabulated

GPU_SIGMA = 0.15                   # of the logarithm of a GPU's and model's efficiency, in world (b)
REPLICA_SIGMA = 0.03               # of a replica's, in worlds (a) and (b)
UNLOADED_AT = (1, 64, 256, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"
LLAMA_70B = "meta-llama/Llama-3.1-70B-Instruct"
LLAMA2_70B = "meta-llama/Llama-2-70b-chat-hf"

# python tests/tools/fit_additive_world.py --data DIR, on perf_splitwise; median errors 1.4 to 4.8 % of decode steps and
# 4.4 to 11.7 % of prompt steps.
ADDITIVE = MappingProxyType({
    (LLAMA_8B, "A100-80G", 2): (0.008065, 4.209e-05, 6.137e-09, 0.0, 4.687e-07),
    (LLAMA_8B, "A100-80G", 4): (0.00644, 7.159e-05, 2.466e-09, 0.0001598, 4.822e-07),
    (LLAMA2_70B, "A100-80G", 2): (0.05773, 0.0002988, 1.669e-08, 0.0002051, 2.902e-08),
    (LLAMA2_70B, "A100-80G", 4): (0.04335, 0.0001862, 1.966e-08, 0.0001917, 3.546e-07),
    (LLAMA2_70B, "A100-80G", 8): (0.04409, 0.0001139, 1.535e-08, 0.0001943, 3.24e-07),
    (LLAMA2_70B, "H100", 2): (0.03767, 0.0001061, 1.514e-08, 0.0001361, 0.0),
    (LLAMA2_70B, "H100", 4): (0.02883, 7.597e-05, 9.633e-09, 0.000266, 9.285e-08),
    (LLAMA2_70B, "H100", 8): (0.02988, 5.489e-05, 1.021e-08, 0.000209, 1.622e-07),
})  # fmt: skip


class World(StrEnum):
    """Which step times are true."""

    ADDITIVE = "a"
    PERTURBED = "b"
    MATCHED = "c"


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One configuration in one world."""

    model: str
    gpu: GpuModel
    gpus: int
    limits: Limits
    times: Tabulated
    first_token_delay_s: float
    replica_sigma: float
    unloaded_ttft_s: dict[int, float]

    @property
    def kv_tokens(self) -> int:
        """That its cache holds."""
        return self.limits.num_blocks * self.limits.block_size


def engine(
    world: World, *, model: str, gpu: str, tensor_parallel: int = 1, seed: int = 1000, max_num_seqs: int = 256,
    max_num_batched_tokens: int = 8192, enable_prefix_caching: bool = True,
) -> Engine:  # fmt: skip
    """A configuration as it is in a world; `seed` draws what world (b) perturbs."""
    shape, hardware = _known(model, gpu)
    parallelism = Parallelism(tensor=tensor_parallel)
    memory = fit(
        shape, hardware, parallelism=parallelism, max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
    )  # fmt: skip
    if memory.kv_blocks < 1:
        raise SetupError("gpu", f"{model} does not fit {tensor_parallel} x {gpu}")
    times = _times(world, model, (shape, hardware), parallelism, seed)
    limits = Limits(
        num_blocks=memory.kv_blocks, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
    )  # fmt: skip
    table = tabulated(times, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    return Engine(
        model=model, gpu=hardware, gpus=parallelism.gpus, limits=limits, times=table,
        first_token_delay_s=first_token_delay(times).seconds,
        replica_sigma=0.0 if world is World.MATCHED else REPLICA_SIGMA,
        unloaded_ttft_s=unloaded_ttft_s(table, max_num_batched_tokens),
    )  # fmt: skip


def unloaded_ttft_s(times: StepTimes, max_num_batched_tokens: int) -> dict[int, float]:
    """How long the first token takes with nothing else to do, by prompt tokens."""
    found: dict[int, float] = {}
    for tokens in UNLOADED_AT:
        seconds, done = 0.0, 0
        while done < tokens:
            chunk = min(max_num_batched_tokens, tokens - done)
            pairs = chunk * done + chunk * (chunk + 1) // 2
            seconds += times.step_s(Batch(prefill_tokens=chunk, prefill_pairs=pairs))
            done += chunk
        found[tokens] = seconds
    return found


def _known(model: str, gpu: str) -> tuple[ModelShape, GpuModel]:
    shape, hardware = catalog.models().get(model), catalog.gpus().get(gpu)
    if shape is None:
        raise SetupError("model", f"{model!r} is not in the catalogue")
    if hardware is None:
        raise SetupError("gpu", f"{gpu!r} is not in the catalogue: {', '.join(sorted(catalog.gpus()))}")
    return shape, hardware


def _times(
    world: World, model: str, known: tuple[ModelShape, GpuModel], parallelism: Parallelism, seed: int
) -> StepTimes:
    shape, gpu = known
    match world:
        case World.ADDITIVE:
            parts = ADDITIVE.get((model, gpu.name, parallelism.tensor))
            if parts is None:
                raise SetupError("world", f"(a) has no {model} on {parallelism.tensor} x {gpu.name}")
            return Affine(
                base_s=parts[0], prefill_token_s=parts[1], prefill_pair_s=parts[2], sequence_s=parts[3],
                context_token_s=parts[4],
            )  # fmt: skip
        case World.PERTURBED:
            key = zlib.crc32(f"{model} {gpu.name}".encode())
            factor = float(np.exp(GPU_SIGMA * np.random.default_rng([seed, key]).standard_normal()))
            return Slowed(times=_kernel_times(shape, gpu, parallelism), factor=factor)
        case World.MATCHED:
            return _kernel_times(shape, gpu, parallelism)


@lru_cache(maxsize=16)
def _kernel_times(shape: ModelShape, gpu: GpuModel, parallelism: Parallelism) -> KernelTimes:
    return KernelTimes(shape, gpu, parallelism=parallelism)
