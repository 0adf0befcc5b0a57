"""The most sequences that a cache carries follow from their lengths, and the normal figure from the exact one."""

from __future__ import annotations

import numpy as np
import pytest

from enova_recommender import catalog
from enova_recommender.memory import Method, Moment, block_demand, fit, most_sequences
from enova_recommender.recommend.live import cache_bytes

SMALL = catalog.models()["meta-llama/Llama-3.1-8B-Instruct"]
H100, L4 = catalog.gpus()["H100"], catalog.gpus()["L4"]
CACHE = fit(SMALL, H100, max_model_len=8192)
DRAW = np.random.default_rng(4)
LENGTHS = [(int(prompt) + 1, int(output) + 1) for prompt, output in DRAW.lognormal((6.0, 5.5), 0.9, (500, 2))]


@pytest.mark.parametrize("method", Method)
def test_equal_sequences_are_divided_into_the_blocks(method: Method) -> None:
    most = most_sequences(CACHE, [(500, 300)], moment=Moment.AT_END, method=method)
    assert most == CACHE.kv_blocks // 50


def test_a_sequence_is_met_with_half_of_its_answer() -> None:
    demand = block_demand(CACHE.layout, [(800, 1600)])
    assert demand.mean == pytest.approx((800 + 800) / 16, abs=1)


def test_long_answers_are_met_more_often() -> None:
    demand = block_demand(CACHE.layout, [(16, 16), (16, 1600)])
    equal = block_demand(CACHE.layout, [(16, 16), (16, 1600)], moment=Moment.AT_END)
    assert demand.mean > equal.mean * 0.9
    assert demand.weights.sum() == pytest.approx(1)


def test_surer_means_fewer() -> None:
    counts = [most_sequences(CACHE, LENGTHS, quantile=quantile) for quantile in (0.5, 0.9, 0.99, 0.999)]
    assert counts == sorted(set(counts), reverse=True)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
def test_the_normal_approximation_is_near_the_exact_sum(quantile: float) -> None:
    normal, exact = (most_sequences(CACHE, LENGTHS, quantile=quantile, method=method) for method in Method)
    assert normal == pytest.approx(exact, rel=0.03)


def test_the_exact_sum_holds_what_it_promises() -> None:
    cache = fit(SMALL, L4, max_model_len=8192)
    most = most_sequences(cache, LENGTHS, quantile=0.9, moment=Moment.AT_END, method=Method.EXACT)
    blocks = np.array([cache.layout.blocks(prompt + output) for prompt, output in LENGTHS])
    sums = np.random.default_rng(1).choice(blocks, (4000, most)).sum(axis=1)
    assert (sums <= cache.kv_blocks).mean() == pytest.approx(0.9, abs=0.03)


def test_no_blocks_carry_nothing() -> None:
    large = catalog.models()["meta-llama/Llama-3.1-70B-Instruct"]
    assert most_sequences(fit(large, H100), LENGTHS) == 0


def test_memory_for_so_many_sequences_is_the_inverse() -> None:
    most = most_sequences(CACHE, LENGTHS, quantile=0.99)
    available = CACHE.kv_blocks * CACHE.kv_block_bytes
    assert cache_bytes(CACHE.layout, LENGTHS, sequences=most, quantile=0.99) <= available
    assert cache_bytes(CACHE.layout, LENGTHS, sequences=most + 2, quantile=0.99) > available


@pytest.mark.parametrize(("lengths", "quantile", "field"), [([], 0.9, "lengths"), ([(1, 1)], 1.0, "quantile")])
def test_impossible_questions_name_the_field(lengths: list[tuple[int, int]], quantile: float, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        most_sequences(CACHE, lengths, quantile=quantile)
