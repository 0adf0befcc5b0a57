"""What people say of episodes changes what is said of their like afterwards, and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from enova_recommender.detection.causes import DESTRUCTIVE, RULES, Cause, SuggestedAction
from enova_recommender.detection.lessons import FACTS, Lesson, Lessons
from enova_recommender.detection.observation import Placement
from enova_recommender.detection.verdicts import Contribution, Verdict
from enova_testing.serving_world import cluster, watching

PLACED = {
    name: Placement(replica=name, deployment=deployment, variant="v", nodes=("n",))
    for name, deployment in (("one", "chat"), ("other", "code"))
}


def verdict(replica: str = "one", *, cause: Cause = Cause.SLOW, ratio: float = 1.4, score: float = 0.57) -> Verdict:
    return Verdict(
        replica=replica, kind=RULES[cause].kind, cause=cause, score=score, confidence=0.95, since_s=100.0,
        action=RULES[cause].action,
        contributions=(Contribution(feature="step_time_ratio", value=ratio, threshold=1.3),),
    )  # fmt: skip


def lesson(*, is_true: bool, cause: Cause = Cause.SLOW, ratio: float = 1.4, score: float = 0.57,
           said: Cause | None = None) -> Lesson:  # fmt: skip
    return Lesson(
        deployments=frozenset({"chat"}), causes=(cause,), is_true=is_true, score=score,
        weights={"step_time_ratio": ratio / 1.3}, said=said,
    )  # fmt: skip


def heard(lessons: list[Lesson], found: Verdict) -> Verdict | None:
    return Lessons(lessons).applied({found.replica: found}, PLACED).get(found.replica)


def test_without_labels_verdicts_stand_as_they_are() -> None:
    assert heard([], verdict()) == verdict()


def test_what_was_called_a_false_alarm_is_not_told_again() -> None:
    assert heard([lesson(is_true=False)], verdict()) is None
    assert heard([lesson(is_true=False)], verdict(ratio=1.35, score=0.45)) is None


def test_a_far_stronger_alarm_is_told_though_a_weak_one_was_false() -> None:
    told = heard([lesson(is_true=False)], verdict(ratio=9.0, score=1.0))
    assert told is not None
    assert told.action is RULES[Cause.SLOW].action


def test_a_false_alarm_of_one_deployment_or_cause_says_nothing_of_others() -> None:
    assert heard([lesson(is_true=False)], verdict("other")) == verdict("other")
    assert heard([lesson(is_true=False)], verdict(cause=Cause.OVERLOAD)) == verdict(cause=Cause.OVERLOAD)


def test_true_alarms_beside_a_false_one_are_told_again() -> None:
    both = [lesson(is_true=False), lesson(is_true=True), lesson(is_true=True), lesson(is_true=True)]
    told = heard(both, verdict())
    assert told is not None
    assert told.confidence < 0.95              # people do not agree
    assert heard([lesson(is_true=True)], verdict()) == verdict()


def test_what_may_well_be_false_ends_no_process() -> None:
    lessons = [lesson(is_true=False), lesson(is_true=True)]
    told = heard(lessons, verdict(score=0.6))
    assert told is not None
    assert told.confidence < 0.8
    assert told.action is SuggestedAction.INSPECT


@pytest.mark.parametrize("cause", sorted(FACTS))
def test_no_label_speaks_against_a_fact(cause: Cause) -> None:
    found = verdict(cause=cause)
    assert heard([lesson(is_true=False, cause=cause)] * 10, found) == found


def test_what_people_called_an_episode_its_like_is_called_too() -> None:
    told = heard([lesson(is_true=True, said=Cause.THROTTLED)], verdict())
    assert told is not None
    assert (told.cause, told.kind) == (Cause.THROTTLED, RULES[Cause.THROTTLED].kind)
    load = heard([lesson(is_true=True, said=Cause.OVERLOAD)], verdict())
    assert load is not None
    assert (load.cause, load.action) == (Cause.OVERLOAD, SuggestedAction.SCALE_UP)


def test_a_label_never_makes_a_suggestion_destructive_and_calls_nothing_a_fact() -> None:
    queue = verdict(cause=Cause.OVERLOAD)
    slow = heard([lesson(is_true=True, cause=Cause.OVERLOAD, said=Cause.SLOW)], queue)
    assert slow is not None
    assert (slow.cause, slow.action) == (Cause.SLOW, SuggestedAction.INSPECT)
    assert slow.action not in DESTRUCTIVE
    assert heard([lesson(is_true=True, cause=Cause.OVERLOAD, said=Cause.HUNG)], queue) == queue


def test_figures_that_are_odd_teach_without_an_error() -> None:
    odd = replace(lesson(is_true=False), weights={"a": math.inf, "b": 0.0, "step_time_ratio": -3.0})
    assert heard([odd], verdict(ratio=9.0, score=1.0)) is not None


def test_a_label_changes_a_later_verdict_of_the_live_detector() -> None:
    detector = watching(cluster(replicas=2))
    detector.until(150.0)
    engine = detector.world.engines[1]
    engine.slow(1.5)
    detector.until(250.0)
    (episode,) = detector.watch.book.open
    engine.slow(1.0)
    detector.until(350.0)
    assert not detector.watch.book.open
    said = Lesson(
        deployments=frozenset({"chat"}), causes=episode.causes, is_true=False, score=episode.score,
        weights={each.feature: each.weight for each in episode.contributions},
    )  # fmt: skip
    detector.watch.teach([said])
    engine.slow(1.5)
    assert not any(told.judgement.verdicts for told in detector.until(450.0))
    engine.slow(8.0)
    assert detector.until(510.0)[-1].judgement.verdicts["replica-1"].cause is Cause.SLOW
    detector.watch.teach([])                   # taken back
    engine.slow(1.5)
    detector.until(540.0)
    assert "replica-1" in detector.until(560.0)[-1].judgement.verdicts
