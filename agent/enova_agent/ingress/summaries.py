"""What this ingress saw since the last frame: counts and sketches by deployment, replica and class.

They are added up here and taken away by whoever reports them; while nobody does, they go on adding up, so that
an agent that was away learns what happened meanwhile as one long interval. The number of keys is bounded by the
routes, not by what clients send.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from http import HTTPStatus

from enova_agent.core.local import SummariesUpdate, Summary
from enova_agent.core.sketch import Sketch
from enova_common.records import Outcome, RequestRecord

Key = tuple[str, str, str]  # deployment, replica, class

LENGTHS_MAX = 32  # pairs of lengths of one key in one interval: 200 bytes


@dataclass(slots=True)
class _Lengths:
    """Every n-th pair of lengths, n doubling whenever there are too many: spread evenly over the interval."""

    pairs: list[tuple[int, int]] = field(default_factory=list)
    every: int = 1
    seen: int = 0

    def add(self, prompt_tokens: int, output_tokens: int) -> None:
        if self.seen % self.every == 0:
            self.pairs.append((prompt_tokens, output_tokens))
        self.seen += 1
        if len(self.pairs) > LENGTHS_MAX:
            self.pairs, self.every = self.pairs[::2], 2 * self.every


@dataclass(slots=True)
class _Sums:
    arrived: int = 0
    outcomes: dict[Outcome, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft_s: Sketch = field(default_factory=Sketch)
    tpot_s: Sketch = field(default_factory=Sketch)
    queue_s: Sketch = field(default_factory=Sketch)
    e2e_s: Sketch = field(default_factory=Sketch)
    lengths: _Lengths = field(default_factory=_Lengths)


class Summaries:
    """The sums of the current interval, which began at `start_s` (model time)."""

    def __init__(self, *, start_s: float) -> None:
        self._start_s = start_s
        self._sums: dict[Key, _Sums] = {}
        self._held: dict[Key, int] = {}
        self._touched: dict[Key, None] = {}  # whose held requests changed: one that has none left is told, too

    def arrived(self, key: Key) -> None:
        """A request arrived and is first sent there (replica empty: nowhere)."""
        self._of(key).arrived += 1

    def held(self, key: Key, change: int) -> None:
        """A request is open there, or no longer."""
        self._touched[key] = None
        count = self._held.get(key, 0) + change
        assert count >= 0, f"more requests ended than began at {key}"
        if count:
            self._held[key] = count
        else:
            del self._held[key]

    def ended(self, record: RequestRecord) -> None:
        """A request ended."""
        sums = self._of((record.deployment, record.replica, record.serving_class))
        sums.outcomes[record.outcome] = sums.outcomes.get(record.outcome, 0) + 1
        sums.prompt_tokens += record.prompt_tokens or 0
        sums.output_tokens += record.output_tokens or 0
        for sketch, value in (
            (sums.ttft_s, record.ttft_s),
            (sums.tpot_s, record.tpot_s),
            (sums.queue_s, record.queue_s),
            (sums.e2e_s, record.duration_s if _answered(record) else None),
        ):
            if value is not None:
                sketch.add(value)
        if _answered(record) and record.prompt_tokens and record.output_tokens:
            sums.lengths.add(record.prompt_tokens, record.output_tokens)

    def take(self, *, end_s: float) -> SummariesUpdate:
        """The interval up to now; the next one begins."""
        update = SummariesUpdate(
            start_s=self._start_s,
            end_s=end_s,
            summaries=tuple(
                self._summary(key, self._sums.get(key) or _Sums())
                for key in dict.fromkeys((*self._sums, *self._held, *self._touched))
            ),
        )
        self._start_s = end_s
        self._sums = {}
        self._touched = {}
        return update

    def _of(self, key: Key) -> _Sums:
        sums = self._sums.get(key)
        if sums is None:
            sums = self._sums[key] = _Sums()
        return sums

    def _summary(self, key: Key, sums: _Sums) -> Summary:
        deployment, replica, serving_class = key
        return Summary(
            deployment=deployment,
            replica=replica,
            serving_class=serving_class,
            arrived=sums.arrived,
            finished=sums.outcomes.get(Outcome.FINISHED, 0),
            failed=sums.outcomes.get(Outcome.FAILED, 0),
            cut=sums.outcomes.get(Outcome.CUT, 0),
            refused=sums.outcomes.get(Outcome.REFUSED, 0),
            cancelled=sums.outcomes.get(Outcome.CANCELLED, 0),
            prompt_tokens=sums.prompt_tokens,
            output_tokens=sums.output_tokens,
            held=self._held.get(key, 0),
            ttft_s=sums.ttft_s.value(),
            tpot_s=sums.tpot_s.value(),
            queue_s=sums.queue_s.value(),
            e2e_s=sums.e2e_s.value(),
            prompt_lengths=tuple(prompt for prompt, _ in sums.lengths.pairs),
            output_lengths=tuple(output for _, output in sums.lengths.pairs),
        )


def _answered(record: RequestRecord) -> bool:
    """Whether an engine carried the request out to its end: the caller's own errors come back sooner."""
    return record.outcome is Outcome.FINISHED and record.status < HTTPStatus.BAD_REQUEST
