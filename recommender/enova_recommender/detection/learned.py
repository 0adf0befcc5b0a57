"""A learned detector: what surprises together in normal time, and what people said of its alarms.

Each feature becomes four surprises (`tails`): of its value and of its departure from its recent average, to either
side. Memories with exponential weights stand where SLA-VAE draws windows by chance, so that the same history gives the
same surprises. A variational auto-encoder (`vae`) learns which come together; a step's score is what it cannot
reconstruct, and how unusual its code is. Labels and new normal time are learnt from where the model stands, beside rows
of the old normal time, and the model card says what it has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.context import Context
from enova_recommender.detection.detector import (
    FALSE_ALARM,
    TRUE_ALARM,
    Flags,
    Indices,
    Marks,
    NotFitted,
    check_features,
    check_history,
    measured,
    nested,
    part_of,
    shares_of,
    splits,
    thinned,
)
from enova_recommender.detection.scaling import RobustScale
from enova_recommender.detection.tails import KernelTails
from enova_recommender.detection.vae import EPOCHS, EPOCHS_MORE, KlController, ModelCard, Network, train

Floats = npt.NDArray[np.float64]

STEPS_MIN = 32           # of history
LEARNT_MAX = 2000        # rows, evenly spaced: more take time and change little
MARKED_MAX = 2000        # newest marked rows that are kept
MEMORIES = (0.1,)        # weight of the newest step in the average that departures are from
SURPRISES = 4            # of one feature


class VaeDetector:
    """Surprises that do not come together in normal time."""

    name = "vae"

    def __init__(self, *, seed: int = 0) -> None:
        self._seed = seed
        self._features = 0
        self._scale = RobustScale()
        self._values = KernelTails()
        self._departures = KernelTails()
        self._network = Network(1, seed=seed)
        self._controller = KlController()
        self._card: ModelCard | None = None
        self._context: Context | None = None
        self._replay: Floats = np.empty((0, 0))
        self._marked: Floats = np.empty((0, 0))
        self._marks: Flags = np.empty(0, dtype=np.bool_)
        self._held: Floats = np.empty((0, 0))
        self._held_at: Indices = np.empty(0, dtype=np.intp)
        self._steps = 0
        self._rows: Floats = np.empty((0, 0))

    @property
    def held_out(self) -> Floats:
        """Scores of the blocks of the history that it was not trained on, by the model as it is now."""
        scores = np.full(self._steps, np.nan)
        scores[self._held_at] = self._strangeness(self._held)
        return scores

    @property
    def card(self) -> ModelCard:
        """What the model is made of."""
        if self._card is None:
            raise NotFitted("fit the detector first")
        return self._card

    def fit(self, history: Floats, mask: Flags | None = None, *, first: int = 0) -> None:
        """Learn from one series. Raises ValueError for fewer than STEPS_MIN steps of which something is known."""
        known = measured(history, mask)
        something = np.flatnonzero(~np.isnan(known).all(axis=1))
        check_history(len(something), STEPS_MIN)
        self._features = known.shape[1]
        self._scale.fit(known)
        now, departures = self._told(self._fresh().extend(self._scale.scaled(known)))
        self._values.fit(now[something])
        self._departures.fit(departures[something])
        rows = self._surprises(now, departures)[something]
        (to_learn, held), *_ = splits(len(rows))
        learnt = thinned(rows[to_learn], LEARNT_MAX)
        self._network = Network(rows.shape[1], seed=self._seed)
        self._controller = KlController()
        marks = np.zeros(len(learnt), dtype=np.bool_)
        made = train(self._network, learnt, marks, controller=self._controller, epochs=EPOCHS, seed=self._seed)
        self._card = ModelCard(
            first_step=first, last_step=first + len(history) - 1, rows=len(learnt), marked_rows=0, seed=self._seed,
            epochs=made.epochs, trainings=1, loss=made.loss, kl=made.kl, kl_weight=self._controller.weight,
        )  # fmt: skip
        self._replay, self._held = learnt, rows[held]
        self._held_at = something[held]
        self._steps = len(history)
        self._marked, self._marks = np.empty((0, rows.shape[1])), np.empty(0, dtype=np.bool_)
        self._context = None

    def learn(self, values: Floats, marks: Marks, *, first: int = 0) -> None:
        """Go on from where it stands with marked steps; those marked as false alarms are normal time."""
        check_features(values, self._features)
        card, rows = self.card, self.evidence(values)
        known = (marks == TRUE_ALARM) | (marks == FALSE_ALARM)
        self._marked = np.concatenate((self._marked, rows[known]))[-MARKED_MAX:]
        self._marks = np.concatenate((self._marks, marks[known] == TRUE_ALARM))[-MARKED_MAX:]
        together = np.concatenate((self._replay, self._marked))
        anomalous = np.concatenate((np.zeros(len(self._replay), dtype=np.bool_), self._marks))
        made = train(
            self._network, together, anomalous, controller=self._controller, epochs=EPOCHS_MORE,
            seed=self._seed + card.trainings,
        )  # fmt: skip
        self._card = replace(
            card, first_step=min(card.first_step, first), last_step=max(card.last_step, first + len(values) - 1),
            rows=len(together), marked_rows=int(anomalous.sum()), epochs=card.epochs + made.epochs,
            trainings=card.trainings + 1, loss=made.loss, kl=made.kl, kl_weight=self._controller.weight,
        )  # fmt: skip

    def evidence(self, values: Floats) -> Floats:
        """The surprises of steps of one series: four columns a feature, the same kind of all features together."""
        check_features(values, self._features)
        return self._surprises(*self._told(self._fresh().extend(self._scale.scaled(values))))

    def evidence_now(self) -> Floats:
        """The surprises of the last `update`, series by columns."""
        return self._surprises(*self._told(self._rows))

    def score(self, values: Floats, *, first: int = 0) -> Floats:  # noqa: ARG002  # it knows no time of day
        """One score a step of one series."""
        check_features(values, self._features)
        extended = self._fresh().extend(self._scale.scaled(values))
        return self._scores(extended)

    def update(self, values: Floats, *, step: int = 0) -> Floats:  # noqa: ARG002  # it knows no time of day
        """One score for each series."""
        check_features(values, self._features)
        if self._context is None or self._context.series != len(values):
            self._context = Context(series=len(values), features=self._features, weights=MEMORIES)
        self._rows = self._context.update(self._scale.scaled(values))
        return self._scores(self._rows)

    def contributions(self) -> Floats:
        """Shares of the features in what was not reconstructed of the last steps."""
        parts = self._network.parts(self.evidence_now())
        return shares_of(parts.reshape(len(parts), SURPRISES, self._features).sum(axis=1))

    def save(self) -> dict[str, Floats]:
        """Everything that it knows, as arrays, its card among them."""
        own = {
            "card": self.card.save(), "sizes": np.array([self._features, self._steps], dtype=np.float64),
            "controller": self._controller.save(), "replay": self._replay.copy(), "marked": self._marked.copy(),
            "marks": self._marks.astype(np.float64), "held": self._held.copy(),
            "held_at": self._held_at.astype(np.float64),
        }  # fmt: skip
        parts = {
            "scale": self._scale.save(), "values": self._values.save(), "departures": self._departures.save(),
            "network": self._network.save(),
        }  # fmt: skip
        if self._context is not None:
            parts["context"] = self._context.save()
        return {**own, **nested(parts)}

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> VaeDetector:
        """What `save` returned, as it was."""
        card = ModelCard.load(saved["card"])
        loaded = cls(seed=card.seed)
        loaded._card = card
        loaded._features, loaded._steps = (int(size) for size in saved["sizes"])
        loaded._controller = KlController.load(saved["controller"])
        loaded._replay, loaded._marked = saved["replay"].copy(), saved["marked"].copy()
        loaded._marks, loaded._held = saved["marks"] > 0, saved["held"].copy()
        loaded._held_at = saved["held_at"].astype(np.intp)
        loaded._scale = RobustScale.load(part_of(saved, "scale"))
        loaded._values = KernelTails.load(part_of(saved, "values"))
        loaded._departures = KernelTails.load(part_of(saved, "departures"))
        loaded._network = Network.load(part_of(saved, "network"))
        context = part_of(saved, "context")
        loaded._context = Context.load(context) if context else None
        return loaded

    def _fresh(self) -> Context:
        return Context(series=1, features=self._features, weights=MEMORIES)

    def _told(self, extended: Floats) -> tuple[Floats, Floats]:
        """Values, and their departures from the recent average."""
        now, average = extended[:, : self._features], extended[:, self._features :]
        return now, now - average

    def _surprises(self, now: Floats, departures: Floats) -> Floats:
        return np.concatenate((*self._values.surprises(now), *self._departures.surprises(departures)), axis=1)

    def _scores(self, extended: Floats) -> Floats:
        scores = self._strangeness(self._surprises(*self._told(extended)))
        return np.where(np.isnan(extended).all(axis=1), np.nan, scores)

    def _strangeness(self, rows: Floats) -> Floats:
        apart, kl = self._network.strangeness(rows)
        return np.asarray(apart + self._controller.weight * kl)
