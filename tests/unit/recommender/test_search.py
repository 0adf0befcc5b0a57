"""The search: the cheapest feasible candidate first, a reason for each of the others, and floors that are said."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from enova_recommender.memory import fit
from enova_recommender.recommend.capacity import factor_of, predict
from enova_recommender.recommend.capacity_lengths import lengths_of
from enova_recommender.recommend.errors import RecommendError
from enova_recommender.recommend.search import most_assured, search
from enova_recommender.recommend.search_result import SearchResult
from enova_recommender.recommend.search_space import Pool, SearchSpace
from enova_recommender.recommend.types import Constraint, InventoryNode, Objectives, Workload
from enova_recommender.types import Batch, ModelShape, Parallelism
from enova_testing.advice import CHAT, SPREAD, STEP, gpu, model, nodes, times, workload
from enova_testing.full_batch import full_batch
from enova_testing.search_speed import evaluations, space_for

PROMISED = Objectives(ttft_s=1.0, tpot_s=0.03)
SMALL = SearchSpace(
    max_num_seqs=(256, 64, 8), max_num_batched_tokens=(8192, 2048), gpu_memory_utilizations=(0.92,),
    kv_cache_dtypes=("auto",),
)  # fmt: skip


def searched(
    inventory: list[InventoryNode] | None = None, *, rate: float = 30.0, promised: Objectives = PROMISED,
    space: SearchSpace = SMALL, shape: ModelShape | None = None,
    lengths: tuple[tuple[int, int], ...] = CHAT, assurance: float = 0.9, check_floor: bool = True,
) -> SearchResult:  # fmt: skip
    return search(
        shape or model(), nodes() if inventory is None else inventory, workload(rate=rate, lengths=lengths), promised,
        space=space, times_of=times, assurance=assurance, check_floor=check_floor,
    )  # fmt: skip


def test_every_candidate_has_figures_or_a_reason_why_not() -> None:
    found = searched([*nodes("H100"), *nodes("L4", price=0.7)])
    assert len(found) == len(found.groups) * len(found.settings)
    for index in range(len(found)):
        one = found.candidate(index)
        assert one.reason
        if one.constraint in {None, Constraint.COST}:
            assert one.prediction is not None
            assert math.isfinite(one.cost_per_hour)
            assert one.replicas >= 1
        else:
            assert math.isinf(one.cost_per_hour)


def test_feasible_candidates_come_by_rising_cost_and_the_first_is_best() -> None:
    found = searched([*nodes("H100"), *nodes("A100-80G", price=1.5)])
    costs = [one.cost_per_hour for one in found.feasible()]
    assert costs == sorted(costs)
    best = found.best
    assert best is not None
    assert best.constraint is None
    assert best.cost_per_hour == costs[0]
    assert next(iter(found.feasible())) == best


def test_the_best_keeps_the_objectives_at_the_bound_of_its_interval() -> None:
    best = searched().best
    assert best is not None
    assert best.prediction is not None
    assert best.prediction.ttft_s.high <= 1.0 * 1.05
    assert best.prediction.tpot_s.high <= 0.03 * 1.05
    assert best.replicas * best.prediction.capacity_rps.low >= 30.0 * 0.999


def test_no_candidate_does_with_fewer_replicas_than_were_told() -> None:
    for one in searched(rate=60.0).feasible():
        assert one.prediction is not None
        assert (one.replicas - 1) * one.prediction.capacity_rps.low < 60.0


def test_less_assurance_is_never_dearer() -> None:
    sure, bold = searched(assurance=0.95).best, searched(assurance=0.5).best
    assert sure is not None
    assert bold is not None
    assert bold.cost_per_hour <= sure.cost_per_hour


def test_the_search_says_what_predict_says() -> None:
    found = searched(rate=40.0)
    for index in range(0, len(found), 5):
        one = found.candidate(index)
        if one.prediction is None or not one.replicas:
            continue
        chosen = one.settings
        memory = fit(
            model(), chosen.gpu, parallelism=chosen.parallelism, precision=chosen.precision,
            gpu_memory_utilization=chosen.gpu_memory_utilization, max_num_seqs=chosen.max_num_seqs,
            max_num_batched_tokens=chosen.max_num_batched_tokens, max_model_len=chosen.max_model_len,
        )  # fmt: skip
        single = predict(
            chosen, workload(rate=40.0), PROMISED, times(model(), chosen.gpu, chosen.parallelism, chosen.precision),
            memory=memory, requests_per_s=40.0 / one.replicas,
        )  # fmt: skip
        # The search divides memory for the max_num_seqs of its space, the lowered one leaves a little more.
        assert 0.99 * single.kv_tokens <= one.prediction.kv_tokens <= single.kv_tokens
        assert one.prediction.tpot_s.value == pytest.approx(single.tpot_s.value, rel=0.03)
        assert one.prediction.ttft_s.value == pytest.approx(single.ttft_s.value, rel=0.10)
        assert one.prediction.capacity_rps.value == pytest.approx(single.capacity_rps.value, rel=0.05)


def test_no_candidate_of_the_front_is_worse_than_another_in_all() -> None:
    found = searched([*nodes("H100"), *nodes("A100-80G", price=1.5)])
    points = []
    for one in found.pareto():
        assert one.prediction is not None
        capacity = one.replicas * one.prediction.capacity_rps.value
        points.append((one.cost_per_hour, one.prediction.ttft_s.value, one.prediction.tpot_s.value, -capacity))
    assert points[0][0] == min(point[0] for point in points)
    for place, point in enumerate(points):
        rivals = points[:place] + points[place + 1 :]
        assert not any(all(a <= b for a, b in zip(rival, point, strict=True)) for rival in rivals)


def test_finalists_differ_in_layout() -> None:
    layouts = [(one.settings.gpu.name, one.settings.parallelism) for one in searched().finalists(10)]
    assert len(layouts) == len(set(layouts)) > 1


def test_a_model_that_does_not_fit_is_told_so_with_the_remedy() -> None:
    large = replace(model(), blocks=tuple(replace(block, count=block.count * 10) for block in model().blocks))
    found = searched(nodes("L4", gpus=1), shape=large, rate=0.1)
    assert found.best is None
    assert set(dict(found.rejected())) == {Constraint.MEMORY}
    assert "GiB" in found.candidate(0).reason


def test_a_tensor_parallel_size_that_heads_cannot_share_is_a_layout() -> None:
    found = searched(space=replace(SMALL, parallelisms=(Parallelism(tensor=3), Parallelism(tensor=16))))
    assert dict(found.rejected()) == {Constraint.LAYOUT: len(found)}
    assert "cannot be divided by 3" in found.candidate(0).reason
    assert "the largest has 8" in found.candidate(len(found) - 1).reason


def test_tensor_parallelism_stays_within_an_island() -> None:
    split = [replace(node, island_gpus=2) for node in nodes(count=1)]
    found = searched(split, space=replace(SMALL, parallelisms=(Parallelism(tensor=4),)))
    assert "leaves the island of 2" in found.candidate(0).reason


def test_a_gpu_without_fp8_takes_no_fp8_cache() -> None:
    old = [replace(node, gpu=replace(node.gpu, compute_capability=8.0)) for node in nodes()]
    found = searched(old, space=replace(SMALL, kv_cache_dtypes=("fp8",)))
    assert dict(found.rejected()) == {Constraint.PRECISION: len(found)}


def test_more_replicas_than_gpus_is_the_inventory() -> None:
    found = searched(nodes(count=1, gpus=1), rate=500.0)
    assert found.best is None
    assert Constraint.INVENTORY in dict(found.rejected())
    assert "room for 1" in found.candidate(0).reason


def test_rejections_count_every_loser_once() -> None:
    found = searched([*nodes("H100"), *nodes("L4", price=0.7)], rate=100.0)
    told = Counter(found.candidate(index).constraint for index in range(len(found)))
    told.pop(None, None)
    assert dict(found.rejected()) == dict(told)


def test_a_context_that_is_too_short_is_told() -> None:
    found = searched(space=replace(SMALL, max_model_lens=(512,)))
    assert dict(found.rejected()) == {Constraint.CONTEXT: len(found)}
    assert "max_model_len is 512" in found.candidate(0).reason


@pytest.mark.parametrize(("promised", "field"), [
    (Objectives(ttft_s=0.001), "objectives.ttft_s"), (Objectives(tpot_s=0.0005), "objectives.tpot_s"),
])  # fmt: skip
def test_an_objective_below_the_physical_floor_is_refused_with_the_floor(promised: Objectives, field: str) -> None:
    with pytest.raises(RecommendError, match="below the physical floor of") as caught:
        searched(promised=promised)
    assert caught.value.field == field


def test_what_runs_is_judged_even_where_the_floor_is_missed() -> None:
    found = searched(promised=Objectives(tpot_s=0.0005), check_floor=False)
    assert found.best is None
    assert found.candidate(0).constraint is Constraint.TPOT


def test_an_objective_just_above_the_floor_is_answered() -> None:
    with pytest.raises(RecommendError) as caught:
        searched(promised=Objectives(tpot_s=0.0005), rate=0.1, assurance=0.5)
    floor = float(caught.value.message.split("floor of ")[1].split(" s")[0])
    found = searched(promised=Objectives(tpot_s=floor * 1.01), rate=0.01, assurance=0.5)
    assert found.best is not None


@pytest.mark.parametrize(("inventory", "field"), [
    ([], "inventory"),
    ([replace(nodes()[0], gpus=0)], "inventory[0].gpus"),
    ([*nodes(), replace(nodes()[0], island_gpus=0)], "inventory[2].island_gpus"),
    (nodes(price=0.0), "inventory[0].gpu.price_per_hour"),
    ([replace(nodes()[0], gpu=replace(gpu(), price_per_hour=None))], "inventory[0].gpu.price_per_hour"),
])  # fmt: skip
def test_bad_inventories_name_their_field(inventory: list[InventoryNode], field: str) -> None:
    with pytest.raises(RecommendError) as caught:
        searched(inventory)
    assert caught.value.field == field


@pytest.mark.parametrize(("space", "field"), [
    (replace(SMALL, max_num_seqs=()), "space.max_num_seqs"),
    (replace(SMALL, max_num_seqs=(0,)), "space.max_num_seqs"),
    (replace(SMALL, gpu_memory_utilizations=(1.2,)), "space.gpu_memory_utilizations"),
    (replace(SMALL, max_num_seqs=(512,), max_num_batched_tokens=(256,)), "space.max_num_batched_tokens"),
])  # fmt: skip
def test_bad_spaces_name_their_field(space: SearchSpace, field: str) -> None:
    with pytest.raises(RecommendError) as caught:
        searched(space=space)
    assert caught.value.field == field


def test_requests_longer_than_the_model_takes_are_refused() -> None:
    with pytest.raises(RecommendError, match="takes") as caught:
        searched(lengths=((200_000, 10),))
    assert caught.value.field == "workload.lengths"


def test_names_change_nothing() -> None:
    other = [replace(node, gpu=replace(node.gpu, name="X1", driver_names=("X1",))) for node in nodes()]
    ours, theirs = searched().best, searched(other, shape=replace(model(), name="a/b")).best
    assert ours is not None
    assert theirs is not None
    assert ours.prediction == theirs.prediction


def test_room_counts_islands_and_nodes() -> None:
    kind = gpu()
    pool = Pool(gpu=kind, nodes=(
        InventoryNode(name="a", gpu=kind, gpus=8, island_gpus=4),
        InventoryNode(name="b", gpu=kind, gpus=3, island_gpus=4),
    ))  # fmt: skip
    assert pool.room(Parallelism(tensor=1)) == 11
    assert pool.room(Parallelism(tensor=2)) == 5
    assert pool.room(Parallelism(tensor=4)) == 2
    assert pool.room(Parallelism(tensor=4, pipeline=2)) == 1
    assert pool.room(Parallelism(tensor=8)) == 0


def test_workloads_are_not_changed() -> None:
    asked = Workload(requests_per_s=3.0, lengths=CHAT)
    found = search(model(), nodes(), asked, PROMISED, space=SMALL, times_of=times)
    assert found.workload is asked


def test_each_candidate_has_the_figures_of_its_own_settings() -> None:
    space = replace(SMALL, prefix_caching=(True, False), max_model_lens=(16384, 8192))
    asked = Workload(requests_per_s=3.0, lengths=CHAT, cached_prefix_share=0.6)
    found = search(model(), nodes(), asked, PROMISED, space=space, times_of=times)
    for index in range(len(found)):
        one = found.candidate(index)
        assert one.prediction is not None
        chosen = one.settings
        memory = fit(
            model(), chosen.gpu, parallelism=chosen.parallelism, gpu_memory_utilization=0.92,
            max_num_seqs=chosen.max_num_seqs, max_num_batched_tokens=chosen.max_num_batched_tokens,
            max_model_len=chosen.max_model_len, enable_prefix_caching=chosen.enable_prefix_caching,
        )  # fmt: skip
        single = predict(
            chosen, asked, PROMISED, times(model(), chosen.gpu, chosen.parallelism, chosen.precision), memory=memory,
            requests_per_s=3.0 / one.replicas,
        )  # fmt: skip
        assert one.prediction.ttft_s.value == pytest.approx(single.ttft_s.value, rel=0.05)
        assert 0.99 * single.kv_tokens <= one.prediction.kv_tokens <= single.kv_tokens


# -- max_num_seqs, and objectives that are hard to keep


def test_max_num_seqs_keeps_the_objective_in_a_batch_that_is_always_full() -> None:
    load = lengths_of(workload(lengths=CHAT), prefix_caching=False)
    asked = Objectives(tpot_s=0.02)
    guarded, free = (
        searched(promised=asked, space=replace(SMALL, max_num_seqs=(1024,), max_num_batched_tokens=(8192,),
                                               parallelisms=(Parallelism(),), is_guarded=is_guarded))
        for is_guarded in (True, False)
    )  # fmt: skip
    assert guarded.best is not None
    assert free.best is not None
    most = guarded.best.settings.max_num_seqs
    assert free.best.settings.max_num_seqs == 1024
    full = full_batch(STEP, load, sequences=most, max_num_batched_tokens=8192)
    assert full.mean_step_s * factor_of(SPREAD, 0.9) == pytest.approx(0.02, rel=0.06)
    # What it costs is little: open arrivals reach the objective's percentile before the batch is full.
    assert guarded.best.assured_rps > 0.9 * free.best.assured_rps


def test_without_an_objective_between_tokens_nothing_limits_max_num_seqs() -> None:
    best = searched(promised=Objectives(ttft_s=1.0), space=replace(SMALL, max_num_seqs=(256,))).best
    assert best is not None
    assert best.settings.max_num_seqs == 256


def test_an_objective_that_nothing_keeps_for_sure_is_kept_as_likely_as_may_be() -> None:
    alone = STEP.step_s(Batch(decode_sequences=1, context_tokens=600))

    def assured(tpot_s: float) -> SearchResult:
        space = replace(SMALL, parallelisms=(Parallelism(),))
        return most_assured(
            model(), nodes(), workload(rate=3.0, lengths=CHAT), Objectives(tpot_s=tpot_s), space=space, times_of=times,
            check_floor=False,
        )  # fmt: skip

    found = {scale: assured(scale * alone) for scale in (3.0, 1.12, 1.02, 0.5)}
    assert {scale: one.assurance for scale, one in found.items()} == {3.0: 0.9, 1.12: 0.75, 1.02: 0.5, 0.5: 0.9}
    assert [one.can_keep_objectives for one in found.values()] == [True, True, True, False]


# -- what the benchmark of speed counts


def test_work_is_counted_once_for_candidates_that_share_their_figures() -> None:
    layouts = replace(SMALL, parallelisms=(Parallelism(), Parallelism(tensor=3)))  # 3 divides no model's heads
    one, lens = (searched(space=replace(layouts, max_model_lens=values)) for values in ((16384,), (16384, 32768)))
    assert len(lens) == 2 * len(one)
    possible = [group for group in one.groups if group.found is not None]
    assert evaluations(lens) == evaluations(one) == len(possible) * len(one.settings)
    assert len(possible) < len(one.groups), "layouts that cannot be are no work"


def test_a_space_holds_no_configuration_twice() -> None:
    plain = workload(rate=30.0, lengths=CHAT)
    assert space_for(plain).prefix_caching == (True,)
    assert set(space_for(replace(plain, cached_prefix_share=0.3)).prefix_caching) == {True, False}
