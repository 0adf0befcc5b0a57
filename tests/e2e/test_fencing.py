"""A leader that is stopped between decision and effect has no effect: two coordinators, real etcd, agents, engines.

The witnesses stand outside: etcd's own history, the agents' files, engines in /proc. 50 trials, replayed by the seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from enova.v1 import agent_service_pb2
from enova_common.errors import EnovaError
from enova_testing.coordinator_calls import apply, events_refused, scale
from enova_testing.coordinator_pair import PairFleet, PairSettings, running_pair
from enova_testing.etcd_observer import STATE_PREFIX, Leader
from enova_testing.etcd_server import EtcdServer, installed_versions
from enova_testing.scripted_coordinator import ScriptedCoordinator
from enova_testing.stoppable_coordinator import UNGUARDED_VARIABLE
from enova_testing.waiting import until_async

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.etcd]

TRIALS = 50
PAIRS = 3  # fleets whose trials run side by side: most of a trial is waiting for a lease to end
TTL_S = 2
CALL_EVERY_S = 0.35
PATIENCE_S = 30.0
SUBJECTS = ("", "", "/deployments/", "/decisions/", "/replicas/", "/assignments/", "/variants/")
CLEAR = {"NOT_LEADER", "CONTENDED", "STORE_OUTCOME_UNKNOWN"}  # each says that it was not done, or whom to ask


@dataclass(frozen=True, slots=True)
class Trial:
    """Where the leader is stopped, and when it goes on."""

    number: int
    point: str  # "write": decided, checked, not yet sent to etcd; "send": so with an agent; "anywhere": at any instant
    subject: str
    skip: int
    delay_s: float
    patient: bool  # whether it stays stopped until the agents obey the other

    @classmethod
    def draw(cls, number: int, draw: random.Random) -> Trial:
        point = ("write", "send", "write", "anywhere")[number % 4]
        subject = {"write": draw.choice(SUBJECTS), "send": draw.choice(("assignment", ""))}.get(point, "")
        return cls(number, point, subject, draw.randrange(2), draw.uniform(0.0, 0.6), draw.random() < 0.5)


@dataclass(slots=True)
class User:
    """Somebody who never stops changing things; asks whoever leads, and only that one."""

    fleet: PairFleet
    answers: list[EnovaError | None] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """Calls all the time until the block ends; then all of them have been answered."""
        calling = asyncio.create_task(self._call_always())
        try:
            yield
        finally:
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)
            await asyncio.gather(*self._tasks)

    async def _call_always(self) -> None:
        for number in range(1 << 30):
            if (leader := self.fleet.etcd.leader) is not None:
                task = asyncio.create_task(self._call(leader.name, number))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(CALL_EVERY_S)

    async def _call(self, name: str, number: int) -> None:
        if number % 4:
            # A change that costs no engine: nothing runs for it.
            call = apply(self.fleet, name, "spare", replicas=0, priority=number % 1000)
        else:
            call = scale(self.fleet, name, "chat", 1 + number // 4 % 2)
        self.answers.append(await call)


@dataclass(slots=True)
class Fleet:
    """A fleet with its user, and how its trials went."""

    pair: PairFleet
    user: User
    again: int = 0

    async def prepare(self) -> None:
        """Deploy, and wait until it serves."""
        obeyed = self.pair.host.terms["node-0"]
        await until_async(lambda: obeyed, timeout_s=PATIENCE_S, what="the agent's first term")
        await until_async(self._applied, timeout_s=PATIENCE_S, what="the first deployment")
        await until_async(lambda: len(self.pair.host.living) == 1, timeout_s=PATIENCE_S, what="the first engine")

    async def _applied(self) -> bool:
        return await apply(self.pair, self.pair.leader().name, "chat", replicas=1) is None

    async def run(self, trial: Trial) -> None:
        """Stop the leader, wait for the other to lead, let the old one go on: nothing of it may be seen any more."""
        pair = self.pair
        leader = await self._settled()
        if not await self._stop(leader, trial):
            self.again += 1
            await self.run(trial)  # it lost its lease to a busy machine before it came to the point
            return
        other = "b" if leader.name == "a" else "a"
        await until_async(lambda: _leads(pair, other), timeout_s=PATIENCE_S, what=f"{other} leads in {trial}")
        term = pair.leader().term
        assert term > leader.term
        if trial.patient:
            obeys = pair.host.terms["node-0"]
            await until_async(lambda: obeys[-1] == term, timeout_s=PATIENCE_S, what=f"term {term} is obeyed")
        pair.coordinators[leader.name].send(signal.SIGCONT)
        await self._demoted(leader, trial)

    async def _settled(self) -> Leader:
        """The leader, once the agent obeys it."""
        obeys = self.pair.host.terms["node-0"]
        await until_async(
            lambda: (leader := self.pair.etcd.leader) is not None and obeys[-1] == leader.term,
            timeout_s=PATIENCE_S,
            what="the agent obeys the leader",
        )
        return self.pair.leader()

    async def _stop(self, leader: Leader, trial: Trial) -> bool:
        program = self.pair.coordinators[leader.name]
        await asyncio.sleep(trial.delay_s)  # so that it meets leases, keepalives and rounds at any age
        if trial.point == "anywhere":
            program.send(signal.SIGSTOP)
        else:
            self.pair.order(
                leader.name, trial=trial.number, point=trial.point, subject=trial.subject, skip=trial.skip
            )
        await until_async(
            lambda: program.stopped or self.pair.etcd.leader != leader,
            timeout_s=PATIENCE_S,
            what=f"{leader.name} comes to a stop in {trial}",
        )
        self.pair.withdraw(leader.name)
        return program.stopped

    async def _demoted(self, leader: Leader, trial: Trial) -> None:
        """The old leader says itself that it leads no longer, and what it was about to write was refused."""
        if trial.point == "write":
            await until_async(lambda: self.pair.reports(leader.name, event="wrote", trial=trial.number))
            (report,) = self.pair.reports(leader.name, event="wrote", trial=trial.number)
            assert report["succeeded"] is False, report  # refused, or given up with the term that it belonged to
        refusal = await until_async(lambda: events_refused(self.pair, leader.name), what="it knows that it is none")
        assert isinstance(refusal, EnovaError)
        assert refusal.reason == "NOT_LEADER"


def _leads(pair: PairFleet, name: str) -> bool:
    leader = pair.etcd.leader
    return leader is not None and leader.name == name


@pytest.fixture
def fleets(tmp_path: Path) -> Iterator[list[Fleet]]:
    """PAIRS fleets, each on an etcd of its own, of the installed versions in turn."""
    versions = installed_versions()
    with ExitStack() as stack:
        made: list[Fleet] = []
        for index in range(PAIRS):
            server = EtcdServer(tmp_path / f"etcd-{index}", versions[index % len(versions)])
            server.start()
            stack.callback(server.kill)
            wanted = PairSettings(etcd=[server.endpoint] * 2, observed=server.endpoint, ttl_s=TTL_S, stoppable=True)
            pair = stack.enter_context(running_pair(tmp_path / f"pair-{index}", wanted))
            made.append(Fleet(pair, User(pair)))
        yield made


@pytest.mark.timeout(400)
async def test_a_stopped_leader_changes_nothing_in_fifty_trials(fleets: list[Fleet], seed: int) -> None:
    draw = random.Random(seed)
    trials = [Trial.draw(number, draw) for number in range(TRIALS)]
    async with asyncio.TaskGroup() as group:
        for index, fleet in enumerate(fleets):
            group.create_task(run_trials(fleet, trials[index::PAIRS]))
    for fleet in fleets:
        assert_nothing_stale(fleet)
        await assert_converges(fleet)
    stops = [report for fleet in fleets for name in "ab" for report in fleet.pair.reports(name, event="stopping")]
    assert sum(report["point"] == "write" for report in stops) >= TRIALS // 2
    assert {report["point"] for report in stops} == {"write", "send"}
    sys.stderr.write(f"{len(stops)} exact stops, again {[fleet.again for fleet in fleets]}\n")


async def run_trials(fleet: Fleet, trials: list[Trial]) -> None:
    await fleet.prepare()
    async with fleet.user.busy():
        for trial in trials:
            await fleet.run(trial)


def assert_nothing_stale(fleet: Fleet) -> None:
    """What etcd, the agent's disk and /proc tell of all that happened."""
    etcd, host = fleet.pair.etcd, fleet.pair.host
    assert etcd.stale() == []
    assert sum(bool(write.keys) for write in etcd.writes) > TRIALS  # it looked at something
    terms, obeyed = host.terms["node-0"], host.assignments["node-0"]
    assert terms == sorted(terms)
    assert set(terms) <= {leader.term for leader in etcd.leaders if leader is not None}
    order = [(assignment["term"], assignment["revision"]) for assignment in obeyed]
    assert order == sorted(order)
    # What the agent obeyed is what somebody wrote while leading.
    assigned = etcd.history(f"{STATE_PREFIX}assignments/node-0")
    assert {assignment["revision"] for assignment in obeyed} <= {value["revision"] for value in assigned} | {0}
    assert host.overlaps == []
    assert_engines_follow(fleet, assigned)
    unclear = [error for error in fleet.user.answers if error is not None and error.reason not in CLEAR]
    assert unclear == []
    assert sum(error is None for error in fleet.user.answers) > TRIALS // PAIRS


def assert_engines_follow(fleet: Fleet, assigned: list[dict[str, Any]]) -> None:
    """Each engine was started once, for a replica that was assigned, and ended only if that was taken back."""
    host = fleet.pair.host
    run = [{each["replica"] for each in value["members"] if each["desired"] == "RUN"} for value in assigned]
    engines = list(host.engines.values())
    assert len({engine.replica for engine in engines}) == len(engines)
    assert len(engines) > 1
    living = {engine.replica for engine in host.living.values()}
    for engine in engines:
        first = next((index for index, replicas in enumerate(run) if engine.replica in replicas), None)
        assert first is not None, f"{engine} was never assigned"
        if engine.replica not in living:
            assert any(engine.replica not in replicas for replicas in run[first:]), f"{engine} ended unasked"


async def assert_converges(fleet: Fleet) -> None:
    """After all that the newest leader has its way."""
    pair = fleet.pair
    assert await scale(pair, pair.leader().name, "chat", 3) is None
    await until_async(lambda: len(pair.host.living) == 3, timeout_s=PATIENCE_S, what="three engines")


@pytest.mark.parametrize("guarded", [True, False])
async def test_only_the_guard_keeps_a_stale_write_out(tmp_path: Path, guarded: bool) -> None:
    """The same stop, with and without the compare of the leader's key: without, the write lands and is seen."""
    server = EtcdServer(tmp_path / "etcd")
    server.start()
    environment = {} if guarded else {UNGUARDED_VARIABLE: "1"}
    wanted = PairSettings(
        etcd=[server.endpoint] * 2,
        observed=server.endpoint,
        ttl_s=TTL_S,
        nodes=0,
        stoppable=True,
        environment=environment,
    )
    key = f"{STATE_PREFIX}deployments/ghost"
    try:
        with running_pair(tmp_path / "pair", wanted) as pair:
            old = pair.leader()
            other = "b" if old.name == "a" else "a"
            pair.order(old.name, trial=0, point="write", subject=key)
            asked = asyncio.create_task(apply(pair, old.name, "ghost", replicas=0))
            program = pair.coordinators[old.name]
            await until_async(lambda: program.stopped, timeout_s=PATIENCE_S)
            await until_async(lambda: _leads(pair, other), timeout_s=PATIENCE_S)
            program.send(signal.SIGCONT)
            error = await asked
            await until_async(lambda: refers(pair, old.name, other), what="it refers to the other")
            assert await apply(pair, other, "marker", replicas=0) is None
            marker = f"{STATE_PREFIX}deployments/marker"
            await until_async(lambda: pair.etcd.history(marker), what="the observer has seen all")
            if guarded:
                assert error is not None
                assert error.reason == "NOT_LEADER"
                assert error.remedy
                assert pair.etcd.history(key) == []
                assert pair.etcd.stale() == []
            else:
                assert pair.etcd.history(key)
                (stale,) = [write for write in pair.etcd.stale() if key in write.values]
                assert stale.signed_term == old.term < stale.term_then
    finally:
        server.kill()


async def refers(pair: PairFleet, name: str, other: str) -> bool:
    """Whether one coordinator says that the other leads: it learns that a moment after it has ceased to lead."""
    refusal = await events_refused(pair, name)
    return refusal is not None and refusal.metadata.get("leader_address") == pair.addresses[other]


async def test_an_agent_refuses_a_term_that_is_over(tmp_path: Path) -> None:
    """The agent's own fence: who speaks in an older term than it obeyed changes no engine and no file."""
    server = EtcdServer(tmp_path / "etcd")
    server.start()
    try:
        wanted = PairSettings(etcd=[server.endpoint] * 2, observed=server.endpoint, ttl_s=TTL_S, stoppable=True)
        with running_pair(tmp_path / "pair", wanted) as pair:
            await Fleet(pair, User(pair)).prepare()
            await until_async(lambda: len(pair.host.living) == 1, timeout_s=PATIENCE_S)
            for program in pair.coordinators.values():
                program.kill()
            engines, term = dict(pair.host.living), pair.host.terms["node-0"][-1]
            impostor = ScriptedCoordinator(term=term - 1, name="impostor")
            await impostor.start(pair.addresses["a"])
            try:
                # The Welcome already bears the old term: three connections are given up on it.
                await until_async(lambda: len(impostor.streams) >= 3, timeout_s=PATIENCE_S)
                assert pair.host.terms["node-0"][-1] == term
                assert pair.host.living == engines
                impostor.term = term + 1
                connected = len(impostor.streams)
                await until_async(lambda: len(impostor.streams) > connected, timeout_s=PATIENCE_S)
                await until_async(lambda: impostor.stream.status is not None, timeout_s=PATIENCE_S)
                nothing = agent_service_pb2.Assignment(revision=1 << 40)
                # In an older term it is not even looked at; in the newest the same words end the engine.
                impostor.send(agent_service_pb2.ConnectResponse(term=term, assignment=nothing))
                await until_async(lambda: impostor.streams[connected].ended, timeout_s=PATIENCE_S)
                assert pair.host.living == engines
                await until_async(lambda: len(impostor.streams) > connected + 1, timeout_s=PATIENCE_S)
                await until_async(lambda: impostor.stream.status is not None, timeout_s=PATIENCE_S)
                impostor.send(agent_service_pb2.ConnectResponse(assignment=nothing))
                await until_async(lambda: not pair.host.living, timeout_s=PATIENCE_S, what="the engine ends")
                assert pair.host.terms["node-0"][-1] == term + 1
            finally:
                await impostor.stop()
    finally:
        server.kill()
