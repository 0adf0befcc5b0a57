"""What the detector is told of the fleet, under any model clock, and what is made of its findings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from enova_coordinator.core.detection import (
    ejected,
    fold_settings,
    lesson_of,
    placement,
    progress_limits,
    restarts,
    verdict_of,
    words,
)
from enova_coordinator.core.episode import Episode, EpisodeLabel, Finding
from enova_coordinator.core.model import (
    Claim,
    Deployment,
    DeploymentAdvice,
    DeploymentSpec,
    Intent,
    MaxTokensMode,
    MaxTokensPolicy,
    Member,
    Replica,
    ReplicaState,
    ReplicaStatus,
    ServingClass,
    Snapshot,
    Variant,
)
from enova_recommender.detection.causes import RULES, Cause
from enova_recommender.detection.lessons import Lesson
from enova_recommender.detection.verdicts import Contribution, Verdict
from enova_recommender.types import VerdictKind

D, V, R = "deployments/d", "deployments/d/variants/v", "deployments/d/replicas/v-0"
FLAGS = {"max_num_seqs": 64, "max_model_len": 4096}
REPLICA = Replica(
    name=R, uid="u", deployment=D, variant=V, members=(Member(node="nodes/n", claims=(Claim(gpu_uuid="g"),)),),
    status=ReplicaStatus(state=ReplicaState.READY),
)  # fmt: skip


def snapshot(replica: Replica = REPLICA, *, advice: DeploymentAdvice | None = None, **spec: object) -> Snapshot:
    wanted = DeploymentSpec(model="m", **spec)  # type: ignore[arg-type]
    return Snapshot(
        revision=1,
        deployments={D: Deployment(name=D, uid="u", spec=wanted, advice=advice)},
        variants={V: Variant(name=V, deployment=D, model="m", served_names=("d",), configuration=FLAGS)},
        replicas={replica.name: replica},
    )


def test_a_replica_is_placed_with_what_the_coordinator_decided() -> None:
    found = placement(snapshot(), REPLICA)
    assert found is not None
    assert (found.replica, found.deployment, found.variant) == (R, D, V)
    assert (found.nodes, found.gpus) == (("nodes/n",), ("g",))
    assert (found.max_num_seqs, found.max_model_len) == (64.0, 4096.0)
    assert math.isnan(found.max_num_batched_tokens)  # the engine chose


@pytest.mark.parametrize("replica", [replace(REPLICA, intent=Intent.DRAIN), replace(REPLICA, members=())])
def test_what_is_not_meant_to_serve_is_not_watched(replica: Replica) -> None:
    assert placement(snapshot(replica), replica) is None


def test_capacity_is_that_of_the_advice_only_where_its_configuration_runs() -> None:
    advised = DeploymentAdvice(gpu_type="H100", configuration=FLAGS, capacity_rps=4.5)
    other = replace(advised, configuration={"max_num_seqs": 8})
    found = [placement(snapshot(advice=each), REPLICA) for each in (advised, other)]
    assert [each is not None and each.capacity_rps == 4.5 for each in found] == [True, False]


def test_answers_are_meant_to_be_cut_only_where_limits_are_applied() -> None:
    observed = snapshot(max_tokens_policy=MaxTokensPolicy(mode=MaxTokensMode.OBSERVE, cut_share=0.1))
    applied = snapshot(max_tokens_policy=MaxTokensPolicy(mode=MaxTokensMode.APPLY, cut_share=0.1))
    found = [placement(each, REPLICA) for each in (observed, applied)]
    assert [each is not None and each.cut_share == 0.1 for each in found] == [False, True]


def test_of_several_classes_the_laxest_objective_counts() -> None:
    classes = (ServingClass(name="a", ttft_p95_s=0.5), ServingClass(name="b", ttft_p95_s=2.0, tpot_p95_s=0.05))
    found = placement(snapshot(classes=classes), REPLICA)
    assert found is not None
    assert (found.ttft_p95_s, found.tpot_p95_s) == (2.0, 0.05)


def test_what_agents_hold_out_of_routing_is_known() -> None:
    out = replace(REPLICA, status=replace(REPLICA.status, in_routing=False))
    assert ejected(snapshot(out)) == {R}
    assert ejected(snapshot()) == frozenset()
    starting = replace(out, status=replace(out.status, state=ReplicaState.STARTING))
    assert ejected(snapshot(starting)) == frozenset()


def test_an_engine_over_two_nodes_that_both_count_its_restart_was_restarted_once() -> None:
    both = replace(
        REPLICA, members=(*REPLICA.members, Member(node="nodes/m", rank=1)), status=ReplicaStatus(restarts=2)
    )
    found = snapshot(both)
    where = placement(found, both)
    assert where is not None
    assert restarts(found, [where]) == {R: 1}


@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0, 20.0, 120.0])
def test_under_a_fast_clock_a_step_is_long_enough_for_a_new_reading_and_frames_are_waited_for(scale: float) -> None:
    fold = fold_settings(scale=scale, step_s=1.0, bounds={})
    assert fold.step_s >= max(5.0, scale)
    assert fold.step_s % 5.0 == 0
    assert fold.lateness_s / scale == 1.5
    limits = progress_limits(fold, scale=scale)
    assert limits.suspect_after_s >= 2 * fold.step_s
    assert limits.hung_after_s > limits.suspect_after_s
    assert limits.silent_age_s >= 3.0 * scale


def test_at_natural_speed_steps_are_those_of_telemetry_or_five_seconds() -> None:
    assert fold_settings(scale=1.0, step_s=1.0, bounds={}).step_s == 5.0
    assert fold_settings(scale=1.0, step_s=10.0, bounds={}).step_s == 10.0


@pytest.mark.parametrize("cause", list(Cause))
def test_every_cause_has_words_and_its_figures(cause: Cause) -> None:
    figure = Contribution(feature="queue", value=12.0, threshold=2.0)
    found = Verdict(
        replica=R, kind=RULES[cause].kind, cause=cause, score=0.8, confidence=0.6, since_s=100.0,
        action=RULES[cause].action, contributions=(figure,),
    )  # fmt: skip
    verdict = verdict_of(found, wall_s=lambda model_s: model_s + 5.0)
    assert (verdict.object, verdict.cause, verdict.since_s) == (R, cause.name, 105.0)
    assert "queue is 12, 2 is the threshold" in verdict.reason
    assert verdict.weights == (6.0,)


def test_a_label_teaches_of_the_deployments_that_its_episode_befell() -> None:
    episode = Episode(
        name="episodes/1", object="nodes/n", verdict=VerdictKind.DEGRADED, causes=("SLOW", "of_another_release"),
        members=(R, "deployments/e/replicas/v-1"), score=0.6,
        findings=(Finding(feature="step_time_ratio", value=1.5, threshold=1.3, contribution=1.15),),
    )  # fmt: skip
    taught = Lesson(
        deployments=frozenset({D, "deployments/e"}), causes=(Cause.SLOW,), is_true=False, score=0.6,
        weights={"step_time_ratio": 1.15},
    )  # fmt: skip
    assert lesson_of(episode) is None
    assert lesson_of(replace(episode, label=EpisodeLabel.FALSE)) == taught
    named = replace(episode, label=EpisodeLabel.TRUE, label_cause="THROTTLED")
    assert lesson_of(named) == replace(taught, is_true=True, said=Cause.THROTTLED)


def test_a_threshold_that_is_none_is_not_told() -> None:
    assert words(Cause.LEAK, [Contribution(feature="x", value=1.0, threshold=math.inf)]).endswith("(x is 1)")
