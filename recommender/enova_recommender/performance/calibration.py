"""Corrects the performance model by what steps really took: recursive least squares on efficiency factors.

Theory of operation. The model splits the duration of a step into seconds g_i by group of kernels. Each group gets a
factor theta_i, 1 before anything was measured, and a step that took t seconds is one equation

    t / s = sum theta_i x_i + e,    s = sum theta_i g_i at the factors of before,  x_i = g_i / s

so that errors are relative and one setting serves steps of a millisecond and of a second. Live frames come by the
thousand, and are learnt from one by one (`updated`) by recursive least squares with covariance P and three guards:

- *Forgetting.* Before each update what is known decays towards the prior: P^-1 <- lambda P^-1 + (1 - lambda) P0^-1, the
  factors with it towards 1 as these informations weigh, lambda = 0.5^(1 / HALF_LIFE). What was learnt counts half after
  HALF_LIFE updates, and P never exceeds P0: directions that no load excites neither wind up nor wander, while those
  that are measured again and again stay (Kulhavy's stabilised forgetting). Idle frames are no updates.
- *Outliers.* An error of more than HUBER standard deviations is cut to so many (Huber's score), and the covariance
  shrinks only by the share that was believed: one frame bends no factor by more than HUBER of its own deviations.
  After RUN errors in a row that were cut on the same side it is the world that changed: the covariance becomes that of
  the prior, around the factors as they are. One slow replica among healthy ones makes no such run.
- *Range.* Factors stay within [FACTOR_MIN, FACTOR_MAX]: one that would leave it is known to lie at its bound, and the
  others follow by their covariance with it. The noise of a frame is what frames scattered by lately, not less than
  NOISE_MIN.

The prior says that groups err together (a card that is slow is slow at everything) as well as each for itself; so the
first measurement moves all factors, and later ones tell the groups apart as far as loads differ. It is as wide as the
model itself says that it errs (`spread`): a model that is known to be good is not thrown over by one frame.

A few measurements that were made on purpose are taken all at once instead (`measured`): the most probable logarithms of
the factors where these, and the errors in ln t, are small but for a few, by Gauss-Newton steps. Twice as long then
weighs as much as half as long, and one group may be far off alone: three measurements can correct a factor of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from enova_recommender.performance.correction import GROUPS, UNCORRECTED, Correction, KernelGroup
from enova_recommender.performance.live_steps import FULL_STEPS, ObservedStep
from enova_recommender.types import Batch

Floats = NDArray[np.float64]

HALF_LIFE = 240.0          # updates: forty minutes of load at one frame of ten seconds
HUBER = 2.0                # standard deviations; 5 % of undisturbed frames are cut a little
FACTOR_MIN, FACTOR_MAX = 0.2, 10.0  # hosts were seen to take nine times as long for a sequence
RUN = 12
SPREAD = 0.35              # relative error of a step that the prior allows for, where nobody says better
SPREAD_MIN = 0.34          # what a model says of itself on known GPUs holds less for the host around them
COMMON_SHARE = 0.5         # of that spread: what all factors share ...
GROUP_SHARE = 0.85         # ... and what each has beside it
HOST_WIDTH = 4.0           # times as far may the host be off, where measurements were made on purpose
WIDTHS = np.array([HOST_WIDTH if group in {KernelGroup.HOST, KernelGroup.SEQUENCE} else 1.0 for group in GROUPS])
TRIAL_NOISE = 0.10         # relative error of a step that three measurements of other settings leave
NOISE = 0.06               # relative error of a frame before any was seen: what the model cannot follow
NOISE_MIN = 0.02
NOISE_HALF_LIFE = 30.0     # updates over which the scatter of frames is taken
STEP_S_MIN, STEP_S_MAX = 1e-9, 600.0  # less or more is no step
BOUND_DEVIATION = 0.02     # of a factor that is known to lie at a bound
ITERATIONS = 20


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
        if not self.updates:
            return UNCORRECTED
        logarithms = _square(self.covariance) / np.outer(self.factors, self.factors)
        return Correction.of(self.factors, spread=self.spread, covariance=_flat(logarithms), noise=self.noise)


def prior(spread: float = SPREAD) -> Calibration:
    """Nothing measured: all factors 1, and a step's error around `spread`."""
    spread = max(spread, SPREAD_MIN)
    return Calibration(
        factors=(1.0,) * len(GROUPS), covariance=_flat(_prior_matrix(spread)), prior_spread=spread
    )


def calibrated(times: T, steps: Iterable[ObservedStep], *, site: Correction = UNCORRECTED) -> T:
    """The model corrected by a few steps that were measured on purpose; `site` is what was thought before."""
    known = [(seconds_of(times, step), step.step_s) for step in steps]
    return times.corrected(measured(known, spread=times.spread, site=site).correction)


def deviations_of(spread: float) -> Floats:
    """How far each factor's logarithm may lie from its prior, where a step errs by this spread."""
    return GROUP_SHARE * max(spread, SPREAD_MIN) * WIDTHS


def measured(
    steps: Iterable[tuple[Floats, float]], *, spread: float = SPREAD, site: Correction = UNCORRECTED
) -> Calibration:
    """What a few measurements teach together: each is the seconds by group at factor 1, and how long it took.

    `site` is what other models' engines taught before (`site.taught_by`).
    """
    known = [(np.asarray(seconds), step_s) for seconds, step_s in steps if _is_step(np.asarray(seconds), step_s)]
    before = prior(spread)
    if not known:
        return before
    start = np.log(site.factors)
    deviation = np.sqrt(np.diag(_square(site.covariance))) if site.covariance else deviations_of(spread)
    logarithms, matrix = start.copy(), np.eye(len(GROUPS))
    for _ in range(ITERATIONS):
        matrix = np.diag(_trust(logarithms - start, deviation))
        pull = -matrix @ (logarithms - start)
        for seconds, step_s in known:
            parts = np.exp(logarithms) * seconds
            shares, error = parts / parts.sum(), math.log(step_s / parts.sum())
            trust = float(_trust(error, NOISE))
            matrix += trust * np.outer(shares, shares)
            pull += trust * error * shares
        logarithms = np.clip(logarithms + np.linalg.solve(matrix, pull), math.log(FACTOR_MIN), math.log(FACTOR_MAX))
    factors = np.exp(logarithms)
    total = np.sum([seconds / seconds.sum() for seconds, _ in known], axis=0)
    return replace(
        before,
        factors=tuple(map(float, factors)),
        covariance=_flat(np.linalg.inv(matrix) * np.outer(factors, factors)),
        noise=TRIAL_NOISE,
        updates=len(known),
        load=tuple(map(float, total / len(known))),
    )


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


def _trust(error: Floats | float, deviation: Floats | float) -> Floats:
    """The weight of an error in least squares that counts large ones by their absolute value."""
    return np.asarray(1 / (np.square(deviation) * np.hypot(1.0, np.asarray(error) / deviation)))


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
    if not _is_step(seconds, step_s) or not steps > 0:
        return calibration
    factors, matrix = _forgotten(calibration, half_life)
    predicted = float(factors @ seconds)
    x = seconds / predicted
    error = step_s / predicted - 1.0
    gain = matrix @ x
    variance = float(x @ gain) + calibration.noise**2 * max(1.0, FULL_STEPS / steps)
    believed = min(1.0, HUBER * math.sqrt(variance) / abs(error)) if error else 1.0
    factors = factors + gain * (believed * error / variance)
    factors, matrix = _in_range(factors, matrix - believed * np.outer(gain, gain) / variance)
    after = replace(
        calibration,
        factors=tuple(map(float, factors)),
        covariance=_flat((matrix + matrix.T) / 2),
        noise=_noise(calibration, step_s / float(factors @ seconds) - 1.0, variance),
        updates=calibration.updates + 1,
        load=_load(calibration, seconds / seconds.sum()),
    )
    return after if believed == 1.0 and not calibration.run else _counted(after, error, cut=believed < 1.0)


def _is_step(seconds: Floats, step_s: float) -> bool:
    total = float(seconds.sum())
    return STEP_S_MIN < step_s < STEP_S_MAX and STEP_S_MIN < total < STEP_S_MAX and float(seconds.min()) >= 0


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


def _forgotten(calibration: Calibration, half_life: float) -> tuple[Floats, Floats]:
    """The factors and their covariance after one step of forgetting."""
    keep = 0.5 ** (1 / half_life)
    known = keep * np.linalg.inv(_square(calibration.covariance))
    matrix = np.linalg.inv(known + (1 - keep) * np.linalg.inv(_prior_matrix(calibration.prior_spread)))
    return 1.0 + matrix @ known @ (np.array(calibration.factors) - 1.0), matrix


def _in_range(factors: Floats, matrix: Floats) -> tuple[Floats, Floats]:
    """Each factor that left the range is measured to lie at its bound."""
    for index in range(len(factors)):
        bound = min(max(factors[index], FACTOR_MIN), FACTOR_MAX)
        if bound != factors[index]:
            gain = matrix[:, index].copy()
            variance = gain[index] + BOUND_DEVIATION**2
            factors = factors + gain * ((bound - factors[index]) / variance)
            matrix = matrix - np.outer(gain, gain) / variance
    return np.clip(factors, FACTOR_MIN, FACTOR_MAX), matrix


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
