"""Who waits, who decodes together, and who leaves the batch."""

from __future__ import annotations

import numpy as np

from enova_simulator.cluster.kernel import columns as at
from enova_simulator.cluster.kernel.blocks import blocks_of, free, give_back
from enova_simulator.cluster.kernel.state import State, compiled


@compiled
def _before(state: State, one: int, other: int, by_priority: int) -> bool:
    """Whether one request is to be admitted before another."""
    first, second = state.requests[one], state.requests[other]
    if by_priority and first[at.PRIORITY] != second[at.PRIORITY]:
        return bool(first[at.PRIORITY] < second[at.PRIORITY])
    if state.times[one, at.QUEUED] != state.times[other, at.QUEUED]:
        return bool(state.times[one, at.QUEUED] < state.times[other, at.QUEUED])
    return bool(first[at.ORDER] < second[at.ORDER])


@compiled
def enqueue(state: State, replica: int, request: int) -> None:
    """Put a request in its place: one that was preempted belongs near the head, a new one near the tail."""
    engine, rows = state.engines[replica], state.requests
    by_priority = state.limits[engine[at.KIND], at.BY_PRIORITY]
    if rows[request, at.PREEMPTED]:
        after = engine[at.HEAD]
        while after >= 0 and _before(state, after, request, by_priority):
            after = rows[after, at.NEXT_WAITING]
        before = rows[after, at.PREVIOUS_WAITING] if after >= 0 else engine[at.TAIL]
    else:
        before = engine[at.TAIL]
        while before >= 0 and _before(state, request, before, by_priority):
            before = rows[before, at.PREVIOUS_WAITING]
        after = rows[before, at.NEXT_WAITING] if before >= 0 else engine[at.HEAD]
    rows[request, at.PREVIOUS_WAITING] = before
    rows[request, at.NEXT_WAITING] = after
    if before >= 0:
        rows[before, at.NEXT_WAITING] = request
    else:
        engine[at.HEAD] = request
    if after >= 0:
        rows[after, at.PREVIOUS_WAITING] = request
    else:
        engine[at.TAIL] = request
    engine[at.WAITING] += 1


@compiled
def pop_head(state: State, replica: int) -> None:
    """Take the first out of the queue."""
    engine, rows = state.engines[replica], state.requests
    engine[at.HEAD] = rows[engine[at.HEAD], at.NEXT_WAITING]
    if engine[at.HEAD] >= 0:
        rows[engine[at.HEAD], at.PREVIOUS_WAITING] = -1
    else:
        engine[at.TAIL] = -1
    engine[at.WAITING] -= 1


@compiled
def log(state: State, kind: int, replica: int, request: int, at_s: float) -> None:
    """Write down what happened, if its kind is asked for."""
    if state.control[at.LOG_MASK] & kind:
        entry = state.control[at.LOGGED]
        state.log[entry, 0] = kind
        state.log[entry, 1] = replica
        state.log[entry, 2] = request
        state.log_times[entry] = at_s
        state.control[at.LOGGED] = entry + 1


# -- the cohort that decodes together


@compiled
def join(state: State, replica: int, request: int) -> None:
    """Let a request decode whose first or next token has just been made."""
    engine, row = state.engines[replica], state.requests[request]
    size = state.limits[engine[at.KIND], at.BLOCK_SIZE]
    row[at.JOINED] = engine[at.STEPS]
    row[at.ENDS] = engine[at.STEPS] + row[at.OUTPUT] - row[at.GENERATED]
    engine[at.COHORT] += 1
    engine[at.KV_TOKENS] += row[at.COMPUTED]
    state.phases[replica, (row[at.JOINED] - row[at.COMPUTED]) % size] += 1
    if engine[at.FINISH_STEP] >= 0:
        engine[at.FINISH_STEP] = min(engine[at.FINISH_STEP], row[at.ENDS])


@compiled
def _leave(state: State, replica: int, request: int, in_step: int) -> None:
    engine, row = state.engines[replica], state.requests[request]
    size = state.limits[engine[at.KIND], at.BLOCK_SIZE]
    state.phases[replica, (row[at.JOINED] - row[at.COMPUTED]) % size] -= 1
    steps = engine[at.STEPS] - row[at.JOINED]
    row[at.COMPUTED] += steps
    row[at.GENERATED] += steps
    row[at.JOINED] = -1
    engine[at.KV_TOKENS] -= row[at.COMPUTED]
    engine[at.COHORT] -= 1
    engine[at.FINISH_STEP] = -1
    row[at.OWN_BLOCKS] = blocks_of(row[at.COMPUTED] + in_step, size) - row[at.SHARED_BLOCKS]


@compiled
def _steps_to_finish(state: State, replica: int) -> int:
    engine = state.engines[replica]
    if engine[at.FINISH_STEP] < 0:
        least = np.int64(1 << 60)
        for index in range(engine[at.RUNNING]):
            row = state.requests[state.running[replica, index]]
            if row[at.JOINED] >= 0 and row[at.ENDS] < least:
                least = np.int64(row[at.ENDS])
        engine[at.FINISH_STEP] = least
    return int(engine[at.FINISH_STEP] - engine[at.STEPS])


@compiled
def run_length(state: State, replica: int) -> int:
    """How many decode steps until one finishes, or the blocks end, those of the first step being taken already."""
    engine = state.engines[replica]
    size = state.limits[engine[at.KIND], at.BLOCK_SIZE]
    limit = _steps_to_finish(state, replica)
    cycles = free(engine) // engine[at.COHORT]
    left = free(engine) % engine[at.COHORT]
    steps = 1 + cycles * size
    while steps < limit:
        left -= state.phases[replica, (engine[at.STEPS] + steps) % size]
        if left < 0:
            break
        steps += 1
    return int(min(steps, limit))


@compiled
def blocks_after_first(state: State, replica: int, steps: int) -> int:
    """Blocks that a run of decode steps begins, those of its first step left out."""
    engine = state.engines[replica]
    size = state.limits[engine[at.KIND], at.BLOCK_SIZE]
    total = ((steps - 1) // size) * engine[at.COHORT]
    for index in range((steps - 1) % size):
        total += state.phases[replica, (engine[at.STEPS] + 1 + index) % size]
    return int(total)


# -- a request leaves the batch


@compiled
def _release(state: State, replica: int, request: int, in_step: int) -> None:
    engine, row = state.engines[replica], state.requests[request]
    running = state.running[replica]
    place = 0
    while running[place] != request:
        place += 1
    for index in range(place, engine[at.RUNNING] - 1):
        running[index] = running[index + 1]
    engine[at.RUNNING] -= 1
    if row[at.JOINED] >= 0:
        _leave(state, replica, request, in_step)
    if engine[at.PREFILLING] == request:
        engine[at.PREFILLING] = -1
    give_back(state, replica, request)
    row[at.COMPUTED] = 0
    row[at.PUBLISHED] = 0


@compiled
def finish(state: State, replica: int, request: int) -> None:
    """All tokens of a request are made."""
    clock, moments = state.clocks[replica], state.times[request]
    _release(state, replica, request, 0)
    moments[at.FINISH] = clock[at.NOW]
    clock[at.FINISHES] += 1
    if state.requests[request, at.OUTPUT] > 1:
        clock[at.TPOT_SUM] += (moments[at.FINISH] - moments[at.FIRST]) / (state.requests[request, at.OUTPUT] - 1)
    log(state, at.LOG_FINISHED, replica, request, clock[at.NOW])


@compiled
def finish_decoded(state: State, replica: int) -> None:
    """Let those that have all their tokens leave, in the order of their submission."""
    engine = state.engines[replica]
    while engine[at.COHORT] and _steps_to_finish(state, replica) <= 0:
        chosen = -1
        for index in range(engine[at.RUNNING]):
            request = state.running[replica, index]
            row = state.requests[request]
            if row[at.JOINED] < 0 or row[at.ENDS] != engine[at.FINISH_STEP]:
                continue
            if chosen < 0 or row[at.ORDER] < state.requests[chosen, at.ORDER]:
                chosen = request
        finish(state, replica, chosen)


@compiled
def victim_of(state: State, replica: int) -> int:
    """Who is preempted next."""
    engine = state.engines[replica]
    worst = state.running[replica, engine[at.RUNNING] - 1]
    if state.limits[engine[at.KIND], at.BY_PRIORITY]:
        for index in range(engine[at.RUNNING]):
            request = state.running[replica, index]
            if _before(state, worst, request, 1):
                worst = request
    return int(worst)


@compiled
def preempt(state: State, replica: int, request: int, in_step: int) -> None:
    """Let a request give its blocks back and wait again; `in_step` if that of the step to come is its own."""
    _release(state, replica, request, in_step)
    state.requests[request, at.PREEMPTED] += 1
    state.clocks[replica, at.PREEMPTIONS] += 1
    log(state, at.LOG_PREEMPTED, replica, request, state.clocks[replica, at.NOW])
    enqueue(state, replica, request)
