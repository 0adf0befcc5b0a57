"""The delay before attempt n, from a given random draw; pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Exponential backoff with jitter.

    The delay before attempt n (0 is the first retry) lies between `(1 - jitter)` and 1 times
    min(`maximum_s`, `initial_s` * `factor` ** n). A jitter of 1 is the "full jitter" that keeps a
    thousand agents from coming back in step.
    """

    initial_s: float = 0.5
    maximum_s: float = 30.0
    factor: float = 2.0
    jitter: float = 1.0

    def delay_s(self, attempt: int, draw: float) -> float:
        """Seconds to wait before retry `attempt` (0, 1, ...), for a uniform `draw` in [0, 1)."""
        # The exponent is capped: 2.0 ** 2000 overflows, and long before that the maximum holds.
        ceiling = min(self.maximum_s, self.initial_s * self.factor ** min(attempt, 64))
        return ceiling * (1.0 - self.jitter * draw)
