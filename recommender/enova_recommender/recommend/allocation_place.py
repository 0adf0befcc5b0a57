"""From counts over groups of equal nodes to replicas on the GPUs of each node.

Patterns are dealt to the nodes of their group: first those that pin what runs there, then the others, to nodes where
the most can stay, and in turn over the failure domains. What stays keeps its GPUs. New replicas go to free slots in the
domain that holds the least of their deployment, and where the slots of a domain are gone, change places with others.
Last, each node's replicas are packed on its GPUs, which cannot fail from empty since patterns are packings: a replica
that stays in the way of others is moved after all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product

from enova_recommender.recommend.allocation_groups import (
    ANY_STATE,
    Column,
    Domain,
    Fleet,
    Group,
    Running,
    is_spread,
    islands_of,
)
from enova_recommender.recommend.allocation_model import SHARE_SLACK, Counts
from enova_recommender.recommend.allocation_patterns import Shape, pack
from enova_recommender.recommend.allocation_types import PlacedReplica

Kind = tuple[str, int]  # of a slot: ("shape", index) or ("claim", index)


@dataclass(slots=True, kw_only=True)
class _SharedGpu:
    """A GPU that is used by several replicas: how many of each claim it still takes."""

    shape: Shape
    left: Counter[int]
    open: bool = False  # a filling was dealt to it
    holds: list[tuple[int, PlacedReplica | None]] = field(default_factory=list)  # choice, what it is if it stays
    gpu: int | None = None  # if what stays there fixes it


@dataclass(slots=True, kw_only=True)
class _Node:
    """One node while it is filled."""

    at: int
    group: int
    left: Counter[int] = field(default_factory=Counter)  # free slots by shape
    kept: list[Running] = field(default_factory=list)
    new: list[int] = field(default_factory=list)
    shared: list[_SharedGpu] = field(default_factory=list)

    def free(self, kind: Kind) -> int:
        """Slots of this kind that nothing holds."""
        name, index = kind
        if name == "shape":
            return self.left[index]
        return sum(gpu.left[index] for gpu in self.shared)

    def add(self, kind: Kind, choice: int) -> None:
        """Put a new replica in a free slot."""
        name, index = kind
        if name == "shape":
            self.left[index] -= 1
            self.new.append(choice)
            return
        gpu = next(gpu for gpu in self.shared if gpu.left[index])
        gpu.left[index] -= 1
        gpu.holds.append((choice, None))

    def remove(self, kind: Kind, choice: int) -> None:
        """Take a new replica out again."""
        name, index = kind
        if name == "shape":
            self.left[index] += 1
            self.new.remove(choice)
            return
        gpu = next(gpu for gpu in self.shared if (choice, None) in gpu.holds)
        gpu.left[index] += 1
        gpu.holds.remove((choice, None))

    def new_of(self, kind: Kind, group: Group) -> Iterator[int]:
        """New replicas in slots of this kind."""
        name, index = kind
        if name == "shape":
            yield from (choice for choice in self.new if group.shape_of[choice] == index)
        else:
            held = (choice for gpu in self.shared for choice, stays in gpu.holds if stays is None)
            yield from (choice for choice in held if group.claim_of[choice] == index)


def place(fleet: Fleet, counts: Counts) -> tuple[tuple[PlacedReplica, ...], bool]:
    """The replicas on their GPUs, and whether all found a place: some may not if they are to be spread over domains."""
    return _Placing(fleet, counts).placed()


class _Placing:
    """One run of `place`."""

    def __init__(self, fleet: Fleet, counts: Counts) -> None:
        self._fleet = fleet
        self._counts = counts
        self._deployments = fleet.request.deployments
        totals, rates = Counter[int](), defaultdict[int, float](float)
        for (c, _), count in counts.replicas.items():
            totals[fleet.choices[c].deployment] += count
            rates[fleet.choices[c].deployment] += count * fleet.choices[c].option.capacity_rps
        shares = {d: item.spread.domain_share for d, item in enumerate(self._deployments)}
        self._most = {d: int(share * totals[d] + SHARE_SLACK) for d, share in shares.items()}
        self._most_rate = {d: share * rates[d] * (1 + SHARE_SLACK) for d, share in shares.items()}
        # By deployment and domain.
        self._held = Counter[tuple[int, Domain]]()
        self._held_rate = defaultdict[tuple[int, Domain], float](float)
        self._wanted = Counter(counts.replicas)
        self._nodes: dict[int, list[_Node]] = {}
        self._open: dict[tuple[int, Kind], dict[Domain, list[_Node]]] = {}

    def placed(self) -> tuple[tuple[PlacedReplica, ...], bool]:
        """See `place`."""
        for g, group in enumerate(self._fleet.groups):
            self._nodes[g] = self._deal(g, group)
            self._share(g, group)
        # What is bound to failure domains first, while there is most to choose from; then what there is most of.
        rest = sorted(
            self._wanted.items(),
            key=lambda item: (not is_spread(self._deployments[self._fleet.choices[item[0][0]].deployment]), -item[1]),
        )
        put = [self._put(c, g) for (c, g), count in rest for _ in range(count)]
        packed = (replica for nodes in self._nodes.values() for node in nodes for replica in self._pack(node))
        return tuple(packed), all(put)

    def _deal(self, g: int, group: Group) -> list[_Node]:
        """Patterns to nodes, and what stays there."""
        waiting = {i: count for (at, i), count in self._counts.columns.items() if at == g}
        free = set(group.nodes)
        nodes = []
        for i in waiting:
            column = group.columns[i]
            if column.state == ANY_STATE:
                continue
            for at in self._in_turn(free.intersection(group.states[column.state]))[: waiting[i]]:
                free.remove(at)
                nodes.append(self._begin(g, group, i, at))
        by_state: dict[tuple[tuple[int, int], ...], list[int]] = defaultdict(list)
        for at in self._in_turn(free):
            running = Counter(choice for choice, _ in self._fleet.keepable.get(at, ()))
            by_state[tuple(sorted(running.items()))].append(at)
        unpinned = [i for i in waiting if group.columns[i].state == ANY_STATE]
        fits = sorted(
            ((self._overlap(group, i, state), i, state) for i, state in product(unpinned, by_state)),
            key=lambda item: (-item[0], item[1], item[2]),
        )
        for _, i, state in fits:
            while waiting[i] and by_state[state]:
                waiting[i] -= 1
                nodes.append(self._begin(g, group, i, by_state[state].pop(0)))
        return nodes

    def _in_turn(self, nodes: Collection[int]) -> list[int]:
        """One node of each domain, then the second of each, and so on."""
        seen: Counter[Domain] = Counter()
        turns = []
        for at in sorted(nodes):
            turns.append((seen[self._fleet.domains[at]], at))
            seen[self._fleet.domains[at]] += 1
        return [at for _, at in sorted(turns)]

    def _overlap(self, group: Group, column: int, state: Sequence[tuple[int, int]]) -> int:
        """GPUs of what runs on a node in this state that could stay under this pattern."""
        left = Counter(dict(enumerate(group.columns[column].slots)))
        total = 0
        for choice, count in state:
            if choice in group.shape_of:
                stays = min(count, left[group.shape_of[choice]])
                left[group.shape_of[choice]] -= stays
                total += stays * self._fleet.choices[choice].option.gpus
            else:
                total += count
        return total

    def _begin(self, g: int, group: Group, column: int, at: int) -> _Node:
        """A node with its slots, and the replicas that stay on it."""
        pattern = group.columns[column]
        node = _Node(at=at, group=g)
        for s, count in enumerate(pattern.slots):
            if group.shapes[s].shared:
                node.shared.extend(_SharedGpu(shape=group.shapes[s], left=Counter()) for _ in range(count))
            else:
                node.left[s] = count
        running = [item for item in self._fleet.keepable.get(at, ()) if item[0] in group.shape_of]
        if pattern.pinned:
            running = self._pinned(at, group, pattern, running)
        for choice, replica in sorted(running, key=lambda item: -len(item[1].gpus)):
            shape = group.shape_of[choice]
            if node.left[shape] and self._wanted[choice, g] and self._has_room(choice, self._fleet.domains[at]):
                node.left[shape] -= 1
                self._keep(node, (choice, replica))
        return node

    def _keep(self, node: _Node, item: Running) -> None:
        node.kept.append(item)
        self._count(item[0], node)

    def _count(self, choice: int, node: _Node) -> None:
        """Note that one of those wanted has its place."""
        self._wanted[choice, node.group] -= 1
        self._add(choice, self._fleet.domains[node.at], 1)

    def _add(self, choice: int, domain: Domain, count: int) -> None:
        key = self._fleet.choices[choice].deployment, domain
        self._held[key] += count
        self._held_rate[key] += count * self._fleet.choices[choice].option.capacity_rps

    def _has_room(self, choice: int, domain: Domain) -> bool:
        """Whether the deployment may have one more in this domain."""
        chosen = self._fleet.choices[choice]
        key = chosen.deployment, domain
        rate = self._held_rate[key] + chosen.option.capacity_rps
        return self._held[key] < self._most[chosen.deployment] and rate <= self._most_rate[chosen.deployment]

    def _pinned(self, at: int, group: Group, pattern: Column, running: Sequence[Running]) -> list[Running]:
        """So many of each choice as the pattern pins, such that its other slots fit beside them."""
        mine = {choice: [item for item in running if item[0] == choice] for choice, _ in pattern.pinned}
        ways = [combinations(mine[choice], count) for choice, count in pattern.pinned]
        rest = Counter(dict(enumerate(pattern.slots)))
        for choice, count in pattern.pinned:
            rest[group.shape_of[choice]] -= count
        shapes = [group.shapes[s] for s, count in rest.items() for _ in range(count)]
        for way in product(*ways):
            pinned = [item for part in way for item in part]
            held = {gpu for _, replica in pinned for gpu in replica.gpus}
            if pack(self._free(at, group, held), shapes) is not None:
                return pinned
        raise AssertionError("a pattern was made from a set of replicas that it fits beside")

    def _free(self, at: int, group: Group, held: set[int]) -> list[list[tuple[int, int]]]:
        """GPUs of a node that nothing holds, with free memory rounded down as the group's is."""
        levels = sorted({free for island in group.islands for free in island})
        return [
            [(max(level for level in levels if level <= free), gpu) for free, gpu in island
             if gpu not in held and free >= levels[0]]
            for island in islands_of(self._fleet.request.nodes[at])
        ]

    def _share(self, g: int, group: Group) -> None:
        """Fillings to shared GPUs: first to those where some of what runs can stay, whichever keeps the most there."""
        waiting = Counter({(s, f): count for (at, s, f), count in self._counts.fillings.items() if at == g})
        if not waiting:
            return
        for node in self._nodes[g]:
            for gpu, level, running in self._sharing(node, group):
                slot = next((slot for slot in node.shared if slot.shape.free_bytes == level and not slot.open), None)
                keys = [key for key in +waiting if group.shapes[key[0]].free_bytes == level]
                ways = [(self._stays(node, group, key, running), key) for key in keys]
                staying, key = max(ways, key=lambda way: len(way[0]), default=((), (0, 0)))
                if slot is None or not staying:
                    continue
                waiting[key] -= 1
                self._open_gpu(slot, group, key)
                slot.gpu = gpu
                for choice, replica in staying:
                    if self._has_room(choice, self._fleet.domains[node.at]):
                        slot.left[group.claim_of[choice]] -= 1
                        slot.holds.append((choice, replica))
                        self._count(choice, node)
        slots = [slot for node in self._nodes[g] for slot in node.shared if not slot.open]
        for key in waiting.elements():
            slot = next(slot for slot in slots if slot.shape == group.shapes[key[0]])
            slots.remove(slot)
            self._open_gpu(slot, group, key)

    def _open_gpu(self, slot: _SharedGpu, group: Group, key: tuple[int, int]) -> None:
        filling = group.fillings[key[0]][key[1]]
        slot.left, slot.open = Counter({claim: count for claim, count in enumerate(filling) if count}), True

    def _sharing(self, node: _Node, group: Group) -> list[tuple[int, int, list[Running]]]:
        """GPUs of a node that nothing else holds, their free bytes, and the shared replicas that run there."""
        if not node.shared:
            return []
        by_gpu: dict[int, list[Running]] = defaultdict(list)
        for choice, replica in self._fleet.keepable.get(node.at, ()):
            if choice in group.claim_of:
                by_gpu[replica.gpus[0]].append((choice, replica))
        held = {gpu for _, replica in node.kept for gpu in replica.gpus}
        free = {gpu: level for island in self._free(node.at, group, held) for level, gpu in island}
        return [(gpu, free[gpu], running) for gpu, running in by_gpu.items() if gpu in free]

    def _stays(
        self, node: _Node, group: Group, key: tuple[int, int], running: Sequence[Running]
    ) -> list[Running]:
        """Which replicas of one GPU could stay in a slot with this filling."""
        left, taken = Counter(dict(enumerate(group.fillings[key[0]][key[1]]))), Counter[int]()
        found = []
        for choice, replica in running:
            claim = group.claim_of[choice]
            wanted = self._wanted[choice, node.group] - taken[choice]
            if left[claim] and wanted > 0 and self._has_room(choice, self._fleet.domains[node.at]):
                left[claim] -= 1
                taken[choice] += 1
                found.append((choice, replica))
        return found

    def _put(self, c: int, g: int) -> bool:
        """One new replica in a free slot of its group; False if its domains are full."""
        group, deployment = self._fleet.groups[g], self._fleet.choices[c].deployment
        kind: Kind = ("shape", group.shape_of[c]) if c in group.shape_of else ("claim", group.claim_of[c])
        nodes = self._open_nodes(g, kind)
        domain = min(
            (domain for domain in nodes if self._has_room(c, domain)),
            key=lambda domain: self._held_rate[deployment, domain], default=None,
        )
        if domain is None:
            return any(self._swap(c, g, kind, node) for here in nodes.values() for node in here)
        nodes[domain][-1].add(kind, c)
        self._add(c, domain, 1)
        return True

    def _open_nodes(self, g: int, kind: Kind) -> dict[Domain, list[_Node]]:
        """By domain, nodes of a group with free slots of a kind, the last of each domain surely so; no empty list."""
        if (g, kind) not in self._open:
            found: dict[Domain, list[_Node]] = defaultdict(list)
            for node in self._nodes[g]:
                found[self._fleet.domains[node.at]].append(node)
            self._open[g, kind] = found
        nodes = self._open[g, kind]
        for domain in list(nodes):
            while nodes[domain] and not nodes[domain][-1].free(kind):
                nodes[domain].pop()
            if not nodes[domain]:
                del nodes[domain]
        return nodes

    def _swap(self, c: int, g: int, kind: Kind, open_node: _Node) -> bool:
        """Move another replica to the open slot, and take its place in a domain that has room for this one."""
        if not open_node.free(kind):
            return False
        deployment, domain = self._fleet.choices[c].deployment, self._fleet.domains[open_node.at]
        for node in self._nodes[g]:
            here = self._fleet.domains[node.at]
            if not self._has_room(c, here):
                continue
            for other in sorted(set(node.new_of(kind, self._fleet.groups[g]))):
                moved = self._fleet.choices[other].deployment
                if moved != deployment and self._has_room(other, domain):
                    node.remove(kind, other)
                    open_node.add(kind, other)
                    node.add(kind, c)
                    self._add(other, here, -1)
                    self._add(other, domain, 1)
                    self._add(c, here, 1)
                    return True
        return False

    def _pack(self, node: _Node) -> list[PlacedReplica]:
        """GPUs for all replicas of a node; those in the way of others give up theirs, smallest first."""
        group = self._fleet.groups[node.group]
        shared = [gpu for gpu in node.shared if gpu.holds]
        while True:
            fixed = {gpu.gpu for gpu in shared if gpu.gpu is not None}
            held = fixed | {gpu for _, replica in node.kept for gpu in replica.gpus}
            loose = [gpu for gpu in shared if gpu.gpu is None]
            shapes = [group.shapes[group.shape_of[choice]] for choice in node.new] + [gpu.shape for gpu in loose]
            gpus = pack(self._free(node.at, group, held), shapes)
            if gpus is not None:
                break
            self._give_up(node, shared)
        for gpu, given in zip(loose, gpus[len(node.new) :], strict=True):
            gpu.gpu = given[0]
        placed = [self._replica(choice, node, replica.gpus, kept=True) for choice, replica in node.kept]
        placed += [self._replica(c, node, given) for c, given in zip(node.new, gpus, strict=False)]
        for gpu in shared:
            assert gpu.gpu is not None
            placed += [self._replica(c, node, (gpu.gpu,), kept=stays is not None) for c, stays in gpu.holds]
        return placed

    def _give_up(self, node: _Node, shared: Sequence[_SharedGpu]) -> None:
        """Let one replica that would stay be placed anew on its node."""
        if node.kept:
            item = min(node.kept, key=lambda item: (len(item[1].gpus), item[1].gpus))
            node.kept.remove(item)
            node.new.append(item[0])
            return
        gpu = next(gpu for gpu in shared if gpu.gpu is not None)
        gpu.gpu, gpu.holds = None, [(choice, None) for choice, _ in gpu.holds]

    def _replica(self, choice: int, node: _Node, gpus: tuple[int, ...], *, kept: bool = False) -> PlacedReplica:
        chosen = self._fleet.choices[choice]
        return PlacedReplica(
            deployment=self._deployments[chosen.deployment].name, option=chosen.option.name,
            node=self._fleet.request.nodes[node.at].name, gpus=gpus, kept=kept,
        )
