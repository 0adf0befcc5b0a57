"""A whole fleet in virtual time: requests come, engines compute, replicas start and leave, policies decide.

Theory of operation. Three sources of events are merged by time: arrivals (sorted), what engines finish (the compiled
kernel says when each next changes visibly), and a heap of everything rare: samples, policy calls, replicas that become
READY, faults. Nothing is read from a clock and every draw comes from the seed: the same setup gives the same bytes.

The router, the gates and the rule that turns targets into replicas are those of production; so are policies. Not so
placement (see `crew`), the detector (`signals.Told` unless another is given), and the time that the control plane
takes (`setup.Paces`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from functools import partial

import numpy as np

from enova_recommender.scaling.situation import Memory, Wish
from enova_simulator.cluster.acts import Acts, wished
from enova_simulator.cluster.crew import Member, Pools, Roll, Stage
from enova_simulator.cluster.engines import Engines, Kind
from enova_simulator.cluster.outcome import Record, record_of
from enova_simulator.cluster.serving import Desk, Draws, Fate
from enova_simulator.cluster.setup import (
    DeploymentSetup,
    Fault,
    FleetSetup,
    Ill,
    SetupError,
    Traffic,
    VariantSetup,
    pool_of,
)
from enova_simulator.cluster.signals import Detector, Told, Watch

LOST_SHARE_S = 120.0               # for which a lost node counts in the share of the fleet that was lost
_SAMPLE, _OTHER, _POLICY = range(3)        # of what is due at the same moment, in this order


class _Deployment:
    """One deployment as it runs."""

    def __init__(self, index: int, setup: DeploymentSetup, watch: Watch, desk: Desk) -> None:
        self.index, self.setup, self.watch, self.desk = index, setup, watch, desk
        self.targets = {variant.name: setup.targets.get(variant.name, 0) for variant in setup.variants}
        self.roll = Roll()
        self.memory: Memory = {}
        self.made = 0
        self.started = 0
        self.last_act_s = -math.inf
        self.remove_first: tuple[str, ...] = ()
        self.acts = Acts()


class Fleet:
    """One run; `detector` says how replicas are."""

    def __init__(self, setup: FleetSetup, traffic: Traffic, *, detector: Detector | None = None) -> None:
        requests = traffic.requests
        if len(requests) and np.any(np.diff(requests.arrival_s) < 0):
            raise SetupError("traffic", "requests are not sorted by arrival")
        self._setup, self._traffic = setup, traffic
        self._detector = detector or Told(setup.paces.detected_s)
        self._pools = Pools(dict(setup.gpus))
        variants = [variant for deployment in setup.deployments for variant in deployment.variants]
        self._kind_of = {id(variant): place for place, variant in enumerate(variants)}
        kinds = [Kind(limits=variant.limits, times=variant.times) for variant in variants]
        self.engines = Engines(kinds, requests, count=_most(setup, variants))
        self._free_engines = list(range(self.engines.count))[::-1]
        self.fates = np.zeros(len(requests), dtype=np.uint8)
        self._kinds = np.full(len(requests), -1, dtype=np.int32)
        self._deployments = [self._deployment(place, each) for place, each in enumerate(setup.deployments)]
        self._desk_of_engine: list[Desk | None] = [None] * self.engines.count
        self._heap: list[tuple[float, int, int, Callable[[float], None]]] = []
        self._order = 0
        self._prompts = requests.prompt_tokens.astype(np.float64)
        self._outputs = requests.output_tokens.astype(np.float64)
        self._lost_gpus: list[tuple[float, int]] = []

    def run(self) -> Record:
        """The whole run."""
        setup = self._setup
        for deployment in self._deployments:
            self._begin(deployment)
        self._at(setup.telemetry.sample_s, self._sample, rank=_SAMPLE)
        for fault in setup.faults:
            self._at(fault.at_s, partial(self._befall, fault))
        arrivals, places = self._traffic.requests.arrival_s.tolist(), self._traffic.deployment.tolist()
        arrivals.append(math.inf)
        following = 0
        while True:
            due_s = self._heap[0][0]
            arrival_s = arrivals[following]
            now_s = min(due_s, arrival_s)
            if now_s > setup.end_s:
                break
            self._pass(now_s)
            if due_s <= arrival_s:
                heapq.heappop(self._heap)[3](now_s)
            else:
                self._arrive(self._deployments[places[following]], following, now_s)
                following += 1
        self._pass(setup.end_s)
        return record_of(
            setup, self._traffic, self.engines, fates=self.fates, kinds=self._kinds,
            rolls=[deployment.roll for deployment in self._deployments],
            acts=[deployment.acts for deployment in self._deployments],
        )  # fmt: skip

    # -- time

    def _at(self, when_s: float, act: Callable[[float], None], *, rank: int = _OTHER) -> None:
        self._order += 1
        heapq.heappush(self._heap, (when_s, rank, self._order, act))

    def _pass(self, until_s: float) -> None:
        """Let the engines compute until then, and act on what finishes."""
        engines = self.engines
        while True:
            if engines.advance(until_s):
                for _, engine, request, at_s in engines.happened():
                    self._finished(engine, request, at_s)
            if not engines.stopped:
                return

    def _finished(self, engine: int, request: int, at_s: float) -> None:
        desk = self._desk_of_engine[engine]
        assert desk is not None
        desk.ended(engine, request, at_s, Fate.SERVED)
        deployment = self._deployments[int(self._traffic.deployment[request])]
        deployment.watch.finished.append(request)
        served = desk.by_engine[engine]
        if served.member.stage is Stage.DRAINING and not served.gate.in_flight:
            self._at(at_s, partial(self._end, deployment, served.member, served.member.starts))

    def _arrive(self, deployment: _Deployment, request: int, now_s: float) -> None:
        requests = self._traffic.requests
        prompt, output = int(requests.prompt_tokens[request]), int(requests.output_tokens[request])
        if not any(self.engines.fits(self._kind_of[id(v)], prompt, output) for v in deployment.setup.variants):
            deployment.desk.arrived += 1
            self.fates[request] = Fate.IMPOSSIBLE
            return
        held = len(deployment.desk.held)
        deployment.desk.arrive(request, now_s)
        if len(deployment.desk.held) > held:
            self._at(now_s + self._setup.paces.held_s, deployment.desk.expire)
            if held == 0 and deployment.setup.policy is not None:
                self._decide(deployment, now_s)

    # -- what is looked at, and what policies want

    def _sample(self, now_s: float) -> None:
        telemetry = self._setup.telemetry
        self.engines.settle(now_s)
        ends = abs(now_s / telemetry.step_s - round(now_s / telemetry.step_s)) < 1e-6
        for deployment in self._deployments:
            ready = deployment.roll.ready()
            deployment.watch.sample(ready)
            if ends:
                deployment.watch.step(ready, self._prompts, self._outputs)
        self._at(round(now_s / telemetry.sample_s + 1) * telemetry.sample_s, self._sample, rank=_SAMPLE)

    def _call(self, deployment: _Deployment, now_s: float) -> None:
        policy = deployment.setup.policy
        assert policy is not None
        self._decide(deployment, now_s)
        self._at(now_s + policy.interval_s, partial(self._call, deployment), rank=_POLICY)

    def _decide(self, deployment: _Deployment, now_s: float) -> None:
        policy = deployment.setup.policy
        assert policy is not None
        situation = deployment.watch.situation(
            deployment.roll.members, now_s=now_s, targets=deployment.targets, detector=self._detector,
            room=self._pools.room, last_act_s=deployment.last_act_s, lost_share=self._lost_share(now_s),
        )  # fmt: skip
        decided = policy.decide(situation, deployment.memory)
        deployment.memory = decided.memory
        self._follow(deployment, decided.wish, now_s)

    def _follow(self, deployment: _Deployment, wish: Wish, now_s: float) -> None:
        targets, problem = wished(wish, deployment.targets, deployment.setup.bounds)
        if problem:
            deployment.acts.refuse(now_s, problem)
            return
        replaced = [
            member for member in deployment.roll.members
            if member.name in wish.replace and member.present and not member.is_old
        ]  # fmt: skip
        for member in replaced:
            member.is_old = True
        if targets == deployment.targets and not replaced:
            return
        if targets != deployment.targets:
            deployment.acts.add(now_s, sum(deployment.targets.values()), sum(targets.values()), wish.reason)
            deployment.last_act_s = now_s
        deployment.targets, deployment.remove_first = targets, wish.remove_first
        self._reconcile(deployment, now_s)

    # -- replicas

    def _deployment(self, index: int, setup: DeploymentSetup) -> _Deployment:
        requests = self._traffic.requests
        desk = Desk(
            draws=Draws(np.random.default_rng([self._setup.seed, index])), paces=self._setup.paces,
            engines=self.engines, fates=self.fates, kinds=self._kinds, prompts=requests.prompt_tokens,
            priorities=requests.priority, queue_limit=setup.queue_limit,
        )  # fmt: skip
        return _Deployment(index, setup, Watch(setup, self._setup.telemetry, self.engines, desk), desk)

    def _begin(self, deployment: _Deployment) -> None:
        """The replicas of the beginning are READY at once."""
        for variant in deployment.setup.variants:
            for _ in range(deployment.targets[variant.name]):
                member = self._make(deployment, variant, 0.0)
                if self._pools.take(variant):
                    member.engine = self._free_engines.pop()
                    member.started_s = 0.0
                    member.move(Stage.STARTING, 0.0)
                    self._ready(deployment, member, 0, 0.0)
                    self._open(deployment, member)
        if deployment.setup.policy is not None:
            self._at(deployment.setup.policy.interval_s, partial(self._call, deployment), rank=_POLICY)

    def _make(self, deployment: _Deployment, variant: VariantSetup, now_s: float) -> Member:
        member = Member(
            name=f"{deployment.setup.name}/{variant.name}-{deployment.made}", deployment=deployment.index,
            variant=variant, kind=self._kind_of[id(variant)], number=deployment.made, created_s=now_s, since_s=now_s,
            slowness=self._slowness(deployment, variant),
        )  # fmt: skip
        deployment.made += 1
        deployment.roll.members.append(member)
        return member

    def _slowness(self, deployment: _Deployment, variant: VariantSetup) -> float:
        """How slow the next replica is, by its number, so that it is so under every policy."""
        draw = np.random.default_rng([self._setup.seed, deployment.index, 3, deployment.made])
        return math.exp(variant.replica_sigma * float(draw.standard_normal()))

    def _reconcile(self, deployment: _Deployment, now_s: float) -> None:
        """Take the steps towards the targets."""
        for variant in deployment.setup.variants:
            change = deployment.roll.change(
                variant, deployment.targets[variant.name], surge=self._setup.paces.surge,
                first=deployment.remove_first,
            )  # fmt: skip
            for member in change.release:
                self._release(deployment, member, now_s)
            for _ in range(change.create):
                self._make(deployment, variant, now_s)
        self._place(now_s)

    def _place(self, now_s: float) -> None:
        """Give GPUs to those that wait for them, by priority, then age."""
        for deployment in sorted(self._deployments, key=lambda each: (each.setup.priority, each.index)):
            for member in deployment.roll.members:
                if member.stage is Stage.PENDING and self._free_engines and self._pools.take(member.variant):
                    member.engine = self._free_engines.pop()
                    member.started_s = now_s
                    self._start(deployment, member, now_s)

    def _start(self, deployment: _Deployment, member: Member, now_s: float, *, after_s: float = 0.0) -> None:
        """Its process starts."""
        member.starts += 1
        member.ill, member.ill_since_s = None, math.inf
        member.move(Stage.STARTING, now_s)
        seconds = after_s + member.variant.start_ups.seconds(deployment.started)
        deployment.started += 1
        if math.isfinite(seconds):
            self._at(now_s + seconds, partial(self._ready, deployment, member, member.starts))

    def _ready(self, deployment: _Deployment, member: Member, starts: int, now_s: float) -> None:
        if member.starts != starts or member.stage is not Stage.STARTING:
            return
        if starts:
            deployment.watch.started(member.variant, now_s - member.since_s)
        member.move(Stage.READY, now_s)
        member.ready_s = now_s if math.isnan(member.ready_s) else member.ready_s
        self.engines.begin(member.engine, member.kind, now_s)
        self.engines.slow(member.engine, member.slowness)
        deployment.watch.ready(member)
        if starts:
            self._at(now_s + self._setup.paces.routed_s, partial(self._routed, deployment, member, starts))

    def _routed(self, deployment: _Deployment, member: Member, starts: int, now_s: float) -> None:
        if member.starts != starts or member.stage is not Stage.READY:
            return
        self._open(deployment, member)
        deployment.desk.release(now_s)
        self._reconcile(deployment, now_s)

    def _open(self, deployment: _Deployment, member: Member) -> None:
        self._desk_of_engine[member.engine] = deployment.desk
        deployment.desk.open(member)

    def _release(self, deployment: _Deployment, member: Member, now_s: float) -> None:
        """Let a replica go: one that serves drains first."""
        served = deployment.desk.by_engine.get(member.engine) if member.stage is Stage.READY else None
        if served is not None and served.gate.in_flight:
            member.move(Stage.DRAINING, now_s)
            deployment.desk.withdraw(member)
            self._at(now_s + self._setup.paces.drain_s, partial(self._end, deployment, member, member.starts))
            return
        self._leave(deployment, member, now_s)

    def _end(self, deployment: _Deployment, member: Member, starts: int, now_s: float) -> None:
        """A draining replica is empty, or has drained for too long."""
        if member.stage is Stage.DRAINING and member.starts == starts:
            self._leave(deployment, member, now_s)

    def _leave(self, deployment: _Deployment, member: Member, now_s: float) -> None:
        """Its process ends and its GPUs are free."""
        holds = member.stage is not Stage.PENDING
        if member.engine in deployment.desk.by_engine:
            deployment.desk.broken(member, now_s)
        deployment.watch.gone(member)
        if holds and member.stage is not Stage.LOST:
            self._pools.give(member.variant)
        if holds:
            self.engines.begin(member.engine, member.kind, now_s)
            self._free_engines.append(member.engine)
        deployment.desk.router.retain(deployment.desk.replicas)
        deployment.roll.leave(member, now_s)
        self._place(now_s)

    # -- what befalls replicas

    def _befall(self, fault: Fault, now_s: float) -> None:
        ready = [(deployment, member) for deployment in self._deployments for member in deployment.roll.ready()]
        well = sorted((pair for pair in ready if pair[1].ill is None), key=lambda pair: pair[1].created_s)
        if not well:
            return
        deployment, member = well[min(len(well) - 1, int(fault.share * len(well)))]
        member.ill, member.ill_since_s = fault.ill, now_s
        match fault.ill:
            case Ill.SLOW:
                self.engines.slow(member.engine, member.slowness * fault.factor)
                self._at(fault.until_s, partial(self._recover, member, member.starts))
            case Ill.HUNG:
                self.engines.settle(now_s)
                self.engines.hang(member.engine)
                restart = partial(self._restart, deployment, member, member.starts)
                self._at(now_s + self._setup.paces.restart_s, restart)
            case Ill.CRASHED:
                self._restart(deployment, member, member.starts, now_s, after_s=self._setup.paces.retry_s)
            case Ill.LOST:
                self._lose(deployment, member, fault, now_s)

    def _recover(self, member: Member, starts: int, now_s: float) -> None:
        del now_s
        if member.starts == starts and member.stage in {Stage.READY, Stage.DRAINING}:
            self.engines.slow(member.engine, member.slowness)
            member.ill, member.ill_since_s = None, math.inf

    def _restart(
        self, deployment: _Deployment, member: Member, starts: int, now_s: float, *, after_s: float = 0.0
    ) -> None:
        """Its agent starts its process again."""
        if member.starts != starts:
            return
        if member.stage is Stage.DRAINING:
            self._leave(deployment, member, now_s)
            return
        if member.stage is not Stage.READY:
            return
        self._break(deployment, member, now_s)
        self._start(deployment, member, now_s, after_s=after_s)

    def _lose(self, deployment: _Deployment, member: Member, fault: Fault, now_s: float) -> None:
        self._break(deployment, member, now_s)
        member.starts += 1
        member.move(Stage.LOST, now_s)
        self._lost_gpus.append((now_s, member.variant.gpus))
        self._at(now_s + self._setup.paces.lost_s, partial(self._write_off, deployment, member))
        if math.isfinite(fault.until_s):
            self._at(fault.until_s, partial(self._return, member.variant))

    def _write_off(self, deployment: _Deployment, member: Member, now_s: float) -> None:
        if member.stage is Stage.LOST:
            self._leave(deployment, member, now_s)
            self._reconcile(deployment, now_s)

    def _return(self, variant: VariantSetup, now_s: float) -> None:
        self._pools.give(variant)
        self._place(now_s)

    def _break(self, deployment: _Deployment, member: Member, now_s: float) -> None:
        """Its process is gone, with what it computed."""
        if member.engine in deployment.desk.by_engine:
            deployment.desk.broken(member, now_s)
        deployment.watch.gone(member)
        self.engines.begin(member.engine, member.kind, now_s)

    def _lost_share(self, now_s: float) -> float:
        lost = sum(gpus for at_s, gpus in self._lost_gpus if now_s - at_s <= LOST_SHARE_S)
        return lost / max(1, sum(self._setup.gpus.values()))


def _most(setup: FleetSetup, variants: list[VariantSetup]) -> int:
    """Replicas that can hold GPUs at once; those of lost nodes may come again elsewhere."""
    smallest: dict[str, int] = {}
    for variant in variants:
        pool = pool_of(variant)
        smallest[pool] = min(smallest.get(pool, variant.gpus), variant.gpus)
    lost = sum(fault.ill is Ill.LOST for fault in setup.faults)
    return max(1, lost + sum(setup.gpus.get(pool, 0) // gpus for pool, gpus in smallest.items()))
