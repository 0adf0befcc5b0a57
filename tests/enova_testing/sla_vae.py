"""SLA-VAE as published (Huang, Chen and Li, WWW 2022), reimplemented as a baseline: nothing of the product uses it.

Features: each value's tail probability under a Gaussian kernel density of a window of 120 values, on a log scale from
0 to 1. The density's tails are taken in closed form instead of on 100 bins. Several metrics have six features each
(which three operators these are is our reading), one metric has twelve. Windows of the same time of day are drawn at
random, once a series; before there is a day of past, the features that need it are 0.
Model: 128-64-32 (one metric: 64-48-32) with a latent space of 32, log-variance through softplus, Adam at 1e-3, batches
of 256, cross-entropy summed over columns. Its loss subtracts the cross-entropy of marked rows, which has no lower
bound.
Score: the divergence of the code. It runs in single precision to spend its CPU seconds well.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit, ndtr

from enova_recommender.detection.layers import Adam, Dense

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]

SIGNIFICANCE = 1e-3
WINDOW = 120
BANDWIDTH_FACTOR = (4.0 / (3.0 * WINDOW)) ** 0.2
BANDWIDTH_MIN = 1e-6
DAY_S = 86_400.0
BEFORE_S, AFTER_S = 7200.0, 3600.0   # of the same time on previous days
DAYS = 3
LATENT = 32
MULTI, SINGLE = (128, 64, 32), (64, 48, 32)
RATE, BATCH, EPOCHS = 1e-3, 256, 50
KL_TARGET, PROPORTIONAL, INTEGRAL, BETA_MIN = 10.0, 1e-2, 1e-4, 1.0


def surprise(probability: Floats) -> Floats:
    """0 for a probability of 1, one half at the significance, 1 at its square."""
    least = SIGNIFICANCE**2
    return np.asarray(np.log10(np.clip(probability, least, 1.0)) / np.log10(least))


def features(values: Floats, *, step_s: float, seed: int = 0) -> Singles:
    """Of steps by metrics: steps by six columns a metric, or twelve of a single one."""
    day = max(1, round(DAY_S / step_s))
    draw = np.random.default_rng(seed)
    near = np.arange(-round(AFTER_S / step_s), round(BEFORE_S / step_s) + 1)
    same = np.concatenate([day * number + near for number in range(1, DAYS + 1)])
    same = draw.choice(same, min(WINDOW, len(same)), replace=False)
    past = np.arange(1, WINDOW + 1)
    change = _later(values, values, 1)
    daily = _later(values, values, day)
    departure = values - _moving_average(values)
    low, high = _tails(values, same)
    left, right = _tails(departure, past)
    two_sided = 2.0 * np.minimum(*_tails(change, past))
    columns = [low, high, left, right, two_sided, _tails(np.abs(daily), past)[1]]
    if values.shape[1] == 1:
        below, above = _tails(values, past)     # of extremes: the window is its own top and bottom
        change_low, change_high = _tails(change, past)
        daily_low, daily_high = _tails(daily, past)
        columns = [low, high, left, right, two_sided, below, above, change_low, change_high, daily_low, daily_high,
                   _tails(_spectral_residual(values), past)[1]]  # fmt: skip
    return np.concatenate([surprise(column) for column in columns], axis=1).astype(np.float32)


def _later(values: Floats, past: Floats, steps: int) -> Floats:
    out = np.zeros_like(values)
    out[steps:] = values[steps:] - past[:-steps] if steps < len(values) else 0.0
    return out


def _moving_average(values: Floats, width: int = 10) -> Floats:
    sums = np.cumsum(np.concatenate((np.zeros((1, values.shape[1])), values)), axis=0)
    ends = np.arange(len(values))
    starts = np.maximum(0, ends - width)
    means = (sums[ends] - sums[starts]) / np.maximum(1, ends - starts)[:, None]
    means[0] = values[0]
    return np.asarray(means)


def _tails(values: Floats, offsets: npt.NDArray[np.int_]) -> tuple[Floats, Floats]:
    """Lower and upper tail probability of each value under the density of those so many steps before; 1 without any."""
    lower, upper = np.ones_like(values), np.ones_like(values)
    first = int(offsets.max())
    if first >= len(values):
        return lower, upper
    now = values[first:]
    windows = [values[first - offset : len(values) - offset] for offset in offsets.tolist()]
    mean = np.mean(windows, axis=0) if len(now) * values.shape[1] < 1_000_000 else sum(windows) / len(windows)
    square = sum((each - mean) ** 2 for each in windows) / len(windows)
    bandwidth = BANDWIDTH_FACTOR * np.sqrt(square) + BANDWIDTH_MIN
    below = sum(ndtr((now - each) / bandwidth) for each in windows) / len(windows)
    lower[first:], upper[first:] = below, 1.0 - below
    return lower, upper


def _spectral_residual(values: Floats) -> Floats:
    """Saliency by the spectral residual (Ren et al., KDD 2019) of the whole series."""
    spectrum = np.fft.rfft(values[:, 0])
    size = np.log(np.abs(spectrum) + 1e-8)
    smooth = np.convolve(size, np.ones(3) / 3.0, mode="same")
    saliency = np.fft.irfft(np.exp(size - smooth + 1j * np.angle(spectrum)), n=len(values))
    return np.abs(saliency)[:, None]


@dataclass(slots=True)
class PiController:
    """The weight of the code's divergence, as published."""

    beta: float = BETA_MIN
    integral: float = 0.0

    def update(self, kl: float) -> float:
        """The next weight."""
        error = KL_TARGET - kl
        if self.beta >= BETA_MIN:
            self.integral -= INTEGRAL * error
        wanted = PROPORTIONAL / (1.0 + float(np.exp(np.clip(error, -50, 50)))) + self.integral + BETA_MIN
        self.beta = max(wanted, BETA_MIN)
        return self.beta


class SlaVae:
    """The model on rows of features."""

    def __init__(self, columns: int, *, single: bool, seed: int = 0) -> None:
        hidden = SINGLE if single else MULTI
        self._encoder = Dense((columns, *hidden, 2 * LATENT), seed=seed)
        self._decoder = Dense((LATENT, *reversed(hidden), columns), seed=seed + 1)
        for part in (self._encoder, self._decoder):
            part.weights = [each.astype(np.float32) for each in part.weights]
            part.biases = [each.astype(np.float32) for each in part.biases]
        self._controller = PiController()
        self._draw = np.random.default_rng(seed)

    def fit(self, rows: Singles, anomalous: Flags | None = None, *, epochs: int = EPOCHS) -> None:
        """Train, or train on."""
        marked = np.zeros(len(rows), dtype=bool) if anomalous is None else anomalous
        adam = Adam([*self._encoder.parameters, *self._decoder.parameters], rate=RATE)
        for _ in range(epochs):
            order = self._draw.permutation(len(rows))
            for start in range(0, len(rows), BATCH):
                batch = order[start : start + BATCH]
                slopes, kl = self._slopes(rows[batch], marked[batch])
                adam.step(slopes)
                self._controller.update(kl)

    def copy(self) -> SlaVae:
        """One that stands where this one stands."""
        return copy.deepcopy(self)

    def score(self, rows: Singles) -> Floats:
        """The divergence of each row's code from a standard normal."""
        mean, raw = np.split(self._encoder.forward(rows.astype(np.float64))[-1], 2, axis=1)
        return _kl(mean, np.logaddexp(0.0, raw))

    def _slopes(self, rows: Singles, marked: Flags) -> tuple[list[Floats], float]:
        normal = (~marked).astype(np.float32)
        # Means over normal and over anomalous rows; the sign of the latter turns their cross-entropy around.
        share = normal / max(1.0, float(normal.sum())) - (1.0 - normal) / max(1.0, float((1.0 - normal).sum()))
        seen = self._encoder.forward(rows)  # type: ignore[arg-type]  # single precision all the way
        mean, raw = np.split(seen[-1], 2, axis=1)
        log_variance = np.logaddexp(np.float32(0.0), raw)
        spread = np.exp(0.5 * log_variance)
        noise = self._draw.standard_normal(size=mean.shape, dtype=np.float32)
        decoded = self._decoder.forward(mean + spread * noise)
        decoder_slopes, at_code = self._decoder.backward(decoded, share[:, None] * (expit(decoded[-1]) - rows))
        weight = (np.float32(self._controller.beta) * np.maximum(share, 0.0))[:, None]
        at_mean = at_code + weight * mean
        at_variance = at_code * noise * 0.5 * spread + weight * 0.5 * (np.exp(log_variance) - 1.0)
        encoder_slopes, _ = self._encoder.backward(seen, np.concatenate((at_mean, at_variance * expit(raw)), axis=1))
        kl = _kl(mean, log_variance)
        return [*encoder_slopes, *decoder_slopes], float((kl * np.maximum(share, 0.0)).sum())


def _kl(mean: Floats, log_variance: Floats) -> Floats:
    return np.asarray(-0.5 * (1.0 + log_variance - mean**2 - np.exp(log_variance)).sum(axis=1))
