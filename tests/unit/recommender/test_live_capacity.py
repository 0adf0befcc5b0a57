"""Live capacity is told when frames prove it, with its interval; else why not, and what was carried."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from enova_recommender.recommend.live import (
    DRIFT_SHARE,
    Doubt,
    Evidence,
    LiveCapacity,
    NotYet,
    ReplicaFrames,
    live_capacity,
)

BATCH, SERVICE_S = 60, 15.0
LIMIT_RPS = BATCH / SERVICE_S
Floats = npt.NDArray[np.float64]


def frames(offered_rps: Floats, *, seed: int = 1, interval_s: float = 1.0, missing: float = 0.0) -> ReplicaFrames:
    """An engine with BATCH places, in which a request takes SERVICE_S, under these arrival rates."""
    draw = np.random.default_rng(seed)
    waiting = 0.0
    running = 0.0
    begun: list[float] = []
    columns = np.full((4, len(offered_rps)), np.nan)
    lag = round(SERVICE_S / interval_s)
    for step, rate in enumerate(offered_rps):
        waiting += draw.poisson(rate * interval_s)
        done = begun[step - lag] if step >= lag else 0.0
        running -= done
        started = min(waiting, BATCH - running)
        waiting -= started
        begun.append(started)
        running += started
        columns[:, step] = done, running, waiting, SERVICE_S if done else np.nan
    columns[:, draw.random(len(offered_rps)) < missing] = np.nan
    return ReplicaFrames(
        interval_s=interval_s, finished=columns[0], running=columns[1], waiting=columns[2], latency_s=columns[3]
    )


def closed(users: Floats, rates: Floats, *, seed: int = 1) -> ReplicaFrames:
    """Frames of 1 s in which `users` requests are in the engine and finish at these rates; nobody waits."""
    draw = np.random.default_rng(seed)
    return ReplicaFrames(
        interval_s=1.0, finished=draw.poisson(rates).astype(np.float64), running=users, waiting=np.zeros(len(users)),
        latency_s=users / rates,
    )  # fmt: skip


def capacity(*replicas: ReplicaFrames) -> LiveCapacity:
    """The answer, which must be one."""
    found = live_capacity(replicas)
    assert isinstance(found, LiveCapacity), found
    return found


def doubt(*replicas: ReplicaFrames) -> NotYet:
    """The refusal, which must be one."""
    found = live_capacity(replicas)
    assert isinstance(found, NotYet), found
    return found


def test_what_finishes_while_requests_wait_is_the_limit() -> None:
    found = capacity(frames(np.concatenate([np.full(100, 2.0), np.full(300, 6.0)])))
    assert found.evidence is Evidence.QUEUE
    assert found.n_limit_rps.value == pytest.approx(LIMIT_RPS, rel=0.1)
    assert found.n_limit_rps.low <= found.n_limit_rps.value <= found.n_limit_rps.high
    assert found.saturation_load.value == pytest.approx(BATCH, rel=0.1)


def test_max_num_seqs_follows_by_littles_law() -> None:
    found = capacity(frames(np.concatenate([np.linspace(2.0, 4.0, 200), np.full(300, 6.0)])))
    assert found.max_num_seqs == int(np.ceil(found.n_limit_rps.value * found.t_limit_s.value - 1e-9))
    assert found.t_limit_s.value == pytest.approx(SERVICE_S, rel=0.15)


def test_missing_frames_are_not_zeros() -> None:
    whole, holed = (
        capacity(frames(np.full(400, 6.0), missing=share)).n_limit_rps.value for share in (0.0, 0.2)
    )
    assert holed == pytest.approx(whole, rel=0.1)


def test_below_capacity_nothing_is_told_but_what_was_carried() -> None:
    for seed in range(5):
        found = doubt(frames(np.full(400, 2.5), seed=seed))
        assert found.doubt is Doubt.NOT_SATURATED_YET
        assert 2.0 < found.at_least_rps <= LIMIT_RPS


def test_a_short_queue_is_a_burst() -> None:
    load = np.full(300, 2.0)
    load[100:103] = 20.0
    assert doubt(frames(load)).doubt is Doubt.NOT_SATURATED_YET


def test_of_a_queue_shorter_than_two_requests_the_interval_is_wide() -> None:
    load = np.full(300, 3.0)
    load[100:120] = 8.0
    found = capacity(frames(load))
    assert found.n_limit_rps.low <= LIMIT_RPS <= found.n_limit_rps.high


def test_a_plateau_without_a_queue_is_seen() -> None:
    users = np.repeat(np.array([2, 4, 8, 16, 24, 32, 48, 64, 96, 128.0]), 60)
    rates = 5.0 * users / (users + 2)
    found = capacity(closed(users, rates))
    assert found.evidence is Evidence.PLATEAU
    assert found.n_limit_rps.value == pytest.approx(5.0, rel=0.1)


def test_what_may_still_grow_on_a_plateau_is_within_its_interval() -> None:
    users = np.repeat(np.array([2, 4, 8, 16, 24, 32, 48, 64, 96, 128.0]), 60)
    rates = 5.0 * users / (users + 6)  # still grows: by an eighth from 30 users to 128
    found = capacity(closed(users, rates))
    assert found.evidence is Evidence.PLATEAU
    assert found.n_limit_rps.value < rates[-1] <= found.n_limit_rps.high


def test_few_blocks_and_long_observation_leave_a_wider_interval_than_chance_alone() -> None:
    short, long = (capacity(frames(np.full(length, 8.0))).n_limit_rps for length in (60, 6000))
    assert (short.high - short.low) > (long.high - long.low)
    assert (long.high - long.low) / 2 / long.value >= DRIFT_SHARE


def test_a_rate_that_follows_the_load_is_no_plateau() -> None:
    users = np.repeat(np.array([2, 4, 8, 16, 24, 32, 48, 64, 96, 128.0]), 60)
    assert doubt(closed(users, users / 20)).doubt is Doubt.NOT_SATURATED_YET


def test_a_load_that_does_not_vary_proves_nothing() -> None:
    users = np.full(600, 40.0)
    assert doubt(closed(users, np.full(600, 4.0))).doubt is Doubt.NOT_SATURATED_YET


def test_too_little_is_refused_with_the_count() -> None:
    few = doubt(frames(np.full(10, 6.0)))
    assert (few.doubt, few.frames) == (Doubt.TOO_FEW_FRAMES, 10)
    idle = doubt(frames(np.zeros(100)))
    assert idle.doubt is Doubt.TOO_FEW_REQUESTS
    assert "0 requests finished" in idle.reason


def test_replicas_of_one_configuration_are_pooled() -> None:
    one = capacity(frames(np.full(150, 6.0), seed=1))
    four = capacity(*(frames(np.full(150, 6.0), seed=seed) for seed in range(4)))
    assert four.frames == 4 * one.frames
    width = [found.n_limit_rps.high - found.n_limit_rps.low for found in (four, one)]
    assert width[0] < width[1]


def test_the_same_frames_give_the_same_answer() -> None:
    assert capacity(frames(np.full(300, 6.0))) == capacity(frames(np.full(300, 6.0)))


@pytest.mark.parametrize("field", ["running", "waiting", "latency_s"])
def test_columns_of_unequal_length_are_named(field: str) -> None:
    columns = {name: np.zeros(5) for name in ("finished", "running", "waiting", "latency_s")}
    with pytest.raises(ValueError, match=field):
        ReplicaFrames(interval_s=1.0, **{**columns, field: np.zeros(4)})


def test_negative_figures_and_intervals_are_named() -> None:
    columns = {name: np.zeros(5) for name in ("finished", "running", "waiting", "latency_s")}
    with pytest.raises(ValueError, match="interval_s"):
        ReplicaFrames(interval_s=0.0, **columns)
    with pytest.raises(ValueError, match="running"):
        ReplicaFrames(interval_s=1.0, **{**columns, "running": np.full(5, -1.0)})
