"""Model time: the wall clock, scaled from an epoch that all programs of one fleet share.

Frame stamps, detector windows, policy cooldowns and simulated engines live in model time; supervision of processes,
RPC deadlines and leases never do: they stay on `time.monotonic`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from enova_common.errors import InvalidField

SCALE_VARIABLE = "ENOVA_TIME_SCALE"
EPOCH_VARIABLE = "ENOVA_CLOCK_EPOCH"


@dataclass(frozen=True, slots=True)
class ModelClock:
    """model time = epoch + (wall time - epoch) * scale; with a scale of 1 it is the wall clock."""

    scale: float = 1.0
    epoch_unix_s: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InvalidField(f"{self.scale} is not a positive number", field="time_scale")
        if not (math.isfinite(self.epoch_unix_s) and self.epoch_unix_s >= 0):
            raise InvalidField(f"{self.epoch_unix_s} is not a time after 1970", field="clock_epoch")

    def now(self) -> float:
        """Model time, in seconds since 1970."""
        return self.at(time.time())

    def at(self, wall_unix_s: float) -> float:
        """The model time at a given wall time."""
        if self.scale == 1.0:
            return wall_unix_s  # exact: the epoch must not cost a bit of precision where nothing is scaled
        return self.epoch_unix_s + (wall_unix_s - self.epoch_unix_s) * self.scale

    def real_s(self, model_s: float) -> float:
        """How long a span of model time takes on the wall."""
        return model_s / self.scale

    def model_s(self, real_s: float) -> float:
        """How much model time passes in a span of real time."""
        return real_s * self.scale


def clock_from_environment(env: Mapping[str, str] = os.environ) -> ModelClock:
    """The fleet's clock as ENOVA_TIME_SCALE and ENOVA_CLOCK_EPOCH give it; without them the wall clock."""
    scale = _number(env, SCALE_VARIABLE, 1.0)
    epoch_unix_s = _number(env, EPOCH_VARIABLE, 0.0)
    if scale != 1.0 and epoch_unix_s == 0.0:
        # Scaled from 1970, model time would lie centuries ahead, and differ by hours between two starts.
        raise InvalidField(
            f"{SCALE_VARIABLE}={scale:g} needs the time from which to scale",
            field=EPOCH_VARIABLE,
            remedy="set it to the same Unix time for all programs of the fleet",
        )
    return ModelClock(scale, epoch_unix_s)


def _number(env: Mapping[str, str], variable: str, default: float) -> float:
    text = env.get(variable, "")
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        raise InvalidField(f"{text!r} is not a number", field=variable) from None
