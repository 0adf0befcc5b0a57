"""Several detectors that say one thing: each score as a surprise, all surprises weighed, and what lingers of them.

Theory of operation. Scores of members have no common unit, so each becomes a surprise (`surprise`): the power of ten by
which normal time, held out of what the member learnt, scores as high. The weighed mean of their squares is how strange
a step is; squares, since one member that is sure outweighs two that wonder. A step after strange steps is more
suspicious than the same step after quiet ones, so that a share of the recent strangeness is added. Weights are shown,
and an ensemble without one member can be had without learning anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter

from enova_recommender.detection.contextual import SCORERS, ContextDetector
from enova_recommender.detection.detector import (
    Detector,
    Flags,
    Marks,
    NotFitted,
    check_features,
    nested,
    part_of,
    shares_of,
)
from enova_recommender.detection.learned import VaeDetector
from enova_recommender.detection.nearest import Nearest
from enova_recommender.detection.seasonal import SeasonalDetector
from enova_recommender.detection.subspace import Subspace
from enova_recommender.detection.surprise import Surprise

Floats = npt.NDArray[np.float64]

LINGER_WEIGHT = 0.1      # of the newest step in the recent strangeness: a memory of about 10 steps
LINGER_SHARE = 0.5       # of the recent strangeness that is added to a step's own
LINGER_BOUND = 36.0      # strangeness that is remembered, at most: a surprise of 6

MEMBERS: dict[str, type[Detector]] = {
    **dict.fromkeys(SCORERS, ContextDetector), SeasonalDetector.name: SeasonalDetector, VaeDetector.name: VaeDetector,
}  # fmt: skip


# What each counts by default. The auto-encoder counts for nothing until it is taught (`taught`).
WEIGHTS = {Nearest.name: 2.0, Subspace.name: 2.0, SeasonalDetector.name: 1.0, VaeDetector.name: 0.0}


def standard_members(*, period_steps: int | None) -> list[Detector]:
    """All that there are, not fitted; `period_steps` is how many make a day."""
    return [
        ContextDetector(Nearest()), ContextDetector(Subspace()), SeasonalDetector(period_steps=period_steps),
        VaeDetector(),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one member adds to a score: its weight, its surprise, and its share of the whole."""

    name: str
    weight: float
    surprise: float
    share: float


class EnsembleDetector:
    """The weighed surprise of its members. Weights are made to sum to 1."""

    name = "ensemble"

    def __init__(self, members: Sequence[Detector] | None = None, *, weights: Sequence[float] | None = None) -> None:
        self._members = list(members or (ContextDetector(Nearest()), ContextDetector(Subspace())))
        given = np.ones(len(self._members)) if weights is None else np.array(weights, dtype=np.float64)
        if len(given) != len(self._members) or given.min() < 0.0 or given.sum() <= 0.0:
            raise ValueError(f"weights: one a member is needed, none negative and not all zero, not {given.tolist()}")
        self._weights = given / given.sum()
        self._surprises = [Surprise() for _ in self._members]
        self._features = 0
        self._held: Floats = np.empty(0)
        self._lingering: Floats = np.empty(0)
        self._last: Floats = np.empty((0, 0))     # members by series: their surprises

    @classmethod
    def standard(cls, *, period_steps: int | None) -> Self:
        """Those members that count by default, with their weights."""
        members = [each for each in standard_members(period_steps=period_steps) if WEIGHTS[each.name] > 0.0]
        return cls(members, weights=[WEIGHTS[each.name] for each in members])

    @classmethod
    def of_fitted(cls, members: Sequence[Detector], *, features: int) -> Self:
        """Of members that have learnt already, from the same history."""
        made = cls(members)
        made._features = features
        made._calibrate()
        return made

    @property
    def members(self) -> tuple[Detector, ...]:
        """In the order of the weights."""
        return tuple(self._members)

    @property
    def weights(self) -> dict[str, float]:
        """What each member counts."""
        return {member.name: float(weight) for member, weight in zip(self._members, self._weights, strict=True)}

    @property
    def held_out(self) -> Floats:
        """Scores of the steps that all members held out."""
        return self._held

    def fit(self, history: Floats, mask: Flags | None = None, *, first: int = 0) -> None:
        """Let all members learn, and put their scores on one scale."""
        self._features = history.shape[1]
        for member in self._members:
            member.fit(history, mask, first=first)
        self._calibrate()
        self._lingering = np.empty(0)

    def learn(self, values: Floats, marks: Marks, *, first: int = 0) -> None:
        """Let those members learn that can be told; the scale follows them."""
        check_features(values, self._features)
        for member in self._members:
            if isinstance(member, VaeDetector):
                member.learn(values, marks, first=first)
        self._calibrate()

    def score(self, values: Floats, *, first: int = 0) -> Floats:
        """One score a step of one series."""
        return self._with_lingering(_strangeness(self.surprises(values, first=first), self._weights))

    def surprises(self, values: Floats, *, first: int = 0) -> Floats:
        """The surprise of each member at each step of one series: members by steps."""
        check_features(values, self._features)
        return np.stack([
            surprise.of(member.score(values, first=first))
            for member, surprise in zip(self._members, self._surprises, strict=True)
        ])  # fmt: skip

    def weighed(self, surprises: Floats, weights: Sequence[float]) -> Floats:
        """The scores that these weights would have made of the members' surprises at the steps of one series."""
        counted = np.array(weights) / sum(weights)
        return self._with_lingering(_strangeness(surprises, counted))

    def update(self, values: Floats, *, step: int = 0) -> Floats:
        """One score for each series."""
        check_features(values, self._features)
        if len(self._lingering) != len(values):
            self._lingering = np.zeros(len(values))
        self._last = np.stack([
            surprise.of(member.update(values, step=step))
            for member, surprise in zip(self._members, self._surprises, strict=True)
        ])  # fmt: skip
        now = _strangeness(self._last, self._weights)
        bounded = np.minimum(np.nan_to_num(now), LINGER_BOUND)
        self._lingering = self._lingering + LINGER_WEIGHT * (bounded - self._lingering)
        return np.asarray(now + LINGER_SHARE * self._lingering)

    def contributions(self) -> Floats:
        """Shares of the features: those of each member, as much as it was surprised."""
        total = np.zeros((self._last.shape[1], self._features))
        for member, weight, surprise in zip(self._members, self._weights, self._last, strict=True):
            total += (weight * np.nan_to_num(surprise) ** 2)[:, None] * member.contributions()
        return shares_of(total)

    def shares(self, series: int) -> tuple[Share, ...]:
        """What each member added to the last score of one series."""
        parts = self._weights * np.nan_to_num(self._last[:, series]) ** 2
        whole = float(parts.sum()) or 1.0
        return tuple(
            Share(name=member.name, weight=float(weight), surprise=float(surprise), share=float(part) / whole)
            for member, weight, surprise, part in zip(
                self._members, self._weights, self._last[:, series], parts, strict=True)
        )  # fmt: skip

    def reweighed(self, weights: Floats) -> EnsembleDetector:
        """The same with other weights, as it stands; it shares the members with this one."""
        other = EnsembleDetector(self._members, weights=weights.tolist())
        other._surprises = self._surprises
        other._features, other._lingering = self._features, self._lingering.copy()
        other._hold_out()
        return other

    def without(self, name: str) -> EnsembleDetector:
        """The same without one member, as it stands; it shares the others with this one."""
        kept = [index for index, member in enumerate(self._members) if member.name != name]
        less = EnsembleDetector([self._members[index] for index in kept], weights=self._weights[kept].tolist())
        less._surprises = [self._surprises[index] for index in kept]
        less._features = self._features
        less._hold_out()
        return less

    def save(self) -> dict[str, Floats]:
        """Everything that it knows, as arrays."""
        if not self._features:
            raise NotFitted("fit the detector first")
        own = {
            "features": np.array([self._features], dtype=np.float64), "weights": self._weights.copy(),
            "held": self._held.copy(), "lingering": self._lingering.copy(),
        }  # fmt: skip
        parts = {f"member{index}/{member.name}": member.save() for index, member in enumerate(self._members)}
        parts.update({f"surprise{index}": each.save() for index, each in enumerate(self._surprises)})
        return {**own, **nested(parts)}

    @classmethod
    def load(cls, saved: Mapping[str, Floats]) -> Self:
        """What `save` returned, as it was."""
        weights = saved["weights"].tolist()
        members: list[Detector] = []
        for index in range(len(weights)):
            arrays = part_of(saved, f"member{index}")
            name = next(iter(arrays)).split("/")[0]
            members.append(MEMBERS[name].load(part_of(arrays, name)))
        loaded = cls(members, weights=weights)
        loaded._weights = saved["weights"].copy()
        loaded._surprises = [Surprise.load(part_of(saved, f"surprise{index}")) for index in range(len(weights))]
        loaded._features = int(saved["features"][0])
        loaded._held, loaded._lingering = saved["held"].copy(), saved["lingering"].copy()
        return loaded

    def _calibrate(self) -> None:
        for member, surprise in zip(self._members, self._surprises, strict=True):
            surprise.fit(member.held_out)
        self._hold_out()

    def _hold_out(self) -> None:
        """Scores of what all members held out, run by run: nothing lingers from one run to the next."""
        of_members = np.stack([
            surprise.of(member.held_out) for member, surprise in zip(self._members, self._surprises, strict=True)
        ])  # fmt: skip
        strange = np.where(np.isnan(of_members).any(axis=0), np.nan, _strangeness(of_members, self._weights))
        self._held = np.full(len(strange), np.nan)
        known = np.flatnonzero(np.isfinite(strange))
        for run in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):
            self._held[run] = self._with_lingering(strange[run])

    @staticmethod
    def _with_lingering(strange: Floats) -> Floats:
        bounded = np.minimum(np.nan_to_num(strange), LINGER_BOUND)
        return np.asarray(strange + LINGER_SHARE * lfilter([LINGER_WEIGHT], [1.0, LINGER_WEIGHT - 1.0], bounded))


def _strangeness(surprises: Floats, weights: Floats) -> Floats:
    """Of members by steps or series: the weighed mean of squares; NaN where no member knows anything."""
    nothing = np.isnan(surprises).all(axis=0)
    return np.where(nothing, np.nan, weights @ np.nan_to_num(surprises) ** 2)
