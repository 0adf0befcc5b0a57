"""What no kernel table says: the host's share of a step, what engines reach of measured kernels, and how far off it is.

Fitted on open data by `tests/tools/fit_performance.py`; the command stands beside the constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Tier(StrEnum):
    """On what a prediction rests, and hence how far it may be off."""

    MEASURED = "MEASURED"        # A: kernels measured on this type of GPU
    TRANSFERRED = "TRANSFERRED"  # B: data sheet and the kernels of another GPU
    CALIBRATED = "CALIBRATED"    # C: corrected by live step times


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Factors on the times of measured kernels, seconds of what surrounds them, and the spread of errors."""

    gemm: float = 1.0
    experts: float = 0.74              # below one: real routers hit fewer experts than the measured distribution
    prefill_attention: float = 1.0
    decode_attention: float = 1.0
    latent_attention: float = 1.0
    recurrence: float = 1.0
    elementwise: float = 1.0
    collective: float = 1.25
    step_s: float = 0.6e-3             # of the host: every step
    prefill_step_s: float = 1.0e-3     # more for a step with prompts, which no full CUDA graph covers
    sequence_s: float = 8e-6           # of each sequence: block tables, sampling, detokenising
    first_token_s: float = 5e-3        # between a request's arrival and its first token, beside steps: tokenising, HTTP
    first_token_steps: float = 3.0     # decode steps that pass in that time beside the prompt's own computation
    measured_spread: float = 0.13      # standard deviations of the logarithm of the error, by tier
    transferred_spread: float = 0.35


FITTED = Constants()
