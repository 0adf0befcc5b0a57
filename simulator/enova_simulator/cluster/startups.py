"""How long starts take: lognormal around a median, drawn by the number of the start, so that policies draw alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from enova_recommender.scaling.situation import StartUp

# Of the logarithm: base-model loads of a production service (gentd26) have a median of 22.7 s and a largest of 79 s in
# some thousands, 3.5 deviations away.
SPREAD = 0.35
NORMAL_90 = 1.2815515594457


@dataclass(frozen=True, slots=True, kw_only=True)
class Lognormal:
    """Starts of a given median; `never` are the numbers of those that never become READY."""

    median_s: float
    seed: int
    spread: float = SPREAD
    never: frozenset[int] = frozenset()
    failing: float = 0.0               # share of starts that fail once and are tried again, which doubles them

    def seconds(self, number: int) -> float:
        """From the start command to READY; infinity for one that never is."""
        if number in self.never:
            return math.inf
        draw = np.random.default_rng([self.seed, 77, number])
        seconds = self.median_s * math.exp(self.spread * draw.standard_normal())
        if self.failing and draw.random() < self.failing:
            seconds += self.median_s * math.exp(self.spread * draw.standard_normal())
        return seconds

    def prior(self) -> StartUp:
        """What policies are told before starts were seen."""
        return StartUp(p50_s=self.median_s, p90_s=self.median_s * math.exp(NORMAL_90 * self.spread))
