"""The published detector as a baseline: its formulas against values worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from enova_testing.sla_vae import KL_TARGET, PiController, SlaVae, _kl, _tails, features, surprise


@pytest.mark.parametrize(("probability", "feature"), [(1.0, 0.0), (1e-3, 0.5), (1e-6, 1.0), (1e-9, 1.0), (0.1, 1 / 6)])
def test_a_feature_is_the_log_of_a_clipped_tail_probability(probability: float, feature: float) -> None:
    assert surprise(np.array([probability]))[0] == pytest.approx(feature)


def test_a_tail_is_the_mean_of_the_kernels_tails() -> None:
    # One step whose window is -1 and 1: sigma 1, bandwidth (4 / 360) ** 0.2 = 0.4066; at 1: (Phi(4.92) + Phi(0)) / 2.
    values = np.array([[-1.0], [1.0], [1.0]])
    lower, upper = _tails(values, np.array([1, 2]))
    assert lower[2, 0] == pytest.approx(0.75, abs=1e-4)
    assert upper[2, 0] == pytest.approx(0.25, abs=1e-4)
    assert lower[1, 0] == upper[1, 0] == 1.0  # it has no whole window


def test_the_divergence_is_that_of_the_formula() -> None:
    mean, log_variance = np.array([[1.0, 0.0]]), np.array([[0.0, math.log(2.0)]])
    assert _kl(mean, log_variance)[0] == pytest.approx(-0.5 * ((1 + 0 - 1 - 1) + (1 + math.log(2) - 0 - 2)))


def test_the_weight_of_the_divergence_follows_the_published_controller() -> None:
    controller = PiController()
    assert controller.update(KL_TARGET) == pytest.approx(1.0 + 0.005)
    # e = -2: P = 0.01 / (1 + exp(-2)), I = 1e-4 * 2.
    assert controller.update(KL_TARGET + 2.0) == pytest.approx(1.0 + 0.01 / (1 + math.exp(-2.0)) + 2e-4)


def test_there_are_six_features_a_metric_and_twelve_of_a_single_one() -> None:
    values = np.random.default_rng(0).normal(size=(400, 2))
    assert features(values, step_s=3600.0).shape == (400, 12)
    assert features(values[:, :1], step_s=3600.0).shape == (400, 12)


def test_marked_rows_get_a_larger_score_than_before() -> None:
    draw = np.random.default_rng(1)
    normal = (0.1 * draw.random((600, 12))).astype(np.float32)
    odd = np.clip(normal[:30] + 0.5 * (np.arange(12) < 4), 0.0, 1.0).astype(np.float32)
    model = SlaVae(12, single=True)
    model.fit(normal, epochs=10)
    before = model.score(odd).mean() - model.score(normal).mean()
    model.fit(np.concatenate((normal, odd)), np.arange(630) >= 600, epochs=10)
    assert model.score(odd).mean() - model.score(normal).mean() > before
