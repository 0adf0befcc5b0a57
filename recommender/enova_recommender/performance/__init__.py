"""How long one engine step takes for a batch: from measured kernels, from data sheets, or as the world gives it."""

from enova_recommender.performance.calibration import Calibration, calibrated
from enova_recommender.performance.constants import FITTED, Constants, Tier
from enova_recommender.performance.correction import GROUPS, UNCORRECTED, Correction, KernelGroup
from enova_recommender.performance.kernel_times import KernelTimes
from enova_recommender.performance.layers import KernelClass
from enova_recommender.performance.live_steps import ObservedStep
from enova_recommender.performance.roofline import PRIOR, Efficiency, Roofline
from enova_recommender.performance.times import Affine, FirstTokenDelay, Slowed, StepTimes, first_token_delay

__all__ = [
    "FITTED",
    "GROUPS",
    "PRIOR",
    "UNCORRECTED",
    "Affine",
    "Calibration",
    "Constants",
    "Correction",
    "Efficiency",
    "FirstTokenDelay",
    "KernelClass",
    "KernelGroup",
    "KernelTimes",
    "ObservedStep",
    "Roofline",
    "Slowed",
    "StepTimes",
    "Tier",
    "calibrated",
    "first_token_delay",
]
