"""Whatever the batch, step times from kernels grow with each part of it, and runs are the sums of their steps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enova_recommender import catalog
from enova_recommender.performance import KernelTimes
from enova_recommender.types import Batch, Parallelism, Precision
from enova_testing.examples import examples

GPUS, MODELS = catalog.gpus(), catalog.models()
TIMES = (
    KernelTimes(MODELS["meta-llama/Llama-3.1-8B-Instruct"], GPUS["A100-80G"]),
    KernelTimes(MODELS["meta-llama/Llama-3.1-70B-Instruct"], GPUS["L40S"], parallelism=Parallelism(tensor=4),
                precision=Precision(quantization="fp8")),
    KernelTimes(MODELS["openai/gpt-oss-120b"], GPUS["H100"]),
    KernelTimes(MODELS["deepseek-ai/DeepSeek-R1"], GPUS["B200"], parallelism=Parallelism(tensor=8, expert=True)),
    KernelTimes(MODELS["Qwen/Qwen3.5-397B-A17B"], GPUS["H200"], parallelism=Parallelism(tensor=8),
                precision=Precision(quantization="fp8")),
)
times = st.sampled_from(TIMES)
counts = st.integers(0, 600)
lengths = st.integers(1, 60_000)


def batch_of(prompts: int, mean: int, sequences: int, context: int) -> Batch:
    return Batch(
        prefill_tokens=prompts, prefill_pairs=prompts * mean, decode_sequences=sequences,
        context_tokens=sequences * context,
    )  # fmt: skip


batches = st.builds(batch_of, st.integers(0, 16_384), lengths, counts, lengths)


@examples()
@given(times, batches, st.integers(1, 2_000))
def test_no_part_of_a_batch_is_free(one: KernelTimes, batch: Batch, more: int) -> None:
    prompts, sequences = batch.prefill_tokens, batch.decode_sequences
    least = one.step_s(batch)
    assert least > 0
    assert one.step_s(replace(batch, prefill_tokens=prompts + more)) >= least * (1 - 1e-12)
    assert one.step_s(replace(batch, decode_sequences=sequences + more)) >= least * (1 - 1e-12)
    if prompts:
        assert one.step_s(replace(batch, prefill_pairs=batch.prefill_pairs + more)) >= least * (1 - 1e-12)
    if sequences:
        assert one.step_s(replace(batch, context_tokens=batch.context_tokens + more)) >= least * (1 - 1e-12)


@examples()
@given(times, st.integers(1, 600), lengths, st.integers(1, 600))
def test_runs_are_sums_of_their_steps(one: KernelTimes, sequences: int, context: int, steps: int) -> None:
    first = sequences * context
    single = math.fsum(
        one.step_s(Batch(decode_sequences=sequences, context_tokens=first + step * sequences)) for step in range(steps)
    )
    run = one.decode_run_s(sequences=sequences, context_tokens=first, steps=steps)
    assert run == pytest.approx(single, rel=1e-11)


@examples()
@given(times, batches)
def test_arrays_say_the_same_as_single_steps(one: KernelTimes, batch: Batch) -> None:
    found = one.steps_s(batch.prefill_tokens, batch.prefill_pairs, batch.decode_sequences, batch.context_tokens)
    assert float(found) == pytest.approx(one.step_s(batch), rel=1e-12)
    assert sum(one.shares(batch).values()) == pytest.approx(one.step_s(batch), rel=1e-12)
