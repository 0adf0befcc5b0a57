"""Whatever is asked, advice moves the way that physics and promises say, and names change nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from enova_recommender import catalog
from enova_recommender.memory import fit, gpu_weight_bytes, kv_bytes_per_token
from enova_recommender.performance import GROUPS, Correction, KernelTimes
from enova_recommender.recommend.capacity_curve import curve, load_grid
from enova_recommender.recommend.capacity_lengths import lengths_of
from enova_recommender.recommend.search import most_assured, search
from enova_recommender.recommend.search_result import SearchResult
from enova_recommender.recommend.search_space import SearchSpace
from enova_recommender.recommend.types import InventoryNode, Objectives, Workload
from enova_recommender.types import Batch, GpuModel, ModelShape, Parallelism
from enova_testing.examples import examples

MODELS = {name: catalog.models()[name] for name in (
    "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-70B-Instruct", "openai/gpt-oss-20b",
    "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3", "nvidia/NVIDIA-Nemotron-Nano-9B-v2",
)}  # fmt: skip
GPUS = tuple(catalog.gpus()[name] for name in ("H100", "H200", "B200", "A100-80G", "L40S"))
TENSORS = (1, 2, 4, 8)
SPACE = SearchSpace(
    parallelisms=(Parallelism(), Parallelism(tensor=2), Parallelism(tensor=4)), max_num_seqs=(256, 32),
    max_num_batched_tokens=(8192,), gpu_memory_utilizations=(0.92,), kv_cache_dtypes=("auto",),
)  # fmt: skip
# The same max_num_seqs whatever the objective: a lower one can carry more where prompts are long, since requests then
# wait for slots and do not slow those that decode.
AS_GIVEN = replace(SPACE, is_guarded=False)
shapes, gpus = st.sampled_from(sorted(MODELS)).map(MODELS.__getitem__), st.sampled_from(GPUS)
factors = st.tuples(*(st.floats(0.3, 6.0) for _ in GROUPS))
workloads = st.builds(
    lambda rate, prompt, output: Workload(requests_per_s=rate, lengths=((prompt, output), (2 * prompt, output // 2))),
    st.floats(0.5, 200.0), st.integers(20, 4000), st.integers(20, 1000),
)  # fmt: skip
Search = tuple[ModelShape, GpuModel, Workload, Objectives]
searches = st.tuples(shapes, gpus, workloads, st.builds(
    Objectives, ttft_s=st.floats(0.3, 5.0), tpot_s=st.floats(0.008, 0.15), percentile=st.sampled_from((0.5, 0.95)),
))  # fmt: skip


def searched(
    asked: Search, *, nodes: int = 4, assurance: float = 0.9, objectives: Objectives | None = None,
    space: SearchSpace = SPACE,
) -> SearchResult:  # fmt: skip
    shape, gpu, workload, promised = asked
    kind = replace(gpu, price_per_hour=2.0)
    inventory = [InventoryNode(name=f"n{index}", gpu=kind, gpus=8, island_gpus=8) for index in range(nodes)]
    return search(
        shape, inventory, workload, objectives or promised, space=space, assurance=assurance, check_floor=False
    )


def assured(found: SearchResult) -> npt.NDArray[np.float64]:
    """What each candidate carries with the wanted chance."""
    return np.concatenate([group.found.assured_rps for group in found.groups if group.found is not None])


@examples(40)
@given(shape=shapes, gpu=gpus, taught=factors, sequences=st.integers(1, 2000), more=st.integers(1, 500),
       context=st.integers(1, 8000))  # fmt: skip
def test_more_sequences_never_shorten_a_step_whatever_was_learnt(
    *, shape: ModelShape, gpu: GpuModel, taught: tuple[float, ...], sequences: int, more: int, context: int
) -> None:
    times = KernelTimes(shape, gpu, parallelism=Parallelism(tensor=4), correction=Correction.of(taught))
    steps = [
        times.step_s(Batch(decode_sequences=count, context_tokens=count * context))
        for count in (sequences, sequences + more)
    ]
    assert steps[1] >= steps[0] * (1 - 1e-12)


@examples(40)
@given(shape=shapes, gpu=gpus, sequences=st.integers(1, 1000), context=st.integers(10, 4000))
def test_what_is_not_known_is_never_less_than_what_kernels_are_not(
    shape: ModelShape, gpu: GpuModel, sequences: int, context: int
) -> None:
    spreads = KernelTimes(shape, gpu).spreads(np.array([1.0, sequences]), np.array([context, sequences * context]))
    assert np.all(spreads > 0.1)
    assert np.all(np.isfinite(spreads))


@given(shape=shapes, sizes=st.tuples(st.sampled_from(TENSORS), st.sampled_from(TENSORS)))
def test_a_wider_cut_never_adds_memory_on_a_gpu(shape: ModelShape, sizes: tuple[int, int]) -> None:
    few, many = sorted(sizes)
    held = [gpu_weight_bytes(shape, parallelism=Parallelism(tensor=size)) for size in (few, many)]
    assert held[1] <= held[0]
    kept = [kv_bytes_per_token(shape, tensor_parallel=size) for size in (few, many)]
    assert kept[1] <= kept[0]


@examples(30)
@given(shape=shapes, gpu=gpus, sizes=st.tuples(st.sampled_from(TENSORS), st.sampled_from(TENSORS)))
def test_a_wider_cut_never_leaves_fewer_tokens_in_the_cache(
    shape: ModelShape, gpu: GpuModel, sizes: tuple[int, int]
) -> None:
    few, many = (fit(shape, gpu, parallelism=Parallelism(tensor=size), max_model_len=8192) for size in sorted(sizes))
    assume(few.fits)
    assert many.fits
    assert many.kv_tokens >= few.kv_tokens


@examples(25)
@given(asked=searches, looser=st.floats(1.05, 3.0))
def test_looser_objectives_never_make_it_dearer(asked: Search, looser: float) -> None:
    tight, promised = searched(asked, space=AS_GIVEN), asked[3]
    assert promised.ttft_s is not None
    assert promised.tpot_s is not None
    easier = replace(promised, ttft_s=promised.ttft_s * looser, tpot_s=promised.tpot_s * looser)
    loose = searched(asked, objectives=easier, space=AS_GIVEN)
    if tight.best is not None:
        assert loose.best is not None
        assert loose.best.cost_per_hour <= tight.best.cost_per_hour
    assert np.all(assured(loose) >= assured(tight) * (1 - 0.02))


@examples(25)
@given(asked=searches)
def test_the_surer_the_less_is_counted_on(asked: Search) -> None:
    bold, usual, sure = (assured(searched(asked, assurance=chance, space=AS_GIVEN)) for chance in (0.5, 0.9, 0.97))
    assert np.all(usual <= bold * (1 + 1e-9))
    assert np.all(sure <= usual * (1 + 1e-9))


@examples(25)
@given(asked=searches, more=st.floats(1.1, 4.0))
def test_more_requests_never_cost_less(asked: Search, more: float) -> None:
    shape, gpu, workload, promised = asked
    few = searched(asked, nodes=40)
    many = searched((shape, gpu, replace(workload, requests_per_s=workload.requests_per_s * more), promised), nodes=40)
    if many.best is not None:
        assert few.best is not None
        assert few.best.cost_per_hour <= many.best.cost_per_hour


@examples(25)
@given(asked=searches)
def test_names_of_model_and_gpu_change_no_prediction(asked: Search) -> None:
    shape, gpu, workload, promised = asked
    renamed = (replace(shape, name="x/y"), replace(gpu, name="Z1", driver_names=("Z1",)), workload, promised)
    ours, theirs = searched(asked), searched(renamed)
    assert [group.codes.tolist() for group in ours.groups] == [group.codes.tolist() for group in theirs.groups]
    assert assured(ours).tolist() == assured(theirs).tolist()
    for one, other in zip(ours.feasible(), theirs.feasible(), strict=True):
        assert one.prediction == other.prediction
        assert replace(one.settings, gpu=gpu) == replace(other.settings, gpu=gpu)


@examples(15)
@given(asked=searches)
def test_max_num_seqs_is_kept_by_a_full_batch_with_the_chance_that_is_told(asked: Search) -> None:
    shape, gpu, workload, promised = asked
    kind = replace(gpu, price_per_hour=2.0)
    inventory = [InventoryNode(name="n", gpu=kind, gpus=8, island_gpus=8)]
    found = most_assured(shape, inventory, workload, promised, space=SPACE, check_floor=False)
    best = found.best
    assume(best is not None and best.settings.max_num_seqs > 1)
    assert best is not None
    assert promised.tpot_s is not None
    times = KernelTimes(shape, gpu, parallelism=best.settings.parallelism)
    load = lengths_of(workload, prefix_caching=True)
    grid = load_grid(times, load, most_sequences=256)
    behaviour = curve(times, load, np.array([8192.0]), grid, percentile=promised.percentile, arrival_cv=1.0)
    full = best.settings.max_num_seqs - 1  # that one sequence meets
    deviations = {0.9: 1.2816, 0.75: 0.6745, 0.5: 0.0}[found.assurance]
    slow = behaviour.mean_tpot_s[0] * np.exp(deviations * behaviour.spreads)
    assert float(np.interp(full, grid, slow)) <= promised.tpot_s * (1 + 0.01)


def test_the_models_here_are_of_all_kinds() -> None:
    kinds = {type(block.mixer).__name__ for shape in MODELS.values() for block in shape.blocks}
    assert {"Attention", "LatentAttention", "Recurrence"} <= kinds
    with pytest.raises(ValueError, match="unpack"):
        Correction.of((1.0,) * (len(GROUPS) - 1))
