"""The closed form against the real scheduler in virtual time: both say the same of a replica, within a tolerance."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from enova_recommender.memory import fit
from enova_recommender.performance import KernelTimes, StepTimes
from enova_recommender.recommend.capacity import predict
from enova_recommender.recommend.capacity_curve import Looped
from enova_recommender.recommend.types import Objectives
from enova_recommender.recommend.verify import measure, verify
from enova_recommender.types import Batch, Parallelism
from enova_testing.advice import CHAT, CODE, FIXED, REASONING, STEP, gpu, model, settings, workload

OBJECTIVES = Objectives(ttft_s=1.0, tpot_s=0.03, percentile=0.95)
LOADS = (0.3, 0.6, 0.85)   # of the capacity
SEEDS = (1, 2)
REQUESTS = 800

Lengths = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Undelayed:
    """Other step times, which do not know what first tokens take beside steps."""

    times: StepTimes

    def step_s(self, batch: Batch) -> float:
        return self.times.step_s(batch)

    def decode_run_s(self, *, sequences: int, context_tokens: int, steps: int) -> float:
        return self.times.decode_run_s(sequences=sequences, context_tokens=context_tokens, steps=steps)


@dataclass(frozen=True)
class Difference:
    """Relative errors of the closed form."""

    ttft: float
    tpot: float


def differences(lengths: Lengths, max_num_seqs: int, batched_tokens: int) -> list[Difference]:
    """Errors of one configuration at several loads."""
    chosen, times = settings(max_num_seqs=max_num_seqs, max_num_batched_tokens=batched_tokens), STEP
    memory = fit(model(), gpu(), max_num_seqs=max_num_seqs, max_num_batched_tokens=batched_tokens, max_model_len=16384)
    asked = workload(lengths=lengths)
    capacity = predict(chosen, asked, OBJECTIVES, times, memory=memory).capacity_rps.value
    found = []
    for load in LOADS:
        said = predict(chosen, asked, OBJECTIVES, times, memory=memory, requests_per_s=load * capacity)
        runs = [
            measure(chosen, asked, times, memory=memory, requests_per_s=load * capacity, percentile=0.95, seed=seed,
                    held_s=said.mean_sequences / said.requests_per_s, requests=REQUESTS)
            for seed in SEEDS
        ]  # fmt: skip
        ttft, tpot = (sum(getattr(run, name) for run in runs) / len(runs) for name in ("ttft_s", "tpot_s"))
        found.append(Difference(ttft=abs(said.ttft_s.value / ttft - 1), tpot=abs(said.tpot_s.value / tpot - 1)))
    return found


@pytest.mark.slow
def test_closed_form_and_scheduler_agree_on_latencies() -> None:
    grid = itertools.product((CHAT, CODE, FIXED, REASONING), (16, 64, 256), (2048, 8192))
    found = [one for lengths, seqs, tokens in grid for one in differences(lengths, seqs, tokens)]
    ttft = np.quantile([one.ttft for one in found], [0.5, 0.9])
    tpot = np.quantile([one.tpot for one in found], [0.5, 0.9])
    print(f"{len(found)} cases: TTFT p50 {ttft[0]:.3f} p90 {ttft[1]:.3f}, TPOT p50 {tpot[0]:.3f} p90 {tpot[1]:.3f}")
    assert tpot[0] < 0.05
    assert tpot[1] < 0.12
    assert ttft[0] < 0.10
    assert ttft[1] < 0.30


@pytest.mark.slow
@pytest.mark.parametrize(("lengths", "seqs"), [(CHAT, 32), (CHAT, 256), (CODE, 64), (FIXED, 64), (REASONING, 32)])
def test_closed_form_and_scheduler_agree_on_capacity(lengths: Lengths, seqs: int) -> None:
    chosen, times, asked = settings(max_num_seqs=seqs), STEP, workload(lengths=lengths, rate=0.5)
    memory = fit(model(), gpu(), max_num_seqs=seqs, max_model_len=16384)
    said = predict(chosen, asked, OBJECTIVES, times, memory=memory)
    found = verify(chosen, asked, OBJECTIVES, times, predicted=said, memory=memory, seed=3)
    error = said.capacity_rps.value / found.capacity_rps.value - 1
    print(f"closed form {said.capacity_rps.value:.3f}, measured {found.capacity_rps.value:.3f}: {error:+.3f}")
    assert abs(error) < 0.2


def test_closed_form_and_scheduler_agree_on_the_delay_of_first_tokens() -> None:
    chosen, asked = settings(max_num_seqs=64), workload(lengths=CHAT, rate=2.0)
    memory = fit(model(), gpu(), max_num_seqs=64, max_model_len=16384)
    late = KernelTimes(model(), gpu())
    prompt = Looped(times=Undelayed(late), spread=late.spread)

    def measured(times: StepTimes) -> float:
        found = measure(chosen, asked, times, memory=memory, requests_per_s=2.0, percentile=0.95, seed=1, requests=200)
        return found.ttft_s

    said = [predict(chosen, asked, OBJECTIVES, times, memory=memory).ttft_s.value for times in (late, prompt)]
    found = [measured(late), measured(prompt)]
    assert said[0] - said[1] > 4 * late.step_s(Batch(decode_sequences=1, context_tokens=1))
    assert said[0] - said[1] == pytest.approx(found[0] - found[1], rel=0.05)
    assert said[0] == pytest.approx(found[0], rel=0.2)


def test_lanes_of_a_pipeline_share_the_rate() -> None:
    asked, times = workload(lengths=CHAT, rate=4.0), STEP
    memory = fit(model(), gpu(), max_model_len=16384)
    piped = settings(max_num_seqs=64, parallelism=Parallelism(pipeline=2))
    plain = settings(max_num_seqs=32)
    two = predict(piped, asked, OBJECTIVES, times, memory=memory)
    one = predict(plain, workload(lengths=CHAT, rate=2.0), OBJECTIVES, times, memory=memory)
    assert two.tpot_s.value == pytest.approx(one.tpot_s.value, rel=0.01)
    assert two.mean_sequences == pytest.approx(2 * one.mean_sequences, rel=0.01)
