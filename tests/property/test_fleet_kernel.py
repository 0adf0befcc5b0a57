"""The compiled engines of the fleet's simulation do what the pure scheduler does, event for event."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from enova_recommender.performance import Affine, Slowed
from enova_simulator.cluster.engines import Engines, Happened, Kind, Requests
from enova_simulator.cluster.kernel import columns as at
from enova_simulator.cluster.tables import Tabulated, tabulated
from enova_testing.examples import examples

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first compiles the engines: half a minute

EVERYTHING = at.LOG_ADMITTED | at.LOG_FIRST | at.LOG_RESUMED | at.LOG_PREEMPTED | at.LOG_FINISHED
KINDS = {
    Admitted: at.LOG_ADMITTED, FirstToken: at.LOG_FIRST, Resumed: at.LOG_RESUMED, Preempted: at.LOG_PREEMPTED,
    Finished: at.LOG_FINISHED,
}  # fmt: skip
TIMES = Affine(base_s=0.01, prefill_token_s=6e-5, prefill_pair_s=4e-9, sequence_s=2.5e-4, context_token_s=8e-8)
MAX_TOKENS = 96
TABLE: Tabulated = tabulated(TIMES, max_num_seqs=8, max_num_batched_tokens=MAX_TOKENS)
TOLERANCE_S = 1e-9

limits = st.builds(
    Limits,
    num_blocks=st.integers(20, 60),
    block_size=st.sampled_from([4, 8]),
    max_num_seqs=st.integers(1, 8),
    max_num_batched_tokens=st.sampled_from([16, 40, MAX_TOKENS]),
    enable_chunked_prefill=st.booleans(),
    enable_prefix_caching=st.booleans(),
    scheduling_policy=st.sampled_from(list(Policy)),
    watermark=st.sampled_from([0.0, 0.05]),
)


def drawn(seed: int, limits: Limits, count: int) -> tuple[list[tuple[float, Request]], Requests]:
    """Equal requests for both: some share the beginning of their prompts."""
    draw = random.Random(seed)
    longest = min(70, limits.num_blocks * limits.block_size - 20)
    if not limits.enable_chunked_prefill:
        longest = min(longest, limits.max_num_batched_tokens)
    plain: list[tuple[float, Request]] = []
    at_s = 0.0
    for index in range(count):
        at_s += draw.choice([0.0, draw.expovariate(20.0), draw.expovariate(2.0)])
        prompt = draw.randint(1, longest)
        family = draw.randrange(3)
        same = draw.randint(0, prompt // limits.block_size)
        hashes = tuple(
            (1000 * family + block) if block < same else (10_000 + 100 * index + block)
            for block in range(prompt // limits.block_size)
        )
        plain.append((at_s, Request(
            id=str(index), prompt_tokens=prompt, output_tokens=draw.randint(1, 20), priority=draw.randrange(3),
            block_hashes=hashes if limits.enable_prefix_caching else (),
        )))  # fmt: skip
    return plain, requests_of(plain)


def requests_of(plain: list[tuple[float, Request]]) -> Requests:
    hashes = [block for _, request in plain for block in request.block_hashes]
    return Requests(
        arrival_s=np.array([at_s for at_s, _ in plain]),
        prompt_tokens=np.array([request.prompt_tokens for _, request in plain], dtype=np.int64),
        output_tokens=np.array([request.output_tokens for _, request in plain], dtype=np.int64),
        priority=np.array([request.priority for _, request in plain], dtype=np.int64),
        hashes=np.array(hashes, dtype=np.int64),
        hash_ends=np.cumsum([len(request.block_hashes) for _, request in plain]).astype(np.int64),
    )


def pure(plain: list[tuple[float, Request]], limits: Limits, moments: list[float], factor: float) -> list[Event]:
    """What the pure scheduler tells when time stops at every arrival and at these moments besides."""
    scheduler = Scheduler(limits, Slowed(times=TABLE, factor=factor))
    events: list[Event] = []
    stops = sorted({*moments, *(at_s for at_s, _ in plain)})
    waiting = list(plain)
    for stop_s in stops:
        events += scheduler.advance(stop_s)
        while waiting and waiting[0][0] == stop_s:
            at_s, request = waiting.pop(0)
            scheduler.submit(request, at_s)
    return events + scheduler.advance(1e9)


def passed(engines: Engines, until_s: float) -> list[Happened]:
    """What happens until then."""
    happened: list[Happened] = []
    while True:
        engines.advance(until_s)
        happened += engines.happened()
        if not engines.stopped:
            return happened


def compiled(requests: Requests, limits: Limits, moments: list[float], factor: float) -> list[Happened]:
    engines = Engines([Kind(limits=limits, times=TABLE)], requests, count=2, telling=EVERYTHING)
    engines.slow(1, factor)
    happened: list[Happened] = []
    index = 0
    for stop_s in sorted({*moments, *requests.arrival_s.tolist()}):
        happened += passed(engines, stop_s)
        while index < len(requests) and requests.arrival_s[index] == stop_s:
            engines.submit(1, index, stop_s)
            index += 1
        happened += engines.happened()
    happened += passed(engines, 1e9)
    state = engines.state
    assert engines.inside(1) == [] or not limits.enable_chunked_prefill, "only what outgrew a step may wait for ever"
    pool = state.engines[1, [at.BLANK, at.PRIVATE, at.SHARED, at.IDLE]]
    assert pool.sum() == limits.num_blocks, "no block is lost"
    return happened


@examples(60)
@given(
    limits=limits, seed=st.integers(0, 10_000), count=st.integers(1, 40),
    moments=st.lists(st.floats(0.0, 5.0), max_size=5), factor=st.sampled_from([1.0, 1.7]),
)  # fmt: skip
def test_compiled_engine_tells_what_the_pure_scheduler_tells(
    limits: Limits, seed: int, count: int, moments: list[float], factor: float
) -> None:
    plain, requests = drawn(seed, limits, count)
    expected = [
        (KINDS[type(event)], int(event.request.id), event.at_s)
        for event in pure(plain, limits, moments, factor)
        if not isinstance(event, Stepped | Rejected)
    ]
    found = compiled(requests, limits, moments, factor)
    assert [(kind, request) for kind, _, request, _ in found] == [(kind, request) for kind, request, _ in expected]
    for (_, _, _, found_s), (_, _, expected_s) in zip(found, expected, strict=True):
        assert found_s == pytest.approx(expected_s, abs=TOLERANCE_S)
