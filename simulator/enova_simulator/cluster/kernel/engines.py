"""One step after another: what is computed next, and what the fleet calls."""

from __future__ import annotations

import numpy as np

from enova_simulator.cluster.kernel import columns as at
from enova_simulator.cluster.kernel.batch import (
    blocks_after_first,
    enqueue,
    finish,
    finish_decoded,
    join,
    log,
    pop_head,
    preempt,
    run_length,
    victim_of,
)
from enova_simulator.cluster.kernel.blocks import blocks_of, find, free, hold, publish, take
from enova_simulator.cluster.kernel.state import State, compiled, exported
from enova_simulator.cluster.kernel.times import run_time, step_time


@compiled
def _take_decode_blocks(state: State, replica: int) -> bool:
    """Take the blocks that decoding needs for the next step; True if somebody was preempted for them."""
    engine = state.engines[replica]
    size = state.limits[engine[at.KIND], at.BLOCK_SIZE]
    needed = state.phases[replica, engine[at.STEPS] % size] if engine[at.COHORT] else 0
    if needed <= free(engine):
        take(state, replica, needed)
        return False
    those = state.running[replica, : engine[at.RUNNING]].copy()
    for request in those:
        row = state.requests[request]
        if row[at.JOINED] < 0 or (row[at.JOINED] - row[at.COMPUTED]) % size != engine[at.STEPS] % size:
            continue
        while free(engine) < 1 and row[at.JOINED] >= 0:
            victim = victim_of(state, replica)
            preempt(state, replica, victim, state.requests[victim, at.MARK])
        if row[at.JOINED] >= 0:
            take(state, replica, 1)
            row[at.MARK] = 1
    for request in those:
        state.requests[request, at.MARK] = 0
    return True


@compiled
def _take_chunk_blocks(state: State, replica: int, request: int, chunk: int) -> bool:
    """Take the blocks of the next part of a half-computed prompt; True if somebody was preempted for them."""
    engine, row = state.engines[replica], state.requests[request]
    preempted = False
    size = state.limits[engine[at.KIND], at.BLOCK_SIZE]
    needed = blocks_of(row[at.COMPUTED] + chunk, size) - row[at.OWN_BLOCKS] - row[at.SHARED_BLOCKS]
    while free(engine) < needed:
        preempted = True
        victim = victim_of(state, replica)
        preempt(state, replica, victim, 1)
        if victim == request:
            return True
    take(state, replica, needed)
    row[at.OWN_BLOCKS] += needed
    return preempted


@compiled
def _batch(state: State, replica: int, request: int, chunk: int) -> None:
    """Put a part of a prompt into the batch."""
    engine, computed = state.engines[replica], state.requests[request, at.COMPUTED]
    state.prefills[replica, engine[at.PREFILLS], 0] = request
    state.prefills[replica, engine[at.PREFILLS], 1] = chunk
    engine[at.PREFILLS] += 1
    engine[at.PREFILL] += chunk
    engine[at.PAIRS] += np.int64(chunk) * computed + np.int64(chunk) * (chunk + 1) // 2


@compiled
def _admit(state: State, replica: int, budget: int) -> None:
    """Admit waiting requests in order while tokens, sequences and blocks last."""
    engine, clock = state.engines[replica], state.clocks[replica]
    limits = state.limits[engine[at.KIND]]
    size = limits[at.BLOCK_SIZE]
    while budget > 0 and engine[at.RUNNING] < limits[at.MAX_SEQS] and engine[at.HEAD] >= 0:
        request = engine[at.HEAD]
        row = state.requests[request]
        target = row[at.PROMPT] + row[at.GENERATED]
        cached, idle = 0, 0
        while cached < min(row[at.HASHES], (target - 1) // size):
            node = find(state, replica, state.hashes[row[at.HASH_AT] + cached])
            if node < 0:
                break
            idle += state.nodes[replica, node, at.HOLDERS] == 0
            cached += 1
        computed = cached * size
        if not limits[at.CHUNKED] and target - computed > budget:
            return
        kept = limits[at.KEPT] if engine[at.RUNNING] else 0
        if blocks_of(target, size) - cached + kept > free(engine) - idle:
            return
        chunk = min(target - computed, budget)
        pop_head(state, replica)
        hold(state, replica, request, cached)
        row[at.OWN_BLOCKS] = blocks_of(computed + chunk, size) - cached
        take(state, replica, row[at.OWN_BLOCKS])
        row[at.COMPUTED] = computed
        row[at.PUBLISHED] = cached
        state.running[replica, engine[at.RUNNING]] = request
        engine[at.RUNNING] += 1
        if not row[at.PREEMPTED]:
            row[at.CACHED] = computed
            state.times[request, at.ADMITTED] = clock[at.NOW]
        log(state, at.LOG_ADMITTED, replica, request, clock[at.NOW])
        budget -= chunk
        _batch(state, replica, request, chunk)


@compiled
def _steps_by(state: State, replica: int, limit_s: float, most: int) -> int:
    """The largest number of decode steps, at most `most`, that end by `limit_s`."""
    engine, clock = state.engines[replica], state.clocks[replica]
    span_s = limit_s - clock[at.NOW]
    kind, decode, context = engine[at.KIND], engine[at.DECODE], engine[at.CONTEXT]
    if clock[at.SLOW] * run_time(state.tables, kind, decode, context, most) <= span_s:
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        if clock[at.SLOW] * run_time(state.tables, kind, decode, context, middle) <= span_s:
            low = middle
        else:
            high = middle
    return low


@compiled
def _pass_run(state: State, replica: int, until_s: float) -> bool:
    """Compute all whole steps of a decoding run that end by `until_s` at once; False when not even one does."""
    engine, clock = state.engines[replica], state.clocks[replica]
    steps = _steps_by(state, replica, until_s, run_length(state, replica))
    if steps < 1:
        return False
    take(state, replica, blocks_after_first(state, replica, steps))
    lasted_s = clock[at.SLOW] * run_time(state.tables, engine[at.KIND], engine[at.DECODE], engine[at.CONTEXT], steps)
    clock[at.NOW] += lasted_s
    clock[at.BUSY] += lasted_s
    clock[at.STEPPED] += steps
    clock[at.DECODED] += steps * engine[at.COHORT]
    engine[at.STEPS] += steps
    engine[at.KV_TOKENS] += steps * engine[at.COHORT]
    finish_decoded(state, replica)
    return True


@compiled
def _begin(state: State, replica: int, until_s: float) -> bool:
    """Start the next step, or pass a whole run of steps; False when there is nothing to compute."""
    engine, clock = state.engines[replica], state.clocks[replica]
    if engine[at.RUNNING] == 0 and engine[at.WAITING] == 0:
        return False
    engine[at.PREFILLS], engine[at.PREFILL], engine[at.PAIRS] = 0, 0, 0
    preempted = _take_decode_blocks(state, replica)
    budget = state.limits[engine[at.KIND], at.MAX_TOKENS] - engine[at.COHORT]
    request = engine[at.PREFILLING]
    if request >= 0:
        row = state.requests[request]
        chunk = min(row[at.PROMPT] + row[at.GENERATED] - row[at.COMPUTED], budget)
        preempted = _take_chunk_blocks(state, replica, request, chunk) or preempted
        if engine[at.PREFILLING] >= 0:
            _batch(state, replica, request, chunk)
            budget -= chunk
    if not preempted:
        _admit(state, replica, budget)
    if engine[at.PREFILLS] == 0 and engine[at.COHORT] == 0:
        return False
    engine[at.DECODE] = engine[at.COHORT]
    engine[at.CONTEXT] = engine[at.KV_TOKENS] + engine[at.COHORT] if engine[at.COHORT] else 0
    if engine[at.PREFILLS] == 0 and not preempted and _pass_run(state, replica, until_s):
        return True
    lasts_s = step_time(
        state.tables, engine[at.KIND], (engine[at.PREFILL], engine[at.PAIRS]), engine[at.DECODE], engine[at.CONTEXT]
    )
    clock[at.STEP_START] = clock[at.NOW]
    clock[at.STEP_END] = clock[at.NOW] + clock[at.SLOW] * lasts_s
    engine[at.IN_STEP] = 1
    return True


@compiled
def _complete(state: State, replica: int) -> None:
    """Give out what the step in flight has computed."""
    engine, clock = state.engines[replica], state.clocks[replica]
    clock[at.NOW] = clock[at.STEP_END]
    clock[at.BUSY] += clock[at.STEP_END] - clock[at.STEP_START]
    clock[at.STEPPED] += 1
    clock[at.PREFILLED] += engine[at.PREFILL]
    clock[at.DECODED] += engine[at.COHORT]
    engine[at.IN_STEP] = 0
    if engine[at.COHORT]:
        engine[at.STEPS] += 1
        engine[at.KV_TOKENS] += engine[at.COHORT]
        finish_decoded(state, replica)
    engine[at.PREFILLING] = -1
    for index in range(engine[at.PREFILLS]):
        request = state.prefills[replica, index, 0]
        row = state.requests[request]
        row[at.COMPUTED] += state.prefills[replica, index, 1]
        publish(state, replica, request)
        if row[at.COMPUTED] < row[at.PROMPT] + row[at.GENERATED] and engine[at.PREFILLING] < 0:
            engine[at.PREFILLING] = request
    for index in range(engine[at.PREFILLS]):
        request = state.prefills[replica, index, 0]
        row = state.requests[request]
        if row[at.COMPUTED] < row[at.PROMPT] + row[at.GENERATED]:
            continue
        row[at.GENERATED] += 1
        clock[at.DECODED] += 1
        if row[at.GENERATED] == 1:
            state.times[request, at.FIRST] = clock[at.NOW]
            clock[at.FIRSTS] += 1
            clock[at.TTFT_SUM] += clock[at.NOW] - state.times[request, at.ARRIVAL]
            log(state, at.LOG_FIRST, replica, request, clock[at.NOW])
        else:
            log(state, at.LOG_RESUMED, replica, request, clock[at.NOW])
        if row[at.GENERATED] == row[at.OUTPUT]:
            finish(state, replica, request)
        else:
            join(state, replica, request)
    engine[at.PREFILLS] = 0


# -- what the fleet calls


@compiled
def _advance(state: State, replica: int, until_s: float) -> bool:
    """Let one replica's time pass; True if it stopped early: at a finish that it was told to tell, or a full log."""
    engine, clock = state.engines[replica], state.clocks[replica]
    if engine[at.HUNG]:
        clock[at.NEXT] = np.inf
        return False
    room = len(state.log) - 3 * state.running.shape[1]
    finishes = clock[at.FINISHES]
    while True:
        if engine[at.IN_STEP]:
            if clock[at.STEP_END] > until_s:
                break
            _complete(state, replica)
        if (engine[at.STOP] and clock[at.FINISHES] != finishes) or state.control[at.LOGGED] > room:
            clock[at.NEXT] = clock[at.NOW]
            return True
        if not _begin(state, replica, until_s):
            break
    if not engine[at.IN_STEP]:
        clock[at.NEXT] = np.inf
    elif engine[at.PREFILLS]:
        clock[at.NEXT] = clock[at.STEP_END]
    else:
        steps = run_length(state, replica)
        lasts_s = run_time(state.tables, engine[at.KIND], engine[at.DECODE], engine[at.CONTEXT], steps)
        # At least the step in flight: its own end may have been rounded otherwise, or made under another slowness.
        clock[at.NEXT] = max(clock[at.STEP_END], clock[at.STEP_START] + clock[at.SLOW] * lasts_s)
    return False


@exported
def drive(state: State, deed: int, replica: int, request: int, at_s: float) -> int:
    """Advance what is due, settle, or submit (`columns.ADVANCE` and so on); the number of log entries to read.

    One function for all three, so that what they share is compiled once. ADVANCE: let time pass for all replicas that
    change visibly by then; STOPPED says whether one stopped early: read the log, act on it, and call again. SETTLE:
    bring every engine's figures up to this moment, before which nothing visible is due. SUBMIT: give a request to an
    engine, of which nothing else is visible before; the step in flight keeps its length.
    """
    first, last = 0, len(state.clocks)
    if deed == at.SUBMIT:
        first, last = replica, replica + 1
    stopped = 0
    for number in range(first, last):
        clock, in_step = state.clocks[number], state.engines[number, at.IN_STEP]
        due = clock[at.NEXT] <= at_s
        if deed == at.SETTLE:
            due = in_step == 1
        elif deed == at.SUBMIT:
            due = in_step == 1 or clock[at.NEXT] < at_s
        if due and _advance(state, number, at_s):
            stopped = 1
    if deed == at.ADVANCE:
        state.control[at.STOPPED] = stopped
    elif deed == at.SUBMIT:
        _submit(state, replica, request, at_s)
    return int(state.control[at.LOGGED])


@compiled
def _submit(state: State, replica: int, request: int, at_s: float) -> None:
    engine, clock = state.engines[replica], state.clocks[replica]
    if not engine[at.IN_STEP] and engine[at.RUNNING] == 0:
        clock[at.NOW] = max(clock[at.NOW], at_s)       # idle until now, though somebody may wait who never fits
    state.control[at.ORDERS] += 1
    state.requests[request, at.ORDER] = state.control[at.ORDERS]
    state.times[request, at.QUEUED] = at_s
    enqueue(state, replica, request)
    if not engine[at.HUNG]:
        clock[at.NEXT] = clock[at.STEP_END] if engine[at.IN_STEP] else clock[at.NOW]


@exported
def clear(state: State, replica: int, kind: int, at_s: float) -> None:
    """An empty engine of this kind begins here; whatever was in it is forgotten."""
    engine, clock = state.engines[replica], state.clocks[replica]
    slow, hung, stop = clock[at.SLOW], engine[at.HUNG], engine[at.STOP]
    engine[:] = 0
    clock[:] = 0.0
    engine[at.KIND], engine[at.HUNG], engine[at.STOP] = kind, hung, stop
    engine[at.BLANK] = state.limits[kind, at.BLOCKS]
    engine[at.OLDEST], engine[at.YOUNGEST], engine[at.HEAD], engine[at.TAIL] = -1, -1, -1, -1
    engine[at.PREFILLING], engine[at.FINISH_STEP] = -1, -1
    clock[at.NOW], clock[at.NEXT], clock[at.SLOW] = at_s, np.inf, slow
    state.phases[replica] = 0
    state.buckets[replica] = -1
    count = state.nodes.shape[1]
    for node in range(count):
        state.nodes[replica, node, at.NEXT_IN_BUCKET] = node + 1 if node + 1 < count else -1
        state.nodes[replica, node, at.HOLDERS] = 0


@exported
def forget(state: State, request: int) -> None:
    """Make a request as if it had never been computed, so that it can be submitted elsewhere."""
    row = state.requests[request]
    row[at.COMPUTED], row[at.GENERATED], row[at.OWN_BLOCKS], row[at.SHARED_BLOCKS], row[at.PUBLISHED] = 0, 0, 0, 0, 0
    row[at.PREEMPTED], row[at.CACHED], row[at.MARK], row[at.JOINED] = 0, 0, 0, -1
    for index in range(row[at.HASH_AT], row[at.HASH_AT] + row[at.HASHES]):
        state.is_shared[index] = 0
    state.times[request, at.ADMITTED] = np.nan
    state.times[request, at.FIRST] = np.nan
