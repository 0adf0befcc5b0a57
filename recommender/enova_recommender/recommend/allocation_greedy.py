"""An allocation made replica by replica, for when the programme found none in time, or one that is not whole.

Priorities from the highest, demand before headroom: the deployment takes, as long as it lacks capacity, what runs for
it already, then the option with the least price for the rate that is still lacking, on the node that it fills most.
Nothing is ever moved, so it is fast, valid and often dear.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from enova_recommender.recommend.allocation_groups import Domain, Fleet, allowed, is_spread, islands_of
from enova_recommender.recommend.allocation_model import SHARE_SLACK, pools, top_priority
from enova_recommender.recommend.allocation_patterns import TIME_SLACK, Shape, pack
from enova_recommender.recommend.allocation_types import AllocationRequest, FleetDeployment, PlacedReplica, gpu_price

RATE_SLACK = 1e-9


def fill_up(fleet: Fleet, start: Sequence[PlacedReplica] = ()) -> tuple[PlacedReplica, ...]:
    """`start`, less what breaks the spread of its deployment, and replicas for the demand that it leaves."""
    greedy = _Greedy(fleet)
    for replica in start:
        greedy.hold(replica)
    greedy.fill()
    return _spread_only(fleet.request, greedy.placed)


def worth(request: AllocationRequest, placed: Sequence[PlacedReplica]) -> tuple[float, ...]:
    """For comparison, higher is better: shares of demand and of headroom by priority, then the cost, negative."""
    options = {(d.name, option.name): option for d in request.deployments for option in d.options}
    prices = {node.name: gpu_price(node) for node in request.nodes}
    rates, counts = defaultdict[str, float](float), Counter[str]()
    cost, shared = 0.0, set[tuple[str, int]]()
    for replica in placed:
        option = options[replica.deployment, replica.option]
        rates[replica.deployment] += option.capacity_rps
        counts[replica.deployment] += 1
        if option.shared:
            shared.add((replica.node, replica.gpus[0]))
        else:
            cost += option.price_per_hour or option.gpus * prices[replica.node]
    demand, headroom = defaultdict[int, float](float), defaultdict[int, float](float)
    for deployment in request.deployments:
        left, least = rates[deployment.name], deployment.min_replicas
        demand[top_priority(deployment)] -= deployment.weight * max(least - counts[deployment.name], 0) / max(least, 1)
        for priority, rate in sorted(pools(deployment).items(), reverse=True):
            carried = min(rate, left)
            spare = min(left - carried, rate * deployment.headroom)
            demand[priority] += deployment.weight * carried / rate
            headroom[priority] += deployment.weight * spare / rate
            left -= carried + spare
    cost += sum(prices[name] for name, _ in shared)
    shares = [round(part[priority], 4) for priority in sorted(demand, reverse=True) for part in (demand, headroom)]
    return (*shares, -cost)


class _Greedy:
    """What is free while replicas are added."""

    def __init__(self, fleet: Fleet) -> None:
        self.placed: list[PlacedReplica] = []
        self._fleet = fleet
        self._request = fleet.request
        self._index = {node.name: at for at, node in enumerate(fleet.request.nodes)}
        self._free = [islands_of(node) for node in fleet.request.nodes]
        self._shared: list[dict[int, tuple[int, float]]] = [{} for _ in fleet.request.nodes]  # bytes, time left
        self._rate, self._count, self._gpus = defaultdict[int, float](float), Counter[int](), Counter[int]()
        self._held = defaultdict[tuple[int, Domain], float](float)
        self._choice = {
            (fleet.request.deployments[choice.deployment].name, choice.option.name): c
            for c, choice in enumerate(fleet.choices)
        }
        self._exhausted: set[int] = set()

    def hold(self, replica: PlacedReplica) -> None:
        """Count a replica that is there."""
        c, at = self._choice[replica.deployment, replica.option], self._index[replica.node]
        choice = self._fleet.choices[c]
        if choice.option.shared:
            gpu = replica.gpus[0]
            if gpu not in self._shared[at]:
                self._shared[at][gpu] = next(free for island in self._free[at] for free, i in island if i == gpu), 1.0
            bytes_left, time_left = self._shared[at][gpu]
            self._shared[at][gpu] = bytes_left - choice.option.claim_bytes, time_left - choice.option.time_share
        self._free[at] = [[gpu for gpu in island if gpu[1] not in replica.gpus] for island in self._free[at]]
        self._rate[choice.deployment] += choice.option.capacity_rps
        self._count[choice.deployment] += 1
        self._gpus[choice.deployment] += choice.option.gpus
        self._held[choice.deployment, self._fleet.domains[at]] += choice.option.capacity_rps
        self.placed.append(replica)

    def fill(self) -> None:
        """Add what is lacking, by priority."""
        for d, wanted in self._stages():
            deployment = self._request.deployments[d]
            while self._rate[d] < wanted * (1 - RATE_SLACK) or self._count[d] < deployment.min_replicas:
                if not self._add(d, deployment, max(wanted - self._rate[d], 0.0)):
                    break

    def _stages(self) -> Iterator[tuple[int, float]]:
        """(deployment, capacity that it should have by then), in order."""
        deployments = self._request.deployments
        wanted = defaultdict[int, float](float)
        levels = {level for item in deployments for level in (*pools(item), top_priority(item))}
        order = sorted(range(len(deployments)), key=lambda d: -deployments[d].weight)
        for level in sorted(levels, reverse=True):
            for headroom in (False, True):
                for d in order:
                    rate = pools(deployments[d]).get(level)
                    if rate is not None or level == top_priority(deployments[d]):
                        wanted[d] += (rate or 0.0) * (deployments[d].headroom if headroom else 1.0)
                        yield d, wanted[d]

    def _add(self, d: int, deployment: FleetDeployment, lacking: float) -> bool:
        """One replica more; False if there is none to be had."""
        if deployment.max_replicas is not None and self._count[d] >= deployment.max_replicas:
            return False
        ways = []
        for c, choice in enumerate(self._fleet.choices):
            option = choice.option
            within = deployment.max_gpus is None or self._gpus[d] + option.gpus <= deployment.max_gpus
            if choice.deployment == d and within:
                price = option.price_per_hour or option.gpus * (option.settings.gpu.price_per_hour or 1.0)
                price *= option.time_share if option.shared else 1.0
                ways.append((price / min(option.capacity_rps, lacking or option.capacity_rps), c))
        if self._keep({c for _, c in ways}):
            return True
        return any(self._place(c) for _, c in sorted(ways) if c not in self._exhausted)

    def _keep(self, choices: set[int]) -> bool:
        """A replica of one of these choices that runs where there is still room for it."""
        for at, running in self._fleet.keepable.items():
            for c, replica in running:
                option = self._fleet.choices[c].option
                if c in choices and replica.gpus and not option.shared:
                    free = {gpu for island in self._free[at] for _, gpu in island}
                    if free.issuperset(replica.gpus):
                        self.hold(PlacedReplica(
                            deployment=replica.deployment, option=replica.option, node=replica.node,
                            gpus=replica.gpus, kept=True,
                        ))
                        return True
        return False

    def _place(self, c: int) -> bool:
        """A new replica of a choice on the node that it fills most, or in the domain that has the least."""
        choice = self._fleet.choices[c]
        deployment = self._request.deployments[choice.deployment]
        nodes = [at for at, node in enumerate(self._request.nodes) if allowed(deployment, choice.option, node)]
        spread = is_spread(deployment)
        nodes.sort(key=lambda at: (
            self._held[choice.deployment, self._fleet.domains[at]] if spread else 0.0,
            sum(map(len, self._free[at])), at,
        ))
        for at in nodes:
            gpus = self._gpus_for(c, at)
            if gpus is not None:
                name = self._request.nodes[at].name
                self.hold(PlacedReplica(
                    deployment=deployment.name, option=choice.option.name, node=name, gpus=gpus,
                ))
                return True
        self._exhausted.add(c)
        return False

    def _gpus_for(self, c: int, at: int) -> tuple[int, ...] | None:
        option = self._fleet.choices[c].option
        if option.shared:
            for gpu, (bytes_left, time_left) in self._shared[at].items():
                if bytes_left >= option.claim_bytes and time_left >= option.time_share - TIME_SLACK:
                    return (gpu,)
        if sum(map(len, self._free[at])) < option.gpus:
            return None
        layout = option.settings.parallelism
        found = pack(self._free[at], [Shape(layout.tensor, layout.pipeline * layout.data, option.claim_bytes)])
        return found[0] if found else None


def _spread_only(request: AllocationRequest, placed: Sequence[PlacedReplica]) -> tuple[PlacedReplica, ...]:
    """Without what lies in a domain that holds too large a share of its deployment."""
    domains = {node.name: (node.cluster, node.domain or f"node {node.name}") for node in request.nodes}
    rates = {(d.name, option.name): option.capacity_rps for d in request.deployments for option in d.options}
    kept: list[PlacedReplica] = []
    for deployment in request.deployments:
        mine = [replica for replica in placed if replica.deployment == deployment.name]
        while mine and is_spread(deployment):
            count, rate = Counter[tuple[str, str]](), defaultdict[tuple[str, str], float](float)
            for replica in mine:
                count[domains[replica.node]] += 1
                rate[domains[replica.node]] += rates[replica.deployment, replica.option]
            share, fullest = deployment.spread.domain_share, max(count, key=lambda domain: rate[domain])
            most = max(count, key=lambda domain: count[domain])
            if len(count) < deployment.spread.domains:
                mine = []
            elif rate[fullest] > share * sum(rate.values()) * (1 + SHARE_SLACK):
                mine.remove(next(replica for replica in mine if domains[replica.node] == fullest))
            elif count[most] > share * len(mine) + SHARE_SLACK:
                mine.remove(next(replica for replica in mine if domains[replica.node] == most))
            else:
                break
        kept += mine
    return tuple(kept)
