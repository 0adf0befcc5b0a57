"""What engines of other models teach of a model that nobody measured yet: hosts and versions of the engine are alike.

Theory of operation. On one site and type of GPU the logarithms of a model's factors are those of the site plus what is
the model's own, both normal; most of the host's prior variance is taken to be the site's, most of the kernels' to be
the model's own. Each calibrated model tells its
factors with their covariance, so the site's follow by weighted means, and a new model's lie around them with the rest
of the site's uncertainty and another model's own part. That part is as wide as the known models scatter around the
site, judged together with the prior as so many models more: two models that agree are no proof that the third does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from enova_recommender.performance.calibration import (
    FACTOR_MAX,
    FACTOR_MIN,
    TRIAL_NOISE,
    WIDTHS,
    Floats,
    deviations_of,
)
from enova_recommender.performance.correction import GROUPS, UNCORRECTED, Correction

KERNELS_SHARE, HOST_SHARE = 0.25, 0.75  # of the prior's variance that is the site's: it is the host that models share
SITE_SHARES = np.where(WIDTHS > 1, HOST_SHARE, KERNELS_SHARE)
PRIOR_MODELS = 2.0         # that the prior's own part weighs as


def taught_by(known: Sequence[Correction], *, spread: float) -> Correction:
    """The correction of a model of which nothing was measured, from those of others, one a model.

    `spread` is that of the uncorrected step times. Corrections without a covariance teach nothing.
    """
    useful = [one for one in known if one.covariance]
    if not useful:
        return UNCORRECTED
    variances = np.square(deviations_of(spread))
    common, own = np.diag(SITE_SHARES * variances), np.diag((1 - SITE_SHARES) * variances)
    mean, doubt = _site(useful, common, own)
    own = own * _scatter(useful, mean, own)
    mean, doubt = _site(useful, common, own)
    factors = np.clip(np.exp(mean), FACTOR_MIN, FACTOR_MAX)
    whole = doubt + own
    shares = np.full(len(GROUPS), 1 / len(GROUPS))
    return Correction.of(
        tuple(map(float, factors)), spread=math.sqrt(float(shares @ whole @ shares) + TRIAL_NOISE**2),
        covariance=tuple(map(float, whole.ravel())), noise=TRIAL_NOISE,
    )  # fmt: skip


def _site(known: Sequence[Correction], prior: Floats, own: Floats) -> tuple[Floats, Floats]:
    """The mean of the site's logarithms and their covariance."""
    information = np.linalg.inv(prior)
    pull = np.zeros(len(GROUPS))
    for one in known:
        weight = np.linalg.inv(own + _covariance(one))
        information = information + weight
        pull = pull + weight @ np.log(one.factors)
    doubt: Floats = np.linalg.inv(information)
    return doubt @ pull, doubt


def _scatter(known: Sequence[Correction], mean: Floats, own: Floats) -> float:
    """How much wider than thought the models lie around the site, as a factor on the variance of their own parts."""
    total = PRIOR_MODELS
    for one in known:
        apart = np.log(one.factors) - mean
        total += float(apart @ np.linalg.inv(own + _covariance(one)) @ apart) / len(GROUPS)
    return total / (PRIOR_MODELS + len(known))


def _covariance(one: Correction) -> Floats:
    return np.array(one.covariance).reshape(len(GROUPS), len(GROUPS))
