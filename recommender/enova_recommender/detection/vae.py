"""A variational auto-encoder of surprises between 0 and 1, semi-supervised, with a loss that cannot run away.

Theory of operation. Rows are coded as a Gaussian in a small space and decoded to a chance for each column. Of normal
rows the loss is the divergence between row and reconstruction (cross-entropy less what no model can avoid, so that 0 is
perfect) and the code's divergence from a standard normal, whose weight a PI controller sets so that it stays near a set
point (ControlVAE, Shao et al. 2020). Rows marked anomalous should be reconstructed badly: their term
margin / (margin + divergence) lies between 0 and 1 and flattens as it is satisfied, so that a few labels never outweigh
normal time; a plain negative cross-entropy, as in SLA-VAE, has no lower bound. Everything is drawn from one seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from enova_recommender.detection.detector import Flags, nested, part_of
from enova_recommender.detection.layers import Adam, Dense

Floats = npt.NDArray[np.float64]

HIDDEN = (48, 24)        # of the encoder; the decoder mirrors them
LATENT = 6
RATE = 2e-3              # of Adam
BATCH = 128
EPOCHS = 25              # of the first training
EPOCHS_MORE = 6          # of a later one, which goes on from the weights that stand
KL_TARGET = 4.0          # nats that the code may tell of a row: its set point
PROPORTIONAL, INTEGRAL = 1e-2, 1e-3
WEIGHT_MIN, WEIGHT_MAX = 1e-2, 1.0
LOG_VARIANCE_BOUND = 6.0
MARGIN_SHARE = 0.05      # of a column's largest cross-entropy, times the columns: half satisfied there
ANOMALY_WEIGHT = 4.0     # of a marked row against a normal one, times the margin
CHANCE_MIN = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a model is made of: the steps it has learnt, how, and how well."""

    first_step: int
    last_step: int
    rows: int
    marked_rows: int         # anomalous by their labels
    seed: int
    epochs: int
    trainings: int           # the first and those that went on from it
    loss: float              # mean of a normal row in the last epoch
    kl: float                # mean of the code's divergence there
    kl_weight: float         # that the controller came to

    def save(self) -> Floats:
        """Its figures in order."""
        return np.array([getattr(self, each.name) for each in fields(self)], dtype=np.float64)

    @classmethod
    def load(cls, saved: Floats) -> ModelCard:
        """What `save` returned, as it was."""
        figures = {each.name: value for each, value in zip(fields(cls), saved.tolist(), strict=True)}
        whole = {name: int(value) for name, value in figures.items() if name not in {"loss", "kl", "kl_weight"}}
        return cls(**{**figures, **whole})


class KlController:
    """The weight of the code's divergence: proportional and integral to its distance from the set point."""

    def __init__(self, target: float = KL_TARGET) -> None:
        self.weight = WEIGHT_MIN
        self._target = target
        self._integral = 0.0

    def update(self, kl: float) -> float:
        """The next weight; the integral stands still while the weight is at a bound, so that it can come back."""
        error = self._target - kl
        proportional = PROPORTIONAL / (1.0 + np.exp(np.clip(error, -50.0, 50.0)))
        integral = self._integral - INTEGRAL * error
        wanted = float(proportional + integral + WEIGHT_MIN)
        if WEIGHT_MIN <= wanted <= WEIGHT_MAX:
            self._integral = integral
        self.weight = min(max(wanted, WEIGHT_MIN), WEIGHT_MAX)
        return self.weight

    def save(self) -> Floats:
        """Weight, set point and integral."""
        return np.array([self.weight, self._target, self._integral])

    @classmethod
    def load(cls, saved: Floats) -> KlController:
        """What `save` returned, as it was."""
        weight, target, integral = saved.tolist()
        loaded = cls(target)
        loaded.weight, loaded._integral = weight, integral
        return loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The loss of one batch, its slopes by the network's parameters, and the code's divergence."""

    value: float
    slopes: list[Floats]
    kl: float


class Network:
    """Encoder and decoder."""

    def __init__(self, columns: int, *, seed: int) -> None:
        self.encoder = Dense((columns, *HIDDEN, 2 * LATENT), seed=seed)
        self.decoder = Dense((LATENT, *reversed(HIDDEN), columns), seed=seed + 1)
        self.margin = MARGIN_SHARE * columns * -np.log(CHANCE_MIN)

    @property
    def parameters(self) -> list[Floats]:
        """All weights and biases, to be changed in place."""
        return [*self.encoder.parameters, *self.decoder.parameters]

    def loss(self, rows: Floats, anomalous: Flags, noise: Floats, kl_weight: float) -> Loss:
        """Of a batch with this noise in the codes."""
        normal, count = (~anomalous).astype(np.float64), len(rows)
        seen = self.encoder.forward(rows)
        mean, log_variance = self._code(seen[-1])
        spread = np.exp(0.5 * log_variance)
        decoded = self.decoder.forward(mean + spread * noise)
        apart = divergence(rows, decoded[-1])
        kl = 0.5 * (mean**2 + np.exp(log_variance) - 1.0 - log_variance).sum(axis=1)
        term = self.margin / (self.margin + apart)
        value = (normal * (apart + kl_weight * kl) + (1.0 - normal) * ANOMALY_WEIGHT * self.margin * term).sum() / count
        pull = normal - (1.0 - normal) * ANOMALY_WEIGHT * term**2     # d value / d apart, times the count
        slope = pull[:, None] * (expit(decoded[-1]) - rows) / count
        decoder_slopes, at_code = self.decoder.backward(decoded, slope)
        weighted = (kl_weight * normal / count)[:, None]
        at_mean = at_code + weighted * mean
        at_variance = at_code * noise * 0.5 * spread + weighted * 0.5 * (np.exp(log_variance) - 1.0)
        at_variance = at_variance * (np.abs(seen[-1][:, LATENT:]) < LOG_VARIANCE_BOUND)
        encoder_slopes, _ = self.encoder.backward(seen, np.concatenate((at_mean, at_variance), axis=1))
        mean_kl = float((normal * kl).sum() / max(1.0, normal.sum()))
        return Loss(value=float(value), slopes=[*encoder_slopes, *decoder_slopes], kl=mean_kl)

    def strangeness(self, rows: Floats) -> tuple[Floats, Floats]:
        """Divergence of each row from what its code's mean decodes to, and the code's own."""
        mean, log_variance = self._code(self.encoder.forward(rows)[-1])
        kl = 0.5 * (mean**2 + np.exp(log_variance) - 1.0 - log_variance).sum(axis=1)
        return divergence(rows, self.decoder.forward(mean)[-1]), np.asarray(kl)

    def parts(self, rows: Floats) -> Floats:
        """The divergence by column."""
        mean, _ = self._code(self.encoder.forward(rows)[-1])
        return _divergences(rows, self.decoder.forward(mean)[-1])

    def save(self) -> dict[str, Floats]:
        """All weights and biases."""
        return nested({"encoder": self.encoder.save(), "decoder": self.decoder.save()})

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> Network:
        """What `save` returned, as it was."""
        loaded = cls(1, seed=0)
        loaded.encoder, loaded.decoder = Dense.load(part_of(saved, "encoder")), Dense.load(part_of(saved, "decoder"))
        loaded.margin = MARGIN_SHARE * len(loaded.decoder.biases[-1]) * -np.log(CHANCE_MIN)
        return loaded

    @staticmethod
    def _code(out: Floats) -> tuple[Floats, Floats]:
        return out[:, :LATENT], np.clip(out[:, LATENT:], -LOG_VARIANCE_BOUND, LOG_VARIANCE_BOUND)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a training came to."""

    loss: float
    kl: float
    epochs: int


def train(
    network: Network, rows: Floats, anomalous: Flags, *, controller: KlController, epochs: int, seed: int
) -> Trained:
    """Train in place, on from where the network stands."""
    draw = np.random.default_rng(seed)
    adam = Adam(network.parameters, rate=RATE)
    loss = kl = 0.0
    for _ in range(epochs):
        order = draw.permutation(len(rows))
        losses, kls = [], []
        for start in range(0, len(rows), BATCH):
            batch = order[start : start + BATCH]
            noise = draw.normal(size=(len(batch), LATENT))
            found = network.loss(rows[batch], anomalous[batch], noise, controller.weight)
            adam.step(found.slopes)
            controller.update(found.kl)
            losses.append(found.value)
            kls.append(found.kl)
        loss, kl = float(np.mean(losses)), float(np.mean(kls))
    return Trained(loss=loss, kl=kl, epochs=epochs)


def divergence(rows: Floats, logits: Floats) -> Floats:
    """How far the chances behind these logits are from each row, in nats: cross-entropy less the row's own entropy."""
    return np.asarray(_divergences(rows, logits).sum(axis=1))


def _divergences(rows: Floats, logits: Floats) -> Floats:
    # log(1 + e^l) without overflow; the entropy of 0 and 1 is 0.
    cross = np.maximum(logits, 0.0) - logits * rows + np.log1p(np.exp(-np.abs(logits)))
    inner = np.clip(rows, CHANCE_MIN, 1.0 - CHANCE_MIN)
    entropy = -(inner * np.log(inner) + (1.0 - inner) * np.log1p(-inner))
    return np.asarray(np.maximum(cross - entropy, 0.0))
