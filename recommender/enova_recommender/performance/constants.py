"""What no kernel table says: the host's share of a step, what engines reach of measured kernels, and how far off it is.

Fitted on open data by `tests/tools/fit_performance.py`; the command stands beside the constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from enova_recommender.performance.times import FirstTokenDelay


class Tier(StrEnum):
    """On what a prediction rests, and hence how far it may be off."""

    MEASURED = "MEASURED"        # A: kernels measured on this type of GPU
    TRANSFERRED = "TRANSFERRED"  # B: data sheet and the kernels of another GPU
    CALIBRATED = "CALIBRATED"    # C: corrected by live step times


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpread:
    """The spread of errors on one type of GPU, told by its data sheet."""

    bandwidth_bytes_per_s: float
    bf16_flops: float
    spread: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Factors on the times of measured kernels, seconds of what surrounds them, and the spread of errors."""

    gemm: float
    experts: float               # below one: real routers hit fewer experts than the measured distribution
    block_experts: float         # the same of 8-bit weights scaled by block: engines rarely have tuned kernels for them
    prefill_attention: float
    decode_attention: float
    latent_attention: float
    recurrence: float
    elementwise: float
    collective: float
    step_s: float                # of the host: every step
    prefill_step_s: float        # more for a step with prompts, which no full CUDA graph covers
    sequence_s: float            # of each sequence: block tables, sampling, detokenising
    first_token_s: float         # between a request's arrival and its first token, beside steps: tokenising, HTTP
    first_token_steps: float     # decode steps that pass in that time beside the prompt's own computation
    measured_spread: float       # standard deviations of the logarithm of the error, by tier
    transferred_spread: float
    # How far other hosts and versions of the engine are from the ones above: deviations of logarithms between sites.
    kernels_doubt: float = 0.0
    step_doubt: float = 0.0
    sequence_doubt: float = 0.0
    gpu_spreads: tuple[GpuSpread, ...] = ()  # of types on which servers were measured

    @property
    def first_token_delay(self) -> FirstTokenDelay:
        """What first tokens take beside their prompts' steps."""
        return FirstTokenDelay(seconds=self.first_token_s, decode_steps=self.first_token_steps)


# python tests/tools/fit_performance.py --data DIR; DIR holds rec_silicon_concurrency as of November 2026.
# Doubts: python tests/tools/fit_sites.py --data DIR; DIR holds perf_llm_inference_bench as well.
FITTED = Constants(
    gemm=1.0,
    experts=0.839,
    block_experts=2.37,
    prefill_attention=0.994,
    decode_attention=1.05,
    latent_attention=0.983,
    recurrence=1.0,
    elementwise=0.995,
    collective=0.941,
    step_s=0.000508,
    prefill_step_s=0.000929,
    sequence_s=7.12e-06,
    first_token_s=0.0087,
    first_token_steps=4.13,
    measured_spread=0.38,
    transferred_spread=0.398,
    kernels_doubt=0.34,
    step_doubt=1.52,
    sequence_doubt=1.92,
    gpu_spreads=(
        GpuSpread(bandwidth_bytes_per_s=7.7e12, bf16_flops=2.25e15, spread=0.083),
        GpuSpread(bandwidth_bytes_per_s=7.75e12, bf16_flops=2.25e15, spread=0.142),
        GpuSpread(bandwidth_bytes_per_s=3.35e12, bf16_flops=9.894e14, spread=0.355),
        GpuSpread(bandwidth_bytes_per_s=4.8e12, bf16_flops=9.894e14, spread=0.645),
    ),
)
