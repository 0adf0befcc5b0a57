"""The scheduler's rules one by one: who is admitted, preempted, cached, refused, and when."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from enova_recommender.engine import (
    Admitted,
    Event,
    Finished,
    FirstToken,
    Limits,
    Policy,
    Preempted,
    Rejected,
    Request,
    Resumed,
    Scheduler,
    Stepped,
)
from enova_recommender.engine.blocks import BlockPool
from enova_recommender.performance import Affine, Slowed

SECOND = Affine(base_s=1.0)  # every step takes one second


def limits(
    *, num_blocks: int = 1000, max_num_seqs: int = 8, max_num_batched_tokens: int = 100,
    enable_chunked_prefill: bool = True, scheduling_policy: Policy = Policy.FCFS,
    max_num_queued_reqs: int | None = None,
) -> Limits:  # fmt: skip
    return Limits(
        num_blocks=num_blocks,
        block_size=4,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_chunked_prefill=enable_chunked_prefill,
        scheduling_policy=scheduling_policy,
        max_num_queued_reqs=max_num_queued_reqs,
    )


def request(name: str, prompt: int = 4, output: int = 3, priority: int = 0, hashes: tuple[int, ...] = ()) -> Request:
    return Request(id=name, prompt_tokens=prompt, output_tokens=output, priority=priority, block_hashes=hashes)


def moments(events: list[Event], kind: type[Event]) -> list[tuple[float, str]]:
    named = (event for event in events if not isinstance(event, Stepped))
    return [(event.at_s, event.request.id) for event in named if isinstance(event, kind)]


def test_a_request_is_prefilled_in_one_step_and_then_gets_a_token_a_step() -> None:
    scheduler = Scheduler(limits(), SECOND)
    scheduler.submit(request("a"), 2.0)
    assert scheduler.next_event() == 2.0
    events = scheduler.advance(math.inf)
    assert moments(events, Admitted) == [(2.0, "a")]
    assert moments(events, FirstToken) == [(3.0, "a")]
    assert moments(events, Finished) == [(5.0, "a")]
    assert scheduler.next_event() == math.inf


def test_a_step_in_flight_ends_later_and_tells_nothing_before() -> None:
    scheduler = Scheduler(limits(), SECOND)
    scheduler.submit(request("a"), 0.0)
    assert moments(scheduler.advance(0.9), FirstToken) == []
    assert scheduler.step_started_s == 0.0
    assert moments(scheduler.advance(1.0), FirstToken) == [(1.0, "a")]
    assert scheduler.generated_tokens("a") == 1
    assert list(scheduler.progress()) == [("a", 1)]


def test_who_arrives_during_a_step_waits_for_its_end() -> None:
    scheduler = Scheduler(limits(), SECOND)
    scheduler.submit(request("a", output=10), 0.0)
    scheduler.submit(request("b"), 3.4)
    assert moments(scheduler.advance(math.inf), Admitted) == [(0.0, "a"), (4.0, "b")]


def test_a_long_prompt_is_cut_to_the_tokens_of_a_step_and_others_fill_the_rest() -> None:
    scheduler = Scheduler(limits(max_num_batched_tokens=100), SECOND)
    scheduler.submit(request("long", prompt=250, output=1), 0.0)
    scheduler.submit(request("short", prompt=10, output=1), 0.0)
    events = scheduler.advance(math.inf)
    assert moments(events, FirstToken) == [(3.0, "long"), (3.0, "short")]
    assert moments(events, Admitted) == [(0.0, "long"), (2.0, "short")]
    assert [event.prefill_tokens for event in events if isinstance(event, Stepped)] == [100, 100, 60]


def test_without_chunks_a_prompt_waits_until_it_fits_whole() -> None:
    scheduler = Scheduler(limits(enable_chunked_prefill=False), SECOND)
    scheduler.submit(request("a", prompt=60, output=1), 0.0)
    scheduler.submit(request("b", prompt=60, output=1), 0.0)
    assert moments(scheduler.advance(math.inf), FirstToken) == [(1.0, "a"), (2.0, "b")]
    with pytest.raises(ValueError, match="may not be split"):
        scheduler.submit(request("c", prompt=101), 5.0)


def test_beyond_max_num_seqs_requests_wait() -> None:
    scheduler = Scheduler(limits(max_num_seqs=2), SECOND)
    for name in ("a", "b", "c"):
        scheduler.submit(request(name), 0.0)
    scheduler.advance(0.5)
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    assert moments(scheduler.advance(math.inf), Admitted) == [(3.0, "c")]


@pytest.mark.parametrize(("policy", "order"), [(Policy.FCFS, ["a", "b", "c"]), (Policy.PRIORITY, ["a", "c", "b"])])
def test_priority_decides_who_is_admitted_first(policy: Policy, order: list[str]) -> None:
    scheduler = Scheduler(limits(max_num_seqs=1, scheduling_policy=policy), SECOND)
    scheduler.submit(request("a", priority=9), 0.0)
    scheduler.submit(request("b", priority=5), 0.1)
    scheduler.submit(request("c", priority=-5), 0.2)
    assert [name for _, name in moments(scheduler.advance(math.inf), Admitted)] == order


@pytest.mark.parametrize(("policy", "victim"), [(Policy.FCFS, "b"), (Policy.PRIORITY, "a")])
def test_without_blocks_the_newest_or_least_urgent_is_preempted_and_computed_again(policy: Policy, victim: str) -> None:
    # Two sequences of 2 + 2 blocks each fit; the third block of each does not.
    scheduler = Scheduler(limits(num_blocks=5, scheduling_policy=policy), SECOND)
    scheduler.submit(request("a", prompt=8, output=6, priority=1), 0.0)
    scheduler.submit(request("b", prompt=8, output=6, priority=0), 0.0)
    events = scheduler.advance(math.inf)
    assert [name for _, name in moments(events, Preempted)] == [victim]
    again = [event for event in events if isinstance(event, Admitted) and event.again]
    assert [event.request.id for event in again] == [victim]
    finished = [name for _, name in moments(events, Finished)]
    assert finished[-1] == victim
    assert {event.preemptions for event in events if isinstance(event, Finished) and event.request.id == victim} == {1}
    assert sorted(moments(events, FirstToken)) == [(1.0, "a"), (1.0, "b")]
    assert [name for _, name in moments(events, Resumed)] == [victim]


def test_admission_leaves_the_watermark_free_while_others_run() -> None:
    scheduler = Scheduler(replace(limits(num_blocks=10), watermark=0.5), SECOND)
    scheduler.submit(request("first", prompt=32, output=2), 0.0)
    scheduler.submit(request("second", prompt=4, output=1), 0.0)
    events = scheduler.advance(math.inf)
    assert moments(events, Admitted) == [(0.0, "first"), (2.0, "second")]


def test_capacity_under_pressure_is_that_of_a_real_vllm() -> None:
    """100 streams of 8 + 200 tokens on 23 usable blocks of 32.

    vLLM 0.32.0 on a CPU took 3,511 and 3,552 steps with 323 and 342 preemptions in two runs.
    """
    sizes = Limits(num_blocks=23, block_size=32, max_num_seqs=16, max_num_batched_tokens=2048)
    scheduler = Scheduler(sizes, Affine(base_s=0.0012, sequence_s=0.0002))
    for index in range(100):
        scheduler.submit(request(str(index), prompt=8, output=200), index * 0.001)
    events = scheduler.advance(math.inf)
    steps = sum(event.count for event in events if isinstance(event, Stepped))
    assert 3400 < steps < 3650
    assert 300 < len(moments(events, Preempted)) < 370


def test_a_cached_prefix_is_not_computed_again_but_the_last_token_always_is() -> None:
    scheduler = Scheduler(limits(), SECOND)
    scheduler.submit(request("a", prompt=12, output=1, hashes=(1, 2, 3)), 0.0)
    scheduler.submit(request("b", prompt=12, output=1, hashes=(1, 2, 3)), 5.0)
    scheduler.submit(request("c", prompt=14, output=1, hashes=(1, 2, 9)), 9.0)
    events = scheduler.advance(math.inf)
    assert [event.cached_tokens for event in events if isinstance(event, Admitted)] == [0, 8, 8]
    assert [event.prefill_tokens for event in events if isinstance(event, Stepped)] == [12, 4, 6]
    scheduler.reset_prefix_cache()
    scheduler.submit(request("d", prompt=12, output=1, hashes=(1, 2, 3)), 20.0)
    assert [event.cached_tokens for event in scheduler.advance(math.inf) if isinstance(event, Admitted)] == [0]


def test_a_full_queue_rejects_what_arrives() -> None:
    scheduler = Scheduler(limits(max_num_seqs=1, max_num_queued_reqs=2), SECOND)
    for name in ("a", "b", "c"):
        scheduler.submit(request(name), 0.0)
    events = scheduler.advance(math.inf)
    assert moments(events, Rejected) == [(0.0, "c")]
    assert [name for _, name in moments(events, Finished)] == ["a", "b"]


def test_cancelling_frees_the_place_at_once() -> None:
    scheduler = Scheduler(limits(max_num_seqs=1), SECOND)
    scheduler.submit(request("a", output=100), 0.0)
    scheduler.submit(request("b"), 0.0)
    scheduler.submit(request("later"), 50.0)
    scheduler.advance(2.5)
    assert scheduler.cancel("a")
    assert scheduler.cancel("later")
    assert not scheduler.cancel("nobody")
    scheduler.check()
    events = scheduler.advance(math.inf)
    assert moments(events, Admitted) == [(3.0, "b")]
    assert [name for _, name in moments(events, Finished)] == ["b"]


def test_who_waits_for_a_place_that_a_cancellation_frees_is_the_next_event() -> None:
    scheduler = Scheduler(limits(max_num_seqs=2), SECOND)
    for name in ("a", "b", "c"):
        scheduler.submit(request(name, output=50), 0.0)
    scheduler.advance(5.5)
    assert scheduler.next_event() == 50.0
    assert scheduler.cancel("b")
    assert scheduler.next_event() == 6.0
    assert moments(scheduler.advance(7.0), Admitted) == [(6.0, "c")]


def test_who_was_not_let_in_beside_a_preemption_is_the_next_event() -> None:
    scheduler = Scheduler(limits(num_blocks=6, scheduling_policy=Policy.PRIORITY), SECOND)
    scheduler.submit(request("a", output=20), 0.0)
    scheduler.submit(request("b", output=12, priority=1), 0.0)
    scheduler.submit(request("c"), 8.5)
    assert moments(scheduler.advance(9.5), Preempted) == [(9.0, "b")]
    assert scheduler.next_event() == 10.0
    assert moments(scheduler.advance(10.0), Admitted) == [(10.0, "c")]


def test_new_step_times_hold_from_the_next_step_on() -> None:
    scheduler = Scheduler(limits(), SECOND)
    scheduler.submit(request("a", output=4), 0.0)
    scheduler.advance(1.5)
    scheduler.times = Slowed(times=SECOND, factor=10)
    assert moments(scheduler.advance(math.inf), Finished) == [(22.0, "a")]


def test_withheld_blocks_are_lost_for_good() -> None:
    scheduler = Scheduler(limits(num_blocks=10), SECOND)
    assert scheduler.withhold_blocks(8) == 8
    scheduler.submit(request("a", prompt=12), 0.0)
    assert scheduler.advance(100.0) == []
    assert scheduler.waiting == 1
    assert scheduler.next_event() == math.inf


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (request("a", prompt=0), "at least one token"),
        (request("a", output=0), "at least one token"),
        (request("a", prompt=3998, output=4), "more KV blocks than there are"),
    ],
)
def test_what_can_never_be_computed_is_refused(asked: Request, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Scheduler(limits(), SECOND).submit(asked, 0.0)


def test_time_and_ids_are_kept_straight() -> None:
    scheduler = Scheduler(limits(), SECOND)
    scheduler.submit(request("a", output=9), 1.0)
    with pytest.raises(ValueError, match="this id is in use"):
        scheduler.submit(request("a"), 2.0)
    scheduler.advance(3.0)
    with pytest.raises(ValueError, match="time has advanced"):
        scheduler.submit(request("b"), 2.0)
    with pytest.raises(ValueError, match="cannot go back"):
        scheduler.advance(2.0)


def test_limits_must_make_sense() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        limits(max_num_seqs=200)
    with pytest.raises(ValueError, match="at least 1"):
        limits(num_blocks=0)


def test_the_least_recently_used_cached_block_is_blanked_first() -> None:
    pool = BlockPool(4)
    pool.take(4)
    for block_hash in (1, 2, 3):
        assert pool.publish(block_hash)
    assert not pool.publish(1)
    pool.give_back(1, (1, 2, 3))
    pool.check()
    pool.take(2)
    assert pool.cached_prefix((1, 2, 3), 3) == 2
    pool.hold((1, 2))
    pool.check()
    assert (pool.free, pool.used) == (0, 4)
