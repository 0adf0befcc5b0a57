"""Every problem of a spec is named with its field."""

from __future__ import annotations

import math

import pytest

from enova_coordinator.core.model import Deployment, DeploymentSpec, Hardware, ServingClass
from enova_coordinator.core.validation import conflicts, context_problems, name_problems, scale_problems, spec_problems


def fields(**spec: object) -> list[str]:
    return [problem.field for problem in spec_problems(DeploymentSpec(**({"model": "m"} | spec)), policies=["p"])]  # type: ignore[arg-type]


def test_a_full_and_proper_spec_has_no_problem() -> None:
    assert fields(
        model="meta-llama/Llama-3.1-8B-Instruct", served_names=("llama", "meta-llama/Llama-3.1-8B"), engine="vllm",
        classes=(ServingClass(name="chat", ttft_p95_s=0.5, attainment=0.99), ServingClass(name="batch", priority=9)),
        min=0, max=8, hardware=Hardware(allow=("H100", "A100 80GB"), max_gpus=8, clusters=("oslo",)), policy="p",
        configuration={"tensor_parallel_size": 2, "enforce_eager": False, "gpu_memory_utilization": 0.9},
    ) == []


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"model": ""}, "model"),
        ({"model": "--trust-remote-code"}, "model"),
        ({"model": "a\nb"}, "model"),
        ({"model": "x" * 600}, "model"),
        ({"served_names": ("ok", "not ok")}, "served_names[1]"),
        ({"served_names": ("a", "a")}, "served_names[1]"),
        ({"served_names": tuple(f"n{number}" for number in range(65))}, "served_names"),
        ({"engine": "tgi"}, "engine"),
        ({"policy": "magic"}, "policy"),
        ({"conservatism": 0.0}, "conservatism"),
        ({"conservatism": -1.0}, "conservatism"),
        ({"conservatism": 11.0}, "conservatism"),
        ({"conservatism": math.nan}, "conservatism"),
        ({"conservatism": 2.0, "policy": "p"}, "conservatism"),
        ({"classes": (ServingClass(name="Chat"),)}, "classes[0].name"),
        ({"classes": (ServingClass(name="a"), ServingClass(name="a"))}, "classes[1].name"),
        ({"classes": (ServingClass(name="a", ttft_p95_s=0.0),)}, "classes[0].ttft_p95_s"),
        ({"classes": (ServingClass(name="a", tpot_p95_s=math.nan),)}, "classes[0].tpot_p95_s"),
        ({"classes": (ServingClass(name="a", attainment=1.5),)}, "classes[0].attainment"),
        ({"classes": tuple(ServingClass(name=f"c{number}") for number in range(17))}, "classes"),
        ({"replicas": -1}, "replicas"),
        ({"replicas": 8001}, "replicas"),
        ({"replicas": 1, "max": 2}, "replicas"),
        ({"min": 3, "max": 2}, "min"),
        ({"min": 1}, "max"),
        ({"min": 0, "max": 0}, "max"),
        ({"max": 0}, "max"),
        ({"hardware": Hardware(allow=("",))}, "hardware.allow[0]"),
        ({"hardware": Hardware(clusters=("a", "a"))}, "hardware.clusters[1]"),
        ({"hardware": Hardware(max_gpus=0)}, "hardware.max_gpus"),
        ({"configuration": {"max_num_seqs": 0}}, "configuration.max_num_seqs"),
        ({"configuration": {"max_num_seqs": "many"}}, "configuration.max_num_seqs"),
        ({"configuration": {"gpu_memory_utilization": 1.5}}, "configuration.gpu_memory_utilization"),
        ({"configuration": {"trust_remote_code": True}}, "configuration.trust_remote_code"),
        ({"configuration": {"data_parallel_size": 2}}, "configuration.data_parallel_size"),
    ],
)
def test_a_wrong_value_is_named_by_its_field_alone(spec: dict[str, object], field: str) -> None:
    assert fields(**spec) == [field]


@pytest.mark.parametrize("value", [0.1, 0.5, 1.0, 2.0, 10.0])
def test_a_proper_conservatism_passes_under_a_policy_that_has_the_knob(value: float) -> None:
    assert fields(conservatism=value) == []
    assert spec_problems(DeploymentSpec(model="m", policy="enova", conservatism=value), policies=["enova"]) == ()


def test_all_problems_are_reported_at_once() -> None:
    assert fields(model="", min=3, max=1, engine="x") == ["model", "engine", "min"]


def test_a_misspelt_setting_is_answered_with_the_right_one() -> None:
    spec = DeploymentSpec(model="m", configuration={"max_num_seq": 4})
    (problem,) = spec_problems(spec, policies=())
    assert problem.remedy == "did you mean max_num_seqs?"


@pytest.mark.parametrize("name", ["", "Chat", "-a", "a-", "a_b", "a" * 64, "a/b", "ä"])
def test_names_are_labels(name: str) -> None:
    (problem,) = name_problems(name)
    assert problem.field == "name"
    assert problem.remedy


@pytest.mark.parametrize("name", ["a", "chat-8b", "0", "a" * 63])
def test_proper_names_pass(name: str) -> None:
    assert name_problems(name) == ()


def test_a_served_name_of_another_deployment_is_a_conflict() -> None:
    other = Deployment(name="deployments/b", uid="b", spec=DeploymentSpec(model="m"))
    (problem,) = conflicts("deployments/a", ("a", "b"), {other.name: other})
    assert (problem.field, problem.message) == ("served_names[1]", "'b' is served by deployments/b")
    assert conflicts("deployments/b", ("b",), {other.name: other}) == ()


def test_scaling_is_held_to_the_bounds_of_an_autoscaled_deployment_alone() -> None:
    assert [problem.field for problem in scale_problems(DeploymentSpec(model="m", min=1, max=4), 5)] == ["replicas"]
    assert scale_problems(DeploymentSpec(model="m", min=1, max=4), 4) == ()
    assert scale_problems(DeploymentSpec(model="m", replicas=2), 7) == ()
    assert [problem.field for problem in scale_problems(DeploymentSpec(model="m", replicas=2), -1)] == ["replicas"]


@pytest.mark.parametrize(
    ("spec", "bounds"),
    [
        ({}, (1, 1)),
        ({"replicas": 0}, (0, 0)),
        ({"replicas": 3}, (3, 3)),
        ({"min": 0, "max": 4}, (0, 4)),
        ({"max": 4}, (1, 4)),
        ({"max": 0}, (0, 0)),
    ],
)
def test_bounds_of_a_spec(spec: dict[str, int], bounds: tuple[int, int]) -> None:
    assert DeploymentSpec(model="m", **spec).bounds == bounds  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "problems"),
    [
        ('{"max_position_embeddings": 4096}', ["configuration.max_model_len"]),
        ('{"max_position_embeddings": 4097}', []),
        ('{"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "yarn", "factor": 4}}', []),
        ('{"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default"}}',
         ["configuration.max_model_len"]),
        ('{"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "yarn"}}', []),
        ('{"max_position_embeddings": 4096, "model_max_length": 8192}', []),
        ("{}", []), ("[]", []), ("", []), ("{", []),
    ],
)  # fmt: skip
def test_a_context_beyond_the_models_is_named_where_its_config_says_so(config: str, problems: list[str]) -> None:
    assert [problem.field for problem in context_problems({"max_model_len": 4097}, config)] == problems
    assert context_problems({}, config) == ()
