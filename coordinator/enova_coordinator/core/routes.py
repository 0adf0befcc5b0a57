"""Where served names lead: routes from READY replicas, as revisioned tables with deltas between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from enova_coordinator.core.model import (
    Intent,
    NodeReport,
    NodeState,
    Replica,
    ReplicaState,
    ServingClass,
    Snapshot,
    Variant,
)

DEFAULT_CONCURRENCY = 256          # requests at once in an engine whose max_num_seqs is left to vLLM


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTarget:
    """One replica that answers for a served name, behind the ingress of its node."""

    replica: str
    node: str
    hop_address: str
    weight: float = 1.0
    max_concurrency: int = DEFAULT_CONCURRENCY


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthRule:
    """One kind of prompt and the limit of its answers."""

    centroid: bytes                # a signed byte an entry
    reach: float                   # the smallest cosine of a prompt that belongs
    limit_tokens: int = 0          # 0: none


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthRules:
    """How an ingress turns prompts into vectors, and which limits on answers follow from them."""

    method: int
    seed: int
    dimension: int
    apply: bool = False            # False: answers are observed, no request is changed
    context_tokens: int = 0        # that every engine accepts, prompt and answer together; 0: not known
    limit_tokens: int = 0          # of prompts of no kind; 0: none
    kinds: tuple[LengthRule, ...] = ()
    samples_per_s: float = 1.0     # answers that one ingress reports at most; real time


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where one served name leads; without targets the deployment exists and nothing answers yet."""

    served_name: str
    deployment: str
    targets: tuple[RouteTarget, ...] = ()
    classes: tuple[ServingClass, ...] = ()
    lengths: LengthRules | None = None  # None: prompts are not looked at
    wakes: bool = False                 # requests without a target wait for the first one


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutesDelta:
    """What turns the table of `base_revision` into that of `revision`; base 0 replaces everything."""

    revision: int
    base_revision: int
    routes: tuple[Route, ...] = ()
    removed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTable:
    """All routes by served name, as of `revision`, and since which revision each replica is in them."""

    revision: int = 0
    routes: Mapping[str, Route] = field(default_factory=dict)
    since: Mapping[str, int] = field(default_factory=dict)

    def whole(self) -> RoutesDelta:
        """The delta that replaces everything."""
        return RoutesDelta(revision=self.revision, base_revision=0, routes=tuple(self.routes.values()))

    def delta(self, before: RouteTable) -> RoutesDelta:
        """What leads here from an earlier table."""
        return RoutesDelta(
            revision=self.revision,
            base_revision=before.revision,
            routes=tuple(route for name, route in self.routes.items() if before.routes.get(name) != route),
            removed=tuple(sorted(set(before.routes) - set(self.routes))),
        )


def next_table(
    before: RouteTable, snapshot: Snapshot, lengths: Mapping[str, LengthRules] = MappingProxyType({})
) -> RouteTable:
    """The table of a snapshot and of rules by deployment; the same object as before if no route differs."""
    routes = _routes(snapshot, lengths)
    if before.revision and routes == before.routes:
        return before
    revision = max(before.revision + 1, snapshot.revision)
    replicas = {target.replica for route in routes.values() for target in route.targets}
    since = {replica: before.since.get(replica, revision) for replica in replicas}
    return RouteTable(revision=revision, routes=routes, since=since)


def routed_everywhere(table: RouteTable, replica: str, reports: Iterable[NodeReport]) -> bool:
    """Whether every ingress that is connected serves a table which has the replica."""
    since = table.since.get(replica)
    connected = [report for report in reports if report.ingress_connected]
    return since is not None and bool(connected) and all(report.routes_revision >= since for report in connected)


def routed(table: RouteTable, reports: Iterable[NodeReport]) -> frozenset[str]:
    """The replicas of the table that every connected ingress has; all of them where none is connected."""
    oldest = min((report.routes_revision for report in reports if report.ingress_connected), default=table.revision)
    return frozenset(replica for replica, since in table.since.items() if since <= oldest)


def _routes(snapshot: Snapshot, lengths: Mapping[str, LengthRules]) -> dict[str, Route]:
    targets: dict[str, list[tuple[Variant, Replica]]] = {}
    for replica in snapshot.replicas.values():
        variant = snapshot.variants.get(replica.variant)
        if variant is not None and _answers(replica, snapshot):
            targets.setdefault(replica.deployment, []).append((variant, replica))
    routes: dict[str, Route] = {}
    for deployment in sorted(snapshot.deployments.values(), key=lambda deployment: deployment.name):
        serving = targets.get(deployment.name, [])
        for served_name in deployment.served_names:
            # A name that two deployments claim stays with the first: validation refuses the second.
            routes.setdefault(served_name, Route(
                served_name=served_name,
                deployment=deployment.name,
                targets=_targets(served_name, serving, snapshot),
                classes=deployment.spec.classes,
                lengths=lengths.get(deployment.name),
                wakes=not deployment.spec.fixed and deployment.spec.bounds[0] == 0,
            ))
    return routes


def _targets(
    served_name: str, serving: list[tuple[Variant, Replica]], snapshot: Snapshot
) -> tuple[RouteTarget, ...]:
    return tuple(
        RouteTarget(
            replica=replica.name,
            node=replica.node,
            hop_address=snapshot.nodes[replica.node].node.hop_address,
            weight=variant.weight,
            max_concurrency=int(variant.configuration.get("max_num_seqs", DEFAULT_CONCURRENCY)),
        )
        for variant, replica in sorted(serving, key=lambda pair: pair[1].name)
        if served_name in variant.served_names
    )


def _answers(replica: Replica, snapshot: Snapshot) -> bool:
    view = snapshot.nodes.get(replica.node)
    return (
        replica.intent is Intent.RUN
        and replica.status.state is ReplicaState.READY
        and replica.status.in_routing
        and view is not None
        and view.state is not NodeState.LOST
    )
