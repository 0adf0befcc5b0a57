"""What the detection child does, in this process: bytes of frames in, verdicts and episodes out."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from enova_coordinator.core.detection import fold_settings, progress_limits
from enova_coordinator.core.followed_corrections import FollowedCorrection
from enova_coordinator.detection_messages import (
    DetectionAnswer,
    DetectionRequest,
    DetectionSetup,
    EngineFacts,
    FleetFacts,
    ReceivedFrame,
)
from enova_coordinator.detection_state import read_state
from enova_coordinator.detection_work import VERDICTS_MAX, step
from enova_coordinator.policy_process import ANSWER_BYTES_MAX
from enova_coordinator.service.detection_frames import packed, read_frame
from enova_recommender import catalog
from enova_recommender.detection.causes import Cause
from enova_recommender.detection.episodes import Change, Scope
from enova_recommender.detection.observation import FrameReading
from enova_recommender.performance.correction import Correction
from enova_recommender.performance.engine_model import EngineModel
from enova_testing.serving_world import BOUNDS, World, cluster
from enova_testing.wire_frames import frame_bytes, frame_message

SETTLED_S = 250.0                  # until what step times are learnt from has been seen, and the model's own error


@dataclass
class Child:
    """The work of a child, in this process, fed with a world's frames once a step."""

    world: World
    state_file: Path
    session: str = "a"
    answers: list[DetectionAnswer] = field(default_factory=list)
    ejected: frozenset[str] = frozenset()

    def begin(self) -> DetectionAnswer:
        fold = fold_settings(scale=1.0, step_s=1.0, bounds=BOUNDS)
        setup = DetectionSetup(
            fold=fold, limits=progress_limits(fold, scale=1.0), scale=1.0, state_file=str(self.state_file)
        )
        fleet = FleetFacts(placements=tuple(each.placement() for each in self.world.engines), engines={})
        return step(DetectionRequest(session=self.session, now_s=self.world.now_s, setup=setup, fleet=fleet))

    def until(self, until_s: float, *, save: bool = False) -> list[DetectionAnswer]:
        first = len(self.answers)
        while self.world.now_s < until_s:
            end_s = self.world.now_s + 5.0
            frames = tuple(
                ReceivedFrame(each.node, each.end_s, frame_bytes(each)) for each in self.world.frames(end_s)
            )
            request = DetectionRequest(
                session=self.session, now_s=end_s, frames=frames, ejected=self.ejected, save=save
            )
            self.answers.append(step(pickle.loads(pickle.dumps(request))))  # as over the pipe
        return self.answers[first:]

    def causes(self, answers: list[DetectionAnswer], replica: str = "replica-0") -> set[Cause | None]:
        return {each.cause for answer in answers for each in answer.verdicts or () if each.replica == replica}


@pytest.fixture
def child(tmp_path: Path) -> Child:
    found = Child(cluster(replicas=3), tmp_path / "detection.npz")
    assert found.begin().known
    return found


def test_a_frame_comes_off_the_wire_as_it_was() -> None:
    frame = next(iter(cluster().frames(1.0)))
    read = read_frame(frame.node, frame_bytes(frame))
    assert read is not None
    assert read.frame.replicas[0]._replace(histograms={}) == frame.replicas[0]._replace(histograms={})
    for name, counts in frame.replicas[0].histograms.items():
        assert read.frame.replicas[0].histograms[name].counts == list(counts.counts)
    assert read.frame.gpus == frame.gpus


def test_what_is_no_frame_and_whose_frame_it_is_are_told_by_the_sender() -> None:
    assert read_frame("nodes/n", b"\xff\xff\xff") is None
    frame = FrameReading(node="nodes/other", boot="b", sequence=1, start_s=0.0, end_s=1.0)
    read = read_frame("nodes/n", frame_bytes(frame))
    assert read is not None
    assert read.frame.node == "nodes/n"


def test_ages_become_model_time_and_lengths_do_not_travel() -> None:
    message = frame_message(next(iter(cluster().frames(1.0))))
    message.replicas[0].age_s = 0.5
    message.lengths.add(deployment="deployments/d", vector=b"x" * 1000)
    data = packed(message)
    assert len(data) < 1500
    read = read_frame("nodes/n", data, scale=20.0)
    assert read is not None
    assert read.frame.replicas[0].age_s == 10.0


def test_a_child_that_does_not_know_the_session_says_so() -> None:
    assert not step(DetectionRequest(session="never told", now_s=0.0)).known


def test_a_fleet_without_a_replica_is_judged_all_the_same(tmp_path: Path) -> None:
    child = Child(World([]), tmp_path / "detection.npz")
    child.begin()
    assert sum(each.steps for each in child.until(60.0)) > 5


def test_nothing_is_said_of_a_healthy_fleet(child: Child) -> None:
    answers = child.until(SETTLED_S)
    assert sum(each.steps for each in answers) > 40
    assert [each.changes for each in answers if each.changes] == []
    assert answers[-1].verdicts == ()


def test_a_slow_engine_is_found_without_a_data_sheet(child: Child) -> None:
    child.until(SETTLED_S)
    child.world.engines[0].slow(2.5)
    answers = child.until(SETTLED_S + 100.0)
    assert Cause.SLOW in child.causes(answers)
    opened = [told for each in answers for told in each.changes if told.change.change is Change.OPENED]
    assert [told.change.episode.root.name for told in opened][:1] == ["replica-0"]
    assert {each.feature for each in opened[0].series} >= {"running", "step_s"}
    assert all(len(each.values) <= 120 for each in opened[0].series)


def test_a_hung_engine_is_dead_and_its_episode_ends_when_it_is_back(child: Child) -> None:
    child.until(60.0)
    child.world.engines[0].hung = True
    answers = child.until(120.0)
    assert Cause.HUNG in child.causes(answers)
    child.world.engines[0].hung = False
    child.world.engines[0].restart()
    answers = child.until(240.0)
    assert [told.change.change for each in answers for told in each.changes][-1] is Change.CLOSED


def test_what_an_agent_found_is_a_verdict_before_frames_tell_it(child: Child) -> None:
    child.until(60.0)
    child.ejected = frozenset({"replica-1"})
    answers = child.until(70.0)
    assert child.causes(answers, "replica-1") == {Cause.HUNG}
    (told,) = [told for each in answers for told in each.changes]
    assert told.change.episode.root.scope is Scope.REPLICA
    child.ejected = frozenset()
    assert child.causes(child.until(80.0), "replica-1") == set()


def test_a_new_child_goes_on_from_the_file(child: Child) -> None:
    child.until(SETTLED_S, save=True)
    child.session = "b"
    child.begin()
    child.world.engines[0].slow(2.5)
    answers = child.until(SETTLED_S + 60.0)  # by far too short to learn anew
    assert Cause.SLOW in child.causes(answers)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 and then nothing"])
def test_a_file_that_cannot_be_read_is_told_and_begins_anew(child: Child, content: bytes) -> None:
    child.state_file.write_bytes(content)
    child.session = "b"
    child.begin()
    assert "learnt anew" in child.until(10.0)[-1].trouble


def test_a_file_of_another_shape_is_told_and_begins_anew(child: Child) -> None:
    with child.state_file.open("wb") as file:
        arrays: dict[str, Any] = {"watch/replicas": np.array(["replica-0"])}
        np.savez(file, **arrays)
    child.session = "b"
    child.begin()
    assert "learnt anew" in child.until(10.0)[-1].trouble
    assert Cause.MISSING not in child.causes(child.until(60.0))


def test_what_calibration_learns_is_followed_slowly_and_kept(child: Child) -> None:
    model = EngineModel(shape=catalog.models()["meta-llama/Llama-3.1-8B-Instruct"], gpu=catalog.gpus()["H100"])
    placements = tuple(each.placement() for each in child.world.engines)

    def told(correction: Correction | None) -> FleetFacts:
        return FleetFacts(
            placements=placements, engines={"chat-1": EngineFacts(model=model, correction=correction)}
        )

    def memory(now_s: float) -> float:
        arrays, _ = read_state(child.state_file)
        return FollowedCorrection.load(arrays["factors/chat-1"].tolist(), now_s=now_s).correction.memory

    step(DetectionRequest(session="a", now_s=5.0, fleet=told(None)))
    step(DetectionRequest(session="a", now_s=700.0, fleet=told(Correction(memory=1.5)), save=True))
    first = memory(700.0)
    step(DetectionRequest(session="a", now_s=1400.0, save=True))
    second = memory(1400.0)
    child.session, child.world.now_s = "b", 1400.0
    child.begin()
    step(DetectionRequest(session="b", now_s=1401.0, fleet=told(Correction(memory=1.5)), save=True))
    assert 1.0 < first < second < 1.02
    assert memory(1401.0) == second


def test_the_file_holds_plain_arrays(child: Child) -> None:
    child.until(20.0, save=True)
    arrays, trouble = read_state(child.state_file)
    assert trouble == ""
    assert arrays["watch/replicas"].tolist() == ["replica-0", "replica-1", "replica-2"]
    json.dumps({name: each.tolist() for name, each in arrays.items()})


def test_an_answer_is_bounded_though_all_of_a_large_fleet_is_silent(tmp_path: Path) -> None:
    world = cluster(replicas=3)
    child = Child(world, tmp_path / "detection.npz")
    child.begin()
    one = world.engines[0].placement()
    many = tuple(
        replace(one, replica=f"deployments/d{index}/replicas/r", nodes=(f"nodes/n{index}",), deployment=f"d{index}")
        for index in range(3_000)
    )
    fleet = FleetFacts(placements=many, engines={})
    answers = [step(DetectionRequest(session="a", now_s=now_s, fleet=fleet)) for now_s in (5.0, 10.0, 15.0, 30.0, 40.0)]
    verdicts = [each.verdicts for each in answers if each.verdicts]
    assert {len(each) for each in verdicts} == {VERDICTS_MAX}
    assert sum(each.omitted for each in answers) >= 2_000
    assert max(len(pickle.dumps(each)) for each in answers) < ANSWER_BYTES_MAX
