"""What speaks for a cause and what does not: rules of live detection, each on frames or steps made for it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from enova_recommender.detection.causes import DESTRUCTIVE, RULES, Cause, SuggestedAction
from enova_recommender.detection.evidence import Signals
from enova_recommender.detection.features import COLUMN, Feature, FeatureStep
from enova_recommender.detection.folding import engine_of
from enova_recommender.detection.observation import Placement, SketchCounts
from enova_recommender.detection.percentiles import bucket_share_above, sketch_share_above
from enova_recommender.detection.progress import Progress
from enova_recommender.detection.residual import Slowness
from enova_recommender.detection.verdicts import Judge, Judgement
from enova_recommender.types import VerdictKind
from enova_testing.serving_world import LIMITS, Watching, cluster, kinds, watching

ONE = "replica-0"
STEP_S = 5.0


def judged(
    judge: Judge, number: int, placement: Placement, *, burn: float = math.nan, **figures: float
) -> Judgement:
    """One step of one replica that works, with these figures besides."""
    values = np.full((1, len(COLUMN)), np.nan, dtype=np.float32)
    for name, value in {"age_s": 1.0, "ready": 1.0, "running": 4.0, "waiting": 0.0, "held": 4.0, **figures}.items():
        values[0, COLUMN[Feature(name)]] = value
    step = FeatureStep(number=number, end_s=(number + 1) * STEP_S, replicas=(ONE,), values=values)
    nothing = np.full(1, math.nan)
    signals = Signals(
        progress=np.array([Progress.BUSY], dtype=np.int8), stalled_s=np.zeros(1),
        slowness=Slowness(ratio=nothing, threshold=nothing + 1.3, alarm=np.zeros(1, bool)),
        peers=nothing, batch_gain=nothing, strain=np.zeros(1, bool), burn=np.full(1, burn), rarity=nothing,
    )  # fmt: skip
    return judge.update(step, signals, {ONE: placement}, step_s=STEP_S)


def placement(**more: float) -> Placement:
    return replace(Placement(replica=ONE, deployment="chat", variant="chat-1", nodes=("node",)), **more)  # type: ignore[arg-type]


def told(judge: Judge, steps: range, where: Placement, **figures: float) -> list[VerdictKind]:
    return [judged(judge, number, where, **figures).kind(ONE) for number in steps]


def test_a_limit_that_cuts_as_many_as_it_is_meant_to_is_normal_from_the_first_step_on() -> None:
    judge, where = Judge(series=1), placement(cut_share=0.05)
    assert set(told(judge, range(100), where, engine_finished=2.0, cut_by_length=0.1)) == {VerdictKind.NORMAL}


def test_a_limit_that_cuts_far_more_than_it_is_meant_to_is_a_misconfiguration() -> None:
    judge, where = Judge(series=1), placement(cut_share=0.05)
    told(judge, range(60), where, engine_finished=2.0, cut_by_length=0.1)
    assert told(judge, range(60, 200), where, engine_finished=2.0, cut_by_length=1.0)[-1] is VerdictKind.MISCONFIGURED
    verdict = judged(judge, 200, where, engine_finished=2.0, cut_by_length=1.0).verdicts[ONE]
    assert verdict.cause is Cause.CUT
    assert verdict.contributions[0].value > verdict.contributions[0].threshold


def test_a_limit_that_nobody_states_is_never_judged() -> None:
    judge = Judge(series=1)
    found = told(judge, range(100), placement(), engine_finished=2.0, cut_by_length=2.0)
    assert set(found) == {VerdictKind.NORMAL}


def test_a_queue_before_an_engine_with_room_is_a_misconfiguration_and_no_overload() -> None:
    judge, where = Judge(series=1), placement(max_num_seqs=64.0, max_num_batched_tokens=2048.0)
    found = told(
        judge, range(10), where, waiting=20.0, held=24.0, kv_cache_usage=0.1, prompt_tokens=900.0, decode_tokens=100.0,
        iterations=10.0,
    )  # fmt: skip
    assert found[-1] is VerdictKind.MISCONFIGURED
    assert VerdictKind.OVERLOADED not in found


def test_a_queue_before_steps_that_are_full_of_prompts_is_an_overload() -> None:
    judge, where = Judge(series=1), placement(max_num_seqs=64.0, max_num_batched_tokens=2048.0)
    found = told(
        judge, range(10), where, waiting=20.0, held=24.0, kv_cache_usage=0.1, prompt_tokens=20_000.0,
        decode_tokens=100.0, iterations=10.0,
    )  # fmt: skip
    assert found[-1] is VerdictKind.OVERLOADED


def test_requests_that_fail_make_their_replica_degraded() -> None:
    detector = watching(cluster())
    detector.until(150.0)
    detector.world.engines[0].failing = 0.6
    steps = detector.until(190.0)
    assert kinds(steps, ONE) == ["NORMAL", "DEGRADED"]
    assert steps[-1].judgement.verdicts[ONE].cause is Cause.FAILING


def test_requests_that_a_restart_failed_are_not_held_against_the_next_process() -> None:
    detector = watching(cluster())
    detector.until(150.0)
    detector.world.engines[0].restart(after_s=12.0)
    assert kinds(detector.until(240.0), ONE) == ["NORMAL"]


def test_a_crash_loop_is_over_when_it_was_calm_for_longer_than_between_its_restarts() -> None:
    detector = watching(cluster())
    detector.until(150.0)

    def crash(now_s: float) -> None:
        if now_s % 25 == 0:
            detector.world.engines[0].restart(after_s=5.0)

    assert kinds(detector.until(250.0, each=crash), ONE)[-1] == "DEGRADED"
    assert kinds(detector.until(330.0), ONE) == ["DEGRADED", "NORMAL"]


def late(detector: Watching, *, tpot_p95_s: float) -> None:
    detector.watch.place([
        replace(each.placement(), ttft_p95_s=2.0, tpot_p95_s=tpot_p95_s) for each in detector.world.engines
    ])  # fmt: skip


@pytest.mark.parametrize(("tpot_p95_s", "is_late"), [(0.016, True), (0.2, False)])
def test_a_batch_without_a_queue_is_an_overload_only_where_it_misses_its_objective(
    tpot_p95_s: float, is_late: bool
) -> None:
    detector = watching(cluster(limits=replace(LIMITS, max_num_seqs=26)))
    late(detector, tpot_p95_s=tpot_p95_s)
    detector.until(100.0)
    detector.world.engines[0].rate_rps = 6.5
    steps = detector.until(500.0)
    assert ("OVERLOADED" in kinds(steps, ONE)) == is_late


def test_a_slow_replica_is_replaced_only_after_a_minute() -> None:
    detector = watching(cluster())
    detector.until(150.0)
    detector.world.engines[0].slow(1.8)
    verdicts = [each.judgement.verdicts.get(ONE) for each in detector.until(250.0)]
    actions = [each.action for each in verdicts if each is not None and each.cause is Cause.SLOW]
    assert actions[0] is SuggestedAction.INSPECT
    assert actions.index(SuggestedAction.REPLACE) >= 9
    assert actions[-1] is SuggestedAction.REPLACE


def test_ejection_restart_and_replacement_are_destructive_and_nothing_else() -> None:
    assert {SuggestedAction.EJECT, SuggestedAction.RESTART, SuggestedAction.REPLACE} == DESTRUCTIVE
    assert all(rule.action is not SuggestedAction.NONE for rule in RULES.values())


@pytest.mark.parametrize(
    ("instance", "engine"), [("uid.12.170.250.agent", "uid.12.170.250"), ("1", "1"), ("", "")]
)
def test_the_last_part_of_an_instance_is_the_agents(instance: str, engine: str) -> None:
    assert engine_of(instance) == engine


def test_the_share_beyond_an_objective_is_read_from_buckets_and_sketches() -> None:
    bounds, cumulative = (0.1, 1.0, 10.0), np.array([[10.0, 60.0, 100.0, 100.0]] * 3 + [[0.0] * 4])
    found = bucket_share_above(cumulative, bounds, np.array([1.0, 0.1, math.nan, 1.0]))
    assert found[:2] == pytest.approx([0.4, 0.9])
    assert np.isnan(found[2:]).all()
    gamma = 1.01 / 0.99
    values = np.linspace(0.05, 3.0, 500)
    index = np.ceil(np.log(values) / math.log(gamma)).astype(int)
    whole = SketchCounts(0.01, int(index.min()), np.bincount(index - index.min()).tolist())
    assert sketch_share_above([whole, whole], 1.0) == pytest.approx(float((values > 1.0).mean()), abs=0.02)
    assert math.isnan(sketch_share_above([], 1.0))
    assert math.isnan(sketch_share_above([whole], math.nan))


def test_a_burst_that_is_worked_off_in_twenty_seconds_is_no_overload() -> None:
    judge, where = Judge(series=1), placement(max_num_seqs=256.0, ttft_p95_s=2.0)
    told(judge, range(12), where, running=40.0, held=40.0, first_tokens=7.0)
    burst = told(judge, range(12, 16), where, running=50.0, waiting=8.0, held=58.0, first_tokens=7.0)
    after = told(judge, range(16, 30), where, running=45.0, held=45.0, first_tokens=7.0)
    assert {*burst, *after} == {VerdictKind.NORMAL}


def test_a_short_queue_that_stays_is_an_overload_after_half_a_minute() -> None:
    judge, where = Judge(series=1), placement(max_num_seqs=256.0, ttft_p95_s=2.0)
    found = told(judge, range(12), where, running=50.0, waiting=8.0, held=58.0, first_tokens=7.0)
    assert found.index(VerdictKind.OVERLOADED) == RULES[Cause.OVERLOAD].enter - 1


@pytest.mark.parametrize(
    ("running", "waiting", "first_tokens"),
    [(50.0, 16.0, 7.0), (8.0, 9.0, 7.0), (8.0, 3.0, 0.0)],
    ids=["waits-beyond-its-objective", "as-many-wait-as-run", "no-first-token-at-all"],
)
def test_a_queue_that_costs_the_objective_is_an_overload_in_fifteen_seconds(
    running: float, waiting: float, first_tokens: float
) -> None:
    judge, where = Judge(series=1), placement(max_num_seqs=256.0, ttft_p95_s=2.0)
    found = told(
        judge, range(4), where, running=running, waiting=waiting, held=running + waiting, first_tokens=first_tokens
    )
    assert found.index(VerdictKind.OVERLOADED) == 2


def test_an_overload_is_over_when_its_queue_is_though_budgets_still_burn() -> None:
    judge, where = Judge(series=1), placement(max_num_seqs=256.0)
    assert told(judge, range(6), where, running=200.0, waiting=60.0, held=260.0)[-1] is VerdictKind.OVERLOADED
    assert judged(judge, 6, where, burn=1.5, running=200.0, held=200.0).kind(ONE) is VerdictKind.OVERLOADED
    assert judged(judge, 7, where, burn=1.5, running=50.0, held=50.0).kind(ONE) is VerdictKind.NORMAL


def test_steps_of_an_engine_that_has_just_begun_say_nothing_of_its_speed() -> None:
    detector = watching(cluster())
    detector.until(200.0)
    engine = detector.world.engines[0]
    engine.restart(after_s=10.0)
    detector.until(210.0)
    engine.slow(2.0)            # caches are cold
    warming = detector.until(230.0)
    engine.slow(1.0)
    steps = warming + detector.until(300.0)
    assert kinds(steps, ONE) == ["NORMAL"]


def test_an_engine_that_stays_slow_after_its_start_is_found() -> None:
    detector = watching(cluster(rate_rps=2.0))
    detector.until(200.0)
    engine = detector.world.engines[0]
    engine.restart(after_s=10.0)
    engine.slow(2.0)
    assert kinds(detector.until(300.0), ONE) == ["NORMAL", "DEGRADED"]
