"""Capacity in closed form: limits that a person can compute, directions that must hold, errors that name fields."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from enova_recommender.memory import fit
from enova_recommender.performance import Affine, FirstTokenDelay
from enova_recommender.recommend.capacity import factor_of, predict, sequence_limits
from enova_recommender.recommend.capacity_curve import Looped, curve, load_grid, spreads_of
from enova_recommender.recommend.capacity_lengths import lengths_of
from enova_recommender.recommend.errors import RecommendError
from enova_recommender.recommend.types import Constraint, EngineSettings, Objectives, Prediction, Workload
from enova_testing.advice import (
    CHAT,
    CODE,
    FIXED,
    SPREAD,
    STEP,
    AffineTimes,
    gpu,
    lognormal_lengths,
    model,
    settings,
    workload,
)
from enova_testing.full_batch import full_batch

PROMISED = Objectives(ttft_s=1.0, tpot_s=0.03)
DELAY = FirstTokenDelay(seconds=0.02, decode_steps=5.0)


class DelayedTimes(AffineTimes):
    """Affine step times of a server whose first tokens take a while beside them."""

    first_token_delay = DELAY


def predicted(
    chosen: EngineSettings | None = None, asked: Workload | None = None, promised: Objectives = PROMISED
) -> Prediction:
    chosen = chosen or settings()
    memory = fit(
        model(), gpu(), max_num_seqs=chosen.max_num_seqs, max_num_batched_tokens=chosen.max_num_batched_tokens,
        max_model_len=chosen.max_model_len,
    )  # fmt: skip
    return predict(chosen, asked or workload(), promised, STEP, memory=memory)


def test_without_load_a_request_takes_its_own_steps_alone() -> None:
    found = predicted(asked=workload(rate=1e-4, lengths=FIXED))
    pairs = 1024 * 1025 / 2
    prefill = STEP.base_s + 1024 * STEP.prefill_token_s + pairs * STEP.prefill_pair_s
    decode = STEP.base_s + STEP.sequence_s + STEP.context_token_s * (1024 + 64)
    assert found.ttft_s.value == pytest.approx(prefill, rel=0.01)
    assert found.tpot_s.value == pytest.approx(decode, rel=0.01)


def test_a_first_token_waits_for_what_surrounds_the_steps() -> None:
    asked, chosen = workload(rate=1e-4, lengths=FIXED), settings()
    memory = fit(model(), gpu(), max_model_len=chosen.max_model_len)
    late = DelayedTimes(**{name: getattr(STEP, name) for name in Affine.__dataclass_fields__})
    plain, delayed = (predict(chosen, asked, PROMISED, times, memory=memory) for times in (STEP, late))
    decode = STEP.base_s + STEP.sequence_s + STEP.context_token_s * (1024 + 64)
    assert delayed.ttft_s.value - plain.ttft_s.value == pytest.approx(DELAY.seconds + 5 * decode, rel=0.02)
    assert delayed.tpot_s == plain.tpot_s
    assert Looped(times=late, spread=SPREAD).first_token_delay == DELAY
    assert Looped(times=STEP, spread=SPREAD).first_token_delay == FirstTokenDelay()


def test_a_first_token_that_is_late_by_itself_leaves_less_room_for_queues() -> None:
    tight = Objectives(ttft_s=0.12, tpot_s=1.0)
    memory = fit(model(), gpu(), max_model_len=16384)
    late = DelayedTimes(**{name: getattr(STEP, name) for name in Affine.__dataclass_fields__})
    chosen, asked = settings(max_num_seqs=1024), workload(lengths=CODE)
    plain, delayed = (predict(chosen, asked, tight, times, memory=memory) for times in (STEP, late))
    assert plain.binding is delayed.binding is Constraint.TTFT
    assert delayed.capacity_rps.value < 0.95 * plain.capacity_rps.value


def test_a_decoding_batch_obeys_littles_law() -> None:
    asked = workload(rate=4.0, lengths=((1, 1001),))  # prompts cost nothing to speak of
    found = predicted(asked=asked)
    n = found.mean_sequences
    step = STEP.base_s + (n + 1) * (STEP.sequence_s + STEP.context_token_s * 501.5)
    assert n == pytest.approx(4.0 * 1000 * step, rel=0.02)


def test_prompts_alone_saturate_at_their_service_rate() -> None:
    lengths = ((4096, 1),)
    found = predicted(asked=workload(lengths=lengths), promised=Objectives())
    service = STEP.base_s + 4096 * STEP.prefill_token_s + 4096 * 4097 / 2 * STEP.prefill_pair_s
    # two prompts fit into one step, so its fixed part is shared under load
    shared = service - STEP.base_s
    assert 0.93 / service < found.capacity_rps.value < 0.97 / shared
    assert found.binding is Constraint.COMPUTE


def test_too_few_slots_are_named_as_the_limit() -> None:
    few = predicted(settings(max_num_seqs=4))
    assert few.binding is Constraint.MAX_NUM_SEQS
    assert few.capacity_rps.value < predicted(settings(max_num_seqs=64)).capacity_rps.value


def test_too_few_blocks_are_named_as_the_limit() -> None:
    chosen = settings(max_num_seqs=256)
    memory = replace(fit(model(), gpu(), max_model_len=4096), kv_blocks=500)
    found = predict(chosen, workload(lengths=FIXED), Objectives(ttft_s=5.0), STEP, memory=memory)
    assert found.binding is Constraint.KV_CACHE


def test_a_tight_tpot_is_named_as_the_limit() -> None:
    found = predicted(settings(max_num_seqs=256), promised=Objectives(ttft_s=5.0, tpot_s=0.012))
    assert found.binding is Constraint.TPOT


def test_an_objective_that_an_idle_replica_misses_leaves_no_capacity() -> None:
    found = predicted(promised=Objectives(tpot_s=0.001))
    assert found.capacity_rps.value == 0
    assert found.binding is Constraint.TPOT


def test_beyond_saturation_the_first_token_never_comes() -> None:
    found = predicted(asked=workload(rate=1e4))
    assert math.isinf(found.ttft_s.value)
    assert math.isfinite(found.tpot_s.value)


@given(
    tpot=st.floats(0.012, 0.1), ttft=st.floats(0.1, 5), looser=st.floats(1.05, 3),
    seqs=st.sampled_from([8, 32, 128, 512]), cv=st.floats(0, 3),
)  # fmt: skip
def test_looser_objectives_never_lower_the_capacity(
    tpot: float, ttft: float, looser: float, seqs: int, cv: float
) -> None:
    chosen, asked = settings(max_num_seqs=seqs), workload(cv=cv)
    tight = predicted(chosen, asked, Objectives(ttft_s=ttft, tpot_s=tpot))
    loose = predicted(chosen, asked, Objectives(ttft_s=ttft * looser, tpot_s=tpot * looser))
    assert loose.capacity_rps.value >= tight.capacity_rps.value * (1 - 1e-9)


@given(rate=st.floats(0.1, 25), more=st.floats(1.01, 2), seqs=st.sampled_from([16, 64, 256]))
def test_more_load_never_makes_a_replica_faster(rate: float, more: float, seqs: int) -> None:
    chosen = settings(max_num_seqs=seqs)
    less, full = predicted(chosen, workload(rate=rate)), predicted(chosen, workload(rate=rate * more))
    assert full.tpot_s.value >= less.tpot_s.value * (1 - 1e-6)
    assert full.ttft_s.value >= less.ttft_s.value * (1 - 1e-6)
    assert full.mean_sequences >= less.mean_sequences * (1 - 1e-6)


@given(rate=st.floats(0.1, 40), lengths=st.sampled_from([CHAT, CODE, FIXED]))
def test_intervals_hold_their_value(rate: float, lengths: tuple[tuple[int, int], ...]) -> None:
    found = predicted(asked=workload(rate=rate, lengths=lengths))
    for interval in (found.ttft_s, found.tpot_s, found.capacity_rps):
        assert interval.low <= interval.value <= interval.high


def test_without_load_the_interval_is_that_of_the_step_model() -> None:
    found = predicted(asked=workload(rate=1e-4))
    assert found.tpot_s.high / found.tpot_s.value == pytest.approx(factor_of(SPREAD, 0.9), rel=0.01)
    assert found.tpot_s.low / found.tpot_s.value == pytest.approx(factor_of(SPREAD, 0.1), rel=0.01)


def test_a_cached_prefix_lowers_ttft_and_raises_capacity() -> None:
    cached = replace(workload(lengths=CODE), cached_prefix_share=0.8)
    on, off = predicted(asked=cached), predicted(settings(enable_prefix_caching=False), cached)
    assert on.ttft_s.value < off.ttft_s.value
    assert on.capacity_rps.value > off.capacity_rps.value


def test_bursts_lengthen_the_wait() -> None:
    smooth, bursty = (predicted(asked=workload(rate=8.0, lengths=CODE, cv=cv)) for cv in (0.2, 3.0))
    assert bursty.ttft_s.value > smooth.ttft_s.value


def test_step_times_asked_one_by_one_equal_those_asked_at_once() -> None:
    times = Looped(times=Affine(base_s=1.0, prefill_token_s=0.5, sequence_s=0.25), spread=0.1)
    assert times.steps_s([0, 2], 0, [[4], [8]], 0).tolist() == [[2.0, 3.0], [3.0, 4.0]]


def test_groups_of_lengths_keep_means_and_the_tail() -> None:
    pairs = lognormal_lengths(prompt=500, prompt_cv=1.5, output=200, output_cv=1.5, count=2000)
    found, prompts = lengths_of(workload(lengths=pairs), prefix_caching=False), np.array(pairs)[:, 0]
    assert found.prompt_tokens @ found.prompt_weights == pytest.approx(prompts.mean())
    assert found.prompt_weights.sum() == pytest.approx(1)
    assert found.prompt_tokens[-1] == pytest.approx(np.sort(prompts)[-20:].mean())


def test_fixed_lengths_are_one_group() -> None:
    found = lengths_of(workload(lengths=FIXED * 100), prefix_caching=False)
    assert found.prompt_tokens.tolist() == [1024]
    assert found.decode_steps.tolist() == [127]


# -- a batch that is always full


def test_a_full_batch_of_long_answers_steps_as_one_that_only_decodes() -> None:
    load = lengths_of(workload(lengths=((10, 10_001),)), prefix_caching=False)
    found = full_batch(STEP, load, sequences=100, max_num_batched_tokens=8192)
    decode = STEP.base_s + 100 * (STEP.sequence_s + STEP.context_token_s * (10 + 10_001 / 2))
    assert found.step_s.value == pytest.approx(decode)
    assert found.tokens_per_s == pytest.approx(100 / decode, rel=0.01)


def test_a_full_batch_of_long_prompts_is_paced_by_them() -> None:
    load = lengths_of(workload(lengths=((8000, 10),)), prefix_caching=False)
    found = full_batch(STEP, load, sequences=64, max_num_batched_tokens=2048)
    prompt_s = 8000 * STEP.prefill_token_s + 8000 * 8001 / 2 * STEP.prefill_pair_s
    assert found.requests_per_s < 1 / prompt_s
    assert found.mean_step_s > found.decode_s


class DoubtfulTimes(AffineTimes):
    """Affine step times of a host whose cost a sequence is not known."""

    def spreads(self, decode_sequences: npt.ArrayLike, context_tokens: npt.ArrayLike) -> npt.NDArray[np.float64]:
        del context_tokens
        return 0.1 + 0.001 * np.asarray(decode_sequences, dtype=np.float64)


DOUBTFUL = DoubtfulTimes(**{name: getattr(STEP, name) for name in Affine.__dataclass_fields__})


def limit_of(times: AffineTimes, asked: Workload, tpot_s: float, assurance: float) -> float:
    load = lengths_of(asked, prefix_caching=False)
    grid = load_grid(times, load, most_sequences=1024)
    behaviour = curve(times, load, np.array([8192.0]), grid, percentile=0.95, arrival_cv=1.0)
    return float(sequence_limits(behaviour, tpot_s, assurance)[0])


@given(
    prompt=st.integers(1, 3000), output=st.integers(50, 2000), tpot=st.floats(0.012, 0.1),
)  # fmt: skip
def test_a_batch_of_as_many_sequences_as_are_allowed_takes_the_objective(prompt: int, output: int, tpot: float) -> None:
    asked = workload(lengths=((prompt, output),))
    limit = limit_of(STEP, asked, tpot, 0.5)
    assume(5 < limit < 1000)
    load = lengths_of(asked, prefix_caching=False)
    found = full_batch(STEP, load, sequences=limit, max_num_batched_tokens=8192)
    assume(found.mean_step_s < 1.5 * found.decode_s)  # beyond that the two share prompts out over steps differently
    assert found.mean_step_s == pytest.approx(tpot, rel=0.03)


def test_the_surer_the_fewer_sequences_and_most_so_where_large_batches_are_doubtful() -> None:
    asked = workload(lengths=((200, 500),))
    plain, doubtful = (
        [limit_of(times, asked, 0.03, assurance) for assurance in (0.5, 0.75, 0.9)] for times in (STEP, DOUBTFUL)
    )
    assert sorted(plain, reverse=True) == plain
    assert plain[0] == pytest.approx(doubtful[0])
    assert doubtful[2] < plain[2]


def test_an_interval_is_as_wide_as_the_steps_of_its_batch_are_doubtful() -> None:
    chosen, memory = settings(max_num_seqs=1024), fit(model(), gpu(), max_num_seqs=1024, max_model_len=16384)
    light, heavy = (
        predict(chosen, workload(rate=rate, lengths=((10, 1000),)), PROMISED, DOUBTFUL, memory=memory)
        for rate in (0.01, 10.0)
    )
    assert light.tpot_s.high / light.tpot_s.value == pytest.approx(factor_of(0.1, 0.9), rel=0.02)
    assert heavy.mean_sequences > 50
    assert heavy.tpot_s.high / heavy.tpot_s.value > factor_of(0.15, 0.9)
    assert heavy.tpot_s.low < heavy.tpot_s.value
    assert spreads_of(STEP, np.array([1.0, 500.0]), np.array([100.0, 5e5])).tolist() == [SPREAD, SPREAD]


# -- bad input


@pytest.mark.parametrize(("asked", "promised", "field"), [
    (workload(rate=-1.0), PROMISED, "workload.requests_per_s"),
    (workload(rate=0.0), PROMISED, "workload.requests_per_s"),
    (workload(rate=math.nan), PROMISED, "workload.requests_per_s"),
    (workload(lengths=()), PROMISED, "workload.lengths"),
    (workload(lengths=((5, 5), (0, 5))), PROMISED, "workload.lengths[1]"),
    (workload(lengths=((5, 5),) * 5000), PROMISED, "workload.lengths"),
    (workload(cv=-0.1), PROMISED, "workload.arrival_cv"),
    (replace(workload(), cached_prefix_share=1.0), PROMISED, "workload.cached_prefix_share"),
    (workload(), Objectives(ttft_s=0.0), "objectives.ttft_s"),
    (workload(), Objectives(tpot_s=-0.1), "objectives.tpot_s"),
    (workload(), Objectives(percentile=95), "objectives.percentile"),
])  # fmt: skip
def test_bad_input_names_its_field(asked: Workload, promised: Objectives, field: str) -> None:
    with pytest.raises(RecommendError) as caught:
        predicted(asked=asked, promised=promised)
    assert caught.value.field == field
    assert str(caught.value).startswith(field)
