"""How many sequences the KV cache carries at once, for a joint sample of their lengths.

Theory of operation. Sequences that run together are independent draws from the workload. What one of them holds is
either its blocks at the end (`AT_END`, prompt and whole answer), or its blocks at a moment that finds it in the batch
(`IN_FLIGHT`): a request is met in proportion to the tokens it makes, and somewhere between its first and its last one.
The most sequences are the largest N for which the sum of N draws stays within the blocks with the wanted probability:
by the normal approximation N mean + z sd sqrt(N), or exactly, by the N-fold convolution of the distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from enova_recommender.memory.cache import CacheLayout
from enova_recommender.memory.division import MemoryFit

SEQUENCES_MAX = 1 << 20
BINS_MAX = 256           # of one sequence's blocks, for the exact sum
MOMENTS = 8              # moments of an answer at which a sequence is met
EXACT_SEQUENCES_MAX = 4096

Floats = npt.NDArray[np.float64]


class Moment(StrEnum):
    """When a sequence is looked at."""

    IN_FLIGHT = "IN_FLIGHT"
    AT_END = "AT_END"


class Method(StrEnum):
    """How the sum of many sequences' blocks is estimated."""

    NORMAL = "NORMAL"
    EXACT = "EXACT"


@dataclass(frozen=True, slots=True)
class BlockDemand:
    """Blocks that a sequence holds, and how likely each figure is."""

    blocks: Floats
    weights: Floats  # sum to 1

    @property
    def mean(self) -> float:
        """Blocks of a sequence on average."""
        return float(self.blocks @ self.weights)

    @property
    def deviation(self) -> float:
        """Standard deviation of the blocks of a sequence."""
        return float(np.sqrt(max(0.0, float((self.blocks - self.mean) ** 2 @ self.weights))))


def block_demand(
    layout: CacheLayout, lengths: Sequence[tuple[int, int]], *, moment: Moment = Moment.IN_FLIGHT
) -> BlockDemand:
    """What sequences of these (prompt, output) lengths hold."""
    if not lengths:
        raise ValueError("lengths: at least one pair of prompt and output tokens is needed")
    if moment is Moment.AT_END:
        held = np.array([layout.blocks(prompt + output) for prompt, output in lengths], dtype=np.float64)
        return BlockDemand(held, np.full(len(lengths), 1 / len(lengths)))
    parts = (np.arange(MOMENTS) + 0.5) / MOMENTS
    met = [(layout.blocks(round(prompt + part * output)), output) for prompt, output in lengths for part in parts]
    blocks, weights = np.array(met, dtype=np.float64).T
    return BlockDemand(blocks, weights / weights.sum())


def most_sequences(
    fit: MemoryFit,
    lengths: Sequence[tuple[int, int]],
    *,
    quantile: float = 0.99,
    moment: Moment = Moment.IN_FLIGHT,
    method: Method = Method.NORMAL,
) -> int:
    """The most sequences of one data rank whose cache suffices with probability `quantile`; 0 if not one fits."""
    if not 0 < quantile < 1:
        raise ValueError(f"quantile: must lie between 0 and 1, not {quantile}")
    if not fit.layout.groups:
        return SEQUENCES_MAX  # a model that keeps nothing
    if fit.kv_blocks < 1:
        return 0
    demand = block_demand(fit.layout, lengths, moment=moment)
    rough = _most_normal(demand, fit.kv_blocks, quantile)
    if method is Method.NORMAL or rough > EXACT_SEQUENCES_MAX:
        return rough
    return _most_exact(demand, fit.kv_blocks, quantile)


def _most_normal(demand: BlockDemand, blocks: int, quantile: float) -> int:
    """N mean + z sd sqrt(N) = blocks, solved for N."""
    spread = NormalDist().inv_cdf(quantile) * demand.deviation
    root = (-spread + np.sqrt(spread * spread + 4 * demand.mean * blocks)) / (2 * demand.mean)
    return min(SEQUENCES_MAX, int(root * root * (1 + 1e-12)))


def _most_exact(demand: BlockDemand, blocks: int, quantile: float) -> int:
    """The largest N whose sum stays within the blocks, by halving."""
    step = max(1.0, float(demand.blocks.max()) / BINS_MAX)
    # Each figure is shared between the bins beside it, so that the mean stays and the spread does not shrink.
    below = np.floor(demand.blocks / step)
    above = demand.blocks / step - below
    size = int(below.max()) + 2
    places = below.astype(np.intp)
    chances: Floats = np.bincount(places, weights=demand.weights * (1 - above), minlength=size).astype(np.float64)
    chances += np.bincount(places + 1, weights=demand.weights * above, minlength=size)
    limit = int(blocks // step)
    low, high = 0, max(1, min(EXACT_SEQUENCES_MAX, blocks // max(1, int(demand.blocks.min()))))
    while low < high:
        middle = (low + high + 1) // 2
        if _chance_within(chances, middle, limit) >= quantile:
            low = middle
        else:
            high = middle - 1
    return low


def _chance_within(chances: Floats, sequences: int, limit: int) -> float:
    """The chance that the sum of so many draws is at most `limit`."""
    most = (len(chances) - 1) * sequences
    if most <= limit:
        return 1.0
    size = 1 << (most + 1).bit_length()
    total = np.fft.irfft(np.fft.rfft(chances, size) ** sequences, size)
    return float(total[: limit + 1].sum())
