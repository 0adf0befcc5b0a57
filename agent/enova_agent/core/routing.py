"""Which replica a request goes to: weights, power of two choices, and leaving those that fail; pure.

Theory of operation. Two distinct candidates are drawn with probabilities in proportion to their weights; the one
with less load per weight gets the request, the first drawn on a tie. By Little's law that sends each replica its
weight's share of the traffic while all are healthy, and less as soon as one is slower than its weight says.
The load of a replica is what its owner last said (in flight and queued, sent with every answer), less what was
ours then, plus what is ours now; a saying older than `Policy.load_age_limit_s` counts no more, ours always does.

A replica that failed is left for a time that doubles with each failure in a row. If all that remain have been
left, the one whose time ends first is tried all the same: refusing for sure helps nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from enova_agent.core.model import RouteTarget
from enova_common.backoff import Backoff


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The constants of routing."""

    load_age_limit_s: float = 2.0  # a queue turns over in about that time
    ejection: Backoff = field(default_factory=lambda: Backoff(initial_s=0.25, maximum_s=10.0, jitter=0.2))
    full_pause_s: float = 0.1      # a full queue needs a moment to drain; it is no failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the owner of a replica said of it: the header x-enova-load."""

    in_flight: int
    queued: int
    capacity: int

    def header(self) -> str:
        """The value of the header."""
        return f"in_flight={self.in_flight};queued={self.queued};capacity={self.capacity}"


def load_of_header(value: str) -> Load | None:
    """The load that a header states; None if it states none."""
    fields = dict(part.split("=", 1) for part in value.split(";") if "=" in part)
    try:
        load = Load(**{name: int(fields[name]) for name in ("in_flight", "queued", "capacity")})
    except (KeyError, ValueError):
        return None
    return load if min(load.in_flight, load.queued, load.capacity) >= 0 else None


@dataclass(slots=True)
class _Standing:
    """What is known of one replica."""

    ours: int = 0                 # sent there by us, not ended
    others: int = 0               # held there for others, as of heard_s
    heard_s: float = float("-inf")
    failures: int = 0             # in a row
    left_until_s: float = float("-inf")


class Router:
    """What one ingress knows of all replicas, and its choice among them. Every `now_s` is of one monotonic clock."""

    def __init__(self, policy: Policy | None = None) -> None:
        self._policy = policy or Policy()
        self._standings: dict[str, _Standing] = {}
        self._latest_s = float("-inf")     # by then nobody is being left any more

    def choose(
        self, targets: Sequence[RouteTarget], *, now_s: float, draws: tuple[float, float], tried: Collection[str] = ()
    ) -> RouteTarget | None:
        """The target for a request, by two uniform draws in [0, 1); None if all were tried."""
        untried = [t for t in targets if t.weight > 0 and t.replica not in tried] if tried else [
            t for t in targets if t.weight > 0
        ]
        if not untried:
            return None
        open_ones = untried
        if now_s < self._latest_s:
            open_ones = [t for t in untried if self._left_until_s(t) <= now_s]
        if not open_ones:
            return min(untried, key=self._left_until_s)
        first = _drawn(open_ones, draws[0])
        if len(open_ones) == 1:
            return first
        second = _drawn([t for t in open_ones if t is not first], draws[1])
        return second if self._pressure(second, now_s) < self._pressure(first, now_s) else first

    def sent(self, replica: str) -> None:
        """A request was sent there."""
        self._standing(replica).ours += 1

    def ended(self, replica: str) -> None:
        """A request sent there has ended, however it did."""
        standing = self._standing(replica)
        assert standing.ours > 0, f"more requests ended than were sent to {replica}"
        standing.ours -= 1

    def heard(self, replica: str, load: Load, *, now_s: float) -> None:
        """Its owner said what it holds."""
        standing = self._standing(replica)
        standing.others = max(0, load.in_flight + load.queued - standing.ours)
        standing.heard_s = now_s

    def failed(self, replica: str, *, now_s: float, draw: float) -> None:
        """It could not be reached, broke off or answered that it is broken: leave it for a while."""
        standing = self._standing(replica)
        pause_s = self._policy.ejection.delay_s(standing.failures, draw)
        standing.failures += 1
        standing.left_until_s = now_s + pause_s
        self._latest_s = max(self._latest_s, standing.left_until_s)

    def full(self, replica: str, *, now_s: float) -> None:
        """Its queue is full: leave it for a moment."""
        standing = self._standing(replica)
        standing.left_until_s = max(standing.left_until_s, now_s + self._policy.full_pause_s)
        self._latest_s = max(self._latest_s, standing.left_until_s)

    def answered(self, replica: str) -> None:
        """It answered: whatever was held against it is forgotten."""
        standing = self._standing(replica)
        standing.failures = 0
        standing.left_until_s = float("-inf")

    def retain(self, replicas: Iterable[str]) -> None:
        """Forget all replicas but these and those that still hold a request of ours."""
        kept = set(replicas)
        self._standings = {
            name: standing for name, standing in self._standings.items() if name in kept or standing.ours
        }

    def ejected(self, *, now_s: float) -> tuple[str, ...]:
        """The replicas that are being left, for metrics."""
        return tuple(name for name, standing in self._standings.items() if standing.left_until_s > now_s)

    def _standing(self, replica: str) -> _Standing:
        standing = self._standings.get(replica)
        if standing is None:
            standing = self._standings[replica] = _Standing()
        return standing

    def _left_until_s(self, target: RouteTarget) -> float:
        standing = self._standings.get(target.replica)
        return standing.left_until_s if standing else float("-inf")

    def _pressure(self, target: RouteTarget, now_s: float) -> float:
        standing = self._standings.get(target.replica)
        if standing is None:
            return 0.0
        fresh = now_s - standing.heard_s <= self._policy.load_age_limit_s
        return (standing.ours + (standing.others if fresh else 0)) / target.weight


def _drawn(targets: Sequence[RouteTarget], draw: float) -> RouteTarget:
    point = draw * sum(target.weight for target in targets)
    for target in targets:
        point -= target.weight
        if point < 0:
            return target
    return targets[-1]  # rounding left a crumb of the last weight
