"""Sums of what ingresses counted, by deployment, replica and class: bounded, and never smaller than they were.

A replica that is gone gives its keys back, not its counts: they go on under one key of the deployment for all such
(`GONE`), since whoever compares two looks at a deployment's sums must not see them fall.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from enova_coordinator.core.series import REQUEST_COUNTS, RequestFigures
from enova_coordinator.core.sketch import MergedSketch, flaw

REQUEST_KEYS_MAX = 100_000         # deployment x replica x class, of the whole fleet
NOWHERE_KEYS_MAX = 20_000          # beyond those, of requests without a replica: they wake what sleeps
GONE_CLASSES_MAX = 64              # of a deployment's replicas that are gone; the rest count under no class
GONE = "-"                         # in place of the name of a replica: all that are gone

Key = tuple[str, str]              # replica, class


@dataclass(slots=True)
class RequestTotals:
    """The sum of all summaries of one class of one deployment's requests on one replica."""

    counts: list[int] = field(default_factory=lambda: [0] * len(REQUEST_COUNTS))
    prompt_tokens: int = 0
    output_tokens: int = 0
    held: dict[str, tuple[int, float]] = field(default_factory=dict)  # by node: how many, and when it said so
    ttft_s: MergedSketch = field(default_factory=MergedSketch)
    tpot_s: MergedSketch = field(default_factory=MergedSketch)
    queue_s: MergedSketch = field(default_factory=MergedSketch)
    e2e_s: MergedSketch = field(default_factory=MergedSketch)

    def sketches(self) -> tuple[MergedSketch, ...]:
        """In the order of REQUEST_SKETCHES."""
        return self.ttft_s, self.tpot_s, self.queue_s, self.e2e_s

    def held_since(self, oldest_s: float) -> int:
        """Requests that ingresses hold, as those said who spoke at `oldest_s` or later.

        Who holds some says so with each frame: what was not said again was held by one that is gone.
        """
        return sum(count for count, said_s in self.held.values() if said_s >= oldest_s)

    def take_over(self, other: RequestTotals) -> None:
        """Add what another one counted; what it held is nobody's any more."""
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.prompt_tokens += other.prompt_tokens
        self.output_tokens += other.output_tokens
        for mine, its in zip(self.sketches(), other.sketches(), strict=True):
            mine.merge_merged(its)


class RequestLedger:
    """All sums. What cannot be kept is counted in `rejected`, by its reason."""

    def __init__(self, rejected: Counter[str]) -> None:
        self._rejected = rejected
        self._totals: dict[str, dict[Key, RequestTotals]] = {}
        self._keys = 0

    def of(self, deployment: str) -> Mapping[Key, RequestTotals]:
        """The sums of a deployment's requests by replica and class."""
        return dict(self._totals.get(deployment, {}))

    def held_nowhere(self, deployment: str, *, oldest_s: float) -> int:
        """Requests that ingresses hold for the deployment's first replica, by what was said since `oldest_s`."""
        totals = self._totals.get(deployment, {})
        return sum(each.held_since(oldest_s) for (replica, _), each in totals.items() if not replica)

    def add(self, node: str, request: RequestFigures, *, end_s: float) -> int:
        """Add a summary to its sum; how many figures were taken in."""
        totals = self._at(request)
        if totals is None:
            self._rejected["too_many_request_keys"] += 1
            return 0
        totals.counts = [old + new for old, new in zip(totals.counts, request.counts, strict=True)]
        totals.prompt_tokens += request.prompt_tokens
        totals.output_tokens += request.output_tokens
        totals.held[node] = (request.held, end_s)
        taken = len(request.counts) + 3
        for merged, sketch in zip(totals.sketches(), request.sketches, strict=True):
            if sketch is None:
                continue
            if flaw(sketch):
                self._rejected["bad_sketch"] += 1
                continue
            merged.merge(sketch)
            taken += len(sketch.counts)
        return taken

    def forget(self, *, replicas: Callable[[str], bool], deployments: Callable[[str], bool], oldest_s: float) -> None:
        """Drop deployments that are gone, the keys of replicas that are gone, and holds from before `oldest_s`."""
        for name in [name for name in self._totals if not deployments(name)]:
            self._keys -= len(self._totals.pop(name))
        for name, totals in self._totals.items():
            gone_name = f"{name}/replicas/{GONE}"
            for key in [key for key in totals if key[0] not in {"", gone_name} and not replicas(key[0])]:
                self._fold(totals, key, gone_name)
            for each in totals.values():
                each.held = {node: told for node, told in each.held.items() if told[1] >= oldest_s}

    def _fold(self, totals: dict[Key, RequestTotals], key: Key, gone_name: str) -> None:
        gone = totals.pop(key)
        classes = sum(replica == gone_name for replica, _ in totals)
        wanted = (gone_name, key[1])
        into = wanted if wanted in totals or classes < GONE_CLASSES_MAX else (gone_name, "")
        self._keys += (into not in totals) - 1
        totals.setdefault(into, RequestTotals()).take_over(gone)

    def _at(self, request: RequestFigures) -> RequestTotals | None:
        """The sum that a summary belongs to; None over the bound."""
        key = (request.replica, request.serving_class)
        totals = self._totals.get(request.deployment, {}).get(key)
        if totals is None:
            if self._keys >= REQUEST_KEYS_MAX + (0 if request.replica else NOWHERE_KEYS_MAX):
                return None
            self._keys += 1
            totals = self._totals.setdefault(request.deployment, {})[key] = RequestTotals()
        return totals
