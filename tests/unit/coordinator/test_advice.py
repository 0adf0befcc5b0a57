"""What the recommender is asked about a deployment, and what its answer means for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from enova_coordinator.core import advice
from enova_coordinator.core.advice import Observed
from enova_coordinator.core.gpu_facts import GpuFacts
from enova_coordinator.core.gpu_types import described_types
from enova_coordinator.core.model import (
    Claim,
    Configuration,
    Deployment,
    DeploymentAdvice,
    DeploymentSpec,
    Gpu,
    Hardware,
    Member,
    Node,
    NodeState,
    NodeView,
    Reconfiguration,
    Replica,
    ServingClass,
    Snapshot,
    Variant,
)
from enova_coordinator.core.plan import Draft
from enova_coordinator.core.validation import spec_problems
from enova_coordinator.core.variants import current_variant
from enova_recommender.recommend.request import described_gpus, request_from_plain

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
SPEC = DeploymentSpec(model=MODEL)
ADVICE = DeploymentAdvice(gpu_type="H100", configuration={"max_num_seqs": 64}, reason="advised")


def view(name: str, kind: str = "H100", count: int = 8, **fields: Any) -> NodeView:
    gpus = tuple(Gpu(uuid=f"{name}-{index}", index=index, type=kind, memory_bytes=80 << 30) for index in range(count))
    node = Node(name=f"nodes/{name}", uid=name, gpus=gpus, engine="simulated", cluster="here")
    return NodeView(node=replace(node, **fields), state=NodeState.READY)


def fleet(*views: NodeView, replicas: tuple[Replica, ...] = ()) -> Snapshot:
    return Snapshot(
        nodes={each.node.name: each for each in views}, replicas={each.name: each for each in replicas}
    )


def holding(deployment: str, *uuids: str) -> Replica:
    member = Member(node="nodes/a", claims=tuple(Claim(gpu_uuid=uuid) for uuid in uuids))
    return Replica(
        name=f"deployments/{deployment}/replicas/v1-0", uid="u", deployment=f"deployments/{deployment}",
        variant=f"deployments/{deployment}/variants/v1", members=(member,),
    )  # fmt: skip


def deployment(**fields: Any) -> Deployment:
    return Deployment(name="deployments/d", uid="u", **{"spec": SPEC, **fields})


def test_supply_is_what_is_free_by_type_and_node_size() -> None:
    snapshot = fleet(
        view("a"), view("b"), view("c", "L40S", 4), view("d", "CPU", 1), view("e", draining=True),
        view("f", schedulable=False), replicas=(holding("other", "a-0", "a-1"), holding("d", "b-0")),
    )  # fmt: skip
    supply = advice.fleet_supply(snapshot, SPEC, without="deployments/d")
    assert list(supply.rows) == [
        {"type": "H100", "count": 8, "gpus_per_node": 8},
        {"type": "H100", "count": 6, "gpus_per_node": 6},
        {"type": "L40S", "count": 4, "gpus_per_node": 4},
    ]
    assert [each.object for each in supply.left_out] == ["CPU"]


def test_supply_keeps_to_what_the_spec_allows() -> None:
    snapshot = fleet(view("a"), view("b", "L40S"), view("c", cluster="there"), view("d", engine="vllm"))
    spec = replace(SPEC, hardware=Hardware(allow=("H100",), clusters=("here",)), engine="simulated")
    assert advice.fleet_supply(snapshot, spec) == advice.Supply(({"type": "H100", "count": 8, "gpus_per_node": 8},))


def test_a_type_without_a_price_keeps_no_other_from_being_advised_and_is_named() -> None:
    supply = advice.fleet_supply(fleet(view("a"), view("b", "H20")))
    assert supply.rows == ({"type": "H100", "count": 8, "gpus_per_node": 8},)
    (left_out,) = supply.left_out
    assert left_out.object == "H20"
    assert "no price: give it in advice.gpus_file" in left_out.reason


def test_one_type_alone_needs_no_price_and_counts_gpu_hours() -> None:
    supply = advice.fleet_supply(fleet(view("a", "H20")))
    assert supply.rows == ({"type": "H20", "price_per_hour": 1.0, "count": 8, "gpus_per_node": 8},)
    assert "GPU-hours" in supply.left_out[0].reason


def test_an_operators_price_and_data_sheet_win_over_the_catalogue() -> None:
    own = described_gpus([{"type": "H20", "price_per_hour": 1.5}, {"like": "H100", "name": "H100", "power_limit_w": 500,
                                                                   "bandwidth_bytes_per_s": 3e12}])  # fmt: skip
    supply = advice.fleet_supply(fleet(view("a"), view("b", "H20")), types=described_types(own))
    by_type = {row["type"]: row for row in supply.rows}
    assert by_type["H20"]["price_per_hour"] == 1.5
    assert by_type["H100"]["bandwidth_bytes_per_s"] == 3e12
    assert supply.left_out == ()


def unheard_of(name: str, **facts: Any) -> NodeView:
    host = view(name, "NVIDIA Unheard-Of")
    told = GpuFacts(name="NVIDIA Unheard-Of", **facts)
    gpus = tuple(replace(gpu, facts=told) for gpu in host.node.gpus)
    return replace(host, node=replace(host.node, gpus=gpus))


def test_a_gpu_that_no_catalogue_knows_is_described_by_its_driver() -> None:
    facts = {"sm_clock_mhz": 1700.0, "memory_clock_mhz": 1512.0, "bus_width_bits": 5120, "cores": 6912,
             "compute_capability": 8.0}  # fmt: skip
    (row,) = advice.fleet_supply(fleet(unheard_of("a", **facts))).rows
    assert row["type"] == "NVIDIA Unheard-Of"
    assert row["bandwidth_bytes_per_s"] == pytest.approx(5120 / 8 * 2 * 1512e6)
    question = advice.request_for(fleet(unheard_of("a", **facts)), "deployments/d", SPEC, config_json="")
    assert isinstance(question, advice.Question)
    assert request_from_plain(question.request).nodes[0].gpu.bandwidth_bytes_per_s == row["bandwidth_bytes_per_s"]


def test_a_fact_that_a_driver_does_not_tell_is_named() -> None:
    supply = advice.fleet_supply(fleet(unheard_of("a", sm_clock_mhz=1700.0)))
    assert supply.rows == ()
    assert "does not tell bus_width_bits" in supply.left_out[0].reason


def test_what_runs_on_a_gpu_of_the_operators_goes_with_its_data_sheet() -> None:
    variant = Variant(
        name="deployments/d/variants/v1", deployment="deployments/d", model=MODEL, served_names=("d",), gpu_type="H20"
    )
    snapshot = replace(fleet(view("a", "H20"), view("b")), variants={variant.name: variant})
    types = described_types(described_gpus([{"type": "H20", "price_per_hour": 1.5}]))
    assert advice.current_of(snapshot, deployment()) is None
    current = advice.current_of(snapshot, deployment(), types=types)
    assert current is not None
    assert current["gpu"] == {"type": "H20", "price_per_hour": 1.5, "count": 1}


def test_a_node_that_is_not_ready_supplies_nothing() -> None:
    lost = replace(view("a"), state=NodeState.LOST)
    assert advice.fleet_supply(fleet(lost)) == advice.Supply(())


def test_a_request_has_the_strictest_objectives_and_the_bounds() -> None:
    classes = (ServingClass(name="a", ttft_p95_s=0.5, tpot_p95_s=0.1), ServingClass(name="b", tpot_p95_s=0.05))
    spec = replace(SPEC, classes=classes, hardware=Hardware(max_gpus=4))
    question = advice.request_for(fleet(view("a")), "deployments/d", spec, config_json="{}")
    assert not isinstance(question, str)
    request = question.request
    assert request["objectives"] == {"ttft_s": 0.5, "tpot_s": 0.05}
    assert (request["max_gpus"], request["model"], request["deployable"]) == (4, MODEL, True)
    assert request["workload"] is advice.ASSUMED_WORKLOAD


@pytest.mark.parametrize(
    ("snapshot", "spec", "config_json", "says"),
    [
        (fleet(), SPEC, "", "no GPU is free"),
        (fleet(view("a", "CPU")), SPEC, "", "CPU is a slot of the host's processor"),
        (fleet(view("a", "H20"), view("b", "GB300")), SPEC, "", "H20 has no price"),
        (fleet(view("a", "Odd-1")), SPEC, "", "Odd-1 is not in the catalogue, and no driver tells"),
        (fleet(view("a")), replace(SPEC, hardware=Hardware(allow=("L4",))), "", "no GPU of L4 is free"),
        (fleet(view("a")), replace(SPEC, model="own/model"), "{}", "catalogue does not know it"),
        (fleet(view("a")), replace(SPEC, model="own/model"), '{"model_type": "odd"}', "not understood"),
        (fleet(view("a")), replace(SPEC, model="own/model"), "{", "not JSON"),
    ],
)
def test_what_is_missing_for_a_request_is_told(
    snapshot: Snapshot, spec: DeploymentSpec, config_json: str, says: str
) -> None:
    request = advice.request_for(snapshot, "deployments/d", spec, config_json=config_json)
    assert isinstance(request, str)
    assert says in request


def test_counted_traffic_takes_the_place_of_the_assumed() -> None:
    observed = Observed(requests_per_s=4.0, prompt_tokens=500, output_tokens=100, requests=1000)
    found = advice.workload(observed)
    assert found["requests_per_s"] == 4.0
    assert found["prompt_tokens"]["p50"] == pytest.approx(500 / 2**0.5)
    assert found["prompt_tokens"]["p95"] > 500 > found["prompt_tokens"]["p50"]


def test_lengths_that_were_met_together_take_the_place_of_means() -> None:
    pairs = tuple((100 + 7 * number, 900 - number) for number in range(800))
    observed = Observed(requests_per_s=4.0, prompt_tokens=500, output_tokens=100, requests=1000, lengths=pairs)
    found = advice.workload(observed)
    sample = [(each["prompt_tokens"], each["output_tokens"]) for each in found["lengths"]]
    assert len(sample) == advice.LENGTHS_MAX
    assert set(sample) <= set(pairs)
    assert np.quantile([sum(pair) for pair in sample], 0.99) == pytest.approx(
        np.quantile([sum(pair) for pair in pairs], 0.99), rel=0.01
    )
    few = advice.workload(replace(observed, lengths=pairs[:10]))
    assert "lengths" not in few


def test_traffic_is_the_busiest_minute_and_the_mean_lengths() -> None:
    found = advice.observed_of([60, 240, float("nan")], [(100, 50_000, 10_000), (100, 30_000, 10_000)])
    assert found == Observed(requests_per_s=4.0, prompt_tokens=400.0, output_tokens=100.0, requests=200)


@pytest.mark.parametrize(
    ("minutes", "totals"), [([], [(100, 1, 1)]), ([60.0], [(3, 30, 30)]), ([0.0], [(100, 1, 1)]), ([float("nan")], [])]
)
def test_too_little_traffic_is_none(minutes: list[float], totals: list[tuple[int, int, int]]) -> None:
    assert advice.observed_of(minutes, totals) is None


def test_advice_is_asked_on_creation_and_when_its_grounds_change() -> None:
    made = deployment(advice=ADVICE)
    assert advice.is_asked(None, SPEC)
    assert not advice.is_asked(made, replace(SPEC, max=3, priority=2, autoscaling_paused=True))
    for changed in (
        replace(SPEC, model="other"),
        replace(SPEC, hardware=Hardware(allow=("L4",))),
        replace(SPEC, classes=(ServingClass(name="a", tpot_p95_s=0.1),)),
    ):
        assert advice.is_asked(made, changed)


def test_an_explicit_configuration_is_never_asked_about_nor_advised() -> None:
    explicit = replace(SPEC, configuration={"max_num_seqs": 8})
    off = replace(SPEC, reconfiguration=Reconfiguration.OFF)
    for spec in (explicit, off):
        assert not advice.is_asked(None, spec)
        assert advice.kept(deployment(advice=ADVICE), spec) is None
    assert advice.is_asked(deployment(spec=explicit), SPEC)


def test_advice_is_of_one_replica() -> None:
    answer = {
        "chosen": {
            "gpu_type": "H100", "configuration": {"max_num_seqs": 64}, "cost_per_hour": 9.0, "replicas": 3,
            "prediction": {"capacity_rps": {"value": 5.0}},
        },
        "explanation": [{"text": "Run it.", "template": "Run it."}],
    }  # fmt: skip
    found = advice.advice_of(answer, reason="why", now_s=7.0)
    assert (found.cost_per_hour, found.capacity_rps, found.explanation) == (3.0, 5.0, ("Run it.",))


def candidate(cost: float, replicas: int = 1) -> dict[str, Any]:
    return {"cost_per_hour": cost, "replicas": replicas}


@pytest.mark.parametrize(
    ("chosen", "current", "gain"),
    [
        (candidate(3), candidate(6), 0.5),
        (candidate(3), candidate(3), 0.0),
        (candidate(6, 2), candidate(3), -1.0),
        (candidate(3), {"replicas": 0, "constraint": "TPOT"}, 1.0),
        # A configuration that runs is possible: the model is wrong about it, and nobody is told of savings.
        (candidate(3), {"replicas": 0, "constraint": "MEMORY"}, None),
        (candidate(3), {"replicas": 0, "constraint": "CONTEXT"}, None),
        (None, candidate(3), None),
        (candidate(3), None, None),
    ],
)
def test_gain_is_what_the_same_workload_costs_less(chosen: Any, current: Any, gain: float | None) -> None:
    assert advice.gain_of({"chosen": chosen, "current": current}) == gain


def test_engines_run_with_the_advice_and_a_change_of_it_makes_a_new_variant() -> None:
    made = deployment(advice=ADVICE)
    draft = Draft(Snapshot(deployments={made.name: made}))
    first = current_variant(draft, made, target=1)
    assert (first.gpu_type, dict(first.configuration)) == ("H100", {"max_num_seqs": 64})
    again = current_variant(draft, made, target=1)
    assert again.name == first.name
    better = advice.applied(made, replace(ADVICE, configuration={"max_num_seqs": 256}), now_s=1.0)
    second = current_variant(draft, better, target=1)
    assert (second.name.rsplit("/")[-1], dict(second.configuration)) == ("v2", {"max_num_seqs": 256})
    assert draft.variants[first.name].retired


def test_a_variant_that_found_its_place_before_advice_came_is_kept_by_the_same_configuration() -> None:
    variant = Variant(
        name="deployments/d/variants/v1", deployment="deployments/d", model=MODEL, served_names=("d",), gpu_type="H100",
        configuration={"max_num_seqs": 64},
    )  # fmt: skip
    made = deployment(advice=ADVICE)
    draft = Draft(Snapshot(deployments={made.name: made}, variants={variant.name: variant}))
    assert current_variant(draft, made, target=1).name == variant.name


def test_an_explicit_configuration_wins_over_advice() -> None:
    explicit = deployment(spec=replace(SPEC, configuration={"max_num_seqs": 8}), advice=ADVICE)
    assert dict(explicit.configuration) == {"max_num_seqs": 8}
    assert explicit.advised_gpu_type == ""


def test_a_proposal_is_news_when_its_engines_or_its_gain_change() -> None:
    assert advice.is_same(ADVICE, replace(ADVICE, gain=0.4, reason="else"))
    assert not advice.is_same(ADVICE, replace(ADVICE, gpu_type="L4"))
    assert advice.is_same(None, None)
    assert not advice.is_same(None, ADVICE)


def proposed(**fields: Any) -> Deployment:
    proposal = DeploymentAdvice(gpu_type="L40S", configuration={"max_num_seqs": 32, "max_num_batched_tokens": 4096})
    return deployment(proposal=proposal, **fields)


def test_an_accepted_proposal_is_in_force_as_a_new_generation() -> None:
    before = proposed(advice=ADVICE)
    after = advice.accepted(before, now_s=5.0)
    assert (after.generation, after.proposal, after.update_time_s) == (before.generation + 1, None, 5.0)
    assert (after.advised_gpu_type, dict(after.configuration)) == ("L40S", dict(before.proposal.configuration))  # type: ignore[union-attr]


def test_accepting_turns_an_explicit_configuration_over_but_for_what_no_proposal_speaks_of() -> None:
    explicit: Configuration = {"max_num_seqs": 8, "tensor_parallel_size": 4, "quantization": "fp8", "seed": 7}
    after = advice.accepted(proposed(spec=replace(SPEC, configuration=explicit)), now_s=5.0)
    assert after.spec.configuration == {}
    assert dict(after.configuration) == {
        "max_num_seqs": 32, "max_num_batched_tokens": 4096, "quantization": "fp8", "seed": 7
    }  # fmt: skip
    assert after.advised_gpu_type == "L40S"


def test_a_proposals_etag_changes_with_it_and_with_the_desired_fields() -> None:
    one = proposed()
    other = replace(one, proposal=replace(ADVICE, gain=0.3))
    etags = {advice.proposal_etag(each) for each in (one, other, replace(one, generation=2))}
    assert len(etags) == 3
    gained = replace(one, proposal=replace(one.proposal, gain=0.9))  # type: ignore[type-var]
    assert advice.proposal_etag(gained) == advice.proposal_etag(one)
    assert advice.proposal_etag(deployment()) == ""


def test_a_users_configuration_beside_apply_is_refused() -> None:
    explicit = replace(SPEC, configuration={"max_num_seqs": 8}, reconfiguration=Reconfiguration.APPLY)
    (problem,) = spec_problems(explicit, policies=())
    assert problem.field == "reconfiguration"
    assert "enova accept" in problem.remedy
    assert not spec_problems(replace(explicit, reconfiguration=Reconfiguration.PROPOSE), policies=())
