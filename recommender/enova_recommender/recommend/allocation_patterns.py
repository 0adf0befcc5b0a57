"""What fits on a node: shapes of replicas, the patterns in which they fill a node, and their packing on its GPUs.

A replica with `parallelism.tensor` = t takes groups of t GPUs, each within an island of the node's fast link. A pattern
counts, by shape, replicas that fit on one node together; only maximal ones are of use: a slot may stay empty. Nodes
in an equal state share their patterns: the integer programme counts nodes by pattern instead of naming them.

A GPU that several small models share is one slot of the node's pattern; what lies in it is a pattern of its own, over
memory claims and shares of time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from enova_recommender.recommend.allocation_types import Option

PATTERNS_MAX = 2000    # of one kind of node or GPU; beyond it patterns mix fewer shapes, and the bound is a weaker one
STATES_MAX = 20_000    # partial packings that are looked at for them
PLACEMENTS_MAX = 1000  # ways to place one replica of many chunks on islands that all differ
TIME_SLACK = 1e-9      # shares of time are sums of floats

Islands = tuple[tuple[int, ...], ...]  # free bytes of each GPU, ascending, by island, ascending
Counts = tuple[int, ...]


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """What a replica asks of a node: `chunks` groups of `chunk` GPUs within an island each, with so many free bytes."""

    chunk: int
    chunks: int
    free_bytes: int
    shared: bool = False  # one GPU with exactly that much, for several replicas

    @property
    def gpus(self) -> int:
        """GPUs of one replica."""
        return self.chunk * self.chunks


@dataclass(frozen=True, slots=True, order=True)
class SharedClaim:
    """What a replica that shares its GPU asks of it."""

    claim_bytes: int
    time_share: float


@dataclass(frozen=True, slots=True)
class Patterns:
    """Maximal counts over a list of shapes; not `exact`: there are more."""

    counts: tuple[Counts, ...]
    exact: bool


def exclusive_shape(option: Option, levels: Sequence[int]) -> Shape | None:
    """The shape of an option on GPUs with these amounts of free memory; None if none has enough.

    The claim is rounded up to the next amount that occurs: claims that cannot be told apart are one shape.
    """
    enough = [level for level in levels if level >= option.claim_bytes]
    if not enough:
        return None
    layout = option.settings.parallelism
    return Shape(layout.tensor, layout.pipeline * layout.data, min(enough))


def node_patterns(islands: Islands, shapes: Sequence[Shape]) -> Patterns:
    """The maximal patterns of a node with these free GPUs."""
    for kinds in range(len(shapes), 0, -1):
        found = _patterns_of_kinds(islands, shapes, kinds)
        if found is not None:
            return Patterns(counts=maximal(found), exact=kinds == len(shapes))
    return Patterns(counts=maximal(_alone(islands, shapes)), exact=not shapes)


def shared_patterns(free_bytes: int, claims: Sequence[SharedClaim]) -> Patterns:
    """The maximal sets of claims that one GPU carries at once."""
    for kinds in range(len(claims), 0, -1):
        found: set[Counts] = set()
        if all(
            _Filling(claims, found).extend(subset, bytes_left=free_bytes, time_left=1.0)
            for subset in combinations(range(len(claims)), kinds)
        ):
            return Patterns(counts=maximal(found), exact=kinds == len(claims))
    return Patterns(counts=(), exact=not claims)


def maximal(counts: Iterable[Counts]) -> tuple[Counts, ...]:
    """Those that no other one covers; in a fixed order."""
    kept: list[Counts] = []
    for candidate in sorted(set(counts), key=lambda item: (-sum(item), item)):
        # A vector can only be covered by one with a larger sum, and those are in `kept` already.
        if any(candidate) and not any(all(a <= b for a, b in zip(candidate, other, strict=True)) for other in kept):
            kept.append(candidate)
    return tuple(kept)


def pack(free: Sequence[Sequence[tuple[int, int]]], shapes: Sequence[Shape]) -> list[tuple[int, ...]] | None:
    """GPUs for one replica of each shape, in the order of `shapes`, or None if they do not fit together.

    `free` holds (free bytes, index) of the GPUs that may be taken, by island.
    """
    order = sorted(range(len(shapes)), key=lambda i: (-shapes[i].gpus, -shapes[i].chunk, shapes[i]))
    given: dict[int, tuple[int, ...]] = {}
    if not _pack([sorted(island) for island in free], [shapes[i] for i in order], 0, (), given):
        return None
    places = {shape: given[place] for place, shape in enumerate(order)}
    return [tuple(sorted(places[i])) for i in range(len(shapes))]


def _pack(
    islands: list[list[tuple[int, int]]], shapes: Sequence[Shape], at: int, begun: tuple[int, ...],
    given: dict[int, tuple[int, ...]],
) -> bool:
    """Give the shapes from index `at` on; `begun` are GPUs that this one has already."""
    if at == len(shapes):
        return True
    shape = shapes[at]
    if len(begun) == shape.gpus:
        given[at] = begun
        return _pack(islands, shapes, at + 1, (), given)
    tried: set[tuple[int, ...]] = set()
    # The tightest island first: whole ones are left for those that need them.
    for i in sorted(range(len(islands)), key=lambda i: len(islands[i])):
        content = tuple(bytes_ for bytes_, _ in islands[i])
        taken = _take(content, shape)
        if taken is None or content in tried:
            continue
        tried.add(content)
        rest = [gpu for j, gpu in enumerate(islands[i]) if j not in taken]
        more = begun + tuple(islands[i][j][1] for j in taken)
        if _pack([*islands[:i], rest, *islands[i + 1 :]], shapes, at, more, given):
            return True
    return False


def _take(free: tuple[int, ...], shape: Shape) -> tuple[int, ...] | None:
    """Which GPUs of an island one chunk takes: those that just suffice, since more free memory serves all others."""
    if shape.shared:
        fitting = [i for i, free_bytes in enumerate(free) if free_bytes == shape.free_bytes]
    else:
        fitting = [i for i, free_bytes in enumerate(free) if free_bytes >= shape.free_bytes]
    return tuple(fitting[: shape.chunk]) if len(fitting) >= shape.chunk else None


def _patterns_of_kinds(islands: Islands, shapes: Sequence[Shape], kinds: int) -> set[Counts] | None:
    """All patterns that mix at most so many shapes; None if they are too many."""
    found: set[Counts] = set()
    order = sorted(range(len(shapes)), key=lambda i: (-shapes[i].gpus, -shapes[i].chunk, shapes[i]))
    looked_at = 0
    for subset in combinations(order, kinds):
        states: set[tuple[Counts, Islands]] = {((0,) * len(shapes), islands)}
        for index in subset:
            frontier = states
            while frontier:
                reached: set[tuple[Counts, Islands]] = set()
                for counts, left in frontier:
                    more = (*counts[:index], counts[index] + 1, *counts[index + 1 :])
                    rests = _placements(left, shapes[index])
                    if rests is None or (looked_at := looked_at + len(rests)) > STATES_MAX:
                        return None
                    reached |= {(more, rest) for rest in rests}
                frontier = reached - states
                states = states | frontier
        found |= set(maximal(counts for counts, _ in states))
        if len(found) > PATTERNS_MAX:
            return None
    return found


def _placements(islands: Islands, shape: Shape) -> set[Islands] | None:
    """What may be left after a replica of this shape was placed; None if that may be too much."""
    states = {islands}
    for _ in range(shape.chunks):
        # Chunk by chunk over what is left, not over the orders of taking: those are as many as the factorial.
        reached: set[Islands] = set()
        for state in states:
            reached |= _after_a_chunk(state, shape)
            if len(reached) > PLACEMENTS_MAX:
                return None
        states = reached
    return states


def _alone(islands: Islands, shapes: Sequence[Shape]) -> set[Counts]:
    """For each shape, as many as are found to fit with nothing else on the node."""
    numbered = iter(range(sum(map(len, islands))))
    free = [[(bytes_, next(numbered)) for bytes_ in island] for island in islands]
    found: set[Counts] = set()
    for index, shape in enumerate(shapes):
        count = 0
        while (count + 1) * shape.gpus <= sum(map(len, islands)) and pack(free, [shape] * (count + 1)) is not None:
            count += 1
        found.add(tuple(count if at == index else 0 for at in range(len(shapes))))
    return found


def _after_a_chunk(islands: Islands, shape: Shape) -> set[Islands]:
    found: set[Islands] = set()
    for i in range(len(islands)):
        if i > 0 and islands[i] == islands[i - 1]:
            continue
        taken = _take(islands[i], shape)
        if taken is not None:
            rest = tuple(gpu for j, gpu in enumerate(islands[i]) if j not in taken)
            found.add(tuple(sorted((*islands[:i], rest, *islands[i + 1 :]))))
    return found


class _Filling:
    """A GPU that is filled with claims of one kind after the other, in all ways."""

    def __init__(self, claims: Sequence[SharedClaim], found: set[Counts]) -> None:
        self._claims = claims
        self._found = found
        self._counts = [0] * len(claims)

    def extend(self, kinds: Sequence[int], *, bytes_left: int, time_left: float) -> bool:
        """Add all ways to fill what is left with claims of these kinds; False if they are too many."""
        if not kinds:
            self._found.add(tuple(self._counts))
            return len(self._found) <= PATTERNS_MAX
        kind, rest = kinds[0], kinds[1:]
        claim = self._claims[kind]
        most = min(bytes_left // claim.claim_bytes, int((time_left + TIME_SLACK) / claim.time_share))
        for count in range(most, -1, -1) if rest else (most,):
            self._counts[kind] = count
            bytes_after, time_after = bytes_left - count * claim.claim_bytes, time_left - count * claim.time_share
            if not self.extend(rest, bytes_left=bytes_after, time_left=time_after):
                return False
        self._counts[kind] = 0
        return True
