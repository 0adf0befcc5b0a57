"""What clients sent to each deployment, by the step, and which steps of it nobody has told yet. Pure.

Theory of operation. Each node's ingress tells of its own part of a deployment's requests, so a sum over nodes is known
only where all of them were heard. A frame says which span it covers. What covers no more than a moment is of the step
that it ends in; what was held back while an agent was away covers all that time and is spread over it. Until then the
steps since the node's last word are unknown, provided that its part matters: a node that brought next to nothing is not
waited for, and neither is one that stays away, which most likely serves nobody.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from enova_coordinator.core.series import DEMAND_FEATURES, Figures, Ring

LATE_STEPS = 3             # that a frame covers at most without being spread, and that a node may be behind
ABSENT_STEPS = 30          # without a word, after which a node is taken to be gone
PART_MIN = 0.1             # of a deployment's arrivals of late, for a node to be missed
HALF_LIFE_STEPS = 120.0    # of what "of late" means
DEPLOYMENTS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Span:
    """The steps that a frame covers, both included, and the share of what it counts that each of them has."""

    first: int
    last: int
    share: float = 1.0


def span_of(start_s: float, end_s: float, *, step_s: float, steps_max: int) -> Span:
    """The steps from `start_s` to `end_s`: the last one alone, or, if it is long, all of the newest `steps_max`."""
    last = math.floor(end_s / step_s)
    if end_s - start_s <= LATE_STEPS * step_s:
        return Span(last, last)
    before = math.floor(start_s / step_s)      # what came until then was told by a frame that ended in this step
    return Span(max(before + 1, last - steps_max + 1), last, 1 / (last - before))


@dataclass(slots=True)
class _Attendance:
    """Up to which step a node has told, and what it left out before."""

    last: int
    gaps: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Part:
    """What a node brought of a deployment's arrivals, the past worth ever less."""

    step: int
    arrived: float = 0.0


class DemandLog:
    """The newest `slots` steps of all deployments."""

    def __init__(self, *, slots: int) -> None:
        self._slots = slots
        self._rings: dict[str, Ring] = {}
        self._parts: dict[str, dict[str, _Part]] = {}      # by deployment and node
        self._nodes: dict[str, _Attendance] = {}
        self._heard = Ring(slots=slots, features=1, first_counter=0)  # steps that any node told of

    def deployments(self) -> tuple[str, ...]:
        """Those that anybody has sent a request to."""
        return tuple(self._rings)

    def heard(self, node: str, span: Span, *, since: int, counts: bool) -> None:
        """A node sent a frame of these steps that goes on from step `since`; `counts`: of its ingress, too."""
        self._heard.spread(span.first, span.last, 0, [1.0])
        if not counts:
            return
        known = self._nodes.get(node)
        if known is None:
            self._nodes[node] = _Attendance(span.last)
            return
        first = min(since, span.first)
        oldest = span.last - self._slots
        known.gaps = [part for gap in known.gaps if gap[1] > oldest for part in _without(gap, first, span.last)]
        if 0 < first - 1 - known.last <= ABSENT_STEPS:
            known.gaps.append((known.last + 1, first - 1))
        known.last = max(known.last, span.last)

    def add(self, deployment: str, node: str, span: Span, values: Sequence[float]) -> bool:
        """Add what a node counted in these steps, by DEMAND_FEATURES; False if there are too many deployments."""
        ring = self._rings.get(deployment)
        if ring is None:
            if len(self._rings) >= DEPLOYMENTS_MAX:
                return False
            ring = self._rings[deployment] = Ring(slots=self._slots, features=len(DEMAND_FEATURES), first_counter=0)
        ring.spread(span.first, span.last, 0, [value * span.share for value in values])
        part = self._parts.setdefault(deployment, {}).setdefault(node, _Part(span.last))
        part.arrived = _faded(part, span.last) + values[0]
        part.step = max(part.step, span.last)
        return True

    def window(self, deployment: str, first: int, last: int, *, now: int) -> Figures:
        """The rows of these steps: NaN where not all were heard that matter, zeros where nobody spoke of a request."""
        known = ~np.isnan(self._heard.window(first, last))
        for begin, end in self._missing(deployment, now):
            known[max(0, begin - first) : max(0, end - first + 1)] = False
        ring = self._rings.get(deployment)
        if ring is None:
            rows: Figures = np.full((last - first + 1, len(DEMAND_FEATURES)), np.nan, dtype=np.float32)
        else:
            rows = ring.window(first, last)
        rows = np.where(np.isnan(rows) & known, np.float32(0.0), rows)
        return np.where(known, rows, np.float32(np.nan))

    def forget(self, *, deployments: Callable[[str], bool], now: int) -> None:
        """Drop deployments that are gone, and the part of nodes that have brought nothing for a window."""
        for name in [name for name in self._rings if not deployments(name)]:
            del self._rings[name]
            self._parts.pop(name, None)
        for parts in self._parts.values():
            for node in [node for node, part in parts.items() if part.step <= now - self._slots]:
                del parts[node]
        for node in [node for node, each in self._nodes.items() if each.last <= now - self._slots]:
            del self._nodes[node]

    def forget_node(self, node: str) -> None:
        """A node that is deleted is not waited for."""
        self._nodes.pop(node, None)

    def _missing(self, deployment: str, now: int) -> Iterator[tuple[int, int]]:
        """Spans of steps in which a node that matters to the deployment has not told what it saw."""
        parts = self._parts.get(deployment, {})
        least: float | None = None
        for node, part in parts.items():
            known = self._nodes.get(node)
            if known is None:
                continue
            behind = LATE_STEPS < now - known.last <= ABSENT_STEPS
            if not behind and not known.gaps:
                continue
            if least is None:
                least = PART_MIN * sum(_faded(each, now) for each in parts.values())
            if part.arrived <= least:  # by what it brought when it was last heard
                continue
            if behind:
                yield known.last + 1, now
            yield from known.gaps


def _faded(part: _Part, step: int) -> float:
    return part.arrived * math.exp2(-max(0, step - part.step) / HALF_LIFE_STEPS)


def _without(gap: tuple[int, int], first: int, last: int) -> Iterator[tuple[int, int]]:
    """What is left of a gap once the steps `first` to `last` were told after all."""
    if gap[0] < first:
        yield gap[0], min(gap[1], first - 1)
    if gap[1] > last:
        yield max(gap[0], last + 1), gap[1]
