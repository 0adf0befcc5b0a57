"""What no kernel table says: the host's share of a step, and how far predictions are off.

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
    """Seconds of what surrounds the kernels, and the spread of errors."""

    step_s: float = 1.0e-3            # scheduling, input preparation, output: every step
    prefill_step_s: float = 1.0e-3    # more for a step with prompts: no full CUDA graph
    layer_prefill_s: float = 0.0      # of each layer's launches in such a step
    sequence_s: float = 8e-6          # of each sequence: block tables, sampling, detokenising
    small_kernel_s: float = 1.5e-6    # of a small kernel within a graph, beside its traffic
    measured_spread: float = 0.13     # standard deviations of the logarithm of the error, by tier
    transferred_spread: float = 0.35


FITTED = Constants()
