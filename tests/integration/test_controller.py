"""The controller on a real store: guarded changes, scaling, and failures that end a step and not the loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from enova_common.errors import Conflict, NotFound, TimedOut, Unavailable
from enova_coordinator.controller import Controller, ControllerSettings
from enova_coordinator.core.liveness import LivenessLimits
from enova_coordinator.core.model import (
    Assignment,
    Decision,
    DecisionAction,
    Deployment,
    DeploymentSpec,
    DeploymentState,
    Gpu,
    Node,
    NodeObservation,
    NodeReport,
    ReplicaReport,
    ReplicaState,
    RequestRecord,
    Stored,
    Variant,
)
from enova_coordinator.core.routes import RouteTable
from enova_coordinator.election import LEADER_KEY, Election, Leadership
from enova_coordinator.events import EventLog
from enova_coordinator.snapshot import Mirror
from enova_coordinator.store import (
    OUTCOME_UNKNOWN,
    Compare,
    Delete,
    ModRevisionIs,
    Operation,
    Put,
    Store,
    TransactionResult,
    codec,
)
from enova_coordinator.store.etcd import EtcdSettings, EtcdStore
from enova_coordinator.store.sqlite import SqliteStore
from enova_testing.etcd_server import EtcdServer
from enova_testing.waiting import until_async

GIB = 1 << 30
ON_BOTH = pytest.mark.parametrize(
    "real_store",
    ["sqlite", pytest.param("etcd", marks=[pytest.mark.etcd, pytest.mark.network])],
    indirect=True,
)
SETTINGS = ControllerSettings(interval_s=0.1, pause_s=0.001, liveness=LivenessLimits(takeover_grace_s=0.0))


class ObedientFleet:
    """Agents that do at once what they are told, and say so."""

    def __init__(self) -> None:
        self.reports: dict[str, NodeReport] = {}
        self.tables: list[RouteTable] = []
        self.ingress_obeys = True
        self.defect: Exception | None = None
        self.wake: Callable[[], None] = lambda: None

    def connect(self, node: Node) -> None:
        self.reports[node.name] = NodeReport(ingress_connected=True, gpus=node.gpus)

    def observations(self) -> Mapping[str, NodeObservation]:
        now_s = asyncio.get_running_loop().time()
        return {
            name: NodeObservation(node=name, connected=True, last_heard_s=now_s, report=report)
            for name, report in self.reports.items()
        }

    def assign(self, node: str, assignment: Assignment) -> None:
        replicas = tuple(
            ReplicaReport(
                replica=member.replica, uid=member.uid, ready_time_s=1.0,
                state=ReplicaState.READY if member.desired == "RUN" else ReplicaState.STOPPED,
            )
            for member in assignment.members
        )
        self.reports[node] = replace(
            self.reports[node], replicas=replicas, assignment_revision=assignment.revision
        )
        self.wake()

    def route(self, table: RouteTable) -> None:
        if self.defect is not None:
            defect, self.defect = self.defect, None
            raise defect
        self.tables.append(table)
        if self.ingress_obeys:
            self.serve_newest_routes()

    def serve_newest_routes(self) -> None:
        revision = self.tables[-1].revision
        self.reports = {name: replace(report, routes_revision=revision) for name, report in self.reports.items()}
        self.wake()


class FaultyStore:
    """A store whose next transaction on a key fails in a given way, before it is carried out."""

    def __init__(self, store: Store) -> None:
        self.fail_on = ""
        self.failure: Exception | None = None
        self._store = store
        self.get, self.range, self.watch = store.get, store.range, store.watch
        self.lease, self.compact, self.close = store.lease, store.compact, store.close

    async def transact(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TransactionResult:
        if self.failure is not None and any(self.fail_on in operation.key for operation in operations):
            failure, self.failure = self.failure, None
            raise failure
        return await self._store.transact(compares, operations)


@dataclass
class Coordinator:
    """A controller that leads, with what it stands on."""

    store: FaultyStore
    fleet: ObedientFleet
    controller: Controller
    leaderships: list[Leadership] = field(default_factory=list)

    async def put(self, value: Stored) -> None:
        key, written = codec.key(value.name), False
        while not written:         # the controller writes at the same time
            entry = await self.store.get(key)
            revision = entry.mod_revision if entry is not None else 0
            result = await self.store.transact([ModRevisionIs(key, revision)], [Put(key, codec.encode(value))])
            written = result.succeeded

    async def deployment(self, name: str = "chat") -> Deployment:
        key = codec.key(f"deployments/{name}")
        entry = await self.store.get(key)
        assert entry is not None
        return codec.decode_as(Deployment, entry.value)

    async def ready(self, replicas: int, name: str = "chat") -> None:
        async def is_ready() -> bool:
            status = (await self.deployment(name)).status
            return status.state is DeploymentState.READY and status.ready_replicas == replicas

        await until_async(is_ready)

    async def deploy(self, spec: DeploymentSpec, name: str = "chat") -> None:
        await self.put(Deployment(name=f"deployments/{name}", uid=f"uid-{name}", spec=spec))

    async def stored(self, prefix: str = codec.PREFIX) -> list[str]:
        entries, _ = await self.store.range(prefix)
        return [entry.key.removeprefix(codec.PREFIX) for entry in entries]

    def reasons(self) -> list[str]:
        return [event.reason for event in self.controller.events.list()]


def decision(actor: str = "policy/p") -> Decision:
    return Decision(
        name="", deployment="deployments/chat", action=DecisionAction.SCALE_UP, actor=actor, reason="load",
    )


@pytest.fixture
async def real_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if getattr(request, "param", "sqlite") == "sqlite":
        store: Store = await SqliteStore.open(":memory:")
        yield store
        await store.close()
        return
    server = EtcdServer(tmp_path)
    server.start()
    store = await EtcdStore.open(EtcdSettings(endpoints=(server.endpoint,)))
    yield store
    await store.close()
    server.kill()


@pytest.fixture
async def coordinator(real_store: Store) -> AsyncIterator[Coordinator]:
    store = FaultyStore(real_store)
    fleet = ObedientFleet()
    loop = asyncio.get_running_loop()
    mirror = Mirror(store)
    controller = Controller(store, mirror, fleet, EventLog(), settings=SETTINGS, monotonic_s=loop.time)
    mirror.changed = fleet.wake = controller.wake
    made = Coordinator(store, fleet, controller)
    node = Node(
        name="nodes/n", uid="n", hop_address="n:1",
        gpus=tuple(
            Gpu(uuid=f"g{index}", index=index, type="H100", memory_bytes=80 * GIB, free_memory_bytes=80 * GIB)
            for index in range(4)
        ),
    )
    fleet.connect(node)
    await made.put(node)
    election = Election(store, coordinator_id="c", api_address="c:1")

    async def lead(leadership: Leadership) -> None:
        made.leaderships.append(leadership)
        await controller.run(leadership)

    tasks = [asyncio.create_task(mirror.run()), asyncio.create_task(election.run(lead))]
    await until_async(lambda: controller.rounds)
    yield made
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@ON_BOTH
async def test_a_deployment_becomes_ready_and_routed_and_leaves_nothing_when_deleted(coordinator: Coordinator) -> None:
    await coordinator.deploy(DeploymentSpec(model="m", replicas=2))
    await coordinator.ready(2)
    await until_async(lambda: len(coordinator.fleet.tables[-1].routes["chat"].targets) == 2)
    assert {"ReplicaPlaced", "ReplicaReady", "DeploymentReady"} <= set(coordinator.reasons())
    await coordinator.put(replace(await coordinator.deployment(), delete_time_s=1.0))

    async def gone() -> bool:
        return not [key for key in await coordinator.stored() if "chat" in key]

    await until_async(gone)
    await until_async(lambda: "chat" not in coordinator.fleet.tables[-1].routes)


@ON_BOTH
async def test_a_decision_and_its_target_are_written_at_one_revision(coordinator: Coordinator) -> None:
    await coordinator.deploy(DeploymentSpec(model="m", min=1, max=4))
    await coordinator.ready(1)
    await coordinator.controller.set_target("deployments/chat", 3, decision())
    await coordinator.ready(3)
    ((entry,), _) = await coordinator.store.range(codec.prefix("decisions", "deployments/chat"))
    made = codec.decode_as(Decision, entry.value)
    assert (made.from_replicas, made.to_replicas, made.actor) == (1, 3, "policy/p")
    assert made.term == coordinator.leaderships[0].term
    assert made.name == codec.name(entry.key)
    async with contextlib.aclosing(coordinator.store.watch(codec.PREFIX, after=entry.mod_revision - 1)) as batches:
        batch = await anext(batches)
    keys = {event.key for event in batch.events}
    assert {codec.key("deployments/chat"), codec.key("deployments/chat/variants/v1"), entry.key} <= keys


async def test_a_decision_and_the_request_that_asked_for_it_are_written_at_one_revision(
    coordinator: Coordinator,
) -> None:
    await coordinator.deploy(DeploymentSpec(model="m", replicas=1))
    await coordinator.ready(1)
    record = RequestRecord(
        name="requests/r", method="ScaleDeployment", object="deployments/chat", fingerprint="f", create_time_s=1.0
    )
    await coordinator.controller.set_target("deployments/chat", 2, decision("user/ada"), request=record)
    (written,), _ = await coordinator.store.range(codec.prefix("decisions"))
    kept = await coordinator.store.get(codec.key(record.name))
    assert kept is not None
    assert kept.mod_revision == written.mod_revision


async def test_scaling_a_fixed_deployment_changes_its_spec(coordinator: Coordinator) -> None:
    await coordinator.deploy(DeploymentSpec(model="m", replicas=1))
    await coordinator.ready(1)
    await coordinator.controller.set_target("deployments/chat", 2, decision("user/ada"))
    await coordinator.ready(2)
    scaled = await coordinator.deployment()
    assert (scaled.spec.replicas, scaled.generation, scaled.status.observed_generation) == (2, 2, 2)


async def test_a_target_outside_the_bounds_is_held_and_the_decision_says_what_was_set(coordinator: Coordinator) -> None:
    await coordinator.deploy(DeploymentSpec(model="m", min=1, max=2))
    await coordinator.ready(1)
    await coordinator.controller.set_target("deployments/chat", 9, decision())
    await coordinator.ready(2)
    ((entry,), _) = await coordinator.store.range(codec.prefix("decisions"))
    assert codec.decode_as(Decision, entry.value).to_replicas == 2


async def test_two_targets_at_once_are_both_written_one_after_the_other(coordinator: Coordinator) -> None:
    await coordinator.deploy(DeploymentSpec(model="m", min=1, max=4))
    await coordinator.ready(1)
    await asyncio.gather(
        *(coordinator.controller.set_target("deployments/chat", number, decision()) for number in (2, 3, 4))
    )
    entries, _ = await coordinator.store.range(codec.prefix("decisions"))
    made = [codec.decode_as(Decision, entry.value) for entry in sorted(entries, key=lambda entry: entry.mod_revision)]
    assert len(made) == 3
    assert [each.from_replicas for each in made[1:]] == [each.to_replicas for each in made[:-1]]


async def test_no_target_is_set_for_what_is_not_there_or_on_its_way_out(coordinator: Coordinator) -> None:
    with pytest.raises(NotFound):
        await coordinator.controller.set_target("deployments/none", 1, decision())
    await coordinator.deploy(DeploymentSpec(model="m", replicas=1))
    await coordinator.ready(1)
    coordinator.fleet.reports.clear()  # nobody ends the replica
    await coordinator.put(replace(await coordinator.deployment(), delete_time_s=1.0))
    with pytest.raises(Conflict):
        await coordinator.controller.set_target("deployments/chat", 2, decision())


async def test_a_decision_to_hold_is_written_and_changes_nothing(coordinator: Coordinator) -> None:
    held = await coordinator.controller.record_decision(replace(decision(), action=DecisionAction.HOLD))
    assert await coordinator.stored(codec.prefix("decisions")) == [codec.key(held.name).removeprefix(codec.PREFIX)]


async def test_a_leader_whose_key_is_another_changes_nothing(coordinator: Coordinator) -> None:
    controller, leadership = coordinator.controller, coordinator.leaderships[0]
    ours = await coordinator.store.get(LEADER_KEY)
    assert ours is not None
    usurped = await coordinator.store.transact([ModRevisionIs(LEADER_KEY, ours.mod_revision)], [Delete(LEADER_KEY)])
    # As after a pause: it still believes, and what it writes is refused.
    stale = Controller(
        coordinator.store, controller._mirror, ObedientFleet(), EventLog(), settings=SETTINGS,
    )
    stale._leadership = Leadership(LEADER_KEY, leadership.term, leadership.lease, 1e12, lambda: 0.0)
    before = await coordinator.stored(codec.prefix("decisions"))
    with pytest.raises(Conflict):
        await stale.record_decision(decision())
    assert usurped.succeeded
    assert await coordinator.stored(codec.prefix("decisions")) == before


async def test_who_does_not_lead_sets_no_target(coordinator: Coordinator) -> None:
    coordinator.leaderships[0].end("a test")
    with pytest.raises(Unavailable) as caught:
        await coordinator.controller.set_target("deployments/chat", 1, decision())
    assert caught.value.reason == "NOT_LEADER"


@ON_BOTH
async def test_a_write_of_unknown_outcome_ends_the_term_and_the_next_one_goes_on(coordinator: Coordinator) -> None:
    coordinator.store.fail_on = "replicas/chat/"
    coordinator.store.failure = TimedOut("no answer", reason=OUTCOME_UNKNOWN)
    await coordinator.deploy(DeploymentSpec(model="m", replicas=1))
    await coordinator.ready(1)
    first, second = coordinator.leaderships
    assert "outcome of a write is unknown" in first.reason
    assert second.term > first.term


async def test_a_target_of_unknown_outcome_ends_the_term_as_well(coordinator: Coordinator) -> None:
    await coordinator.deploy(DeploymentSpec(model="m", replicas=1))
    await coordinator.ready(1)
    coordinator.store.fail_on = "decisions/"
    coordinator.store.failure = TimedOut("no answer", reason=OUTCOME_UNKNOWN)
    with pytest.raises(TimedOut):
        await coordinator.controller.set_target("deployments/chat", 2, decision())
    assert "outcome of a write is unknown" in coordinator.leaderships[0].reason


async def test_a_change_that_the_store_refuses_does_not_keep_others_from_theirs(coordinator: Coordinator) -> None:
    coordinator.store.fail_on = "replicas/a/"
    coordinator.store.failure = Conflict("not today")
    await coordinator.deploy(DeploymentSpec(model="m", replicas=1), "a")
    await coordinator.deploy(DeploymentSpec(model="m", replicas=1), "b")
    await coordinator.ready(1, "b")
    await coordinator.ready(1, "a")
    assert len(coordinator.leaderships) == 1
    events = coordinator.controller.events.list("deployments/a")
    assert [event.message for event in events if event.reason == "ChangeFailed"] == ["not today"]


async def test_the_loop_survives_a_store_that_is_away(coordinator: Coordinator) -> None:
    coordinator.store.fail_on = "replicas/chat/"
    coordinator.store.failure = Unavailable("the store is away")
    await coordinator.deploy(DeploymentSpec(model="m", replicas=1))
    await coordinator.ready(1)
    assert "RoundFailed" in coordinator.reasons()
    assert coordinator.controller.last_error == ""


async def test_a_value_that_cannot_be_read_is_left_alone_and_blinds_nobody(coordinator: Coordinator) -> None:
    key = codec.key("deployments/broken")
    data = json.dumps({"kind": "Deployment", "version": 99}).encode()
    await coordinator.store.transact([ModRevisionIs(key, 0)], [Put(key, data)])
    await coordinator.deploy(DeploymentSpec(model="m", replicas=1))
    await coordinator.ready(1)
    entry = await coordinator.store.get(key)
    assert entry is not None
    assert entry.value == data
    assert "version 99" in coordinator.controller._mirror.unreadable["deployments/broken"]


async def test_a_user_s_change_between_look_and_write_wins(coordinator: Coordinator) -> None:
    await coordinator.deploy(DeploymentSpec(model="m", min=1, max=4))
    await coordinator.ready(1)
    for number in range(20):
        before = await coordinator.deployment()
        changed = replace(before, generation=before.generation + 1, spec=replace(before.spec, priority=number))
        await coordinator.put(changed)
    await coordinator.ready(1)
    assert (await coordinator.deployment()).spec.priority == 19
    variants, _ = await coordinator.store.range(codec.prefix("variants"))
    assert [codec.decode_as(Variant, entry.value).retired for entry in variants] == [False]


async def test_the_old_replica_drains_only_once_the_ingress_serves_the_new_one(coordinator: Coordinator) -> None:
    await coordinator.deploy(DeploymentSpec(model="m", replicas=1))
    await coordinator.ready(1)
    coordinator.fleet.ingress_obeys = False
    before = await coordinator.deployment()
    await coordinator.put(replace(before, generation=2, spec=replace(before.spec, model="n")))
    await until_async(lambda: len(coordinator.fleet.tables[-1].routes["chat"].targets) == 2)
    rounds = coordinator.controller.rounds
    await until_async(lambda: coordinator.controller.rounds > rounds + 5)
    assert "ReplicaDraining" not in coordinator.reasons()
    coordinator.fleet.serve_newest_routes()
    await until_async(lambda: "ReplicaRemoved" in coordinator.reasons())
    (target,) = coordinator.fleet.tables[-1].routes["chat"].targets
    assert target.replica == "deployments/chat/replicas/v2-0"


async def test_a_defect_costs_a_round_and_not_the_term(coordinator: Coordinator) -> None:
    coordinator.fleet.defect = KeyError("a defect")
    await coordinator.deploy(DeploymentSpec(model="m", replicas=1))
    await coordinator.ready(1)
    await until_async(lambda: coordinator.fleet.tables[-1].routes["chat"].targets)
    assert len(coordinator.leaderships) == 1
    assert any("internal error: KeyError" in event.message for event in coordinator.controller.events.list())
