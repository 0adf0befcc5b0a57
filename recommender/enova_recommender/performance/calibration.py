"""Corrects the performance model by what steps really took: recursive least squares on efficiency factors.

Theory of operation. The model splits the duration of a step into seconds g_i by group of kernels. Each group gets a
factor theta_i, 1 before anything was measured, and a step that took t seconds is one equation

    t / s = sum theta_i x_i + e,    s = sum theta_i g_i at the factors of before,  x_i = g_i / s

so that errors are relative and one setting serves steps of a millisecond and of a second. Of it follow the usual
steps of recursive least squares, with three guards:

- *Forgetting.* Before each update the information (the inverse P^-1 of the covariance) decays towards that of the
  prior: P^-1 <- lambda P^-1 + (1 - lambda) P0^-1, lambda = 0.5^(1 / HALF_LIFE). What was learnt counts half after
  HALF_LIFE updates, and P never exceeds P0: directions that no load excites do not wind up (Kulhavy's stabilised
  forgetting). The factors themselves stay where they are. Idle frames are no updates.
- *Outliers.* An error of more than HUBER standard deviations is cut to so many (Huber's score), and the covariance
  shrinks only by the share that was believed: one frame bends no factor by more than HUBER of its own deviations.
  After RUN errors in a row that were cut on the same side it is the world that changed: the covariance becomes that of
  the prior, around the factors as they are. One slow replica among healthy ones makes no such run.
- *Range.* Factors stay within [FACTOR_MIN, FACTOR_MAX]; and the noise of a frame is what frames scattered by lately,
  not less than NOISE_MIN.

The prior says that groups err together (a card that is slow is slow at everything) as well as each for itself; so the
first measurement moves all factors, and later ones tell the groups apart as far as loads differ. It is as wide as the
model itself says that it errs (`spread`): a model that is known to be good is not thrown over by one frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from enova_recommender.performance.correction import GROUPS, UNCORRECTED, Correction
from enova_recommender.performance.live_steps import FULL_STEPS, ObservedStep
from enova_recommender.types import Batch

Floats = NDArray[np.float64]

HALF_LIFE = 240.0          # updates: forty minutes of load at one frame of ten seconds
HUBER = 2.0                # standard deviations; 5 % of undisturbed frames are cut a little
FACTOR_MIN, FACTOR_MAX = 0.2, 5.0
RUN = 12
SPREAD = 0.35              # relative error of a step that the prior allows for, where nobody says better
SPREAD_MIN = 0.30          # what a model says of itself on known GPUs holds less for the host around them
COMMON_SHARE = 0.8         # of that spread: what all factors share ...
GROUP_SHARE = 0.9          # ... and what each has beside it
NOISE = 0.06               # relative error of a frame before any was seen: what the model cannot follow
NOISE_MIN = 0.02
NOISE_HALF_LIFE = 30.0     # updates over which the scatter of frames is taken
STEP_S_MIN, STEP_S_MAX = 1e-9, 600.0  # less or more is no step


class Correctable(Protocol):
    """A performance model that takes a correction, as `KernelTimes` does."""

    @property
    def spread(self) -> float:
        """The standard deviation of the logarithm of its error."""
        ...

    def features(self, batch: Batch) -> Floats:
        """Seconds of a step by group, at factor 1."""
        ...

    def corrected(self, correction: Correction) -> Self:
        """The same model with these factors in place of any it had."""
        ...


T = TypeVar("T", bound=Correctable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was learnt of one model and configuration on one GPU type. It is stored as it is.

    `covariance` is that of the factors, row by row; `noise` the relative scatter of frames around the corrected model.
    """

    factors: tuple[float, ...]       # in the order of GROUPS, as all the rest
    covariance: tuple[float, ...]
    noise: float = NOISE
    prior_spread: float = SPREAD
    updates: int = 0
    outliers: int = 0
    run: int = 0                     # errors in a row that were cut, negative for those that were too fast
    load: tuple[float, ...] = ()     # shares of the groups in the steps seen, exponential mean; () before the first

    @property
    def deviations(self) -> tuple[float, ...]:
        """The standard deviation of each factor."""
        return tuple(map(float, np.sqrt(np.diag(_square(self.covariance)))))

    @property
    def factor(self) -> float:
        """The factor of a whole step at the load that was seen: above 1 is slower than the tables say."""
        return float(np.dot(self.load, self.factors)) if self.load else 1.0

    @property
    def spread(self) -> float:
        """The relative standard deviation of a predicted step at the load that was seen."""
        load = np.array(self.load or [1.0 / len(self.factors)] * len(self.factors))
        x = load / float(load @ self.factors)
        return math.sqrt(float(x @ _square(self.covariance) @ x) + self.noise**2)

    @property
    def correction(self) -> Correction:
        """The factors, as the model takes them."""
        return Correction.of(self.factors, spread=self.spread) if self.updates else UNCORRECTED


def prior(spread: float = SPREAD) -> Calibration:
    """Nothing measured: all factors 1, and a step's error around `spread`."""
    spread = max(spread, SPREAD_MIN)
    return Calibration(
        factors=(1.0,) * len(GROUPS), covariance=_flat(_prior_matrix(spread)), prior_spread=spread
    )


def calibrated(times: T, steps: Iterable[ObservedStep]) -> T:
    """The model corrected by steps that were measured in this order, from its own prior."""
    return times.corrected(learnt(prior(times.spread), times, steps).correction)


def learnt(calibration: Calibration, times: Correctable, steps: Iterable[ObservedStep]) -> Calibration:
    """The calibration after more steps that were measured."""
    for step in steps:
        calibration = updated(calibration, seconds_of(times, step), step.step_s, steps=step.steps)
    return calibration


def seconds_of(times: Correctable, step: ObservedStep) -> Floats:
    """Seconds by group that the model gives an observed step, at factor 1."""
    total: Floats = np.zeros(len(GROUPS))
    for share, batch in step.parts:
        total = total + share * times.features(batch)
    return total


def updated(
    calibration: Calibration,
    seconds: Floats,
    step_s: float,
    *,
    steps: float = FULL_STEPS,
    half_life: float = HALF_LIFE,
) -> Calibration:
    """The calibration after a frame whose `steps` took `step_s` each on mean, `seconds` by group at factor 1.

    A frame that says nothing (no time, no seconds, not finite) changes nothing.
    """
    seconds = np.asarray(seconds, dtype=np.float64)
    assert seconds.shape == (len(GROUPS),), "one figure a group"
    total = float(seconds.sum())
    in_range = STEP_S_MIN < step_s < STEP_S_MAX and STEP_S_MIN < total < STEP_S_MAX
    if not in_range or not steps > 0 or seconds.min() < 0:
        return calibration
    factors = np.array(calibration.factors)
    matrix = _forgotten(_square(calibration.covariance), _prior_matrix(calibration.prior_spread), half_life)
    predicted = float(factors @ seconds)
    x = seconds / predicted
    error = step_s / predicted - 1.0
    gain = matrix @ x
    variance = float(x @ gain) + calibration.noise**2 * max(1.0, FULL_STEPS / steps)
    believed = min(1.0, HUBER * math.sqrt(variance) / abs(error)) if error else 1.0
    factors = np.clip(factors + gain * (believed * error / variance), FACTOR_MIN, FACTOR_MAX)
    matrix = matrix - believed * np.outer(gain, gain) / variance
    after = replace(
        calibration,
        factors=tuple(map(float, factors)),
        covariance=_flat((matrix + matrix.T) / 2),
        noise=_noise(calibration, step_s / float(factors @ seconds) - 1.0, variance),
        updates=calibration.updates + 1,
        load=_load(calibration, seconds / total),
    )
    return after if believed == 1.0 and not calibration.run else _counted(after, error, cut=believed < 1.0)


def _counted(calibration: Calibration, error: float, *, cut: bool) -> Calibration:
    """With its outliers counted; opened to change after a run of them."""
    if not cut:
        return replace(calibration, run=0)
    side = 1 if error > 0 else -1
    run = calibration.run + side if calibration.run * side >= 0 else side
    outliers = calibration.outliers + 1
    if abs(run) < RUN:
        return replace(calibration, run=run, outliers=outliers)
    covariance = _flat(_prior_matrix(calibration.prior_spread))
    return replace(calibration, run=0, outliers=outliers, covariance=covariance, noise=NOISE)


def _load(calibration: Calibration, shares: Floats) -> tuple[float, ...]:
    if calibration.load:
        keep = 0.5 ** (1 / NOISE_HALF_LIFE)
        shares = keep * np.array(calibration.load) + (1 - keep) * shares
    return tuple(map(float, shares))


def _forgotten(matrix: Floats, before: Floats, half_life: float) -> Floats:
    keep = 0.5 ** (1 / half_life)
    result: Floats = np.linalg.inv(keep * np.linalg.inv(matrix) + (1 - keep) * np.linalg.inv(before))
    return result


def _noise(calibration: Calibration, left: float, variance: float) -> float:
    """The scatter of frames, with what this one left over; the bound keeps one outlier from blowing it up."""
    keep = 0.5 ** (1 / NOISE_HALF_LIFE)
    bounded = min(abs(left), HUBER * math.sqrt(variance))
    return max(NOISE_MIN, math.sqrt(keep * calibration.noise**2 + (1 - keep) * bounded**2))


def _prior_matrix(spread: float) -> Floats:
    size = len(GROUPS)
    matrix: Floats = np.full((size, size), (COMMON_SHARE * spread) ** 2) + np.eye(size) * (GROUP_SHARE * spread) ** 2
    return matrix


def _square(covariance: tuple[float, ...]) -> Floats:
    return np.array(covariance).reshape(len(GROUPS), len(GROUPS))


def _flat(matrix: Floats) -> tuple[float, ...]:
    return tuple(map(float, matrix.ravel()))
