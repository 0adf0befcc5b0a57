"""Rows of telemetry become frames: what an ingress holds is waiting, what was not measured stays so."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from enova_coordinator.core.live_frames import cache_plain, capacity_of, live_plain, live_sentences, replica_frames
from enova_coordinator.core.series import COLUMN, REPLICA_FEATURES
from enova_recommender import catalog


def rows(count: int, **columns: float | npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Rows of a replica with these columns; the rest was not measured."""
    table = np.full((count, len(REPLICA_FEATURES)), np.nan, dtype=np.float32)
    for name, values in columns.items():
        table[:, COLUMN[name]] = values
    return table


def finished(count: int) -> npt.NDArray[np.float64]:
    """Requests that ended, four a second on average."""
    return np.random.default_rng(1).poisson(4.0, count).astype(np.float64)


def words(*windows: npt.NDArray[np.float32]) -> str:
    """What is said of these windows of 1 s steps."""
    return " ".join(live_sentences(capacity_of(windows, step_s=1.0), max_num_seqs=64))


def test_what_the_ingress_holds_back_is_waiting() -> None:
    frames = replica_frames(rows(3, running=8, waiting=1, held=20, engine_finished=2), step_s=1.0)
    assert frames.waiting.tolist() == [12, 12, 12]
    assert replica_frames(rows(3, running=8, waiting=1, engine_finished=2), step_s=1.0).waiting.tolist() == [1, 1, 1]


def test_the_engine_counts_what_finished_and_ingresses_where_it_does_not() -> None:
    both = rows(2, running=1, waiting=0, engine_finished=3, finished=5)
    assert replica_frames(both, step_s=1.0).finished.tolist() == [3, 3]
    one = rows(2, running=1, waiting=0, finished=5)
    assert replica_frames(one, step_s=1.0).finished.tolist() == [5, 5]


def test_what_was_not_measured_stays_unmeasured() -> None:
    assert not replica_frames(rows(4, running=1, waiting=0), step_s=1.0).measured.any()


def test_a_saturated_replica_is_told_with_its_rate_and_batch() -> None:
    told = words(rows(300, running=48.0, waiting=np.arange(300.0), engine_finished=finished(300)))
    assert "one replica carries at most 4" in told or "one replica carries at most 3.9" in told
    assert "48 in the batch" in told
    assert "64 is set" in told


def test_an_unsaturated_one_is_told_what_it_carried() -> None:
    told = words(rows(300, running=9.0, waiting=0, engine_finished=finished(300)))
    assert "not known: finished still follows the load" in told


@pytest.mark.parametrize("windows", [(), (rows(300),)])
def test_silence_is_no_capacity(windows: tuple[npt.NDArray[np.float32], ...]) -> None:
    assert "carries" not in words(*windows)


SATURATED = rows(300, running=48.0, waiting=np.arange(300.0), engine_finished=finished(300))
LENGTHS = ((1000, 100), (2000, 300)) * 50


def test_the_figures_are_those_of_the_sentence_with_their_intervals() -> None:
    found = capacity_of([SATURATED], step_s=1.0)
    plain: Any = live_plain(found)
    rate = plain["n_limit_rps"]
    assert rate["low"] <= rate["value"] <= rate["high"]
    assert f"at most {rate['value']:.3g} requests/s" in words(SATURATED)
    assert plain["saturation_load"]["value"] == 48
    assert (plain["evidence"], plain["frames"]) == ("QUEUE", 300)
    assert plain["max_num_seqs"] == 48
    assert "doubt" not in plain


def test_a_doubt_is_told_with_what_was_carried() -> None:
    plain = live_plain(capacity_of([rows(300, running=9.0, waiting=0, engine_finished=finished(300))], step_s=1.0))
    assert plain["doubt"] == "NOT_SATURATED_YET"
    assert float(str(plain["at_least_rps"])) == pytest.approx(4.0, rel=0.2)
    assert "n_limit_rps" not in plain


def test_the_cache_at_saturation_is_that_of_lengths_met_together() -> None:
    found = capacity_of([SATURATED], step_s=1.0)
    shape, gpu = catalog.models()["meta-llama/Llama-3.1-8B-Instruct"], catalog.gpus()["H100"]
    memory: Any = cache_plain(found, shape, gpu, {"max_num_seqs": 64}, LENGTHS)["memory"]
    a_token = 2 * 32 * 8 * 128 * 2
    # Of the second kind three times as many are met, each with its prompt and on average half of its answer.
    mean_tokens = (1 * 1050 + 3 * 2150) / 4
    assert memory["sequences"] == 48
    assert 1.0 < memory["cache_bytes"] / (48 * mean_tokens * a_token) < 1.15
    assert memory["configured_cache_bytes"] > memory["cache_bytes"]


@pytest.mark.parametrize(
    ("shape", "gpu", "lengths", "why"),
    [
        ("nobody knows the model", catalog.gpus()["H100"], LENGTHS, "nobody knows the model"),
        (catalog.models()["meta-llama/Llama-3.1-8B-Instruct"], "GPU type X is odd", LENGTHS, "GPU type X is odd"),
        (catalog.models()["meta-llama/Llama-3.1-8B-Instruct"], catalog.gpus()["H100"], LENGTHS[:3], "of 3 requests"),
    ],
)
def test_why_the_cache_is_not_known_is_told(shape: Any, gpu: Any, lengths: Any, why: str) -> None:
    told = cache_plain(capacity_of([SATURATED], step_s=1.0), shape, gpu, {}, lengths)
    assert why in str(told["memory_reason"])
    assert "memory" not in told
