"""What engines of other models teach of a new one: the host that they share, with doubt where they differ."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from enova_recommender import catalog
from enova_recommender.performance import GROUPS, UNCORRECTED, Correction, KernelTimes, Tier
from enova_recommender.performance.engine_model import EngineModel, corrected_times
from enova_recommender.performance.site import taught_by
from enova_recommender.types import Batch, Parallelism, Precision

SPREAD = 0.35
SMALL = catalog.models()["meta-llama/Llama-3.1-8B-Instruct"]
OTHERS = [catalog.models()[name] for name in ("Qwen/Qwen3-14B", "Qwen/Qwen2.5-32B-Instruct")]
H100 = catalog.gpus()["H100"]


def learnt(*, kernels: float = 1.0, host: float = 1.0, doubt: float = 0.05) -> Correction:
    """What was learnt of one model; each factor with the same doubt."""
    size = len(GROUPS)
    covariance = tuple(map(float, (doubt**2 * np.eye(size)).ravel()))
    return Correction.of((kernels,) * 4 + (host,) * 2, spread=0.1, covariance=covariance, noise=0.1)


def doubts(found: Correction) -> np.ndarray:
    return np.sqrt(np.diag(np.array(found.covariance).reshape(len(GROUPS), -1)))


def test_nothing_known_teaches_nothing() -> None:
    assert taught_by([], spread=SPREAD) is UNCORRECTED
    assert taught_by([Correction.of((2.0,) * len(GROUPS), spread=0.1)], spread=SPREAD) is UNCORRECTED


def test_what_hosts_cost_other_models_is_expected_of_a_new_one() -> None:
    found = taught_by([learnt(host=4.0) for _ in range(4)], spread=SPREAD)
    assert found.host == pytest.approx(4.0, rel=0.3)
    assert found.memory == pytest.approx(1.0, rel=0.05)


def test_kernels_are_a_models_own_and_known_no_better_by_others_than_by_tables() -> None:
    found = taught_by([learnt(kernels=1.5) for _ in range(3)], spread=SPREAD)
    assert 1.0 < found.memory < 1.5
    kernels, host = doubts(found)[0], doubts(found)[-1]
    assert kernels > 0.2
    assert host > kernels


def test_models_that_scatter_teach_caution_and_few_are_no_proof() -> None:
    alike = taught_by([learnt(host=2.0) for _ in range(6)], spread=SPREAD)
    unlike = taught_by([learnt(host=host, kernels=host**0.5) for host in (0.3, 0.8, 2.0, 4.0, 9.0)], spread=SPREAD)
    few = taught_by([learnt(host=2.0) for _ in range(2)], spread=SPREAD)
    assert np.all(doubts(unlike) > doubts(alike))
    assert np.all(doubts(few) > doubts(alike))


def test_a_new_model_takes_what_others_on_its_gpu_taught_and_its_own_over_that() -> None:
    keys = [EngineModel(shape=shape, gpu=H100).key for shape in OTHERS]
    slow = {key: learnt(host=5.0) for key in keys}
    batch = Batch(decode_sequences=256, context_tokens=25_600)
    plain = KernelTimes(SMALL, H100)

    def asked(corrections: dict[str, Correction], gpu: str = "H100") -> KernelTimes:
        return corrected_times(corrections)(SMALL, catalog.gpus()[gpu], Parallelism(), Precision())

    taught = asked(slow)
    assert taught.step_s(batch) > 1.1 * plain.step_s(batch)
    assert taught.tier is Tier.CALIBRATED
    assert asked(slow, "A100-80G").correction is UNCORRECTED, "another type of GPU teaches nothing"
    own = learnt(host=1.0)
    assert asked(slow | {EngineModel(shape=SMALL, gpu=H100).key: own}).correction == own
    kin = {EngineModel(shape=SMALL, gpu=H100, parallelism=Parallelism(tensor=2)).key: own}
    assert asked(slow | kin).correction.factors == own.factors
    again = replace(learnt(host=9.0), spread=0.01)
    both = slow | {EngineModel(shape=OTHERS[0], gpu=H100, parallelism=Parallelism(tensor=2)).key: again}
    assert asked(both).step_s(batch) > taught.step_s(batch), "of each model the best known layout teaches"
