"""Which GPUs a replica gets."""

from __future__ import annotations

from enova_coordinator.core.model import (
    Claim,
    Deployment,
    DeploymentSpec,
    Gpu,
    Hardware,
    Member,
    Node,
    NodeReport,
    NodeState,
    NodeView,
    Replica,
    Snapshot,
    Variant,
)
from enova_coordinator.core.placement import Inventory, Placed, Unplaced, double_claims

GIB = 1 << 30


def view(name: str, types: list[str], *, free_gib: int = 80, **node: object) -> NodeView:
    gpus = tuple(
        Gpu(uuid=f"{name}-{index}", index=index, type=gpu_type, memory_bytes=80 * GIB, free_memory_bytes=free_gib * GIB)
        for index, gpu_type in enumerate(types)
    )
    made = Node(name=f"nodes/{name}", uid=name, gpus=gpus, **node)  # type: ignore[arg-type]
    return NodeView(node=made, state=NodeState.READY, report=NodeReport(gpus=gpus))


def snapshot(*views: NodeView) -> Snapshot:
    return Snapshot(nodes={each.node.name: each for each in views})


def deployment(name: str = "d", **spec: object) -> Deployment:
    return Deployment(name=f"deployments/{name}", uid=name, spec=DeploymentSpec(model="m", **spec))  # type: ignore[arg-type]


def variant(count: int = 1, *, gpu_type: str = "", failed: tuple[str, ...] = (), share: float = 0.9) -> Variant:
    return Variant(
        name="deployments/d/variants/v1", deployment="deployments/d", model="m", served_names=("d",),
        gpu_type=gpu_type, failed_nodes=failed,
        configuration={"tensor_parallel_size": count, "gpu_memory_utilization": share},
    )


def holder(node: str, *uuids: str, of: str = "x", name: str = "r") -> Replica:
    claims = tuple(Claim(gpu_uuid=uuid) for uuid in uuids)
    return Replica(
        name=f"deployments/{of}/replicas/{name}", uid=f"{of}-{name}", deployment=f"deployments/{of}", variant="v",
        members=(Member(node=f"nodes/{node}", claims=claims),),
    )


def chosen(place: Placed | Unplaced) -> tuple[str, list[str]]:
    assert isinstance(place, Placed), place
    (member,) = place.members
    return member.node, [claim.gpu_uuid for claim in member.claims]


def test_a_claim_is_the_share_of_memory_that_the_engine_takes() -> None:
    place = Inventory(snapshot(view("a", ["H100"])), ()).place(deployment(), variant(share=0.5))
    assert isinstance(place, Placed)
    assert place.members[0].claims == (Claim(gpu_uuid="a-0", memory_bytes=40 * GIB),)


def test_a_set_is_taken_from_the_smallest_run_of_neighbours_that_fits() -> None:
    world = snapshot(view("a", ["H100"] * 8))
    place = Inventory(world, [holder("a", "a-5")]).place(deployment(), variant(2))
    assert chosen(place) == ("nodes/a", ["a-6", "a-7"])


def test_a_set_begins_at_a_multiple_of_its_size() -> None:
    world = snapshot(view("a", ["H100"] * 8))
    place = Inventory(world, [holder("a", "a-0")]).place(deployment(), variant(4))
    assert chosen(place) == ("nodes/a", ["a-4", "a-5", "a-6", "a-7"])


def test_without_neighbours_any_free_gpus_do() -> None:
    world = snapshot(view("a", ["H100"] * 4))
    place = Inventory(world, [holder("a", "a-1", "a-3")]).place(deployment(), variant(2))
    assert chosen(place) == ("nodes/a", ["a-0", "a-2"])


def test_the_node_with_fewest_replicas_of_the_deployment_comes_first_then_the_fullest() -> None:
    world = snapshot(view("a", ["H100"] * 4), view("b", ["H100"] * 4), view("c", ["H100"] * 2))
    inventory = Inventory(world, ())
    assert chosen(inventory.place(deployment(), variant()))[0] == "nodes/c"
    inventory.give(holder("c", "c-0", of="d"))
    assert chosen(inventory.place(deployment(), variant()))[0] == "nodes/a"
    assert chosen(inventory.place(deployment("e"), variant()))[0] == "nodes/c"


def test_a_node_where_the_variant_failed_comes_last() -> None:
    world = snapshot(view("a", ["H100"]), view("b", ["H100"] * 4))
    place = Inventory(world, ()).place(deployment(), variant(failed=("nodes/a",)))
    assert chosen(place)[0] == "nodes/b"


def test_the_first_allowed_type_with_room_is_taken() -> None:
    world = snapshot(view("a", ["A100", "H100"]))
    wanted = deployment(hardware=Hardware(allow=("H100", "A100")))
    inventory = Inventory(world, ())
    assert chosen(inventory.place(wanted, variant()))[1] == ["a-1"]
    inventory.give(holder("a", "a-1"))
    assert chosen(inventory.place(wanted, variant()))[1] == ["a-0"]
    assert isinstance(inventory.place(wanted, variant(gpu_type="H100")), Unplaced)


def test_types_are_never_mixed_in_a_set() -> None:
    world = snapshot(view("a", ["A100", "H100"]))
    assert isinstance(Inventory(world, ()).place(deployment(), variant(2)), Unplaced)


def test_the_cpu_slot_is_the_last_choice_and_needs_no_memory() -> None:
    world = snapshot(view("a", ["CPU"], free_gib=0), view("b", ["L4"]))
    inventory = Inventory(world, ())
    assert chosen(inventory.place(deployment(), variant()))[0] == "nodes/b"
    inventory.give(holder("b", "b-0"))
    assert chosen(inventory.place(deployment(), variant()))[0] == "nodes/a"


def test_a_gpu_with_less_free_memory_than_the_engine_asks_for_is_left() -> None:
    inventory = Inventory(snapshot(view("a", ["H100"], free_gib=60)), ())
    assert isinstance(inventory.place(deployment(), variant(share=0.9)), Unplaced)
    assert isinstance(inventory.place(deployment(), variant(share=0.7)), Placed)


def test_engine_and_cluster_of_the_node_must_be_those_that_are_asked_for() -> None:
    inventory = Inventory(snapshot(view("a", ["H100"], engine="vllm", cluster="oslo")), ())
    refused = inventory.place(deployment(engine="simulated"), variant())
    assert refused == Unplaced(reason="a has the engine 'vllm', not 'simulated'")
    refused = inventory.place(deployment(hardware=Hardware(clusters=("bergen",))), variant())
    assert refused == Unplaced(reason="a is in cluster 'oslo', which is not allowed")


def test_without_nodes_the_reason_says_so() -> None:
    assert Inventory(snapshot(), ()).place(deployment(), variant()) == Unplaced(reason="no node is registered")


def test_reasons_are_bounded() -> None:
    world = snapshot(*(view(f"n{number:03}", []) for number in range(100)))
    place = Inventory(world, ()).place(deployment(), variant())
    assert isinstance(place, Unplaced)
    assert place.reason.endswith("and 84 nodes more")


def test_asking_without_a_replica_takes_its_gpus_as_free_and_no_others() -> None:
    world = snapshot(view("a", ["H100"] * 2))
    held = [holder("a", "a-0", name="r0"), holder("a", "a-1", name="r1")]
    inventory = Inventory(world, held)
    assert isinstance(inventory.place(deployment(), variant()), Unplaced)
    assert chosen(inventory.place(deployment(), variant(), without=held[1].name)) == ("nodes/a", ["a-1"])
    assert isinstance(inventory.place(deployment(), variant(2), without=held[1].name), Unplaced)


def test_double_claims_are_found() -> None:
    replicas = {each.name: each for each in (holder("a", "a-0", name="r0"), holder("a", "a-0", name="r1"))}
    assert double_claims(replicas) == (
        "a-0 on nodes/a is claimed by deployments/x/replicas/r0 and deployments/x/replicas/r1",
    )
