"""The learned detector: gradients, the weight of the code, labels that cannot outweigh normal time, its card."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from enova_recommender.detection.detector import FALSE_ALARM, TRUE_ALARM, UNKNOWN, NotFitted
from enova_recommender.detection.layers import Adam, Dense
from enova_recommender.detection.learned import VaeDetector
from enova_recommender.detection.vae import (
    ANOMALY_WEIGHT,
    KL_TARGET,
    LATENT,
    WEIGHT_MAX,
    WEIGHT_MIN,
    KlController,
    ModelCard,
    Network,
    divergence,
)

Floats = npt.NDArray[np.float64]


@pytest.mark.parametrize("kl_weight", [0.01, 0.7])
def test_slopes_are_those_of_finite_differences(kl_weight: float) -> None:
    draw = np.random.default_rng(5)
    network = Network(7, seed=3)
    rows, noise = draw.random((9, 7)), draw.normal(size=(9, LATENT))
    anomalous = np.arange(9) % 3 == 0
    found = network.loss(rows, anomalous, noise, kl_weight)
    for parameter, slope in zip(network.parameters, found.slopes, strict=True):
        for place in draw.integers(0, parameter.size, 12).tolist():
            at = np.unravel_index(place, parameter.shape)
            kept, tiny = parameter[at], 1e-6
            parameter[at] = kept + tiny
            above = network.loss(rows, anomalous, noise, kl_weight).value
            parameter[at] = kept - tiny
            below = network.loss(rows, anomalous, noise, kl_weight).value
            parameter[at] = kept
            assert slope[at] == pytest.approx((above - below) / (2 * tiny), rel=1e-4, abs=1e-6)


def test_the_anomaly_term_is_bounded_however_badly_a_marked_row_is_reconstructed() -> None:
    network = Network(5, seed=1)
    rows, noise = np.ones((4, 5)), np.zeros((4, LATENT))
    marked = np.ones(4, dtype=bool)
    for bias in (0.0, -10.0, -1000.0):
        network.decoder.biases[-1][:] = bias
        assert 0.0 <= network.loss(rows, marked, noise, 1.0).value <= ANOMALY_WEIGHT * network.margin
    assert np.abs(network.loss(rows, marked, noise, 1.0).slopes[-1]).max() < 0.01


def test_divergence_is_zero_for_a_perfect_reconstruction_alone() -> None:
    rows = np.array([[0.2, 0.7], [0.5, 0.1]])
    logits = np.log(rows / (1.0 - rows))
    assert divergence(rows, logits) == pytest.approx([0.0, 0.0], abs=1e-12)
    assert (divergence(rows, logits + 1.0) > 0.05).all()


def test_the_controller_moves_the_weight_towards_its_set_point_within_bounds() -> None:
    controller = KlController()
    for _ in range(2000):
        controller.update(KL_TARGET + 3.0)
    assert controller.weight == WEIGHT_MAX
    back = 0
    while controller.weight > WEIGHT_MIN and back < 2000:
        controller.update(KL_TARGET - 3.0)
        back += 1
    assert back < 500  # the integral did not wind up
    assert controller.weight == WEIGHT_MIN


def test_adam_finds_the_least_of_a_bowl() -> None:
    place = np.array([3.0, -2.0])
    adam = Adam([place], rate=0.05)
    for _ in range(500):
        adam.step([2.0 * (place - np.array([1.0, 1.0]))])
    assert place == pytest.approx([1.0, 1.0], abs=1e-2)


def test_layers_that_were_saved_give_what_they_gave() -> None:
    layers = Dense((3, 4, 2), seed=2)
    rows = np.random.default_rng(1).normal(size=(5, 3))
    assert np.array_equal(Dense.load(layers.save()).forward(rows)[-1], layers.forward(rows)[-1])


def history(steps: int = 800, seed: int = 0) -> Floats:
    draw = np.random.default_rng(seed)
    load = 2.0 + np.sin(np.arange(steps) / 20.0)
    return np.asarray(load[:, None] * np.array([1.0, 5.0, 0.1]) * (1.0 + 0.05 * draw.normal(size=(steps, 3))))


def test_the_card_says_what_was_learnt_and_goes_with_what_is_saved() -> None:
    detector = VaeDetector(seed=7)
    with pytest.raises(NotFitted):
        _ = detector.card
    detector.fit(history(), first=100)
    card = detector.card
    assert (card.first_step, card.last_step, card.seed, card.trainings, card.marked_rows) == (100, 899, 7, 1, 0)
    assert 0 < card.rows <= 800
    assert card.loss > 0.0
    assert ModelCard.load(detector.save()["card"]) == card


def test_rows_marked_as_true_become_stranger_and_those_marked_false_less_so() -> None:
    detector = VaeDetector()
    detector.fit(history())
    odd = history(60, seed=3)
    odd[20:30, 1] *= 1.5
    odd[40:50, 0] *= 0.6
    marks = np.full(60, UNKNOWN, dtype=np.int8)
    marks[20:30], marks[40:50] = TRUE_ALARM, FALSE_ALARM
    before = detector.score(odd)
    for _ in range(4):
        detector.learn(odd, marks, first=800)
    after = detector.score(odd)
    ratio = after[20:30].mean() / before[20:30].mean(), after[40:50].mean() / before[40:50].mean()
    assert ratio[0] > ratio[1]
    assert ratio[1] < 1.0
    assert detector.card.trainings == 5
    assert detector.card.last_step == 859
    assert detector.card.marked_rows == 40


def test_labels_do_not_make_normal_time_strange() -> None:
    detector = VaeDetector()
    detector.fit(history())
    odd = history(60, seed=3)
    odd[20:30, 1] *= 1.5
    marks = np.full(60, UNKNOWN, dtype=np.int8)
    marks[20:30] = TRUE_ALARM
    before = np.nanmedian(detector.held_out)
    for _ in range(5):
        detector.learn(odd, marks)
    assert np.nanmedian(detector.held_out) < 2.0 * before
