"""Messages as plain values: the rules of -o json, and what is refused on the way in."""

from __future__ import annotations

import math

import pytest

from enova.v1 import cluster_pb2, replica_service_pb2
from enova_cli.plain import from_plain, to_plain
from enova_common.errors import InvalidField


def test_enums_are_bare_words_and_64_bit_integers_are_numbers() -> None:
    plain = to_plain(cluster_pb2.Replica(state=cluster_pb2.Replica.STATE_READY, generation=2**40, gpus=["GPU-1"]))
    assert plain["state"] == "READY"
    assert plain["generation"] == 2**40
    assert plain["gpus"] == ["GPU-1"]


def test_times_are_rfc_3339_in_utc_and_unset_ones_are_null() -> None:
    replica = cluster_pb2.Replica()
    replica.ready_time.FromMilliseconds(1_700_000_000_250)
    plain = to_plain(replica)
    assert plain["ready_time"] == "2023-11-14T22:13:20.250Z"
    assert plain["start_time"] is None


def test_unset_optional_fields_are_left_out_and_set_zeros_are_kept() -> None:
    plain = to_plain(cluster_pb2.Deployment(min=0))
    assert plain["min"] == 0
    assert "max" not in plain


def test_what_was_not_measured_is_null() -> None:
    assert to_plain(replica_service_pb2.Series(values=[1.0, math.nan]))["values"] == [1.0, None]


def test_plain_values_round_trip() -> None:
    deployment = cluster_pb2.Deployment(
        name="deployments/a",
        classes=[cluster_pb2.ServingClass(name="chat", ttft_p95_s=0.5)],
        configuration=cluster_pb2.Configuration(max_num_seqs=8, enforce_eager=True),
        hardware=cluster_pb2.Hardware(allow=["H100"]),
    )
    assert from_plain(cluster_pb2.Deployment, to_plain(deployment)) == deployment


@pytest.mark.parametrize(
    ("value", "field", "words"),
    [
        ({"modle": "x"}, "modle", "did you mean model"),
        ({"classes": [{"name": "a"}, {"nam": "b"}]}, "classes[1].nam", "unknown field"),
        ({"min": "1"}, "min", "whole number"),
        ({"min": True}, "min", "whole number"),
        ({"min": 2**31}, "min", "out of range"),
        ({"model": 5}, "model", "text"),
        ({"served_names": "a"}, "served_names", "list"),
        ({"configuration": []}, "configuration", "mapping"),
        ({"configuration": {"gpu_memory_utilization": float("nan")}}, "configuration.gpu_memory_utilization", "finite"),
        ({"configuration": {"enforce_eager": "yes"}}, "configuration.enforce_eager", "true or false"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(value: dict[str, object], field: str, words: str) -> None:
    with pytest.raises(InvalidField, match=words) as caught:
        from_plain(cluster_pb2.Deployment, value)
    assert caught.value.field == field
