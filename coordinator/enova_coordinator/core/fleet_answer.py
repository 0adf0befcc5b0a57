"""An allocation of the fleet as plain values under the names of `RecommendAllocationResponse`. Pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from enova_coordinator.core.advice import grounds_of
from enova_coordinator.core.fleet import Ground, Wanted, living_replicas
from enova_coordinator.core.gpu_types import LeftOut
from enova_coordinator.core.model import Snapshot
from enova_recommender.recommend.allocation_types import Allocation, Option, Unmet, VariantShare
from enova_recommender.recommend.fleet import CAPACITY_BASIS, RUNNING

Answer = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """What the integer programme said, what it was given for it, and how long it took."""

    allocation: Allocation
    headroom: float
    time_limit_s: float
    solve_s: float


def answer_of(
    snapshot: Snapshot, ground: Ground, wanted: Sequence[Wanted], solved: Solved, left_out: Iterable[LeftOut]
) -> Answer:
    """The answer to whoever asked for the fleet."""
    found = solved.allocation
    shares = _shares(ground, found)
    running = Counter(each.deployment for each in living_replicas(snapshot))
    kept = Counter(each.deployment for each in found.replicas if each.kept)
    return {
        "deployments": [
            _deployment(
                each, found, shares.get(each.deployment.name, ()), running=running[each.deployment.name],
                kept=kept[each.deployment.name],
            )
            for each in wanted
        ],
        "gpus": [
            {
                "gpu_type": each.gpu, "total": each.total_gpus, "held": each.held_gpus,
                "price_per_hour": ground.types.models[each.gpu].price_per_hour,
                "saved_per_hour": each.saved_per_hour, "gained_rps": each.gained_rps,
            }
            for each in found.resources
        ],
        "cost_per_hour": found.cost_per_hour,
        "objective_per_hour": found.objective_per_hour,
        "bound_per_hour": found.bound_per_hour,
        "gap": found.gap,
        "demand_rps": found.demand_rps,
        "carried_rps": found.carried_rps,
        "complete": found.complete,
        "carried_proven": found.carried_proven,
        "missing": [
            {"gpu_type": each.gpu, "count": each.gpus, "cost_per_hour": each.cost_per_hour} for each in found.missing
        ],
        "left_out": [left_out_plain(each) for each in (*left_out, *ground.left_out)],
        "headroom": solved.headroom,
        "time_limit_s": solved.time_limit_s,
        "solve_s": solved.solve_s,
        "capacity_basis": CAPACITY_BASIS,
    }  # fmt: skip


def left_out_plain(value: LeftOut) -> Answer:
    """Under the names of `LeftOut`."""
    return {"object": value.object, "reason": value.reason}


@dataclass(frozen=True, slots=True)
class _Share:
    """The replicas of one option: all by node, and those of them that stay where they are."""

    share: VariantShare
    nodes: Counter[str]
    kept: Counter[str]


def _shares(ground: Ground, found: Allocation) -> Mapping[str, Sequence[_Share]]:
    """By deployment; looked through once, however many replicas there are."""
    nodes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    kept: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for each in found.replicas:
        key, node = (each.deployment, each.option), ground.parts[each.node].node
        nodes[key][node] += 1
        kept[key][node] += each.kept
    shares: dict[str, list[_Share]] = defaultdict(list)
    for share in found.variants:
        key = share.deployment, share.option
        shares[share.deployment].append(_Share(share, nodes[key], kept[key]))
    return shares


def _deployment(wanted: Wanted, found: Allocation, shares: Sequence[_Share], *, running: int, kept: int) -> Answer:
    name = wanted.deployment.name
    options = {each.name: each for each in wanted.options.options}
    variants = [_variant(wanted, each, options[each.share.option]) for each in shares]
    priorities = {each.name: each.priority for each in wanted.deployment.spec.classes}
    classes = [each for each in found.classes if each.deployment == name]
    unmet = next((each for each in found.unmet if each.deployment == name), None)
    return {
        "name": name,
        "grounds": _grounds(wanted),
        "demand_rps": sum(each.demand_rps for each in classes),
        "carried_rps": sum(each.carried_rps for each in classes),
        "cost_per_hour": sum(
            each.share.replicas * options[each.share.option].settings.cost_per_hour for each in shares
        ),
        "running_replicas": running,
        "stopped_replicas": running - kept,
        "classes": [
            {
                "name": each.request_class, "priority": priorities.get(each.request_class, 0),
                "demand_rps": each.demand_rps, "carried_rps": each.carried_rps,
            }
            for each in classes
        ],
        "variants": variants,
        **({"unmet": _unmet(unmet)} if unmet is not None else {}),
    }  # fmt: skip


def _grounds(wanted: Wanted) -> str:
    words = grounds_of(wanted.observed).removeprefix("advised for the ").removeprefix("advised for an ")
    if wanted.observed is None:
        words = f"no traffic was counted; lengths as of an {words}"
    if not wanted.options.within_objectives:
        words += "; no configuration meets the objectives, so they are left out"
    return words


def _variant(wanted: Wanted, placed: _Share, option: Option) -> Answer:
    share = placed.share
    facts = wanted.options.facts[share.option]
    rate = facts.capacity_rps
    return {
        "gpu_type": facts.gpu_type,
        "layout": facts.layout,
        "configuration": _configuration(wanted, share, facts.configuration),
        "replicas": share.replicas,
        "weight": share.weight,
        "capacity_rps": {"value": rate.value, "low": rate.low, "high": rate.high},
        "cost_per_hour": share.replicas * option.settings.cost_per_hour,
        "nodes": [
            {"node": node, "replicas": count, "kept": placed.kept[node]}
            for node, count in sorted(placed.nodes.items())
        ],
        "runs_now": share.option == RUNNING,
    }


def _configuration(wanted: Wanted, share: VariantShare, advised: Mapping[str, object]) -> Mapping[str, object]:
    """The flags of a variant: what runs, or what a user gave, as it is."""
    if share.option == RUNNING or wanted.deployment.spec.configuration:
        return wanted.deployment.configuration
    return advised


def _unmet(unmet: Unmet) -> Answer:
    return {
        "requests_per_s": unmet.requests_per_s,
        "headroom_rps": unmet.headroom_rps,
        "replicas": unmet.replicas,
        "obstacle": unmet.obstacle.value,
        "reason": unmet.reason,
    }
