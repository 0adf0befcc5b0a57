"""What is stored can be read back, by people too; what cannot be read is refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from enova_common.errors import Corrupt
from enova_coordinator.core.calibration import StoredCalibration
from enova_coordinator.core.episode import Episode, EpisodeLabel, EpisodeState, EvidenceSeries, Finding
from enova_coordinator.core.model import (
    AssignedMember,
    Assignment,
    Claim,
    Configuration,
    Decision,
    DecisionAction,
    DecisionInput,
    Deployment,
    DeploymentSpec,
    Gpu,
    Hardware,
    Intent,
    Member,
    Node,
    Replica,
    RequestRecord,
    ServingClass,
    Stored,
    Variant,
)
from enova_coordinator.store import codec
from enova_recommender.types import VerdictKind

MEMBER = Member(node="nodes/n", rank=0, claims=(Claim(gpu_uuid="g", memory_bytes=7),))
CONFIGURATION: Configuration = {"max_num_seqs": 64, "gpu_memory_utilization": 0.5, "enforce_eager": True, "dtype": "x"}
VALUES: tuple[Stored, ...] = (
    Deployment(
        name="deployments/d", uid="u",
        spec=DeploymentSpec(
            model="m", served_names=("a", "ü"), min=0, max=3, hardware=Hardware(allow=("H100",), max_gpus=4),
            classes=(ServingClass(name="chat", ttft_p95_s=0.5),), configuration=CONFIGURATION,
        ),
    ),
    Variant(name="deployments/d/variants/v1", deployment="deployments/d", model="m", served_names=("a",)),
    Replica(
        name="deployments/d/replicas/v1-0", uid="u", deployment="deployments/d", variant="deployments/d/variants/v1",
        members=(MEMBER,), intent=Intent.DRAIN,
    ),
    Node(name="nodes/n", uid="u", labels={"rack": "7"}, gpus=(Gpu(uuid="g", simulated=True),)),
    Assignment(
        name="assignments/n", revision=5,
        members=(AssignedMember(replica="r", uid="u", model="m", member=MEMBER, configuration=CONFIGURATION),),
    ),
    Decision(
        name="decisions/d.0000000000000007", deployment="deployments/d", action=DecisionAction.SCALE_UP, actor="a",
        reason="r", inputs=(DecisionInput(object="o", feature="f", start_s=1.0, step_s=2.0, values=(1.0, 2.5)),),
    ),
    RequestRecord(name="requests/x", method="m", object="deployments/d", fingerprint="f", create_time_s=1.5),
    StoredCalibration(
        name="calibrations/H100.0123456789abcdef", gpu_type="H100", model="m", configuration="", groups=("MEMORY",),
        factors=(1.5,), covariance=(0.25,), noise=0.05, prior_spread=0.3, updates=3, run=5, load=(1.0,),
        update_time_s=2.5,
    ),
    Episode(
        name="episodes/0000001763756000123-0123abcd", object="deployments/d/replicas/r", verdict=VerdictKind.DEGRADED,
        causes=("SLOW",), members=("deployments/d/replicas/r",), member_count=1, state=EpisodeState.CLOSED,
        findings=(Finding(feature="step_time_ratio", value=2.0, threshold=1.3, contribution=1.54),),
        series=(EvidenceSeries(object="r", feature="step_s", start_s=1.0, step_s=5.0, values=(0.1, 0.2)),),
        label=EpisodeLabel.TRUE, label_cause="THROTTLED", label_actor="user/x", label_time_s=3.0,
    ),
)


def changed(value: Stored, **fields: object) -> bytes:
    return json.dumps(json.loads(codec.encode(value)) | fields).encode()


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_as_it_was(value: Stored) -> None:
    assert codec.decode(codec.encode(value)) == value


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_key_leads_back_to_its_name(value: Stored) -> None:
    assert codec.name(codec.key(value.name)) == value.name


def test_kind_and_version_come_first() -> None:
    assert list(json.loads(codec.encode(VALUES[0])))[:2] == ["kind", "version"]


def test_what_was_not_measured_is_null_and_comes_back_as_nan() -> None:
    series = DecisionInput(object="o", feature="f", start_s=0.0, step_s=1.0, values=(1.0, math.nan))
    decision = Decision(
        name="decisions/d.1", deployment="deployments/d", action=DecisionAction.HOLD, actor="a", reason="",
        inputs=(series,),
    )
    data = codec.encode(decision)
    assert b"[1.0,null]" in data
    assert math.isnan(codec.decode_as(Decision, data).inputs[0].values[1])


def test_a_calibration_that_was_stored_without_its_run_begins_a_run() -> None:
    value = next(value for value in VALUES if isinstance(value, StoredCalibration))
    body = json.loads(codec.encode(value))
    assert body.pop("run") == 5
    assert codec.decode(json.dumps(body).encode()) == replace(value, run=0)


def test_a_field_that_an_older_release_did_not_write_takes_its_default() -> None:
    body = json.loads(codec.encode(VALUES[3]))
    del body["cluster"]
    node = codec.decode_as(Node, json.dumps(body).encode())
    assert node.cluster == ""


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"{}", "kind"),
        (b'{"kind":"Pod","version":1}', "unknown kind 'Pod'"),
        (changed(VALUES[3], version=2), "version 2 of Node is not known here"),
        (changed(VALUES[3], colour="red"), "unknown field 'colour'"),
        (changed(VALUES[3], draining="yes"), "'yes' is not bool"),
        (changed(VALUES[2], intent="FLY"), "FLY"),
        (b'{"kind":"Node","version":1}', "uid"),
    ],
)
def test_what_cannot_be_read_is_refused_with_key_and_remedy(data: bytes, text: str) -> None:
    with pytest.raises(Corrupt, match="store value") as caught:
        codec.decode(data, key="/enova/v1/nodes/n")
    assert caught.value.reason == "STORE_VALUE_UNREADABLE"
    assert text in caught.value.message
    assert "/enova/v1/nodes/n" in caught.value.message
    assert caught.value.remedy


def test_another_kind_under_a_key_is_refused() -> None:
    with pytest.raises(Corrupt, match="holds Node where Deployment belongs"):
        codec.decode_as(Deployment, codec.encode(VALUES[3]))


def test_decisions_sort_by_age_within_their_deployment() -> None:
    keys = [codec.key(codec.decision_name("deployments/a-b", time_s)) for time_s in (9.0, 1e9, 2e9)]
    assert keys == sorted(keys)
    assert all(key.startswith(codec.prefix("decisions", "deployments/a-b")) for key in keys)


@pytest.mark.parametrize("name", ["", "deployments", "deployments/a/b/c/d", "things/x"])
def test_no_other_name_has_a_key(name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        codec.key(name)
