"""The fleet as the integer programme sees it: groups of nodes in an equal state, with the patterns that fill them.

Nodes are equal if their GPUs, price, cluster and free memory are. At fine detail what runs on them counts too, and
patterns say what of it stays; at coarse detail it is counted over the group, and the placing keeps what it can. Where a
deployment is spread over failure domains, domains of equal nodes form a class, and a group lies within one class; at
split detail each domain is a class of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from enova_recommender.recommend.allocation_patterns import (
    Counts,
    Islands,
    Shape,
    SharedClaim,
    exclusive_shape,
    maximal,
    node_patterns,
    shared_patterns,
)
from enova_recommender.recommend.allocation_types import (
    AllocationRequest,
    FleetDeployment,
    Option,
    PlacedReplica,
    gpu_price,
)
from enova_recommender.recommend.types import InventoryNode

KEEPABLE_MAX = 8          # replicas of one node whose subsets are looked at
FINE_SUBSETS_MAX = 1500   # sets of replicas that could stay, over all states of nodes; beyond it detail is coarse

Domain = tuple[str, str]   # cluster, name


@dataclass(frozen=True, slots=True)
class Choice:
    """One option of one deployment, by the deployment's index."""

    deployment: int
    option: Option


@dataclass(frozen=True, slots=True)
class Column:
    """One way to use a node: what stays of what runs there (choice, count), and slots by shape for the rest."""

    kept: tuple[tuple[int, int], ...]
    slots: Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Nodes in an equal state. Choices, nodes and domain classes are named by their index."""

    nodes: tuple[int, ...]
    gpu: str
    price_per_hour: float                  # of one GPU
    islands: Islands
    domain_class: int
    shapes: tuple[Shape, ...]
    shape_of: Mapping[int, int]            # by exclusive choice
    claims: tuple[SharedClaim, ...]
    claim_of: Mapping[int, int]            # by shared choice
    columns: tuple[Column, ...]
    fillings: Mapping[int, tuple[Counts, ...]]  # claims that share a GPU, by index of the GPU's shape
    running: Mapping[int, int]             # replicas that could stay, by choice
    exact: bool                            # all patterns are there

    @property
    def choices(self) -> tuple[int, ...]:
        """Those that fit."""
        return (*self.shape_of, *self.claim_of)

    @property
    def gpus(self) -> int:
        """GPUs of use of one node."""
        return sum(len(island) for island in self.islands)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """A request, sorted into groups."""

    request: AllocationRequest
    choices: tuple[Choice, ...]
    groups: tuple[Group, ...]
    domains: tuple[Domain, ...]                 # of each node
    domain_classes: tuple[tuple[Domain, ...], ...]
    keepable: Mapping[int, tuple[tuple[int, PlacedReplica], ...]]  # (choice, replica) by node
    fine: bool

    @property
    def exact(self) -> bool:
        """Whether the programme holds all patterns."""
        return all(group.exact for group in self.groups)


def is_spread(deployment: FleetDeployment) -> bool:
    """Whether failure domains matter to it."""
    return deployment.spread.domain_share < 1 or deployment.spread.domains > 1


def domain_of(node: InventoryNode) -> Domain:
    """The failure domain of a node: its own one if none is named."""
    return (node.cluster, f"domain {node.domain}" if node.domain else f"node {node.name}")


def islands_of(node: InventoryNode) -> list[list[tuple[int, int]]]:
    """(free bytes, index) of a node's GPUs: each run of `island_gpus` indexes is an island."""
    free = node.free_bytes or (node.gpu.memory_bytes,) * node.gpus
    ends = range(0, node.gpus, node.island_gpus)
    return [[(free[i], i) for i in range(begin, min(begin + node.island_gpus, node.gpus))] for begin in ends]


def allowed(deployment: FleetDeployment, option: Option, node: InventoryNode) -> bool:
    """Whether a deployment may run this option on GPUs of this node."""
    name = node.gpu.name
    return (
        name == option.settings.gpu.name
        and (not deployment.gpu_types or name in deployment.gpu_types)
        and (not deployment.clusters or node.cluster in deployment.clusters)
    )


def fleet_of(request: AllocationRequest, *, split: bool = False) -> Fleet:
    """The fleet at fine detail, or at coarse detail if that were too large a programme."""
    choices = _choices(request)
    keepable = _keepable(request, choices)
    seen: dict[tuple[object, ...], int] = {}
    for at, running in keepable.items():
        node = request.nodes[at]
        seen[node.gpu.name, node.free_bytes, _state(node, (), running)] = 2 ** min(len(running), KEEPABLE_MAX)
    fine = sum(seen.values()) <= FINE_SUBSETS_MAX
    return _grouped(request, choices, keepable, fine=fine, split=split)


def _choices(request: AllocationRequest) -> tuple[Choice, ...]:
    """All options but those that another one with the same needs and at most the same price outdoes."""
    running = {(replica.deployment, replica.option) for replica in request.running}
    found = []
    for index, deployment in enumerate(request.deployments):
        best: dict[tuple[object, ...], Option] = {}
        for option in deployment.options:
            layout = option.settings.parallelism
            if (deployment.name, option.name) in running:
                found.append(Choice(index, option))
                continue
            key = (
                option.settings.gpu.name, layout.tensor, layout.gpus, option.shared, option.claim_bytes,
                option.time_share, option.price_per_hour,
            )
            if key not in best or best[key].capacity_rps < option.capacity_rps:
                best[key] = option
        found.extend(Choice(index, option) for option in best.values())
    return tuple(found)


def _keepable(
    request: AllocationRequest, choices: Sequence[Choice]
) -> dict[int, tuple[tuple[int, PlacedReplica], ...]]:
    """What runs and may stay where it is: still an option, still allowed there, still with room."""
    known = {(request.deployments[c.deployment].name, c.option.name): i for i, c in enumerate(choices)}
    nodes = {node.name: i for i, node in enumerate(request.nodes)}
    found: dict[int, list[tuple[int, PlacedReplica]]] = defaultdict(list)
    taken: Counter[tuple[int, int]] = Counter()
    for replica in request.running:
        choice, at = known.get((replica.deployment, replica.option)), nodes[replica.node]
        if choice is None or not _may_stay(request, choices[choice], replica, request.nodes[at]):
            continue
        option = choices[choice].option
        if not option.shared:
            if any(taken[at, gpu] for gpu in replica.gpus):
                continue  # two replicas report the same GPU: one of them has to go
            taken.update((at, gpu) for gpu in replica.gpus)
        found[at].append((choice, replica))
    return {at: tuple(sorted(items, key=lambda item: (item[0], item[1].gpus))) for at, items in found.items()}


def _may_stay(request: AllocationRequest, choice: Choice, replica: PlacedReplica, node: InventoryNode) -> bool:
    option = choice.option
    islands = islands_of(node)
    held = [[gpu for gpu in island if gpu[1] in replica.gpus] for island in islands]
    return (
        allowed(request.deployments[choice.deployment], option, node)
        and len(replica.gpus) == option.gpus
        and all(free >= option.claim_bytes for island in held for free, _ in island)
        and all(len(island) % option.settings.parallelism.tensor == 0 for island in held)
    )


def _grouped(
    request: AllocationRequest, choices: tuple[Choice, ...],
    keepable: Mapping[int, tuple[tuple[int, PlacedReplica], ...]], *, fine: bool, split: bool,
) -> Fleet:
    domains = tuple(domain_of(node) for node in request.nodes)
    levels = _levels(request, choices)
    islands = [_canonical(node, levels) for node in request.nodes]
    keys: list[tuple[object, ...]] = []
    for i, node in enumerate(request.nodes):
        state = _state(node, islands[i], keepable.get(i, ())) if fine else ()
        keys.append((node.gpu.name, gpu_price(node), node.cluster, islands[i], state))
    classes = _domain_classes(request, domains, keys, split=split)
    class_of = {domain: index for index, members in enumerate(classes) for domain in members}
    members: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        members[*key, class_of.get(domains[i], 0)].append(i)
    builder = _Builder(request, choices, keepable, fine=fine)
    groups = (
        builder.group(tuple(nodes), islands[nodes[0]], class_of.get(domains[nodes[0]], 0))
        for nodes in members.values()
    )
    return Fleet(
        request=request, choices=choices, groups=tuple(group for group in groups if group.columns),
        domains=domains, domain_classes=classes, keepable=keepable, fine=fine,
    )


def _levels(request: AllocationRequest, choices: Sequence[Choice]) -> dict[str, tuple[int, ...] | None]:
    """Amounts of free memory that make a difference, by GPU type; None: all do, since small claims add up."""
    found: dict[str, set[int]] = {node.gpu.name: {0} for node in request.nodes}
    shared = {choice.option.settings.gpu.name for choice in choices if choice.option.shared}
    for choice in choices:
        found.get(choice.option.settings.gpu.name, set()).add(choice.option.claim_bytes)
    return {name: None if name in shared else tuple(sorted(levels)) for name, levels in found.items()}


def _canonical(node: InventoryNode, levels: Mapping[str, tuple[int, ...] | None]) -> Islands:
    """The node's free memory, rounded down to what makes a difference; GPUs without any are left out."""
    known = levels[node.gpu.name]
    islands = []
    for island in islands_of(node):
        free = [f if known is None else max(level for level in known if level <= f) for f, _ in island]
        islands.append(tuple(sorted(level for level in free if level > 0)))
    return tuple(sorted(island for island in islands if island))


def _state(
    node: InventoryNode, islands: Islands, running: Sequence[tuple[int, PlacedReplica]]
) -> tuple[object, ...]:
    """What runs on a node, by names that do not tell equal GPUs apart."""
    if not running:
        return ()
    uniform = len({free for island in islands for free in island}) <= 1
    found = []
    for island in islands_of(node):
        inside = {gpu for _, gpu in island}
        here = []
        for choice, replica in running:
            held = inside.intersection(replica.gpus)
            if held:
                whole = len(held) == len(replica.gpus)
                here.append((choice, len(held), () if whole and uniform else replica.gpus))
        found.append(tuple(sorted(here)))
    return tuple(sorted(found))


def _domain_classes(
    request: AllocationRequest, domains: Sequence[Domain], keys: Sequence[tuple[object, ...]], *, split: bool
) -> tuple[tuple[Domain, ...], ...]:
    """Domains that hold equal nodes; none if no deployment cares."""
    if not any(is_spread(deployment) for deployment in request.deployments):
        return ()
    content: dict[Domain, Counter[tuple[object, ...]]] = defaultdict(Counter)
    for domain, key in zip(domains, keys, strict=True):
        content[domain][key] += 1
    if split:
        return tuple((domain,) for domain in content)
    classes: dict[frozenset[tuple[tuple[object, ...], int]], list[Domain]] = defaultdict(list)
    for domain, counted in content.items():
        classes[frozenset(counted.items())].append(domain)
    return tuple(tuple(members) for members in classes.values())


class _Builder:
    """Makes groups; patterns of equal islands and shapes are made once."""

    def __init__(
        self, request: AllocationRequest, choices: tuple[Choice, ...],
        keepable: Mapping[int, tuple[tuple[int, PlacedReplica], ...]], *, fine: bool,
    ) -> None:
        self._request = request
        self._choices = choices
        self._keepable = keepable
        self._fine = fine
        self._patterns: dict[tuple[Islands, tuple[Shape, ...]], tuple[tuple[Counts, ...], bool]] = {}
        self._shared: dict[tuple[int, tuple[SharedClaim, ...]], tuple[tuple[Counts, ...], bool]] = {}

    def group(self, nodes: tuple[int, ...], islands: Islands, domain_class: int) -> Group:
        """The group of these nodes, which all look like the first."""
        node = self._request.nodes[nodes[0]]
        levels = sorted({free for island in islands for free in island})
        exclusive: dict[int, Shape] = {}
        claims: dict[int, SharedClaim] = {}
        for index, choice in enumerate(self._choices):
            option = choice.option
            shape = exclusive_shape(option, levels)
            if shape is None or not allowed(self._request.deployments[choice.deployment], option, node):
                continue
            if option.shared:
                claims[index] = SharedClaim(option.claim_bytes, option.time_share)
            else:
                exclusive[index] = shape
        slots = {Shape(1, 1, level, shared=True) for level in levels} if claims else set[Shape]()
        shapes = tuple(sorted({*exclusive.values(), *slots}))
        kinds = tuple(sorted(set(claims.values())))
        fillings = {i: self._fill(shape.free_bytes, kinds) for i, shape in enumerate(shapes) if shape.shared}
        columns, exact = self._columns(nodes[0], islands, shapes)
        fitting = {i for column in columns for i, count in enumerate(column.slots) if count}
        fitting |= {shapes.index(exclusive[choice]) for column in columns for choice, _ in column.kept}
        return Group(
            nodes=nodes, gpu=node.gpu.name, price_per_hour=gpu_price(node), islands=islands,
            domain_class=domain_class, shapes=shapes, claims=kinds, columns=columns,
            shape_of={c: shapes.index(s) for c, s in exclusive.items() if shapes.index(s) in fitting},
            claim_of={choice: kinds.index(claim) for choice, claim in claims.items()},
            fillings={i: found for i, (found, _) in fillings.items()},
            running=dict(Counter(choice for at in nodes for choice, _ in self._keepable.get(at, ()))),
            exact=exact and all(all_there for _, all_there in fillings.values()),
        )

    def _fill(self, free_bytes: int, claims: tuple[SharedClaim, ...]) -> tuple[tuple[Counts, ...], bool]:
        key = (free_bytes, claims)
        if key not in self._shared:
            found = shared_patterns(free_bytes, claims)
            self._shared[key] = found.counts, found.exact
        return self._shared[key]

    def _columns(self, at: int, islands: Islands, shapes: tuple[Shape, ...]) -> tuple[tuple[Column, ...], bool]:
        """The ways to use a node: for each set of replicas that could stay, the maximal patterns of the rest."""
        found: dict[tuple[tuple[int, int], ...], set[Counts]] = defaultdict(set)
        empty, exact = self._slots(islands, shapes)
        found[()] = set(empty)
        running = [item for item in self._keepable.get(at, ()) if not self._choices[item[0]].option.shared]
        if self._fine and running:
            raw, levels = islands_of(self._request.nodes[at]), sorted({f for island in islands for f in island})
            for kept in _subsets(running):
                held = {gpu for _, replica in kept for gpu in replica.gpus}
                free = [[free for free, gpu in part if gpu not in held and free >= levels[0]] for part in raw]
                rest = tuple(sorted(tuple(sorted(_floor(f, levels) for f in part)) for part in free if part))
                slots, all_there = self._slots(rest, shapes)
                key = tuple(sorted(Counter(choice for choice, _ in kept).items()))
                found[key] |= set(slots) or {(0,) * len(shapes)}
                exact = exact and all_there
            exact = exact and len(running) <= KEEPABLE_MAX
        columns = [
            Column(kept, counts)
            for kept, slots in found.items() for counts in (maximal(slots) or (((0,) * len(shapes),) if kept else ()))
        ]
        return tuple(columns), exact

    def _slots(self, islands: Islands, shapes: tuple[Shape, ...]) -> tuple[tuple[Counts, ...], bool]:
        key = (islands, shapes)
        if key not in self._patterns:
            found = node_patterns(islands, shapes)
            self._patterns[key] = found.counts, found.exact
        return self._patterns[key]


def _floor(free: int, levels: Sequence[int]) -> int:
    return max(level for level in levels if level <= free)


def _subsets(running: Sequence[tuple[int, PlacedReplica]]) -> list[tuple[tuple[int, PlacedReplica], ...]]:
    """What could stay: all subsets but the empty one; of many replicas all, all but one, or one."""
    if len(running) <= KEEPABLE_MAX:
        sizes = range(1, len(running) + 1)
        return [subset for size in sizes for subset in combinations(running, size)]
    return [subset for size in (1, len(running) - 1, len(running)) for subset in combinations(running, size)]
