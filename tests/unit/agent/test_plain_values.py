"""Values of the agent written as JSON and read back: the last assignment, and the lines of the local protocol."""

from __future__ import annotations

import dataclasses
import json

import pytest

from enova_agent.core.local import build
from enova_agent.core.model import Assignment, Claim, Desired, MemberSpec, Role

MEMBER = MemberSpec(
    replica="deployments/d/replicas/r",
    uid="u",
    model="/models/m",
    desired=Desired.DRAIN,
    served_names=("a", "b"),
    configuration={"max_num_seqs": 16, "enforce_eager": True, "gpu_memory_utilization": 0.5, "dtype": "float32"},
    role=Role.DECODE,
    claims=(Claim(gpu_uuid="GPU-1", memory_bytes=3),),
    drain_timeout_s=12.0,
)


def test_an_assignment_outlives_its_writing_to_disk() -> None:
    assignment = Assignment(revision=6, term=2, members=(MEMBER,))
    text = json.dumps(dataclasses.asdict(assignment), default=dict)
    back = build(Assignment, json.loads(text))
    assert back == assignment
    assert back.members[0].desired is Desired.DRAIN
    kinds = {name: type(value) for name, value in back.members[0].configuration.items()}
    assert kinds == {"max_num_seqs": int, "enforce_eager": bool, "gpu_memory_utilization": float, "dtype": str}


@pytest.mark.parametrize(
    "change", [{"desired": "SOMETHING"}, {"desired": 3}, {"rank": "1"}, {"claims": [{"memory_bytes": 1.5}]}]
)
def test_values_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    value = json.loads(json.dumps(dataclasses.asdict(MEMBER), default=dict)) | change
    with pytest.raises((TypeError, ValueError)):
        build(MemberSpec, value)
