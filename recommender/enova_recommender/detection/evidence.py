"""For and against each cause, in one step of every replica.

Each function here answers 1 where the step speaks for the cause, -1 where it speaks against, and 0 where it says
nothing: what is missing never counts, neither way. What speaks louder counts as often as it says: a queue that no
burst leaves is 2 for an overload, and what one replica fewer could not have carried takes back all that spoke for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.causes import RULES, Cause
from enova_recommender.detection.features import Feature, FeatureStep, Flags, Floats
from enova_recommender.detection.observation import Placement
from enova_recommender.detection.peers import SPREADS
from enova_recommender.detection.progress import Codes, Progress
from enova_recommender.detection.residual import Slowness

Votes = npt.NDArray[np.int8]

PREEMPTION_TAU_S = 15.0      # memory of preemptions
PREEMPTIONS_MIN = 0.1        # a second
RESTART_TAU_S = 300.0        # memory of restarts: two within some 80 s, or three within 200 s, make a loop
RESTARTS_MIN = 1.75
CALM_S, CALM_INTERVALS = 45.0, 1.5  # without a restart, and so many of the last intervals between two: the loop is over
FAILURE_TAU_S = 15.0
FAILED_SHARE, FAILURES_MIN = 0.2, 0.1  # of requests, a second
SLOW_CLEAR = 0.5             # of the threshold of slowness, as a logarithm: below it a replica is well
THROTTLED_RATIO = 1.1        # enough where the GPU itself says why
PEER_SPREADS, PEER_CLEAR = SPREADS, SPREADS / 2
QUEUE_MIN = 2.0              # requests that wait
QUEUE_SHARE = 0.1            # of those that run
QUEUE_LONG_SHARE = 1.0     # of those that run: so many wait no longer for a burst
HELD_SLACK = 2.0             # requests on their way between ingress and engine
HELD_SHARE = 0.25
KV_FULL = 0.85
BATCH_FULL = 0.9             # of max_num_seqs
BATCH_GAIN = 1.5             # throughput with twice the batch, over today's
BATCH_KV_MAX = 0.45          # so that twice the batch fits
ROOM_SHARE = 0.5             # of sequences, of tokens a step and of KV blocks: a queue before so little is none of load
BURN_OBJECTIVE = 0.95        # the share of requests that objectives speak of
LEAK_IDLE_USAGE = 0.2        # of the KV cache, with nothing running
LEAK_FACTOR = 1.1            # times what the longest sequences could hold
CUT_FACTOR, CUT_SLACK = 2.0, 0.05
LOAD_TAU_S, SOON_TAU_S = 300.0, 20.0  # load is the larger of two memories: what rose counts at once
PREEMPTIONS_FEW = 0.02       # a second: with a full cache, a queue may be what they make
CUT_TAU_S = 300.0
LOAD_MAX = 0.6               # of what one replica fewer carries
NOT_SERVING = (Progress.SUSPECT, Progress.HUNG, Progress.DOWN)
# Memories: preemptions, failed and answered of late; cut and answered for long; by second.
_MEMORIES = (
    (PREEMPTION_TAU_S, Feature.PREEMPTIONS), (FAILURE_TAU_S, Feature.FAILED), (FAILURE_TAU_S, Feature.FINISHED),
    (CUT_TAU_S, Feature.CUT), (CUT_TAU_S, Feature.ENGINE_FINISHED),
)  # fmt: skip
_PREEMPTED, _FAILED, _ANSWERED, _CUT, _ANSWERED_LONG = range(len(_MEMORIES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What detectors said of a step, by replica."""

    progress: Codes
    stalled_s: Floats
    slowness: Slowness
    peers: Floats                  # spreads by which its steps are longer than its siblings', load taken off
    batch_gain: Floats             # throughput with twice the batch, over today's; NaN unknown
    strain: Flags                  # steps too long for the objective, which half of the load would keep
    burn: Floats                   # how many times too fast objectives burn, over what is alarming; NaN unknown
    rarity: Floats                 # of the step times: the negative logarithm (10) of their probability; NaN unknown


class Evidence:
    """Votes for every cause; it remembers decaying counts of rare events.

    `figures` are those of the last step that votes were held against, by name.
    """

    def __init__(self, *, series: int) -> None:
        self._memory = np.zeros((len(_MEMORIES), series))
        self._restarts = np.zeros(series)
        self._calm_s = np.full(series, np.inf)      # since the last restart
        self._interval_s = np.zeros(series)         # between the last two
        self._load = np.full((2, series), np.nan)   # arrivals a second: for long, and of late
        self.figures: dict[str, Floats] = {}

    def update(
        self, step: FeatureStep, signals: Signals, placements: Mapping[str, Placement], *, step_s: float
    ) -> Votes:
        """Votes by replica and cause."""
        self._remember(step, step_s)
        votes = np.zeros((len(step.values), len(Cause)), dtype=np.int8)
        placed = np.array([name in placements for name in step.replicas], dtype=bool)
        reported = ~np.isnan(step.of(Feature.AGE_S))
        ready = step.of(Feature.READY) == 1.0
        votes[:, Cause.MISSING] = np.where(reported | ~placed, -1, 1)
        votes[:, Cause.CRASH_LOOP] = self._crash_loop(step, signals)
        votes[:, Cause.HUNG] = _hung(signals.progress)
        votes[:, Cause.LEAK] = self._leak(step, placements)
        votes[:, Cause.KV_THRASH] = self._kv_thrash(step)
        votes[:, Cause.THROTTLED], votes[:, Cause.SLOW] = _slow(step, signals)
        votes[:, Cause.FAILING] = self._failing()
        # A queue before an engine that stands still is no load, and nothing can be told of it.
        queue = np.where(signals.stalled_s > 0, np.nan, queued(step))
        votes[:, Cause.BATCH_SLACK] = _batch_slack(step, signals, placements, queue)
        thrashes = (self._memory[_PREEMPTED] >= PREEMPTIONS_FEW) & (step.of(Feature.KV_USAGE) >= KV_FULL)
        votes[:, Cause.OVERLOAD] = np.where(thrashes, 0, _overload(step, signals, placements, queue))
        votes[:, Cause.CUT] = self._cut(placements, step)
        votes[:, Cause.IDLE] = np.select([signals.progress == Progress.IDLE, ~reported], [1, 0], -1)
        votes[:, Cause.SURPLUS] = self._surplus(step, signals, placements)
        # A replica that starts, drains or stopped serves nobody: only what befell its process can be said.
        votes[~ready & reported, Cause.HUNG :] = -1
        votes[~reported, Cause.CRASH_LOOP :] = 0
        return votes

    @property
    def preemptions(self) -> Floats:
        """Preemptions a second of late."""
        return np.array(self._memory[_PREEMPTED])

    def forget(self, row: int) -> None:
        """Another replica has this row."""
        if row < self._load.shape[1]:
            self._memory[:, row] = self._restarts[row] = self._interval_s[row] = 0.0
            self._calm_s[row] = np.inf
            self._load[:, row] = np.nan

    def save(self) -> dict[str, Floats]:
        """What is remembered, by row in the last dimension."""
        return {
            "memory": self._memory.T.copy(), "restarts": self._restarts.copy(), "load": self._load.T.copy(),
            "calm_s": self._calm_s.copy(), "interval_s": self._interval_s.copy(),
        }  # fmt: skip

    def restore(self, saved: Mapping[str, Floats], *, rows: Sequence[int]) -> None:
        """What `save` returned, for rows that had these numbers then; -1 for a new one."""
        self._grow(len(rows))
        for row, before in enumerate(rows):
            if 0 <= before < len(saved["load"]):
                self._memory[:, row] = saved["memory"][before]
                self._restarts[row], self._load[:, row] = saved["restarts"][before], saved["load"][before]
                self._calm_s[row], self._interval_s[row] = saved["calm_s"][before], saved["interval_s"][before]

    def _grow(self, series: int) -> None:
        more = series - self._load.shape[1]
        if more > 0:
            self._memory = np.pad(self._memory, ((0, 0), (0, more)))
            self._restarts = np.pad(self._restarts, (0, more))
            self._calm_s = np.pad(self._calm_s, (0, more), constant_values=np.inf)
            self._interval_s = np.pad(self._interval_s, (0, more))
            self._load = np.pad(self._load, ((0, 0), (0, more)), constant_values=np.nan)

    def _remember(self, step: FeatureStep, step_s: float) -> None:
        self._grow(len(step.values))
        for row, (tau_s, feature) in enumerate(_MEMORIES):
            now = step.of(feature)
            keep = math.exp(-step_s / tau_s)
            moved = keep * self._memory[row] + (1 - keep) * np.minimum(np.nan_to_num(now), 1e9)
            self._memory[row] = np.where(np.isnan(now), self._memory[row], moved)
        self._count_restarts(np.nan_to_num(step.of(Feature.RESTARTS)), step_s)
        # Whoever ends a process fails the requests that it held: that says nothing of the next one.
        self._memory[_FAILED, (self._calm_s == 0) | (step.of(Feature.READY) != 1.0)] = 0.0
        arrivals = step.of(Feature.ARRIVALS)
        started = np.where(np.isnan(self._load), arrivals, self._load)
        kept = np.exp(-step_s / np.array([[LOAD_TAU_S], [SOON_TAU_S]]))
        self._load = np.where(np.isnan(arrivals), self._load, kept * started + (1 - kept) * arrivals)
        failed, answered = self._memory[_FAILED], self._memory[_ANSWERED]
        self.figures = {
            "preemptions": self._memory[_PREEMPTED], "restarts": self._restarts, "failed": failed,
            "failed_share": failed / np.maximum(failed + answered, 1e-9),
            "cut_share": self._memory[_CUT] / np.maximum(self._memory[_ANSWERED_LONG], 1e-9),
            "load_rps": self._load.max(axis=0),
        }  # fmt: skip

    def _count_restarts(self, restarts: Floats, step_s: float) -> None:
        self._restarts = self._restarts * math.exp(-step_s / RESTART_TAU_S) + restarts
        again, since_s = restarts > 0, self._calm_s + step_s
        self._interval_s = np.where(again & np.isfinite(since_s), since_s, self._interval_s)
        self._calm_s = np.where(again, 0.0, since_s)

    def _crash_loop(self, step: FeatureStep, signals: Signals) -> Votes:
        loops = (self._restarts >= RESTARTS_MIN) | (signals.progress == Progress.DOWN)
        over = self._calm_s >= np.maximum(CALM_S, CALM_INTERVALS * self._interval_s)
        loops &= ~over | (signals.progress == Progress.DOWN)
        calm = over & (step.of(Feature.READY) == 1.0)
        return _votes(loops, calm)

    def _kv_thrash(self, step: FeatureStep) -> Votes:
        often = self._memory[_PREEMPTED] >= PREEMPTIONS_MIN
        now = (step.of(Feature.PREEMPTIONS) > 0) | (step.of(Feature.KV_USAGE) >= KV_FULL)
        return _votes(often & now, ~often)

    def _failing(self) -> Votes:
        failing = (self.figures["failed"] >= FAILURES_MIN) & (self.figures["failed_share"] >= FAILED_SHARE)
        return _votes(failing, ~failing)

    def _cut(self, placements: Mapping[str, Placement], step: FeatureStep) -> Votes:
        meant = _column(step, placements, "cut_share")
        share, enough = self.figures["cut_share"], self._memory[_ANSWERED_LONG] >= FAILURES_MIN
        self.figures["cut_limit"] = CUT_FACTOR * meant + CUT_SLACK
        return _votes(enough & (share > self.figures["cut_limit"]), enough & (share <= CUT_FACTOR * meant))

    def _leak(self, step: FeatureStep, placements: Mapping[str, Placement]) -> Votes:
        """More than the sequences that run could hold, were each as long as the context allows."""
        usage, running = step.of(Feature.KV_USAGE), step.of(Feature.RUNNING)
        most = running * _column(step, placements, "max_model_len") / _column(step, placements, "kv_tokens")
        nothing = (running == 0) & (step.of(Feature.WAITING) == 0)
        self.figures["kv_limit"] = limit = np.where(nothing, LEAK_IDLE_USAGE, LEAK_FACTOR * most + 0.05)
        leaks = (usage > limit) & ((running > 0) | nothing)
        return _votes(leaks, nothing & (usage <= LEAK_IDLE_USAGE) | (usage <= most) & (most < 1.0))

    def _surplus(self, step: FeatureStep, signals: Signals, placements: Mapping[str, Placement]) -> Votes:
        """One replica fewer would hold: of a deployment of two or more that all are measured and all serve."""
        capacity = _column(step, placements, "capacity_rps")
        names = [placements[name].deployment if name in placements else "" for name in step.replicas]
        _, index = np.unique(np.array(names, dtype=str), return_inverse=True)
        serves = (step.of(Feature.READY) == 1.0) & ~np.isin(signals.progress, NOT_SERVING)
        now = self.figures["load_rps"]
        known = np.isfinite(capacity) & np.isfinite(now) & serves
        count = np.bincount(index)
        whole = np.bincount(index, weights=known) == count
        load = np.bincount(index, weights=np.where(known, now, 0.0))
        carried = np.bincount(index, weights=np.where(known, capacity, 0.0))
        least = np.full(len(count), np.inf)
        np.minimum.at(least, index, np.where(known, capacity, np.inf))
        most = LOAD_MAX * (carried - np.where(np.isfinite(least), least, 0.0))
        spare = whole & (count > 1) & (load <= most)
        burst = np.bincount(index, weights=np.nan_to_num(step.of(Feature.ARRIVALS)))
        needed = whole & (LOAD_MAX * burst > most)
        self.figures["deployment_load_rps"] = np.asarray(load[index], dtype=np.float64)
        self.figures["deployment_spare_rps"] = np.asarray(most[index], dtype=np.float64)
        named = np.array([bool(name) for name in names], dtype=bool)
        votes = _votes(named & spare[index], named & whole[index] & ~spare[index])
        return np.where(named & needed[index], -RULES[Cause.SURPLUS].enter, votes).astype(np.int8)


def queued(step: FeatureStep) -> Floats:
    """Requests that wait, in the engine or before it."""
    running, waiting = step.of(Feature.RUNNING), step.of(Feature.WAITING)
    before = step.of(Feature.HELD) - running - HELD_SLACK - HELD_SHARE * running
    return np.fmax(waiting, before)


def _hung(progress: Codes) -> Votes:
    stuck = (progress == Progress.SUSPECT) | (progress == Progress.HUNG)
    return _votes(stuck, np.isin(progress, (Progress.BUSY, Progress.IDLE, Progress.LONG_PREFILL)))


def _slow(step: FeatureStep, signals: Signals) -> tuple[Votes, Votes]:
    ratio, peers = signals.slowness.ratio, signals.peers
    measured = step.of(Feature.STEP_S)
    now = np.isfinite(measured) & np.isfinite(ratio)
    clear = signals.slowness.threshold**SLOW_CLEAR
    # Where a replica's own steps are as they always were, it is the siblings that are odd.
    odd = np.isfinite(measured) & (peers >= PEER_SPREADS) & (np.isnan(ratio) | (ratio >= clear))
    slow = now & signals.slowness.alarm | odd
    well = now & (ratio < clear) & ~(peers >= PEER_SPREADS)
    hot = step.of(Feature.GPU_THROTTLED)
    throttled = (hot > 0) & (slow | now & (ratio >= THROTTLED_RATIO) | np.isnan(ratio) & (peers >= PEER_CLEAR))
    return _votes(throttled, (hot == 0) | well), _votes(slow, well | np.isnan(ratio) & (peers < PEER_CLEAR))


def _batch_slack(
    step: FeatureStep, signals: Signals, placements: Mapping[str, Placement], queue: Floats
) -> Votes:
    """A queue before a batch that could be larger, or that is not even full."""
    running, usage = step.of(Feature.RUNNING), step.of(Feature.KV_USAGE)
    limit = _column(step, placements, "max_num_seqs")
    small = (running >= BATCH_FULL * limit) & (signals.batch_gain >= BATCH_GAIN) & (usage <= BATCH_KV_MAX)
    tokens = (step.of(Feature.PROMPT_TOKENS) + step.of(Feature.DECODE_TOKENS)) / step.of(Feature.ITERATIONS)
    room = (running <= ROOM_SHARE * limit) & (usage <= ROOM_SHARE)
    room &= tokens <= ROOM_SHARE * _column(step, placements, "max_num_batched_tokens")
    waits = step.of(Feature.WAITING) >= np.maximum(QUEUE_MIN, QUEUE_SHARE * np.nan_to_num(running))
    slack = small & (queue >= QUEUE_MIN) | room & waits & (queue >= QUEUE_MIN)
    return _votes(slack, np.isfinite(queue) & ~slack)


def _overload(
    step: FeatureStep, signals: Signals, placements: Mapping[str, Placement], queue: Floats
) -> Votes:
    """A queue, or a batch too large for its objectives, as steps say now and burnt budgets in the end.

    A burst does that too, for as long as it takes to work off: it counts twice if those that wait will miss their
    objective, or are as many as those that run.
    """
    running = np.nan_to_num(step.of(Feature.RUNNING))
    long = queue >= np.maximum(QUEUE_MIN, QUEUE_SHARE * running)
    used = (running >= ROOM_SHARE * _column(step, placements, "max_num_seqs")) | (
        step.of(Feature.KV_USAGE) >= KV_FULL
    )
    burns = (signals.burn >= 1.0) & (signals.stalled_s == 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        wait_s = queue / step.of(Feature.FIRST_TOKENS)
    lost = long & ((queue >= QUEUE_LONG_SHARE * running) | (wait_s > _column(step, placements, "ttft_p95_s")))
    long |= signals.strain & (signals.stalled_s == 0)
    # Budgets go on burning for a while after what burnt them.
    long |= burns & used
    votes = _votes(long, np.isfinite(queue) & ~long)
    return np.where(lost, 2, votes).astype(np.int8)


def _column(step: FeatureStep, placements: Mapping[str, Placement], name: str) -> Floats:
    return np.array(
        [getattr(placements[each], name) if each in placements else math.nan for each in step.replicas], dtype=float
    )


def _votes(yes: Flags, no: Flags) -> Votes:
    return np.where(yes, 1, np.where(no, -1, 0)).astype(np.int8)
