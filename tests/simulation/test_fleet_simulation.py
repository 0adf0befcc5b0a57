"""The fleet's simulation keeps its promises: nothing is lost, none sees the future, replicas live as in production."""

from __future__ import annotations

import math

import numpy as np
import pytest

from enova_recommender.engine import Finished, FirstToken, Request, Scheduler
from enova_recommender.scaling.bounds import Bounds
from enova_recommender.scaling.situation import Phase, Signal
from enova_recommender.types import VerdictKind
from enova_simulator.cluster.fleet import Fleet
from enova_simulator.cluster.outcome import figures, replicas_over_time
from enova_simulator.cluster.serving import Fate
from enova_simulator.cluster.setup import Fault, Gap, Ill, Paces, SetupError, Telemetry, Traffic
from enova_simulator.cluster.trace import merged
from enova_testing.fleet_runs import (
    LIMITS,
    TABLE,
    Scripted,
    Starts,
    at_times,
    deployment,
    fleet,
    requests,
    run,
    stepwise,
    variant,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first compiles the engines: half a minute


def test_one_replica_serves_as_the_pure_scheduler_does() -> None:
    these = requests(rate=3.0, until_s=120)
    record = run(fleet(deployment(replicas=1)), these)
    scheduler = Scheduler(LIMITS, TABLE)
    for index, at_s in enumerate(these.arrival_s.tolist()):
        prompt, output = int(these.prompt_tokens[index]), int(these.output_tokens[index])
        scheduler.submit(Request(id=str(index), prompt_tokens=prompt, output_tokens=output), at_s)
    events = scheduler.advance(math.inf)
    firsts = {int(event.request.id): event.at_s for event in events if isinstance(event, FirstToken)}
    finishes = {int(event.request.id): event.at_s for event in events if isinstance(event, Finished)}
    rows = record.requested
    assert max(abs(rows.finish_s[index] - at_s) for index, at_s in finishes.items()) < 1e-9
    assert max(abs(rows.arrival_s[i] + rows.first_s[i] - at_s) for i, at_s in firsts.items()) < 1e-9


def test_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    these = requests(rate=8.0)
    setup = fleet(deployment(replicas=3, policy=Scripted(stepwise((60, 4), (150, 2)))))
    one, two = run(setup, these).requested, run(setup, these).requested
    other = run(fleet(deployment(replicas=3), seed=1), these).requested
    assert one.finish_s.tobytes() == two.finish_s.tobytes()
    assert one.finish_s.tobytes() != other.finish_s.tobytes()


@pytest.mark.parametrize("ill", list(Ill))
def test_every_request_has_one_fate_whatever_befalls_replicas(ill: Ill) -> None:
    these = requests(rate=10.0)
    faults = (Fault(at_s=60.0, ill=ill, share=0.4, until_s=140.0, factor=4.0),)
    record = run(fleet(deployment(replicas=3), faults=faults, end_s=400.0), these)
    fates = np.bincount(record.requested.fate, minlength=5)
    assert fates.sum() == len(these)
    assert fates[Fate.OPEN] == 0, "all end after the last arrival"
    assert fates[Fate.SERVED] > 0.9 * len(these)
    if ill is Ill.SLOW:
        assert fates[Fate.CUT] == 0
    else:
        assert 0 < fates[Fate.CUT] <= LIMITS.max_num_seqs, "what had begun to answer breaks off, no more"


def test_future_requests_change_no_earlier_decision() -> None:
    these = requests(rate=6.0)
    other = requests(rate=6.0, seed=8)
    cut = 150.0
    first, second = these.arrival_s < cut, other.arrival_s >= cut
    mixed = at_times(np.concatenate([these.arrival_s[first], other.arrival_s[second]]))
    mixed.prompt_tokens[: first.sum()] = these.prompt_tokens[first]
    mixed.output_tokens[: first.sum()] = these.output_tokens[first]
    seen = []
    for each in (these, mixed):
        policy = Scripted(lambda situation: {"v": 1 + int(np.nansum(situation.demand.arrived[-6:]) / 60)})
        run(fleet(deployment(replicas=2, policy=policy)), each)
        seen.append([(one.now_s, one.target, one.demand.arrived.tobytes()) for one in policy.seen if one.now_s < cut])
    assert seen[0] == seen[1]
    assert len({target for _, target, _ in seen[0]}) > 1


def test_figures_come_late_by_the_metric_delay_and_never_from_a_gap() -> None:
    policy = Scripted(lambda _: {})
    telemetry = Telemetry(delay_s=7.0, gaps=(Gap(start_s=100.0, end_s=150.0),))
    run(fleet(deployment(policy=policy), telemetry=telemetry), requests())
    for situation in policy.seen:
        assert situation.recent.end_s <= situation.now_s - 7.0
        assert situation.recent.end_s > situation.now_s - 7.0 - 5.0
        steps = situation.recent.end_s - 5.0 * np.arange(len(situation.demand.arrived))[::-1]
        inside = (steps > 100.0) & (steps <= 150.0)
        assert np.isnan(situation.demand.arrived[inside]).all()
        assert np.isnan(situation.recent.values[Signal.RUNNING][:, inside]).all()
        assert not np.isnan(situation.demand.arrived[~inside]).any()
    verdicts = {one.now_s: one.verdict for one in policy.seen}
    assert verdicts[130.0] is VerdictKind.UNKNOWN
    assert verdicts[200.0] is VerdictKind.NORMAL


def test_counts_of_a_situation_add_up_to_what_happened() -> None:
    policy = Scripted(lambda _: {}, interval_s=295.0)
    these = requests(rate=5.0, until_s=250.0)
    record = run(fleet(deployment(policy=policy), telemetry=Telemetry(delay_s=0.0)), these)
    [situation] = policy.seen
    assert situation.demand.arrived.sum() == len(these)
    served = record.requested.finish_s <= 295.0
    assert situation.demand.output_tokens.sum() == these.output_tokens[served].sum()
    by_replica = situation.recent.values[Signal.FINISHED]
    assert np.nansum(by_replica) == served.sum()
    tokens = np.nansum(situation.recent.values[Signal.GENERATION_TOKENS])
    assert tokens == these.output_tokens[served].sum()


def test_scaling_down_drains_and_cuts_nothing() -> None:
    record = run(fleet(deployment(replicas=4, policy=Scripted(stepwise((100, 1))))), requests(rate=4.0))
    assert not (record.requested.fate == Fate.CUT).any()
    holding, _ = replicas_over_time(record, "d", step_s=1.0)
    assert holding[99] == 4
    assert holding[160] == 1


def test_starting_replicas_leave_before_ready_ones_and_are_paid_until_then() -> None:
    policy = Scripted(stepwise((50, 4), (80, 2)))
    record = run(fleet(deployment(replicas=2, policy=policy)), requests())
    gone = [one for one in record.lived if not math.isnan(one.gone_s)]
    assert [math.isnan(one.ready_s) for one in gone] == [True, True]
    assert [(one.started_s, one.gone_s) for one in gone] == [(50.0, 80.0)] * 2
    assert figures(record, "d", warm_up_s=0.0).gpu_hours == pytest.approx((2 * 300 + 2 * 30) / 3600)


def test_started_replicas_serve_after_their_own_start_up() -> None:
    starts = Starts(usual_s=60.0, others={1: 90.0})
    setup = fleet(deployment(
        replicas=1, variants=(variant(start_ups=starts),), policy=Scripted(stepwise((50, 3)))
    ))  # fmt: skip
    record = run(setup, requests())
    assert sorted(one.ready_s for one in record.lived) == [0.0, 110.0, 140.0]


def test_scale_to_zero_holds_what_fits_and_wakes() -> None:
    policy = Scripted(lambda situation: {"v": 1 if situation.held else 0})
    calls = at_times([100.0 + 0.01 * index for index in range(130)])
    record = run(fleet(deployment(replicas=0, policy=policy)), calls)
    fates = np.bincount(record.requested.fate, minlength=5)
    assert fates[Fate.SERVED] == 100
    assert fates[Fate.REFUSED] == 30
    assert record.lived[0].started_s == 100.0, "the first held request wakes it at once"
    assert record.requested.first_s[0] == pytest.approx(61.0, abs=1.5)


def test_held_requests_are_refused_after_their_time() -> None:
    setup = fleet(deployment(replicas=0), paces=Paces(held_s=50.0))
    record = run(setup, at_times([100.0, 120.0]))
    assert record.requested.fate.tolist() == [Fate.REFUSED, Fate.REFUSED]


def test_a_full_fleet_refuses_and_never_exceeds_its_slots() -> None:
    setup = fleet(deployment(replicas=1, queue_limit=4))
    record = run(setup, at_times(np.full(40, 10.0)))
    fates = np.bincount(record.requested.fate, minlength=5)
    assert fates[Fate.SERVED] == LIMITS.max_num_seqs + 4
    assert fates[Fate.REFUSED] == 40 - LIMITS.max_num_seqs - 4


def test_lower_priority_value_goes_first_where_slots_are_short() -> None:
    low, high = at_times(np.full(36, 10.0), priority=5), at_times(np.full(4, 10.5), priority=0)
    both, _ = merged([low, high])
    record = run(fleet(deployment(replicas=1)), both)
    urgent = np.flatnonzero(both.priority == 0)
    waited = np.flatnonzero(both.priority == 5)[LIMITS.max_num_seqs :]
    firsts = record.requested.arrival_s + record.requested.first_s
    assert firsts[urgent].max() <= firsts[waited].min()
    assert firsts[urgent].max() < firsts[waited].max()


def test_deployments_share_gpus_by_priority() -> None:
    urgent = deployment("urgent", replicas=1, priority=0, policy=Scripted(stepwise((100, 3))))
    patient = deployment("patient", replicas=1, priority=1, policy=Scripted(stepwise((50, 4), (100, 1))))
    both, places = merged([requests(seed=1), requests(seed=2)])
    record = Fleet(fleet(urgent, patient, gpus=4), Traffic(requests=both, deployment=places)).run()
    holding = {name: replicas_over_time(record, name, step_s=1.0)[0] for name in ("urgent", "patient")}
    assert max(holding["urgent"] + holding["patient"]) <= 4
    assert holding["patient"][90] == 3
    assert holding["urgent"][250] == 3


def test_a_lost_replica_is_replaced_elsewhere_and_its_gpu_comes_back() -> None:
    faults = (Fault(at_s=50.0, ill=Ill.LOST, share=0.0, until_s=200.0),)
    policy = Scripted(lambda _: {})
    record = run(fleet(deployment(replicas=2, policy=policy), gpus=3, faults=faults), requests())
    assert [one.created_s for one in record.lived] == [0.0, 0.0, 80.0]
    room = {situation.now_s: situation.variants[0].places for situation in policy.seen}
    assert room[190.0] == 2
    assert room[210.0] == 3


def test_a_hung_replica_is_told_then_restarted() -> None:
    faults = (Fault(at_s=50.0, ill=Ill.HUNG, share=0.0),)
    policy = Scripted(lambda _: {})
    record = run(fleet(deployment(replicas=2, policy=policy), faults=faults), requests(rate=2.0))
    ill = {one.now_s: [each.cause for each in one.replicas if each.cause] for one in policy.seen}
    assert ill[60.0] == []
    assert ill[70.0] == ["HUNG"]
    phases = {one.now_s: sorted(each.phase for each in one.replicas) for one in policy.seen}
    assert phases[90.0] == [Phase.READY, Phase.STARTING]
    assert phases[150.0] == [Phase.READY, Phase.READY]
    assert len(record.lived) == 2


def test_a_straggler_takes_less_and_serves_slower() -> None:
    faults = (Fault(at_s=20.0, ill=Ill.SLOW, share=0.0, factor=3.0),)
    policy = Scripted(lambda _: {}, interval_s=290.0)
    run(fleet(deployment(replicas=2, policy=policy), faults=faults), requests(rate=6.0))
    finished = np.nansum(policy.seen[0].recent.values[Signal.FINISHED], axis=1)
    gaps = np.nanmean(policy.seen[0].recent.values[Signal.TPOT_S], axis=1)
    assert finished[0] < finished[1]
    assert gaps[0] > 1.5 * gaps[1]


def test_replacement_is_ready_before_the_replica_goes() -> None:
    policy = Scripted(lambda _: {}, replace=("d/v-0",))
    record = run(fleet(deployment(replicas=1, policy=policy)), requests(rate=2.0))
    old, new = record.lived
    assert old.gone_s >= new.ready_s
    assert not math.isnan(old.gone_s)


@pytest.mark.parametrize("wished", [-1, math.nan, math.inf, 2.5])
def test_a_wish_that_makes_no_sense_changes_nothing_and_is_kept(wished: float) -> None:
    record = run(fleet(deployment(replicas=2, policy=Scripted(lambda _: {"v": wished}))), requests())
    assert record.acts["d"].done == []
    assert figures(record, "d", warm_up_s=0.0).nonsense > 0
    assert len(record.lived) == 2


def test_wishes_beyond_bounds_are_clamped() -> None:
    setup = deployment(replicas=2, bounds=Bounds(min_replicas=2, max_replicas=3),
                       policy=Scripted(stepwise((50, 9), (200, 0))))  # fmt: skip
    record = run(fleet(setup), requests())
    assert [act.after for act in record.acts["d"].done] == [3, 2]


def test_requests_that_no_engine_could_hold_are_impossible() -> None:
    these = at_times([10.0, 11.0])
    these.prompt_tokens[0] = 100_000
    assert run(fleet(), these).requested.fate.tolist() == [Fate.IMPOSSIBLE, Fate.SERVED]


def test_a_fleet_that_cannot_hold_one_replica_is_refused() -> None:
    with pytest.raises(SetupError, match="cannot hold one replica of d: it needs 1 x G"):
        fleet(gpus=0)


def test_contradicting_bounds_are_refused() -> None:
    with pytest.raises(SetupError, match="min 3 and max 2 contradict"):
        fleet(deployment(bounds=Bounds(min_replicas=3, max_replicas=2)))


def test_unsorted_requests_are_refused() -> None:
    with pytest.raises(SetupError, match="not sorted"):
        run(fleet(), at_times([5.0, 4.0]))


def test_attainment_counts_all_that_were_sent() -> None:
    record = run(fleet(deployment(replicas=1, queue_limit=0)), at_times([*range(10, 20), *[100.0] * 30]))
    rows = record.requested
    good = (rows.fate == Fate.SERVED) & (rows.first_s <= 1.0) & (rows.tpot_s <= 0.05)
    told = figures(record, "d", warm_up_s=0.0)
    assert told.attainment == pytest.approx(good.sum() / 40)
    assert told.refused == 14
    assert told.worst_5_minutes == pytest.approx(told.attainment)


def test_an_idle_fleet_of_zero_with_no_requests_ends() -> None:
    record = run(fleet(deployment(replicas=0)), at_times([]))
    assert math.isnan(figures(record, "d").attainment)
