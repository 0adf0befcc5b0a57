"""Each fault of a serving cluster gets its verdict, and what is no fault gets none: on frames of simulated engines."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from enova_recommender.detection.causes import DESTRUCTIVE, Cause, SuggestedAction
from enova_recommender.detection.episodes import Change, Episode, Scope
from enova_recommender.detection.watch import Watched
from enova_recommender.types import VerdictKind
from enova_testing.serving_world import HOT, LIMITS, TIMES, Watching, cluster, first_s, kinds, watching

ONE = "replica-0"
QUIET_S = 150.0              # of normal time before each fault


def opened(steps: list[Watched]) -> list[Episode]:
    return [each.episode for step in steps for each in step.changes if each.change is Change.OPENED]


def quiet(detector: Watching) -> None:
    before = detector.until(QUIET_S)
    assert all(not step.judgement.verdicts for step in before), [step.judgement.verdicts for step in before][-1]


def causes(steps: list[Watched], replica: str = ONE) -> list[Cause | None]:
    found: list[Cause | None] = []
    for step in steps:
        verdict = step.judgement.verdicts.get(replica)
        cause = verdict.cause if verdict else None
        if not found or found[-1] != cause:
            found.append(cause)
    return found


def test_arrivals_above_capacity_are_an_overload_within_twenty_seconds() -> None:
    detector = watching(cluster())
    quiet(detector)
    detector.world.engines[0].rate_rps = 30.0
    steps = detector.until(QUIET_S + 60.0)
    assert kinds(steps, ONE) == ["NORMAL", "OVERLOADED"]
    assert first_s(steps, ONE) <= QUIET_S + 25.0
    (episode,) = opened(steps)
    assert episode.action is SuggestedAction.SCALE_UP
    assert episode.contributions[0].feature == "queue"


def test_a_ramp_above_capacity_is_an_overload() -> None:
    detector = watching(cluster())
    quiet(detector)
    engine = detector.world.engines[0]

    def ramp(now_s: float) -> None:
        engine.rate_rps = 4.0 + 0.3 * (now_s - QUIET_S)

    steps = detector.until(QUIET_S + 120.0, each=ramp)
    assert kinds(steps, ONE) == ["NORMAL", "OVERLOADED"]


def test_a_replica_without_work_is_underused_and_work_ends_that() -> None:
    detector = watching(cluster())
    quiet(detector)
    detector.world.engines[0].rate_rps = 0.0
    steps = detector.until(QUIET_S + 90.0)
    assert kinds(steps, ONE) == ["NORMAL", "UNDERUSED"]
    assert opened(steps)[0].action is SuggestedAction.SCALE_DOWN
    detector.world.engines[0].rate_rps = 4.0
    assert kinds(detector.until(QUIET_S + 130.0)[2:], ONE)[-1] == "NORMAL"


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0])
def test_slower_steps_for_the_same_load_are_a_degradation(factor: float) -> None:
    detector = watching(cluster())
    quiet(detector)
    detector.world.engines[0].slow(factor)
    steps = detector.until(QUIET_S + 60.0)
    assert kinds(steps, ONE) == ["NORMAL", "DEGRADED"]
    assert causes(steps) == [None, Cause.SLOW]
    assert first_s(steps, ONE) <= QUIET_S + 25.0
    assert opened(steps)[0].contributions[0].feature == "step_time_ratio"


def test_a_gpu_that_throttles_is_named_as_the_cause() -> None:
    detector = watching(cluster())
    quiet(detector)
    engine = detector.world.engines[0]
    engine.slow(1.25)
    engine.throttle_reasons = HOT
    steps = detector.until(QUIET_S + 90.0)
    assert causes(steps) == [None, Cause.THROTTLED]


def test_a_throttle_flag_that_slows_nothing_is_normal() -> None:
    detector = watching(cluster())
    quiet(detector)
    detector.world.engines[0].throttle_reasons = HOT
    assert kinds(detector.until(QUIET_S + 60.0), ONE) == ["NORMAL"]


def test_a_slow_replica_under_full_load_is_degraded_not_overloaded() -> None:
    detector = watching(cluster(rate_rps=5.0))
    quiet(detector)
    detector.world.engines[0].slow(4.0)
    steps = detector.until(QUIET_S + 90.0)
    assert kinds(steps, ONE) == ["NORMAL", "DEGRADED"]


def test_siblings_tell_of_a_slow_replica_where_no_model_of_its_steps_is_known() -> None:
    detector = watching(cluster(replicas=6), times=None)
    quiet(detector)
    detector.world.engines[3].slow(2.5)
    steps = detector.until(QUIET_S + 60.0)
    assert kinds(steps, "replica-3") == ["NORMAL", "DEGRADED"]
    assert all(kinds(steps, f"replica-{other}") == ["NORMAL"] for other in (0, 1, 2, 4, 5))


def test_three_replicas_without_a_model_are_too_few_to_tell_which_was_slow_from_its_start() -> None:
    world = cluster(replicas=3)
    world.engines[1].slow(1.6)
    assert {kind for index in range(3) for kind in kinds(watching(world, times=None).until(QUIET_S), f"replica-{index}")
            } == {"NORMAL"}  # fmt: skip


def test_a_replica_without_model_or_siblings_is_held_against_its_own_past() -> None:
    detector = watching(cluster(), times=None)
    quiet(detector)
    detector.world.engines[0].slow(1.8)
    assert kinds(detector.until(QUIET_S + 60.0), ONE) == ["NORMAL", "DEGRADED"]


def test_an_agent_that_restarts_restarts_no_engine() -> None:
    detector = watching(cluster())
    quiet(detector)

    def restart_agent(now_s: float) -> None:
        if now_s % 25 == 0:
            detector.world.engines[0].adopt()

    assert kinds(detector.until(QUIET_S + 150.0, each=restart_agent), ONE) == ["NORMAL"]


@pytest.mark.parametrize("blind", [False, True])
def test_a_wedged_engine_is_ejected_and_then_restarted_whatever_its_running_gauge_says(blind: bool) -> None:
    detector = watching(cluster())
    quiet(detector)
    engine = detector.world.engines[0]
    engine.hung, engine.blind = True, blind
    steps = detector.until(QUIET_S + 60.0)
    assert causes(steps) == [None, Cause.HUNG]
    assert first_s(steps, ONE) <= QUIET_S + 20.0
    actions = [verdict.action for step in steps if (verdict := step.judgement.verdicts.get(ONE))]
    assert actions[0] is SuggestedAction.EJECT
    assert actions[-1] is SuggestedAction.RESTART
    assert steps[-1].judgement.dead == {ONE}


def test_a_wedge_that_heals_comes_back_without_another_verdict() -> None:
    detector = watching(cluster())
    quiet(detector)
    engine = detector.world.engines[0]
    engine.hung = True
    detector.until(QUIET_S + 30.0)
    engine.hung = False
    steps = detector.until(QUIET_S + 100.0)  # what came meanwhile is worked off
    assert kinds(steps, ONE)[-1] == "NORMAL"
    assert Cause.SLOW not in causes(steps)
    assert not steps[-1].judgement.dead


def test_a_long_prefill_that_draws_power_is_busy_not_hung() -> None:
    limits = replace(LIMITS, num_blocks=40_000, max_num_batched_tokens=200_000)
    world = cluster(limits=limits, rate_rps=0.5)
    engine = world.engines[0]
    engine.max_model_len = 131_072.0
    detector = watching(world)
    quiet(detector)
    engine.rate_rps, engine.power_w = 0.0, 520.0
    engine.ask(prompt_tokens=110_000, output_tokens=20)
    steps = detector.until(QUIET_S + 50.0)
    assert max(step.step.of_row(ONE)["held"] for step in steps) >= 1.0
    assert min(step.step.of_row(ONE)["iterations"] for step in steps[2:5]) == 0.0
    assert kinds(steps, ONE) == ["NORMAL"]


def test_an_idle_engine_is_never_hung() -> None:
    detector = watching(cluster(rate_rps=0.0))
    steps = detector.until(300.0)
    assert set(kinds(steps, ONE)) == {"NORMAL", "UNDERUSED"}


def test_an_engine_that_restarts_again_and_again_is_degraded() -> None:
    detector = watching(cluster())
    quiet(detector)
    engine = detector.world.engines[0]

    def crash(now_s: float) -> None:
        if now_s % 25 == 0:
            engine.restart()

    steps = detector.until(QUIET_S + 120.0, each=crash)
    assert kinds(steps, ONE) == ["NORMAL", "DEGRADED"]
    assert causes(steps) == [None, Cause.CRASH_LOOP]
    assert steps[-1].judgement.dead == {ONE}


def test_one_restart_is_no_fault() -> None:
    detector = watching(cluster())
    quiet(detector)
    detector.world.engines[0].restart()
    assert kinds(detector.until(QUIET_S + 90.0), ONE) == ["NORMAL"]


def test_an_engine_that_failed_is_degraded_though_it_counts_nothing() -> None:
    detector = watching(cluster())
    quiet(detector)
    engine = detector.world.engines[0]
    engine.hung, engine.state = True, "FAILED"
    steps = detector.until(QUIET_S + 40.0)
    assert causes(steps)[-1] is Cause.CRASH_LOOP


def test_too_little_kv_memory_for_the_batch_is_a_misconfiguration() -> None:
    detector = watching(cluster(limits=replace(LIMITS, num_blocks=360)))
    engine = detector.world.engines[0]
    engine.rate_rps = 2.0
    quiet(detector)
    engine.rate_rps, engine.prompt_tokens, engine.output_tokens = 4.0, 120, 700
    steps = detector.until(QUIET_S + 90.0)
    assert kinds(steps, ONE) == ["NORMAL", "MISCONFIGURED"]
    assert causes(steps) == [None, Cause.KV_THRASH]


def test_a_queue_before_a_batch_that_could_be_twice_as_large_is_a_misconfiguration() -> None:
    times = replace(TIMES, base_s=0.03, prefill_token_s=5e-6)
    detector = watching(cluster(limits=replace(LIMITS, max_num_seqs=4), times=times, rate_rps=0.4), times=times)
    quiet(detector)
    detector.world.engines[0].rate_rps = 3.0
    steps = detector.until(QUIET_S + 90.0)
    assert causes(steps)[-1] is Cause.BATCH_SLACK
    assert steps[-1].judgement.kind(ONE) is VerdictKind.MISCONFIGURED


def test_a_leak_that_ends_in_preemption_asks_for_a_restart() -> None:
    detector = watching(cluster(limits=replace(LIMITS, num_blocks=1600)))
    quiet(detector)
    engine = detector.world.engines[0]
    steps = detector.until(QUIET_S + 200.0, each=lambda _: engine.leak(10))
    assert causes(steps)[:2] == [None, Cause.LEAK]
    assert opened(steps)[0].action is SuggestedAction.RESTART


def test_other_prompts_at_the_same_load_are_no_fault() -> None:
    detector = watching(cluster(rate_rps=4.0))
    quiet(detector)
    engine = detector.world.engines[0]
    engine.prompt_tokens, engine.rate_rps = 1100, 2.0
    assert kinds(detector.until(QUIET_S + 150.0), ONE) == ["NORMAL"]
    engine.prompt_tokens, engine.rate_rps = 100, 6.0
    assert kinds(detector.until(QUIET_S + 300.0), ONE) == ["NORMAL"]


def test_a_short_burst_destroys_nothing() -> None:
    detector = watching(cluster())
    quiet(detector)
    engine = detector.world.engines[0]
    engine.rate_rps = 60.0
    steps = detector.until(QUIET_S + 6.0)
    engine.rate_rps = 4.0
    steps += detector.until(QUIET_S + 90.0)
    assert not [step for step in steps for verdict in step.judgement.verdicts.values() if verdict.action in DESTRUCTIVE]
    assert set(kinds(steps, ONE)) <= {"NORMAL", "OVERLOADED"}


def test_a_node_that_is_cut_off_is_one_episode_of_unknowns() -> None:
    detector = watching(cluster(replicas=9, per_node=3))
    quiet(detector)
    detector.world.unreachable.add("node-0")
    steps = detector.until(QUIET_S + 60.0)
    (episode,) = opened(steps)
    assert (episode.root.scope, episode.root.name, episode.kind) == (Scope.NODE, "node-0", VerdictKind.UNKNOWN)
    assert episode.members == {f"replica-{index}" for index in range(3)}
    assert episode.action is SuggestedAction.INSPECT
    assert not steps[-1].judgement.dead
    detector.world.unreachable.clear()
    steps = detector.until(QUIET_S + 120.0)
    assert [each.change for step in steps for each in step.changes] == [Change.CLOSED]


def test_most_nodes_gone_at_once_are_one_episode_and_nothing_is_done() -> None:
    detector = watching(cluster(replicas=6, per_node=2))
    quiet(detector)
    detector.world.unreachable |= {"node-0", "node-1"}
    (episode,) = opened(detector.until(QUIET_S + 60.0))
    assert (episode.root.scope, episode.action) == (Scope.FLEET, SuggestedAction.NONE)
    assert len(episode.members) == 4


def test_a_node_all_of_whose_replicas_are_slow_is_one_episode() -> None:
    detector = watching(cluster(replicas=6, per_node=3))
    quiet(detector)
    for engine in detector.world.engines[:3]:
        engine.slow(2.0)
    steps = detector.until(QUIET_S + 60.0)
    open_ones = detector.watch.book.open
    assert [(each.root.scope, each.root.name) for each in open_ones] == [(Scope.NODE, "node-0")]
    assert len(opened(steps)) == 1
    assert open_ones[0].members == {f"replica-{index}" for index in range(3)}
    assert math.isclose(open_ones[0].since_s, QUIET_S, abs_tol=10.0)


def test_waves_of_load_raise_nothing() -> None:
    detector = watching(cluster())
    engine = detector.world.engines[0]

    def wave(now_s: float) -> None:
        engine.rate_rps = 4.0 + 2.5 * math.sin(now_s / 100.0)

    steps = detector.until(900.0, each=wave)
    assert all(not step.judgement.verdicts for step in steps)
