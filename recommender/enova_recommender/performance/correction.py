"""What live step times say about a prior: one factor per group of kernels, by which its seconds are multiplied.

A step time is the sum over groups of factor x seconds at factor one (`KernelTimes.features`), so factors can be fitted
by linear regression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class KernelGroup(StrEnum):
    """Kernels that are slow or fast together, for one reason."""

    COMPUTE = "COMPUTE"        # matrix products beyond the reading of their weights
    MEMORY = "MEMORY"          # reading of weights, states and activations
    ATTENTION = "ATTENTION"
    COLLECTIVE = "COLLECTIVE"  # among GPUs
    HOST = "HOST"              # of each step: scheduling, launches
    SEQUENCE = "SEQUENCE"      # of the host for each sequence: block tables, sampling, detokenising


GROUPS = tuple(KernelGroup)  # the order of features and factors


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Factors on the seconds of each group, one by default; above one means slower than the prior.

    `spread` is the standard deviation of the logarithm of the corrected model's error at the load that was seen, None
    if nothing was fitted. Where `covariance` is known, that of the logarithms of the factors row by row, loads unlike
    those seen err by more; `noise` is then what no factor explains.
    """

    compute: float = 1.0
    memory: float = 1.0
    attention: float = 1.0
    collective: float = 1.0
    host: float = 1.0
    sequence: float = 1.0
    spread: float | None = None
    covariance: tuple[float, ...] = ()
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Factors of zero or less would turn time round."""
        if min(self.factors) <= 0:
            raise ValueError(f"factors must be above 0, not {self.factors}")

    @property
    def factors(self) -> tuple[float, ...]:
        """The factors in the order of GROUPS."""
        return (self.compute, self.memory, self.attention, self.collective, self.host, self.sequence)

    @classmethod
    def of(
        cls, factors: Sequence[float], *, spread: float | None = None, covariance: tuple[float, ...] = (),
        noise: float = 0.0,
    ) -> Correction:  # fmt: skip
        """A correction from factors in the order of GROUPS."""
        compute, memory, attention, collective, host, sequence = factors
        return cls(
            compute=compute, memory=memory, attention=attention, collective=collective, host=host, sequence=sequence,
            spread=spread, covariance=covariance, noise=noise,
        )  # fmt: skip


UNCORRECTED = Correction()
