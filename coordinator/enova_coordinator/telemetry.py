"""Recent telemetry in bounded memory: what arrives is checked at the border, aligned to a step, and kept for a window.

Nothing in here waits. A frame is refused as a whole when it comes from the wrong node, from the future, from before
the window, or twice; a figure of it when it is not finite, negative, stale, or of an object that is not this node's.
Every refusal is counted by its reason, and what was refused is missing, never zero.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from enova_coordinator.core.demand_log import DemandLog, Span, span_of
from enova_coordinator.core.series import (
    COLUMN,
    FIRST_COUNTER,
    FIRST_REQUEST_COUNT,
    GPU_FEATURES,
    GPU_FIRST_COUNTER,
    MINUTE_S,
    REPLICA_FEATURES,
    REQUEST_COUNTS,
    Counters,
    Figures,
    LengthFigures,
    NodeFrame,
    ObjectFigures,
    RequestFigures,
    Ring,
    minutes,
)
from enova_coordinator.core.sketch import COUNT_MAX
from enova_coordinator.request_totals import RequestLedger, RequestTotals

GPUS_PER_NODE_MAX = 64
REPLICAS_PER_NODE_MAX = 64
LENGTHS_MAX = 4096                 # answers of one deployment that wait to be learned from
PAIRS_MAX = 2048                   # newest lengths of prompt and answer that are kept of one deployment
HELD_STEPS = 15                    # after which a count of held requests that was not repeated is void
_NO_REQUESTS = [0.0] * len(REQUEST_COUNTS)
_UNCOUNTED = [math.nan] * len(REQUEST_COUNTS)
_ARRIVED, _FINISHED = REQUEST_COUNTS.index("arrived"), REQUEST_COUNTS.index("finished")


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryLimits:
    """How much is kept, and what is too old or too early; model time."""

    step_s: float = 1.0
    window_s: float = 600.0
    future_s: float = 30.0


@dataclass(slots=True)
class _Tracked:
    """One GPU or replica: its window, its counters' last values, the message that it was last read from."""

    ring: Ring
    counters: Counters = field(default_factory=Counters)
    source: object = None
    newest_s: float = -math.inf


@dataclass(slots=True)
class _Sender:
    """A node as a sender of frames."""

    boot: str = ""
    sequence: int = 0
    end_s: float = -math.inf
    frame: str = ""
    gpus: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MinuteSeries:
    """Whole minutes of one object, the newest last; minute i ends at `end_s` - (n-1-i) minutes."""

    end_s: float
    values: NDArray[np.float64]        # minutes x features

    @property
    def first_end_s(self) -> float:
        """When the first minute ended."""
        return self.end_s - MINUTE_S * (len(self.values) - 1)


class Telemetry:
    """All nodes' recent figures. `now_s` is model time; `owns` says whether a replica is this node's to report."""

    def __init__(
        self, limits: TelemetryLimits, *, now_s: Callable[[], float], owns: Callable[[str, str], bool]
    ) -> None:
        self.limits = limits
        self.rejected: Counter[str] = Counter()
        self.frames = 0
        self.samples = 0
        self._now_s = now_s
        self._owns = owns
        self._slots = max(1, round(limits.window_s / limits.step_s))
        self._senders: dict[str, _Sender] = {}
        self._replicas: dict[str, _Tracked] = {}
        self._gpus: dict[str, _Tracked] = {}
        self._totals = RequestLedger(self.rejected)
        self._demand = DemandLog(slots=self._slots)
        self._lengths: dict[str, deque[LengthFigures]] = {}
        self._pairs: dict[str, deque[tuple[int, int]]] = {}

    def add(self, frame: NodeFrame, *, sender: str) -> bool:
        """Take in a frame that came over `sender`'s stream; False (and counted) if it was refused."""
        for reason, count in frame.rejected.items():
            self.rejected[reason] += count
        refusal = self._refusal(frame, sender)
        if refusal:
            self.rejected[refusal] += 1
            return False
        known = self._senders.setdefault(sender, _Sender())
        known.boot, known.sequence, known.frame = frame.boot, frame.sequence, frame.id
        known.end_s = max(known.end_s, frame.end_s)
        step = math.floor(frame.end_s / self.limits.step_s)
        self.frames += 1
        self.rejected["dropped_by_agent"] += frame.dropped_samples
        self._add_gpus(known, frame, step)
        self._add_replicas(frame, step)
        self._add_requests(frame)
        self._add_lengths(frame.lengths)
        return True

    def _refusal(self, frame: NodeFrame, sender: str) -> str:
        if frame.node != sender:
            return "other_node"
        if not (math.isfinite(frame.end_s) and math.isfinite(frame.start_s)) or frame.start_s > frame.end_s:
            return "bad_time"
        now_s = self._now_s()
        if frame.end_s > now_s + self.limits.future_s:
            return "future"
        if frame.end_s < now_s - self.limits.window_s:
            return "too_old"
        known = self._senders.get(sender)
        if known is not None and frame.boot == known.boot and frame.sequence <= known.sequence:
            return "duplicate"
        return ""

    def _add_gpus(self, known: _Sender, frame: NodeFrame, step: int) -> None:
        if len(frame.gpus) > GPUS_PER_NODE_MAX:
            self.rejected["too_many_gpus"] += len(frame.gpus) - GPUS_PER_NODE_MAX
        for figures in frame.gpus[:GPUS_PER_NODE_MAX]:
            name = f"{frame.node}/gpus/{figures.name}"
            tracked = self._gpus.get(name)
            if tracked is None:
                if known.gpus >= GPUS_PER_NODE_MAX:
                    self.rejected["too_many_gpus"] += 1
                    continue
                tracked = self._gpus[name] = _Tracked(self._ring(len(GPU_FEATURES), GPU_FIRST_COUNTER))
                known.gpus += 1
            self._put(tracked, figures, step, frame.end_s, GPU_FIRST_COUNTER)

    def _add_replicas(self, frame: NodeFrame, step: int) -> None:
        if len(frame.replicas) > REPLICAS_PER_NODE_MAX:
            self.rejected["too_many_replicas"] += len(frame.replicas) - REPLICAS_PER_NODE_MAX
        for figures in frame.replicas[:REPLICAS_PER_NODE_MAX]:
            if not self._owns(frame.node, figures.name):
                self.rejected["other_nodes_replica"] += 1
                continue
            tracked = self._tracked_replica(figures.name)
            self._put(tracked, figures, step, frame.end_s, FIRST_COUNTER)

    def _put(self, tracked: _Tracked, figures: ObjectFigures, step: int, end_s: float, first_counter: int) -> None:
        row = figures.row
        self.samples += len(row)
        if end_s >= tracked.newest_s:
            row[first_counter:] = tracked.counters.increments(figures.instance, row[first_counter:])
            tracked.newest_s = end_s
            tracked.source = figures.source
        else:  # late: counters of the past say nothing about the present increments
            row[first_counter:] = [math.nan] * (len(row) - first_counter)
        if first_counter == FIRST_COUNTER:
            # Where its ingress counts, no word of a request means that none came.
            row += _UNCOUNTED if math.isnan(row[COLUMN["held"]]) else _NO_REQUESTS
        tracked.ring.put(step, row)

    def _tracked_replica(self, name: str) -> _Tracked:
        tracked = self._replicas.get(name)
        if tracked is None:
            tracked = _Tracked(self._ring(len(REPLICA_FEATURES), FIRST_COUNTER))
            self._replicas[name] = tracked
        return tracked

    def _ring(self, features: int, first_counter: int) -> Ring:
        return Ring(slots=self._slots, features=features, first_counter=first_counter)

    def _add_requests(self, frame: NodeFrame) -> None:
        step_s = self.limits.step_s
        span = span_of(frame.start_s, frame.end_s, step_s=step_s, steps_max=self._slots)
        # Without an ingress nobody counts: what the frame does not say of requests is unknown.
        counted = bool(frame.requests) or not frame.replicas or any(
            not math.isnan(each.row[COLUMN["held"]]) for each in frame.replicas
        )
        self._demand.heard(frame.node, span, since=math.floor(frame.start_s / step_s), counts=counted)
        by_replica: dict[str, list[int]] = {}
        for request in frame.requests:
            if max(*request.counts, request.prompt_tokens, request.output_tokens, request.held) > COUNT_MAX:
                self.rejected["bad_count"] += 1
                continue
            self.samples += self._totals.add(frame.node, request, end_s=frame.end_s)
            self._add_demand(frame.node, request, span)
            known = by_replica.get(request.replica)
            counts = request.counts
            by_replica[request.replica] = (
                list(counts) if known is None else [old + new for old, new in zip(known, counts, strict=True)]
            )
        for replica, summed in by_replica.items():
            tracked = self._replicas.get(replica)
            if tracked is not None:
                shares = [span.share * count for count in summed]
                tracked.ring.spread(span.first, span.last, FIRST_REQUEST_COUNT, shares)

    def _add_demand(self, node: str, request: RequestFigures, span: Span) -> None:
        counts = request.counts
        values = (counts[_ARRIVED], counts[_FINISHED], request.prompt_tokens, request.output_tokens)
        if not self._demand.add(request.deployment, node, span, values):
            self.rejected["too_many_deployments"] += 1
        elif request.lengths:
            self._pairs.setdefault(request.deployment, deque(maxlen=PAIRS_MAX)).extend(request.lengths)

    def _add_lengths(self, lengths: Iterable[LengthFigures]) -> None:
        for sample in lengths:
            waiting = self._lengths.get(sample.deployment)
            if waiting is None or sample.tokens < 0:
                self.rejected["unwanted_length"] += 1
            else:
                waiting.append(sample)

    # Answers' lengths.

    def want_lengths(self, deployments: Iterable[str]) -> None:
        """Keep the lengths of these deployments' answers from now on, and of no others."""
        self._lengths = {name: self._lengths.get(name) or deque(maxlen=LENGTHS_MAX) for name in deployments}

    def take_lengths(self, deployment: str) -> list[LengthFigures]:
        """What came since it was last asked; the newest, if it was more than LENGTHS_MAX."""
        waiting = self._lengths.get(deployment)
        taken = list(waiting or ())
        if waiting is not None:
            waiting.clear()
        return taken

    def length_pairs(self, deployment: str) -> tuple[tuple[int, int], ...]:
        """Tokens of prompt and answer of a sample of its newest requests."""
        return tuple(self._pairs.get(deployment, ()))

    # What others read.

    @property
    def now_s(self) -> float:
        """Model time."""
        return self._now_s()

    @property
    def step(self) -> int:
        """The step of now."""
        return math.floor(self._now_s() / self.limits.step_s)

    def replicas(self) -> tuple[str, ...]:
        """The replicas with a window."""
        return tuple(self._replicas)

    def gpus_of(self, node: str) -> tuple[str, ...]:
        """The UUIDs of a node's GPUs that were measured."""
        prefix = f"{node}/gpus/"
        return tuple(name.removeprefix(prefix) for name in self._gpus if name.startswith(prefix))

    def replica_window(self, replica: str, *, steps: int) -> tuple[float, Figures] | None:
        """The newest `steps` rows of a replica and the start of the first; None if it never reported."""
        return self._window(self._replicas.get(replica), steps)

    def gpu_window(self, node: str, uuid: str, *, steps: int) -> tuple[float, Figures] | None:
        """The newest `steps` rows of a GPU and the start of the first; None if it never reported."""
        return self._window(self._gpus.get(f"{node}/gpus/{uuid}"), steps)

    def _window(self, tracked: _Tracked | None, steps: int) -> tuple[float, Figures] | None:
        if tracked is None:
            return None
        last = self.step
        first = last - min(steps, self._slots) + 1
        return first * self.limits.step_s, tracked.ring.window(first, last)

    def demanded(self) -> tuple[str, ...]:
        """The deployments that anybody has sent a request to."""
        return self._demand.deployments()

    def demand_window(self, deployment: str, *, steps: int) -> tuple[float, Figures]:
        """What clients sent in the newest `steps` steps that are over, by DEMAND_FEATURES, and the first one's start.

        A step is missing of which no node was heard, or not one that brings a good part of the requests; one in
        which nobody spoke of a request had none.
        """
        last = self.step - 1               # the newest step is not over: its count would look like a fall
        first = last - min(steps, self._slots - 1) + 1
        return first * self.limits.step_s, self._demand.window(deployment, first, last, now=self.step)

    def demand_minutes(self, deployment: str, *, count: int) -> MinuteSeries:
        """The newest `count` whole minutes of what clients sent, by DEMAND_FEATURES."""
        per_minute = round(MINUTE_S / self.limits.step_s)
        end_minute = math.floor((self._now_s() - self.limits.step_s) / MINUTE_S)
        behind = self.step - 1 - (end_minute * per_minute - 1)
        count = min(count, (self._slots - 1 - behind) // per_minute)
        _, rows = self.demand_window(deployment, steps=count * per_minute + behind)
        whole = rows[: len(rows) - behind] if behind else rows
        values = minutes(whole, per_minute=per_minute, first_counter=0)
        known = (~np.isnan(whole)).reshape(-1, per_minute, whole.shape[1]).sum(axis=1)
        # A minute of which a part was heard is taken to have gone on alike; of less than half nothing is said.
        values = np.where(2 * known >= per_minute, values * per_minute / np.maximum(known, 1), np.nan)
        return MinuteSeries(end_s=end_minute * MINUTE_S, values=values)

    def replica_source(self, replica: str) -> object:
        """The message that a replica's newest row was read from."""
        tracked = self._replicas.get(replica)
        return tracked.source if tracked is not None else None

    def gpu_source(self, node: str, uuid: str) -> object:
        """The message that a GPU's newest row was read from."""
        tracked = self._gpus.get(f"{node}/gpus/{uuid}")
        return tracked.source if tracked is not None else None

    def replica_minutes(self, replica: str, *, count: int) -> MinuteSeries | None:
        """The newest `count` whole minutes of a replica; None if it never reported."""
        return self._minutes(self._replicas.get(replica), count, FIRST_COUNTER)

    def gpu_minutes(self, node: str, uuid: str, *, count: int) -> MinuteSeries | None:
        """The newest `count` whole minutes of a GPU; None if it never reported."""
        return self._minutes(self._gpus.get(f"{node}/gpus/{uuid}"), count, GPU_FIRST_COUNTER)

    def _minutes(self, tracked: _Tracked | None, count: int, first_counter: int) -> MinuteSeries | None:
        if tracked is None:
            return None
        per_minute = round(MINUTE_S / self.limits.step_s)
        # The newest frame may still be on its way: a minute is whole one step after its end.
        end_minute = math.floor((self._now_s() - self.limits.step_s) / MINUTE_S)
        count = min(count, self._slots // per_minute)
        rows = tracked.ring.window((end_minute - count) * per_minute, end_minute * per_minute - 1)
        return MinuteSeries(
            end_s=end_minute * MINUTE_S, values=minutes(rows, per_minute=per_minute, first_counter=first_counter)
        )

    def newest_frames(self, nodes: Iterable[str]) -> tuple[str, ...]:
        """The newest frame of each of the nodes that sent any, as node/boot/sequence."""
        return tuple(known.frame for node in nodes if (known := self._senders.get(node)) is not None)

    def newest_end_s(self, node: str) -> float:
        """When a node's newest frame ended; minus infinity if it never sent one."""
        known = self._senders.get(node)
        return known.end_s if known is not None else -math.inf

    def totals(self, deployment: str) -> Mapping[tuple[str, str], RequestTotals]:
        """The sums of a deployment's requests by replica and class, since the coordinator began to listen.

        Those of replicas that are gone stand under one that is called `GONE`.
        """
        return self._totals.of(deployment)

    def held_by(self, totals: RequestTotals) -> int:
        """The requests of a sum that ingresses hold, as they said of late."""
        return totals.held_since(self._held_from_s)

    def held_nowhere(self, deployment: str) -> int:
        """Requests that ingresses hold for the deployment's first replica, as they said of late."""
        return self._totals.held_nowhere(deployment, oldest_s=self._held_from_s)

    @property
    def _held_from_s(self) -> float:
        return self._now_s() - HELD_STEPS * self.limits.step_s

    def forget(self, *, replicas: Callable[[str], bool], deployments: Callable[[str], bool]) -> None:
        """Drop the windows of replicas that are gone, and the totals of deployments that are gone."""
        for name in [name for name in self._replicas if not replicas(name)]:
            del self._replicas[name]
        self._totals.forget(replicas=replicas, deployments=deployments, oldest_s=self._held_from_s)
        self._demand.forget(deployments=deployments, now=self.step)
        for name in [name for name in self._pairs if not deployments(name)]:
            del self._pairs[name]

    def forget_node(self, node: str) -> None:
        """Drop what a deleted node's GPUs left."""
        self._senders.pop(node, None)
        self._demand.forget_node(node)
        for name in [name for name in self._gpus if name.startswith(f"{node}/gpus/")]:
            del self._gpus[name]


def column(rows: Figures | NDArray[np.float64], feature: str) -> Sequence[float]:
    """One feature of a replica's rows, as plain values."""
    values: Sequence[float] = rows[:, COLUMN[feature]].tolist()
    return values
