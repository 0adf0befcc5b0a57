"""Whether answers of a kind have become longer: a chart on censored lengths; pure.

Theory of operation. Under the fitted distribution the cumulative hazard H(t) = -log(1 - F(t)) of an answer that ended
at t is exponential with mean 1, and one stopped at t has shown that it exceeds H(t). If answers became longer, their
hazard is divided by some RATIO. The logarithm of the likelihood ratio of that against "as before" is
(1 - 1/RATIO) H - d log RATIO, with d = 1 where the answer ended by itself. Their sum is held at 0 from below (Page's
cumulative sum, on survival times as in Biswas and Kalbfleisch, 2008) and alarms at THRESHOLD; by Wald's inequality at
least exp(THRESHOLD) answers lie between two false alarms, on average. Where the sum was last 0 is when the change most
likely began: what came after it is kept.

Only growth alarms. A limit that became too far out cuts nobody, and is drawn in as the memory fills with shorter
answers; dropping what is known at every ebb of a daily tide was tried on recorded clients, and leaves too little to
know the tail by when the flood returns (twice the wanted share was cut).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from enova_recommender.recommend.max_tokens.survival import Flags, Floats, Ints, LengthDensity

RATIO = 1.5                # of hazards: for exponential tails, lengths that grow by half
THRESHOLD = 9.0            # at least 8,100 answers between false alarms
_SURVIVAL_MIN = 1e-4       # what a fitted tail is trusted to: no single answer may alarm by itself


@dataclass(frozen=True, slots=True)
class Chart:
    """The sum, and how many answers ago it was last 0."""

    longer: float = 0.0
    longer_for: int = 0

    @property
    def since(self) -> int | None:
        """How many answers ago the change began; None while there is none."""
        return self.longer_for if self.longer >= THRESHOLD else None


def watched(chart: Chart, density: LengthDensity, tokens: Ints, stopped: Flags) -> Chart:
    """The chart after some more answers, in their order."""
    longer, longer_for = chart.longer, chart.longer_for
    for hazard, censored in zip(_hazards(density, tokens).tolist(), stopped.tolist(), strict=True):
        if longer < THRESHOLD:     # after an alarm only the answers since then are counted
            ended = 0.0 if censored else math.log(RATIO)
            longer = max(0.0, longer + (1.0 - 1.0 / RATIO) * hazard - ended)
        longer_for = longer_for + 1 if longer else 0
    return Chart(longer, longer_for)


def _hazards(density: LengthDensity, tokens: Ints) -> Floats:
    survival = 1.0 - density.cdf(tokens)
    return -np.log(np.clip(survival, _SURVIVAL_MIN, 1.0))
