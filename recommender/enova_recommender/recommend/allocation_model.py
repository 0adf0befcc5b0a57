"""The integer programme of a fleet: its variables and rows, and the order in which it is solved.

Variables, all counts unless said otherwise: replicas of a choice in a group of nodes, and how many of them run there
already; nodes of a group that are used by a pattern; GPUs of a group that are shared by a filling; for each deployment
and priority the requests/s that are carried and the headroom beyond them, for each deployment the replicas below its
least number (real numbers). Rows bind replicas to slots of patterns, patterns to nodes, capacity to demand.

If everything fits, one solve finds the least cost. If not, priorities are taken from the highest: for each the sum of
the carried shares of demand is made as large as it can be, then that of headroom, and neither may fall afterwards; the
least cost of all that carry so much comes last. This is the lexicographic order itself: no weight stands for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from enova_recommender.recommend.allocation_groups import ANY_STATE, Choice, Fleet, Group, is_spread
from enova_recommender.recommend.allocation_programme import Floats, Programme, Solution
from enova_recommender.recommend.allocation_types import FleetDeployment, SolveLimits, gpu_price

LEVEL_SLACK = 1e-5       # by which a reached level may be missed later: HiGHS holds rows to a tenth of it
STAY_SHARE = 1e-6        # of a replica's price that a start costs at least here: what is equal stays where it is
SHARE_SLACK = 1e-6       # a third of three replicas is one
WHOLE_TIME_SHARE = 0.7   # of the time for carrying everything, where fractions could; the rest for the most of it
FIRST_TIME_SHARE = 0.5   # of that for the first stage that is solved
FILLED_TIME_SHARE = 0.7  # of that for the guess that what fractions fill can be filled

Terms = list[tuple[int, float]]
Key = TypeVar("Key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """A solution in counts, zeros left out. Groups, choices, columns, shapes and fillings are named by index."""

    replicas: Mapping[tuple[int, int], int]        # (choice, group)
    kept: Mapping[tuple[int, int], int]            # (choice, group)
    columns: Mapping[tuple[int, int], int]         # (group, column)
    fillings: Mapping[tuple[int, int, int], int]   # (group, shape, filling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What solving led to; requests/s by deployment and priority, missing replicas by deployment."""

    counts: Counts
    bound_per_hour: float
    carried: Mapping[tuple[int, int], float]
    headroom: Mapping[tuple[int, int], float]
    shortfall: Mapping[int, float]
    carried_proven: bool
    complete: bool


class FleetModel:
    """One programme over all groups.

    With `beyond`, GPUs that the fleet does not have may be used as well (whole nodes elsewhere): that programme tells
    what is missing. Without `patterns`, or with nothing `pinned`, it is a relaxation, for bounds.
    """

    def __init__(
        self, fleet: Fleet, *, beyond: bool = False, patterns: bool = True, pinned: bool = True
    ) -> None:
        self.fleet = fleet
        self.programme = Programme()
        self.extra_gpus: dict[str, int] = {}
        self.node_rows: dict[int, int] = {}
        self._pinned = pinned
        self._replicas: dict[tuple[int, int], int] = {}
        self._kept: dict[tuple[int, int], int] = {}
        self._columns: dict[tuple[int, int], int] = {}
        self._fillings: dict[tuple[int, int, int], int] = {}
        self._shared_gpus: dict[int, int] = {}
        self._extra: dict[int, int] = {}
        for index, group in enumerate(fleet.groups):
            self._add_group(index, group)
            if patterns:
                self._fill_nodes(index, group)
            else:
                self._fill_gpus(index, group)
        if beyond:
            self._add_extra()
        self._carried: dict[tuple[int, int], int] = {}
        self._headroom: dict[tuple[int, int], int] = {}
        self._shortfall: dict[int, int] = {}
        for index, deployment in enumerate(fleet.request.deployments):
            self._add_deployment(index, deployment)

    def solve(self, limits: SolveLimits) -> Outcome | None:
        """The best allocation that was found within the limits; None if not even an empty one was."""
        whole = FleetModel(self.fleet)
        whole.demand_all()
        if whole.programme.relax(whole.costs(), ()) is not None:
            solution = whole.programme.solve(whole.costs(), _part(limits, WHOLE_TIME_SHARE))
            if solution is not None:
                return self._outcome(solution, bound=solution.bound, carried_proven=True, complete=True)
            limits = _part(limits, 1 - WHOLE_TIME_SHARE)
        return self._by_priority(limits)

    def missing(self, limits: SolveLimits) -> dict[str, int] | None:
        """The cheapest GPUs by type, beyond those of the fleet, with which everything is carried; None: with none."""
        prices = self.extra_prices()
        self.demand_all()
        found = self.programme.solve([(self.extra_gpus[name], price) for name, price in prices.items()], limits)
        if found is None:
            return None
        counts = {name: round(found.values[variable]) for name, variable in self.extra_gpus.items()}
        return {name: count for name, count in counts.items() if count}

    def demand_all(self) -> None:
        """Let nothing pass that does not carry everything."""
        for d, deployment in enumerate(self.fleet.request.deployments):
            for priority, rate in pools(deployment).items():
                self.programme.at_least(self._headroom[d, priority], deployment.headroom * rate)
                self.programme.at_least(self._carried[d, priority], rate)
            if d in self._shortfall:
                self.programme.row([(self._shortfall[d], 1)], high=0)

    def demand_as_carried(self, outcome: Outcome) -> None:
        """Let nothing pass that carries less anywhere."""
        self.carry_above(None, outcome)
        for key, variable in self._headroom.items():
            self.programme.at_least(variable, outcome.headroom[key] * (1 - LEVEL_SLACK))
        for d, variable in self._shortfall.items():
            self.programme.row([(variable, 1)], high=outcome.shortfall[d] + LEVEL_SLACK)

    def carry_above(self, priority: int | None, outcome: Outcome) -> None:
        """Let nothing pass that carries less of priorities above this one; None: of any."""
        for (d, level), variable in self._carried.items():
            if priority is None or level > priority:
                self.programme.at_least(variable, outcome.carried[d, level] * (1 - LEVEL_SLACK))

    def costs(self) -> Terms:
        """USD an hour: GPUs that are held, and starts."""
        terms: Terms = []
        for (c, g), variable in self._replicas.items():
            choice, group = self.fleet.choices[c], self.fleet.groups[g]
            start = replica_price(choice, group) * max(self.fleet.request.start_share, STAY_SHARE)
            held = 0.0 if choice.option.shared else replica_price(choice, group)
            terms.append((variable, held + start))
            if (c, g) in self._kept:
                terms.append((self._kept[c, g], -start))
        for (g, _, _), variable in self._fillings.items():
            terms.append((variable, self.fleet.groups[g].price_per_hour))
        terms.extend((variable, self.fleet.groups[g].price_per_hour) for g, variable in self._shared_gpus.items())
        return terms

    def carried_at(self, priority: int) -> Terms:
        """Requests/s of one priority, negative since programmes minimise."""
        return [(variable, -1.0) for (_, level), variable in self._carried.items() if level == priority]

    def _by_priority(self, limits: SolveLimits) -> Outcome | None:
        """First with those stages filled at once that fractions would fill; if that is too much, stage by stage."""
        filled = FleetModel(self.fleet)._fillable_stages()
        if filled:
            found = FleetModel(self.fleet)._stage_by_stage(_part(limits, FILLED_TIME_SHARE), filled)
            if found is not None:
                return found
            limits = _part(limits, 1 - FILLED_TIME_SHARE)
        return self._stage_by_stage(limits, 0)

    def _fillable_stages(self) -> int:
        """How many stages from the first the linear relaxation fills."""
        stages = self._stages()
        for index, stage in enumerate(stages):
            relaxed = self.programme.relax(stage, ())
            if relaxed is None or relaxed[0] > self._filled(stage) + LEVEL_SLACK:
                return index
            self._fill(stage)
        return len(stages)

    def _stage_by_stage(self, limits: SolveLimits, filled: int) -> Outcome | None:
        """The lexicographic order, from the stage after those that are to be filled."""
        stages = self._stages()
        for stage in stages[:filled]:
            self._fill(stage)
        # The first one has to find out what fits together with all that is filled: it is the hard one.
        first = _part(limits, FIRST_TIME_SHARE)
        each = _part(limits, (1 - FIRST_TIME_SHARE) / max(len(stages) - filled, 1))
        best: Solution | None = None
        proven = True
        for index, stage in enumerate(stages[filled:]):
            found = self.programme.solve(stage, each if index else first)
            if found is None and filled and not index:
                return None
            proven = proven and found is not None and found.proven
            best = found or best
            if best is not None:
                reached = float(sum(coefficient * best.values[variable] for variable, coefficient in stage))
                slack = 0.0 if reached <= self._filled(stage) + LEVEL_SLACK else limits.gap * abs(reached)
                self.programme.row(stage, high=reached + slack + LEVEL_SLACK * max(1.0, abs(reached)))
        cheapest = self.programme.solve(self.costs(), each)
        chosen = cheapest or best
        if chosen is None:
            return None
        bound = cheapest.bound if cheapest is not None else 0.0
        return self._outcome(chosen, bound=bound, carried_proven=proven, complete=False)

    def _stages(self) -> list[Terms]:
        """What is made as small as it can be, one after the other."""
        deployments = self.fleet.request.deployments
        levels = {level for _, level in self._carried} | {top_priority(item) for item in deployments}
        stages = [stage for level in sorted(levels, reverse=True)
                  for stage in (self._demand_shares(level), self._headroom_shares(level))]
        return [stage for stage in stages if stage]

    def _filled(self, stage: Terms) -> float:
        """The least that a stage can come to: all is carried, nothing is short."""
        return float(sum(min(0.0, coefficient * self.programme.upper(variable)) for variable, coefficient in stage))

    def _fill(self, stage: Terms) -> None:
        """Let nothing pass that does not bring a stage to its least."""
        for variable, coefficient in stage:
            if coefficient < 0:
                self.programme.at_least(variable, self.programme.upper(variable))
            else:
                self.programme.row([(variable, 1)], high=0)

    def _outcome(self, solution: Solution, *, bound: float, carried_proven: bool, complete: bool) -> Outcome:
        values = solution.values
        return Outcome(
            counts=Counts(
                replicas=_counted(self._replicas, values), kept=_counted(self._kept, values),
                columns=_counted(self._columns, values), fillings=_counted(self._fillings, values),
            ),
            bound_per_hour=max(bound, 0.0), carried_proven=carried_proven, complete=complete,
            carried=_real(self._carried, values), headroom=_real(self._headroom, values),
            shortfall=_real(self._shortfall, values),
        )

    def _demand_shares(self, priority: int) -> Terms:
        """Carried shares of demand, less the missing share of the least replicas, at one priority."""
        terms: Terms = []
        for (d, level), variable in self._carried.items():
            deployment = self.fleet.request.deployments[d]
            if level == priority:
                terms.append((variable, -deployment.weight / pools(deployment)[level]))
        for d, variable in self._shortfall.items():
            deployment = self.fleet.request.deployments[d]
            if top_priority(deployment) == priority:
                terms.append((variable, deployment.weight / deployment.min_replicas))
        return terms

    def _headroom_shares(self, priority: int) -> Terms:
        terms: Terms = []
        for (d, level), variable in self._headroom.items():
            deployment = self.fleet.request.deployments[d]
            if level == priority and deployment.headroom > 0:
                terms.append((variable, -deployment.weight / (deployment.headroom * pools(deployment)[level])))
        return terms

    def _add_group(self, g: int, group: Group) -> None:
        """Replicas of each choice that fits, and how many of them stay."""
        for c in group.choices:
            most = len(group.nodes) * self._most_on_a_node(group, c) + group.running.get(c, 0)
            self._replicas[c, g] = self.programme.variable(most, implied=True)
            if group.running.get(c, 0):
                kept = self._kept[c, g] = self.programme.variable(group.running[c])
                self.programme.row([(kept, 1), (self._replicas[c, g], -1)], high=0)

    def _most_on_a_node(self, group: Group, c: int) -> int:
        if c in group.shape_of:
            return max(column.slots[group.shape_of[c]] for column in group.columns)
        claim = group.claim_of[c]
        slots = max(
            filling[claim] for fillings in group.fillings.values() for filling in fillings
        ) if any(group.fillings.values()) else 0
        return group.gpus * slots

    def _fill_nodes(self, g: int, group: Group) -> None:
        """Nodes by pattern, their slots, and what lies in the shared ones."""
        columns = {
            i: self.programme.variable(len(group.nodes), implied=True)
            for i, column in enumerate(group.columns) if self._pinned or column.state == ANY_STATE
        }
        self._columns.update({(g, i): variable for i, variable in columns.items()})
        self.node_rows[g] = self.programme.row([(v, 1) for v in columns.values()], high=len(group.nodes))
        for s, shape in enumerate(group.shapes):
            slots: Terms = [(v, -group.columns[i].slots[s]) for i, v in columns.items() if group.columns[i].slots[s]]
            if shape.shared:
                here = {f: self.programme.variable() for f in range(len(group.fillings[s]))}
                self._fillings.update({(g, s, f): variable for f, variable in here.items()})
                self.programme.row([*((v, 1) for v in here.values()), *slots], high=0)
            else:
                held = [(self._replicas[c, g], 1) for c, needs in group.shape_of.items() if needs == s]
                self.programme.row([*held, *slots], high=0)
        for index in range(len(group.claims)):
            held = [(self._replicas[c, g], 1) for c, claim in group.claim_of.items() if claim == index]
            room = [
                (self._fillings[g, s, f], -filling[index])
                for s, fillings in group.fillings.items() for f, filling in enumerate(fillings) if filling[index]
            ]
            self.programme.row([*held, *room], high=0)
        if self._pinned:
            self._pin(g, group, columns)

    def _pin(self, g: int, group: Group, columns: Mapping[int, int]) -> None:
        """Patterns of a state are for its nodes, and only what they pin stays."""
        staying: dict[int, Terms] = defaultdict(list)
        for state, nodes in enumerate(group.states):
            here: Terms = [(v, 1) for i, v in columns.items() if group.columns[i].state == state]
            self.programme.row(here, high=len(nodes))
        for i, variable in columns.items():
            for c, count in group.columns[i].pinned:
                staying[c].append((variable, -count))
        for c in set(group.running) & set(group.shape_of):
            self.programme.row([(self._kept[c, g], 1), *staying[c]], high=0)

    def _fill_gpus(self, g: int, group: Group) -> None:
        """In place of patterns, sums that every packing holds: GPUs, claimed bytes, time. It bounds from below."""
        total = len(group.nodes) * group.gpus
        shared = self._shared_gpus[g] = self.programme.variable(total)
        held: Terms = [(self._replicas[c, g], self.fleet.choices[c].option.gpus) for c in group.shape_of]
        self.node_rows[g] = self.programme.row([*held, (shared, 1)], high=total)
        most = max(free for island in group.islands for free in island)
        for size in ("claim_bytes", "time_share"):
            room = most if size == "claim_bytes" else 1.0
            sizes = {c: getattr(group.claims[claim], size) / room for c, claim in group.claim_of.items()}
            self.programme.row([*((self._replicas[c, g], s) for c, s in sizes.items()), (shared, -1.0)], high=0)

    def _add_extra(self) -> None:
        """Replicas on GPUs that the fleet does not have."""
        terms: dict[str, Terms] = defaultdict(list)
        for c, choice in enumerate(self.fleet.choices):
            option, name = choice.option, choice.option.settings.gpu.name
            types = self.fleet.request.deployments[choice.deployment].gpu_types
            if types and name not in types:
                continue
            self._extra[c] = self.programme.variable()
            share = max(option.claim_bytes / option.settings.gpu.memory_bytes, option.time_share)
            terms[name].append((self._extra[c], -share if option.shared else -option.gpus))
        for name, held in terms.items():
            self.extra_gpus[name] = self.programme.variable()
            self.programme.row([(self.extra_gpus[name], 1), *held], low=0)

    def extra_prices(self) -> dict[str, float]:
        """What a GPU of each type costs: as in the fleet, else by its list."""
        listed = {option.settings.gpu.name: option.settings.gpu for option in (c.option for c in self.fleet.choices)}
        known = {node.gpu.name: gpu_price(node) for node in self.fleet.request.nodes}
        # Without any price at all the number of GPUs decides.
        return {name: known.get(name) or listed[name].price_per_hour or 1.0 for name in self.extra_gpus}

    def _add_deployment(self, d: int, deployment: FleetDeployment) -> None:
        """Capacity against demand, and the deployment's own bounds."""
        chosen = {c for c, choice in enumerate(self.fleet.choices) if choice.deployment == d}
        all_of_it = [(variable, c) for (c, _), variable in self._replicas.items() if c in chosen]
        all_of_it += [(variable, c) for c, variable in self._extra.items() if c in chosen]
        options = {c: self.fleet.choices[c].option for c in chosen}
        scale = deployment.demand_rps or 1.0  # rows near 1: HiGHS holds them to an absolute tolerance
        wanted: Terms = []
        for priority, rate in pools(deployment).items():
            self._carried[d, priority] = self.programme.variable(rate, integer=False)
            self._headroom[d, priority] = self.programme.variable(deployment.headroom * rate, integer=False)
            wanted += [(self._carried[d, priority], -1 / scale), (self._headroom[d, priority], -1 / scale)]
        self.programme.row([*((v, options[c].capacity_rps / scale) for v, c in all_of_it), *wanted], low=0)
        count: Terms = [(variable, 1) for variable, _ in all_of_it]
        if deployment.min_replicas:
            self._shortfall[d] = self.programme.variable(deployment.min_replicas, integer=False)
            self.programme.row([*count, (self._shortfall[d], 1)], low=deployment.min_replicas)
        if deployment.max_replicas is not None:
            self.programme.row(count, high=deployment.max_replicas)
        if deployment.max_gpus is not None:
            self.programme.row([(v, options[c].gpus) for v, c in all_of_it], high=deployment.max_gpus)
        if is_spread(deployment):
            self._add_spread(deployment, chosen, count)

    def _rate(self, c: int) -> float:
        return self.fleet.choices[c].option.capacity_rps

    def _add_spread(self, deployment: FleetDeployment, chosen: set[int], count: Terms) -> None:
        """At most so many replicas and so much capacity in each domain, some in at least so many of them."""
        by_class, rates = defaultdict[int, Terms](list), defaultdict[int, Terms](list)
        scale = deployment.demand_rps or 1.0
        for (c, g), variable in self._replicas.items():
            if c in chosen:
                by_class[self.fleet.groups[g].domain_class].append((variable, 1))
                rates[self.fleet.groups[g].domain_class].append((variable, self._rate(c) / scale))
        most = self.programme.variable()
        share = deployment.spread.domain_share
        self.programme.row([(most, 1), *((v, -share * n) for v, n in count)], high=SHARE_SLACK)
        most_rate = self.programme.variable(integer=False)
        total = [(v, -share * self._rate(c) / scale) for (c, _), v in self._replicas.items() if c in chosen]
        total += [(v, -share * self._rate(c) / scale) for c, v in self._extra.items() if c in chosen]
        self.programme.row([(most_rate, 1), *total], high=0)
        occupied: Terms = [(variable, 1) for c, variable in self._extra.items() if c in chosen]
        for index, here in by_class.items():
            domains = len(self.fleet.domain_classes[index])
            self.programme.row([*here, (most, -domains)], high=0)
            self.programme.row([*rates[index], (most_rate, -domains)], high=0)
            used = self.programme.variable(domains)
            self.programme.row([(used, 1), *((v, -n) for v, n in here)], high=0)
            occupied.append((used, 1))
        # Any replica at all calls for the least number of domains.
        running = self.programme.variable(1)
        for variable, _ in count:
            bound = self.programme.upper(variable)
            self.programme.row([(variable, 1), (running, -(bound if np.isfinite(bound) else 1e4))], high=0)
        self.programme.row([*occupied, (running, -deployment.spread.domains)], low=0)


def _part(limits: SolveLimits, share: float) -> SolveLimits:
    return replace(limits, time_limit_s=limits.time_limit_s * share)


def replica_price(choice: Choice, group: Group) -> float:
    """USD an hour of one replica in this group; of a shared one, of the part of a GPU that it takes."""
    option = choice.option
    if option.price_per_hour is not None:
        return option.price_per_hour
    if option.shared:
        return group.price_per_hour * max(option.claim_bytes / option.settings.gpu.memory_bytes, option.time_share)
    return option.gpus * group.price_per_hour


def top_priority(deployment: FleetDeployment) -> int:
    """The highest priority of its classes, at which its least replicas count."""
    return max((item.priority for item in deployment.classes), default=0)


def pools(deployment: FleetDeployment) -> dict[int, float]:
    """Demand by priority: requests of one priority are not told apart. Those without any are left out."""
    found: dict[int, float] = defaultdict(float)
    for item in deployment.classes:
        if item.requests_per_s > 0:
            found[item.priority] += item.requests_per_s
    return dict(found)


def _real(variables: Mapping[Key, int], values: Floats) -> dict[Key, float]:
    return {key: max(float(values[variable]), 0.0) for key, variable in variables.items()}


def _counted(variables: Mapping[Key, int], values: Floats) -> dict[Key, int]:
    counted = {key: round(float(values[variable])) for key, variable in variables.items()}
    return {key: count for key, count in counted.items() if count}
