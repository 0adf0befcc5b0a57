"""The distribution of answers' lengths, where some answers were stopped before their end; pure.

Theory of operation. An answer that was stopped by a limit says only that it would have been longer: it is right-
censored. Leaving such answers out, or taking the limit for their length, makes the next limit shorter than the last
one, and so on. The product-limit estimator (Kaplan and Meier, 1958) gives each answer that ended by itself the mass
of itself and of its share of those stopped before it. It is right if what stops an answer knows nothing of how long
that answer would have become; a cap made to fit each single answer would break it. On the logarithm of the length the
masses carry normal kernels: F(x) = sum of m_i Phi((x - y_i) / h). The bandwidth is that of a distribution function,
which falls with n^(-1/3), faster than a density's; and the points are drawn together around their mean, so that the
kernels do not make the whole wider than the sample is. What mass is left at the longest stopped answer lies beyond it,
nobody knows where.

A quantile of a sample is passed by more of what comes next than of the sample: of n lengths, n + 1 gaps are equally
likely. The limit is therefore taken a little further out, by half an observation of the n that the estimate is worth
at its tail (Greenwood's variance says how many those are).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

BANDWIDTH = 1.2            # times sigma n^(-1/3); 1.6 is best for a normal distribution, and tails are longer than its
BANDWIDTH_MIN = 0.01       # of the logarithm: one per cent of a length
_BISECTIONS = 40           # of an interval of some units of the logarithm: far below one token
_REACH = 8.0               # bandwidths around a point that hold all of its mass


@dataclass(frozen=True, slots=True)
class Masses:
    """Where an estimate puts the lengths: `mass` on each of `lengths`, ascending; `beyond` past the last stop."""

    lengths: Floats
    mass: Floats
    beyond: float
    variance: Floats           # of the survival after each length, by Greenwood
    answers: int               # that the estimate was made of


def product_limit(tokens: Ints, stopped: Flags) -> Masses:
    """The product-limit estimate of lengths; `stopped` marks those that a limit ended."""
    lengths, position = np.unique(tokens, return_inverse=True)
    ended = np.bincount(position, weights=~stopped, minlength=len(lengths))
    left = np.bincount(position, minlength=len(lengths))
    at_risk = left[::-1].cumsum()[::-1]       # an answer stopped at t would have been longer: it is at risk at t
    survival = np.cumprod(1.0 - ended / at_risk)
    mass = np.concatenate([[1.0], survival[:-1]]) - survival
    survivors = np.maximum(at_risk - ended, 1.0)  # after the last there are none, and its survival is 0 anyway
    variance = survival**2 * np.cumsum(ended / (at_risk * survivors))
    kept = ended > 0
    beyond = float(survival[-1]) if len(survival) else 1.0
    return Masses(lengths[kept].astype(np.float64), mass[kept], beyond, variance[kept], len(tokens))


def worth_at(masses: Masses, cut_share: float) -> float:
    """How many lengths that all ended by themselves would say as much about the tail of this share."""
    survival = 1.0 - np.cumsum(masses.mass)
    inside = np.flatnonzero((survival >= cut_share) & (masses.variance > 0))
    if not len(inside):
        return float(masses.answers)   # one step goes past the tail: nothing was stopped before it
    last = int(inside[-1])
    return float(survival[last] * (1.0 - survival[last]) / masses.variance[last])


@dataclass(frozen=True, slots=True)
class LengthDensity:
    """A kernel density of log length: points, their masses, one bandwidth, and the mass beyond all of them."""

    points: Floats
    mass: Floats
    bandwidth: float
    beyond: float

    def cdf(self, tokens: Ints | Floats) -> Floats:
        """The share of answers that are at most so long, for each length."""
        at = np.log(np.maximum(tokens.astype(np.float64) + 0.5, 0.5))  # a whole number stands for its interval
        return np.asarray(ndtr((at[:, None] - self.points) / self.bandwidth) @ self.mass, np.float64)

    def density(self, log_tokens: Floats) -> Floats:
        """The density of the logarithm of the length, at each point."""
        scaled = (log_tokens[:, None] - self.points) / self.bandwidth
        kernels = np.exp(-0.5 * scaled * scaled) / (self.bandwidth * math.sqrt(2 * math.pi))
        return np.asarray(kernels @ self.mass, np.float64)

    def limit(self, cut_share: float) -> int | None:
        """The smallest number of tokens that cuts at most this share; None if nobody has seen so far out."""
        if not len(self.points) or self.beyond >= cut_share:
            return None
        low = float(self.points[0]) - _REACH * self.bandwidth
        high = float(self.points[-1]) + _REACH * self.bandwidth
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            reached = float(ndtr((middle - self.points) / self.bandwidth) @ self.mass) >= 1.0 - cut_share
            low, high = (low, middle) if reached else (middle, high)
        return max(1, math.ceil(math.exp(high) - 0.5))


def density_of(masses: Masses) -> LengthDensity:
    """The density of an estimate."""
    points = np.log(np.maximum(masses.lengths, 1.0))
    total = float(masses.mass.sum())
    if not total:
        return LengthDensity(points, masses.mass, BANDWIDTH_MIN, masses.beyond)
    share = masses.mass / total
    centre = float(points @ share)
    variance = float((points - centre) ** 2 @ share)
    effective = total * total / float(masses.mass @ masses.mass) if len(points) > 1 else 1.0
    bandwidth = max(BANDWIDTH * math.sqrt(variance) * effective ** (-1 / 3), BANDWIDTH_MIN)
    shrink = math.sqrt(max(0.0, 1.0 - bandwidth * bandwidth / variance)) if variance else 1.0
    return LengthDensity(centre + (points - centre) * shrink, masses.mass, bandwidth, masses.beyond)


def limit_of(masses: Masses, cut_share: float) -> int | None:
    """The limit that cuts this share of the answers to come; None if the sample does not reach so far."""
    if not len(masses.lengths):
        return None
    beyond_sample = (1.0 - cut_share) / (2.0 * worth_at(masses, cut_share))
    return density_of(masses).limit(max(cut_share / 2, cut_share - beyond_sample))
