"""The parts of live detection by themselves: windows, votes, siblings, residuals, episodes, what outlives a restart."""

from __future__ import annotations

import math

import numpy as np
import pytest

from enova_recommender.detection.causes import RULES, Cause, SuggestedAction
from enova_recommender.detection.episodes import Change, EpisodeBook, Scope
from enova_recommender.detection.features import COLUMN, Feature, FeatureStep, Window
from enova_recommender.detection.folding import FoldSettings
from enova_recommender.detection.observation import Placement
from enova_recommender.detection.peers import PeerWatch
from enova_recommender.detection.progress import Progress, ProgressWatch
from enova_recommender.detection.residual import AffineExpectation, StepBatches, fit_affine, log_ratio
from enova_recommender.detection.verdicts import Judgement, Verdict
from enova_recommender.detection.watch import FleetWatch
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


def test_siblings_speak_from_three_on_and_the_odd_one_stands_out() -> None:
    watch = PeerWatch(series=5)
    now = step(step_s=[0.02, 0.021, 0.02, 0.06, 0.05])
    found = watch.update(now, ["a", "a", "a", "a", "b"])
    assert found[3, 0] > 20
    assert abs(found[0, 0]) < 1
    assert np.isnan(found[4, 0])
    assert np.isnan(PeerWatch(series=3).update(step(step_s=[0.02, 0.02, 0.06]), ["a"] * 3)).all()


def test_equal_siblings_are_not_apart_by_a_rounding_error() -> None:
    found = PeerWatch(series=4).update(step(step_s=[0.02, 0.02, 0.02, 0.0200001]), ["a"] * 4)
    assert np.abs(found[:, 0]).max() < 0.01


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


def test_most_of_a_deployment_overloaded_is_the_deployments_episode() -> None:
    book, placements = EpisodeBook(), placed("a", "b", "c")
    book.update(judgement(5.0, dict.fromkeys(("r0", "r1"), Cause.OVERLOAD)), placements)
    assert [(each.root.scope, each.root.name) for each in book.open] == [(Scope.DEPLOYMENT, "chat")]


def test_different_troubles_of_one_replica_are_different_episodes() -> None:
    book, placements = EpisodeBook(), placed("a", "b", "c")
    book.update(judgement(5.0, {"r0": Cause.OVERLOAD}), placements)
    book.update(judgement(10.0, {"r0": Cause.HUNG}), placements)
    assert {each.kind for each in book.open} == {VerdictKind.OVERLOADED, VerdictKind.DEGRADED}
