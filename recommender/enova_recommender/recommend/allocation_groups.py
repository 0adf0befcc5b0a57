"""The fleet as the integer programme sees it: groups of nodes in an equal state, with the patterns that fill them.

Nodes are equal if their GPUs, price, cluster and free memory are. Where replicas run already, nodes that run the same
are a state of their group: patterns of a state pin what could stay there to its GPUs and fill the rest. With too many
states only the patterns that pin all of it, or all but one kind, are looked at. Where a deployment is spread over
failure domains, domains of equal nodes form a class, and a group lies within one class; split, each domain is a class
of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import combinations

from enova_recommender.recommend.allocation_patterns import (
    Counts,
    Islands,
    Patterns,
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

KEEPABLE_MAX = 8      # replicas of one node whose subsets are looked at
SUBSETS_MAX = 800     # sets of replicas that could stay, over all states of nodes, that are all looked at
DROPPED_MAX = 2000    # the same for sets without one kind of replica; beyond it all stays or nothing need

ANY_STATE = -1

Domain = tuple[str, str]   # cluster, name
Running = tuple[int, PlacedReplica]           # choice, replica
NodeKey = tuple[str, float, str, Islands]     # GPU, price, cluster, free memory


@dataclass(frozen=True, slots=True)
class Choice:
    """One option of one deployment, by the deployment's index."""

    deployment: int
    option: Option


class Detail(IntEnum):
    """Which sets of running replicas have patterns of their own."""

    ALL_OR_NOTHING = 0
    WITHOUT_ONE_KIND = 1
    EVERY_SUBSET = 2


@dataclass(frozen=True, slots=True)
class Column:
    """One way to use a node: its slots by shape; of those, what runs in a node of this state may stay in some."""

    slots: Counts
    state: int = ANY_STATE
    pinned: tuple[tuple[int, int], ...] = ()  # (choice, count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Nodes in an equal state. Choices, nodes and domain classes are named by their index."""

    nodes: tuple[int, ...]
    states: tuple[tuple[int, ...], ...]    # those of the nodes that run the same
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
    keepable: Mapping[int, tuple[Running, ...]]  # what may stay, by node
    detail: Detail

    @property
    def exact(self) -> bool:
        """Whether the programme holds all patterns of empty nodes: nothing is carried without one of them."""
        return all(group.exact for group in self.groups)

    @property
    def variables(self) -> int:
        """Counts that the programme is to find."""
        return sum(len(group.choices) + len(group.columns) for group in self.groups)

    @property
    def keeps_exact(self) -> bool:
        """Whether it holds all those of nodes that run something, too."""
        most = max((len(running) for running in self.keepable.values()), default=0)
        return self.exact and (not most or (self.detail is Detail.EVERY_SUBSET and most <= KEEPABLE_MAX))


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
    """The fleet at the finest detail that its number of states allows."""
    choices = _choices(request)
    keepable = _keepable(request, choices)
    states = {_state(request.nodes[at], running): running for at, running in keepable.items()}
    kinds = [len({choice for choice, _ in running}) for running in states.values()]
    subsets = [2 ** min(len(running), KEEPABLE_MAX) for running in states.values()]
    if sum(subsets) <= SUBSETS_MAX:
        detail = Detail.EVERY_SUBSET
    else:
        detail = Detail.WITHOUT_ONE_KIND if sum(kinds) <= DROPPED_MAX else Detail.ALL_OR_NOTHING
    return _grouped(request, choices, keepable, detail=detail, split=split)


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
) -> dict[int, tuple[Running, ...]]:
    """What runs and may stay where it is: still an option, still allowed there, still with room."""
    known = {(request.deployments[c.deployment].name, c.option.name): i for i, c in enumerate(choices)}
    nodes = {node.name: i for i, node in enumerate(request.nodes)}
    found: dict[int, list[Running]] = defaultdict(list)
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
    request: AllocationRequest, choices: tuple[Choice, ...], keepable: Mapping[int, tuple[Running, ...]], *,
    detail: Detail, split: bool,
) -> Fleet:
    domains = tuple(domain_of(node) for node in request.nodes)
    levels = _levels(request, choices)
    islands = [_canonical(node, levels) for node in request.nodes]
    keys = [
        (node.gpu.name, gpu_price(node), node.cluster, islands[i]) for i, node in enumerate(request.nodes)
    ]
    classes = _domain_classes(request, domains, keys, split=split)
    class_of = {domain: index for index, members in enumerate(classes) for domain in members}
    members: dict[tuple[NodeKey, int], list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        members[key, class_of.get(domains[i], 0)].append(i)
    builder = _Builder(request, choices, keepable, detail)
    groups = (
        builder.group(tuple(nodes), islands[nodes[0]], class_of.get(domains[nodes[0]], 0))
        for nodes in members.values()
    )
    return Fleet(
        request=request, choices=choices, groups=tuple(group for group in groups if group.columns),
        domains=domains, domain_classes=classes, keepable=keepable, detail=detail,
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


def _state(node: InventoryNode, running: Sequence[Running]) -> tuple[object, ...]:
    """What runs on a node, by names that do not tell equal GPUs apart."""
    islands = islands_of(node)
    uniform = len({free for island in islands for free, _ in island}) <= 1
    found = []
    for island in islands:
        inside = {gpu for _, gpu in island}
        here: list[tuple[int, int, tuple[int, ...]]] = []
        for choice, replica in running:
            held = inside.intersection(replica.gpus)
            if held:
                whole = len(held) == len(replica.gpus)
                here.append((choice, len(held), () if whole and uniform else replica.gpus))
        found.append(tuple(sorted(here)))
    return (node.gpu.name, node.gpus, node.island_gpus, node.free_bytes, tuple(sorted(found)))


def _domain_classes(
    request: AllocationRequest, domains: Sequence[Domain], keys: Sequence[NodeKey], *, split: bool
) -> tuple[tuple[Domain, ...], ...]:
    """Domains that hold equal nodes; none if no deployment cares."""
    if not any(is_spread(deployment) for deployment in request.deployments):
        return ()
    content: dict[Domain, Counter[NodeKey]] = defaultdict(Counter)
    for domain, key in zip(domains, keys, strict=True):
        content[domain][key] += 1
    if split:
        return tuple((domain,) for domain in content)
    classes: dict[frozenset[tuple[NodeKey, int]], list[Domain]] = defaultdict(list)
    for domain, counted in content.items():
        classes[frozenset(counted.items())].append(domain)
    return tuple(tuple(members) for members in classes.values())


class _Builder:
    """Makes groups; patterns of equal islands and shapes are made once."""

    def __init__(
        self, request: AllocationRequest, choices: tuple[Choice, ...], keepable: Mapping[int, tuple[Running, ...]],
        detail: Detail,
    ) -> None:
        self._request = request
        self._choices = choices
        self._keepable = keepable
        self._detail = detail
        self._patterns: dict[tuple[Islands, tuple[Shape, ...]], Patterns] = {}
        self._shared: dict[tuple[int, tuple[SharedClaim, ...]], Patterns] = {}

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
        empty = self._slots(islands, shapes)
        shape_of = {choice: shapes.index(shape) for choice, shape in exclusive.items()}
        states = self._states(nodes)
        columns = [Column(slots) for slots in empty.counts]
        for s, state in enumerate(states):
            columns.extend(self._columns(s, state[0], islands, shapes, shape_of))
        fitting = {i for slots in empty.counts for i, count in enumerate(slots) if count}
        return Group(
            nodes=nodes, states=states, gpu=node.gpu.name, price_per_hour=gpu_price(node), islands=islands,
            domain_class=domain_class, shapes=shapes, claims=kinds, columns=tuple(columns),
            shape_of={choice: shape for choice, shape in shape_of.items() if shape in fitting},
            claim_of={choice: kinds.index(claim) for choice, claim in claims.items()},
            fillings={i: found.counts for i, found in fillings.items()},
            running=dict(Counter(choice for at in nodes for choice, _ in self._keepable.get(at, ()))),
            exact=empty.exact and all(found.exact for found in fillings.values()),
        )

    def _fill(self, free_bytes: int, claims: tuple[SharedClaim, ...]) -> Patterns:
        key = (free_bytes, claims)
        if key not in self._shared:
            self._shared[key] = shared_patterns(free_bytes, claims)
        return self._shared[key]

    def _slots(self, islands: Islands, shapes: tuple[Shape, ...]) -> Patterns:
        key = (islands, shapes)
        if key not in self._patterns:
            self._patterns[key] = node_patterns(islands, shapes)
        return self._patterns[key]

    def _states(self, nodes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Nodes that run the same exclusive replicas, where there are any."""
        found: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for at in nodes:
            running = self._pinnable(at)
            if running:
                found[_state(self._request.nodes[at], running)].append(at)
        return tuple(tuple(state) for state in found.values())

    def _pinnable(self, at: int) -> list[Running]:
        """Shared replicas are left to the placing: their GPU is filled anew around them."""
        return [item for item in self._keepable.get(at, ()) if not self._choices[item[0]].option.shared]

    def _columns(
        self, state: int, at: int, islands: Islands, shapes: tuple[Shape, ...], shape_of: Mapping[int, int]
    ) -> list[Column]:
        """For sets of replicas that could stay on a node: their slots, and maximal patterns of the rest."""
        found: dict[tuple[tuple[int, int], ...], set[Counts]] = defaultdict(set)
        raw, levels = islands_of(self._request.nodes[at]), sorted({f for island in islands for f in island})
        for pinned in _subsets(self._pinnable(at), self._detail):
            held = {gpu for _, replica in pinned for gpu in replica.gpus}
            free = [[free for free, gpu in part if gpu not in held and free >= levels[0]] for part in raw]
            rest = tuple(sorted(tuple(sorted(_floor(f, levels) for f in part)) for part in free if part))
            own = Counter(shape_of[choice] for choice, _ in pinned)
            for slots in self._slots(rest, shapes).counts or ((0,) * len(shapes),):
                total = tuple(count + own[i] for i, count in enumerate(slots))
                found[tuple(sorted(Counter(choice for choice, _ in pinned).items()))].add(total)
        return [Column(slots, state, pinned) for pinned, counts in found.items() for slots in maximal(counts)]


def _floor(free: int, levels: Sequence[int]) -> int:
    return max(level for level in levels if level <= free)


def _subsets(running: Sequence[Running], detail: Detail) -> list[tuple[Running, ...]]:
    """What could stay together: never nothing."""
    if detail is Detail.EVERY_SUBSET and len(running) <= KEEPABLE_MAX:
        sizes = range(1, len(running) + 1)
        return [subset for size in sizes for subset in combinations(running, size)]
    found = [tuple(running)]
    if detail is not Detail.ALL_OR_NOTHING:
        kinds = sorted({choice for choice, _ in running})
        found.extend(tuple(item for item in running if item[0] != kind) for kind in kinds)
    return [subset for subset in found if subset]
