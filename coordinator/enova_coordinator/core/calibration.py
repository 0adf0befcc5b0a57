"""What was learnt of step times, as the store keeps it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCalibration:
    """What was learnt of the step times of one model and configuration on one GPU type, whoever serves it.

    The name is calibrations/{gpu type}.{hash of shape and configuration}; the figures are those of
    `enova_recommender.performance.calibration.Calibration`.
    """

    name: str
    gpu_type: str
    model: str                     # as the deployment named it that was measured last
    configuration: str             # what of it the steps depend on, in words
    groups: tuple[str, ...]
    factors: tuple[float, ...]
    covariance: tuple[float, ...]  # row by row
    noise: float
    prior_spread: float
    updates: int = 0
    outliers: int = 0
    run: int = 0                   # errors in a row that were cut: a change of the world is seen over many rounds
    load: tuple[float, ...] = ()
    update_time_s: float = 0.0
