"""Frames folded to steps of features.

Theory of operation. Step n covers [n * step_s, (n + 1) * step_s); a frame belongs to the step that its end falls into,
and a step is closed a little after its end. Gauges are the newest of the step. Counters come in cumulative and become
rates between the newest reading of this step and the newest before it, over the time between the two *readings*: a
frame that repeats an old reading counts over no time and yields no rate, so it never looks like a standstill. An
engine that restarted counts from zero. What ingresses count comes by interval and adds up.

An agent that restarted, too, counts anew for an engine that it adopts: the last part of an instance's name is the
agent's. Then counters start from zero, and yet no engine restarted.

An engine that dies before it was measured leaves no trace in frames, but its agent counts: `tell_restarts` takes these
counts, and what frames show of the same restarts later on is not counted again.

A frame counts once. Of one that comes out of order only what ingresses counted is used; one that comes after its step
was closed, or is stamped far from the coordinator's clock, is left out and counted by reason, and so is what a node
says of a replica that is not placed on it. After a stall of the caller the newest steps alone are closed.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from enova_recommender.detection.features import COLUMN, Feature, FeatureStep, Figures, Flags, Floats, Window, clean
from enova_recommender.detection.observation import (
    INTER_TOKEN,
    QUEUE,
    TTFT,
    BucketCounts,
    FrameReading,
    GpuReading,
    Placement,
    ReplicaReading,
    SketchCounts,
)
from enova_recommender.detection.percentiles import (
    bucket_quantile,
    bucket_share_above,
    sketch_quantile,
    sketch_share_above,
)

ROWS_MIN = 64            # room that is made at first
SEQUENCES_KEPT = 64      # of a node, to know a frame that comes twice
NODES_KEPT_S = 600.0     # after its last frame a node is forgotten
CATCH_UP_STEPS = 12      # that one call closes at most
STALE_S = 15.0           # gauges older than this say nothing of now
# NVML: hardware slowdown, thermal slowdown by software and hardware, power brake. Its power cap is no fault.
THROTTLE_MASK = 0x8 | 0x20 | 0x40 | 0x80
_EMPTY = BucketCounts((), math.nan)

_RATES = (
    Feature.PROMPT_TOKENS, Feature.GENERATION_TOKENS, Feature.PREEMPTIONS, Feature.ITERATIONS, Feature.PREFIX_HITS,
    Feature.ENGINE_FINISHED, Feature.CUT, Feature.FIRST_TOKENS, Feature.DECODE_TOKENS,
)  # fmt: skip
_SUMS = len(_RATES)      # then: sums of TTFT and of gaps, count and sum of queueing
_COUNTERS = _SUMS + 4
_PERCENTILES = ((TTFT, Feature.TTFT_P95_S), (INTER_TOKEN, Feature.TPOT_P95_S))
_DOWN = frozenset({"FAILED", "LOST"})  # a stopped one was asked to


class Rejection(StrEnum):
    """Why a frame was left out."""

    DUPLICATE = "DUPLICATE"
    LATE = "LATE"
    SKEWED = "SKEWED"
    BROKEN = "BROKEN"
    MISPLACED = "MISPLACED"      # a reading of a replica that is not on this node: the rest of the frame counts


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldSettings:
    """How steps are cut. `bounds`: the upper bounds of the engine's histograms, without +Inf, by metric."""

    step_s: float = 5.0
    window_s: float = 3600.0
    lateness_s: float = 1.5      # waited for frames after a step's end
    skew_s: float = 30.0         # by which a frame's stamp may differ from the coordinator's clock
    bounds: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(slots=True)
class _Node:
    """What is remembered of a node's frames."""

    boot: str
    seen: deque[int]
    last_s: float


@dataclass(slots=True)
class _Pending:
    """What came in for one step. `fresh`: counters began anew; `restarted`: because the engine did."""

    rows: list[int] = field(default_factory=list)
    stamps: list[float] = field(default_factory=list)
    fresh: list[bool] = field(default_factory=list)
    restarted: list[bool] = field(default_factory=list)
    counters: list[tuple[float, ...]] = field(default_factory=list)
    newest: dict[int, ReplicaReading] = field(default_factory=dict)
    requests: dict[int, list[float]] = field(default_factory=dict)
    held: dict[tuple[int, str, str], float] = field(default_factory=dict)
    sketches: dict[int, tuple[list[SketchCounts], list[SketchCounts]]] = field(default_factory=dict)
    gpus: dict[str, GpuReading] = field(default_factory=dict)


class FeatureFold:
    """Frames in, steps out. `place` it first; replicas that are not placed are not looked at."""

    def __init__(self, settings: FoldSettings, *, rows: int = ROWS_MIN) -> None:
        self.settings = settings
        self.rejected: Counter[Rejection] = Counter()
        self.skipped = 0                         # steps that were never closed, since the caller was late
        self._window = Window(steps=max(2, math.ceil(settings.window_s / settings.step_s)), rows=rows)
        self._placed: dict[str, Placement] = {}
        self._row: dict[str, int] = {}
        self._free: list[int] = []
        self._width = 0                          # rows that were ever used: a step never gets narrower
        self._next: int | None = None            # the first step that is not closed
        self._pending: dict[int, _Pending] = {}
        self._instance: dict[int, str] = {}
        self._told: dict[int, int] = {}          # restarts, as agents count them
        self._due: dict[int, int] = {}           # of those: that no step holds yet
        self._unseen: dict[int, int] = {}        # and that frames have not shown yet
        self._nodes: dict[str, _Node] = {}
        self._counters: Floats = np.full((rows, _COUNTERS), np.nan)
        self._stamps: Floats = np.full(rows, np.nan)
        self._limits: Floats = np.full((len(_PERCENTILES), rows), np.nan)
        self._buckets: dict[str, Floats] = {
            name: np.full((rows, len(bounds) + 1), np.nan) for name, bounds in settings.bounds.items()
        }

    @property
    def replicas(self) -> tuple[str, ...]:
        """The replicas in the order of a step's rows; a row that nobody has is named by nothing."""
        names = [""] * self._width
        for name, row in self._row.items():
            names[row] = name
        return tuple(names)

    @property
    def placements(self) -> Mapping[str, Placement]:
        """What is placed now."""
        return self._placed

    def place(self, placements: Iterable[Placement]) -> tuple[int, ...]:
        """Say which replicas there are; the others are forgotten, and those that moved begin anew.

        The rows of which nothing holds any more.
        """
        wanted = {each.replica: each for each in placements}
        gone = [name for name in self._row if name not in wanted or _moved(self._placed[name], wanted[name])]
        freed = tuple(self._row.pop(name) for name in gone)
        for row in freed:
            self._forget(row)
        for name in wanted:
            if name not in self._row:
                self._row[name] = self._free.pop() if self._free else self._width
                self._width = max(self._width, self._row[name] + 1)
        if self._width > self._window.rows:
            self._grow(max(2 * self._window.rows, self._width))
        self._placed = wanted
        self._limits[:] = np.nan
        for name, row in self._row.items():
            self._limits[:, row] = wanted[name].ttft_p95_s, wanted[name].tpot_p95_s
        return freed

    def history(self, replica: str, *, steps: int) -> Figures:
        """The newest steps of one replica, the oldest first: what evidence is drawn from."""
        last = (self._next or 0) - 1
        return self._window.history(self._row[replica], first=last - steps + 1, last=last)

    def add(self, frame: FrameReading, *, now_s: float) -> Rejection | None:
        """Take in one frame; the reason if it was left out."""
        rejection = self._accept(frame, now_s)
        if rejection is not None:
            self.rejected[rejection] += 1
            return rejection
        pending = self._pending.setdefault(math.floor(frame.end_s / self.settings.step_s), _Pending())
        if self._in_order(frame):
            for gpu in frame.gpus:
                pending.gpus[gpu.uuid] = gpu
            for reading in frame.replicas:
                self._add_replica(pending, reading, frame)
        self._add_requests(pending, frame)
        return None

    def tell_restarts(self, counts: Mapping[str, int]) -> None:
        """How often agents started engines again, by replica: what is more than was told before counts in a step."""
        for name, count in counts.items():
            row = self._row.get(name)
            if row is None:
                continue
            more = count - self._told.get(row, count)
            self._told[row] = count
            if more > 0:
                self._due[row] = self._due.get(row, 0) + more
                self._unseen[row] = self._unseen.get(row, 0) + more

    def close(self, now_s: float) -> list[FeatureStep]:
        """The steps that are over, in order, and at most CATCH_UP_STEPS: of more, the newest that a frame came for."""
        if not math.isfinite(now_s):
            return []
        due = math.floor((now_s - self.settings.lateness_s) / self.settings.step_s)
        if self._next is None or due < self._next - 2:  # the first call, or the clock was set back
            self._restart(due)
            return []
        if due - self._next > self.settings.window_s / self.settings.step_s:
            self.skipped += due - 1 - self._next
            self._restart(due - 1)
        elif due - self._next > CATCH_UP_STEPS:
            self._skip(due)
        closed = [self._close(number) for number in range(self._next, due)]
        self._next = max(self._next, due)
        return closed

    def _skip(self, due: int) -> None:
        """Leave out what is too long ago, and what nothing is known of since the caller stood still."""
        assert self._next is not None
        first = min((number for number in self._pending if number >= due - CATCH_UP_STEPS), default=due - 1)
        first = min(first, due - 1)
        self.skipped += first - self._next
        self._pending = {number: each for number, each in self._pending.items() if number >= first}
        self._next = first

    # -- taking in

    def _accept(self, frame: FrameReading, now_s: float) -> Rejection | None:
        if not (math.isfinite(frame.start_s) and math.isfinite(frame.end_s) and frame.start_s <= frame.end_s):
            return Rejection.BROKEN
        if not abs(frame.end_s - now_s) <= self.settings.skew_s:
            return Rejection.SKEWED
        known = self._nodes.get(frame.node)
        if known is not None and known.boot == frame.boot and frame.sequence in known.seen:
            return Rejection.DUPLICATE
        if self._next is not None and frame.end_s < self._next * self.settings.step_s:
            return Rejection.LATE
        return None

    def _in_order(self, frame: FrameReading) -> bool:
        known = self._nodes.get(frame.node)
        if known is None or known.boot != frame.boot:
            self._nodes[frame.node] = _Node(frame.boot, deque([frame.sequence], SEQUENCES_KEPT), frame.end_s)
            return True
        ordered = not known.seen or frame.sequence > max(known.seen)
        known.seen.append(frame.sequence)
        known.last_s = max(known.last_s, frame.end_s)
        return ordered

    def _add_replica(self, pending: _Pending, reading: ReplicaReading, frame: FrameReading) -> None:
        row = self._row.get(reading.replica)
        if row is None:
            return
        nodes = self._placed[reading.replica].nodes
        if nodes and frame.node not in nodes:
            self.rejected[Rejection.MISPLACED] += 1
            return
        pending.newest[row] = reading
        age_s = reading.age_s if 0 <= reading.age_s < math.inf else 0.0
        known = self._instance.get(row)
        if reading.instance:
            self._instance[row] = reading.instance
        anew = known is not None and bool(reading.instance) and known != reading.instance
        pending.rows.append(row)
        pending.stamps.append(frame.end_s - age_s)
        pending.fresh.append(anew)
        pending.restarted.append(anew and engine_of(reading.instance) != engine_of(known or ""))
        pending.counters.append(_counters(reading))

    def _add_requests(self, pending: _Pending, frame: FrameReading) -> None:
        for each in frame.requests:
            row = self._row.get(each.replica)
            if row is None:
                continue
            counts = pending.requests.setdefault(row, [0.0] * 4)
            for index, count in enumerate((each.arrived, each.finished, each.failed + each.cut, each.refused)):
                counts[index] += count if 0 <= count < math.inf else 0.0
            pending.held[row, frame.node, each.serving_class] = each.held
            if each.ttft_s is None and each.tpot_s is None:
                continue
            ttft, tpot = pending.sketches.setdefault(row, ([], []))
            if each.ttft_s is not None:
                ttft.append(each.ttft_s)
            if each.tpot_s is not None:
                tpot.append(each.tpot_s)

    # -- closing

    def _close(self, number: int) -> FeatureStep:
        pending = self._pending.pop(number, _Pending())
        names = self.replicas
        end_s = (number + 1) * self.settings.step_s
        values: Floats = np.full((len(names), len(COLUMN)), np.nan)
        self._put_gauges(values, pending, end_s)
        self._put_gpus(values, pending)
        fresh = np.zeros(len(names), dtype=bool)
        if pending.rows:
            self._put_rates(values, pending, fresh)
        self._put_told(values[:, COLUMN[Feature.RESTARTS]])
        self._put_percentiles(values, pending, fresh)
        self._put_requests(values, pending)
        self._forget_nodes(end_s)
        step = FeatureStep(number=number, end_s=end_s, replicas=names, values=clean(values).astype(np.float32))
        self._window.put(number, step.values)
        return step

    def _put_gauges(self, values: Floats, pending: _Pending, end_s: float) -> None:
        stamp_of = dict(zip(pending.rows, pending.stamps, strict=True))
        for row, reading in pending.newest.items():
            age_s = end_s - stamp_of[row]
            values[row, COLUMN[Feature.AGE_S]] = age_s
            values[row, COLUMN[Feature.READY]] = float(reading.state == "READY")
            values[row, COLUMN[Feature.DOWN]] = float(reading.state in _DOWN)
            values[row, COLUMN[Feature.HELD]] = reading.held  # the ingress's own: as new as the frame
            if age_s - self.settings.step_s <= STALE_S:
                values[row, COLUMN[Feature.RUNNING]] = reading.running
                values[row, COLUMN[Feature.WAITING]] = reading.waiting
                values[row, COLUMN[Feature.KV_USAGE]] = reading.kv_cache_usage
                values[row, COLUMN[Feature.RESIDENT_BYTES]] = reading.resident_memory_bytes

    def _put_gpus(self, values: Floats, pending: _Pending) -> None:
        """A replica on several GPUs is as slow as the slowest and as hot as the hottest."""
        if not pending.gpus:
            return
        columns = [COLUMN[each] for each in (
            Feature.GPU_UTILIZATION, Feature.GPU_POWER, Feature.GPU_CLOCK_MHZ, Feature.GPU_TEMPERATURE_C,
            Feature.GPU_MEMORY, Feature.GPU_THROTTLED,
        )]  # fmt: skip
        for name, row in self._row.items():
            found = [pending.gpus[uuid] for uuid in self._placed[name].gpus if uuid in pending.gpus]
            figures = [_gpu_figures(gpu) for gpu in found if gpu.age_s <= STALE_S]
            if len(figures) == 1:
                values[row, columns] = figures[0]
            elif figures:
                table = np.array(figures)
                known = np.where(np.isnan(table), -np.inf, table).max(axis=0)
                least = np.where(np.isnan(table), np.inf, table).min(axis=0)
                known[1:3] = least[1:3]
                values[row, columns] = known

    def _put_rates(self, values: Floats, pending: _Pending, fresh: Flags) -> None:
        order = np.argsort(np.array(pending.rows), kind="stable")
        rows = np.array(pending.rows)[order]
        stamps, resets = np.array(pending.stamps)[order], np.array(pending.fresh)[order]
        restarted = np.array(pending.restarted)[order]
        counts = clean(np.array(pending.counters, dtype=np.float64))[order]
        starts = np.flatnonzero(np.concatenate(([True], rows[1:] != rows[:-1])))
        heads = rows[starts]
        increments, known = _increments(counts, self._counters[rows], resets, starts)
        total = np.add.reduceat(increments, starts, axis=0)
        total[~np.logical_or.reduceat(known, starts, axis=0)] = np.nan
        newest = np.maximum.reduceat(stamps, starts)
        span_s = newest - self._stamps[heads]
        with np.errstate(invalid="ignore", divide="ignore"):
            span_s = np.where(span_s > 1e-3, span_s, np.nan)
            rates = total / span_s[:, None]
            values[heads[:, None], [COLUMN[each] for each in _RATES]] = rates[:, :_SUMS]
            values[heads, COLUMN[Feature.SPAN_S]] = span_s
            means = total[:, _SUMS : _SUMS + 2] / total[:, _SUMS - 2 : _SUMS]
            values[heads[:, None], [COLUMN[Feature.TTFT_S], COLUMN[Feature.STEP_S]]] = means
            values[heads, COLUMN[Feature.QUEUE_S]] = total[:, _SUMS + 3] / total[:, _SUMS + 2]
        values[heads, COLUMN[Feature.RESTARTS]] = np.add.reduceat(restarted.astype(float), starts)
        fresh[heads] = np.logical_or.reduceat(resets, starts)
        last = np.concatenate((starts[1:], [len(rows)])) - 1
        kept = np.where(np.isnan(counts[last]), self._counters[heads], counts[last])
        self._counters[heads] = np.where(fresh[heads][:, None], counts[last], kept)
        self._stamps[heads] = np.fmax(self._stamps[heads], newest)

    def _put_told(self, restarts: Floats) -> None:
        """Count what agents told, less what they had told already of what frames show now."""
        for row in [row for row in self._unseen if restarts[row] >= 1.0]:
            restarts[row] = max(0.0, float(restarts[row]) - self._unseen.pop(row))
        for row, count in self._due.items():
            restarts[row] = np.nan_to_num(restarts[row]) + count
        self._due.clear()

    def _put_percentiles(self, values: Floats, pending: _Pending, fresh: Flags) -> None:
        late = values[:, COLUMN[Feature.LATE_SHARE]]  # a view
        for (metric, feature), limits in zip(_PERCENTILES, self._limits, strict=True):
            bounds = self.settings.bounds.get(metric)
            if bounds is None:
                continue
            found: list[tuple[int, Sequence[float]]] = [
                (row, counts) for row, reading in pending.newest.items()
                if len(counts := reading.histograms.get(metric, _EMPTY).counts) == len(bounds) + 1
            ]
            if not found:
                continue
            rows = np.array([row for row, _ in found])
            newest = clean(np.array([counts for _, counts in found], dtype=np.float64))
            before = np.where(fresh[rows][:, None], 0.0, self._buckets[metric][rows])
            before = np.where(newest[:, -1:] < before[:, -1:], 0.0, before)
            change = np.maximum.accumulate(np.maximum(newest - before, 0.0), axis=1)
            quantile = bucket_quantile(np.nan_to_num(change), bounds, 0.95)
            whole = ~np.isnan(change).any(axis=1)
            values[rows, COLUMN[feature]] = np.where(whole, quantile, np.nan)
            share = bucket_share_above(np.nan_to_num(change), bounds, limits[rows])
            late[rows] = np.fmax(late[rows], np.where(whole, share, np.nan))
            self._buckets[metric][rows] = newest

    def _put_requests(self, values: Floats, pending: _Pending) -> None:
        columns = [COLUMN[each] for each in (Feature.ARRIVALS, Feature.FINISHED, Feature.FAILED, Feature.REFUSED)]
        # An ingress that tells what it holds of a replica, and nothing else of it, had no request for it.
        quiet = (row for row, reading in pending.newest.items() if not math.isnan(reading.held))
        values[np.ix_([row for row in quiet if row not in pending.requests], columns)] = 0.0
        for row, counts in pending.requests.items():
            values[row, columns] = np.array(counts) / self.settings.step_s
        held: dict[int, float] = {}
        for (row, _, _), count in pending.held.items():
            held[row] = held.get(row, 0.0) + count
        for row, count in held.items():
            if math.isnan(values[row, COLUMN[Feature.HELD]]):
                values[row, COLUMN[Feature.HELD]] = count
        for row, both in pending.sketches.items():
            shares = []
            for (_, feature), sketches, limit in zip(_PERCENTILES, both, self._limits[:, row].tolist(), strict=True):
                seen = sketch_quantile(sketches, 0.95)
                if not math.isnan(seen):  # what clients saw goes before what the engine says
                    values[row, COLUMN[feature]] = seen
                shares.append(sketch_share_above(sketches, limit))
            if not all(map(math.isnan, shares)):
                values[row, COLUMN[Feature.LATE_SHARE]] = np.nanmax(shares)

    # -- rows

    def _restart(self, number: int) -> None:
        """Begin at this step; what was counted before is no base any more."""
        if self._next is not None:
            self._window.clear()
            self._counters[:] = np.nan
            self._stamps[:] = np.nan
            for table in self._buckets.values():
                table[:] = np.nan
            self._pending = {key: value for key, value in self._pending.items() if key >= number}
        self._next = number

    def _forget_nodes(self, now_s: float) -> None:
        for name in [name for name, each in self._nodes.items() if now_s - each.last_s > NODES_KEPT_S]:
            del self._nodes[name]

    def _forget(self, row: int) -> None:
        self._free.append(row)
        self._window.forget(row)
        self._counters[row] = np.nan
        self._stamps[row] = np.nan
        for kept in (self._instance, self._told, self._due, self._unseen):
            kept.pop(row, None)
        for table in self._buckets.values():
            table[row] = np.nan
        for pending in self._pending.values():
            pending.newest.pop(row, None)
            keep = [index for index, each in enumerate(pending.rows) if each != row]
            pending.rows = [pending.rows[index] for index in keep]
            pending.stamps = [pending.stamps[index] for index in keep]
            pending.fresh = [pending.fresh[index] for index in keep]
            pending.restarted = [pending.restarted[index] for index in keep]
            pending.counters = [pending.counters[index] for index in keep]
            pending.requests.pop(row, None)
            pending.sketches.pop(row, None)
            pending.held = {key: value for key, value in pending.held.items() if key[0] != row}

    def _grow(self, rows: int) -> None:
        more = rows - self._window.rows
        self._window = self._window.grown(rows)
        self._counters = np.pad(self._counters, ((0, more), (0, 0)), constant_values=np.nan)
        self._stamps = np.pad(self._stamps, (0, more), constant_values=np.nan)
        self._limits = np.pad(self._limits, ((0, 0), (0, more)), constant_values=np.nan)
        for name, table in self._buckets.items():
            self._buckets[name] = np.pad(table, ((0, more), (0, 0)), constant_values=np.nan)


def engine_of(instance: str) -> str:
    """The part of an instance's name that the engine gave, without its agent's."""
    return instance.rpartition(".")[0] or instance


def _moved(before: Placement, now: Placement) -> bool:
    """Whether what was learnt of a replica says nothing of it any more."""
    elsewhere = bool(before.gpus and now.gpus) and before.gpus != now.gpus
    return elsewhere or (before.nodes, before.variant) != (now.nodes, now.variant)


def _increments(counts: Floats, base: Floats, resets: Flags, starts: npt.NDArray[np.int64]) -> tuple[Floats, Flags]:
    """What each reading added to the one before it of the same row, and where that is known."""
    rows = len(counts)
    first = np.zeros(rows, dtype=bool)
    first[starts] = True
    group = np.maximum.accumulate(np.where(first, np.arange(rows), 0))
    # The newest known figure before each reading: of this step, or else the base.
    at = np.where(np.isnan(counts), -1, np.arange(rows)[:, None])
    at = np.concatenate((np.full((1, counts.shape[1]), -1), np.maximum.accumulate(at, axis=0)[:-1]))
    inside = at >= group[:, None]
    before = np.where(inside, np.take_along_axis(counts, np.maximum(at, 0), axis=0), base)
    with np.errstate(invalid="ignore"):
        restarted = resets[:, None] | (counts < before)
    increments = np.where(restarted, counts, counts - before)
    known = ~np.isnan(increments)
    return np.where(known, increments, 0.0), known


def _counters(reading: ReplicaReading) -> tuple[float, ...]:
    ttft = reading.histograms.get(TTFT, _EMPTY)
    gaps = reading.histograms.get(INTER_TOKEN, _EMPTY)
    queue = reading.histograms.get(QUEUE, _EMPTY)
    finished = reading.finished
    return (
        reading.prompt_tokens, reading.generation_tokens, reading.preemptions, reading.iterations,
        reading.prefix_cache_hits,
        sum(finished.values()) if finished else math.nan, finished.get("length", 0.0) if finished else math.nan,
        ttft.counts[-1] if ttft.counts else math.nan, gaps.counts[-1] if gaps.counts else math.nan,
        ttft.sum, gaps.sum,
        queue.counts[-1] if queue.counts else math.nan, queue.sum,
    )  # fmt: skip


def _gpu_figures(gpu: GpuReading) -> tuple[float, ...]:
    share = gpu.memory_used_bytes / gpu.memory_total_bytes if gpu.memory_total_bytes > 0 else math.nan
    power = gpu.power_w / gpu.power_limit_w if gpu.power_limit_w > 0 else math.nan
    reasons = gpu.throttle_reasons
    known = 0 <= reasons < 2**63
    throttled = float(int(reasons) & THROTTLE_MASK != 0) if known else math.nan
    return gpu.utilization, power, gpu.sm_clock_mhz, gpu.temperature_c, share, throttled
