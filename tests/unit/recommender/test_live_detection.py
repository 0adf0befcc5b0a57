"""The parts of live detection by themselves: windows, votes, siblings, residuals, episodes, what outlives a restart."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from enova_recommender.detection.causes import RULES, Cause, SuggestedAction
from enova_recommender.detection.episodes import Change, EpisodeBook, Scope, from_text, to_text
from enova_recommender.detection.features import COLUMN, Feature, FeatureStep, Window
from enova_recommender.detection.folding import CATCH_UP_STEPS, FoldSettings, Rejection
from enova_recommender.detection.groups import Groups
from enova_recommender.detection.observation import Placement
from enova_recommender.detection.peers import PeerWatch, common_part
from enova_recommender.detection.progress import Progress, ProgressWatch
from enova_recommender.detection.residual import AffineExpectation, StepBatches, fit_affine, log_ratio
from enova_recommender.detection.verdicts import Judgement, Verdict
from enova_recommender.detection.watch import FleetWatch, Watched
from enova_recommender.performance import Affine
from enova_recommender.types import VerdictKind
from enova_testing.serving_world import BOUNDS, cluster, watching

STEP_S = 5.0


def step(number: int = 0, **columns: list[float]) -> FeatureStep:
    """One step with these columns; everything else is missing."""
    rows = len(next(iter(columns.values())))
    values = np.full((rows, len(COLUMN)), np.nan, dtype=np.float32)
    for name, figures in columns.items():
        values[:, COLUMN[Feature[name.upper()]]] = figures
    names = tuple(f"replica-{row}" for row in range(rows))
    return FeatureStep(number=number, end_s=(number + 1) * STEP_S, replicas=names, values=values)


def stands(**more: list[float]) -> FeatureStep:
    figures = {"age_s": [1.0], "ready": [1.0], "held": [3.0], "running": [3.0], "generation_tokens": [0.0]}
    return step(0, **{**figures, **more})


def test_a_window_of_ten_thousand_replicas_and_an_hour_is_under_two_gibibytes() -> None:
    assert 720 * 10_000 * len(COLUMN) * np.dtype(np.float32).itemsize < 2**31


def test_a_window_forgets_what_it_has_no_room_for() -> None:
    window = Window(steps=3, rows=2)
    for number in range(5):
        window.put(number, np.full((2, len(COLUMN)), number, dtype=np.float32))
    assert window.history(0, first=0, last=4)[:, 0].tolist()[2:] == [2.0, 3.0, 4.0]
    assert np.isnan(window.history(0, first=0, last=1)).all()
    window.forget(0)
    assert np.isnan(window.history(0, first=2, last=4)).all()
    assert window.history(1, first=4, last=4)[0, 0] == 4.0


def test_a_standstill_grows_from_busy_to_suspect_to_hung_and_any_token_ends_it() -> None:
    watch = ProgressWatch(series=1)
    found = [Progress(watch.update(stands(), step_s=STEP_S)[0]) for _ in range(4)]
    assert found == [Progress.BUSY, Progress.SUSPECT, Progress.SUSPECT, Progress.HUNG]
    assert watch.update(stands(generation_tokens=[5.0]), step_s=STEP_S)[0] == Progress.BUSY
    assert watch.stalled_s[0] == 0.0


def test_a_request_that_came_after_a_lost_frame_has_not_waited_since_the_frame_before() -> None:
    watch = ProgressWatch(series=1)
    watch.update(stands(held=[0.0], running=[0.0]), step_s=STEP_S)
    watch.update(step(age_s=[math.nan]), step_s=STEP_S)
    assert watch.update(stands(held=[1.0], running=[1.0], span_s=[2 * STEP_S]), step_s=STEP_S)[0] == Progress.BUSY
    assert watch.stalled_s[0] == STEP_S


def test_full_utilisation_at_idle_watts_does_not_save_a_wedged_engine() -> None:
    watch = ProgressWatch(series=1)
    wedged = stands(gpu_utilization=[1.0], gpu_power=[0.19])
    assert [watch.update(wedged, step_s=STEP_S)[0] for _ in range(4)][-1] == Progress.HUNG
    computing = ProgressWatch(series=1)
    busy = stands(gpu_utilization=[1.0], gpu_power=[0.7])
    assert [computing.update(busy, step_s=STEP_S)[0] for _ in range(10)][-1] == Progress.LONG_PREFILL
    assert [computing.update(busy, step_s=STEP_S)[0] for _ in range(120)][-1] == Progress.HUNG


def test_an_engine_whose_fullest_step_takes_long_is_waited_for() -> None:
    watch = ProgressWatch(series=1)
    found = [watch.update(stands(), step_s=STEP_S, longest_step_s=np.array([20.0]))[0] for _ in range(16)]
    assert found.index(Progress.SUSPECT) == 11  # three times as long as its longest step
    assert found[-1] == Progress.HUNG


def test_an_engine_that_does_not_answer_while_requests_are_held_stands_still() -> None:
    watch = ProgressWatch(series=1)
    silent = step(age_s=[1.0], ready=[1.0], held=[4.0])
    assert [watch.update(silent, step_s=STEP_S)[0] for _ in range(4)][-1] == Progress.HUNG


def test_an_engine_whose_metrics_cannot_be_read_but_whose_requests_end_is_busy() -> None:
    watch = ProgressWatch(series=1)
    blind = step(age_s=[1.0], ready=[1.0], held=[4.0], finished=[2.0])
    assert [watch.update(blind, step_s=STEP_S)[0] for _ in range(10)][-1] == Progress.BUSY


def test_without_a_gauge_nobody_knows_that_an_engine_is_idle() -> None:
    watch = ProgressWatch(series=1)
    assert watch.update(step(age_s=[1.0], ready=[1.0], generation_tokens=[0.0]), step_s=STEP_S)[0] == Progress.UNKNOWN
    assert watch.update(stands(held=[0.0], running=[0.0]), step_s=STEP_S)[0] == Progress.IDLE


def test_a_gap_in_the_data_neither_adds_to_a_standstill_nor_ends_it() -> None:
    watch = ProgressWatch(series=1)
    for _ in range(2):
        watch.update(stands(), step_s=STEP_S)
    assert watch.update(step(age_s=[math.nan]), step_s=STEP_S)[0] == Progress.UNKNOWN
    assert watch.stalled_s[0] == 10.0


def groups(*variants: str, nodes: tuple[str, ...] | None = None) -> Groups:
    names = tuple(f"replica-{row}" for row in range(len(variants)))
    placements = {
        name: Placement(replica=name, deployment="chat", variant=variant, nodes=(nodes[row] if nodes else "node",))
        for row, (name, variant) in enumerate(zip(names, variants, strict=True))
    }
    return Groups.of(names, placements)


def beside(logs: list[float], *variants: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return PeerWatch(series=0).update(np.array(logs), groups(*variants), doubt=np.zeros(len(logs)))


def test_siblings_speak_from_three_on_and_the_odd_one_stands_out() -> None:
    found = beside([0.0, 0.02, -0.01, 0.9, 0.7], "a", "a", "a", "a", "b")
    assert found[3] > 6
    assert np.abs(found[:3]).max() < 1
    assert np.isnan(found[4])
    assert np.isnan(beside([0.0, 0.0, 0.9], "a", "a", "a")).all()


def test_equal_siblings_are_not_apart_by_a_rounding_error() -> None:
    assert np.abs(beside([0.1, 0.1, 0.1, 0.1001], "a", "a", "a", "a")).max() < 0.01


def test_a_replica_that_always_strays_is_odd_later_than_a_steady_one() -> None:
    draw, alike, none = np.random.default_rng(1), groups("a", "a", "a", "a"), np.zeros(4)

    def after(spread: float) -> float:
        watch = PeerWatch(series=0)
        for _ in range(120):
            watch.update(draw.normal(0.0, spread, 4), alike, doubt=none)
            watch.learn(np.ones(4, bool))
        for _ in range(12):
            found = watch.update(np.array([0.0, 0.01, -0.01, 0.35]), alike, doubt=none)
        return float(found[3])

    assert after(0.01) > 6.0 > after(0.15) > 1.0


def test_what_is_several_times_slower_than_its_siblings_is_odd_however_they_stray() -> None:
    watch, alike, none = PeerWatch(series=0), groups("a", "a", "a", "a"), np.zeros(4)
    for number in range(120):
        watch.update(np.array([0.5, -0.5, 0.5, -0.5]) * (-1.0) ** number, alike, doubt=none)
        watch.learn(np.ones(4, bool))
    for _ in range(20):
        found = watch.update(np.array([0.0, 0.01, -0.01, 1.2]), alike, doubt=none)
    assert found[3] > 6.0


def test_what_most_siblings_on_other_nodes_show_too_is_taken_off() -> None:
    nodes = ("n0", "n1", "n2", "n3")
    everywhere = groups("a", "a", "a", "a", nodes=nodes)
    assert common_part(np.full(4, 0.5), everywhere, rows=np.ones(4, bool)) == pytest.approx(0.5)
    one_node = groups("a", "a", "a", "a")
    assert common_part(np.full(4, 0.5), one_node, rows=np.ones(4, bool)).max() == 0.0
    alone = common_part(np.array([0.5, 0.0, 0.01, -0.02]), everywhere, rows=np.ones(4, bool))
    assert alone[0] == 0.0


def test_a_group_is_sampled_by_turns() -> None:
    both = groups("a", "b", "a", "a")
    assert {tuple(both.turn(number).tolist()) for number in range(3)} == {(0, 1), (2, 1), (3, 1)}


def test_a_quantile_by_group_leaves_out_what_is_missing() -> None:
    found, count = groups("a", "b", "a", "a").quantile(np.array([3.0, math.nan, 1.0, 2.0]), 0.5)
    assert found[0] == 2.0
    assert math.isnan(found[1])
    assert count.tolist() == [3, 0]


def batches(times: Affine, *, count: int, seed: int, factor: float = 1.0) -> list[StepBatches]:
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        share, zero = draw.uniform(0, 1, 1), np.zeros(1)
        sequences, context = draw.uniform(1, 16, 1), draw.uniform(100, 3000, 1)
        tokens = draw.uniform(16, 512, 1)
        made = StepBatches(
            weights=np.array([share, 1 - share]), prefill_tokens=np.array([tokens, zero]),
            prefill_pairs=np.array([tokens * 100, zero]), decode_sequences=np.array([sequences, sequences]),
            context_tokens=np.array([context, context]), observed_s=np.ones(1),
        )  # fmt: skip
        expected = AffineExpectation.of(times, series=1).expected_s(made)
        noise = float(np.exp(draw.normal(0, 0.03)))
        found.append(StepBatches(
            weights=made.weights, prefill_tokens=made.prefill_tokens, prefill_pairs=made.prefill_pairs,
            decode_sequences=made.decode_sequences, context_tokens=made.context_tokens,
            observed_s=factor * noise * expected,
        ))  # fmt: skip
    return found


def test_step_times_are_learnt_from_batches_though_one_in_ten_is_slow() -> None:
    times = Affine(base_s=0.017, prefill_token_s=4e-4, sequence_s=7e-4, context_token_s=1e-6)
    learnt = fit_affine(batches(times, count=180, seed=1) + batches(times, count=20, seed=2, factor=4.0))
    fresh = batches(times, count=50, seed=3)
    errors = np.array([log_ratio(each, AffineExpectation.of(learnt, series=1))[0] for each in fresh])
    assert np.abs(np.median(errors)) < 0.03
    assert np.abs(errors).max() < 0.2


def test_too_few_steps_teach_nothing() -> None:
    with pytest.raises(ValueError, match="at least 24"):
        fit_affine(batches(Affine(base_s=0.01), count=5, seed=1))


def test_what_was_learnt_of_a_replica_outlives_a_restart() -> None:
    detector = watching(cluster(replicas=2))
    for engine in detector.world.engines:
        engine.slow(1.2)  # the model is a fifth too quick for both: that is its error, not theirs
    assert not detector.until(150.0)[-1].judgement.verdicts
    saved = detector.watch.save()
    again = watching(detector.world, watch=FleetWatch(FoldSettings(bounds=BOUNDS)))
    again.watch.restore(saved)
    steps = again.until(180.0)
    detector.world.engines[1].slow(2.4)
    steps = again.until(210.0)
    assert steps[-1].judgement.kind("replica-1") is VerdictKind.DEGRADED
    assert steps[-1].judgement.kind("replica-0") is VerdictKind.NORMAL


def test_an_open_episode_goes_on_under_its_name_after_a_restart() -> None:
    detector = watching(cluster(replicas=2))
    detector.until(150.0)
    detector.world.engines[1].slow(2.0)
    before = next(change.episode for told in detector.until(190.0) for change in told.changes)
    again = watching(detector.world, watch=FleetWatch(FoldSettings(bounds=BOUNDS)))
    again.watch.restore(detector.watch.save())
    detector.world.now_s = 250.0          # nobody watched for a minute
    steps = again.until(300.0)
    assert {change.episode.id for told in steps for change in told.changes} <= {before.id}
    assert [each.id for each in again.watch.book.open] == [before.id]
    detector.world.engines[1].slow(1.0)
    changes = [change for told in again.until(400.0) for change in told.changes]
    assert [(each.change, each.episode.id) for each in changes] == [(Change.CLOSED, before.id)]


def test_what_another_version_saved_is_refused() -> None:
    watch = FleetWatch(FoldSettings())
    with pytest.raises(ValueError, match="another version"):
        watch.restore({**watch.save(), "version": np.array([1])})


def test_an_episode_is_the_same_after_it_was_text() -> None:
    detector = watching(cluster(replicas=2))
    detector.until(150.0)
    detector.world.engines[1].slow(2.0)
    detector.until(190.0)
    assert from_text(to_text(detector.watch.book.open)) == list(detector.watch.book.open)
    with pytest.raises(ValueError, match="no episodes"):
        from_text('[{"id": 3}]')


def test_after_a_stall_of_the_caller_the_newest_steps_are_judged_and_the_rest_counted() -> None:
    detector = watching(cluster())
    detector.until(100.0)
    world, watch = detector.world, detector.watch
    for frame in world.frames(300.0):
        watch.add(frame, now_s=world.now_s)
    told = watch.close(world.now_s)
    assert 0 < len(told) <= CATCH_UP_STEPS
    assert watch.fold.skipped > 20
    assert all(not each.judgement.verdicts for each in told)


def test_what_a_node_says_of_a_replica_elsewhere_is_left_out_and_counted() -> None:
    detector = watching(cluster(replicas=2))
    detector.until(60.0)
    (frame, _) = detector.world.frames(61.0)
    liar = frame._replace(node="node-1", boot="other", sequence=1)
    before = detector.watch.fold.rejected[Rejection.MISPLACED]
    assert detector.watch.add(liar, now_s=61.0) is None
    assert detector.watch.fold.rejected[Rejection.MISPLACED] == before + 1


def test_a_replica_that_moved_begins_anew() -> None:
    detector = watching(cluster(replicas=2))
    detector.until(200.0)
    placements = [each.placement() for each in detector.world.engines]
    detector.watch.place([replace(placements[0], nodes=("node-9",)), placements[1]])
    detector.world.engines[0].node = "node-9"
    detector.world.engines[0].slow(1.2)
    assert not [step for step in detector.until(320.0) if step.judgement.verdicts]


def test_a_replica_that_is_slow_from_its_start_does_not_pass_for_a_wrong_model() -> None:
    world = cluster(replicas=6)
    world.engines[2].slow(2.0)
    detector = watching(world)
    steps = detector.until(240.0)
    assert steps[-1].judgement.kind("replica-2") is VerdictKind.DEGRADED
    assert {steps[-1].judgement.kind(f"replica-{other}") for other in (0, 1, 3, 4, 5)} == {VerdictKind.NORMAL}


def test_a_model_that_is_wrong_for_all_siblings_makes_none_of_them_slow() -> None:
    world = cluster(replicas=5)
    for engine in world.engines:
        engine.slow(1.8)
    assert not [step for step in watching(world).until(300.0) if step.judgement.verdicts]


def test_siblings_under_unequal_load_are_not_slow() -> None:
    world = cluster(replicas=5, rate_rps=2.0)
    world.engines[4].rate_rps = 6.5
    detector = watching(world, times=None)
    steps = detector.until(200.0)
    world.engines[4].rate_rps = 2.0
    world.engines[0].rate_rps = 6.5
    steps += detector.until(400.0)
    assert not [step for step in steps if step.judgement.verdicts]


def test_the_threshold_of_slowness_is_fitted_to_quiet_time() -> None:
    detector = watching(cluster())
    detector.until(150.0)
    assert detector.watch.save()["times/level"].size == 0 or math.isnan(detector.watch.save()["times/level"][0])
    detector.until(1500.0)
    (level,) = detector.watch.save()["times/level"]
    assert 0.0 < level < math.log(1.3)
    detector.world.engines[0].slow(1.4)
    (ratio,) = detector.until(1560.0)[-1].judgement.verdicts["replica-0"].contributions
    assert math.exp(level) == pytest.approx(ratio.threshold, rel=0.1)


def test_figures_of_a_verdict_come_in_order_of_their_excess_and_its_score_is_a_probability() -> None:
    detector = watching(cluster())
    detector.until(150.0)
    detector.world.engines[0].hung = True
    verdicts = [told.judgement.verdicts["replica-0"] for told in detector.until(230.0) if told.judgement.verdicts]
    for verdict in verdicts:
        weights = [each.weight for each in verdict.contributions]
        assert weights == sorted(weights, reverse=True)
        assert 0.3 <= verdict.score <= 1.0
        assert 0.5 <= verdict.confidence <= 1.0
    assert verdicts[-1].score == 1.0       # ten decades
    assert verdicts[-1].confidence == 1.0
    assert verdicts[0].confidence < 1.0


def placed(*nodes: str) -> dict[str, Placement]:
    return {
        f"r{index}": Placement(replica=f"r{index}", deployment="chat", variant="v", nodes=(node,))
        for index, node in enumerate(nodes)
    }


def judgement(now_s: float, causes: dict[str, Cause]) -> Judgement:
    verdicts = {
        name: Verdict(
            replica=name, kind=RULES[cause].kind, cause=cause, score=0.8, confidence=0.9, since_s=now_s - 10.0,
            action=RULES[cause].action,
        )
        for name, cause in causes.items()
    }  # fmt: skip
    return Judgement(number=round(now_s / STEP_S), end_s=now_s, verdicts=verdicts, replicas=tuple(causes))


def test_what_comes_and_goes_within_half_a_minute_stays_one_episode() -> None:
    book, placements = EpisodeBook(), placed("a", "b", "c")
    changes = [
        change
        for number in range(1, 40)
        for change in book.update(
            judgement(5.0 * number, {"r0": Cause.SLOW} if number < 20 and number % 4 else {}), placements
        )
    ]
    assert [change.change for change in changes if change.change is not Change.UPDATED] == [
        Change.OPENED, Change.CLOSED,
    ]  # fmt: skip


def test_replica_episodes_of_one_node_become_the_nodes() -> None:
    book, placements = EpisodeBook(), placed("a", "a", "a", "b", "b")
    book.update(judgement(5.0, {"r0": Cause.SLOW}), placements)
    book.update(judgement(10.0, {"r0": Cause.SLOW, "r1": Cause.SLOW}), placements)
    book.update(judgement(15.0, {"r0": Cause.SLOW, "r1": Cause.SLOW, "r2": Cause.HUNG}), placements)
    (episode,) = book.open
    assert (episode.root.scope, episode.root.name) == (Scope.NODE, "a")
    assert episode.members == {"r0", "r1", "r2"}
    assert episode.causes == (Cause.SLOW, Cause.HUNG)
    assert episode.action is SuggestedAction.REPLACE


def test_an_open_episode_takes_further_causes_and_acts_on_the_gravest_that_stands() -> None:
    book, placements = EpisodeBook(), placed("a", "b", "c")
    book.update(judgement(5.0, {"r0": Cause.SLOW}), placements)
    (hung,) = book.update(judgement(10.0, {"r0": Cause.HUNG}), placements)
    assert (hung.change, hung.episode.causes) == (Change.UPDATED, (Cause.HUNG, Cause.SLOW))
    assert hung.episode.action is RULES[Cause.HUNG].action
    (slow,) = book.update(judgement(15.0, {"r0": Cause.SLOW}), placements)
    assert slow.episode.causes == (Cause.SLOW, Cause.HUNG)
    assert slow.episode.action is RULES[Cause.SLOW].action


def test_where_as_many_ask_for_this_as_for_that_the_gravest_is_heard() -> None:
    book, placements = EpisodeBook(), placed("a", "a")
    (opened,) = book.update(judgement(5.0, {"r0": Cause.SLOW, "r1": Cause.HUNG}), placements)
    assert opened.episode.action is SuggestedAction.RESTART
    assert opened.episode.causes == (Cause.HUNG, Cause.SLOW)


def test_an_episode_that_goes_on_unchanged_is_told_of_once_a_minute() -> None:
    book, placements = EpisodeBook(), placed("a", "b", "c")
    told = [
        change.episode.seen_s
        for number in range(1, 41)
        for change in book.update(judgement(5.0 * number, {"r0": Cause.SLOW}), placements)
    ]
    assert told == [5.0, 65.0, 125.0, 185.0]


def test_a_slow_replica_that_hangs_is_hung_and_then_slow_again_until_it_is_fast() -> None:
    detector = watching(cluster(replicas=2))
    detector.until(150.0)
    engine = detector.world.engines[1]
    engine.slow(2.0)
    detector.until(200.0)
    engine.hung = True
    hung = detector.until(240.0)
    engine.hung = False
    healed = detector.until(260.0)
    engine.slow(1.0)
    over = detector.until(400.0)
    every = [each for told in (*hung, *healed, *over) for each in told.changes]
    changes = [each for each in every if each.episode.kind is VerdictKind.DEGRADED]  # what has piled up is a load
    assert hung[-1].judgement.verdicts["replica-1"].cause is Cause.HUNG
    assert len({each.episode.id for each in changes}) == 1
    assert {each.episode.causes for each in changes} >= {(Cause.HUNG, Cause.SLOW)}
    assert changes[-1].change is Change.CLOSED
    assert over[-1].judgement.kind("replica-1") is VerdictKind.NORMAL


def test_a_slow_replica_that_was_restarted_and_is_fast_is_not_called_slow_again() -> None:
    detector = watching(cluster(replicas=2))
    detector.until(150.0)
    engine = detector.world.engines[1]
    engine.slow(16.0)
    detector.until(200.0)
    engine.restart(after_s=20.0)
    causes = {
        verdict.cause
        for told in detector.until(300.0) if told.step.end_s > 220.0
        for verdict in told.judgement.verdicts.values()
    }  # fmt: skip
    assert causes == set()


def test_what_nobody_measures_any_more_is_not_said_for_ever() -> None:
    detector = watching(cluster(replicas=2))
    detector.until(150.0)
    engine = detector.world.engines[1]
    engine.slow(2.0)
    assert detector.until(200.0)[-1].judgement.verdicts["replica-1"].cause is Cause.SLOW
    engine.rate_rps = 0.0
    causes = [verdict.cause if (verdict := told.judgement.verdicts.get("replica-1")) else None
              for told in detector.until(700.0)]  # fmt: skip
    assert causes[20] is Cause.SLOW            # nobody has seen it fast
    assert causes[-1] is not Cause.SLOW


def test_an_engine_that_dies_before_it_was_measured_is_a_crash_loop_by_its_agents_count() -> None:
    detector = watching(cluster(replicas=2))
    engine, count = detector.world.engines[1], 0
    engine.state = "STARTING"
    engine.starts_at_s = math.inf
    detector.watch.tell_restarts({"replica-1": count})

    def die(now_s: float) -> None:
        nonlocal count
        if now_s in {60.0, 90.0, 125.0}:
            count += 1
            detector.watch.tell_restarts({"replica-1": count})

    verdict = detector.until(140.0, each=die)[-1].judgement.verdicts["replica-1"]
    assert (verdict.kind, verdict.cause) == (VerdictKind.DEGRADED, Cause.CRASH_LOOP)
    assert {each.feature: each.value for each in verdict.contributions}["restarts"] > 1.75


def test_a_restart_that_both_an_agent_and_its_frames_tell_of_counts_once() -> None:
    detector = watching(cluster(replicas=2))
    detector.watch.tell_restarts({"replica-0": 3, "replica-1": 0})    # of long ago
    detector.until(100.0)
    detector.world.engines[1].restart(after_s=20.0)
    detector.watch.tell_restarts({"replica-1": 1})
    steps = detector.until(140.0)
    detector.world.engines[1].restart(after_s=20.0)                   # of which the agent does not tell
    steps += detector.until(180.0)

    def restarts(steps: list[Watched]) -> list[float]:
        counted = (float(each.step.of(Feature.RESTARTS)[each.step.replicas.index("replica-1")]) for each in steps)
        return [each for each in counted if each > 0]

    assert restarts(steps) == [1.0, 1.0]
    assert not any("replica-0" in each.judgement.verdicts for each in steps)


def test_most_of_a_deployment_overloaded_is_the_deployments_episode() -> None:
    book, placements = EpisodeBook(), placed("a", "b", "c")
    book.update(judgement(5.0, dict.fromkeys(("r0", "r1"), Cause.OVERLOAD)), placements)
    assert [(each.root.scope, each.root.name) for each in book.open] == [(Scope.DEPLOYMENT, "chat")]


def test_different_troubles_of_one_replica_are_different_episodes() -> None:
    book, placements = EpisodeBook(), placed("a", "b", "c")
    book.update(judgement(5.0, {"r0": Cause.OVERLOAD}), placements)
    book.update(judgement(10.0, {"r0": Cause.HUNG}), placements)
    assert {each.kind for each in book.open} == {VerdictKind.OVERLOADED, VerdictKind.DEGRADED}
