"""Recorded situations decided again: the same policy wishes the same, another one is shown where it would not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from enova_coordinator.core.recording import Recorded, read_lines
from enova_recommender.scaling.situation import Wish
from enova_simulator.replay import LEFT_OUT, Asked, ReplayError, replay, replayed
from enova_testing.recordings import lines_of, recording


def targets(wishes: list[Wish]) -> list[int]:
    return [sum(wish.targets.values()) for wish in wishes]


def test_the_recorded_policy_wishes_to_the_bit_what_it_wished() -> None:
    questions = recording()
    looks = list(replayed(read_lines(lines_of(questions)), Asked()))
    assert [look.replayed for look in looks] == [question.wish for question in questions]
    assert not any(look.differs for look in looks)
    assert len(set(targets([look.replayed for look in looks]))) > 2, "it went up and down again"
    named = replayed(read_lines(lines_of(questions)), Asked(policy="enova", conservatism=1.0))
    assert [look.replayed for look in named] == [question.wish for question in questions]


def test_a_recorded_knob_is_heeded() -> None:
    questions = recording(conservatism=3.0)
    assert not any(look.differs for look in replayed(questions, Asked()))
    assert any(look.differs for look in replayed(questions, Asked(conservatism=1.0)))


def test_a_knob_that_spends_more_wishes_for_more_and_is_told_look_by_look() -> None:
    questions = recording()
    answer: dict[str, Any] = replay(questions, Asked(conservatism=4.0))
    assert answer["replayed"]["replica_hours"] > answer["recorded"]["replica_hours"]
    differing = [look for look in answer["looks"] if look["differs"]]
    assert answer["differences"] == len(differing) > 0
    assert answer["situations"] == len(questions)
    assert answer["recorded"]["conservatism"] == [1.0]
    assert differing[0]["replayed"]["replicas"] > differing[0]["recorded"]["replicas"]


def test_replica_hours_are_those_of_the_wishes_until_the_next_look() -> None:
    questions = recording(9)
    wished = targets([question.wish for question in questions])
    answer: dict[str, Any] = replay(questions, Asked())
    assert answer["recorded"]["replica_hours"] == pytest.approx(sum(wished[:-1]) * 15.0 / 3600)
    assert answer["recorded"]["changes"] == sum(
        wish != question.situation.target for wish, question in zip(wished, questions, strict=True)
    )


def test_another_policy_decides_by_its_own_memory() -> None:
    answer: dict[str, Any] = replay(recording(), Asked(policy="keda-queue"))
    assert answer["replayed"]["policy"] == "keda-queue"
    assert {look["replayed"]["replicas"] for look in answer["looks"]} <= set(range(13))


@pytest.mark.parametrize("cut", ["another deployment", "another leader"])
def test_what_was_learnt_ends_where_it_ended_live(cut: str) -> None:
    first, second = recording(60), recording(60, uid="u" if cut == "another leader" else "v")
    alone = list(replayed(second, Asked(conservatism=4.0)))
    both = list(replayed([*first, *second], Asked(conservatism=4.0)))
    assert [look.replayed for look in both[60:]] == [look.replayed for look in alone]


def test_another_knob_begins_with_what_was_remembered_at_the_first_look_that_is_left() -> None:
    late = recording()[60:]
    learnt = next(replayed(late, Asked(conservatism=4.0)))
    forgot = next(replayed([replace(late[0], memory={})], Asked(conservatism=4.0)))
    assert learnt.replayed != forgot.replayed


@pytest.mark.parametrize(
    ("asked", "field"),
    [({"policy": "none"}, "policy"), ({"policy": sorted(LEFT_OUT)[0]}, "policy"),
     ({"conservatism": 0.0}, "conservatism"), ({"conservatism": float("nan")}, "conservatism"),
     ({"conservatism": 1e9}, "conservatism")],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(asked: dict[str, Any], field: str) -> None:
    with pytest.raises(ReplayError) as caught:
        Asked(**asked)
    assert caught.value.field == field


def test_nothing_recorded_and_a_policy_of_another_release_are_said() -> None:
    with pytest.raises(ReplayError, match="none was recorded"):
        replay([], Asked())
    strange: list[Recorded] = [replace(recording(1)[0], policy="of tomorrow")]
    with pytest.raises(ReplayError, match="of tomorrow"):
        replay(strange, Asked())
