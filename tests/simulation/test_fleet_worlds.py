"""Worlds differ as they should, and tables say what step times say."""

from __future__ import annotations

import numpy as np
import pytest

from enova_recommender import catalog
from enova_recommender.performance import Affine, KernelTimes, Roofline
from enova_recommender.scaling.situation import Objective
from enova_recommender.types import Batch
from enova_simulator.cluster.capacity import believed, goodput
from enova_simulator.cluster.setup import SetupError
from enova_simulator.cluster.startups import Lognormal
from enova_simulator.cluster.tables import tabulated
from enova_simulator.cluster.worlds import LLAMA_8B, World, engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]     # the first of them compiles the engines
SEQUENCES, TOKENS = 64, 2048
BATCHES = [
    Batch(prefill_tokens=prompts, prefill_pairs=prompts * 300, decode_sequences=decode, context_tokens=decode * 700)
    for prompts in (0, 16, 300, 1500)
    for decode in (0, 1, 17, 60)
    if prompts + decode
]


def test_tables_of_affine_times_are_exact() -> None:
    times = Affine(base_s=0.01, prefill_token_s=6e-5, prefill_pair_s=4e-9, sequence_s=2.5e-4, context_token_s=8e-8)
    table = tabulated(times, max_num_seqs=SEQUENCES, max_num_batched_tokens=TOKENS)
    for batch in BATCHES:
        assert table.step_s(batch) == pytest.approx(times.step_s(batch), rel=1e-9)
    for steps in (1, 7, 400):
        wanted = times.decode_run_s(sequences=40, context_tokens=9000, steps=steps)
        assert table.decode_run_s(sequences=40, context_tokens=9000, steps=steps) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("kind", [KernelTimes, Roofline])
def test_tables_of_modelled_times_are_within_two_per_cent(kind: type[KernelTimes] | type[Roofline]) -> None:
    times = kind(catalog.models()[LLAMA_8B], catalog.gpus()["H100"])
    table = tabulated(times, max_num_seqs=SEQUENCES, max_num_batched_tokens=TOKENS)
    for batch in BATCHES:
        assert table.step_s(batch) == pytest.approx(times.step_s(batch), rel=0.02), batch


@pytest.mark.parametrize("steps", [1, 3, 50, 2000])
def test_a_run_of_steps_is_the_sum_of_its_steps(steps: int) -> None:
    times = KernelTimes(catalog.models()[LLAMA_8B], catalog.gpus()["H100"])
    table = tabulated(times, max_num_seqs=SEQUENCES, max_num_batched_tokens=TOKENS)
    single = sum(
        table.step_s(Batch(decode_sequences=33, context_tokens=5000 + 33 * step)) for step in range(steps)
    )
    assert table.decode_run_s(sequences=33, context_tokens=5000, steps=steps) == pytest.approx(single, rel=1e-9)


def test_matched_world_is_what_the_recommender_believes() -> None:
    one = engine(World.MATCHED, model=LLAMA_8B, gpu="H100")
    batch = Batch(decode_sequences=20, context_tokens=20_000)
    wanted = KernelTimes(catalog.models()[LLAMA_8B], catalog.gpus()["H100"]).step_s(batch)
    assert one.times.step_s(batch) == pytest.approx(wanted, rel=1e-3)
    assert one.replica_sigma == 0.0


def test_perturbed_world_errs_by_seed_and_keeps_its_error() -> None:
    batch = Batch(decode_sequences=20, context_tokens=20_000)

    def step_s(world: World, seed: int) -> float:
        return engine(world, model=LLAMA_8B, gpu="H100", seed=seed).times.step_s(batch)

    errors = [step_s(World.PERTURBED, seed) / step_s(World.MATCHED, seed) for seed in range(1000, 1012)]
    assert step_s(World.PERTURBED, 1000) == step_s(World.PERTURBED, 1000)
    assert 0.05 < np.std(np.log(errors)) < 0.3


def test_additive_world_holds_only_what_was_measured() -> None:
    assert engine(World.ADDITIVE, model=LLAMA_8B, gpu="A100-80G", tensor_parallel=2).gpus == 2
    with pytest.raises(SetupError, match=r"\(a\) has no"):
        engine(World.ADDITIVE, model=LLAMA_8B, gpu="H100")


@pytest.mark.parametrize(("model", "gpu"), [("nobody/knows", "H100"), (LLAMA_8B, "H9000")])
def test_unknown_models_and_gpus_are_refused(model: str, gpu: str) -> None:
    with pytest.raises(SetupError, match="is not in the catalogue"):
        engine(World.MATCHED, model=model, gpu=gpu)


def test_replicas_together_carry_no_less_each_than_one_alone() -> None:
    one = engine(World.MATCHED, model=LLAMA_8B, gpu="L40S")
    mix, objective = [(400, 80), (1200, 200), (100, 20)], Objective(ttft_s=1.0, tpot_s=0.05)
    alone = goodput(one, mix, objective, seed=1, requests=600)
    together = goodput(one, mix, objective, seed=1, requests=600, replicas=3)
    assert 0 < alone <= together * 1.02
    assert 0.3 < believed(one, mix, objective).requests_per_s.value / alone < 3.0


def test_starts_are_drawn_by_number_around_their_median() -> None:
    starts = Lognormal(median_s=100.0, seed=3, never=frozenset({5}))
    drawn = [starts.seconds(number) for number in range(200) if number != 5]
    assert starts.seconds(5) == float("inf")
    assert starts.seconds(17) == starts.seconds(17)
    assert np.median(drawn) == pytest.approx(100.0, rel=0.1)
    assert np.quantile(drawn, 0.9) == pytest.approx(starts.prior().p90_s, rel=0.15)
