"""One-step forecasts as Dynamo's planner makes them: ARIMA (its default), the last value, a Kalman filter (P9).

ARIMA: order (1, 1, 1) by maximum likelihood (statsmodels); with fewer than 5 values, or equal ones, the last. (The
planner searches the order by information criterion; one order is our simplification.)
Kalman: local level and trend, process noise 1 and 0.1, observation noise 10; the forecast is level + trend.
No forecast is below 0.
"""

from __future__ import annotations

import warnings
from enum import StrEnum
from typing import assert_never

import numpy as np

VALUES_MIN = 5
LEVEL_NOISE, TREND_NOISE, OBSERVATION_NOISE = 1.0, 0.1, 10.0


class Forecaster(StrEnum):
    """The ways to look one interval ahead."""

    ARIMA = "arima"
    CONSTANT = "constant"
    KALMAN = "kalman"


def next_value(values: tuple[float, ...], forecaster: Forecaster) -> float:
    """The value expected after these."""
    match forecaster:
        case Forecaster.CONSTANT:
            return max(values[-1], 0.0)
        case Forecaster.KALMAN:
            return max(_kalman(values), 0.0)
        case Forecaster.ARIMA:
            equal = min(values) == max(values)
            return max(values[-1] if equal or len(values) < VALUES_MIN else _arima(values), 0.0)
        case _:
            assert_never(forecaster)


def _kalman(values: tuple[float, ...]) -> float:
    state = np.array([values[0], 0.0])
    spread = np.diag([OBSERVATION_NOISE, LEVEL_NOISE])
    move = np.array([[1.0, 1.0], [0.0, 1.0]])
    noise = np.diag([LEVEL_NOISE, TREND_NOISE])
    for value in values[1:]:
        state, spread = move @ state, move @ spread @ move.T + noise
        gain = spread[:, 0] / (spread[0, 0] + OBSERVATION_NOISE)
        state = state + gain * (value - state[0])
        spread = spread - np.outer(gain, spread[0])
    return float(state.sum())


def _arima(values: tuple[float, ...]) -> float:
    from statsmodels.tsa.arima.model import ARIMA  # three seconds to import, for this policy alone

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # of starting values and convergence: what it found is what it forecasts
        fitted = ARIMA(np.array(values), order=(1, 1, 1)).fit()
        forecast = float(fitted.forecast(1)[0])
    return forecast if np.isfinite(forecast) else values[-1]
