"""What step times are judged by follows what calibration learns of them, slowly and not far. Pure.

Theory of operation. Calibration learns from every replica, a failing one among them: were it believed at once, it would
explain away the very slowness that detection is to find. Were it never believed, the data sheet's idea of how steps
grow with the load would be used for ever. So a variant's factors move towards what is learnt by a few percent an hour,
which is less than each replica's own slow mean takes off; they stand still while any of its replicas is degraded; and
they never leave the neighbourhood of what was known when the variant was first seen. How exact the model says it is
stays as it was then, since that bounds what may be taken off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from enova_recommender.performance.correction import GROUPS, Correction

FOLLOW_EVERY_S = 600.0         # of model time
FOLLOW_PER_HOUR = 0.03         # by which the logarithm of a factor moves at most
FOLLOW_MAX = math.log(2.0)     # in all, from where it began
IDLE_MAX_S = 3_600.0           # of time in which nobody looked, that counts
NEAR = 1e-6                    # of a logarithm: it has arrived
_SAVED = 2 * len(GROUPS) + 1   # where it began, where it is, and the spread


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowedCorrection:
    """The correction that a variant is judged by, and the factors that it began with."""

    began: tuple[float, ...]
    correction: Correction
    moved_s: float

    @classmethod
    def begin(cls, correction: Correction, *, now_s: float) -> FollowedCorrection:
        """What was known when the variant was first seen."""
        return cls(began=correction.factors, correction=correction, moved_s=now_s)

    def towards(self, learnt: Correction, *, now_s: float, is_well: bool) -> FollowedCorrection:
        """Some way towards what is learnt; time in which a replica was ill does not count."""
        moved_s = min(max(0.0, now_s - self.moved_s), IDLE_MAX_S)
        if not is_well:
            return replace(self, moved_s=now_s)
        most = FOLLOW_PER_HOUR * moved_s / 3_600.0
        factors = [
            _moved(now, wanted, began, most)
            for now, wanted, began in zip(self.correction.factors, learnt.factors, self.began, strict=True)
        ]
        correction = Correction.of(factors, spread=self.correction.spread)
        return replace(self, correction=correction, moved_s=now_s)

    def save(self) -> list[float]:
        """All but the time, as figures."""
        spread = self.correction.spread
        return [*self.began, *self.correction.factors, math.nan if spread is None else spread]

    @classmethod
    def load(cls, saved: Sequence[float], *, now_s: float) -> FollowedCorrection:
        """What `save` returned; six figures are the factors of a release that never moved them.

        Raises ValueError for anything else.
        """
        if len(saved) == len(GROUPS):
            return cls.begin(Correction.of(saved), now_s=now_s)
        if len(saved) != _SAVED:
            raise ValueError(f"a correction of {len(saved)} figures")
        began, factors, spread = saved[: len(GROUPS)], saved[len(GROUPS) : -1], saved[-1]
        correction = Correction.of(factors, spread=None if math.isnan(spread) else spread)
        return cls(began=Correction.of(began).factors, correction=correction, moved_s=now_s)


def _moved(now: float, wanted: float, began: float, most: float) -> float:
    low, high = began * math.exp(-FOLLOW_MAX), began * math.exp(FOLLOW_MAX)
    goal = math.log(min(max(wanted, low), high) / now)
    return now if abs(goal) < NEAR else now * math.exp(min(max(goal, -most), most))
