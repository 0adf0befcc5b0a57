"""Whatever series hold, detectors go on: no exception, scores that are numbers or missing, blame that sums to one."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from enova_recommender.detection.detector import Detector
from enova_recommender.detection.ensemble import EnsembleDetector
from enova_recommender.detection.extremes import DriftingThreshold
from enova_recommender.detection.learned import VaeDetector
from enova_testing.examples import examples

Floats = npt.NDArray[np.float64]

FEATURES = 3
odd = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0, 1.0, 7.5, 1e-300, 1e17, 1e300, -1e308])
rows = st.lists(st.lists(odd, min_size=FEATURES, max_size=FEATURES), min_size=1, max_size=12)
columns = st.lists(
    st.sampled_from(["noise", "constant", "zero", "missing", "holed", "huge", "one_spike"]),
    min_size=FEATURES, max_size=FEATURES,
)  # fmt: skip
jumps = st.lists(st.sampled_from([0, 1, -1, 5, 10**9, -(10**9)]), min_size=1, max_size=12)


def column(kind: str, draw: np.random.Generator) -> Floats:
    noise = draw.normal(size=200)
    match kind:
        case "constant":
            return np.full(200, 4.2)
        case "zero":
            return np.zeros(200)
        case "missing":
            return np.full(200, np.nan)
        case "holed":
            return np.where(draw.random(200) < 0.4, np.nan, noise)
        case "huge":
            return noise * 1e200
        case "one_spike":
            return np.where(np.arange(200) == 77, 1e12, 0.0)
        case _:
            return noise


def made(kind: str) -> Detector:
    return VaeDetector() if kind == "vae" else EnsembleDetector.standard(period_steps=24)


@pytest.mark.parametrize("kind", ["ensemble", "vae"])
@examples(25)
@given(columns=columns, values=rows, jumps=jumps)
def test_any_history_and_any_steps_at_any_time_give_scores(
    kind: str, columns: list[str], values: list[list[float]], jumps: list[int]
) -> None:
    if set(columns) == {"missing"}:
        columns = ["noise", *columns[1:]]
    draw = np.random.default_rng(1)
    detector = made(kind)
    detector.fit(np.column_stack([column(each, draw) for each in columns]))
    table, at = np.array(values), 200
    scores = detector.score(table)
    assert ((scores >= 0.0) | np.isnan(scores)).all()
    assert not np.isinf(scores).any()
    for number, row in enumerate(table):
        at += jumps[number % len(jumps)]
        told = detector.update(np.stack((row, row[::-1])), step=at)
        assert told.shape == (2,)
        assert not np.isinf(told).any()
        sums = detector.contributions().sum(axis=1)
        assert np.all(np.isclose(sums, 1.0) | (sums == 0.0))


@examples(50)
@given(scores=st.lists(odd, min_size=1, max_size=40))
def test_a_threshold_judges_a_batch_as_step_by_step_and_nothing_breaks_it(scores: list[float]) -> None:
    normal = np.random.default_rng(2).exponential(size=500)
    batch, stepped = DriftingThreshold(rate=1e-2), DriftingThreshold(rate=1e-2)
    batch.fit(normal)
    stepped.fit(normal)
    more = np.concatenate((normal, scores, normal))
    assert batch.judge(more).tolist() == [bool(stepped.update([score])[0]) for score in more]
    assert batch.level == stepped.level
