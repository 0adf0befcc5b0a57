"""Which column of the arrays of `state.State` holds what; used as `at.COLUMN`."""

from __future__ import annotations

# Columns of `State.engines`
(
    KIND, RUNNING, COHORT, STEPS, KV_TOKENS, BLANK, PRIVATE, SHARED, IDLE, OLDEST, YOUNGEST, SPARE_NODE, HEAD, TAIL,
    WAITING, PREFILLING, PREFILLS, IN_STEP, PREFILL, PAIRS, DECODE, CONTEXT, HUNG, STOP, FINISH_STEP,
) = range(25)  # fmt: skip
ENGINE_COLUMNS = 25
# Columns of `State.clocks`: moments, then totals since the replica began
(
    NOW, STEP_START, STEP_END, NEXT, SLOW, BUSY, STEPPED, PREFILLED, DECODED, FIRSTS, FINISHES, PREEMPTIONS, TTFT_SUM,
    TPOT_SUM,
) = range(14)  # fmt: skip
CLOCK_COLUMNS = 14
# Columns of `State.requests`
(
    PROMPT, OUTPUT, PRIORITY, HASH_AT, HASHES, COMPUTED, GENERATED, JOINED, ENDS, OWN_BLOCKS, SHARED_BLOCKS, PUBLISHED,
    PREEMPTED, CACHED, NEXT_WAITING, PREVIOUS_WAITING, ORDER, MARK,
) = range(18)  # fmt: skip
REQUEST_COLUMNS = 18
# Columns of `State.times`
ARRIVAL, QUEUED, ADMITTED, FIRST, FINISH = range(5)
TIME_COLUMNS = 5
# Columns of `State.limits`, a row a kind of replica
BLOCKS, BLOCK_SIZE, MAX_SEQS, MAX_TOKENS, CHUNKED, BY_PRIORITY, KEPT = range(7)
LIMIT_COLUMNS = 7
# Cells of `State.control`
LOGGED, LOG_MASK, ORDERS, STOPPED = range(4)
CONTROL_CELLS = 4
# Kinds of log entries
LOG_ADMITTED, LOG_FIRST, LOG_RESUMED, LOG_PREEMPTED, LOG_FINISHED = 1, 2, 4, 8, 16
# Columns of `State.nodes`: blocks that are found by hash
HOLDERS, NEXT_IN_BUCKET, OLDER, YOUNGER = range(4)
NODE_COLUMNS = 4
# What `engines.drive` is to do
ADVANCE, SETTLE, SUBMIT = range(3)
