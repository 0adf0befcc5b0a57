"""deployment.yaml: what it may hold, and its schema."""

from __future__ import annotations

import jsonschema
import pytest

from enova.v1 import cluster_pb2
from enova_cli.commands.deployments import Duration, derive_name, is_ready, parse_setting
from enova_cli.manifest import DESIRED_FIELDS, json_schema, parse_manifest, update_paths
from enova_common.errors import InvalidField

FULL = {
    "name": "chat",
    "model": "/models/llama",
    "served_names": ["chat", "llama"],
    "engine": "vllm",
    "classes": [{"name": "a", "priority": 1, "ttft_p95_s": 0.5, "tpot_p95_s": 0.05, "attainment": 0.99}],
    "min": 1,
    "max": 4,
    "hardware": {"allow": ["H100"], "max_gpus": 8, "clusters": ["eu"]},
    "configuration": {"max_num_seqs": 64},
    "policy": "enova-0.0.7-mended",
    "priority": 3,
}


def test_every_field_of_a_full_manifest_arrives() -> None:
    deployment = parse_manifest(FULL)
    assert deployment.name == "deployments/chat"
    assert list(deployment.served_names) == ["chat", "llama"]
    assert deployment.classes[0].attainment == 0.99
    assert (deployment.min, deployment.max, deployment.configuration.max_num_seqs) == (1, 4, 64)


def test_objectives_are_a_single_default_class() -> None:
    deployment = parse_manifest({"name": "a", "model": "m", "objectives": {"ttft_p95_s": 0.5}})
    assert [(c.name, c.ttft_p95_s) for c in deployment.classes] == [("default", 0.5)]


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"model": "m"}, "name"),
        ({"name": "a", "replica": 1}, "replica"),
        ({"name": "a", "state": "READY"}, "state"),
        ({"name": "a", "objectives": {}, "classes": []}, "objectives"),
        ({"name": "a", "configuration": {"max_num_sequences": 1}}, "configuration.max_num_sequences"),
        ([], "deployment"),
    ],
)
def test_a_wrong_manifest_names_its_field(document: object, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        parse_manifest(document)
    assert caught.value.field == field


def test_the_schema_takes_what_the_parser_takes_and_refuses_unknown_fields() -> None:
    schema = json_schema()
    jsonschema.validate(FULL, schema)
    jsonschema.validate({"name": "a", "model": "m", "objectives": {"tpot_p95_s": 0.1}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(FULL | {"replica": 1}, schema)


def test_the_desired_fields_are_fields_of_the_proto_below_the_output_only_ones() -> None:
    numbers = {field.name: field.number for field in cluster_pb2.Deployment.DESCRIPTOR.fields}
    assert set(DESIRED_FIELDS) == {name for name, number in numbers.items() if 10 <= number < 30} | {"name"}


def test_durations_have_units() -> None:
    convert = Duration().convert
    assert [convert(text, None, None) for text in ("500ms", "2s", "5m", "1h", "3")] == [0.5, 2.0, 300.0, 3600.0, 3.0]


def test_a_setting_keeps_the_type_that_yaml_reads() -> None:
    assert parse_setting("max-num-seqs=64") == ("max_num_seqs", 64)
    assert parse_setting("enforce_eager=true") == ("enforce_eager", True)
    with pytest.raises(InvalidField):
        parse_setting("max_num_seqs")


def test_a_name_is_derived_from_the_model() -> None:
    assert derive_name("meta-llama/Llama-3.1-8B-Instruct") == "llama-3-1-8b-instruct"
    assert derive_name("/models/My_Model/") == "my-model"


def test_ready_means_enough_replicas_of_this_generation_in_every_ingress() -> None:
    deployment = cluster_pb2.Deployment(min=2, max=4, generation=3, observed_generation=3)
    ready = cluster_pb2.Replica(state=cluster_pb2.Replica.STATE_READY, routed=True, generation=3)
    unrouted = cluster_pb2.Replica(state=cluster_pb2.Replica.STATE_READY, routed=False, generation=3)
    old = cluster_pb2.Replica(state=cluster_pb2.Replica.STATE_READY, routed=True, generation=2)
    assert is_ready(deployment, [ready, ready])
    assert not is_ready(deployment, [ready, ready], 3)
    assert is_ready(deployment, [ready, ready, ready], 3)
    assert not is_ready(deployment, [ready, unrouted])
    assert not is_ready(deployment, [ready, old])
    deployment.generation = 4
    assert not is_ready(deployment, [ready, ready])


def test_the_remedy_for_an_unknown_field_names_only_fields_that_may_be_given() -> None:
    with pytest.raises(InvalidField) as raised:
        parse_manifest({"name": "x", "model": "m", "qqq": 1})
    assert "served_names" in raised.value.remedy
    assert "create_time" not in raised.value.remedy


def test_only_a_manifest_that_names_the_pause_changes_it() -> None:
    desired = set(DESIRED_FIELDS) - {"name"}
    assert set(update_paths({"name": "x", "model": "m"})) == desired - {"autoscaling_paused"}
    assert set(update_paths({"name": "x", "autoscaling_paused": False})) == desired
