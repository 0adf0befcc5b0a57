"""What one site adds to kernel times: learnt from other models, near to nothing with none, and sharpened by trials."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from enova_recommender.performance import KernelTimes
from enova_recommender.performance.live_steps import ObservedStep
from enova_recommender.recommend.surroundings import UNKNOWN, Trial, expected, features_of, learn
from enova_recommender.types import Batch
from enova_testing.advice import gpu, model

SEQUENCES = (8, 16, 32, 64, 128, 256)
TRUE_S = {"step": 1e-3, "sequence": 5e-5}


def sweep(model_number: int, *, off: float = 1.0, measured: bool = True) -> list[Trial]:
    """A model whose steps take its kernels, a millisecond and 50 us a sequence, all of it `off` times as long."""
    kernels = 0.004 * (1 + model_number / 3)
    found = []
    for sequences in SEQUENCES:
        made = kernels * (1 + sequences / 400)
        taken = off * (made + TRUE_S["step"] + TRUE_S["sequence"] * sequences)
        features = np.array([made, 0.0, 1.0, 32.0, 0.0, float(sequences)])
        found.append(Trial(
            features=features, layout=0, sequences=sequences, step_s=taken if measured else None
        ))  # fmt: skip
    return found


def errors(known: list[Trial], asked: list[Trial], taught: list[list[Trial]]) -> npt.NDArray[np.float64]:
    seconds, _ = expected(learn(taught), known, asked)
    return np.asarray(np.abs(np.log(seconds / np.array([trial.step_s for trial in asked]))))


def test_what_other_models_cost_beside_kernels_is_expected_of_a_new_one() -> None:
    asked = sweep(9)
    untaught = errors([], asked, [])
    taught = errors([], asked, [sweep(number) for number in range(4)])
    assert untaught.max() > 0.3
    assert taught.max() < 0.1


def test_with_nothing_measured_kernel_times_hold_and_the_error_is_the_unknown_one() -> None:
    asked = sweep(0)
    seconds, deviations = expected(learn([]), [], asked)
    assert seconds == pytest.approx([trial.features[0] for trial in asked], rel=0.1)
    assert deviations == pytest.approx(UNKNOWN.whole)


def test_a_trial_moves_all_settings_and_its_neighbours_most() -> None:
    site, asked = learn([sweep(number) for number in range(4)]), sweep(9, off=1.4)
    before, doubt_before = expected(site, [], asked)
    after, doubt_after = expected(site, [asked[2]], asked)
    assert np.all(after > before)
    assert np.all(doubt_after < doubt_before)
    assert doubt_after[2] == doubt_after.min()
    assert doubt_after[3] < doubt_after[5]
    assert after[2] == pytest.approx(asked[2].step_s, rel=0.1)


def test_three_trials_find_a_model_that_is_unlike_the_others() -> None:
    taught, asked = [sweep(number) for number in range(4)], sweep(9, off=1.6)
    assert errors([], asked, taught).max() > 0.35
    assert errors([asked[0], asked[2], asked[4]], asked, taught).max() < 0.1


def test_models_that_scatter_teach_caution() -> None:
    alike = learn([sweep(number) for number in range(6)])
    unlike = learn([sweep(number, off=off) for number, off in enumerate((0.5, 0.8, 1.0, 1.3, 1.9, 2.4))])
    assert unlike.scatter.common > alike.scatter.common


def test_two_models_are_no_proof() -> None:
    few, many = learn([sweep(0), sweep(1)]), learn([sweep(number) for number in range(12)])
    assert few.scatter.whole > many.scatter.whole


def test_another_layout_learns_less_from_a_trial() -> None:
    site = learn([sweep(number) for number in range(4)])
    known = sweep(9, off=1.4)[2]
    near = Trial(features=known.features, layout=0, sequences=known.sequences)
    far = Trial(features=known.features, layout=1, sequences=known.sequences)
    _, (near_doubt, far_doubt) = expected(site, [known], [near, far])
    assert near_doubt < far_doubt


def test_features_count_what_a_step_is_made_of() -> None:
    times = KernelTimes(model(), gpu())
    batch = Batch(decode_sequences=16, context_tokens=16_000)
    found = features_of(times, model(), ObservedStep.of(batch, 0.01))
    assert found[0] == pytest.approx(times.step_s(batch))
    assert found[1:].tolist() == [0.0, 1.0, 32.0, 0.0, 16.0]
