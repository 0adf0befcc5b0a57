"""What steps take beside their kernels on one site, and how one model's settings scatter: learnt from other models.

Kernel tables say nothing of the host's processor, the engine's version and its options. What they cost is much alike
for all models that one site runs on one type of GPU: a time each step, each layer, each layer of experts and each
sequence, and a factor on kernels. Six numbers, each near its prior in logarithms, are fitted to measured steps of other
models; with nothing measured the priors hold, which add next to nothing.

What is left over of the logarithm of a measured step is a sum of independent normal parts: one of the model on that
GPU, one that changes slowly with the number of sequences on one layout, and noise. Their deviations are chosen by
likelihood on the models that were learnt from. Given some measured settings of the model at hand the parts of the
others follow as the conditional normal distribution (a Gaussian process): near to what was measured little is left.

So far only the benchmark of choices, `recommender_choice`, learns so: live engines are corrected by `calibration`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from enova_recommender.performance import KernelClass, KernelTimes
from enova_recommender.performance.live_steps import ObservedStep
from enova_recommender.recommend.capacity_lengths import Floats
from enova_recommender.types import Experts, ModelShape

# Factors on kernels and expert kernels, then seconds a step, a layer, a layer of experts and a sequence.
PRIOR = np.array([1.0, 1.0, 1e-4, 1e-6, 2e-6, 1e-6])
WIDTH = np.array([0.2, 0.6, 2.0, 2.5, 2.5, 2.5])  # standard deviations of the logarithms
ERROR = 0.1                # of one measured step, relative; larger errors count linearly
GROUP_ROWS = 6.0           # measured steps of one model that weigh as one whole; more weigh no more together
MEMORY_OCTAVES = 2.0       # doublings of the sequences over which the slow part is forgotten
COMMON = (0.05, 0.1, 0.2, 0.35, 0.5)
LOCAL = (0.03, 0.06, 0.12, 0.25, 0.4)
NOISE = (0.02, 0.05, 0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One setting of one model: what its step is made of and, if it was measured, what it took."""

    features: Floats
    layout: int               # settings of equal number share a layout
    sequences: float          # of one lane
    step_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """Standard deviations of the logarithm of what is left over."""

    common: float
    local: float
    noise: float

    @property
    def whole(self) -> float:
        """That of one setting of a model of which nothing was measured."""
        return float(np.sqrt(self.common**2 + self.local**2 + self.noise**2))


# With nothing measured: hosts and engine versions make as much of a difference as an unknown GPU does. It stays in the
# balance as so many models that were seen to scatter so: two other models are no proof that the third is like them.
UNKNOWN = Scatter(common=0.35, local=0.12, noise=0.05)
UNKNOWN_MODELS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What one site was learnt to add, in the order of PRIOR, and how it scatters."""

    values: tuple[float, ...]
    scatter: Scatter

    def step_s(self, features: Floats) -> float:
        """The expected duration of a step."""
        return float(features @ np.array(self.values))

    def left_over(self, trial: Trial) -> float:
        """Logarithm of what was measured over what was expected."""
        assert trial.step_s is not None, "only measured trials leave something over"
        return float(np.log(trial.step_s / self.step_s(trial.features)))


def features_of(times: KernelTimes, shape: ModelShape, step: ObservedStep) -> Floats:
    """What a step is made of, in the order of PRIOR."""
    layers = sum(block.count for block in shape.blocks if isinstance(block.feed_forward, Experts))
    kernels = experts = sequences = 0.0
    for share, batch in step.parts:
        seconds = times.shares(batch)
        experts += share * seconds[KernelClass.EXPERTS]
        kernels += share * (sum(seconds.values()) - seconds[KernelClass.EXPERTS])
        sequences += share * batch.decode_sequences
    return np.array([kernels, experts, 1.0, shape.layers, layers, sequences])


def learn(models: Sequence[Sequence[Trial]]) -> Surroundings:
    """What measured trials of several models say."""
    kept = [trials for trials in models if trials]
    if not kept:
        return Surroundings(values=tuple(PRIOR.tolist()), scatter=UNKNOWN)
    rows = np.array([trial.features for trials in kept for trial in trials])
    measured = np.log([trial.step_s for trials in kept for trial in trials if trial.step_s is not None])
    assert len(rows) == len(measured), "only measured trials teach"
    weights = np.concatenate([np.full(len(one), min(1.0, GROUP_ROWS / len(one)) ** 0.5) for one in kept])

    def errors(logarithms: Floats) -> Floats:
        missed = np.log(rows @ (PRIOR * np.exp(logarithms))) - measured
        return np.concatenate([weights * missed / ERROR, logarithms / WIDTH])

    found = least_squares(errors, np.zeros(len(PRIOR)), loss="soft_l1")
    values = tuple((PRIOR * np.exp(found.x)).tolist())
    site = Surroundings(values=values, scatter=UNKNOWN)
    left = [np.array([site.left_over(trial) for trial in trials]) for trials in kept]
    return Surroundings(values=values, scatter=_scatter(kept, left))


def expected(site: Surroundings, known: Sequence[Trial], asked: Sequence[Trial]) -> tuple[Floats, Floats]:
    """Seconds of the asked settings, given known ones of the same model, and the deviation of their logarithms."""
    plain = np.array([site.step_s(trial.features) for trial in asked])
    own, scatter = _alike(asked, asked, site.scatter), site.scatter
    variance = np.diag(own).copy() + scatter.noise**2
    if not known:
        return plain, np.sqrt(variance)
    among = _alike(known, known, scatter) + scatter.noise**2 * np.eye(len(known))
    across = _alike(known, asked, scatter)
    weights = np.linalg.solve(among, across)
    left = np.array([site.left_over(trial) for trial in known])
    variance -= np.einsum("ij,ij->j", across, weights)
    return plain * np.exp(left @ weights), np.sqrt(np.maximum(variance, scatter.noise**2))


def _alike(some: Sequence[Trial], others: Sequence[Trial], scatter: Scatter) -> Floats:
    """Covariance of what settings of one model leave over, without noise."""
    octaves = np.abs(np.subtract.outer(
        np.log2([trial.sequences for trial in some]), np.log2([trial.sequences for trial in others])
    ))  # fmt: skip
    same = np.equal.outer([trial.layout for trial in some], [trial.layout for trial in others])
    slow: npt.NDArray[np.float64] = scatter.local**2 * np.exp(-octaves / MEMORY_OCTAVES) * same
    return np.asarray(scatter.common**2 + slow)


def _scatter(models: Sequence[Sequence[Trial]], left: Sequence[Floats]) -> Scatter:
    """The deviations under which what was left over is likeliest."""
    options = [
        Scatter(common=common, local=local, noise=noise)
        for common, local, noise in itertools.product(COMMON, LOCAL, NOISE)
    ]
    return min(options, key=lambda one: _doubt(one) + sum(
        _surprise(trials, rest, one) for trials, rest in zip(models, left, strict=True)
    ))  # fmt: skip


def _doubt(scatter: Scatter) -> float:
    """Minus the logarithm of the likelihood of models that are not there, which scatter as the unknown does."""
    pairs = ((scatter.common, UNKNOWN.common), (scatter.local, UNKNOWN.local), (scatter.noise, UNKNOWN.noise))
    return UNKNOWN_MODELS * sum(float(np.log(one) + (known / one) ** 2 / 2) for one, known in pairs)


def _surprise(trials: Sequence[Trial], left: Floats, scatter: Scatter) -> float:
    """Minus the logarithm of the likelihood, without constants."""
    factor = np.linalg.cholesky(_alike(trials, trials, scatter) + scatter.noise**2 * np.eye(len(trials)))
    white = np.linalg.solve(factor, left)
    return float(white @ white / 2 + np.log(np.diag(factor)).sum())
