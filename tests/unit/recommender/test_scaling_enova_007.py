"""The rules that ENOVA 0.0.7 was released with: every vector of the released functions, and each mended defect."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from enova_recommender.scaling import DEFAULT_POLICY, FORESEEING, POLICIES
from enova_recommender.scaling.bounds import Bounds, clamp
from enova_recommender.scaling.enova_007 import FAITHFUL, MENDED, Enova007
from enova_recommender.scaling.enova_007_model import GIB, cold_start, released_row
from enova_recommender.scaling.enova_007_window import aligned, usable
from enova_recommender.scaling.types import (
    Action,
    EngineSizes,
    Feature,
    GpuFacts,
    ModelFacts,
    Observation,
    Proposal,
    ReplicaSeries,
    Series,
    VerdictKind,
)

NOW_S = 1_000_000.0
LLAMA_7B = ModelFacts(
    framework="llama",
    size_billion=7,
    parameters=6_607_000_000,
    kv_elements_per_token=262144,
    attention_heads=32,
    context_tokens=4096,
)
GPUS_24G = GpuFacts(count=8, memory_bytes=24 * GIB)
SIZES = EngineSizes(tensor_parallel_size=1, gpu_memory_utilization=0.9, max_num_seqs=256)
BOTH = pytest.mark.parametrize("policy", [FAITHFUL, MENDED], ids=lambda policy: policy.name)


def minutes(value: float, *, count: int = 10, end_s: float = NOW_S) -> Series:
    """The same value in each of the last `count` minutes."""
    return Series(start_s=end_s - 60.0 * (count - 1), step_s=60.0, values=(value,) * count)


def replica(
    *, pending: float = 0, running: float = 0, kv: float = 0, new: float = 0, success: float = 0, end_s: float = NOW_S
) -> ReplicaSeries:
    figures = {
        Feature.PENDING: pending,
        Feature.RUNNING: running,
        Feature.KV_USAGE: kv,
        Feature.NEW: new,
        Feature.SUCCESS: success,
        Feature.ACTIVE: pending + running,
    }
    return ReplicaSeries(
        replica="deployments/d/replicas/r",
        series={feature: minutes(value, end_s=end_s) for feature, value in figures.items()},
    )


def observation(*series: ReplicaSeries, gpu: GpuFacts = GPUS_24G, model: ModelFacts = LLAMA_7B) -> Observation:
    return Observation(
        now_s=NOW_S, replicas=len(series), series=series, configuration=SIZES, model=model, gpu=gpu
    )


def with_hole(series: ReplicaSeries, feature: Feature, *, minutes_back: int) -> ReplicaSeries:
    values = list(series.series[feature].values)
    values[-1 - minutes_back] = math.nan
    holed = replace(series.series[feature], values=tuple(values))
    return replace(series, series=series.series | {feature: holed})


# Model, size: answers on 1x24, 2x24, 8x24, 1x80 and 8x80 GiB as max_num_seqs, tensor parallel, utilization.
COLD_START_TABLE: list[tuple[str, int, list[tuple[int, int, float] | None]]] = [
    ("llama", 7, [(256, 1, 0.9), (256, 1, 0.9), (256, 1, 0.9), (256, 1, 0.4), (256, 1, 0.4)]),
    ("llama", 13, [None, (128, 2, 0.7), (128, 2, 0.7), (128, 1, 0.5), (128, 1, 0.5)]),
    ("llama", 70, [None, None, None, None, (32, 4, 0.6)]),
    ("mistral", 7, [None, (256, 2, 0.6), (256, 2, 0.6), (256, 1, 0.4), (256, 1, 0.4)]),
    ("mixtral", 47, [None, None, (32, 8, 0.7), None, (32, 2, 0.9)]),
    ("chatglm", 6, [(256, 1, 0.8), (256, 1, 0.8), (256, 1, 0.8), (256, 1, 0.4), (256, 1, 0.4)]),
    ("qwen", 7, [None, (256, 2, 0.5), (256, 2, 0.5), (256, 1, 0.4), (256, 1, 0.4)]),
    ("qwen", 14, [None, (128, 2, 0.9), (128, 2, 0.9), (128, 1, 0.5), (128, 1, 0.5)]),
    ("baichuan", 13, [None, (128, 2, 0.9), (128, 2, 0.9), (128, 1, 0.5), (128, 1, 0.5)]),
]
COLUMNS = [(1, 24), (2, 24), (8, 24), (1, 80), (8, 80)]


@pytest.mark.parametrize(
    ("framework", "size", "gpus", "gib", "expected"),
    [
        (framework, size, gpus, gib, answers[column])
        for framework, size, answers in COLD_START_TABLE
        for column, (gpus, gib) in enumerate(COLUMNS)
    ],
)
def test_cold_start_gives_what_the_released_function_gave(
    framework: str, size: int, gpus: int, gib: int, expected: tuple[int, int, float] | None
) -> None:
    advice = cold_start(
        released_row(framework, size), GpuFacts(count=gpus, memory_bytes=gib * GIB), framework=framework
    )
    assert advice.replicas == 1
    if expected is None:
        assert advice.layout is None
    else:
        assert advice.layout is not None
        layout = advice.layout
        assert (advice.max_num_seqs, layout.tensor_parallel_size, layout.gpu_memory_utilization) == expected


@BOTH
@pytest.mark.parametrize(("load", "replicas"), [(2.0, 2), (5.3, 3)])
def test_full_batch_and_cache_scale_by_load_and_the_larger_cache(
    policy: Enova007, load: float, replicas: int
) -> None:
    proposal = policy.decide(observation(replica(pending=80, running=256, kv=100, new=load * 60, success=60)))
    assert proposal.verdict is VerdictKind.OVERLOADED
    assert proposal.recommended == EngineSizes(
        tensor_parallel_size=2, gpu_memory_utilization=0.6, max_num_seqs=256
    )
    assert (proposal.action, proposal.replicas) == (Action.SCALE_UP, replicas)


def test_a_full_cache_with_a_small_batch_gets_memory_instead_of_replicas() -> None:
    busy = observation(replica(pending=80, running=0.39 * 256, kv=95, new=120, success=60))
    faithful, mended = FAITHFUL.decide(busy), MENDED.decide(busy)
    wanted = EngineSizes(tensor_parallel_size=2, gpu_memory_utilization=0.9, max_num_seqs=256)
    assert faithful.recommended == mended.recommended == wanted
    assert faithful.replicas == mended.replicas == 1
    assert faithful.configuration == SIZES  # the release applied replicas only
    assert faithful.action is Action.KEEP
    assert mended.configuration.tensor_parallel_size == 2
    assert mended.action is Action.RECONFIGURE


@BOTH
@pytest.mark.parametrize(("current", "after"), [(2, 1), (3, 2), (4, 2)])
def test_idle_replicas_are_halved(policy: Enova007, current: int, after: int) -> None:
    proposal = policy.decide(observation(*[replica(kv=1, running=2)] * current))
    assert proposal.verdict is VerdictKind.UNDERUSED
    assert (proposal.action, proposal.replicas) == (Action.SCALE_DOWN, after)


@BOTH
def test_one_idle_replica_stays(policy: Enova007) -> None:
    proposal = policy.decide(observation(replica()))
    assert (proposal.verdict, proposal.action, proposal.replicas) == (VerdictKind.NORMAL, Action.KEEP, 1)


@BOTH
@pytest.mark.parametrize(("pending", "verdict"), [(49.9, VerdictKind.NORMAL), (50, VerdictKind.OVERLOADED)])
def test_fifty_pending_in_each_of_three_minutes_is_overload(
    policy: Enova007, pending: float, verdict: VerdictKind
) -> None:
    share = replica(pending=pending / 2, running=256, kv=95, new=60, success=60)
    assert policy.decide(observation(share, share)).verdict is verdict


@BOTH
def test_one_minute_below_fifty_is_no_overload(policy: Enova007) -> None:
    busy = replica(pending=90, running=256, kv=95, new=60, success=60)
    values = [*busy.series[Feature.PENDING].values[:-2], 49.0, 90.0]
    dip = replace(busy.series[Feature.PENDING], values=tuple(values))
    proposal = policy.decide(observation(replace(busy, series=busy.series | {Feature.PENDING: dip})))
    assert proposal.verdict is VerdictKind.NORMAL


@BOTH
@pytest.mark.parametrize(("kv", "running", "underused"), [(10, 25.6, True), (10.1, 25, False), (10, 25.7, False)])
def test_idle_means_ten_per_cent_of_cache_and_batch(
    policy: Enova007, kv: float, running: float, underused: bool
) -> None:
    verdict = policy.decide(observation(*[replica(kv=kv, running=running)] * 2)).verdict
    assert (verdict is VerdictKind.UNDERUSED) is underused


@BOTH
def test_figures_that_cannot_be_keep_the_configuration(policy: Enova007) -> None:
    proposal = policy.decide(observation(replica(pending=80, running=100, kv=50, new=90, success=30)))
    assert (proposal.verdict, proposal.action) == (VerdictKind.OVERLOADED, Action.KEEP)
    assert proposal.recommended is None


@BOTH
@pytest.mark.parametrize(("kv", "running"), [(90, 200), (50, 230.4), (90, 230.4)])
def test_the_very_edges_fall_in_the_last_branch(policy: Enova007, kv: float, running: float) -> None:
    edge = policy.decide(observation(replica(pending=80, running=running, kv=kv, new=120, success=60)))
    full = policy.decide(observation(replica(pending=80, running=256, kv=100, new=120, success=60)))
    assert (edge.recommended, edge.replicas) == (full.recommended, full.replicas)


@BOTH
def test_a_full_batch_with_cache_to_spare_shrinks_the_cache(policy: Enova007) -> None:
    gpu = GpuFacts(count=8, memory_bytes=80 * GIB)
    proposal = policy.decide(
        observation(replica(pending=80, running=256, kv=30, new=66, success=60), gpu=gpu)
    )
    # Need: 0.3 x (72 - 12.3) + 12.3 = 30.2 GiB of the 72 usable: half is the smallest share that holds it.
    assert proposal.recommended == EngineSizes(tensor_parallel_size=1, gpu_memory_utilization=0.5, max_num_seqs=256)
    # 59.7 / 27.7 GiB x 1.1 = 2.37 replicas.
    assert proposal.replicas == 3


@BOTH
def test_replicas_are_bound_by_the_gpus_there_are(policy: Enova007) -> None:
    gpu = GpuFacts(count=4, memory_bytes=24 * GIB)
    proposal = policy.decide(
        observation(replica(pending=80, running=256, kv=100, new=6000, success=60), gpu=gpu)
    )
    assert proposal.replicas == 2  # 4 GPUs, 2 a replica


def test_no_fit_swaps_the_two_values_as_released_and_not_when_mended() -> None:
    gpu = GpuFacts(count=1, memory_bytes=24 * GIB)
    busy = observation(replica(pending=80, running=256, kv=100, new=120, success=60), gpu=gpu)
    faithful, mended = FAITHFUL.decide(busy).recommended, MENDED.decide(busy).recommended
    assert faithful is not None
    assert mended is not None
    assert (faithful.tensor_parallel_size, faithful.gpu_memory_utilization) == (0, 1.0)
    assert (mended.tensor_parallel_size, mended.gpu_memory_utilization) == (1, 0.9)


def test_no_success_overflows_as_released_and_keeps_the_replicas_when_mended() -> None:
    stalled = observation(*[replica(pending=80, running=256, kv=100, new=60, success=0)] * 2)
    with pytest.raises(OverflowError):
        FAITHFUL.decide(stalled)
    proposal = MENDED.decide(stalled)
    assert (proposal.verdict, proposal.replicas) == (VerdictKind.OVERLOADED, 2)
    assert "no success" in proposal.reason


def test_a_gap_reads_as_idle_as_released_and_as_unknown_when_mended() -> None:
    calm = replica(kv=10, running=2)
    holed = with_hole(with_hole(calm, Feature.KV_USAGE, minutes_back=1), Feature.KV_USAGE, minutes_back=2)
    assert FAITHFUL.decide(observation(calm, calm)).action is Action.KEEP
    assert FAITHFUL.decide(observation(holed, holed)).action is Action.SCALE_DOWN
    proposal = MENDED.decide(observation(holed, holed))
    assert (proposal.verdict, proposal.action) == (VerdictKind.UNKNOWN, Action.KEEP)
    assert "gap" in proposal.reason


@pytest.mark.parametrize(("age_s", "verdict"), [(180, VerdictKind.UNDERUSED), (181, VerdictKind.UNKNOWN)])
def test_old_data_pass_for_present_as_released_and_mean_no_action_when_mended(
    age_s: float, verdict: VerdictKind
) -> None:
    seen = observation(*[replica(end_s=NOW_S - age_s)] * 2)
    assert FAITHFUL.decide(seen).action is Action.SCALE_DOWN
    assert MENDED.decide(seen).verdict is verdict


def test_a_replica_without_any_series_means_no_action() -> None:
    seen = observation(replica(pending=80, running=256, kv=100), ReplicaSeries(replica="r2", series={}))
    for policy in (FAITHFUL, MENDED):
        assert policy.decide(seen).action is Action.KEEP
    assert MENDED.decide(seen).verdict is VerdictKind.UNKNOWN


def test_the_mended_policy_counts_the_key_value_heads_of_the_model() -> None:
    """A 70B model with grouped-query attention: the release over-estimates its cache eight times."""
    gpu = GpuFacts(count=8, memory_bytes=80 * GIB)
    grouped = replace(LLAMA_7B, size_billion=70, parameters=70_000_000_000, kv_elements_per_token=163840)
    seen = observation(gpu=gpu, model=grouped)
    assert (FAITHFUL.row(seen).token_size, MENDED.row(seen).token_size) == (1310720, 163840)


@pytest.mark.parametrize(
    ("stamps", "answer"),
    [
        ([0, 60, 120, 180], False),           # too few
        ([0, 60, 120, 180, 240], True),
        ([0, 60, 120, 180, 240, 270], False),  # 4 of 5 gaps are equal: not more than 80 %
        ([0, 60, 120, 180, 240, 300, 330], True),
    ],
)
def test_a_series_needs_five_points_mostly_equally_spaced(stamps: list[float], answer: bool) -> None:
    assert usable(tuple((stamp, 1.0) for stamp in stamps)) is answer


def test_a_series_is_aligned_to_its_own_last_sample() -> None:
    grid = aligned(((0.0, 5.0), (120.0, 7.0), (150.0, 9.0), (240.0, 8.0)), hole=0.0)
    assert grid.tolist() == [0.0] * 25 + [5.0, 0.0, 7.0, 0.0, 8.0]


def _proposal(replicas: int) -> Proposal:
    return replace(MENDED.decide(observation(replica())), replicas=replicas)


@pytest.mark.parametrize(
    ("wanted", "low", "high", "given", "reason"),
    [
        (3, 1, 8, 3, ""),
        (9, 1, 8, 8, "max 8 allows no more"),
        (1, 2, 8, 2, "min 2 allows no less"),
        (0, 0, 8, 1, "min 0 holds 1"),
    ],
)
def test_bounds_clamp_and_say_so(wanted: int, low: int, high: int, given: int, reason: str) -> None:
    clamped = clamp(_proposal(wanted), Bounds(min_replicas=low, max_replicas=high))
    assert clamped.replicas == given
    assert reason in clamped.reason
    assert bool(reason) is bool(clamped.reason)


def test_what_looks_ahead_is_the_default_and_both_old_rules_stay() -> None:
    assert DEFAULT_POLICY in FORESEEING
    assert set(POLICIES) == {"enova-0.0.7-mended", "enova-0.0.7-faithful"}


@BOTH
def test_what_nobody_measured_is_no_evidence(policy: Enova007) -> None:
    assert policy.decide(observation(ReplicaSeries(replica="r", series={}))).evidence == ()
    measured = policy.decide(observation(replica(pending=1, running=2, kv=3)))
    assert {each.feature: each.value for each in measured.evidence} == {
        "pending_requests": 1, "gpu_kv_cache_usage": 3, "running_requests": 2,
    }  # fmt: skip


def test_a_gap_in_the_window_is_no_evidence() -> None:
    holed = replica(pending=1, running=2, kv=3)
    gap = Series(start_s=NOW_S - 540, step_s=60.0, values=(*(1.0,) * 8, math.nan, 1.0))
    holed = replace(holed, series={**holed.series, Feature.PENDING: gap})
    proposal = MENDED.decide(observation(holed))
    assert proposal.verdict is VerdictKind.UNKNOWN
    assert Feature.PENDING.value not in {each.feature for each in proposal.evidence}
