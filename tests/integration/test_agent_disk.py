"""What an agent keeps on disk comes back, and whatever a file holds, the agent starts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from enova_agent.core.model import Assignment, Claim, Desired, MemberSpec, Role
from enova_agent.disk import AssignmentFile, TermFile, locked, node_uid
from enova_common.errors import Conflict

WORDS = [b"null", b"[]", b"{}", b"-1", b"1e999", b'"x"', b"\x00", b",", b"true"]
ASSIGNMENT = Assignment(
    revision=7,
    term=3,
    members=(
        MemberSpec(
            replica="deployments/d/replicas/r", uid="u", model="m", desired=Desired.DRAIN, served_names=("a", "b"),
            configuration={"max_num_seqs": 16, "enforce_eager": True, "dtype": "half", "gpu_memory_utilization": 0.5},
            engine="vllm", role=Role.DECODE, rank=1, member_count=2, drain_timeout_s=2.5, restart_nonce=4,
            claims=(Claim(gpu_uuid="g", memory_bytes=5, shared=True),),
        ),
        MemberSpec(replica="deployments/d/replicas/s", uid="v", model="m"),
    ),
)


def test_the_last_assignment_comes_back_whole(tmp_path: Path) -> None:
    file = AssignmentFile(tmp_path / "assignment.json")
    assert file.load() is None
    file.save(ASSIGNMENT)
    loaded = file.load()
    assert loaded == ASSIGNMENT
    assert loaded is not None
    assert isinstance(loaded.members[0].desired, Desired)
    assert {type(value) for value in loaded.members[0].configuration.values()} == {int, bool, str, float}


def test_terms_are_remembered_and_a_uid_is_drawn_once(tmp_path: Path) -> None:
    terms = TermFile(tmp_path / "term.json")
    assert terms.highest == 0
    terms.remember(12)
    assert TermFile(tmp_path / "term.json").highest == 12
    uid = node_uid(tmp_path / "node.json")
    assert node_uid(tmp_path / "node.json") == uid != node_uid(tmp_path / "other.json")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    terms = TermFile(tmp_path / "term.json")
    terms.remember(5)
    (tmp_path / ".term.json.new").mkdir()
    with pytest.raises(OSError, match="directory"):
        terms.remember(6)
    assert terms.highest == 5
    assert TermFile(tmp_path / "term.json").highest == 5


def test_whatever_stands_in_the_files_they_are_read_or_set_aside(tmp_path: Path) -> None:
    draw = random.Random(1000)
    path = tmp_path / "assignment.json"
    AssignmentFile(path).save(ASSIGNMENT)
    whole = path.read_bytes()
    for _ in range(2_000):
        spoilt = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            match draw.randrange(3):
                case 0:
                    del spoilt[draw.randrange(len(spoilt) + 1) :]
                case 1 if spoilt:
                    spoilt[draw.randrange(len(spoilt))] = draw.randrange(256)
                case _:
                    at = draw.randrange(len(spoilt) + 1)
                    spoilt[at:at] = draw.choice(WORDS)
        path.write_bytes(spoilt)
        loaded = AssignmentFile(path).load()
        assert loaded is None or all(isinstance(member, MemberSpec) for member in loaded.members)
        assert TermFile(path).highest >= 0


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "3", '{"term": "x"}', '{"term": -4}', '{"term": 1.5}', '{"term": null}', "[" * 100_000]
)
def test_a_term_that_is_none_counts_as_never_heard(tmp_path: Path, text: str) -> None:
    (tmp_path / "term.json").write_text(text)
    assert TermFile(tmp_path / "term.json").highest == 0


def test_a_directory_is_one_agents_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "data"), pytest.raises(Conflict, match="another agent uses"), locked(tmp_path / "data"):
        raise AssertionError("two agents have one directory")
    with locked(tmp_path / "data"):
        assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
